"""Rows of (B, L, C) or (T, C) tensors, and indices of rows: the named tuples that launchers build and kernels take."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@functools.lru_cache(maxsize=None, typed=True)
def constant(value: int) -> tl.constexpr:
    """Returns the value as a constant of the compiler, for a named tuple.

    It is one object for each value: a launch then compares it by identity, 1 us faster than by its Python method.
    """
    return tl.constexpr(value)


class Rows(NamedTuple):
    """A tensor as rows of channels, flat over (batch, length), any strides.

    Attributes:
        data: The tensor; a pointer in the kernel.
        rows: Number of rows.
        length: Rows of a batch entry.
        stride_batch: Elements from one batch entry to the next, divided by `ALIGN`; 0 where `FLAT`.
        stride_row: Elements from one row to the next, divided by `ALIGN`.
        stride_col: Elements from one channel to the next.
        ALIGN: The power of two, at most 16, that divides both strides: how wide the compiler may load.
        FLAT: Whether one stride serves all rows.
    """

    data: torch.Tensor
    rows: int
    length: int
    stride_batch: int
    stride_row: int
    stride_col: int
    ALIGN: tl.constexpr
    FLAT: tl.constexpr


def rows_of(tensor: torch.Tensor) -> Rows:
    """Returns the rows of (B, L, C) or (T, C), any strides."""
    length = tensor.shape[-2]
    row, col = tensor.stride()[-2:]
    batch, images = (tensor.stride(0), tensor.shape[0]) if tensor.ndim == 3 else (0, 1)
    flat = images <= 1 or batch == length * row
    align = math.gcd(16, row) if flat else math.gcd(16, row, batch)
    strides = (0 if flat else batch // align, row // align, col)
    return Rows(tensor, images * length, max(length, 1), *strides, constant(align), constant(flat))


class Index(NamedTuple):
    """One integer a row.

    Attributes:
        data: (rows,) int32 or int64; a pointer in the kernel.
        stride: Elements from one entry to the next.
    """

    data: torch.Tensor
    stride: int


def index_of(tensor: torch.Tensor | None) -> Index | None:
    """Returns the entries of a (rows,) tensor, any stride; None for None."""
    return None if tensor is None else Index(tensor, tensor.stride(0))


@triton.jit
def row_offsets(rows, o_row):
    """int64 offsets of the first channel of rows that are flat over (batch, length)."""
    if rows.FLAT:
        return o_row.to(tl.int64) * rows.stride_row * rows.ALIGN
    o_row = o_row.to(tl.int32)  # a 64-bit division would cost more than the row's loads
    o_batch = o_row // rows.length
    o_in_batch = o_row - o_batch * rows.length
    return (o_batch.to(tl.int64) * rows.stride_batch + o_in_batch.to(tl.int64) * rows.stride_row) * rows.ALIGN
