"""What the window attention kernels share: rows of heads by position or by slot, masks, rows nobody names.

A *row* is one token of one head: D elements. A dense tensor (W, N, H, D) finds the row of position p of
window w at w * stride_window + p * stride_token; a packed one (T, H, D) at slots[w, p] * stride_token.
Everything after the addresses is the same for both.

Widths that are no power of two are read as two blocks, D0 + D1: 72 is 64 + 16 with half of the second
masked, and costs 80 columns of matrix product instead of 128.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from d2it.kernels.common import cdiv, device_guard, next_power_of_2

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def row_offsets(at, stride_window, stride_token, stride_head, UNIT: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """Offsets of rows of one head. at: (window, position, row, head), in int64 before they multiply.

    Everything that is added to a pointer is added up here first: an offset that q, k and v share is then held
    once, where three pointers would be held three times.
    """
    o_window, o_position, o_row, i_head = at
    o_head = i_head * (stride_head * UNIT)
    if HAS_SLOTS:
        return o_row * (stride_token * UNIT) + o_head
    else:
        return o_window * (stride_window * UNIT) + (o_position.to(tl.int64) * (stride_token * UNIT) + o_head)


@triton.jit
def load_rows(p, o_row, m_row, stride_dim, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows at p + o_row as a tuple of one or two blocks; rows outside m_row are zero and not read."""
    o_dim = tl.arange(0, D0)
    m_main = m_row[:, None] if D >= D0 else m_row[:, None] & (o_dim < D)[None, :]
    b_main = tl.load(p + (o_row[:, None] + (o_dim * stride_dim)[None, :]), mask=m_main, other=0.0)
    if D1 == 0:
        return (b_main,)
    else:
        o_rest = D0 + tl.arange(0, D1)
        m_rest = m_row[:, None] & (o_rest < D)[None, :]
        b_rest = tl.load(p + (o_row[:, None] + (o_rest * stride_dim)[None, :]), mask=m_rest, other=0.0)
        return (b_main, b_rest)


