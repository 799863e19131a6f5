"""Window attention for windows of 65 to 256 tokens, in blocks of queries and keys.

The forward is a flash loop over blocks of keys and keeps the logarithm of each row's sum (float32, 4 bytes a
row and head). The backward is three kernels: one walks over blocks of keys for dq, one over blocks of queries for dk
and dv, and one holds a block of the bias's gradient in registers, in float32, and walks over windows; those sums
are added over programs in a fixed order as in `window_attention`. A program stays with one head and one block
and walks over windows, so that its part of the bias stays in L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from d2it.kernels.common import cdiv, device_guard, num_sms
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
def block_rows(
    slots,
    i_window,
    o_position,
    stride_slots_window,
    stride_slots_token,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Rows of a block of positions and which of them exist."""
    m_row = o_position < N
    if HAS_SLOTS:
        p_slot = slots + i_window * stride_slots_window + o_position * stride_slots_token
        o_row = tl.load(p_slot, mask=m_row, other=-1).to(tl.int64)
        return o_row, o_row >= 0
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A block of the bias. o_query and o_key are (., 1) and (1, .), or the other way round: then it is transposed.

    To be loaded before the product that it is added to: the compiler settles the layout of the softmax by the
    order of the two, and in the layout of a load it would compute everything twice.
    """
    if HAS_BIAS:
        o_bias = o_query * stride_bias_query + o_key * stride_bias_key
        if N % BM == 0 and N % BN == 0:
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
        o_segment = tl.load(p_segment + o_query * stride_segment_token, mask=o_query < N, other=-1)
        o_other = tl.load(p_segment + o_key * stride_segment_token, mask=o_key < N, other=-1)
        b_score = tl.where(o_segment == o_other, b_score, float("-inf"))
    return b_score


@triton.jit
def window_attention_blocks_fwd_kernel(
    q,
    k,
    v,
    bias,
    slots,
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
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_query = (i_block * BM + tl.arange(0, BM)).to(tl.int64)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        o_row, m_row = block_rows(slots, i_window, o_query, stride_slots_window, stride_slots_token, N, BM, HAS_SLOTS)
        if HAS_SLOTS:
            occupied = tl.max(o_row, 0) >= 0
        else:
            occupied = True
        if occupied:
            at = (i_window, o_query, o_row, i_head)
            o_q = row_offsets(at, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
            b_q = load_rows(q, o_q, m_row, stride_q_dim, D, D0, D1)
            b_out = zero_rows(BM, D0, D1)
            b_max = tl.full((BM,), float("-inf"), tl.float32)
            b_sum = tl.zeros((BM,), tl.float32)
            for i_key in tl.range(0, N, BN, num_stages=STAGES):
                o_key = tl.cast(i_key, tl.int64) + tl.arange(0, BN)
                o_other, m_key = block_rows(
                    slots, i_window, o_key, stride_slots_window, stride_slots_token, N, BN, HAS_SLOTS
                )
                there = (i_window, o_key, o_other, i_head)
                o_k = row_offsets(there, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
                if ALIKE:
                    o_v = o_k
                else:
                    o_v = row_offsets(there, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
                b_k = load_rows(k, o_k, m_key, stride_k_dim, D, D0, D1)
                b_bias = block_bias(
                    bias, o_query[:, None], o_key[None, :], stride_bias_query, stride_bias_key, N, BM, BN, HAS_BIAS
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
    slots,
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
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_query = (i_block * BM + tl.arange(0, BM)).to(tl.int64)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        o_row, m_row = block_rows(slots, i_window, o_query, stride_slots_window, stride_slots_token, N, BM, HAS_SLOTS)
        if HAS_SLOTS:
            occupied = tl.max(o_row, 0) >= 0
        else:
            occupied = True
        if occupied:
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
            for i_key in tl.range(0, N, BN, num_stages=STAGES):
                o_key = tl.cast(i_key, tl.int64) + tl.arange(0, BN)
                o_other, m_key = block_rows(
                    slots, i_window, o_key, stride_slots_window, stride_slots_token, N, BN, HAS_SLOTS
                )
                there = (i_window, o_key, o_other, i_head)
                o_k = row_offsets(there, stride_k_window, stride_k_token, stride_k_head, UNIT, HAS_SLOTS)
                if ALIKE:
                    o_v = o_k
                else:
                    o_v = row_offsets(there, stride_v_window, stride_v_token, stride_v_head, UNIT, HAS_SLOTS)
                b_k = load_rows(k, o_k, m_key, stride_k_dim, D, D0, D1)
                b_v = load_rows(v, o_v, m_key, stride_v_dim, D, D0, D1)
                b_bias = block_bias(
                    bias, o_query[:, None], o_key[None, :], stride_bias_query, stride_bias_key, N, BM, BN, HAS_BIAS
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
    i_query = tl.program_id(0) % QUERIES
    i_key = tl.program_id(0) // QUERIES % KEYS
    i_tile = tl.program_id(0) // (QUERIES * KEYS)
    i_head = (i_tile % heads).to(tl.int64)
    i_residue = i_tile // heads % bias_windows
    i_split = i_tile // heads // bias_windows
    o_query = (i_query * BM + tl.arange(0, BM)).to(tl.int64)
    o_key = (i_key * BN + tl.arange(0, BN)).to(tl.int64)
    bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=STAGES):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        o_row, m_row = block_rows(slots, i_window, o_query, stride_slots_window, stride_slots_token, N, BM, HAS_SLOTS)
        o_other, m_key = block_rows(slots, i_window, o_key, stride_slots_window, stride_slots_token, N, BN, HAS_SLOTS)
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
            bias, o_query[:, None], o_key[None, :], stride_bias_query, stride_bias_key, N, BM, BN, HAS_BIAS
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
    slots,
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
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: dk and dv of BN keys of one head, in every splits-th window of one bias residue.

    Scores are held transposed, keys by queries: P^T and dS^T then enter their products from registers.
    """
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    i_block = tl.program_id(0) % BLOCKS
    i_head = (tl.program_id(0) // BLOCKS % heads).to(tl.int64)
    i_residue = tl.program_id(0) // BLOCKS // heads % bias_windows
    i_split = tl.program_id(0) // BLOCKS // heads // bias_windows
    o_key = (i_block * BN + tl.arange(0, BN)).to(tl.int64)
    if HAS_BIAS:
        bias += i_head * stride_bias_head + i_residue.to(tl.int64) * stride_bias_window
    for i_repeat in tl.range(i_split, tl.cdiv(windows - i_residue, bias_windows), splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * bias_windows + i_residue
        i_segment = i_window % segment_windows * stride_segment_window
        o_row, m_row = block_rows(slots, i_window, o_key, stride_slots_window, stride_slots_token, N, BN, HAS_SLOTS)
        if HAS_SLOTS:
            occupied = tl.max(o_row, 0) >= 0
        else:
            occupied = True
        if occupied:
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
            for i_query in tl.range(0, N, BM, num_stages=STAGES):
                o_query = tl.cast(i_query, tl.int64) + tl.arange(0, BM)
                o_other, m_query = block_rows(
                    slots, i_window, o_query, stride_slots_window, stride_slots_token, N, BM, HAS_SLOTS
                )
                there = (i_window, o_query, o_other, i_head)
                o_q = row_offsets(there, stride_q_window, stride_q_token, stride_q_head, UNIT, HAS_SLOTS)
                o_grad = row_offsets(there, stride_grad_window, stride_grad_token, stride_grad_head, UNIT, HAS_SLOTS)
                b_q = load_rows(q, o_q, m_query, stride_q_dim, D, D0, D1)
                b_grad = load_rows(grad, o_grad, m_query, stride_grad_dim, D, D0, D1)
                o_stat = (i_window * heads + i_head) * N + o_query
                b_lse = tl.load(lse + o_stat, mask=m_query, other=float("inf"))
                b_delta = tl.load(delta + o_stat, mask=m_query, other=0.0)
                b_bias = block_bias(
                    bias, o_query[None, :], o_key[:, None], stride_bias_query, stride_bias_key, N, BM, BN, HAS_BIAS
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
                b_dv = add_rows(b_dv, b_p.to(v.dtype.element_ty), b_grad, PRECISION)
                b_ds = b_p * (dot_rows(b_v, b_grad, PRECISION) - b_delta[None, :])
                b_dk = add_rows(b_dk, b_ds.to(q.dtype.element_ty), b_q, PRECISION)
            o_out = (o_row * (GROUPS * heads) + i_head) * D
            store_rows(dv, o_out, m_row, b_dv, D, D0, D1)
            store_rows(dk, o_out, m_row, scale_rows(b_dk, scale), D, D0, D1)


def block_config(kernel: str, n: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks, warps and stages of "fwd", "dq", "dbias" or "dkv": pinned, as in `window_attention`."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "STAGES": 1}
    if kernel == "dkv":
        # Wider heads leave no registers for 64 queries beside the two sums of 128 keys.
        return {"BM": 64 if width <= 64 else 32, "BN": 128, "num_warps": 8, "STAGES": 1}
    return {"BM": 128, "BN": 64, "num_warps": 8, "STAGES": 2}


# Programs a multiprocessor, over several waves: see WARPS_PER_SM in `window_attention`.
PROGRAMS_PER_SM = 8


def _splits(q: torch.Tensor, found: dict, blocks: int) -> tuple[int, int]:
    """Programs of one split, and splits."""
    programs = blocks * found["heads"] * found["bias_windows"]
    repeats = cdiv(found["windows"], found["bias_windows"])
    return programs, max(1, min(repeats, num_sms(q) * PROGRAMS_PER_SM // max(1, programs)))


def blocks_forward(q, k, v, bias, slots, segment_ids, scale, out, lse) -> None:
    """Fill the rows of out (rows, heads, D) that exist, and lse (windows, heads, N) float32."""
    found = arguments(q, k, v, bias, slots, segment_ids, scale)
    config = block_config("fwd", found["N"], found["D"], q.dtype)
    programs, splits = _splits(q, found, cdiv(found["N"], config["BM"]))
    if programs:
        with device_guard(q):
            window_attention_blocks_fwd_kernel[(programs * splits,)](out=out, lse=lse, splits=splits, **found, **config)


def blocks_backward(grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, dq, dk, dv):
    """Fill the rows of dq, dk, dv that exist and return the gradient of the bias (None unless needs_bias)."""
    found = arguments(q, k, v, bias, slots, segment_ids, scale, grad)
    n, heads = found["N"], found["heads"]
    groups = dq.stride(-3) // max(1, heads * found["D"])
    delta = torch.empty_like(lse)
    if heads:
        config = block_config("dq", n, found["D"], q.dtype)
        programs, splits = _splits(q, found, cdiv(n, config["BM"]))
        with device_guard(q):
            window_attention_blocks_dq_kernel[(programs * splits,)](
                out=out, lse=lse, delta=delta, dq=dq, splits=splits, GROUPS=groups, **found, **config
            )
        config = block_config("dkv", n, found["D"], q.dtype)
        programs, splits = _splits(q, found, cdiv(n, config["BN"]))
        with device_guard(q):
            window_attention_blocks_dkv_kernel[(programs * splits,)](
                lse=lse, delta=delta, dk=dk, dv=dv, splits=splits, GROUPS=groups, **found, **config
            )
    if not needs_bias:
        return None
    config = block_config("dbias", n, found["D"], q.dtype)
    rows, columns = cdiv(n, config["BM"]), cdiv(n, config["BN"])
    programs, splits = _splits(q, found, rows * columns)
    sides = (rows * config["BM"], columns * config["BN"])
    sums = torch.empty((splits, found["bias_windows"], heads, *sides), dtype=torch.float32, device=q.device)
    if heads:
        with device_guard(q):
            window_attention_blocks_dbias_kernel[(programs * splits,)](
                lse=lse, delta=delta, sums=sums, splits=splits, **found, **config
            )
    return reduce_sums(sums, bias, 1, 1)
