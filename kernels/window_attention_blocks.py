"""Window attention for windows of more tokens than a tile, up to 256, in blocks of queries and keys.

The forward is a flash loop over blocks of keys and keeps the logarithm of each row's sum (float32, 4 bytes a
row and head). The backward is three kernels: one walks over blocks of keys for dq, one over blocks of queries for dk
and dv, and one holds a block of the bias's gradient in registers, in float32, and walks over windows; those sums
are added over programs in a fixed order as in `window_attention`.

Of a packed window the first two see only the positions that hold a token, closed up in their order: with half of
them empty, a quarter of the pairs is left to multiply. Their bias is then gathered pair by pair. The third needs the
same pairs in every window, and takes all positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from d2it.kernels.common import capability, cdiv, device_guard, next_power_of_2, num_sms
from d2it.kernels.window_attention_rows import (
    LOG2E,
    add_rows,
    arguments,
    dot_rows,
    load_rows,
    reduce_sums,
    row_offsets,
    scale_rows,
    store_rows,
    zero_rows,
)


@triton.jit
def close_up_kernel(
    slots,
    rows,
    positions,
    counts,
    tokens,
    stride_slots_window,
    stride_slots_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The positions of a window that hold a token, in order, and their rows. One program: one window.

    rows, positions (W, N) int32: the first counts[w] of each window are written. counts (W,) int32.
    """
    i_window = tl.program_id(0).to(tl.int64)
    o_position = tl.arange(0, BLOCK)
    p_slot = slots + i_window * stride_slots_window + o_position.to(tl.int64) * stride_slots_token
    i_row = tl.load(p_slot, mask=o_position < N, other=-1)
    m_row = (i_row >= 0) & (i_row < tokens)
    o_place = i_window * N + tl.cumsum(m_row.to(tl.int32), 0) - 1
    tl.store(rows + o_place, i_row, mask=m_row)
    tl.store(positions + o_place, o_position, mask=m_row)
    tl.store(counts + i_window, tl.sum(m_row.to(tl.int32), 0))


@triton.jit
def window_length(counts, full, i_window, HAS_SLOTS: tl.constexpr):
    """How many rows a window has; full: N, known at run time only.

    Loops over a constant number of blocks would be unrolled, and spill.
    """
    if HAS_SLOTS:
        return tl.load(counts + i_window)
    else:
        return full