@triton.jit
def store_rows(p, o_row, m_row, b_rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The counterpart of load_rows, into memory whose last axis is contiguous."""
    o_dim = tl.arange(0, D0)
    m_main = m_row[:, None] if D >= D0 else m_row[:, None] & (o_dim < D)[None, :]
    tl.store(p + (o_row[:, None] + o_dim[None, :]), b_rows[0].to(p.dtype.element_ty), mask=m_main)
    if D1 > 0:
        o_rest = D0 + tl.arange(0, D1)
        m_rest = m_row[:, None] & (o_rest < D)[None, :]
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
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 == 0:
        return (tl.zeros((ROWS, D0), tl.float32),)
    else:
        return (tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, D1), tl.float32))


@triton.jit
def scale_rows(rows, factor):
    if len(rows) == 1:
        return (rows[0] * factor,)
    else:
        return (rows[0] * factor, rows[1] * factor)


@triton.jit
def mark_named_rows_kernel(
    slots, unnamed, positions, tokens, stride_slots_window, stride_slots_token, N: tl.constexpr, BLOCK: tl.constexpr
):
    """unnamed[row] = 0 for every row that a slot names, unnamed[T] = 0 where one names a row that is not there.

    slots (W, N); unnamed (T + 1,) uint8, ones before.
    """
    o_position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_position = o_position < positions
    o_slot = (o_position // N) * stride_slots_window + (o_position % N) * stride_slots_token
    i_row = tl.load(slots + o_slot, mask=m_position, other=-1)
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
    block p * RESIDUES + r of its tile. dbias (Wb, heads or 1, N, N) contiguous; SHARED: one bias for all heads.
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


def reduce_sums(sums: torch.Tensor, bias: torch.Tensor, residues: int, repeats: int) -> torch.Tensor:
    """The gradient of the bias, in its dtype, from the float32 sums (splits, blocks, heads, ROWS, COLUMNS)."""
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    splits, blocks, heads, rows, columns = sums.shape
    n, shared = bias.shape[-1], bias.shape[1] != heads
    # A small bias has few programs, and many sums: then a program reads many at once.
    terms = min(128, next_power_of_2(splits * repeats * (heads if shared else 1)))
    block = min(max(32, 2048 // terms), next_power_of_2(n * n))
    programs = bias.shape[0] * bias.shape[1] * cdiv(n * n, block)
    if programs:
        with device_guard(sums):
            reduce_sums_kernel[(programs,)](
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


def clear_unnamed_rows(slots: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Zero the rows of packed outputs (T, ...) that no slot names, and touch no other.

    A memset of everything would cost a quarter of the forward's traffic again; the flags cost 1 byte a row. They also
    tell of a slot that names a row past the last: kernels take it for an empty one, and on a GPU it is an assertion.
    """
    tokens = tensors[0].shape[0]
    unnamed = torch.ones(tokens + 1, dtype=torch.uint8, device=slots.device)
    with device_guard(slots):
        if slots.numel():
            mark_named_rows_kernel[(cdiv(slots.numel(), 1024),)](
                slots, unnamed, slots.numel(), tokens, *slots.stride(), N=slots.shape[1], BLOCK=1024, num_warps=4
            )
        if slots.is_cuda:
            torch._assert_async(unnamed[tokens], f"slots must name rows below {tokens}")
        for tensor in tensors:
            width = tensor[0].numel() if tokens else 0
            if width:
                clear_unnamed_rows_kernel[(cdiv(tokens, 16),)](
                    tensor,
                    unnamed,
                    tokens,
                    WIDTH=width,
                    ROWS=16,
                    BLOCK=min(256, next_power_of_2(width)),
                    num_warps=4,
                )


def head_blocks(width: int) -> tuple[int, int]:
    """The one or two blocks that a head of this width is read as: powers of two, 16 at least (tl.dot's depth)."""
    whole = max(16, next_power_of_2(width))
    main = whole // 2
    rest = max(16, next_power_of_2(width - main)) if main < width else 0
    return (main, rest) if width > 32 and main + rest < whole else (whole, 0)


def stride_unit(*tensors: torch.Tensor) -> int:
    """A power of two, 16 at most, that divides every stride but the last axis's.

    Kernels get strides in this unit and multiply it back: Triton sees divisibility of an argument by 16
    alone, and a head of 72 elements (144 bytes) would be read 2 bytes at a time.
    """
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def precision(tensor: torch.Tensor) -> str:
    """How float32 products are taken: exactly, unless torch's own setting allows TF32."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def arguments(q, k, v, bias, slots, segment_ids, scale: float, grad=None) -> dict[str, object]:
    """What every kernel takes alike, by name: tensors, sizes, strides, and what there is of the options."""
    heads, width = q.shape[-2:]
    windows, n = q.shape[:2] if slots is None else slots.shape
    main, rest = head_blocks(width)
    inputs = {"q": q, "k": k, "v": v} | ({} if grad is None else {"grad": grad})
    unit = stride_unit(*inputs.values())
    found: dict[str, object] = {
        "bias": bias,
        "slots": slots,
        "segment_ids": segment_ids,
        "tokens": 0 if slots is None else q.shape[0],
        "windows": windows,
        "heads": heads,
        "bias_windows": 1 if bias is None else bias.shape[0],
        "segment_windows": 1 if segment_ids is None else segment_ids.shape[0],
        "scale": scale,
        "N": n,
        "D": width,
        "D0": main,
        "D1": rest,
        "UNIT": unit,
        "ALIKE": q.stride() == k.stride() == v.stride(),
        "HAS_BIAS": bias is not None,
        "HAS_SLOTS": slots is not None,
        "HAS_SEGMENTS": segment_ids is not None,
        "PRECISION": precision(q),
    }
    for name, tensor in inputs.items():
        *outer, head, dim = tensor.stride()
        window, token = outer if slots is None else (0, *outer)
        found[name] = tensor
        strides = (window // unit, token // unit, head // unit, dim)
        found |= _named(f"stride_{name}", ("window", "token", "head", "dim"), strides)
    window, head, query, key = (0, 0, 0, 0) if bias is None else bias.stride()
    head = head if bias is not None and bias.shape[1] > 1 else 0
    found |= _named("stride_bias", ("window", "head", "query", "key"), (window, head, query, key))
    for name, table in (("slots", slots), ("segment", segment_ids)):
        found |= _named(f"stride_{name}", ("window", "token"), (0, 0) if table is None else table.stride())
    return found


def _named(prefix: str, axes: tuple[str, ...], values: tuple[int, ...]) -> dict[str, int]:
    return {f"{prefix}_{axis}": value for axis, value in zip(axes, values)}
