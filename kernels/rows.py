"""Rows of (B, L, C) or (T, C) tensors by their strides: one description for every launcher that walks rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class RowLayout(NamedTuple):
    """Where the rows of a tensor lie, flat over (batch, length)."""

    length: int
    stride_batch: int  # this and stride_row divided by align
    stride_row: int
    stride_col: int
    align: int  # the power of two, 16 at most, that divides both: how wide the compiler may load
    flat: bool  # one stride serves all rows

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The run-time arguments: length, and the strides by batch, row and channel."""
        return self[:4]


def row_layout(tensor: torch.Tensor) -> RowLayout:
    """The layout of (B, L, C) or (T, C), any strides."""
    length = tensor.shape[-2]
    row, col = tensor.stride()[-2:]
    batch, images = (tensor.stride(0), tensor.shape[0]) if tensor.ndim == 3 else (0, 1)
    flat = images <= 1 or batch == length * row
    align = math.gcd(16, row) if flat else math.gcd(16, row, batch)
    return RowLayout(max(length, 1), 0 if flat else batch // align, row // align, col, align, flat)


@triton.jit
def row_offsets(o_row, length, stride_batch, stride_row, ALIGN: tl.constexpr, FLAT: tl.constexpr):
    """int64 offsets of the first channel of rows that are flat over (batch, length)."""
    if FLAT:
        return o_row.to(tl.int64) * stride_row * ALIGN
    o_row = o_row.to(tl.int32)  # a 64-bit division would cost more than the row's loads
    o_batch = o_row // length
    o_in_batch = o_row - o_batch * length
    return (o_batch.to(tl.int64) * stride_batch + o_in_batch.to(tl.int64) * stride_row) * ALIGN
