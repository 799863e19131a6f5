"""What every Triton launcher shares: device guard, alignment check, block sizes, and the compile cases.

A kernel file states once, beside its kernels, what is compiled of it: a generator under
``@compile_cases`` that yields ``(name, call)`` pairs, where ``call()`` runs the real launcher on meta
tensors. The static report (``benchmarks/kernel_report.py``) runs those calls with launching replaced by
compiling, so signature, constants, warps and alignment hints are the launcher's own and cannot drift.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels on CPU tensors. Read once, as ``triton.jit`` reads it per kernel."""

CompileCase = tuple[str, Callable[[], object]]
COMPILE_CASES: dict[str, Callable[[], Iterator[CompileCase]]] = {}
"""Kernel file -> its cases. Filled by :func:`compile_cases` when the file is imported."""

# (capability, streaming multiprocessors) that launchers see for tensors that lie on no GPU.
_target: tuple[tuple[int, int], int] = ((9, 0), 132)


def compile_cases(cases: Callable[[], Iterator[CompileCase]]) -> Callable[[], Iterator[CompileCase]]:
    """Declare the compile cases of a kernel file: every shipped config, at shapes that people run."""
    COMPILE_CASES[cases.__module__] = cases
    return cases


@contextlib.contextmanager
def compile_target(capability: tuple[int, int], sms: int) -> Iterator[None]:
    """Within it, launchers that get meta tensors choose their configs for this GPU."""
    global _target
    previous, _target = _target, (capability, sms)
    try:
        yield
    finally:
        _target = previous


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current for a launch; nothing on CPU and meta tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Compute capability (major, minor) of the GPU that holds the tensor; the compile target's otherwise."""
    return _gpu(tensor.get_device())[0] if tensor.is_cuda else _target[0]


def num_sms(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the GPU that holds the tensor; the compile target's otherwise."""
    return _gpu(tensor.get_device())[1] if tensor.is_cuda else _target[1]


def aligned16(*tensors: torch.Tensor) -> bool:
    """Whether every tensor starts on a 16-byte boundary: contiguity does not promise it."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def tiled_positions(q: torch.Tensor, slots: torch.Tensor | None, segment_ids: torch.Tensor | None) -> int:
    """The largest window that window attention takes as one tile, and whose softmax its backward computes again.

    Larger ones go block by block, and their forward keeps the logarithm of each row's sum. A whole window of 64 does
    not fit into registers in float32, which has no tensor cores; before Hopper, whose products read shared memory; of
    heads wider than 80, or with segments.
    """
    width, major = q.shape[-1], capability(q)[0]
    if q.dtype == torch.float32 or major < 9:
        return 16
    if segment_ids is not None:  # Swin's shifted windows still do
        return 64 if width <= 32 and slots is None and major == 9 else 16
    return 64 if width <= 80 else 16
