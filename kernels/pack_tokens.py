"""Packing the cells of a plan into rows, and merging rows back over a base (paper 3.2.3, Eqs. 7 and 9).

Both directions are gathers: packing reads cells by `index`, merging reads rows by `inverse`. Each output
element is written exactly once, so there is no memset and no atomic, and the backward of either is the other.
Bytes: rows are read once and written once, the base is read only where no row is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from d2it.kernels.common import ASSERTIONS, CompileCase, cdiv, compile_cases, next_power_of_2
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.rows import index_of, row_offsets, rows_of

TILE_BYTES = 8192  # of one program: 128 threads with 4 independent 16-byte loads in flight each
MAX_ROWS = 128


@triton.jit
def gather_rows_kernel(
    out,
    index,
    source,
    base,
    rows,
    C: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out[r] = source[index[r]] where index[r] is a row of source, else base[r] (else 0).

    One program: a tile of ROWS rows and CHUNK channels. out (rows, C) contiguous; index (rows,) with its stride; source
    and base are `Rows`, or None. Lanes run along the channels, or along the rows (ALONG_ROWS) where the channels of a
    row are not adjacent in memory.
    """
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    ROW: tl.constexpr = 0 if ALONG_ROWS else 1
    o_row = (tl.program_id(0) // CHUNKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = (tl.program_id(0) % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    m_row = o_row < rows
    m_tile = tl.expand_dims(m_row, ROW) & tl.expand_dims(o_col < C, 1 - ROW)
    b_from = tl.load(index.data + o_row * index.stride, mask=m_row, other=-1)
    m_from = tl.expand_dims(b_from >= 0, ROW)
    if source is not None:
        m_exists = tl.expand_dims(b_from < source.rows, ROW)
        m_from = m_from & m_exists
    o_col = tl.expand_dims(o_col, 1 - ROW).to(tl.int64)
    if source is not None:
        p_source = source.data + tl.expand_dims(row_offsets(source, b_from), ROW) + o_col * source.stride_col
        b_out = tl.load(p_source, mask=m_tile & m_from, other=0.0)
    if base is not None:
        p_base = base.data + tl.expand_dims(row_offsets(base, o_row), ROW) + o_col * base.stride_col
        b_base = tl.load(p_base, mask=m_tile & (m_from == 0), other=0.0)
        b_out = tl.where(m_from, b_out, b_base) if source is not None else b_base
    tl.store(out + tl.expand_dims(o_row, ROW) * C + o_col, b_out, mask=m_tile)
    if source is not None:  # last, since loads would wait for an assertion
        tl.device_assert(m_exists, "plan must contain only rows that exist")


def _tile(channels: int, itemsize: int) -> tuple[int, int]:
    """Returns (ROWS, CHUNK) of a program: the chunk that pads the channels least, then the largest."""
    chunks = [chunk for chunk in (512, 256, 128) if chunk <= next_power_of_2(channels)]
    chunk = min(chunks or [next_power_of_2(channels)], key=lambda chunk: cdiv(channels, chunk) * chunk)
    # Narrow rows spend registers on addresses: with four loads in flight a merge of 12 float32 channels spills.
    tile_bytes = TILE_BYTES if chunk >= 128 else TILE_BYTES // 2
    return min(tile_bytes // itemsize // chunk, MAX_ROWS), chunk


def _gather_rows(
    tape: Tape,
    index: torch.Tensor,
    source: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    rows, channels = index.shape[0], out.shape[-1]
    if rows == 0 or channels == 0:
        return out
    block_rows, chunk = _tile(channels, out.element_size())
    tape.launch(
        gather_rows_kernel,
        cdiv(rows, block_rows) * cdiv(channels, chunk),
        out,
        index_of(index),
        None if source is None else rows_of(source),
        None if base is None else rows_of(base),
        rows,
        C=channels,
        ALONG_ROWS=channels > 1 and source is not None and source.stride(-1) != 1,
        ROWS=block_rows,
        CHUNK=chunk,
        num_warps=4,
        **ASSERTIONS,
    )
    return out


@launcher
def pack_tokens_forward(tape: Tape, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x (B, L, C), any strides -> (capacity, C): row r is cell index[r], zero where index[r] is -1."""
    return _gather_rows(tape, index, x, None, tape.empty((index.shape[0], x.shape[2]), x.dtype))


@launcher
def unpack_tokens_forward(
    tape: Tape,
    packed: torch.Tensor | None,
    base: torch.Tensor | None,
    index: torch.Tensor,
    inverse: torch.Tensor,
    batch: int,
    cells: int,
) -> torch.Tensor:
    """packed (capacity, C), any strides -> (B, cells, C): cell i is row inverse[i], or base (or 0) where that is -1.

    Without packed rows (and with base) their cells are zero.
    """
    like = next(x for x in (packed, base) if x is not None)
    return _gather_rows(tape, inverse, packed, base, tape.empty((batch, cells, like.shape[-1]), like.dtype))


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    batch, cells = 32, 1024
    inverse = torch.empty(batch * cells, dtype=torch.int32, device="meta")
    index = torch.empty(batch * cells // 2, dtype=torch.int32, device="meta")
    for channels in (4, 12, 72, 384, 768, 1024, 1152):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"C{channels}-{str(dtype)[6:]}"
            x = torch.empty((batch, cells, channels), dtype=dtype, device="meta")
            packed = torch.empty((batch * cells // 2, channels), dtype=dtype, device="meta")
            yield f"{name}-pack", partial(pack_tokens_forward, x, index, inverse)
            yield f"{name}-unpack", partial(unpack_tokens_forward, packed, None, index, inverse, batch, cells)
            yield f"{name}-merge", partial(unpack_tokens_forward, packed, x, index, inverse, batch, cells)
            yield f"{name}-merge-dbase", partial(unpack_tokens_forward, None, x, index, inverse, batch, cells)
    latents = torch.empty((batch, 12, cells), dtype=torch.bfloat16, device="meta").transpose(1, 2)
    yield "C12-bfloat16-pack-latents", partial(pack_tokens_forward, latents, index, inverse)
