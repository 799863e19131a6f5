"""What the window attention kernels share: their arguments, rows of heads, masks, and unnamed rows.

Kernels take named tuples: one for each tensor, with its strides and its compile-time constants, and None where
the tensor is absent. A launcher builds each once.

A *row* is one token of one head: D elements. A dense tensor (W, N, H, D) has the row of position p of window w at
w * stride_window + p * stride_token; a packed one (T, H, D) at slots[w, p] * stride_token. Everything after the
addresses is the same for both.

Widths that are no power of two are read as two blocks, D0 + D1: 72 is 64 + 16 with half of the second masked, and
costs 80 columns of matrix product instead of 128.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import cdiv, next_power_of_2
from d2it.kernels.launch import Tape

LOG2E = tl.constexpr(math.log2(math.e))


class Strides(NamedTuple):
    """Strides of (W, N, H, D) or (T, H, D), all but the last in units of UNIT elements.

    Triton sees divisibility of an argument by 16 alone: without the unit, a head of 72 elements (144 bytes) would be
    read 2 bytes at a time.
    """

    window: int  # 0 where rows are packed
    token: int
    head: int
    dim: int
    UNIT: tl.constexpr  # a power of two, 16 at most


class Heads(NamedTuple):
    """Rows of heads, (W, N, H, D) or (T, H, D)."""

    data: torch.Tensor
    strides: Strides | None  # None: those of q, so that one offset serves both


class Bias(NamedTuple):
    """The bias (Wb, Hb, N, N)."""

    data: torch.Tensor
    stride_window: int
    stride_head: int  # 0 where all heads share one
    stride_query: int
    stride_key: int
    NARROW: tl.constexpr  # what a program reads at a time spans less than 2^31 elements: half the registers address it


class Table(NamedTuple):
    """An integer for each position of a window, (windows, N): slots, or segment ids."""

    data: torch.Tensor
    windows: int
    stride_window: int
    stride_token: int


class Gradients(NamedTuple):
    """The gradients of q, k and v, (rows, GROUPS, heads, D) each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    GROUPS: tl.constexpr  # 3 where they are slices of one tensor, else 1


class ClosedUp(NamedTuple):
    """The positions of packed windows that hold a token, closed up in their order: the first counts[w] of window w."""

    rows: torch.Tensor  # (windows, N) int32
    positions: torch.Tensor  # (windows, N) int32
    counts: torch.Tensor  # (windows,) int32


class Call(NamedTuple):
    """What every kernel takes: the tensors that are read, and the sizes."""

    q: Heads
    k: Heads
    v: Heads
    grad: Heads | None  # of the result, in the backward
    bias: Bias | None
    slots: Table | None  # of packed rows
    segments: Table | None
    closed: ClosedUp | None  # slots again, where a kernel takes rows closed up
    windows: int
    rows: int  # of a packed tensor
    length: int  # N again: loops over a constant number of blocks would be unrolled, and spill
    heads: int
    bias_windows: int
    scale: float
    N: tl.constexpr  # positions of a window
    D: tl.constexpr  # width of a head
    D0: tl.constexpr  # of its first block
    D1: tl.constexpr  # of its second, or 0
    PRECISION: tl.constexpr  # of float32 products


@triton.jit
def row_offsets(call, strides, at):
    """Offsets of rows of one head. at: (window, position, row, head), in int64 before they multiply.

    Everything that is added to a pointer is added up here first: an offset that q, k and v share is then held
    once, where three pointers would be held three times.
    """
    o_window, o_position, o_row, i_head = at
    o_head = i_head * (strides.head * strides.UNIT)
    if call.slots is not None:
        return o_row * (strides.token * strides.UNIT) + o_head
    else:
        return o_window * (strides.window * strides.UNIT) + (
            o_position.to(tl.int64) * (strides.token * strides.UNIT) + o_head
        )


