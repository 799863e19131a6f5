"""Test setup that must come before anything imports Triton."""

import os

import numpy
import torch

# From numpy 2.4 on, the interpreter's tl.range fails on bounds known at run time.
CAN_INTERPRET = tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)

if not torch.cuda.is_available() and CAN_INTERPRET:
    # Triton reads it when a kernel is defined: from here on its kernels run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter) -> None:
    if not torch.cuda.is_available() and not CAN_INTERPRET:
        reason = f"its interpreter needs numpy < 2.4, this is {numpy.__version__}"
        terminalreporter.write_line(f"Triton kernels were NOT tested: {reason}", yellow=True)
