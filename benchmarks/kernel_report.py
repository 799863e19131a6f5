"""What the compiler made of every kernel: no GPU needed.

    python benchmarks/kernel_report.py --arch sm_80 sm_90 sm_100 sm_120 [--json FILE]
    python benchmarks/kernel_report.py --arch sm_90 --heaviest sm_80 sm_100 --library d2it/_C.abi3.so

The package `kernel_report` beside this file does the work.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels have no machine code

from kernel_report.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
