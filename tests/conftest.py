"""Test setup that must come before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: from here on its kernels run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
