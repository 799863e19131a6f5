"""Gate and add (DiT, section 3.2): x + gate * branch, for images and for packed rows.

All arithmetic is float32, rounded once, when it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from d2it.kernels.common import ASSERTIONS, CompileCase, cdiv, compile_cases
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.modulate_rows import (
    ELEMENTS_FORWARD,
    block_images,
    column_tile,
    existing,
    image_of,
    load_chunk,
    load_tile,
    make_runs,
    modulation_cases,
    row_tile,
    run_of,
    store_chunk,
    store_tile,
    sum_blocks,
    sum_runs,
    unwritten_bias,
)
from d2it.kernels.rows import index_of, rows_of


@triton.jit
def gated_residual_fwd_kernel(out, x, branch, gate, sample, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: ROWS rows. x, branch and gate are `Rows`, sample an `Index` or None; out (rows, C) contiguous."""
    o_wanted = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_wanted < x.rows
    o_row = tl.minimum(o_wanted, x.rows - 1)  # past the end the last row again: loads need no mask
    b_image = image_of(sample, o_row, x.length)
    o_image = existing(sample, b_image, gate.rows)
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        b_x = load_chunk(x, o_row, i, C, CHUNK)
        b_branch = load_chunk(branch, o_row, i, C, CHUNK)
        b_gate = load_chunk(gate, o_image, i, C, CHUNK)
        store_chunk(out, b_x + b_gate * b_branch, o_row, m_row, i, C, CHUNK)
    if sample is not None:
        tl.device_assert(b_image == o_image, "gated_residual: sample must name an image")


@triton.jit
def gated_residual_bwd_kernel(
    dbranch, runs, grad, branch, gate, sample, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program: one chunk of a block of rows, run by run, ROWS rows at a time.

    grad, branch and gate are `Rows`, sample an `Index` or None, runs `Runs`, with the sum for gate, and for a bias that
    of dbranch over the block; dbranch (rows, C) contiguous.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    b_image, m_block, ordered, i_image_first, i_image_last = block_images(
        runs, i_block, sample, branch.rows, branch.length
    )
    i_first = i_block * runs.BLOCK_ROWS
    b_bias_sum = tl.zeros((ROWS, CHUNK), tl.float32)
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = run_of(i_image, b_image, m_block, ordered)
        b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
        for i_row in tl.range(i_first + i_begin, i_first + i_end, ROWS, num_stages=2):
            o_row = i_row + tl.arange(0, ROWS)
            m_row = o_row < i_first + i_end
            m_tile = m_row[:, None] & m_col[None, :]
            o_image = image_of(sample, tl.minimum(o_row, i_first + i_end - 1), branch.length)
            b_grad = load_tile(grad, o_row, o_col, m_tile)
            b_branch = load_tile(branch, o_row, o_col, m_tile)
            b_gate = load_tile(gate, o_image, o_col, m_tile)
            b_sum += b_grad * b_branch
            b_dbranch = b_grad * b_gate
            if runs.bias is not None:
                b_bias_sum += b_dbranch
            store_tile(dbranch, b_dbranch, o_row, o_col, m_tile, C)
        p_run = runs.partials + (i_block + i_image).to(tl.int64) * C
        tl.store(p_run + o_col, tl.sum(b_sum, 0), mask=m_col)
    if runs.bias is not None:
        tl.store(runs.bias + i_block.to(tl.int64) * C + o_col, tl.sum(b_bias_sum, 0), mask=m_col)


@launcher
def gated_residual_forward(
    tape: Tape,
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    sample: torch.Tensor | None,
) -> torch.Tensor:
    """x, branch (B, L, C), or (T, C) with sample; gate (B, C); any strides -> the shape and dtype of x.

    A bias is in the branch already. A sample outside 0..B-1 is a device-side assertion.
    """
    out = tape.empty(x.shape, x.dtype)
    if out.numel() == 0:
        return out
    tile = row_tile(x.shape[-1], ELEMENTS_FORWARD)
    rows = rows_of(x)
    tape.launch(
        gated_residual_fwd_kernel,
        cdiv(rows.rows, tile.rows),
        out,
        rows,
        rows_of(branch),
        rows_of(gate),
        index_of(sample),
        **tile.constants(x.shape[-1]),
        **ASSERTIONS,
    )
    return out


@launcher
def gated_residual_backward(
    tape: Tape,
    grad: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    sample: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of branch, gate and the branch's bias, in their dtypes, (0,) without a bias; that of x is grad."""
    dbranch, dgate = tape.empty(branch.shape, branch.dtype), tape.empty(gate.shape, gate.dtype)
    dbias, channels = unwritten_bias(tape, branch, bias), branch.shape[-1]
    runs = make_runs(tape, grad, gate.shape[0], 1, sample, bias=bias)
    if gate.numel():
        tile = column_tile(channels, branch.element_size())
        if runs.blocks:
            tape.launch(
                gated_residual_bwd_kernel,
                runs.blocks * cdiv(channels, tile.chunk),
                dbranch,
                runs,
                rows_of(grad),
                rows_of(branch),
                rows_of(gate),
                index_of(sample),
                **tile.constants(channels),
            )
        sum_runs(tape, runs, grad, branch, sample, dgate)
    if runs.bias is not None:
        sum_blocks(tape, runs.bias, dbias)
    return dbranch, dgate, dbias


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for name, rows, parameter, sample in modulation_cases():
        yield f"{name}-gate", partial(gated_residual_forward, rows, rows, parameter, None, sample)
        for bias in (None, parameter[0]):
            kind = "gate" if bias is None else "gate-bias"
            yield f"{name}-{kind}", partial(gated_residual_backward, rows, rows, parameter, bias, sample)
