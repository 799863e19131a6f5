"""adaLN for images and for packed rows (DiT, section 3.2): modulate a LayerNorm without affine; gate and add; both.

Rows are tokens; a row's parameters are those of its image. For (B, L, C) the image of row r is r // L, for
packed rows (T, C) it is sample[r]. All arithmetic is float32, rounded once, when it is stored.

A row stays in registers from its one load to its one store, as a tuple of chunks: C = 1152 is five chunks of
256 or nine of 128, where one power of two would leave 44 % of the lanes idle.

Gradients of shift, scale and gate are sums over an image's rows, in a fixed order and without atomics. The first
launch walks fixed blocks of rows. The rows of one image in one block are a run, and a run's sum is one row of a
float32 buffer, at place block + image. Where images never descend along the rows (always so for (B, L, C) and
for a plan's rows) that place is the run's own: the next run raises the block or the image. The second launch
adds up each image's runs in the order of the blocks. Any other order of images is noticed on the device, and
the second launch then sums over the rows of the image instead: slower, in an order as fixed, and without a host
synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import ASSERTIONS, CompileCase, cdiv, compile_cases, device_guard, next_power_of_2
from d2it.kernels.rows import constant, index_of, row_offsets, rows_of

# Elements of a row that a thread may hold. The backward also holds two sums and two staged rows: with 40 it takes
# 241-255 registers at C = 1152, with 24 it takes 156-168 and half as many warps again are resident (sm_90).
ELEMENTS_FORWARD = 40
ELEMENTS_BACKWARD = 24
ELEMENTS_FUSED = 16  # a third sum: with 24 it takes 254 registers in bfloat16 and spills in float32, with 16 up to 168


class Runs(NamedTuple):
    """The buffers between the two launches of a backward.

    Attributes:
        partials: (places, SUMS, C) float32, the sums of each run; a launch may begin at another sum than the first.
        bounds: (2, blocks) int32, the first image of each block (-1 where the order descends) and the last; with
            `sample` only.
        stats: (rows, 2) float32, mean and 1 / deviation of each row: what gated_residual_modulate's forward stored, or
            written by adaln_modulate's backward with `sample` only.
        blocks: Number of blocks.
        SUMS: Sums of a run.
        BLOCK_ROWS: Rows of a block.
    """

    partials: torch.Tensor
    bounds: torch.Tensor | None
    stats: torch.Tensor | None
    blocks: int
    SUMS: tl.constexpr
    BLOCK_ROWS: tl.constexpr


@triton.jit
def _mask(m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """The part of chunk I that exists; only a last chunk can stick out."""
    if (I + 1) * CHUNK <= C:
        return m_row[:, None]
    else:
        return m_row[:, None] & (I * CHUNK + tl.arange(0, CHUNK) < C)[None, :]


@triton.jit
def _load(rows, o_row, o_col, m_tile):
    """A tile of `Rows`, in float32, 0 outside."""
    p_tile = (rows.data + row_offsets(rows, o_row))[:, None] + o_col.to(tl.int64)[None, :] * rows.stride_col
    return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _store(out, value, o_row, o_col, m_tile, C: tl.constexpr):
    """A tile of contiguous rows of C channels."""
    p_tile = (out + o_row.to(tl.int64) * C)[:, None] + o_col[None, :]
    tl.store(p_tile, value.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def _load_chunk(rows, o_row, m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    return _load(rows, o_row, I * CHUNK + tl.arange(0, CHUNK), _mask(m_row, I, C, CHUNK))


@triton.jit
def _store_chunk(out, value, o_row, m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    _store(out, value, o_row, I * CHUNK + tl.arange(0, CHUNK), _mask(m_row, I, C, CHUNK), C)


@triton.jit
def _load_chunks(rows, o_row, m_row, C: tl.constexpr, CHUNK: tl.constexpr):
    """Whole rows as a tuple of chunks."""
    b_rows = ()
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        b_rows = b_rows + (_load_chunk(rows, o_row, m_row, i, C, CHUNK),)
    return b_rows


@triton.jit
def _image_of(sample, o_row, m_row, length):
    """The image of each row, 0 outside."""
    if sample is not None:
        return tl.load(sample.data + o_row.to(tl.int64) * sample.stride, mask=m_row, other=0)
    else:
        return tl.where(m_row, o_row // length, 0)


@triton.jit
def _existing(sample, b_image, images):
    """The images, those that do not exist replaced by one that does: no other memory is read."""
    if sample is not None:
        return tl.minimum(tl.maximum(b_image, 0), images - 1)
    else:
        return b_image


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
def _store_stats(stats, b_mean, b_rstd, o_row, m_row):
    tl.store(stats + o_row.to(tl.int64) * 2, b_mean, mask=m_row)
    tl.store(stats + o_row.to(tl.int64) * 2 + 1, b_rstd, mask=m_row)


@triton.jit
def _load_stats(stats, o_row, m_row):
    b_mean = tl.load(stats + o_row.to(tl.int64) * 2, mask=m_row, other=0.0)
    return b_mean, tl.load(stats + o_row.to(tl.int64) * 2 + 1, mask=m_row, other=0.0)


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
    stores it; without, gate, total and stats are None too.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < x.rows
    b_image = _image_of(sample, o_row, m_row, x.length)
    o_image = _existing(sample, b_image, scale.rows)
    b_x = _load_chunks(x, o_row, m_row, C, CHUNK)
    if branch is not None:
        b_total = ()
        for i in tl.static_range(CHUNKS):
            b_branch = _load_chunk(branch, o_row, m_row, i, C, CHUNK)
            b_sum = b_x[i] + _load_chunk(gate, o_image, m_row, i, C, CHUNK) * b_branch
            _store_chunk(total, b_sum, o_row, m_row, i, C, CHUNK)
            b_total = b_total + (b_sum.to(total.dtype.element_ty).to(tl.float32),)
        b_x = b_total
    b_normed, b_mean, b_rstd = _normalize(b_x, m_row, eps, C, CHUNK)
    if stats is not None:
        _store_stats(stats, b_mean, b_rstd, o_row, m_row)
    for i in tl.static_range(CHUNKS):
        b_shift = _load_chunk(shift, o_image, m_row, i, C, CHUNK)
        b_scale = _load_chunk(scale, o_image, m_row, i, C, CHUNK)
        _store_chunk(out, b_normed[i] * (1.0 + b_scale) + b_shift, o_row, m_row, i, C, CHUNK)
    if sample is not None:  # last, since loads would wait for an assertion
        tl.device_assert(b_image == o_image, "adaln_modulate: sample must name an image")


@triton.jit
def gated_residual_fwd_kernel(out, x, branch, gate, sample, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: ROWS rows. x, branch and gate are `Rows`, sample an `Index` or None; out (rows, C) contiguous."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < x.rows
    b_image = _image_of(sample, o_row, m_row, x.length)
    o_image = _existing(sample, b_image, gate.rows)
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        b_x = _load_chunk(x, o_row, m_row, i, C, CHUNK)
        b_branch = _load_chunk(branch, o_row, m_row, i, C, CHUNK)
        b_gate = _load_chunk(gate, o_image, m_row, i, C, CHUNK)
        _store_chunk(out, b_x + b_gate * b_branch, o_row, m_row, i, C, CHUNK)
    if sample is not None:
        tl.device_assert(b_image == o_image, "gated_residual: sample must name an image")


@triton.jit
def _block_images(runs, i_block, sample, rows, length):
    """The images of a block's rows, whether they and the next row never descend, the first and the last image.

    Writes the block's bounds.
    """
    i_first = i_block * runs.BLOCK_ROWS
    o_row = i_first + tl.arange(0, runs.BLOCK_ROWS)
    m_row = o_row < rows
    i_last = tl.minimum(i_first + runs.BLOCK_ROWS, rows) - 1
    b_image = _image_of(sample, o_row, m_row, length).to(tl.int32)
    if sample is not None:
        p_next = sample.data + (o_row + 1).to(tl.int64) * sample.stride
        b_next = tl.load(p_next, mask=o_row + 1 < rows, other=2147483647).to(tl.int32)
        ordered = tl.sum((m_row & (b_next < b_image)).to(tl.int32)) == 0
        i_image = tl.load(sample.data + i_first.to(tl.int64) * sample.stride).to(tl.int32)
        i_image_last = tl.load(sample.data + i_last.to(tl.int64) * sample.stride).to(tl.int32)
        tl.store(runs.bounds + i_block, tl.where(ordered, i_image, -1))
        tl.store(runs.bounds + runs.blocks + i_block, i_image_last)
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
    dbranch,
    runs,
    grad,
    grad_total,
    x,
    branch,
    gate,
    scale,
    sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a block of rows, run by run, ROWS rows at a time.

    grad, grad_total, x, branch, gate and scale are `Rows`, sample an `Index` or None, runs `Runs`, with the sums for
    shift and for scale; dx and dbranch (rows, C) contiguous. With branch, x is the total that the forward stored, like
    its statistics, and the runs have the sums for gate too; without, gate, grad_total and dbranch are None too.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0)
    b_image, m_block, ordered, i_image_first, i_image_last = _block_images(runs, i_block, sample, x.rows, x.length)
    i_first = i_block * runs.BLOCK_ROWS
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = _run(i_image, b_image, m_block, ordered)
        b_shift_sum = ()
        b_scale_sum = ()
        for _ in tl.static_range(CHUNKS):
            b_shift_sum = b_shift_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
            b_scale_sum = b_scale_sum + (tl.zeros((ROWS, CHUNK), tl.float32),)
        b_gate_sum = b_shift_sum  # carried along unused without branch
        for i_row in tl.range(i_first + i_begin, i_first + i_end, ROWS, num_stages=2):
            o_row = i_row + tl.arange(0, ROWS)
            m_row = o_row < i_first + i_end
            o_image = _image_of(sample, o_row, m_row, x.length)
            b_x = _load_chunks(x, o_row, m_row, C, CHUNK)
            b_grad_rows = _load_chunks(grad, o_row, m_row, C, CHUNK)
            if branch is None:
                b_normed, b_mean, b_rstd = _normalize(b_x, m_row, eps, C, CHUNK)
                if runs.stats is not None:
                    _store_stats(runs.stats, b_mean, b_rstd, o_row, m_row)
            else:
                b_mean, b_rstd = _load_stats(runs.stats, o_row, m_row)
                b_normed = ()
                for i in tl.static_range(CHUNKS):
                    b_normed = b_normed + ((b_x[i] - b_mean[:, None]) * b_rstd[:, None],)
            b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
            b_dot = tl.zeros((ROWS, CHUNK), tl.float32)
            b_dnormed = ()
            b_shift_next = ()
            b_scale_next = ()
            for i in tl.static_range(CHUNKS):
                b_grad = b_grad_rows[i]
                b_shift_next = b_shift_next + (b_shift_sum[i] + b_grad,)
                b_scale_next = b_scale_next + (b_scale_sum[i] + b_grad * b_normed[i],)
                b_grad = b_grad * (1.0 + _load_chunk(scale, o_image, m_row, i, C, CHUNK))
                b_sum += b_grad
                b_dot += b_grad * b_normed[i]
                b_dnormed = b_dnormed + (b_grad,)
            b_shift_sum = b_shift_next
            b_scale_sum = b_scale_next
            b_mean_grad = tl.sum(b_sum, 1) / C
            b_mean_dot = tl.sum(b_dot, 1) / C
            b_gate_next = ()
            for i in tl.static_range(CHUNKS):
                b_dx = b_dnormed[i] - b_mean_grad[:, None] - b_normed[i] * b_mean_dot[:, None]
                b_dx = b_dx * b_rstd[:, None]
                if branch is not None:
                    b_dx += _load_chunk(grad_total, o_row, m_row, i, C, CHUNK)
                    b_gate_next = b_gate_next + (b_gate_sum[i] + b_dx * _load_chunk(branch, o_row, m_row, i, C, CHUNK),)
                    b_dbranch = b_dx * _load_chunk(gate, o_image, m_row, i, C, CHUNK)
                    _store_chunk(dbranch, b_dbranch, o_row, m_row, i, C, CHUNK)
                _store_chunk(dx, b_dx, o_row, m_row, i, C, CHUNK)
            if branch is not None:
                b_gate_sum = b_gate_next
        p_run = runs.partials + (i_block + i_image).to(tl.int64) * (C * runs.SUMS)
        for i in tl.static_range(CHUNKS):
            o_col = i * CHUNK + tl.arange(0, CHUNK)
            tl.store(p_run + o_col, tl.sum(b_shift_sum[i], 0), mask=o_col < C)
            tl.store(p_run + C + o_col, tl.sum(b_scale_sum[i], 0), mask=o_col < C)
            if branch is not None:
                tl.store(p_run + 2 * C + o_col, tl.sum(b_gate_sum[i], 0), mask=o_col < C)


@triton.jit
def gated_residual_bwd_kernel(
    dbranch, runs, grad, branch, gate, sample, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program: one chunk of a block of rows, run by run, ROWS rows at a time.

    grad, branch and gate are `Rows`, sample an `Index` or None, runs `Runs`, with the sum for gate; dbranch (rows, C)
    contiguous.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_block = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    b_image, m_block, ordered, i_image_first, i_image_last = _block_images(
        runs, i_block, sample, branch.rows, branch.length
    )
    i_first = i_block * runs.BLOCK_ROWS
    for i_image in tl.range(i_image_first, i_image_last + 1):
        i_begin, i_end = _run(i_image, b_image, m_block, ordered)
        b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
        for i_row in tl.range(i_first + i_begin, i_first + i_end, ROWS, num_stages=2):
            o_row = i_row + tl.arange(0, ROWS)
            m_row = o_row < i_first + i_end
            m_tile = m_row[:, None] & m_col[None, :]
            o_image = _image_of(sample, o_row, m_row, branch.length)
            b_grad = _load(grad, o_row, o_col, m_tile)
            b_branch = _load(branch, o_row, o_col, m_tile)
            b_gate = _load(gate, o_image, o_col, m_tile)
            b_sum += b_grad * b_branch
            _store(dbranch, b_grad * b_gate, o_row, o_col, m_tile, C)
        p_run = runs.partials + (i_block + i_image).to(tl.int64) * C
        tl.store(p_run + o_col, tl.sum(b_sum, 0), mask=m_col)


@triton.jit
def sum_runs_kernel(
    dfirst,
    dsecond,
    runs,
    grad,
    other,
    sample,
    C: tl.constexpr,
    BLOCK_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of one image's parameter gradients, (images, C) contiguous.

    Of adaln_modulate dfirst is that of shift, dsecond that of scale, and other is x. Of gated_residual dfirst is that
    of gate, dsecond None, and other is branch. grad and other are read only where the images were out of order.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    i_image = tl.program_id(0) // CHUNKS
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    o_place = tl.arange(0, ROWS)
    if sample is not None:
        i_begin = 0
        i_end = 0
        i_descents = 0
        for i_bound in tl.range(0, runs.blocks, BLOCK_BOUNDS):
            o_bound = i_bound + tl.arange(0, BLOCK_BOUNDS)
            m_bound = o_bound < runs.blocks
            b_from = tl.load(runs.bounds + o_bound, mask=m_bound, other=2147483647)
            b_to = tl.load(runs.bounds + runs.blocks + o_bound, mask=m_bound, other=2147483647)
            i_descents += tl.sum((b_from < 0).to(tl.int32))
            i_begin += tl.sum((b_to < i_image).to(tl.int32))
            i_end += tl.sum((b_from <= i_image).to(tl.int32))
        ordered = i_descents == 0
    else:
        i_begin = (i_image * grad.length) // runs.BLOCK_ROWS
        i_end = tl.where(grad.rows > 0, ((i_image + 1) * grad.length - 1) // runs.BLOCK_ROWS + 1, 0)
        ordered = grad.rows >= 0

    b_first = tl.zeros((ROWS, CHUNK), tl.float32)
    b_second = tl.zeros((ROWS, CHUNK), tl.float32)
    i_stop = tl.where(ordered, i_end, i_begin)
    for i_block in tl.range(i_begin, i_stop, ROWS):
        m_tile = (i_block + o_place < i_stop)[:, None] & m_col[None, :]
        o_run = (i_block + o_place + i_image).to(tl.int64) * (C * runs.SUMS)
        p_first = runs.partials + o_run[:, None] + o_col[None, :]
        b_first += tl.load(p_first, mask=m_tile, other=0.0)
        if dsecond is not None:
            b_second += tl.load(p_first + C, mask=m_tile, other=0.0)

    if sample is not None:
        i_stop = tl.where(ordered, 0, grad.rows)
        for i_row in tl.range(0, i_stop, ROWS):
            o_row = i_row + o_place
            b_image = tl.load(sample.data + o_row.to(tl.int64) * sample.stride, mask=o_row < grad.rows, other=-1)
            m_row = b_image == i_image
            m_tile = m_row[:, None] & m_col[None, :]
            b_grad = _load(grad, o_row, o_col, m_tile)
            b_other = _load(other, o_row, o_col, m_tile)
            if dsecond is not None:
                b_mean, b_rstd = _load_stats(runs.stats, o_row, m_row)
                b_first += b_grad
                b_second += b_grad * ((b_other - b_mean[:, None]) * b_rstd[:, None])
            else:
                b_first += b_grad * b_other

    o_out = i_image.to(tl.int64) * C + o_col
    tl.store(dfirst + o_out, tl.sum(b_first, 0).to(dfirst.dtype.element_ty), mask=m_col)
    if dsecond is not None:
        tl.store(dsecond + o_out, tl.sum(b_second, 0).to(dsecond.dtype.element_ty), mask=m_col)


class Tile(NamedTuple):
    """How the lanes of a program lie over rows and channels."""

    rows: int
    chunk: int
    warps: int

    def constants(self, channels: int) -> dict[str, int]:
        """Returns the launch's constants."""
        return {"C": channels, "ROWS": self.rows, "CHUNK": self.chunk, "num_warps": self.warps}


