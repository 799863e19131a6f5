"""Window attention with a learnable bias: softmax(q k^T * scale + bias) v inside windows (paper Eq. 10).

Windows of up to 64 tokens are here (16 in float32 or of wide heads), larger ones in `window_attention_blocks`. A
program belongs to one head and walks over tiles of TILE rows: one window, or several kept apart by a block-diagonal
mask. All tiles of a program share one tile of bias, and the gradient of that tile is one float32 sum in the program's
registers, written once at its end. The sums of all programs are then added in a fixed order: no atomics, the same bits
every time.

Bound by memory on an H200 (bf16: 8 N D bytes a window and head forward, 14 N D backward): rows are read where
the linear layer left them and written where the next one wants them, the backward reads inputs alone, and a
position without a token costs its index.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from d2it.kernels.common import CompileCase, capability, cdiv, compile_cases, device_guard, num_sms, tiled_positions
from d2it.kernels.window_attention_blocks import blocks_backward, blocks_forward
from d2it.kernels.window_attention_rows import (
    LOG2E,
    arguments,
    clear_unnamed_rows,
    dot_rows,
    load_rows,
    reduce_sums,
    row_offsets,
    scale_rows,
    store_rows,
    weigh_rows,
)


@triton.jit
def tile_rows(
    i_block, bias_windows, N: tl.constexpr, TILE: tl.constexpr, RESIDUES: tl.constexpr, REPEATS: tl.constexpr
):
    """Where the rows of a tile come from.

    Windows that share a bias are those of one residue modulo bias_windows. A tile holds RESIDUES x REPEATS
    windows: neighbouring residues (block i_block of them), each in REPEATS windows that share its bias.
    """
    o_tile = tl.arange(0, TILE)
    o_local = o_tile // N
    o_position = (o_tile % N).to(tl.int64)
    o_residue = i_block * RESIDUES + o_local % RESIDUES
    o_repeat = o_local // RESIDUES
    m_tile = (o_repeat < REPEATS) & (o_residue < bias_windows)
    m_pair = (o_local[:, None] == o_local[None, :]) & m_tile[:, None]
    return o_position, o_residue, o_repeat, m_tile, m_pair


@triton.jit
def tile_bias(
    bias,
    i_head,
    i_block,
    o_residue,
    o_position,
    m_pair,
    stride_window,
    stride_head,
    stride_query,
    stride_key,
    RESIDUES: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The bias of a tile in base-2 logarithms, minus infinity between different windows.

    NARROW: the matrices of a tile span less than 2^31 elements, and half the registers address them.
    """
    if HAS_BIAS:
        i_first = i_block * RESIDUES
        bias += i_head * stride_head + i_first.to(tl.int64) * stride_window
        o_matrix = o_residue - i_first
        if NARROW:
            o_position = o_position.to(tl.int32)
        else:
            o_matrix = o_matrix.to(tl.int64)
        o_query = o_matrix * stride_window + o_position * stride_query
        o_bias = o_query[:, None] + (o_position * stride_key)[None, :]
        return tl.load(bias + o_bias, mask=m_pair, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(m_pair, 0.0, float("-inf"))


@triton.jit
def softmax_rows(b_score, m_key, o_segment, HAS_SLOTS: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """exp2(score - row maximum), zero where masked, and 1 / row sum; a row without any key is all zero."""
    if HAS_SLOTS:
        b_score = tl.where(m_key[None, :], b_score, float("-inf"))
    if HAS_SEGMENTS:
        b_score = tl.where(o_segment[:, None] == o_segment[None, :], b_score, float("-inf"))
    b_max = tl.max(b_score, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_p = tl.exp2(b_score - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    return b_p, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)


@triton.jit
def window_attention_fwd_kernel(
    q,
    k,
    v,
    bias,
    slots,
    segment_ids,
    out,
    tokens,
    windows,
    heads,
    bias_windows,
    segment_windows,
    splits,
    scale,
    stride_q_window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_k_window,
    stride_k_token,
    stride_k_head,
    stride_k_dim,
    stride_v_window,
    stride_v_token,
    stride_v_head,
    stride_v_dim,
    stride_bias_window,
    stride_bias_head,
    stride_bias_query,
    stride_bias_key,
    stride_slots_window,
    stride_slots_token,
    stride_segment_window,
    stride_segment_token,
    N: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    ALIKE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    RESIDUES: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one head, one block of bias residues, every splits-th tile. out (rows, heads, D)."""
    i_head = (tl.program_id(0) % heads).to(tl.int64)
    blocks = tl.cdiv(bias_windows, RESIDUES)
    i_block = tl.program_id(0) // heads % blocks
    i_split = tl.program_id(0) // heads // blocks
    o_position, o_residue, o_repeat, m_tile, m_pair = tile_rows(i_block, bias_windows, N, TILE, RESIDUES, REPEATS)
    if HAS_BIAS or N < TILE:
        b_bias = tile_bias(
            bias,
            i_head,
            i_block,
            o_residue,
            o_position,
            m_pair,
            stride_bias_window,
            stride_bias_head,
            stride_bias_query,
            stride_bias_key,
            RESIDUES,
            NARROW,
            HAS_BIAS,
        )
    tiles = tl.cdiv(tl.cdiv(windows, bias_windows), REPEATS)
    for i_tile in tl.range(i_split, tiles, splits, num_stages=STAGES):
        o_window = (tl.cast(i_tile, tl.int32) * REPEATS + o_repeat) * bias_windows + o_residue
        m_row = m_tile & (o_window < windows)
        o_wide = o_window.to(tl.int64)
        if HAS_SLOTS:
            p_slot = slots + (o_wide * stride_slots_window + o_position * stride_slots_token)
            o_row = tl.load(p_slot, mask=m_row, other=-1).to(tl.int64)
            m_row = (o_row >= 0) & (o_row < tokens)
            occupied = tl.max(o_row, 0) >= 0
        else:
            o_row = o_wide * N + o_position
            occupied = True
        at = (o_wide, o_position, o_row, i_head)
        o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
        if ALIKE:
            o_k = o_q
            o_v = o_q
        else:
            o_k = row_offsets(at, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
            o_v = row_offsets(at, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
        b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
        b_k = load_rows(k, o_k, m_row, stride_k_dim, D, D0, D1)
        b_v = load_rows(v, o_v, m_row, stride_v_dim, D, D0, D1)
        if HAS_SEGMENTS:
            o_segment = (o_window % segment_windows).to(tl.int64) * stride_segment_window
            p_segment = segment_ids + (o_segment + o_position * stride_segment_token)
            o_segment = tl.load(p_segment, mask=m_row, other=-1)
        else:
            o_segment = o_window
        if occupied:
            b_score = dot_rows(b_q, b_k, PRECISION) * (scale * LOG2E)
            if HAS_BIAS or N < TILE:
                b_score += b_bias
            b_p, b_inverse = softmax_rows(b_score, m_row, o_segment, HAS_SLOTS, HAS_SEGMENTS)
            b_out = weigh_rows(b_p.to(v.dtype.element_ty), b_v, PRECISION)
            b_out = scale_rows(b_out, b_inverse[:, None])
            store_rows(out, (o_row * heads + i_head) * D, m_row, b_out, D, D0, D1)


@triton.jit
def window_attention_bwd_kernel(
    grad,
    q,
    k,
    v,
    bias,
    slots,
    segment_ids,
    dq,
    dk,
    dv,
    sums,
    tokens,
    windows,
    heads,
    bias_windows,
    segment_windows,
    splits,
    scale,
    stride_grad_window,
    stride_grad_token,
    stride_grad_head,
    stride_grad_dim,
    stride_q_window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_k_window,
    stride_k_token,
    stride_k_head,
    stride_k_dim,
    stride_v_window,
    stride_v_token,
    stride_v_head,
    stride_v_dim,
    stride_bias_window,
    stride_bias_head,
    stride_bias_query,
    stride_bias_key,
    stride_slots_window,
    stride_slots_token,
    stride_segment_window,
    stride_segment_token,
    N: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    ALIKE: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    RESIDUES: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program as in the forward. Five products; the softmax is recomputed, delta = rowsum(P * dP).

    dq, dk, dv (rows, GROUPS, heads, D): GROUPS is 3 where they are slices of one tensor. sums (programs, TILE,
    TILE) float32: the gradient of the tile of bias, over this program's tiles.

    The bias comes from L1 for every tile: kept in registers, as the forward has it, the kernel would spill at
    D = 72. dv goes out before dP is formed, for the same reason.
    """
    i_head = (tl.program_id(0) % heads).to(tl.int64)
    blocks = tl.cdiv(bias_windows, RESIDUES)
    i_block = tl.program_id(0) // heads % blocks
    i_split = tl.program_id(0) // heads // blocks
    o_position, o_residue, o_repeat, m_tile, m_pair = tile_rows(i_block, bias_windows, N, TILE, RESIDUES, REPEATS)
    b_dbias = tl.zeros((TILE, TILE), tl.float32)
    tiles = tl.cdiv(tl.cdiv(windows, bias_windows), REPEATS)
    for i_tile in tl.range(i_split, tiles, splits, num_stages=STAGES):
        o_window = (tl.cast(i_tile, tl.int32) * REPEATS + o_repeat) * bias_windows + o_residue
        m_row = m_tile & (o_window < windows)
        o_wide = o_window.to(tl.int64)
        if HAS_SLOTS:
            p_slot = slots + (o_wide * stride_slots_window + o_position * stride_slots_token)
            o_row = tl.load(p_slot, mask=m_row, other=-1).to(tl.int64)
            m_row = (o_row >= 0) & (o_row < tokens)
            occupied = tl.max(o_row, 0) >= 0
        else:
            o_row = o_wide * N + o_position
            occupied = True
        at = (o_wide, o_position, o_row, i_head)
        o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
        if ALIKE:
            o_k = o_q
            o_v = o_q
        else:
            o_k = row_offsets(at, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
            o_v = row_offsets(at, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
        o_grad = row_offsets(at, stride_grad_window, stride_grad_token, stride_grad_head, UNIT, HAS_SLOTS)
        b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
        b_k = load_rows(k, o_k, m_row, stride_k_dim, D, D0, D1)
        b_v = load_rows(v, o_v, m_row, stride_v_dim, D, D0, D1)
        b_grad = load_rows(grad, o_grad, m_row, stride_grad_dim, D, D0, D1)
        if HAS_SEGMENTS:
            o_segment = (o_window % segment_windows).to(tl.int64) * stride_segment_window
            p_segment = segment_ids + (o_segment + o_position * stride_segment_token)
            o_segment = tl.load(p_segment, mask=m_row, other=-1)
        else:
            o_segment = o_window
        if occupied:
            b_score = dot_rows(b_q, b_k, PRECISION) * (scale * LOG2E)
            if HAS_BIAS or N < TILE:
                b_score += tile_bias(
                    bias,
                    i_head,
                    i_block,
                    o_residue,
                    o_position,
                    m_pair,
                    stride_bias_window,
                    stride_bias_head,
                    stride_bias_query,
                    stride_bias_key,
                    RESIDUES,
                    NARROW,
                    HAS_BIAS,
                )
            b_p, b_inverse = softmax_rows(b_score, m_row, o_segment, HAS_SLOTS, HAS_SEGMENTS)
            b_p *= b_inverse[:, None]
            o_out = (o_row * (GROUPS * heads) + i_head) * D
            b_dv = weigh_rows(tl.trans(b_p.to(v.dtype.element_ty)), b_grad, PRECISION)
            store_rows(dv, o_out, m_row, b_dv, D, D0, D1)
            b_ds = b_p * dot_rows(b_grad, b_v, PRECISION)
            b_ds -= b_p * tl.sum(b_ds, 1)[:, None]
            if NEEDS_BIAS:
                b_dbias += b_ds
            b_low = b_ds.to(q.dtype.element_ty)
            b_dk = scale_rows(weigh_rows(tl.trans(b_low), b_q, PRECISION), scale)
            store_rows(dk, o_out, m_row, b_dk, D, D0, D1)
            b_dq = scale_rows(weigh_rows(b_low, b_k, PRECISION), scale)
            store_rows(dq, o_out, m_row, b_dq, D, D0, D1)
    if NEEDS_BIAS:
        o_tile = tl.arange(0, TILE)
        p_sums = sums + tl.program_id(0).to(tl.int64) * (TILE * TILE)
        tl.store(p_sums + (o_tile[:, None] * TILE + o_tile[None, :]), b_dbias)


def tile_config(q: torch.Tensor, found: dict, backward: bool) -> dict[str, int]:
    """TILE, num_warps and STAGES for windows of N tokens: pinned, so that results do not depend on a tuner."""
    if found["N"] <= 16:
        warps = 1 if q.dtype != torch.float32 else 4 if found["D"] <= 64 else 8
        return {"TILE": 16, "num_warps": warps, "STAGES": 1}
    # The backward loads the next tile while it works on one, where that leaves registers.
    return {"TILE": 64, "num_warps": 4, "STAGES": 2 if backward and capability(q)[0] == 9 else 1}


# Warps of programs a multiprocessor, over several waves: many enough that a slow program does not hold up the
# rest, few enough that the bias is loaded, and the sum of its gradient written, once for many tiles.
WARPS_PER_SM = 64


def _tiles(q: torch.Tensor, found: dict, config: dict) -> tuple[int, int]:
    """Add to `found` how windows are laid out in tiles; return the blocks of residues and the splits."""
    heads, bias_windows = found["heads"], found["bias_windows"]
    per_tile = config["TILE"] // found["N"]
    residues = min(bias_windows, per_tile)
    repeats = per_tile // residues
    blocks = cdiv(bias_windows, residues)
    tiles = cdiv(cdiv(found["windows"], bias_windows), repeats)
    programs = num_sms(q) * WARPS_PER_SM // config["num_warps"]
    splits = max(1, min(tiles, programs // max(1, heads * blocks)))
    span = (residues - 1) * found["stride_bias_window"]
    span += (found["N"] - 1) * (found["stride_bias_query"] + found["stride_bias_key"])
    found |= {"splits": splits, "RESIDUES": residues, "REPEATS": repeats, "NARROW": span < 2**31, **config}
    return blocks, splits


def tiles_forward(q, k, v, bias, slots, segment_ids, scale, out) -> None:
    """Fill the rows of `out` (rows, heads, D) that exist; windows of up to 64 tokens."""
    found = arguments(q, k, v, bias, slots, segment_ids, scale)
    config = tile_config(q, found, backward=False)
    blocks, splits = _tiles(q, found, config)
    if found["heads"]:
        with device_guard(q):
            window_attention_fwd_kernel[(found["heads"] * blocks * splits,)](out=out, **found)


def tiles_backward(grad, q, k, v, bias, slots, segment_ids, scale, needs_bias, dq, dk, dv):
    """Fill the rows of dq, dk, dv that exist and return the gradient of the bias (None unless needs_bias)."""
    found = arguments(q, k, v, bias, slots, segment_ids, scale, grad)
    config = tile_config(q, found, backward=True)
    blocks, splits = _tiles(q, found, config)
    heads, tile = found["heads"], config["TILE"]
    sums = None
    if needs_bias:
        sums = torch.empty((splits, blocks, heads, tile, tile), dtype=torch.float32, device=q.device)
    if heads:
        with device_guard(q):
            window_attention_bwd_kernel[(heads * blocks * splits,)](
                dq=dq,
                dk=dk,
                dv=dv,
                sums=sums,
                GROUPS=dq.stride(-3) // max(1, heads * found["D"]),
                NEEDS_BIAS=needs_bias,
                **found,
            )
    return reduce_sums(sums, bias, found["RESIDUES"], found["REPEATS"]) if needs_bias else None


# --------------------------------------------------------------------------------------------------
# What the operators call


def window_attention_forward(q, k, v, bias, slots, segment_ids, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v (W, N, H, D), or (T, H, D) with slots -> the result, and lse (W, H, N) float32 where N exceeds a tile."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    windows, n = q.shape[:2] if slots is None else slots.shape
    blocks = n > tiled_positions(q, slots, segment_ids)
    kept = (windows, q.shape[-2], n) if blocks else (0,)
    # Of positions without a token nobody writes one; in a result they are not left to chance.
    lse = torch.empty(kept, dtype=torch.float32, device=q.device)
    if slots is not None:
        lse.fill_(float("inf"))
    if q.numel() and n:
        if blocks:
            blocks_forward(q, k, v, bias, slots, segment_ids, scale, out, lse)
        else:
            tiles_forward(q, k, v, bias, slots, segment_ids, scale, out)
    if slots is not None:
        clear_unnamed_rows(slots, out)
    return out, lse


def _backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, dq, dk, dv):
    n = q.shape[1] if slots is None else slots.shape[1]
    if not (q.numel() and n):
        return torch.zeros_like(bias) if needs_bias else q.new_empty(0)
    if n > tiled_positions(q, slots, segment_ids):
        dbias = blocks_backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, dq, dk, dv)
    else:
        dbias = tiles_backward(grad, q, k, v, bias, slots, segment_ids, scale, needs_bias, dq, dk, dv)
    return q.new_empty(0) if dbias is None else dbias


def window_attention_backward(
    grad, q, k, v, bias, slots, segment_ids, out, lse, scale: float, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dbias), dbias empty unless needs_bias; out and lse of the forward where N exceeds a tile."""
    grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    dbias = _backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, *grads)
    if slots is not None:
        clear_unnamed_rows(slots, *grads)
    return *grads, dbias


def window_attention_qkvpacked_forward(
    qkv, bias, slots, segment_ids, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on one projection (W, N, 3, H, D) or (T, 3, H, D), read in place."""
    return window_attention_forward(*qkv.unbind(-3), bias, slots, segment_ids, scale)


def window_attention_qkvpacked_backward(
    grad, qkv, bias, slots, segment_ids, out, lse, scale: float, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dqkv, dbias): the three gradients written into one tensor."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = _backward(grad, *qkv.unbind(-3), bias, slots, segment_ids, out, lse, scale, needs_bias, *dqkv.unbind(-3))
    if slots is not None:
        clear_unnamed_rows(slots, dqkv)
    return dqkv, dbias


def _forward_and_backward(qkv, bias, slots, segment_ids) -> None:
    out, lse = window_attention_qkvpacked_forward(qkv, bias, slots, segment_ids, 0.1)
    kept = (out, lse) if lse.ndim == 3 else (None, None)
    window_attention_qkvpacked_backward(out, qkv, bias, slots, segment_ids, *kept, 0.1, bias is not None)


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    """The presets' windows, packed; Swin's, dense and shifted; the widest heads; float32."""
    half, full = torch.bfloat16, torch.float32
    for n, heads, width, dtype, packed in (
        *((n, 16, width, half, True) for n in (16, 64, 256) for width in (64, 72)),
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
