"""The plan of packed tokens from a grain map (paper 3.2.3, Eq. 7): which cells have a token, and its row.

Two launches, for any batch. Cells are numbered by position: images in order, windows row-major in the image,
cells row-major in the window, which is the order of the rows. The first launch counts the tokens of every chunk
of positions, the second adds up the counts before its own chunk and writes. No program waits for another, there
are no atomics, and every element of every output is written exactly once: the plan is the same every time, a
CUDA graph needs nothing reset between replays, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import ASSERTIONS, CompileCase, cdiv, compile_cases, next_power_of_2
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.rows import constant

BLOCK = 1024
MAX_CHUNKS = 1024


class Grains(NamedTuple):
    """A grain map, and how its positions are numbered.

    Attributes:
        data: (B, h, w) int64, with its strides in elements: `stride_image`, `stride_row`, `stride_col`.
        cells: Positions in all; `cells_image` of an image, `cells_across` in a row of its cells.
        windows_across: Windows in a row of an image's windows.
        min_grain: The coarsest grain that has tokens.
        REGION: Cells of a region's side; `WINDOW` of a window's.
        CODE_SIZES: Cells of a code's side by grain, coarsest first: a code has one token, at its first cell. None: a
            token for every cell.
    """

    data: torch.Tensor
    cells: int
    cells_image: int
    cells_across: int
    windows_across: int
    min_grain: int
    REGION: tl.constexpr
    WINDOW: tl.constexpr
    CODE_SIZES: tuple[tl.constexpr, ...] | None
    stride_image: int
    stride_row: int
    stride_col: int


@triton.jit
def _grain_of(grains, o_position):
    """Whether each position has a token, its cell in the flat grid, its image, and whether its grain is none."""
    WINDOW: tl.constexpr = grains.WINDOW
    CELLS: tl.constexpr = WINDOW * WINDOW
    m_position = o_position < grains.cells
    o_image = o_position // grains.cells_image
    o_in_image = o_position % grains.cells_image
    o_window = o_in_image // CELLS
    o_in_window = o_in_image % CELLS
    o_y = (o_window // grains.windows_across) * WINDOW + o_in_window // WINDOW
    o_x = (o_window % grains.windows_across) * WINDOW + o_in_window % WINDOW
    p_grain = grains.data + o_image.to(tl.int64) * grains.stride_image
    p_grain += (o_y // grains.REGION).to(tl.int64) * grains.stride_row
    p_grain += (o_x // grains.REGION).to(tl.int64) * grains.stride_col
    b_grain = tl.load(p_grain, mask=m_position, other=0)
    b_token = m_position & (b_grain >= grains.min_grain)
    b_wrong = b_grain < 0
    if grains.CODE_SIZES is not None:
        m_first = b_wrong & False
        for i_grain in tl.static_range(len(grains.CODE_SIZES)):
            m_starts = (o_y % grains.CODE_SIZES[i_grain] == 0) & (o_x % grains.CODE_SIZES[i_grain] == 0)
            m_first |= (b_grain == i_grain) & m_starts
        b_token &= m_first
        b_wrong |= b_grain >= len(grains.CODE_SIZES)
    o_cell = o_image * grains.cells_image + o_y * grains.cells_across + o_x
    return b_token.to(tl.int32), o_cell, o_image, b_wrong.to(tl.int32)


@triton.jit
def plan_tokens_count_kernel(grains, counts, chunks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """One program: one chunk of BLOCKS * BLOCK positions. counts (2, chunks): tokens, and wrong grains."""
    i_chunk = tl.program_id(0)
    b_tokens = tl.zeros((BLOCK,), tl.int32)
    b_wrong = tl.zeros((BLOCK,), tl.int32)
    for i_block in tl.range(0, BLOCKS):
        o_position = (i_chunk * BLOCKS + i_block) * BLOCK + tl.arange(0, BLOCK)
        b_token, _, _, b_wrong_here = _grain_of(grains, o_position)
        b_tokens += b_token
        b_wrong += b_wrong_here
    tl.store(counts + i_chunk, tl.sum(b_tokens))
    tl.store(counts + chunks + i_chunk, tl.sum(b_wrong))


@triton.jit
def plan_tokens_write_kernel(
    grains,
    counts,
    index,
    inverse,
    slots,
    sample,
    count,
    chunks,
    capacity,
    last_image,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program: one chunk of positions (inverse, slots, and the rows that begin there) and the same range of
    rows, of which it writes those past the count. CHUNKS is the power of two that holds `chunks`."""
    i_chunk = tl.program_id(0)
    o_chunk = tl.arange(0, CHUNKS)
    b_counts = tl.load(counts + o_chunk, mask=o_chunk < chunks, other=0)
    i_total = tl.sum(b_counts)
    i_row = tl.sum(tl.where(o_chunk < i_chunk, b_counts, 0))
    if i_chunk == 0:
        b_wrong = tl.load(counts + chunks + o_chunk, mask=o_chunk < chunks, other=0)
        tl.device_assert(
            tl.sum(b_wrong) == 0, "plan_tokens: grain_map must have no value below 0, nor one without a code size"
        )
        tl.device_assert(i_total <= capacity, "plan_tokens: capacity must hold the plan's tokens")
        tl.store(count, i_total)

    for i_block in tl.range(0, BLOCKS):
        o_position = (i_chunk * BLOCKS + i_block) * BLOCK + tl.arange(0, BLOCK)
        m_position = o_position < grains.cells
        b_token, o_cell, o_image, _ = _grain_of(grains, o_position)
        b_row = i_row + tl.cumsum(b_token, 0) - 1
        # Past the capacity a cell has no row: what is written stays inside the buffers, and the assertion fires.
        m_token = (b_token == 1) & (b_row < capacity)
        b_row_or_none = tl.where(m_token, b_row, -1)
        tl.store(slots + o_position, b_row_or_none, mask=m_position)
        tl.store(inverse + o_cell, b_row_or_none, mask=m_position)
        tl.store(index + b_row, o_cell, mask=m_token)
        tl.store(sample + b_row, o_image, mask=m_token)
        i_row += tl.sum(b_token)

        m_tail = (o_position >= i_total) & (o_position < capacity)
        tl.store(index + o_position, tl.full((BLOCK,), -1, tl.int32), mask=m_tail)
        tl.store(sample + o_position, tl.full((BLOCK,), 0, tl.int32) + last_image, mask=m_tail)


