"""What the kernels of adaLN share: chunks of rows, the statistics of rows, sums over the rows of an image.

A row's parameters are those of its image. For (B, L, C) the image of row r is r // L, for packed rows (T, C) it is
sample[r].

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
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import cdiv, next_power_of_2
from d2it.kernels.launch import Tape
from d2it.kernels.rows import constant, index_of, row_offsets, rows_of


class Runs(NamedTuple):
    """The buffers between the two launches of a backward.

    Attributes:
        partials: (places, SUMS, C) float32, the sums of each run; a launch may begin at another sum than the first.
        bounds: (2, blocks) int32, the first image of each block (-1 where the order descends) and the last; with
            `sample` only.
        stats: (rows, 2) float32, mean and 1 / deviation of each row, as the forward stored them; None without a norm.
        bias: (blocks, C) float32, the sums of each block's gradient of the branch; None where no bias wants them.
        blocks: Number of blocks.
        SUMS: Sums of a run.
        BLOCK_ROWS: Rows of a block.
    """

    partials: torch.Tensor
    bounds: torch.Tensor | None
    stats: torch.Tensor | None
    bias: torch.Tensor | None
    blocks: int
    SUMS: tl.constexpr
    BLOCK_ROWS: tl.constexpr


# Elements of a row that a thread may hold. The backward holds two or three sums beside it: with 20 elements it takes
# 128 or 242 registers at C = 1152 (sm_90).
ELEMENTS_FORWARD = 40
ELEMENTS_BACKWARD = 20


@triton.jit
def load_tile(rows, o_row, o_col, m_tile):
    """A tile of `Rows`, in float32, 0 where the mask is not; without a mask it exists whole."""
    p_tile = (rows.data + row_offsets(rows, o_row))[:, None] + o_col.to(tl.int64)[None, :] * rows.stride_col
    if m_tile is None:
        return tl.load(p_tile).to(tl.float32)
    else:
        return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def store_tile(out, value, o_row, o_col, m_tile, C: tl.constexpr):
    """A tile of contiguous rows of C channels."""
    p_tile = (out + o_row.to(tl.int64) * C)[:, None] + o_col[None, :]
    tl.store(p_tile, value.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def load_chunk(rows, o_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk I of rows that exist; 0 past C, where only a last chunk can stick out."""
    o_col = I * CHUNK + tl.arange(0, CHUNK)
    if (I + 1) * CHUNK <= C:
        return load_tile(rows, o_row, o_col, None)
    else:
        return load_tile(rows, o_row, o_col, (o_col < C)[None, :])


