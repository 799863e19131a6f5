"""What the compiler made of every kernel, without a GPU: see `python benchmarks/kernel_report.py --help`."""
