"""Relative position bias: a ((2w-1)^2, H) table spread over the w*w x w*w pairs of a window.

Entry (i, j) of head h reads table row (y_i - y_j + w - 1) * (2w - 1) + (x_i - x_j + w - 1), as in Swin
Transformer, section 3.2. The forward is bound by its stores, the backward by its loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import CompileCase, cdiv, compile_cases, next_power_of_2
from d2it.kernels.launch import Tape, launcher


class Table(NamedTuple):
    """`data` ((2w-1)^2, H), with its strides in elements: `stride_row` from offset to offset, `stride_head`."""

    data: torch.Tensor
    stride_row: int
    stride_head: int


class Bias(NamedTuple):
    """`data` (1, H, w*w, w*w), with its strides in elements: `stride_head`, `stride_query`, `stride_key`."""

    data: torch.Tensor
    stride_head: int
    stride_query: int
    stride_key: int


@triton.jit
def relative_position_bias_fwd_kernel(table, bias, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK consecutive entries of one head. table is a `Table`; bias contiguous."""
    CELLS: tl.constexpr = WINDOW * WINDOW
    PAIRS: tl.constexpr = CELLS * CELLS
    BLOCKS: tl.constexpr = (PAIRS + BLOCK - 1) // BLOCK
    i_head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_pair = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    m_pair = o_pair < PAIRS
    o_query = o_pair // CELLS
    o_key = o_pair % CELLS
    o_dy = o_query // WINDOW - o_key // WINDOW + (WINDOW - 1)
    o_dx = o_query % WINDOW - o_key % WINDOW + (WINDOW - 1)
    o_row = (o_dy * (2 * WINDOW - 1) + o_dx).to(tl.int64)
    b_bias = tl.load(table.data + o_row * table.stride_row + i_head * table.stride_head, mask=m_pair)
    tl.store(bias + i_head * PAIRS + o_pair, b_bias, mask=m_pair)


@triton.jit
def relative_position_bias_bwd_kernel(grad, dtable, heads, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one vertical offset of one head, that is 2w-1 rows of dtable, each written once.

    The w x w blocks of pairs at that vertical offset are added up in the order of the query's row, then each
    diagonal of the sum is one horizontal offset: a fixed order and no atomics, so repeats are bit-equal.
    grad is a `Bias`; dtable ((2w-1)^2, H) contiguous.
    """
    OFFSETS: tl.constexpr = 2 * WINDOW - 1
    i_head = (tl.program_id(0) // OFFSETS).to(tl.int64)
    i_dy = tl.program_id(0) % OFFSETS - (WINDOW - 1)
    o_query = tl.arange(0, BLOCK)[:, None]
    o_key = tl.arange(0, BLOCK)[None, :]
    m_block = (o_query < WINDOW) & (o_key < WINDOW)
    p_grad = grad.data + i_head * grad.stride_head
    p_grad += o_query.to(tl.int64) * grad.stride_query + o_key.to(tl.int64) * grad.stride_key
    b_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for y_query in tl.range(tl.maximum(i_dy, 0), tl.minimum(WINDOW + i_dy, WINDOW)):
        i_query = tl.cast(y_query, tl.int64) * WINDOW
        i_key = tl.cast(y_query - i_dy, tl.int64) * WINDOW
        b_grad = tl.load(p_grad + i_query * grad.stride_query + i_key * grad.stride_key, mask=m_block, other=0.0)
        b_sum += b_grad.to(tl.float32)
    i_row = tl.cast(i_dy + (WINDOW - 1), tl.int64) * OFFSETS
    for x_row in tl.range(0, OFFSETS):
        b_diagonal = tl.where(o_query - o_key == x_row - (WINDOW - 1), b_sum, 0.0)
        tl.store(dtable + (i_row + x_row) * heads + i_head, tl.sum(b_diagonal).to(dtable.dtype.element_ty))


@launcher
def relative_position_bias_forward(tape: Tape, table: torch.Tensor, window: int) -> torch.Tensor:
    """table ((2w-1)^2, H), any strides -> (1, H, w*w, w*w)."""
    heads, cells = table.shape[1], window * window
    bias = tape.empty((1, heads, cells, cells), table.dtype)
    block = min(1024, next_power_of_2(cells * cells))
    if heads:
        tape.launch(
            relative_position_bias_fwd_kernel,
            heads * cdiv(cells * cells, block),
            Table(table, *table.stride()),
            bias,
            WINDOW=window,
            BLOCK=block,
            num_warps=4,
        )
    return bias


@launcher
def relative_position_bias_backward(tape: Tape, grad: torch.Tensor, window: int) -> torch.Tensor:
    """grad (1, H, w*w, w*w), any strides -> ((2w-1)^2, H) in grad's dtype, summed in float32."""
    heads, offsets = grad.shape[1], 2 * window - 1
    dtable = tape.empty((offsets * offsets, heads), grad.dtype)
    block = next_power_of_2(window)
    if heads:
        tape.launch(
            relative_position_bias_bwd_kernel,
            heads * offsets,
            Bias(grad, *grad.stride()[1:]),
            dtable,
            heads,
            WINDOW=window,
            BLOCK=block,
            num_warps=min(8, max(1, block * block // 256)),  # 8 elements a lane at window 16
        )
    return dtable


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for window, heads in ((4, 6), (8, 12), (16, 16), (64, 1)):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"w{window}-H{heads}-{str(dtype)[6:]}"
            table = torch.empty(((2 * window - 1) ** 2, heads), dtype=dtype, device="meta")
            grad = torch.empty((1, heads, window**2, window**2), dtype=dtype, device="meta")
            yield name, partial(relative_position_bias_forward, table, window)
            yield name, partial(relative_position_bias_backward, grad, window)
