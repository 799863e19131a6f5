"""adaLN for images and for packed rows (DiT, section 3.2): modulate a LayerNorm without affine; after gate and add too.

All arithmetic is float32, rounded once, when it is stored.

A row belongs to one warp and stays in its registers, as a tuple of chunks: C = 1152 is five chunks of 256 or nine of
128, where one power of two would leave 44 % of the lanes idle. Sums over a row so need neither shared memory nor
barriers. The forward keeps mean and 1 / deviation of each row, 8 bytes, for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from d2it.kernels.common import ASSERTIONS, CompileCase, cdiv, compile_cases
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.modulate_rows import (
    ELEMENTS_BACKWARD,
    ELEMENTS_FORWARD,
    Runs,
    block_images,
    existing,
    image_of,
    load_chunk,
    load_stats,
    make_runs,
    modulation_cases,
    row_tile,
    run_of,
    store_chunk,
    sum_blocks,
    sum_runs,
    unwritten_bias,
)
from d2it.kernels.rows import index_of, rows_of


@triton.jit
def _normalize(b_x, eps, C: tl.constexpr, CHUNK: tl.constexpr):
    """Rows, 0 past C, as zero mean and unit variance: a tuple of chunks; mean and 1 / deviation of each row."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    b_sum = b_x[0]
    for i in tl.static_range(1, CHUNKS):
        b_sum += b_x[i]
    b_mean = tl.sum(b_sum, 1) / C
    b_sum = tl.zeros_like(b_sum)
    b_centred = ()
    for i in tl.static_range(CHUNKS):
        b_chunk = b_x[i] - b_mean[:, None]
        if (i + 1) * CHUNK > C:
            b_chunk = tl.where((i * CHUNK + tl.arange(0, CHUNK) < C)[None, :], b_chunk, 0.0)
        b_sum += b_chunk * b_chunk
        b_centred = b_centred + (b_chunk,)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_sum, 1) / C + eps)
    b_normed = ()
    for i in tl.static_range(CHUNKS):
        b_normed = b_normed + (b_centred[i] * b_rstd[:, None],)
    return b_normed, b_mean, b_rstd