@triton.jit
def load_strided(call, p, strides, at, m_row):
    """Rows of one head as a tuple of one or two blocks; rows outside m_row are zero and not read."""
    o_row = row_offsets(call, strides, at)
    o_dim = tl.arange(0, call.D0)
    m_main = m_row[:, None] if call.D >= call.D0 else m_row[:, None] & (o_dim < call.D)[None, :]
    b_main = tl.load(p + (o_row[:, None] + (o_dim * strides.dim)[None, :]), mask=m_main, other=0.0)
    if call.D1 == 0:
        return (b_main,)
    else:
        o_rest = call.D0 + tl.arange(0, call.D1)
        m_rest = m_row[:, None] & (o_rest < call.D)[None, :]
        b_rest = tl.load(p + (o_row[:, None] + (o_rest * strides.dim)[None, :]), mask=m_rest, other=0.0)
        return (b_main, b_rest)


@triton.jit
def load_rows(call, heads, at, m_row):
    """Rows of heads at (window, position, row, head), as a tuple of one or two blocks; zero outside m_row."""
    return load_strided(call, heads.data, call.q.strides if heads.strides is None else heads.strides, at, m_row)


@triton.jit
def store_rows(call, p, o_row, m_row, b_rows):
    """The counterpart of load_rows, into memory whose last axis is contiguous."""
    o_dim = tl.arange(0, call.D0)
    m_main = m_row[:, None] if call.D >= call.D0 else m_row[:, None] & (o_dim < call.D)[None, :]
    tl.store(p + (o_row[:, None] + o_dim[None, :]), b_rows[0].to(p.dtype.element_ty), mask=m_main)
    if call.D1 > 0:
        o_rest = call.D0 + tl.arange(0, call.D1)
        m_rest = m_row[:, None] & (o_rest < call.D)[None, :]
        tl.store(p + (o_row[:, None] + o_rest[None, :]), b_rows[1].to(p.dtype.element_ty), mask=m_rest)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """Inner products of every row of a with every row of b, in float32."""
    b_dot = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        b_dot = tl.dot(a[1], tl.trans(b[1]), b_dot, input_precision=PRECISION)
    return b_dot


@triton.jit
def weigh_rows(weights, rows, PRECISION: tl.constexpr):
    """weights @ rows, block by block, in float32."""
    b_main = tl.dot(weights, rows[0], input_precision=PRECISION)
    if len(rows) == 1:
        return (b_main,)
    else:
        return (b_main, tl.dot(weights, rows[1], input_precision=PRECISION))


@triton.jit
def add_rows(acc, weights, rows, PRECISION: tl.constexpr):
    """acc + weights @ rows, block by block."""
    b_main = tl.dot(weights, rows[0], acc[0], input_precision=PRECISION)
    if len(rows) == 1:
        return (b_main,)
    else:
        return (b_main, tl.dot(weights, rows[1], acc[1], input_precision=PRECISION))


@triton.jit
def zero_rows(call, ROWS: tl.constexpr):
    """Sums of rows, all zero, in float32."""
    if call.D1 == 0:
        return (tl.zeros((ROWS, call.D0), tl.float32),)
    else:
        return (tl.zeros((ROWS, call.D0), tl.float32), tl.zeros((ROWS, call.D1), tl.float32))


@triton.jit
def scale_rows(rows, factor):
    """rows * factor, block by block."""
    if len(rows) == 1:
        return (rows[0] * factor,)
    else:
        return (rows[0] * factor, rows[1] * factor)


@triton.jit
def mark_named_rows_kernel(slots, unnamed, tokens, N: tl.constexpr, BLOCK: tl.constexpr):
    """unnamed[row] = 0 for every row that a slot names, unnamed[T] = 0 where one names a row that is not there.

    slots (W, N); unnamed (T + 1,) uint8, ones before.
    """
    o_position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_window = o_position // N
    o_slot = i_window * slots.stride_window + (o_position % N) * slots.stride_token
    i_row = tl.load(slots.data + o_slot, mask=i_window < slots.windows, other=-1)
    tl.store(unnamed + tl.minimum(i_row, tokens), tl.zeros((BLOCK,), tl.uint8), mask=i_row >= 0)