@triton.jit
def block_rows(rows, positions, i_window, o_row, length, N: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """Positions of a block of a window's rows, where they lie, and which of them exist; o_row counts in the window."""
    m_row = o_row < length
    if HAS_SLOTS:
        o_closed = i_window * N + o_row
        o_position = tl.load(positions + o_closed, mask=m_row, other=0)
        return o_position, tl.load(rows + o_closed, mask=m_row, other=0).to(tl.int64), m_row
    else:
        return o_row, i_window * N + o_row, m_row


@triton.jit
def block_slots(
    slots,
    i_window,
    o_position,
    tokens,
    stride_slots_window,
    stride_slots_token,
    N: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Where the rows of a block of positions lie, and which of them exist."""
    m_row = o_position < N
    if HAS_SLOTS:
        p_slot = slots + i_window * stride_slots_window + o_position.to(tl.int64) * stride_slots_token
        o_row = tl.load(p_slot, mask=m_row, other=-1).to(tl.int64)
        return o_row, (o_row >= 0) & (o_row < tokens)
    else:
        return i_window * N + o_position, m_row


@triton.jit
def block_bias(
    bias,
    o_query,
    o_key,
    stride_bias_query,
    stride_bias_key,
    N: tl.constexpr,
    IN_RANGE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """A block of the bias. o_query and o_key are (., 1) and (1, .), or the other way round: then it is transposed.
    IN_RANGE: all of them are below N. NARROW: a matrix spans less than 2^31 elements; half the registers address it.

    To be loaded before the product that it is added to: the compiler settles the layout of the softmax by the
    order of the two, and in the layout of a load it would compute everything twice.
    """
    if HAS_BIAS:
        if NARROW:
            o_bias = o_query * stride_bias_query + o_key * stride_bias_key
        else:
            o_bias = o_query.to(tl.int64) * stride_bias_query + o_key.to(tl.int64) * stride_bias_key
        if IN_RANGE:
            return tl.load(bias + o_bias)
        else:
            return tl.load(bias + o_bias, mask=(o_query < N) & (o_key < N), other=0.0)
    else:
        return 0.0


@triton.jit
def block_score(
    b_score,
    b_bias,
    scale,
    segment_ids,
    o_query,
    o_key,
    m_key,
    i_segment,
    stride_segment_token,
    N: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):
    """Scores in base-2 logarithms with bias and masks, from the products of queries and keys."""
    b_score = b_score * (scale * LOG2E)
    if HAS_BIAS:
        b_score += b_bias.to(tl.float32) * LOG2E
    if HAS_SLOTS or N % BN != 0:
        b_score = tl.where(m_key, b_score, float("-inf"))
    if HAS_SEGMENTS:
        p_segment = segment_ids + i_segment
        o_segment = tl.load(p_segment + o_query.to(tl.int64) * stride_segment_token, mask=o_query < N, other=-1)
        o_other = tl.load(p_segment + o_key.to(tl.int64) * stride_segment_token, mask=o_key < N, other=-1)
        b_score = tl.where(o_segment == o_other, b_score, float("-inf"))
    return b_score


@triton.jit
def window_attention_blocks_fwd_kernel(
    q,
    k,
    v,
    bias,
    rows,
    positions,
    counts,
    full,
    segment_ids,
    out,
    lse,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM queries of one head, in every splits-th window of one bias residue.

    out (rows, heads, D); lse (windows, heads, N) float32: base-2 logarithm of each row's sum, +inf without keys.
    """
    BLOCKS: tl.constexpr = (N + BM - 1) // BM
    IN_RANGE: tl.constexpr = HAS_SLOTS or (N % BM == 0 and N % BN == 0)
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_mine = i_block * BM + tl.arange(0, BM)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        length = window_length(counts, full, i_window, HAS_SLOTS)
        if i_block * BM < length:
            o_query, o_row, m_row = block_rows(rows, positions, i_window, o_mine, length, N, HAS_SLOTS)
            at = (i_window, o_query, o_row, i_head)
            o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
            b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
            b_out = zero_rows(BM, D0, D1)
            b_max = tl.full((BM,), float("-inf"), tl.float32)
            b_sum = tl.zeros((BM,), tl.float32)
            for i_key in tl.range(0, length, BN, num_stages=STAGES):
                o_theirs = tl.cast(i_key, tl.int32) + tl.arange(0, BN)
                o_key, o_other, m_key = block_rows(rows, positions, i_window, o_theirs, length, N, HAS_SLOTS)
                there = (i_window, o_key, o_other, i_head)
                o_k = row_offsets(there, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
                if ALIKE:
                    o_v = o_k
                else:
                    o_v = row_offsets(there, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
                b_k = load_rows(k, o_k, m_key, stride_k_dim, D, D0, D1)
                b_bias = block_bias(
                    bias,
                    o_query[:, None],
                    o_key[None, :],
                    stride_bias_query,
                    stride_bias_key,
                    N,
                    IN_RANGE,
                    HAS_BIAS,
                    NARROW,
                )
                b_score = block_score(
                    dot_rows(b_q, b_k, PRECISION),
                    b_bias,
                    scale,
                    segment_ids,
                    o_query[:, None],
                    o_key[None, :],
                    m_key[None, :],
                    i_segment,
                    stride_segment_token,
                    N,
                    BN,
                    HAS_BIAS,
                    HAS_SLOTS,
                    HAS_SEGMENTS,
                )
                b_new = tl.maximum(b_max, tl.max(b_score, 1))
                b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_score - b_safe[:, None])
                b_decay = tl.exp2(b_max - b_safe)
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
                b_max = b_new
                b_v = load_rows(v, o_v, m_key, stride_v_dim, D, D0, D1)
                b_out = add_rows(scale_rows(b_out, b_decay[:, None]), b_p.to(v.dtype.element_ty), b_v, PRECISION)
            b_inverse = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
            store_rows(out, (o_row * heads + i_head) * D, m_row, scale_rows(b_out, b_inverse[:, None]), D, D0, D1)
            b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
            tl.store(lse + ((i_window * heads + i_head) * N + o_query), b_lse, mask=m_row)


@triton.jit
def window_attention_blocks_dq_kernel(
    grad,
    q,
    k,
    v,
    bias,
    rows,
    positions,
    counts,
    full,
    segment_ids,
    out,
    lse,
    delta,
    dq,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program as in the forward: dq (rows, GROUPS, heads, D) of BM queries.

    Reads out and lse; writes delta = rowsum(out * grad) (windows, heads, N) for the other two kernels.
    """
    BLOCKS: tl.constexpr = (N + BM - 1) // BM
    IN_RANGE: tl.constexpr = HAS_SLOTS or (N % BM == 0 and N % BN == 0)
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_mine = i_block * BM + tl.arange(0, BM)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        length = window_length(counts, full, i_window, HAS_SLOTS)
        if i_block * BM < length:
            o_query, o_row, m_row = block_rows(rows, positions, i_window, o_mine, length, N, HAS_SLOTS)
            at = (i_window, o_query, o_row, i_head)
            o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
            o_grad = row_offsets(at, stride_grad_window, stride_grad_token, stride_grad_head, UNIT, HAS_SLOTS)
            b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
            b_grad = load_rows(grad, o_grad, m_row, stride_grad_dim, D, D0, D1)
            b_out = load_rows(out, (o_row * heads + i_head) * D, m_row, 1, D, D0, D1)
            b_delta = tl.sum(b_out[0].to(tl.float32) * b_grad[0].to(tl.float32), 1)
            if D1 > 0:
                b_delta += tl.sum(b_out[1].to(tl.float32) * b_grad[1].to(tl.float32), 1)
            o_stat = (i_window * heads + i_head) * N + o_query
            tl.store(delta + o_stat, b_delta, mask=m_row)
            b_lse = tl.load(lse + o_stat, mask=m_row, other=float("inf"))
            b_dq = zero_rows(BM, D0, D1)
            for i_key in tl.range(0, length, BN, num_stages=STAGES):
                o_theirs = tl.cast(i_key, tl.int32) + tl.arange(0, BN)
                o_key, o_other, m_key = block_rows(rows, positions, i_window, o_theirs, length, N, HAS_SLOTS)
                there = (i_window, o_key, o_other, i_head)
                o_k = row_offsets(there, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
                if ALIKE:
                    o_v = o_k
                else:
                    o_v = row_offsets(there, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
                b_k = load_rows(k, o_k, m_key, stride_k_dim, D, D0, D1)
                b_v = load_rows(v, o_v, m_key, stride_v_dim, D, D0, D1)
                b_bias = block_bias(
                    bias,
                    o_query[:, None],
                    o_key[None, :],
                    stride_bias_query,
                    stride_bias_key,
                    N,
                    IN_RANGE,
                    HAS_BIAS,
                    NARROW,
                )
                b_score = block_score(
                    dot_rows(b_q, b_k, PRECISION),
                    b_bias,
                    scale,
                    segment_ids,
                    o_query[:, None],
                    o_key[None, :],
                    m_key[None, :],
                    i_segment,
                    stride_segment_token,
                    N,
                    BN,
                    HAS_BIAS,
                    HAS_SLOTS,
                    HAS_SEGMENTS,
                )
                b_p = tl.exp2(b_score - b_lse[:, None])
                b_ds = b_p * (dot_rows(b_grad, b_v, PRECISION) - b_delta[:, None])
                b_dq = add_rows(b_dq, b_ds.to(q.dtype.element_ty), b_k, PRECISION)
            o_out = (o_row * (GROUPS * heads) + i_head) * D
            store_rows(dq, o_out, m_row, scale_rows(b_dq, scale), D, D0, D1)


@triton.jit
def window_attention_blocks_dbias_kernel(
    grad,
    q,
    k,
    v,
    bias,
    slots,
    segment_ids,
    lse,
    delta,
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
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM queries by BN keys of one head's bias, over every splits-th window of one residue.

    sums (splits, bias_windows, heads, QUERIES * BM, KEYS * BN) float32. Two products more than summing in one of
    the other kernels would take, but there the sum of BM x N does not fit into registers.
    """
    QUERIES: tl.constexpr = (N + BM - 1) // BM
    KEYS: tl.constexpr = (N + BN - 1) // BN
    IN_RANGE: tl.constexpr = N % BM == 0 and N % BN == 0
    i_query = tl.program_id(0) % QUERIES
    i_key = tl.program_id(0) // QUERIES % KEYS
    i_tile = tl.program_id(0) // (QUERIES * KEYS)
    i_head = (i_tile % heads).to(tl.int64)
    i_residue = i_tile // heads % bias_windows
    i_split = i_tile // heads // bias_windows
    o_query = i_query * BM + tl.arange(0, BM)
    o_key = i_key * BN + tl.arange(0, BN)
    bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=STAGES):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        o_row, m_row = block_slots(
            slots, i_window, o_query, tokens, stride_slots_window, stride_slots_token, N, HAS_SLOTS
        )
        o_other, m_key = block_slots(
            slots, i_window, o_key, tokens, stride_slots_window, stride_slots_token, N, HAS_SLOTS
        )
        at = (i_window, o_query, o_row, i_head)
        o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
        o_grad = row_offsets(at, stride_grad_window, stride_grad_token, stride_grad_head, UNIT, HAS_SLOTS)
        there = (i_window, o_key, o_other, i_head)
        o_k = row_offsets(there, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
        if ALIKE:
            o_v = o_k
        else:
            o_v = row_offsets(there, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
        b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
        b_k = load_rows(k, o_k, m_key, stride_k_dim, D, D0, D1)
        b_grad = load_rows(grad, o_grad, m_row, stride_grad_dim, D, D0, D1)
        b_v = load_rows(v, o_v, m_key, stride_v_dim, D, D0, D1)
        o_stat = (i_window * heads + i_head) * N + o_query
        b_lse = tl.load(lse + o_stat, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + o_stat, mask=m_row, other=0.0)
        b_bias = block_bias(
            bias, o_query[:, None], o_key[None, :], stride_bias_query, stride_bias_key, N, IN_RANGE, HAS_BIAS, NARROW
        )
        b_score = block_score(
            dot_rows(b_q, b_k, PRECISION),
            b_bias,
            scale,
            segment_ids,
            o_query[:, None],
            o_key[None, :],
            m_key[None, :],
            i_segment,
            stride_segment_token,
            N,
            BN,
            HAS_BIAS,
            HAS_SLOTS,
            HAS_SEGMENTS,
        )
        b_p = tl.exp2(b_score - b_lse[:, None])
        b_sum += b_p * (dot_rows(b_grad, b_v, PRECISION) - b_delta[:, None])
    o_sum = (i_tile.to(tl.int64) * (QUERIES * BM) + o_query) * (KEYS * BN)
    tl.store(sums + (o_sum[:, None] + o_key[None, :]), b_sum)


@triton.jit
def window_attention_blocks_dkv_kernel(
    grad,
    q,
    k,
    v,
    bias,
    rows,
    positions,
    counts,
    full,
    segment_ids,
    lse,
    delta,
    dk,
    dv,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    """One program: dk and dv of BN keys of one head, in every splits-th window of one bias residue.

    Scores are held transposed, keys by queries: P^T and dS^T then enter their products from registers. DK, DV: which
    of the two it sums; both sums of wide heads do not fit into registers.
    """
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    IN_RANGE: tl.constexpr = HAS_SLOTS or (N % BM == 0 and N % BN == 0)
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_mine = i_block * BN + tl.arange(0, BN)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        length = window_length(counts, full, i_window, HAS_SLOTS)
        if i_block * BN < length:
            o_key, o_row, m_row = block_rows(rows, positions, i_window, o_mine, length, N, HAS_SLOTS)
            at = (i_window, o_key, o_row, i_head)
            o_k = row_offsets(at, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
            if ALIKE:
                o_v = o_k
            else:
                o_v = row_offsets(at, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
            b_k = load_rows(k, o_k, m_row, stride_k_dim, D, D0, D1)
            b_v = load_rows(v, o_v, m_row, stride_v_dim, D, D0, D1)
            b_dk = zero_rows(BN, D0, D1)
            b_dv = zero_rows(BN, D0, D1)
            for i_query in tl.range(0, length, BM, num_stages=STAGES):
                o_theirs = tl.cast(i_query, tl.int32) + tl.arange(0, BM)
                o_query, o_other, m_query = block_rows(rows, positions, i_window, o_theirs, length, N, HAS_SLOTS)
                there = (i_window, o_query, o_other, i_head)
                o_q = row_offsets(there, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
                o_grad = row_offsets(there, stride_grad_window, stride_grad_token, stride_grad_head, UNIT, HAS_SLOTS)
                b_q = load_rows(q, o_q, m_query, stride_q_dim, D, D0, D1)
                b_grad = load_rows(grad, o_grad, m_query, stride_grad_dim, D, D0, D1)
                o_stat = (i_window * heads + i_head) * N + o_query
                b_lse = tl.load(lse + o_stat, mask=m_query, other=float("inf"))
                b_delta = tl.load(delta + o_stat, mask=m_query, other=0.0)
                b_bias = block_bias(
                    bias,
                    o_query[None, :],
                    o_key[:, None],
                    stride_bias_query,
                    stride_bias_key,
                    N,
                    IN_RANGE,
                    HAS_BIAS,
                    NARROW,
                )
                b_score = block_score(
                    dot_rows(b_k, b_q, PRECISION),
                    b_bias,
                    scale,
                    segment_ids,
                    o_query[None, :],
                    o_key[:, None],
                    m_row[:, None],
                    i_segment,
                    stride_segment_token,
                    N,
                    BN,
                    HAS_BIAS,
                    HAS_SLOTS,
                    HAS_SEGMENTS,
                )
                b_p = tl.exp2(b_score - b_lse[None, :])
                if DV:
                    b_dv = add_rows(b_dv, b_p.to(v.dtype.element_ty), b_grad, PRECISION)
                if DK:
                    b_ds = b_p * (dot_rows(b_v, b_grad, PRECISION) - b_delta[None, :])
                    b_dk = add_rows(b_dk, b_ds.to(q.dtype.element_ty), b_q, PRECISION)
            o_out = (o_row * (GROUPS * heads) + i_head) * D
            if DV:
                store_rows(dv, o_out, m_row, b_dv, D, D0, D1)
            if DK:
                store_rows(dk, o_out, m_row, scale_rows(b_dk, scale), D, D0, D1)


def block_config(kernel: str, q: torch.Tensor) -> dict[str, int]:
    """Blocks, warps and stages of "fwd", "dq", "dbias" or "dkv": pinned, as in `window_attention`.

    64 rows to 4 warps: more warps would compute the same rows twice. Few columns, fewer for wider heads, leave
    registers for two or three programs on a multiprocessor, so that one computes while others load. What is here
    compiles without a spill for sm_80, sm_90 and sm_100.
    """
    width, major = q.shape[-1], capability(q)[0]
    if q.dtype == torch.float32:
        wide = width > 64 or (kernel == "dkv" and major == 10)
        return {"BM": 16, "BN": 16, "num_warps": 8 if wide else 4, "STAGES": 1}
    if kernel == "dbias":
        if major == 9:
            return {"BM": 128, "BN": 64, "num_warps": 8, "STAGES": 2}
        return {"BM": 64, "BN": 32, "num_warps": 4, "STAGES": 2 if width <= 64 and major == 8 else 1}
    if kernel == "dkv":
        keys = 32 if width > 80 and major == 8 else 64
        return {"BM": 32 if width <= 64 else 16, "BN": keys, "num_warps": 4, "STAGES": 1}
    if kernel == "dq":
        keys = 32 if width <= 64 or (width <= 80 and major != 10) else 16
        rows = 128 if 64 < width <= 80 and major == 10 else 64
        return {"BM": rows, "BN": keys, "num_warps": rows // 16, "STAGES": 2 if width <= 64 and major != 8 else 1}
    return {"BM": 64, "BN": 32, "num_warps": 4, "STAGES": 2 if width <= 64 and major != 10 else 1}


# Programs a multiprocessor. Those that sum the bias's gradient over their windows write the sum at their end: few of
# them, over several waves. The others keep nothing from window to window, and windows differ in length: many.
PROGRAMS_PER_SM = {"fwd": 32, "dq": 32, "dkv": 32, "dbias": 8}


def _splits(kernel: str, q: torch.Tensor, found: dict, blocks: int) -> tuple[int, int]:
    """Programs of one split, and splits."""
    programs = blocks * found["heads"] * found["bias_windows"]
    repeats = cdiv(found["windows"], found["bias_windows"])
    return programs, max(1, min(repeats, num_sms(q) * PROGRAMS_PER_SM[kernel] // max(1, programs)))


def _arguments(*given) -> dict:
    """What the kernels here take alike."""
    found = arguments(*given)
    span = (found["N"] - 1) * (found["stride_bias_query"] + found["stride_bias_key"])
    return found | {"NARROW": span < 2**31}


def _closed_up(found: dict) -> dict:
    """The arguments with closed-up windows in the place of slots."""
    closed = {name: value for name, value in found.items() if "slots" not in name and name != "tokens"}
    closed["full"] = found["N"]
    slots = found["slots"]
    if slots is None:
        return closed | {"rows": None, "positions": None, "counts": None}
    rows, positions = (torch.empty(slots.shape, dtype=torch.int32, device=slots.device) for _ in range(2))
    counts = torch.empty(slots.shape[:1], dtype=torch.int32, device=slots.device)
    if slots.shape[0]:
        with device_guard(slots):
            close_up_kernel[(slots.shape[0],)](
                slots,
                rows,
                positions,
                counts,
                found["tokens"],
                *slots.stride(),
                N=slots.shape[1],
                BLOCK=next_power_of_2(slots.shape[1]),
                num_warps=2,
            )
    return closed | {"rows": rows, "positions": positions, "counts": counts}


def blocks_forward(q, k, v, bias, slots, segment_ids, scale, out, lse) -> None:
    """Fill the rows of out (rows, heads, D) that exist, and lse (windows, heads, N) float32."""
    found = _arguments(q, k, v, bias, slots, segment_ids, scale)
    config = block_config("fwd", q)
    programs, splits = _splits("fwd", q, found, cdiv(found["N"], config["BM"]))
    if programs:
        with device_guard(q):
            window_attention_blocks_fwd_kernel[(programs * splits,)](
                out=out, lse=lse, splits=splits, **_closed_up(found), **config
            )


def blocks_backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, dq, dk, dv):
    """Fill the rows of dq, dk, dv that exist and return the gradient of the bias (None unless needs_bias)."""
    found = _arguments(q, k, v, bias, slots, segment_ids, scale, grad)
    n, heads = found["N"], found["heads"]
    groups = dq.stride(-3) // max(1, heads * found["D"])
    delta = torch.empty_like(lse)
    if heads:
        closed = _closed_up(found)
        config = block_config("dq", q)
        programs, splits = _splits("dq", q, found, cdiv(n, config["BM"]))
        with device_guard(q):
            window_attention_blocks_dq_kernel[(programs * splits,)](
                out=out, lse=lse, delta=delta, dq=dq, splits=splits, GROUPS=groups, **closed, **config
            )
        config = block_config("dkv", q)
        programs, splits = _splits("dkv", q, found, cdiv(n, config["BN"]))
        for parts in ((True, True),) if q.shape[-1] <= 80 else ((True, False), (False, True)):
            with device_guard(q):
                window_attention_blocks_dkv_kernel[(programs * splits,)](
                    lse=lse,
                    delta=delta,
                    dk=dk,
                    dv=dv,
                    splits=splits,
                    GROUPS=groups,
                    DK=parts[0],
                    DV=parts[1],
                    **closed,
                    **config,
                )
    if not needs_bias:
        return None
    config = block_config("dbias", q)
    rows, columns = cdiv(n, config["BM"]), cdiv(n, config["BN"])
    programs, splits = _splits("dbias", q, found, rows * columns)
    sides = (rows * config["BM"], columns * config["BN"])
    sums = torch.empty((splits, found["bias_windows"], heads, *sides), dtype=torch.float32, device=q.device)
    if heads:
        with device_guard(q):
            window_attention_blocks_dbias_kernel[(programs * splits,)](
                lse=lse, delta=delta, sums=sums, splits=splits, **found, **config
            )
    return reduce_sums(sums, bias, 1, 1)