@triton.jit
def adaln_modulate_fwd_kernel(
    out,
    total,
    stats,
    x,
    branch,
    gate,
    shift,
    scale,
    sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: ROWS rows. x, branch, gate, shift and scale are `Rows`, sample an `Index` or None.

    out and total (rows, C) contiguous, stats (rows, 2). With branch, what is modulated is x + gate * branch as total
    stores it; without, gate and total are None too.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    o_wanted = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_wanted < x.rows
    o_row = tl.minimum(o_wanted, x.rows - 1)  # past the end the last row again: loads need no mask
    b_image = image_of(sample, o_row, x.length)
    o_image = existing(sample, b_image, scale.rows)
    b_x = ()
    for i in tl.static_range(CHUNKS):
        b_chunk = load_chunk(x, o_row, i, C, CHUNK)
        if branch is not None:
            b_chunk += load_chunk(gate, o_image, i, C, CHUNK) * load_chunk(branch, o_row, i, C, CHUNK)
            store_chunk(total, b_chunk, o_row, m_row, i, C, CHUNK)
            b_chunk = b_chunk.to(total.dtype.element_ty).to(tl.float32)
        b_x = b_x + (b_chunk,)
    b_normed, b_mean, b_rstd = _normalize(b_x, eps, C, CHUNK)
    tl.store(stats + o_row.to(tl.int64) * 2, b_mean, mask=m_row)
    tl.store(stats + o_row.to(tl.int64) * 2 + 1, b_rstd, mask=m_row)
    for i in tl.static_range(CHUNKS):
        b_shift = load_chunk(shift, o_image, i, C, CHUNK)
        b_scale = load_chunk(scale, o_image, i, C, CHUNK)
        store_chunk(out, b_normed[i] * (1.0 + b_scale) + b_shift, o_row, m_row, i, C, CHUNK)
    if sample is not None:  # last, since loads would wait for an assertion
        tl.device_assert(b_image == o_image, "adaln_modulate: sample must name an image")


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def adaln_modulate_bwd_kernel(
    dx,
    dbranch,
    runs,
    grad,
    grad_total,
    x,
    branch,
    gate,
    scale,
    sample,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: a block of rows, run by run, ROWS rows at a time.

    grad, grad_total, x, branch, gate and scale are `Rows`, sample an `Index` or None, runs `Runs`, with the sums for
    shift and for scale; dx and dbranch (rows, C) contiguous. With branch, x is the total that the forward stored, and
    the runs have the sums for gate too, and for a bias that of dbranch over the block; without, gate, grad_total and
    dbranch are None too. EARLY: grad_total and branch are asked for before the sums over a row, and wait in registers,
    as the sums for a bias do. Else ROWS is 1, and those are added up in memory, each by the thread of its channel.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0)
    b_image, m_block, ordered, i_image_first, i_image_last = block_images(runs, i_block, sample, x.rows, x.length)
    i_first = i_block * runs.BLOCK_ROWS
    b_bias_sum = ()
    for _ in tl.static_range(CHUNKS):
        b_bias_sum = b_bias_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
    if runs.bias is not None and not EARLY:
        for i in tl.static_range(CHUNKS):
            o_bias = (i * CHUNK + tl.arange(0, CHUNK))[None, :]
            tl.store(runs.bias + i_block.to(tl.int64) * C + o_bias, tl.zeros((1, CHUNK), tl.float32), mask=o_bias < C)
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = run_of(i_image, b_image, m_block, ordered)
        b_shift_sum = ()
        b_scale_sum = ()
        for _ in tl.static_range(CHUNKS):
            b_shift_sum = b_shift_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
            b_scale_sum = b_scale_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
        b_gate_sum = b_shift_sum  # carried along unused without branch
        i_stop = i_first + i_end
        for i_row in tl.range(i_first + i_begin, i_stop, ROWS):
            o_wanted = i_row + tl.arange(0, ROWS)
            m_row = o_wanted < i_stop
            o_row = tl.minimum(o_wanted, i_stop - 1)
            b_weight = m_row.to(tl.float32)
            o_image = image_of(sample, o_row, x.length)
            b_mean, b_rstd = load_stats(runs.stats, o_row)
            b_rstd *= b_weight  # nothing but zeros of the row that is there again
            b_offset = b_mean * b_rstd
            b_total_grad = ()
            b_branch = ()
            if branch is not None and EARLY:
                for i in tl.static_range(CHUNKS):
                    b_total_grad = b_total_grad + (load_chunk(grad_total, o_row, i, C, CHUNK),)
                    b_branch = b_branch + (load_chunk(branch, o_row, i, C, CHUNK),)
            b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
            b_dot = tl.zeros((ROWS, CHUNK), tl.float32)
            b_x = ()
            b_dnormed = ()
            b_shift_next = ()
            b_scale_next = ()
            for i in tl.static_range(CHUNKS):
                b_grad = load_chunk(grad, o_row, i, C, CHUNK)
                b_row = load_chunk(x, o_row, i, C, CHUNK)
                b_normed = b_row * b_rstd[:, None] - b_offset[:, None]
                b_shift_next = b_shift_next + (b_shift_sum[i] + b_grad * b_weight[:, None],)
                b_scale_next = b_scale_next + (b_scale_sum[i] + b_grad * b_normed,)
                b_grad += b_grad * load_chunk(scale, o_image, i, C, CHUNK)
                b_sum += b_grad
                b_dot += b_grad * b_normed
                b_x = b_x + (b_row,)
                b_dnormed = b_dnormed + (b_grad,)
            b_shift_sum = b_shift_next
            b_scale_sum = b_scale_next
            # dx = (g - mean(g) - normed * mean(g * normed)) / deviation with g = grad * (1 + scale): g * a + x * b + c
            b_sum, b_dot = tl.reduce((b_sum, b_dot), 1, _add_pairs)
            b_factor = b_rstd * b_rstd * (b_dot / -C)
            b_constant = -b_rstd * (b_sum / C) - b_mean * b_factor
            b_gate_next = ()
            b_bias_next = ()
            for i in tl.static_range(CHUNKS):
                b_dx = b_dnormed[i] * b_rstd[:, None] + (b_x[i] * b_factor[:, None] + b_constant[:, None])
                if branch is not None:
                    b_total_chunk = b_total_grad[i] if EARLY else load_chunk(grad_total, o_row, i, C, CHUNK)
                    b_branch_chunk = b_branch[i] if EARLY else load_chunk(branch, o_row, i, C, CHUNK)
                    b_dx += b_total_chunk * b_weight[:, None]
                    b_gate_next = b_gate_next + (b_gate_sum[i] + b_dx * b_branch_chunk,)
                    b_dbranch = b_dx * load_chunk(gate, o_image, i, C, CHUNK)
                    if EARLY:
                        b_bias_next = b_bias_next + (b_bias_sum[i] + b_dbranch,)
                    elif runs.bias is not None:
                        o_bias = (i * CHUNK + tl.arange(0, CHUNK))[None, :]
                        p_bias = runs.bias + i_block.to(tl.int64) * C + o_bias
                        tl.store(p_bias, tl.load(p_bias, mask=o_bias < C) + b_dbranch, mask=o_bias < C)
                    store_chunk(dbranch, b_dbranch, o_row, m_row, i, C, CHUNK)
                store_chunk(dx, b_dx, o_row, m_row, i, C, CHUNK)
            if branch is not None:
                b_gate_sum = b_gate_next
            if runs.bias is not None and EARLY:
                b_bias_sum = b_bias_next
        p_run = runs.partials + (i_block + i_image).to(tl.int64) * (C * runs.SUMS)
        for i in tl.static_range(CHUNKS):
            o_col = i * CHUNK + tl.arange(0, CHUNK)
            tl.store(p_run + o_col, tl.sum(b_shift_sum[i], 0), mask=o_col < C)
            tl.store(p_run + C + o_col, tl.sum(b_scale_sum[i], 0), mask=o_col < C)
            if branch is not None:
                tl.store(p_run + 2 * C + o_col, tl.sum(b_gate_sum[i], 0), mask=o_col < C)
    if runs.bias is not None and EARLY:
        for i in tl.static_range(CHUNKS):
            o_col = i * CHUNK + tl.arange(0, CHUNK)
            tl.store(runs.bias + i_block.to(tl.int64) * C + o_col, tl.sum(b_bias_sum[i], 0), mask=o_col < C)


@launcher
def adaln_modulate_forward(
    tape: Tape,
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, C), or (T, C) with sample; shift, scale (B, C); any strides.

    Returns the modulation, of the shape and dtype of x, and mean and 1 / deviation of the rows, (rows, 2) float32. A
    sample outside 0..B-1 is a device-side assertion.
    """
    out, stats = tape.empty(x.shape, x.dtype), _stats_of(tape, x)
    _forward(tape, out, None, stats, x, None, None, shift, scale, sample, eps)
    return out, stats


@launcher
def gated_residual_modulate_forward(
    tape: Tape,
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, branch (B, L, C), or (T, C) with sample; gate, shift, scale (B, C); any strides. A bias is in the branch.

    Returns x + gate * branch and its modulation, of the shape and dtype of x, and mean and 1 / deviation of the rows,
    (rows, 2) float32. A sample outside 0..B-1 is a device-side assertion.
    """
    total, out, stats = tape.empty(x.shape, x.dtype), tape.empty(x.shape, x.dtype), _stats_of(tape, x)
    _forward(tape, out, total, stats, x, branch, gate, shift, scale, sample, eps)
    return total, out, stats


def _stats_of(tape: Tape, x: torch.Tensor) -> torch.Tensor:
    return tape.empty((math.prod(x.shape[:-1]), 2), torch.float32)


def _forward(
    tape: Tape,
    out: torch.Tensor,
    total: torch.Tensor | None,
    stats: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
    eps: float,
) -> None:
    if out.numel() == 0:
        return
    tile = row_tile(x.shape[-1], ELEMENTS_FORWARD)
    rows = rows_of(x)
    tape.launch(
        adaln_modulate_fwd_kernel,
        cdiv(rows.rows, tile.rows),
        out,
        total,
        stats,
        rows,
        None if branch is None else rows_of(branch),
        None if gate is None else rows_of(gate),
        rows_of(shift),
        rows_of(scale),
        index_of(sample),
        eps,
        **tile.constants(x.shape[-1]),
        **ASSERTIONS,
    )


@launcher
def adaln_modulate_backward(
    tape: Tape,
    grad: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (its dtype), shift and scale (that of scale); `stats` is the forward's, which has `eps` in it."""
    dx = tape.empty(x.shape, x.dtype)
    dshift, dscale = tape.empty(scale.shape, scale.dtype), tape.empty(scale.shape, scale.dtype)
    if scale.numel():
        runs = make_runs(tape, grad, scale.shape[0], 2, sample, stats)
        _backward(tape, dx, None, runs, grad, None, x, None, None, scale, sample)
        sum_runs(tape, runs, grad, x, sample, dshift, dscale)
    return dx, dshift, dscale


@launcher
def gated_residual_modulate_backward(
    tape: Tape,
    grad_total: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor,
    stats: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, branch, gate, shift, scale and the branch's bias from those of the total and of its modulation;
    without a bias (0,)."""
    dx, dbranch = tape.empty(total.shape, total.dtype), tape.empty(branch.shape, branch.dtype)
    dgate, dbias = tape.empty(gate.shape, gate.dtype), unwritten_bias(tape, branch, bias)
    dshift, dscale = tape.empty(scale.shape, scale.dtype), tape.empty(scale.shape, scale.dtype)
    runs = make_runs(tape, grad, scale.shape[0], 3, sample, stats, bias)
    if scale.numel():
        _backward(tape, dx, dbranch, runs, grad, grad_total, total, branch, gate, scale, sample)
        sum_runs(tape, runs, grad, total, sample, dshift, dscale)
        sum_runs(tape, runs._replace(partials=runs.partials[:, 2], stats=None), dx, branch, sample, dgate)
    if runs.bias is not None:
        sum_blocks(tape, runs.bias, dbias)
    return dx, dbranch, dgate, dshift, dscale, dbias


def _backward(
    tape: Tape,
    dx: torch.Tensor,
    dbranch: torch.Tensor | None,
    runs: Runs,
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
) -> None:
    channels = x.shape[-1]
    tile = row_tile(channels, ELEMENTS_BACKWARD)
    if runs.blocks:
        tape.launch(
            adaln_modulate_bwd_kernel,
            runs.blocks,
            dx,
            dbranch,
            runs,
            rows_of(grad),
            None if grad_total is None else rows_of(grad_total),
            rows_of(x),
            None if branch is None else rows_of(branch),
            None if gate is None else rows_of(gate),
            rows_of(scale),
            index_of(sample),
            EARLY=channels <= 4096,  # wider rows would spill
            **tile.constants(channels),
        )


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for name, rows, parameter, sample in modulation_cases():
        stats = rows.new_empty((math.prod(rows.shape[:-1]), 2), dtype=torch.float32)
        yield f"{name}-modulate", partial(adaln_modulate_forward, rows, parameter, parameter, sample, 1e-6)
        yield f"{name}-modulate", partial(adaln_modulate_backward, rows, rows, stats, parameter, sample, 1e-6)
        given = (rows, rows, parameter, parameter, parameter, None, sample, 1e-6)
        yield f"{name}-gate-modulate", partial(gated_residual_modulate_forward, *given)
        for bias in (None, parameter[0]):
            kind = "gate-modulate" if bias is None else "gate-modulate-bias"
            given = (rows, rows, rows, stats, rows, parameter, parameter, bias, sample, 1e-6)
            yield f"{name}-{kind}", partial(gated_residual_modulate_backward, *given)