@triton.jit
def clear_unnamed_rows_kernel(rows, unnamed, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows of a contiguous (T, WIDTH) tensor that no slot names. One program: ROWS rows."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b_unnamed = tl.load(unnamed + o_row, mask=o_row < tokens, other=0)
    if tl.max(b_unnamed, 0) != 0:
        m_row = (b_unnamed != 0)[:, None]
        for i_column in tl.range(0, WIDTH, BLOCK):
            o_column = tl.cast(i_column, tl.int32) + tl.arange(0, BLOCK)
            m_block = m_row & (o_column < WIDTH)[None, :]
            b_zero = tl.zeros((ROWS, BLOCK), rows.dtype.element_ty)
            tl.store(rows + (o_row * WIDTH)[:, None] + o_column[None, :], b_zero, mask=m_block)


@triton.jit
def reduce_sums_kernel(
    sums,
    dbias,
    splits,
    blocks,
    heads,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUES: tl.constexpr,
    REPEATS: tl.constexpr,
    SHARED: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dbias from the sums of the programs, in the order of split, repeat and head; TERMS at a time in a fixed tree.

    sums (splits, blocks, heads, ROWS, COLUMNS) float32: residue block * RESIDUES + r of repeat p is the diagonal
    block p * RESIDUES + r of its tile. dbias (Wb, heads or 1, N, N) contiguous; SHARED: one call.bias for all heads.
    """
    PAIRS: tl.constexpr = N * N
    CHUNKS: tl.constexpr = (PAIRS + BLOCK - 1) // BLOCK
    i_matrix = tl.program_id(0) // CHUNKS
    o_pair = (tl.program_id(0) % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
    m_pair = o_pair < PAIRS
    i_residue = i_matrix if SHARED else i_matrix // heads
    i_block = i_residue // RESIDUES
    terms = splits * REPEATS * heads if SHARED else splits * REPEATS
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_term in tl.range(0, terms, TERMS):
        o_term = tl.cast(i_term, tl.int32) + tl.arange(0, TERMS)
        if SHARED:
            o_head = o_term % heads
            o_flat = o_term // heads
        else:
            o_head = i_matrix % heads
            o_flat = o_term
        o_tile = ((o_flat // REPEATS).to(tl.int64) * blocks + i_block) * heads + o_head
        o_first = (o_flat % REPEATS * RESIDUES + i_residue % RESIDUES) * (N * COLUMNS + N)
        o_sum = (o_tile * (ROWS * COLUMNS) + o_first)[:, None] + (o_pair // N * COLUMNS + o_pair % N)[None, :]
        b_sum += tl.sum(tl.load(sums + o_sum, mask=(o_term < terms)[:, None] & m_pair[None, :], other=0.0), 0)
    p_dbias = dbias + i_matrix.to(tl.int64) * PAIRS + o_pair
    tl.store(p_dbias, b_sum.to(dbias.dtype.element_ty), mask=m_pair)


def reduce_sums(tape: Tape, sums: torch.Tensor, bias: torch.Tensor, residues: int, repeats: int) -> torch.Tensor:
    """The gradient of the bias, in its dtype, from the float32 sums (splits, blocks, heads, ROWS, COLUMNS)."""
    dbias = tape.empty(bias.shape, bias.dtype)
    splits, blocks, heads, rows, columns = sums.shape
    n, shared = bias.shape[-1], bias.shape[1] != heads
    # A small bias has few programs, and many sums: then a program reads many at once.
    terms = min(128, next_power_of_2(splits * repeats * (heads if shared else 1)))
    block = min(max(32, 2048 // terms), next_power_of_2(n * n))
    programs = bias.shape[0] * bias.shape[1] * cdiv(n * n, block)
    if programs:
        tape.launch(
            reduce_sums_kernel,
            programs,
            sums,
            dbias,
            splits,
            blocks,
            heads,
            N=n,
            ROWS=rows,
            COLUMNS=columns,
            RESIDUES=residues,
            REPEATS=repeats,
            SHARED=shared,
            TERMS=terms,
            BLOCK=block,
            num_warps=max(1, min(4, terms * block // 256)),
        )
    return dbias


def clear_unnamed_rows(tape: Tape, slots: torch.Tensor | None, *tensors: torch.Tensor) -> torch.Tensor | None:
    """Zero the rows of packed outputs (T, ...) that no slot names, and touch no other; returns the flags of the rows.

    A memset of everything would cost a quarter of the forward's traffic again; the flags cost 1 byte a row. The last of
    them, past the rows, is 0 where a slot names a row past the last: kernels take it for an empty one.
    """
    if slots is None:
        return None
    tokens = tensors[0].shape[0]
    unnamed = tape.full((tokens + 1,), 1, torch.uint8)
    if slots.numel():
        tape.launch(
            mark_named_rows_kernel,
            cdiv(slots.numel(), 1024),
            table_of(slots),
            unnamed,
            tokens,
            N=slots.shape[1],
            BLOCK=1024,
            num_warps=4,
        )
    for tensor in tensors:
        width = math.prod(tensor.shape[1:]) if tokens else 0
        if width:
            tape.launch(
                clear_unnamed_rows_kernel,
                cdiv(tokens, 16),
                tensor,
                unnamed,
                tokens,
                WIDTH=width,
                ROWS=16,
                BLOCK=min(256, next_power_of_2(width)),
                num_warps=4,
            )
    return unnamed


def assert_slots(unnamed: torch.Tensor | None) -> None:
    """On a GPU, a slot that names a row past the last is a device-side assertion; `unnamed` of `clear_unnamed_rows`."""
    if unnamed is not None and unnamed.is_cuda:
        tokens = unnamed.shape[0] - 1
        torch._assert_async(unnamed[tokens], f"slots must name rows below {tokens}")


def head_blocks(width: int) -> tuple[int, int]:
    """The one or two blocks that a head of this width is read as: powers of two, 16 at least (tl.dot's depth)."""
    whole = max(16, next_power_of_2(width))
    main = whole // 2
    rest = max(16, next_power_of_2(width - main)) if main < width else 0
    return (main, rest) if width > 32 and main + rest < whole else (whole, 0)


def precision(tensor: torch.Tensor) -> str:
    """How float32 products are taken: exactly, unless torch's own setting allows TF32."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def heads_of(tensor: torch.Tensor, q: torch.Tensor | None = None) -> Heads:
    """(W, N, H, D) or (T, H, D), any strides; q: the tensor whose strides are taken where they are the same."""
    if q is not None and tensor.stride() == q.stride():
        return Heads(tensor, None)
    *outer, head, dim = tensor.stride()
    window, token = outer if len(outer) == 2 else (0, *outer)
    unit = math.gcd(16, window, token, head)
    return Heads(tensor, Strides(window // unit, token // unit, head // unit, dim, tl.constexpr(unit)))


def bias_of(bias: torch.Tensor | None, matrices: int) -> Bias | None:
    """(Wb, Hb, N, N), any strides; matrices: how many a program reads at a time."""
    if bias is None:
        return None
    window, head, query, key = bias.stride()
    span = (matrices - 1) * window + (bias.shape[-1] - 1) * (query + key)
    return Bias(bias, window, head if bias.shape[1] > 1 else 0, query, key, tl.constexpr(span < 2**31))


def table_of(integers: torch.Tensor | None) -> Table | None:
    """(windows, N), any strides."""
    return None if integers is None else Table(integers, integers.shape[0], *integers.stride())


def gradients_of(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> Gradients:
    """Contiguous tensors, or the slices of one, (..., H, D)."""
    heads, width = dq.shape[-2:]
    return Gradients(dq, dk, dv, tl.constexpr(dq.stride(-3) // (heads * width)))


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    slots: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    scale: float,
    precision: str,
    grad: torch.Tensor | None = None,
    *,
    matrices: int = 1,
) -> Call:
    """What the kernels take; precision: of float32 products; matrices: of the bias, that a program reads at a time."""
    heads, width = q.shape[-2:]
    windows, n = q.shape[:2] if slots is None else slots.shape
    constants: Any = (n, width, *head_blocks(width), precision)
    return Call(
        heads_of(q),
        heads_of(k, q),
        heads_of(v, q),
        None if grad is None else heads_of(grad, q),
        bias_of(bias, matrices),
        table_of(slots),
        table_of(segment_ids),
        None,
        windows,
        0 if slots is None else q.shape[0],
        n,
        heads,
        1 if bias is None else bias.shape[0],
        scale,
        *(tl.constexpr(constant) for constant in constants),
    )
