"""What every Triton launcher shares: options, block sizes, and the compile cases.

Names in kernels carry their role as a prefix: `i_` is an index (a scalar or a loop variable), `o_` offsets, `p_`
pointers, `m_` a mask, `b_` a block of values held in registers. Constants of the compiler are in capitals.

A tensor that needs more than its pointer reaches a kernel as one named tuple, which the launcher builds once: the
data, its strides, and as `tl.constexpr` what the compiler may rely on. A tensor that is absent is None. Helpers take
the tuple whole, each helper tuples of one class only: Triton shares a helper's code between arguments of equal types,
whatever their fields are called.

A kernel file declares beside its kernels what is compiled of it: a generator under `@compile_cases` that yields
`(name, call)` pairs, where `call()` runs the real launcher on meta tensors. The static report in `benchmarks` runs
those calls with launching replaced by compiling, so signature, constants, warps and alignment are the launcher's own.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels on CPU tensors. Read once, as `triton.jit` reads it per kernel."""

ASSERTIONS = {"debug": True, "sanitize_overflow": False}
"""Launch options that compile device assertions in, without Triton's own checks for integer overflow."""

GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)
"""Of red, green and blue (ITU-R 601-2 luma, as DQ-VAE and rgb2gray have it)."""

RANGE_SLACK = 1e-5
"""The share of a value range's width by which values may leave it: the rounding of a resize or a cast."""

CompileCase = tuple[str, Callable[[], object]]
COMPILE_CASES: dict[str, Callable[[], Iterator[CompileCase]]] = {}
"""Kernel file -> its cases. Filled by `compile_cases` when the file is imported."""

# (capability, streaming multiprocessors) that launchers see for tensors that lie on no GPU.
_target: tuple[tuple[int, int], int] = ((9, 0), 132)


def compile_cases(cases: Callable[[], Iterator[CompileCase]]) -> Callable[[], Iterator[CompileCase]]:
    """Declares the compile cases of a kernel file: every shipped config, at shapes that people run."""
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


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the compute capability (major, minor) of the tensor's GPU; the compile target's otherwise."""
    return _gpu(tensor.get_device())[0] if tensor.is_cuda else _target[0]


def num_sms(tensor: torch.Tensor) -> int:
    """Returns the streaming multiprocessors of the tensor's GPU; the compile target's otherwise."""
    return _gpu(tensor.get_device())[1] if tensor.is_cuda else _target[1]


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n, and at least 1 (Triton's own takes 3 us of host time)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up (Triton's own takes 2 us of host time)."""
    return -(-a // b)


def tiled_positions(q: torch.Tensor, slots: torch.Tensor | None, segment_ids: torch.Tensor | None) -> int:
    """Returns the largest window that is taken as one tile, and whose softmax the backward computes again.

    Larger ones go block by block, and their forward keeps the logarithm of each row's sum. A whole window of 64 does
    not fit into registers in float32, which has no tensor cores; where products do not read shared memory, which they
    do on sm_90 and sm_100 but not on sm_80 or sm_120; of heads wider than 80, or with segments.
    """
    width, major = q.shape[-1], capability(q)[0]
    if q.dtype == torch.float32 or major not in (9, 10):
        return 16
    if segment_ids is not None:  # Swin's shifted windows still do
        return 64 if width <= 32 and slots is None and major == 9 else 16
    return 64 if width <= 80 else 16