@triton.jit
def store_chunk(out, value, o_row, m_row, I: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    o_col = I * CHUNK + tl.arange(0, CHUNK)
    if (I + 1) * CHUNK <= C:
        store_tile(out, value, o_row, o_col, m_row[:, None], C)
    else:
        store_tile(out, value, o_row, o_col, m_row[:, None] & (o_col < C)[None, :], C)


@triton.jit
def image_of(sample, o_row, length):
    """The image of each row."""
    if sample is not None:
        return tl.load(sample.data + o_row.to(tl.int64) * sample.stride)
    else:
        return o_row // length


@triton.jit
def existing(sample, b_image, images):
    """The images, those that do not exist replaced by one that does: no other memory is read."""
    if sample is not None:
        return tl.minimum(tl.maximum(b_image, 0), images - 1)
    else:
        return b_image


@triton.jit
def load_stats(stats, o_row):
    return tl.load(stats + o_row.to(tl.int64) * 2), tl.load(stats + o_row.to(tl.int64) * 2 + 1)


@triton.jit
def block_images(runs, i_block, sample, rows, length):
    """The images of a block's rows, whether they and the next row never descend, the first and the last image.

    Writes the block's bounds.
    """
    i_first = i_block * runs.BLOCK_ROWS
    o_row = i_first + tl.arange(0, runs.BLOCK_ROWS)
    m_row = o_row < rows
    i_last = tl.minimum(i_first + runs.BLOCK_ROWS, rows) - 1
    b_image = image_of(sample, tl.minimum(o_row, rows - 1), length).to(tl.int32)
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
def run_of(i_image, b_image, m_row, ordered):
    """The rows of an image inside its block, as a half-open range of places."""
    i_begin = tl.sum((m_row & ordered & (b_image < i_image)).to(tl.int32))
    i_end = tl.sum((m_row & ((b_image <= i_image) | (ordered == 0))).to(tl.int32))
    return i_begin, i_end


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
            b_grad = load_tile(grad, o_row, o_col, m_tile)
            b_other = load_tile(other, o_row, o_col, m_tile)
            if dsecond is not None:
                b_mean, b_rstd = load_stats(runs.stats, tl.minimum(o_row, grad.rows - 1))
                b_first += b_grad
                b_normed = tl.where(m_tile, (b_other - b_mean[:, None]) * b_rstd[:, None], 0.0)
                b_second += b_grad * b_normed
            else:
                b_first += b_grad * b_other

    o_out = i_image.to(tl.int64) * C + o_col
    tl.store(dfirst + o_out, tl.sum(b_first, 0).to(dfirst.dtype.element_ty), mask=m_col)
    if dsecond is not None:
        tl.store(dsecond + o_out, tl.sum(b_second, 0).to(dsecond.dtype.element_ty), mask=m_col)


@triton.jit
def sum_blocks_kernel(out, partials, blocks, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: one chunk of out (C,), the sums over partials (blocks, C), ROWS blocks at a time, in their order."""
    o_col = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    m_col = o_col < C
    b_sum = tl.zeros((ROWS, CHUNK), tl.float32)
    for i_block in tl.range(0, blocks, ROWS):
        o_block = i_block + tl.arange(0, ROWS)
        p_block = partials + (o_block.to(tl.int64) * C)[:, None] + o_col[None, :]
        b_sum += tl.load(p_block, mask=(o_block < blocks)[:, None] & m_col[None, :], other=0.0)
    tl.store(out + o_col, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=m_col)


class Tile(NamedTuple):
    """How the lanes of a program lie over rows and channels."""

    rows: int
    chunk: int
    warps: int

    def constants(self, channels: int) -> dict[str, int]:
        """Returns the launch's constants."""
        return {"C": channels, "ROWS": self.rows, "CHUNK": self.chunk, "num_warps": self.warps}


@functools.cache
def row_tile(channels: int, elements: int) -> Tile:
    """Whole rows in registers: as few warps a row as leave a thread at most `elements` of it, 32 warps at most.

    A thread has four neighbours of a chunk: 16 bytes of float32 parameters, and 1,152 channels are chunks without a
    rest.
    """
    warps = 1
    while warps < 32 and 4 * cdiv(channels, 128 * warps) > elements:
        warps *= 2
    chunk = min(128 * warps, max(next_power_of_2(channels), 4))
    warps = max(4, warps)
    return Tile(128 * warps // chunk, chunk, warps)


@functools.cache
def column_tile(channels: int, itemsize: int) -> Tile:
    """Chunks that are programs of their own: 16 bytes a lane, 2 rows a thread."""
    vector = 16 // itemsize
    chunks = [chunk for chunk in (32 * vector, 16 * vector) if chunk <= next_power_of_2(channels)]
    chunk = min(chunks or [max(next_power_of_2(channels), vector)], key=lambda c: cdiv(channels, c) * c)
    return Tile(2 * 128 * vector // chunk, chunk, 4)


def make_runs(
    tape: Tape,
    grad: torch.Tensor,
    images: int,
    sums: int,
    sample: torch.Tensor | None,
    stats: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Runs:
    """Returns buffers for the runs of grad's rows, and for the sums of its blocks where there is a bias; from the shape
    alone, so that sums do not depend on the GPU."""
    rows = math.prod(grad.shape[:-1])
    block_rows = min(max(next_power_of_2(rows // 1024), 16), 128)
    blocks = cdiv(rows, block_rows)
    return Runs(
        tape.empty((max(blocks + images - 1, 0), sums, grad.shape[-1]), torch.float32),
        None if sample is None else tape.empty((2, blocks), torch.int32),
        stats,
        None if bias is None else tape.empty((blocks, grad.shape[-1]), torch.float32),
        blocks,
        constant(sums),
        constant(block_rows),
    )


def sum_runs(
    tape: Tape,
    runs: Runs,
    grad: torch.Tensor,
    other: torch.Tensor,
    sample: torch.Tensor | None,
    *results: torch.Tensor,
) -> None:
    """The second launch: every image's sums, into the results."""
    images, channels = results[0].shape
    chunk = min(128, next_power_of_2(channels))
    tape.launch(
        sum_runs_kernel,
        images * cdiv(channels, chunk),
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


def unwritten_bias(tape: Tape, like: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Room for the gradient of a bias; (0,) without one."""
    return tape.empty((0,), like.dtype) if bias is None else tape.empty(bias.shape, bias.dtype)


def sum_blocks(tape: Tape, partials: torch.Tensor, out: torch.Tensor) -> None:
    """Sums (blocks, C) float32 over the blocks, into out (C,). Many blocks at once: there are few programs."""
    channels = out.shape[0]
    if channels:
        constants = {"C": channels, "ROWS": 256, "CHUNK": 32, "num_warps": 8}
        tape.launch(sum_blocks_kernel, cdiv(channels, 32), out, partials, partials.shape[0], **constants)


def modulation_cases() -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yields name, rows, a float32 parameter, as the models have it, and sample of what is compiled for the report."""
    batch, length = 32, 1024
    for channels in (72, 384, 768, 1024, 1152, 4096, 8192):
        parameter = torch.empty((batch, 6 * channels), device="meta")[:, :channels]
        sample = torch.empty((batch * length,), dtype=torch.int32, device="meta")
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty((batch, length, channels), dtype=dtype, device="meta")
            for kind, rows, which in (("dense", x, None), ("packed", x.flatten(0, 1), sample)):
                yield f"C{channels}-{str(dtype)[6:]}-{kind}", rows, parameter, which