def plan_tokens_forward(
    grain_map: torch.Tensor,
    cells_per_region: int,
    window: int,
    min_grain: int,
    capacity: int,
    code_sizes: Sequence[int] = (),
) -> tuple[torch.Tensor, ...]:
    """grain_map (B, h, w) int64, any strides -> index, inverse, slots, sample, count, as in `TokenPlan`.

    A grain below 0, one without a code size where sizes are given, and more tokens than `capacity` are device-side
    assertions.
    """
    return _plan_tokens(grain_map, cells_per_region, window, min_grain, capacity, tuple(code_sizes))


@launcher
def _plan_tokens(
    tape: Tape,
    grain_map: torch.Tensor,
    cells_per_region: int,
    window: int,
    min_grain: int,
    capacity: int,
    code_sizes: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    batch, height, width = grain_map.shape
    cells_image = height * width * cells_per_region**2
    cells = batch * cells_image

    def empty(*shape: int) -> torch.Tensor:
        return tape.empty(shape, torch.int32)

    plan = (empty(capacity), empty(cells), empty(cells // window**2, window**2), empty(capacity), empty())
    blocks = max(cdiv(max(cells, capacity), BLOCK), 1)
    blocks_each = next_power_of_2(cdiv(blocks, MAX_CHUNKS))
    chunks = cdiv(blocks, blocks_each)
    counts = empty(2, chunks)
    grains = Grains(
        grain_map,
        cells,
        max(cells_image, 1),
        width * cells_per_region,
        max(width * cells_per_region // window, 1),
        min_grain,
        constant(cells_per_region),
        constant(window),
        tuple(constant(size) for size in code_sizes) or None,
        *grain_map.stride(),
    )
    options = {"BLOCK": BLOCK, "BLOCKS": blocks_each, "num_warps": 8, **ASSERTIONS}
    tape.launch(plan_tokens_count_kernel, chunks, grains, counts, chunks, **options)
    tape.launch(
        plan_tokens_write_kernel,
        chunks,
        grains,
        counts,
        *plan,
        chunks,
        capacity,
        max(batch - 1, 0),
        CHUNKS=next_power_of_2(chunks),
        **options,
    )
    return plan


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for batch, regions, region, window, sizes in (
        (256, 16, 2, 16, ()),
        (32, 16, 2, 4, ()),
        (2048, 16, 4, 8, ()),
        (256, 8, 4, 16, (4, 2, 1)),
    ):
        grain_map = torch.empty((batch, regions, regions), dtype=torch.int64, device="meta")
        capacity = batch * regions**2 * region**2 // 2
        yield (
            f"B{batch}-{regions}x{regions}-s{region}-w{window}" + ("-codes" if sizes else ""),
            partial(plan_tokens_forward, grain_map, region, window, 1, capacity, sizes),
        )
