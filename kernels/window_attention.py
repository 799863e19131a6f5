"""Window attention with a learnable bias: softmax(q k^T * scale + bias) v inside windows (paper Eq. 10).

Windows of up to 64 tokens are here (16 in float32 or of wide heads), larger ones in `window_attention_blocks`. A
program belongs to one head and walks over tiles of TILE rows: one window, or several of up to 8 tokens kept apart by a
block-diagonal mask. All tiles of a program share one tile of bias, and the gradient of that tile is one float32 sum in
the program's registers, written once at its end. The sums of all programs are then added in a fixed order: no atomics,
the same bits every time.

Bound by memory on an H200 (bf16: 8 N D bytes a window and head forward, 14 N D backward): rows are read where
the linear layer left them and written where the next one reads them, the backward reads inputs alone, and a
position without a token costs its index.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import CompileCase, capability, cdiv, compile_cases, num_sms, tiled_positions
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.window_attention_blocks import blocks_backward, blocks_forward
from d2it.kernels.window_attention_rows import (
    LOG2E,
    assert_slots,
    call_of,
    clear_unnamed_rows,
    dot_rows,
    gradients_of,
    load_rows,
    precision,
    reduce_sums,
    scale_rows,
    store_rows,
    weigh_rows,
)


@triton.jit
def tile_rows(call, TILE: tl.constexpr, RESIDUES: tl.constexpr, REPEATS: tl.constexpr):
    """The head, the split and the tiles of a program, and where the rows of its tiles come from.

    Windows that share a bias are those of one residue modulo bias_windows. A tile holds RESIDUES x REPEATS
    windows: neighbouring residues (block i_block of them), each in REPEATS windows that share its bias.
    """
    N: tl.constexpr = call.N
    blocks = tl.cdiv(call.bias_windows, RESIDUES)
    i_head = (tl.program_id(0) % call.heads).to(tl.int64)
    i_block = tl.program_id(0) // call.heads % blocks
    i_split = tl.program_id(0) // call.heads // blocks
    o_tile = tl.arange(0, TILE)
    o_local = o_tile // N
    o_position = (o_tile % N).to(tl.int64)
    o_residue = i_block * RESIDUES + o_local % RESIDUES
    o_repeat = o_local // RESIDUES
    m_tile = (o_repeat < REPEATS) & (o_residue < call.bias_windows)
    m_pair = (o_local[:, None] == o_local[None, :]) & m_tile[:, None]
    tiles = tl.cdiv(tl.cdiv(call.windows, call.bias_windows), REPEATS)
    return i_head, i_split, tiles, (i_block, o_local, o_position, o_residue, o_repeat, m_tile, m_pair)


@triton.jit
def tile_bias(call, i_head, place, RESIDUES: tl.constexpr):
    """The bias of a tile in base-2 logarithms, minus infinity between different windows."""
    i_block, o_local, o_position, o_residue, o_repeat, m_tile, m_pair = place
    if call.bias is not None:
        i_first = i_block * RESIDUES
        p_bias = call.bias.data + (i_head * call.bias.stride_head + i_first.to(tl.int64) * call.bias.stride_window)
        o_matrix = o_residue - i_first
        if call.bias.NARROW:
            o_position = o_position.to(tl.int32)
        else:
            o_matrix = o_matrix.to(tl.int64)
        o_query = o_matrix * call.bias.stride_window + o_position * call.bias.stride_query
        o_bias = o_query[:, None] + (o_position * call.bias.stride_key)[None, :]
        return tl.load(p_bias + o_bias, mask=m_pair, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(m_pair, 0.0, float("-inf"))


@triton.jit
def load_tile(call, i_head, i_tile, i_only, place, REPEATS: tl.constexpr, APART: tl.constexpr):
    """The rows of a tile: (window, position, row, head), which exist, whether any does, their segments, q, k and v.

    APART: only those of window i_only of the tile.
    """
    i_block, o_local, o_position, o_residue, o_repeat, m_tile, m_pair = place
    o_window = (tl.cast(i_tile, tl.int32) * REPEATS + o_repeat) * call.bias_windows + o_residue
    m_row = m_tile & (o_window < call.windows)
    if APART:
        m_row &= o_local == i_only
    o_wide = o_window.to(tl.int64)
    if call.slots is not None:
        p_slot = call.slots.data + (o_wide * call.slots.stride_window + o_position * call.slots.stride_token)
        o_row = tl.load(p_slot, mask=m_row, other=-1).to(tl.int64)
        m_row = (o_row >= 0) & (o_row < call.rows)
        occupied = tl.max(o_row, 0) >= 0
    else:
        o_row = o_wide * call.N + o_position
        occupied = True
    at = (o_wide, o_position, o_row, i_head)
    b_q = load_rows(call, call.q, at, m_row)
    b_k = load_rows(call, call.k, at, m_row)
    b_v = load_rows(call, call.v, at, m_row)
    o_segment = o_window
    if call.segments is not None:
        o_segment = (o_window % call.segments.windows).to(tl.int64) * call.segments.stride_window
        p_segment = call.segments.data + (o_segment + o_position * call.segments.stride_token)
        o_segment = tl.load(p_segment, mask=m_row, other=-1)
    return at, m_row, occupied, o_segment, b_q, b_k, b_v


@triton.jit
def softmax_rows(call, b_score, m_key, o_segment, MASKED: tl.constexpr):
    """exp2(score - row maximum), zero where masked, and 1 / row sum; a row without any key is all zero."""
    if MASKED:
        b_score = tl.where(m_key[None, :], b_score, float("-inf"))
    if call.segments is not None:
        b_score = tl.where(o_segment[:, None] == o_segment[None, :], b_score, float("-inf"))
    b_max = tl.max(b_score, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_p = tl.exp2(b_score - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    return b_p, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)


# Weights of zero keep the windows of a tile apart, but 0 * NaN is NaN. A program that comes upon a value that is not
# finite takes all of its tiles again, one window at a time.


@triton.jit
def cast_rows(rows, dtype: tl.constexpr):
    """Rows in another dtype, block by block."""
    if len(rows) == 1:
        return (rows[0].to(dtype),)
    else:
        return (rows[0].to(dtype), rows[1].to(dtype))


@triton.jit
def sum_rows(acc, rows):
    """acc (ROWS, 8) + the sum of each row, rounded as it may be: on tensor cores, where it costs least."""
    b_ones = tl.full((rows[0].shape[1], 8), 1.0, tl.float32).to(rows[0].dtype)
    acc = tl.dot(rows[0], b_ones, acc, input_precision="tf32")
    if len(rows) > 1:
        b_ones = tl.full((rows[1].shape[1], 8), 1.0, tl.float32).to(rows[1].dtype)
        acc = tl.dot(rows[1], b_ones, acc, input_precision="tf32")
    return acc


@triton.jit
def not_finite(x):
    """Whether a value of a matrix is NaN or infinite."""
    return tl.sum(tl.sum(x * 0.0, 1), 0) != 0.0


@triton.jit
def forward_tile(
    call,
    out,
    b_bias,
    b_check,
    i_head,
    i_tile,
    i_only,
    place,
    BIASED: tl.constexpr,
    REPEATS: tl.constexpr,
    CHECKED: tl.constexpr,
    APART: tl.constexpr,
):
    """Stores the result of a tile. Returns b_check, not finite if the result is not; CHECKED: it is wanted."""
    at, m_row, occupied, o_segment, b_q, b_k, b_v = load_tile(call, i_head, i_tile, i_only, place, REPEATS, APART)
    if occupied:
        b_score = dot_rows(b_q, b_k, call.PRECISION) * (call.scale * LOG2E)
        if BIASED:
            b_score += b_bias
        b_p, b_inverse = softmax_rows(call, b_score, m_row, o_segment, APART or call.slots is not None)
        b_out = weigh_rows(b_p.to(out.dtype.element_ty), b_v, call.PRECISION)
        b_out = scale_rows(b_out, b_inverse[:, None])
        if CHECKED:
            b_out = cast_rows(b_out, out.dtype.element_ty)
            b_check = sum_rows(b_check, b_out)
        store_rows(call, out, (at[2] * call.heads + i_head) * call.D, m_row, b_out)
    return b_check


@triton.jit
def window_attention_fwd_kernel(
    call, out, splits, TILE: tl.constexpr, RESIDUES: tl.constexpr, REPEATS: tl.constexpr, STAGES: tl.constexpr
):
    """One program: one head, one block of bias residues, every splits-th tile. out (rows, heads, D)."""
    BIASED: tl.constexpr = call.bias is not None or call.N < TILE
    SHARED: tl.constexpr = RESIDUES * REPEATS > 1
    i_head, i_split, tiles, place = tile_rows(call, TILE, RESIDUES, REPEATS)
    b_bias = tile_bias(call, i_head, place, RESIDUES) if BIASED else 0.0
    b_check = tl.zeros((TILE, 8), tl.float32)
    for i_tile in tl.range(i_split, tiles, splits, num_stages=STAGES):
        b_check = forward_tile(
            call, out, b_bias, b_check, i_head, i_tile, 0, place, BIASED, REPEATS, CHECKED=SHARED, APART=False
        )
    if SHARED:  # noqa: SIM102 - known to the compiler, unlike the next
        if not_finite(b_check):
            tl.debug_barrier()
            shared = TILE // call.length
            for i_step in tl.range(0, tl.cdiv(tiles - i_split, splits) * shared, num_stages=1):
                i_tile = i_split + i_step // shared * splits
                i_only = i_step % shared
                forward_tile(call, out, b_bias, b_check, i_head, i_tile, i_only, place, BIASED, REPEATS, False, True)


@triton.jit
def backward_tile(
    call,
    grads,
    b_dbias,
    b_check,
    i_head,
    i_tile,
    i_only,
    place,
    BIASED: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    RESIDUES: tl.constexpr,
    REPEATS: tl.constexpr,
    CHECKED: tl.constexpr,
    APART: tl.constexpr,
):
    """Stores the gradients of a tile and adds that of the bias to b_dbias. b_check: as in `forward_tile`.

    The bias comes from L1 for every tile: kept in registers, as the forward has it, the kernel would spill at
    D = 72. dv goes out before dP is formed, for the same reason.
    """
    at, m_row, occupied, o_segment, b_q, b_k, b_v = load_tile(call, i_head, i_tile, i_only, place, REPEATS, APART)
    b_grad = load_rows(call, call.grad, at, m_row)
    if occupied:
        b_product = dot_rows(b_q, b_k, call.PRECISION)
        b_score = b_product * (call.scale * LOG2E)
        if BIASED:
            b_score += tile_bias(call, i_head, place, RESIDUES)
        b_p, b_inverse = softmax_rows(call, b_score, m_row, o_segment, APART or call.slots is not None)
        b_p *= b_inverse[:, None]
        o_out = (at[2] * (grads.GROUPS * call.heads) + i_head) * call.D
        b_dv = weigh_rows(tl.trans(b_p.to(grads.v.dtype.element_ty)), b_grad, call.PRECISION)
        store_rows(call, grads.v, o_out, m_row, b_dv)
        b_ds = b_p * dot_rows(b_grad, b_v, call.PRECISION)
        if CHECKED:
            # Not finite where a product of q and k, a weight or a product of the gradient and v is not.
            b_delta = tl.sum(b_ds + b_product * 0.0, 1)
            b_check += b_delta
        else:
            b_delta = tl.sum(b_ds, 1)
        b_ds -= b_p * b_delta[:, None]
        if APART:
            b_ds = tl.where(m_row[:, None], b_ds, 0.0)
        if NEEDS_BIAS:
            b_dbias += b_ds
        b_low = b_ds.to(grads.q.dtype.element_ty)
        b_dk = weigh_rows(tl.trans(b_low), b_q, call.PRECISION)
        store_rows(call, grads.k, o_out, m_row, scale_rows(b_dk, call.scale))
        b_dq = weigh_rows(b_low, b_k, call.PRECISION)
        store_rows(call, grads.q, o_out, m_row, scale_rows(b_dq, call.scale))
    return b_dbias, b_check


@triton.jit
def window_attention_bwd_kernel(
    call,
    grads,
    sums,
    splits,
    TILE: tl.constexpr,
    RESIDUES: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program as in the forward. Five products; the softmax is recomputed, delta = rowsum(P * dP).

    sums (programs, TILE, TILE) float32, or None: the gradient of the tile of bias, over this program's tiles.
    """
    BIASED: tl.constexpr = call.bias is not None or call.N < TILE
    NEEDS_BIAS: tl.constexpr = sums is not None
    SHARED: tl.constexpr = RESIDUES * REPEATS > 1
    i_head, i_split, tiles, place = tile_rows(call, TILE, RESIDUES, REPEATS)
    b_dbias = tl.zeros((TILE, TILE), tl.float32)
    b_check = tl.zeros((TILE,), tl.float32)
    for i_tile in tl.range(i_split, tiles, splits, num_stages=STAGES):
        b_dbias, b_check = backward_tile(
            call,
            grads,
            b_dbias,
            b_check,
            i_head,
            i_tile,
            0,
            place,
            BIASED,
            NEEDS_BIAS,
            RESIDUES,
            REPEATS,
            CHECKED=SHARED,
            APART=False,
        )
    if SHARED:  # noqa: SIM102 - known to the compiler, unlike the next
        if tl.sum(b_check * 0.0, 0) != 0.0:
            tl.debug_barrier()
            b_dbias = tl.zeros((TILE, TILE), tl.float32)
            shared = TILE // call.length
            for i_step in tl.range(0, tl.cdiv(tiles - i_split, splits) * shared, num_stages=1):
                i_tile = i_split + i_step // shared * splits
                i_only = i_step % shared
                b_dbias, b_check = backward_tile(
                    call,
                    grads,
                    b_dbias,
                    b_check,
                    i_head,
                    i_tile,
                    i_only,
                    place,
                    BIASED,
                    NEEDS_BIAS,
                    RESIDUES,
                    REPEATS,
                    CHECKED=False,
                    APART=True,
                )
    if NEEDS_BIAS:
        o_tile = tl.arange(0, TILE)
        p_sums = sums + tl.program_id(0).to(tl.int64) * (TILE * TILE)
        tl.store(p_sums + (o_tile[:, None] * TILE + o_tile[None, :]), b_dbias)