@functools.cache
def row_tile(channels: int, itemsize: int, elements: int) -> Tile:
    """Whole rows in registers, at most `elements` of a row a thread where 1,024 threads allow it.

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


@functools.cache
def _column_tile(channels: int, itemsize: int) -> Tile:
    """Chunks that are programs of their own: 16 bytes a lane, 2 rows a thread."""
    vector = 16 // itemsize
    chunks = [chunk for chunk in (32 * vector, 16 * vector) if chunk <= next_power_of_2(channels)]
    chunk = min(chunks or [max(next_power_of_2(channels), vector)], key=lambda c: cdiv(channels, c) * c)
    return Tile(2 * 128 * vector // chunk, chunk, 4)


def _runs(grad: torch.Tensor, images: int, sums: int, sample: torch.Tensor | None) -> Runs:
    """Returns buffers for the runs of grad's rows; from the shape alone, so that sums do not depend on the GPU."""
    rows = grad.shape[:-1].numel()
    block_rows = min(max(next_power_of_2(rows // 1024), 16), 128)
    blocks = cdiv(rows, block_rows)
    return Runs(
        grad.new_empty((max(blocks + images - 1, 0), sums, grad.shape[-1]), dtype=torch.float32),
        None if sample is None else grad.new_empty((2, blocks), dtype=torch.int32),
        None if sample is None or sums != 2 else grad.new_empty((rows, 2), dtype=torch.float32),
        blocks,
        constant(sums),
        constant(block_rows),
    )


def _sum_runs(
    runs: Runs, grad: torch.Tensor, other: torch.Tensor, sample: torch.Tensor | None, *results: torch.Tensor
) -> None:
    """The second launch: every image's sums, into the results."""
    images, channels = results[0].shape
    chunk = min(128, next_power_of_2(channels))
    sum_runs_kernel[(images * cdiv(channels, chunk),)](
        results[0],
        results[1] if len(results) == 2 else None,
        runs,
        rows_of(grad),
        rows_of(other),
        index_of(sample),
        C=channels,
        BLOCK_BOUNDS=512,
        ROWS=8,
        CHUNK=chunk,
        num_warps=4,
        maxnreg=64,  # else ptxas aims at 40 and spills a pointer to get there
    )


def adaln_modulate_forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, sample: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x (B, L, C), or (T, C) with sample; shift, scale (B, C); any strides -> the shape and dtype of x.

    A sample outside 0..B-1 is a device-side assertion.
    """
    out = x.new_empty(x.shape)
    _modulate(out, None, None, x, None, None, shift, scale, sample, eps)
    return out


def gated_residual_modulate_forward(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, branch (B, L, C), or (T, C) with sample; gate, shift, scale (B, C); any strides.

    Returns x + gate * branch and its modulation, of the shape and dtype of x, and mean and 1 / deviation of the rows,
    (rows, 2) float32. A sample outside 0..B-1 is a device-side assertion.
    """
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    stats = x.new_empty((x.shape[:-1].numel(), 2), dtype=torch.float32)
    _modulate(out, total, stats, x, branch, gate, shift, scale, sample, eps)
    return total, out, stats


def _modulate(
    out: torch.Tensor,
    total: torch.Tensor | None,
    stats: torch.Tensor | None,
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
    tile = row_tile(x.shape[-1], x.element_size(), ELEMENTS_FORWARD)
    rows = rows_of(x)
    with device_guard(x):
        adaln_modulate_fwd_kernel[(cdiv(rows.rows, tile.rows),)](
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


def gated_residual_forward(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, sample: torch.Tensor | None
) -> torch.Tensor:
    """x, branch (B, L, C), or (T, C) with sample; gate (B, C); any strides -> the shape and dtype of x.

    A sample outside 0..B-1 is a device-side assertion.
    """
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    tile = row_tile(x.shape[-1], x.element_size(), ELEMENTS_FORWARD)
    rows = rows_of(x)
    with device_guard(x):
        gated_residual_fwd_kernel[(cdiv(rows.rows, tile.rows),)](
            out,
            rows,
            rows_of(branch),
            rows_of(gate),
            index_of(sample),
            **tile.constants(x.shape[-1]),
            **ASSERTIONS,
        )
    return out


def adaln_modulate_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, sample: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (its dtype), shift and scale (that of scale). The statistics are computed again from x."""
    dx = x.new_empty(x.shape)
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    if scale.numel():
        runs = _runs(grad, scale.shape[0], 2, sample)
        with device_guard(x):
            _modulate_backward(dx, None, runs, grad, None, x, None, None, scale, sample, eps)
            _sum_runs(runs, grad, x, sample, dshift, dscale)
    return dx, dshift, dscale


def gated_residual_modulate_backward(
    grad_total: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor,
    stats: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    sample: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, branch, gate, shift and scale from those of the total and of its modulation."""
    dx, dbranch, dgate = total.new_empty(total.shape), branch.new_empty(branch.shape), gate.new_empty(gate.shape)
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    if scale.numel():
        runs = _runs(grad, scale.shape[0], 3, sample)._replace(stats=stats)
        with device_guard(total):
            _modulate_backward(dx, dbranch, runs, grad, grad_total, total, branch, gate, scale, sample, eps)
            _sum_runs(runs, grad, total, sample, dshift, dscale)
            _sum_runs(runs._replace(partials=runs.partials[:, 2], stats=None), dx, branch, sample, dgate)
    return dx, dbranch, dgate, dshift, dscale


def _modulate_backward(
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
    eps: float,
) -> None:
    channels = x.shape[-1]
    tile = row_tile(channels, x.element_size(), ELEMENTS_BACKWARD if branch is None else ELEMENTS_FUSED)
    if runs.blocks:
        adaln_modulate_bwd_kernel[(runs.blocks,)](
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
            eps,
            **tile.constants(channels),
            maxnreg=168 if branch is not None and tile.warps == 4 else None,  # else ptxas aims at 128 and spills
        )


def gated_residual_backward(
    grad: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, sample: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of branch and gate, in their dtypes; that of x is grad itself."""
    dbranch, dgate = branch.new_empty(branch.shape), gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return dbranch, dgate
    channels = branch.shape[-1]
    runs = _runs(grad, gate.shape[0], 1, sample)
    tile = _column_tile(channels, branch.element_size())
    with device_guard(branch):
        if runs.blocks:
            gated_residual_bwd_kernel[(runs.blocks * cdiv(channels, tile.chunk),)](
                dbranch,
                runs,
                rows_of(grad),
                rows_of(branch),
                rows_of(gate),
                index_of(sample),
                **tile.constants(channels),
            )
        _sum_runs(runs, grad, branch, sample, dgate)
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
                if channels > 4096:
                    continue  # three sums of such a row spill
                yield (
                    f"{name}-gate-modulate",
                    partial(gated_residual_modulate_forward, rows, rows, scale, shift, scale, which, 1e-6),
                )
                stats = torch.empty((batch * length, 2), device="meta")
                yield (
                    f"{name}-gate-modulate",
                    partial(gated_residual_modulate_backward, rows, rows, rows, stats, rows, scale, scale, which, 1e-6),
                )
