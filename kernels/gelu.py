"""GELU by tanh (Hendrycks and Gimpel), whose backward sums its gradient over the rows: that of a bias in its input.

x s with s = 1 / (1 + exp(-2 u)), which is (1 + tanh(u)) / 2, and u = sqrt(2 / pi) (x + 0.044715 x^3). All arithmetic is
float32, rounded once, when it is stored. The sums are taken over blocks of rows, then over the blocks in their order;
blocks follow from the shape alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from d2it.kernels.common import CompileCase, cdiv, compile_cases, next_power_of_2
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.modulate_rows import column_tile, load_tile, store_tile, sum_blocks, unwritten_bias
from d2it.kernels.rows import rows_of

PROGRAMS = 8192
"""How many of them a backward is cut into: a few for every place of a GPU."""
BLOCK_ROWS = 32, 128
"""Least and most rows of a block: its sums are 4 bytes a channel, written and read; a row has 6 bytes a channel."""


@triton.jit
def _sigmoid(b_x):
    """s and exp(-2 u); where that is infinite s is 0."""
    # 2 sqrt(2 / pi) log2(e), and that times 0.044715
    b_e = tl.exp2(-b_x * (2.302208198144325 + 0.10294324 * (b_x * b_x)))
    return 1.0 / (1.0 + b_e), b_e


@triton.jit
def gelu_fwd_kernel(out, x, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: ROWS rows of one chunk of channels. x `Rows`, out (rows, C) contiguous."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    o_row = tl.program_id(0) // CHUNKS * ROWS + tl.arange(0, ROWS)
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_tile = (o_row < x.rows)[:, None] & (o_col < C)[None, :]
    b_x = load_tile(x, o_row, o_col, m_tile)
    b_s, _ = _sigmoid(b_x)
    store_tile(out, b_x * b_s, o_row, o_col, m_tile, C)


@triton.jit
def gelu_bwd_kernel(
    dx, partials, grad, x, C: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program: one chunk of channels of a block of rows, ROWS rows at a time.

    grad and x `Rows`, dx (rows, C) contiguous; partials (blocks, C) float32, or None.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    i_stop = tl.minimum((i_block + 1) * BLOCK_ROWS, x.rows)
    b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
    for i_row in tl.range(i_block * BLOCK_ROWS, i_stop, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_tile = (o_row < i_stop)[:, None] & m_col[None, :]
        b_x = load_tile(x, o_row, o_col, m_tile)
        b_grad = load_tile(grad, o_row, o_col, m_tile)
        b_s, b_e = _sigmoid(b_x)
        b_slope = b_s * (b_s * tl.minimum(b_e, 1e38))  # s (1 - s), of which 1 - s would lose digits
        # 2 sqrt(2 / pi), and that times 3 * 0.044715
        b_dx = b_grad * (b_s + b_x * b_slope * (1.5957691216057308 + 0.21406445 * (b_x * b_x)))
        store_tile(dx, b_dx, o_row, o_col, m_tile, C)
        b_sum += b_dx
    if partials is not None:
        tl.store(partials + i_block.to(tl.int64) * C + o_col, tl.sum(b_sum, 0), mask=m_col)


@launcher
def gelu_forward(tape: Tape, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (B, L, C) or (T, C), any strides -> its shape and dtype. A bias is in x already."""
    out = tape.empty(x.shape, x.dtype)
    if out.numel():
        channels, rows = x.shape[-1], rows_of(x)
        tile = column_tile(channels, x.element_size())
        programs = cdiv(rows.rows, tile.rows) * cdiv(channels, tile.chunk)
        tape.launch(gelu_fwd_kernel, programs, out, rows, **tile.constants(channels))
    return out


@launcher
def gelu_backward(
    tape: Tape, grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the bias, in their dtypes; without a bias (0,)."""
    channels, rows = x.shape[-1], rows_of(x)
    dx = tape.empty(x.shape, x.dtype)
    dbias = unwritten_bias(tape, x, bias)
    tile = column_tile(channels, x.element_size())
    chunks = cdiv(channels, tile.chunk)
    least, most = BLOCK_ROWS
    block_rows = min(max(next_power_of_2(rows.rows * chunks // PROGRAMS), least), most)
    blocks = cdiv(rows.rows, block_rows)
    partials = None if bias is None else tape.empty((blocks, channels), torch.float32)
    if dx.numel():
        constants = tile.constants(channels)
        tape.launch(
            gelu_bwd_kernel, blocks * chunks, dx, partials, rows_of(grad), rows, BLOCK_ROWS=block_rows, **constants
        )
    if partials is not None:
        sum_blocks(tape, partials, dbias)
    return dx, dbias


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for channels in (1536, 4608):
        for dtype in (torch.bfloat16, torch.float32):
            x, bias = torch.empty((32768, channels), dtype=dtype, device="meta"), torch.empty(channels, device="meta")
            name = f"C{channels}-{str(dtype)[6:]}"
            yield name, partial(gelu_forward, x, bias)
            yield f"{name}-bias", partial(gelu_backward, x, x, bias)
            if channels == 4608:
                yield name, partial(gelu_backward, x, x, None)