class Tiles(NamedTuple):
    """How windows are laid out in tiles: pinned, so that results do not depend on a tuner."""

    blocks: int  # of residues
    splits: int
    config: dict[str, int]  # what the kernels take


# Warps of programs a multiprocessor, over several waves: many enough that a slow program does not hold up the
# rest, few enough that the bias is loaded, and the sum of its gradient written, once for many tiles.
WARPS_PER_SM = 64


def tiles_of(q: torch.Tensor, bias: torch.Tensor | None, slots: torch.Tensor | None, backward: bool) -> Tiles:
    """The tiles of windows of up to 64 positions."""
    heads, width = q.shape[-2:]
    windows, n = q.shape[:2] if slots is None else slots.shape
    if n <= 16:
        tile, stages = 16, 1
        warps = 1 if q.dtype != torch.float32 else 4 if width <= 64 else 8
    elif n <= 32:
        tile, warps, stages = 32, 2, 1
    else:
        # The backward loads the next tile while it works on one, where that leaves registers.
        tile, warps, stages = 64, 4, 2 if backward and capability(q)[0] == 9 else 1
    bias_windows = 1 if bias is None else bias.shape[0]
    residues = min(bias_windows, tile // n)
    repeats = tile // n // residues
    blocks = cdiv(bias_windows, residues)
    programs = num_sms(q) * WARPS_PER_SM // warps
    splits = max(1, min(cdiv(cdiv(windows, bias_windows), repeats), programs // (heads * blocks)))
    config = {"TILE": tile, "RESIDUES": residues, "REPEATS": repeats, "STAGES": stages, "num_warps": warps}
    return Tiles(blocks, splits, config)


def tiles_forward(tape: Tape, q, k, v, bias, slots, segment_ids, scale, precision, out) -> None:
    """Fills the rows of `out` (rows, heads, D) that exist; windows of up to 64 positions."""
    blocks, splits, config = tiles_of(q, bias, slots, backward=False)
    call = call_of(q, k, v, bias, slots, segment_ids, scale, precision, matrices=config["RESIDUES"])
    tape.launch(window_attention_fwd_kernel, q.shape[-2] * blocks * splits, call, out, splits, **config)


def tiles_backward(tape: Tape, grad, q, k, v, bias, slots, segment_ids, scale, needs_bias, precision, dq, dk, dv):
    """Fills the rows of dq, dk, dv that exist; returns the gradient of the bias, None unless needs_bias."""
    blocks, splits, config = tiles_of(q, bias, slots, backward=True)
    call = call_of(q, k, v, bias, slots, segment_ids, scale, precision, grad, matrices=config["RESIDUES"])
    heads, tile = q.shape[-2], config["TILE"]
    sums = tape.empty((splits, blocks, heads, tile, tile), torch.float32) if needs_bias else None
    tape.launch(
        window_attention_bwd_kernel, heads * blocks * splits, call, gradients_of(dq, dk, dv), sums, splits, **config
    )
    return None if sums is None else reduce_sums(tape, sums, bias, config["RESIDUES"], config["REPEATS"])


# --------------------------------------------------------------------------------------------------
# What the operators call. Launchers depend on their arguments alone: the precision of float32 products, a setting of
# PyTorch, is one of them.


def window_attention_forward(q, k, v, bias, slots, segment_ids, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v (W, N, H, D), or (T, H, D) with slots -> the result, and lse (W, H, N) float32 where N exceeds a tile."""
    out, lse, unnamed = _forward(q, k, v, bias, slots, segment_ids, scale, precision(q))
    assert_slots(unnamed)
    return out, lse


def window_attention_qkvpacked_forward(
    qkv, bias, slots, segment_ids, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on one projection (W, N, 3, H, D) or (T, 3, H, D), read in place."""
    out, lse, unnamed = _qkvpacked_forward(qkv, bias, slots, segment_ids, scale, precision(qkv))
    assert_slots(unnamed)
    return out, lse


def window_attention_backward(
    grad, q, k, v, bias, slots, segment_ids, out, lse, scale: float, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dbias), dbias empty unless needs_bias; out and lse of the forward where N exceeds a tile."""
    *grads, unnamed = _backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision(q))
    assert_slots(unnamed)
    return tuple(grads)


def window_attention_qkvpacked_backward(
    grad, qkv, bias, slots, segment_ids, out, lse, scale: float, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dqkv, dbias): the three gradients written into one tensor."""
    dqkv, dbias, unnamed = _qkvpacked_backward(
        grad, qkv, bias, slots, segment_ids, out, lse, scale, needs_bias, precision(qkv)
    )
    assert_slots(unnamed)
    return dqkv, dbias


@launcher
def _forward(tape: Tape, q, k, v, bias, slots, segment_ids, scale, precision):
    return _fill_forward(tape, q, k, v, bias, slots, segment_ids, scale, precision)


@launcher
def _qkvpacked_forward(tape: Tape, qkv, bias, slots, segment_ids, scale, precision):
    q, k, v = qkv.unbind(-3)
    return _fill_forward(tape, q, k, v, bias, slots, segment_ids, scale, precision)


@launcher
def _backward(tape: Tape, grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision):
    dq, dk, dv = (tape.empty(q.shape, q.dtype) for _ in range(3))
    dbias = _fill_backward(
        tape, grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision, dq, dk, dv
    )
    return dq, dk, dv, dbias, clear_unnamed_rows(tape, slots, dq, dk, dv)


@launcher
def _qkvpacked_backward(tape: Tape, grad, qkv, bias, slots, segment_ids, out, lse, scale, needs_bias, precision):
    dqkv = tape.empty(qkv.shape, qkv.dtype)
    q, k, v = qkv.unbind(-3)
    dq, dk, dv = dqkv.unbind(-3)
    dbias = _fill_backward(
        tape, grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision, dq, dk, dv
    )
    return dqkv, dbias, clear_unnamed_rows(tape, slots, dqkv)


def _fill_forward(tape: Tape, q, k, v, bias, slots, segment_ids, scale, precision):
    """The result, lse, and the flags of rows that no slot names."""
    out = tape.empty(q.shape, q.dtype)
    windows, n = q.shape[:2] if slots is None else slots.shape
    blocks = n > tiled_positions(q, slots, segment_ids)
    if not blocks:
        lse = tape.empty((0,), torch.float32)
    elif slots is None:
        lse = tape.empty((windows, q.shape[-2], n), torch.float32)
    else:  # no program writes the sums of positions without a token: so that the result is defined
        lse = tape.full((windows, q.shape[-2], n), float("inf"), torch.float32)
    if q.numel() and n:
        if blocks:
            blocks_forward(tape, q, k, v, bias, slots, segment_ids, scale, precision, out, lse)
        else:
            tiles_forward(tape, q, k, v, bias, slots, segment_ids, scale, precision, out)
    return out, lse, clear_unnamed_rows(tape, slots, out)


def _fill_backward(
    tape: Tape, grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision, dq, dk, dv
):
    """Fills the rows of dq, dk, dv that exist; returns the gradient of the bias, empty unless needs_bias."""
    n = q.shape[1] if slots is None else slots.shape[1]
    common = (q, k, v, bias, slots, segment_ids)
    dbias = None
    if not (q.numel() and n):
        dbias = tape.full(bias.shape, 0, bias.dtype) if needs_bias else None
    elif n > tiled_positions(q, slots, segment_ids):
        dbias = blocks_backward(tape, grad, *common, out, lse, scale, needs_bias, precision, dq, dk, dv)
    else:
        dbias = tiles_backward(tape, grad, *common, scale, needs_bias, precision, dq, dk, dv)
    return tape.empty((0,), q.dtype) if dbias is None else dbias


def _forward_and_backward(qkv, bias, slots, segment_ids) -> None:
    out, lse = window_attention_qkvpacked_forward(qkv, bias, slots, segment_ids, 0.1)
    kept = lse.ndim == 3
    window_attention_qkvpacked_backward(
        out, qkv, bias, slots, segment_ids, out if kept else None, lse if kept else None, 0.1, bias is not None
    )


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    """The presets' windows, packed; Swin's, dense and shifted; the widest heads; float32."""
    half, full = torch.bfloat16, torch.float32
    for n, heads, width, dtype, packed in (
        *((n, 16, width, half, True) for n in (16, 64, 256) for width in (64, 72)),
        (4, 16, 72, half, True),
        (32, 16, 72, half, True),
        (64, 8, 128, half, True),
        (256, 8, 128, half, True),
        (49, 4, 32, half, False),
        (256, 16, 64, half, False),
        (16, 4, 32, full, True),
        (64, 4, 64, full, True),
        (256, 4, 64, full, False),
    ):
        windows = 2**16 // n
        shape = (windows * n // 2, 3, heads, width) if packed else (windows, n, 3, heads, width)
        qkv = torch.empty(shape, dtype=dtype, device="meta")
        slots = torch.empty((windows, n), dtype=torch.int32, device="meta") if packed else None
        segments = None if packed else torch.empty((4, n), dtype=torch.int64, device="meta")
        bias = torch.empty((1, heads, n, n), dtype=full, device="meta")
        name = f"n{n}-D{width}-{'packed' if packed else 'segments'}-{str(dtype)[6:]}"
        yield name, partial(_forward_and_backward, qkv, bias, slots, segments)
