"""Everything about d2it that needs a GPU: see `python benchmarks/run_gpu.py --help`.

`plan` names the parts, `bundle` keeps what they leave in one file, `parts` runs them. The first two import the standard
library alone, so that the bundle is there before PyTorch is.
"""
