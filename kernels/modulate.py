"""adaLN for images and for packed rows (DiT, section 3.2): modulate a LayerNorm without affine; gate and add.

Rows are tokens; a row's parameters are those of its image. For (B, L, C) the image of row r is r // L, for
packed rows (T, C) it is sample[r]. All arithmetic is float32, rounded once, when it is stored.

A row stays in registers from its one load to its one store, as a tuple of chunks: C = 1152 is five chunks of
256 or nine of 128, where one power of two would leave 44 % of the lanes idle.

Gradients of shift, scale and gate are sums over an image's rows, in a fixed order and without atomics. The first
launch walks fixed blocks of rows. The rows of one image in one block are a run, and a run's sum is one row of a
float32 buffer, at place block + image. Where images never descend along the rows (always so for (B, L, C) and
for a plan's rows) that place is the run's own: the next run raises the block or the image. The second launch
adds up each image's runs in the order of the blocks. Any other order of images is noticed on the device, and
the second launch then sums over the rows that name the image instead: slower, in an order as fixed, and without
the host knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import CompileCase, cdiv, compile_cases, device_guard, next_power_of_2
from d2it.kernels.rows import row_layout, row_offsets

# Elements of a row that a thread may hold. The backward also holds two sums and two staged rows: with 40 it takes
# 241-255 registers at C = 1152, with 24 it takes 156-168 and half as many warps again are resident (sm_90).
ELEMENTS_FORWARD = 40
ELEMENTS_BACKWARD = 24
# Assertions are compiled in (debug) without Triton's checks for integer overflow.
ASSERTIONS = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _mask(m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """The part of chunk I that exists; only a last chunk can stick out."""
    if (I + 1) * CHUNK <= C:
        return m_row[:, None]
    else:
        return m_row[:, None] & (I * CHUNK + tl.arange(0, CHUNK) < C)[None, :]


@triton.jit
def _load(p_rows, stride_col, m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk I of the rows that begin at p_rows, in float32, 0 outside."""
    o_col = (I * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)[None, :]
    p_tile = p_rows[:, None] + o_col * stride_col
    return tl.load(p_tile, mask=_mask(m_row, I, C, CHUNK), other=0.0).to(tl.float32)


@triton.jit
def _store(p_rows, value, m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk I of contiguous rows that begin at p_rows."""
    p_tile = p_rows[:, None] + (I * CHUNK + tl.arange(0, CHUNK))[None, :]
    tl.store(p_tile, value.to(p_rows.dtype.element_ty), mask=_mask(m_row, I, C, CHUNK))


@triton.jit
def _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE: tl.constexpr):
    """The image of each row, 0 outside."""
    if HAS_SAMPLE:
        return tl.load(sample + o_row.to(tl.int64) * stride_sample, mask=m_row, other=0)
    else:
        return tl.where(m_row, o_row // length, 0)


@triton.jit
def _load_rows(p_rows, stride_col, m_row, C: tl.constexpr, CHUNK: tl.constexpr):
    """Whole rows as a tuple of chunks."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    b_rows = ()
    for i in tl.static_range(CHUNKS):
        b_rows = b_rows + (_load(p_rows, stride_col, m_row, i, C, CHUNK),)
    return b_rows


@triton.jit
def _normalize(b_x, m_row, eps, C: tl.constexpr, CHUNK: tl.constexpr):
    """Rows, zero mean and unit variance, as a tuple of chunks (0 past C); mean and 1 / deviation of each row."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    b_sum = tl.zeros((m_row.shape[0], CHUNK), tl.float32)
    for i in tl.static_range(CHUNKS):
        b_sum += b_x[i]
    b_mean = tl.sum(b_sum, 1) / C
    b_sum = tl.zeros((m_row.shape[0], CHUNK), tl.float32)
    b_centred = ()
    for i in tl.static_range(CHUNKS):
        b_chunk = tl.where(_mask(m_row, i, C, CHUNK), b_x[i] - b_mean[:, None], 0.0)
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
    x,
    shift,
    scale,
    sample,
    stride_sample,
    rows,
    images,
    length,
    length_x,
    stride_x_batch,
    stride_x_row,
    stride_x_col,
    stride_shift_row,
    stride_shift_col,
    stride_scale_row,
    stride_scale_col,
    eps,
    C: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FLAT_X: tl.constexpr,
    ALIGN_SHIFT: tl.constexpr,
    ALIGN_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: ROWS rows. x by strides; shift, scale (images, C) by strides; out (rows, C) contiguous."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_image = _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE)
    if HAS_SAMPLE:
        tl.device_assert((o_image >= 0) & (o_image < images), "adaln_modulate: sample must name an image")
    p_x = x + row_offsets(o_row, length_x, stride_x_batch, stride_x_row, ALIGN_X, FLAT_X)
    b_x = _load_rows(p_x, stride_x_col, m_row, C, CHUNK)
    b_normed, _, _ = _normalize(b_x, m_row, eps, C, CHUNK)
    p_shift = shift + o_image.to(tl.int64) * stride_shift_row * ALIGN_SHIFT
    p_scale = scale + o_image.to(tl.int64) * stride_scale_row * ALIGN_SCALE
    p_out = out + o_row.to(tl.int64) * C
    for i in tl.static_range(CHUNKS):
        b_shift = _load(p_shift, stride_shift_col, m_row, i, C, CHUNK)
        b_scale = _load(p_scale, stride_scale_col, m_row, i, C, CHUNK)
        _store(p_out, b_normed[i] * (1.0 + b_scale) + b_shift, m_row, i, C, CHUNK)


@triton.jit
def gated_residual_fwd_kernel(
    out,
    x,
    branch,
    gate,
    sample,
    stride_sample,
    rows,
    images,
    length,
    length_x,
    stride_x_batch,
    stride_x_row,
    stride_x_col,
    length_branch,
    stride_branch_batch,
    stride_branch_row,
    stride_branch_col,
    stride_gate_row,
    stride_gate_col,
    C: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FLAT_X: tl.constexpr,
    ALIGN_BRANCH: tl.constexpr,
    FLAT_BRANCH: tl.constexpr,
    ALIGN_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: ROWS rows. x, branch by strides; gate (images, C) by strides; out (rows, C) contiguous."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_image = _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE)
    if HAS_SAMPLE:
        tl.device_assert((o_image >= 0) & (o_image < images), "gated_residual: sample must name an image")
    p_x = x + row_offsets(o_row, length_x, stride_x_batch, stride_x_row, ALIGN_X, FLAT_X)
    p_branch = branch + row_offsets(
        o_row, length_branch, stride_branch_batch, stride_branch_row, ALIGN_BRANCH, FLAT_BRANCH
    )
    p_gate = gate + o_image.to(tl.int64) * stride_gate_row * ALIGN_GATE
    p_out = out + o_row.to(tl.int64) * C
    for i in tl.static_range(CHUNKS):
        b_x = _load(p_x, stride_x_col, m_row, i, C, CHUNK)
        b_branch = _load(p_branch, stride_branch_col, m_row, i, C, CHUNK)
        b_gate = _load(p_gate, stride_gate_col, m_row, i, C, CHUNK)
        _store(p_out, b_x + b_gate * b_branch, m_row, i, C, CHUNK)


@triton.jit
def _block_images(
    i_block, bounds, blocks, sample, stride_sample, rows, length, HAS_SAMPLE: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """The images of a block's rows, whether they and the next row never descend, the first and the last image.

    Writes bounds (2, blocks): the first image (-1 where the order descends) and the last.
    """
    i_first = i_block * BLOCK_ROWS
    o_row = i_first + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < rows
    i_last = tl.minimum(i_first + BLOCK_ROWS, rows) - 1
    b_image = _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE).to(tl.int32)
    if HAS_SAMPLE:
        b_next = tl.load(sample + (o_row + 1).to(tl.int64) * stride_sample, mask=o_row + 1 < rows, other=2147483647).to(
            tl.int32
        )
        ordered = tl.sum((m_row & (b_next < b_image)).to(tl.int32)) == 0
        i_image = tl.load(sample + i_first.to(tl.int64) * stride_sample).to(tl.int32)
        i_image_last = tl.load(sample + i_last.to(tl.int64) * stride_sample).to(tl.int32)
        tl.store(bounds + i_block, tl.where(ordered, i_image, -1))
        tl.store(bounds + blocks + i_block, i_image_last)
        # Out of order, the block is one pass over all of its rows; its sums are not used.
        i_image_last = tl.where(ordered, i_image_last, i_image)
    else:
        ordered = rows > 0
        i_image = i_first // length
        i_image_last = i_last // length
    return b_image, m_row, ordered, i_image, i_image_last


@triton.jit
def _run(i_image, b_image, m_row, ordered):
    """The rows of an image inside its block, as a half-open range of places."""
    i_begin = tl.sum((m_row & ordered & (b_image < i_image)).to(tl.int32))
    i_end = tl.sum((m_row & ((b_image <= i_image) | (ordered == 0))).to(tl.int32))
    return i_begin, i_end


@triton.jit
def adaln_modulate_bwd_kernel(
    dx,
    partials,
    bounds,
    stats,
    grad,
    x,
    scale,
    sample,
    stride_sample,
    rows,
    blocks,
    length,
    length_grad,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_col,
    length_x,
    stride_x_batch,
    stride_x_row,
    stride_x_col,
    stride_scale_row,
    stride_scale_col,
    eps,
    C: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    ALIGN_GRAD: tl.constexpr,
    FLAT_GRAD: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FLAT_X: tl.constexpr,
    ALIGN_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a block of BLOCK_ROWS rows, run by run, ROWS rows at a time.

    grad, x by strides; scale (images, C) by strides; dx (rows, C) contiguous; partials (runs, 2, C): the sums for
    shift and for scale; stats (rows, 2): mean and 1 / deviation, written with HAS_SAMPLE only.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0)
    b_image, m_block, ordered, i_image_first, i_image_last = _block_images(
        i_block, bounds, blocks, sample, stride_sample, rows, length, HAS_SAMPLE, BLOCK_ROWS
    )
    i_first = i_block * BLOCK_ROWS
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = _run(i_image, b_image, m_block, ordered)
        b_shift_sum = ()
        b_scale_sum = ()
        for _ in tl.static_range(CHUNKS):
            b_shift_sum = b_shift_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
            b_scale_sum = b_scale_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
        for i_row in tl.range(i_first + i_begin, i_first + i_end, ROWS, num_stages=2):
            o_row = i_row + tl.arange(0, ROWS)
            m_row = o_row < i_first + i_end
            o_image = _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE)
            p_x = x + row_offsets(o_row, length_x, stride_x_batch, stride_x_row, ALIGN_X, FLAT_X)
            p_grad = grad + row_offsets(o_row, length_grad, stride_grad_batch, stride_grad_row, ALIGN_GRAD, FLAT_GRAD)
            p_scale = scale + o_image.to(tl.int64) * stride_scale_row * ALIGN_SCALE
            b_x = _load_rows(p_x, stride_x_col, m_row, C, CHUNK)
            b_grad_rows = _load_rows(p_grad, stride_grad_col, m_row, C, CHUNK)
            b_normed, b_mean, b_rstd = _normalize(b_x, m_row, eps, C, CHUNK)
            b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
            b_dot = tl.zeros((ROWS, CHUNK), tl.float32)
            b_dnormed = ()
            b_shift_next = ()
            b_scale_next = ()
            for i in tl.static_range(CHUNKS):
                b_grad = b_grad_rows[i]
                b_shift_next = b_shift_next + (b_shift_sum[i] + b_grad,)
                b_scale_next = b_scale_next + (b_scale_sum[i] + b_grad * b_normed[i],)
                b_grad = b_grad * (1.0 + _load(p_scale, stride_scale_col, m_row, i, C, CHUNK))
                b_sum += b_grad
                b_dot += b_grad * b_normed[i]
                b_dnormed = b_dnormed + (b_grad,)
            b_shift_sum = b_shift_next
            b_scale_sum = b_scale_next
            b_mean_grad = tl.sum(b_sum, 1) / C
            b_mean_dot = tl.sum(b_dot, 1) / C
            if HAS_SAMPLE:
                p_stats = stats + o_row.to(tl.int64) * 2
                tl.store(p_stats, b_mean, mask=m_row)
                tl.store(p_stats + 1, b_rstd, mask=m_row)
            p_dx = dx + o_row.to(tl.int64) * C
            for i in tl.static_range(CHUNKS):
                b_dx = b_dnormed[i] - b_mean_grad[:, None] - b_normed[i] * b_mean_dot[:, None]
                _store(p_dx, b_dx * b_rstd[:, None], m_row, i, C, CHUNK)
        o_run = (i_block + i_image).to(tl.int64) * (2 * C)
        for i in tl.static_range(CHUNKS):
            o_col = i * CHUNK + tl.arange(0, CHUNK)
            m_col = o_col < C
            tl.store(partials + o_run + o_col, tl.sum(b_shift_sum[i], 0), mask=m_col)
            tl.store(partials + o_run + C + o_col, tl.sum(b_scale_sum[i], 0), mask=m_col)


@triton.jit
def gated_residual_bwd_kernel(
    dbranch,
    partials,
    bounds,
    grad,
    branch,
    gate,
    sample,
    stride_sample,
    rows,
    blocks,
    length,
    length_grad,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_col,
    length_branch,
    stride_branch_batch,
    stride_branch_row,
    stride_branch_col,
    stride_gate_row,
    stride_gate_col,
    C: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    ALIGN_GRAD: tl.constexpr,
    FLAT_GRAD: tl.constexpr,
    ALIGN_BRANCH: tl.constexpr,
    FLAT_BRANCH: tl.constexpr,
    ALIGN_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of a block of BLOCK_ROWS rows, run by run, ROWS rows at a time.

    grad, branch by strides; gate (images, C) by strides; dbranch (rows, C) contiguous; partials (runs, C).
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    b_image, m_block, ordered, i_image_first, i_image_last = _block_images(
        i_block, bounds, blocks, sample, stride_sample, rows, length, HAS_SAMPLE, BLOCK_ROWS
    )
    i_first = i_block * BLOCK_ROWS
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = _run(i_image, b_image, m_block, ordered)
        b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
        for i_row in tl.range(i_first + i_begin, i_first + i_end, ROWS, num_stages=2):
            o_row = i_row + tl.arange(0, ROWS)
            m_row = o_row < i_first + i_end
            m_tile = m_row[:, None] & m_col[None, :]
            o_image = _image_of(o_row, m_row, sample, stride_sample, length, HAS_SAMPLE)
            o_grad = row_offsets(o_row, length_grad, stride_grad_batch, stride_grad_row, ALIGN_GRAD, FLAT_GRAD)
            o_branch = row_offsets(
                o_row, length_branch, stride_branch_batch, stride_branch_row, ALIGN_BRANCH, FLAT_BRANCH
            )
            o_gate = o_image.to(tl.int64) * stride_gate_row * ALIGN_GATE
            o_col64 = o_col.to(tl.int64)[None, :]
            p_grad = grad + o_grad[:, None] + o_col64 * stride_grad_col
            p_branch = branch + o_branch[:, None] + o_col64 * stride_branch_col
            p_gate = gate + o_gate[:, None] + o_col64 * stride_gate_col
            b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
            b_branch = tl.load(p_branch, mask=m_tile, other=0.0).to(tl.float32)
            b_gate = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
            b_sum += b_grad * b_branch
            p_dbranch = dbranch + (o_row.to(tl.int64) * C)[:, None] + o_col[None, :]
            tl.store(p_dbranch, (b_grad * b_gate).to(dbranch.dtype.element_ty), mask=m_tile)
        o_run = (i_block + i_image).to(tl.int64) * C
        tl.store(partials + o_run + o_col, tl.sum(b_sum, 0), mask=m_col)


@triton.jit
def sum_runs_kernel(
    dfirst,
    dsecond,
    partials,
    bounds,
    stats,
    grad,
    other,
    sample,
    stride_sample,
    rows,
    blocks,
    length,
    length_grad,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_col,
    length_other,
    stride_other_batch,
    stride_other_row,
    stride_other_col,
    C: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    NORM: tl.constexpr,
    ALIGN_GRAD: tl.constexpr,
    FLAT_GRAD: tl.constexpr,
    ALIGN_OTHER: tl.constexpr,
    FLAT_OTHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of one image's parameter gradients, (images, C) contiguous.

    NORM: dfirst is that of shift, dsecond that of scale, other is x. Else dfirst is that of gate, other is branch,
    and dsecond is not touched. grad and other are read only where the images were out of order.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_image = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    o_place = tl.arange(0, ROWS)
    if HAS_SAMPLE:
        i_begin = 0
        i_end = 0
        i_descents = 0
        for i_bound in tl.range(0, blocks, BLOCK_BOUNDS):
            o_bound = i_bound + tl.arange(0, BLOCK_BOUNDS)
            m_bound = o_bound < blocks
            b_from = tl.load(bounds + o_bound, mask=m_bound, other=2147483647)
            b_to = tl.load(bounds + blocks + o_bound, mask=m_bound, other=2147483647)
            i_descents += tl.sum((b_from < 0).to(tl.int32))
            i_begin += tl.sum((b_to < i_image).to(tl.int32))
            i_end += tl.sum((b_from <= i_image).to(tl.int32))
        ordered = i_descents == 0
    else:
        i_begin = (i_image * length) // BLOCK_ROWS
        i_end = tl.where(rows > 0, ((i_image + 1) * length - 1) // BLOCK_ROWS + 1, 0)
        ordered = rows >= 0

    b_first = tl.zeros((ROWS, CHUNK), tl.float32)
    b_second = tl.zeros((ROWS, CHUNK), tl.float32)
    i_stop = tl.where(ordered, i_end, i_begin)
    for i_block in tl.range(i_begin, i_stop, ROWS):
        m_tile = (i_block + o_place < i_stop)[:, None] & m_col[None, :]
        o_run = (i_block + o_place + i_image).to(tl.int64) * (C * (2 if NORM else 1))
        p_first = partials + o_run[:, None] + o_col[None, :]
        b_first += tl.load(p_first, mask=m_tile, other=0.0)
        if NORM:
            b_second += tl.load(p_first + C, mask=m_tile, other=0.0)

    if HAS_SAMPLE:
        i_stop = tl.where(ordered, 0, rows)
        for i_row in tl.range(0, i_stop, ROWS):
            o_row = i_row + o_place
            b_image = tl.load(sample + o_row.to(tl.int64) * stride_sample, mask=o_row < rows, other=-1)
            m_row = b_image == i_image
            m_tile = m_row[:, None] & m_col[None, :]
            o_grad = row_offsets(o_row, length_grad, stride_grad_batch, stride_grad_row, ALIGN_GRAD, FLAT_GRAD)
            o_other = row_offsets(o_row, length_other, stride_other_batch, stride_other_row, ALIGN_OTHER, FLAT_OTHER)
            o_col64 = o_col.to(tl.int64)[None, :]
            p_grad = grad + o_grad[:, None] + o_col64 * stride_grad_col
            p_other = other + o_other[:, None] + o_col64 * stride_other_col
            b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
            b_other = tl.load(p_other, mask=m_tile, other=0.0).to(tl.float32)
            if NORM:
                p_stats = stats + o_row.to(tl.int64) * 2
                b_mean = tl.load(p_stats, mask=m_row, other=0.0)
                b_rstd = tl.load(p_stats + 1, mask=m_row, other=0.0)
                b_first += b_grad
                b_second += b_grad * ((b_other - b_mean[:, None]) * b_rstd[:, None])
            else:
                b_first += b_grad * b_other

    o_out = i_image.to(tl.int64) * C + o_col
    tl.store(dfirst + o_out, tl.sum(b_first, 0).to(dfirst.dtype.element_ty), mask=m_col)
    if NORM:
        tl.store(dsecond + o_out, tl.sum(b_second, 0).to(dsecond.dtype.element_ty), mask=m_col)


class Tile(NamedTuple):
    """How the lanes of a program lie over rows and channels."""

    rows: int
    chunk: int
    warps: int


def row_tile(channels: int, itemsize: int, elements: int) -> Tile:
    """Whole rows in registers, at most ``elements`` of a row a thread where 1,024 threads allow it.

    Of the chunks (16 bytes a lane) the one that pads the channels least, then the one nearest a warp: with a warp
    to a row its sums need no shared memory.
    """
    vector = 16 // itemsize
    widest = max(next_power_of_2(channels), vector)
    chunks = [vector << i for i in range(3, 11) if vector << i <= widest] or [widest]
    fitting = [chunk for chunk in chunks if cdiv(channels, chunk) * vector <= elements] or chunks[-1:]
    warp = 32 * vector
    chunk = min(fitting, key=lambda c: (cdiv(channels, c) * c, max(c, warp) // min(c, warp)))
    lanes = chunk // vector
    warps = max(4, lanes // 32)
    return Tile(warps * 32 // lanes, chunk, warps)


def _block_rows(rows: int) -> int:
    """Rows of a block, from the shape alone, so that sums do not depend on the GPU: 16 to 128."""
    return min(max(next_power_of_2(rows // 1024), 16), 128)


def _column_tile(channels: int, itemsize: int) -> Tile:
    """Chunks that are programs of their own: 16 bytes a lane, 2 rows a thread."""
    vector = 16 // itemsize
    chunks = [chunk for chunk in (32 * vector, 16 * vector) if chunk <= next_power_of_2(channels)]
    chunk = min(chunks or [max(next_power_of_2(channels), vector)], key=lambda c: cdiv(channels, c) * c)
    return Tile(2 * 128 * vector // chunk, chunk, 4)


def _rows_and_length(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // max(x.shape[-1], 1), max(x.shape[-2], 1)


def _sample_arguments(stand_in: torch.Tensor, sample: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    return (stand_in, 0) if sample is None else (sample, sample.stride(0))


def adaln_modulate_forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, sample: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x (B, L, C), or (T, C) with sample; shift, scale (B, C); any strides -> the shape and dtype of x.

    A sample outside 0..B-1 is a device-side assertion.
    """
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    channels = x.shape[-1]
    rows, length = _rows_and_length(x)
    x_at, shift_at, scale_at = row_layout(x), row_layout(shift), row_layout(scale)
    tile = row_tile(channels, x.element_size(), ELEMENTS_FORWARD)
    with device_guard(x):
        adaln_modulate_fwd_kernel[(cdiv(rows, tile.rows),)](
            out,
            x,
            shift,
            scale,
            *_sample_arguments(x, sample),
            rows,
            scale.shape[0],
            length,
            *x_at.sizes,
            *shift_at.sizes[2:],
            *scale_at.sizes[2:],
            eps,
            C=channels,
            HAS_SAMPLE=sample is not None,
            ALIGN_X=x_at.align,
            FLAT_X=x_at.flat,
            ALIGN_SHIFT=shift_at.align,
            ALIGN_SCALE=scale_at.align,
            ROWS=tile.rows,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            **ASSERTIONS,
        )
    return out


def gated_residual_forward(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, sample: torch.Tensor | None
) -> torch.Tensor:
    """x, branch (B, L, C), or (T, C) with sample; gate (B, C); any strides -> the shape and dtype of x.

    A sample outside 0..B-1 is a device-side assertion.
    """
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    channels = x.shape[-1]
    rows, length = _rows_and_length(x)
    x_at, branch_at, gate_at = row_layout(x), row_layout(branch), row_layout(gate)
    tile = row_tile(channels, x.element_size(), ELEMENTS_FORWARD)
    with device_guard(x):
        gated_residual_fwd_kernel[(cdiv(rows, tile.rows),)](
            out,
            x,
            branch,
            gate,
            *_sample_arguments(x, sample),
            rows,
            gate.shape[0],
            length,
            *x_at.sizes,
            *branch_at.sizes,
            *gate_at.sizes[2:],
            C=channels,
            HAS_SAMPLE=sample is not None,
            ALIGN_X=x_at.align,
            FLAT_X=x_at.flat,
            ALIGN_BRANCH=branch_at.align,
            FLAT_BRANCH=branch_at.flat,
            ALIGN_GATE=gate_at.align,
            ROWS=tile.rows,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            **ASSERTIONS,
        )
    return out


class _Runs:
    """The buffers between the two launches of a backward."""

    def __init__(self, grad: torch.Tensor, images: int, sums: int, sample: torch.Tensor | None):
        self.rows, self.length = _rows_and_length(grad)
        self.images, self.sample = images, sample
        self.block_rows = _block_rows(self.rows)
        self.blocks = cdiv(self.rows, self.block_rows)
        places = max(self.blocks + images - 1, 0)
        self.partials = grad.new_empty((places, sums, grad.shape[-1]), dtype=torch.float32)
        needed = sample is not None
        self.bounds = grad.new_empty((2, self.blocks if needed else 0), dtype=torch.int32)
        self.stats = grad.new_empty((self.rows if needed and sums == 2 else 0, 2), dtype=torch.float32)

    def reduce(self, grad: torch.Tensor, other: torch.Tensor, *results: torch.Tensor) -> None:
        """The second launch: every image's sums, into the results."""
        channels = grad.shape[-1]
        grad_at, other_at = row_layout(grad), row_layout(other)
        chunk = min(128, next_power_of_2(channels))
        sum_runs_kernel[(self.images * cdiv(channels, chunk),)](
            results[0],
            results[-1],
            self.partials,
            self.bounds,
            self.stats,
            grad,
            other,
            *_sample_arguments(grad, self.sample),
            self.rows,
            self.blocks,
            self.length,
            *grad_at.sizes,
            *other_at.sizes,
            C=channels,
            HAS_SAMPLE=self.sample is not None,
            NORM=len(results) == 2,
            ALIGN_GRAD=grad_at.align,
            FLAT_GRAD=grad_at.flat,
            ALIGN_OTHER=other_at.align,
            FLAT_OTHER=other_at.flat,
            BLOCK_ROWS=self.block_rows,
            BLOCK_BOUNDS=512,
            ROWS=8,
            CHUNK=chunk,
            num_warps=4,
            maxnreg=64,  # else ptxas aims at 40 and spills a pointer to get there
        )


def adaln_modulate_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, sample: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (its dtype), shift and scale (that of scale). The statistics are computed again from x."""
    dx = x.new_empty(x.shape)
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    if scale.numel() == 0:
        return dx, dshift, dscale
    channels = x.shape[-1]
    runs = _Runs(grad, scale.shape[0], 2, sample)
    grad_at, x_at, scale_at = row_layout(grad), row_layout(x), row_layout(scale)
    tile = row_tile(channels, x.element_size(), ELEMENTS_BACKWARD)
    with device_guard(x):
        if runs.blocks:
            adaln_modulate_bwd_kernel[(runs.blocks,)](
                dx,
                runs.partials,
                runs.bounds,
                runs.stats,
                grad,
                x,
                scale,
                *_sample_arguments(x, sample),
                runs.rows,
                runs.blocks,
                runs.length,
                *grad_at.sizes,
                *x_at.sizes,
                *scale_at.sizes[2:],
                eps,
                C=channels,
                HAS_SAMPLE=sample is not None,
                ALIGN_GRAD=grad_at.align,
                FLAT_GRAD=grad_at.flat,
                ALIGN_X=x_at.align,
                FLAT_X=x_at.flat,
                ALIGN_SCALE=scale_at.align,
                BLOCK_ROWS=runs.block_rows,
                ROWS=tile.rows,
                CHUNK=tile.chunk,
                num_warps=tile.warps,
            )
        runs.reduce(grad, x, dshift, dscale)
    return dx, dshift, dscale


def gated_residual_backward(
    grad: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, sample: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of branch and gate, in their dtypes; that of x is grad itself."""
    dbranch, dgate = branch.new_empty(branch.shape), gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return dbranch, dgate
    channels = branch.shape[-1]
    runs = _Runs(grad, gate.shape[0], 1, sample)
    grad_at, branch_at, gate_at = row_layout(grad), row_layout(branch), row_layout(gate)
    tile = _column_tile(channels, branch.element_size())
    with device_guard(branch):
        if runs.blocks:
            gated_residual_bwd_kernel[(runs.blocks * cdiv(channels, tile.chunk),)](
                dbranch,
                runs.partials,
                runs.bounds,
                grad,
                branch,
                gate,
                *_sample_arguments(branch, sample),
                runs.rows,
                runs.blocks,
                runs.length,
                *grad_at.sizes,
                *branch_at.sizes,
                *gate_at.sizes[2:],
                C=channels,
                HAS_SAMPLE=sample is not None,
                ALIGN_GRAD=grad_at.align,
                FLAT_GRAD=grad_at.flat,
                ALIGN_BRANCH=branch_at.align,
                FLAT_BRANCH=branch_at.flat,
                ALIGN_GATE=gate_at.align,
                BLOCK_ROWS=runs.block_rows,
                ROWS=tile.rows,
                CHUNK=tile.chunk,
                num_warps=tile.warps,
            )
        runs.reduce(grad, branch, dgate)
    return dbranch, dgate


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    batch, length = 32, 1024
    for channels in (72, 384, 768, 1024, 1152, 8192):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty((batch, length, channels), dtype=dtype, device="meta")
            parameters = torch.empty((batch, 6 * channels), dtype=dtype, device="meta")
            shift, scale = parameters[:, :channels], parameters[:, channels : 2 * channels]
            sample = torch.empty((batch * length,), dtype=torch.int32, device="meta")
            for kind, rows, which in (("dense", x, None), ("packed", x.flatten(0, 1), sample)):
                name = f"C{channels}-{str(dtype)[6:]}-{kind}"
                yield f"{name}-modulate", partial(adaln_modulate_forward, rows, shift, scale, which, 1e-6)
                yield (
                    f"{name}-modulate",
                    partial(adaln_modulate_backward, rows, rows, scale, which, 1e-6),
                )
                yield f"{name}-gate", partial(gated_residual_forward, rows, rows, scale, which)
                yield f"{name}-gate", partial(gated_residual_backward, rows, rows, scale, which)
