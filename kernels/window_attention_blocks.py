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

from d2it.kernels.common import capability, cdiv, next_power_of_2, num_sms
from d2it.kernels.launch import Tape
from d2it.kernels.window_attention_rows import (
    LOG2E,
    Call,
    ClosedUp,
    add_rows,
    call_of,
    dot_rows,
    gradients_of,
    heads_of,
    load_rows,
    reduce_sums,
    scale_rows,
    store_rows,
    zero_rows,
)


@triton.jit
def close_up_kernel(slots, closed, tokens, N: tl.constexpr, BLOCK: tl.constexpr):
    """Fills `closed` from slots. One program: one window."""
    i_window = tl.program_id(0).to(tl.int64)
    o_position = tl.arange(0, BLOCK)
    p_slot = slots.data + i_window * slots.stride_window + o_position.to(tl.int64) * slots.stride_token
    i_row = tl.load(p_slot, mask=o_position < N, other=-1)
    m_row = (i_row >= 0) & (i_row < tokens)
    o_place = i_window * N + tl.cumsum(m_row.to(tl.int32), 0) - 1
    tl.store(closed.rows + o_place, i_row, mask=m_row)
    tl.store(closed.positions + o_place, o_position, mask=m_row)
    tl.store(closed.counts + i_window, tl.sum(m_row.to(tl.int32), 0))


@triton.jit
def program(call, BLOCKS: tl.constexpr):
    """What a program has: its block, head, residue modulo bias_windows, split, and the windows of that residue."""
    i_tile = tl.program_id(0) // BLOCKS
    i_head = (i_tile % call.heads).to(tl.int64)
    i_residue = i_tile // call.heads % call.bias_windows
    i_split = i_tile // call.heads // call.bias_windows
    repeats = tl.cdiv(call.windows - i_residue, call.bias_windows)
    return tl.program_id(0) % BLOCKS, i_head, i_residue, i_split, repeats


@triton.jit
def window_rows(call, i_window):
    """How many rows a window has."""
    if call.closed is not None:
        return tl.load(call.closed.counts + i_window)
    else:
        return call.length


@triton.jit
def block_rows(call, i_window, i_head, o_row, length):
    """(window, position, row, head) of a block of a window's rows, and which exist; o_row counts in the window."""
    m_row = o_row < length
    if call.closed is not None:
        o_closed = i_window * call.N + o_row
        o_position = tl.load(call.closed.positions + o_closed, mask=m_row, other=0)
        o_packed = tl.load(call.closed.rows + o_closed, mask=m_row, other=0).to(tl.int64)
        return (i_window, o_position, o_packed, i_head), m_row
    else:
        return (i_window, o_row, i_window * call.N + o_row, i_head), m_row


@triton.jit
def block_slots(call, i_window, i_head, o_position):
    """The same of a block of positions, whether they hold a token or not."""
    m_row = o_position < call.N
    if call.slots is not None:
        p_slot = call.slots.data + i_window * call.slots.stride_window
        o_row = tl.load(p_slot + o_position.to(tl.int64) * call.slots.stride_token, mask=m_row, other=-1).to(tl.int64)
        return (i_window, o_position, o_row, i_head), (o_row >= 0) & (o_row < call.rows)
    else:
        return (i_window, o_position, i_window * call.N + o_position, i_head), m_row


@triton.jit
def block_scores(
    call, b_q, b_k, query, key, m_key, i_residue, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Scores of BM queries and BN keys in base-2 logarithms, with bias and masks; TRANSPOSED: keys first.

    The bias is loaded before the product that it is added to: the compiler settles the layout of the softmax by the
    order of the two, and in the layout of a load it would compute everything twice.
    """
    i_window, o_query, o_row, i_head = query
    o_query = o_query[None, :] if TRANSPOSED else o_query[:, None]
    o_key = key[1][:, None] if TRANSPOSED else key[1][None, :]
    m_key = m_key[:, None] if TRANSPOSED else m_key[None, :]
    if call.bias is not None:
        p_bias = call.bias.data + (i_head * call.bias.stride_head + i_residue.to(tl.int64) * call.bias.stride_window)
        if call.bias.NARROW:
            p_bias += o_query * call.bias.stride_query + o_key * call.bias.stride_key
        else:
            p_bias += o_query.to(tl.int64) * call.bias.stride_query + o_key.to(tl.int64) * call.bias.stride_key
        if call.closed is not None or (call.N % BM == 0 and call.N % BN == 0):  # no position is past the last
            b_bias = tl.load(p_bias)
        else:
            b_bias = tl.load(p_bias, mask=(o_query < call.N) & (o_key < call.N), other=0.0)
    b_score = dot_rows(b_k, b_q, call.PRECISION) if TRANSPOSED else dot_rows(b_q, b_k, call.PRECISION)
    b_score *= call.scale * LOG2E
    if call.bias is not None:
        b_score += b_bias.to(tl.float32) * LOG2E
    if call.slots is not None or call.N % BN != 0:
        b_score = tl.where(m_key, b_score, float("-inf"))
    if call.segments is not None:
        p_segment = call.segments.data + i_window % call.segments.windows * call.segments.stride_window
        p_query = p_segment + o_query.to(tl.int64) * call.segments.stride_token
        p_key = p_segment + o_key.to(tl.int64) * call.segments.stride_token
        o_segment = tl.load(p_query, mask=o_query < call.N, other=-1)
        b_score = tl.where(o_segment == tl.load(p_key, mask=o_key < call.N, other=-1), b_score, float("-inf"))
    return b_score


@triton.jit
def window_attention_blocks_fwd_kernel(
    call, out, lse, splits, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr
):
    """One program: BM queries of one head, in every splits-th window of one bias residue.

    out (rows, heads, D); lse (windows, heads, N) float32: base-2 logarithm of each row's sum, +inf without keys.
    """
    N: tl.constexpr = call.N
    i_block, i_head, i_residue, i_split, repeats = program(call, (N + BM - 1) // BM)
    o_mine = i_block * BM + tl.arange(0, BM)
    for i_repeat in tl.range(i_split, repeats, splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * call.bias_windows + i_residue
        length = window_rows(call, i_window)
        if i_block * BM < length:
            at, m_row = block_rows(call, i_window, i_head, o_mine, length)
            b_q = load_rows(call, call.q, at, m_row)
            b_out = zero_rows(call, BM)
            b_max = tl.full((BM,), float("-inf"), tl.float32)
            b_sum = tl.zeros((BM,), tl.float32)
            for i_key in tl.range(0, length, BN, num_stages=STAGES):
                o_theirs = tl.cast(i_key, tl.int32) + tl.arange(0, BN)
                there, m_key = block_rows(call, i_window, i_head, o_theirs, length)
                b_k = load_rows(call, call.k, there, m_key)
                b_score = block_scores(call, b_q, b_k, at, there, m_key, i_residue, BM, BN, False)
                b_new = tl.maximum(b_max, tl.max(b_score, 1))
                b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_score - b_safe[:, None])
                b_decay = tl.exp2(b_max - b_safe)
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
                b_max = b_new
                b_v = load_rows(call, call.v, there, m_key)
                b_low = b_p.to(out.dtype.element_ty)
                b_out = add_rows(scale_rows(b_out, b_decay[:, None]), b_low, b_v, call.PRECISION)
            b_whole = tl.where(b_sum == 0.0, 1.0, b_sum)
            b_out = scale_rows(b_out, (1.0 / b_whole)[:, None])
            store_rows(call, out, (at[2] * call.heads + i_head) * call.D, m_row, b_out)
            b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(b_whole))
            tl.store(lse + ((i_window * call.heads + i_head) * N + at[1]), b_lse, mask=m_row)


@triton.jit
def window_attention_blocks_dq_kernel(
    call, out, lse, delta, grads, splits, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr
):
    """One program as in the forward: dq of BM queries.

    Reads out and lse; writes delta = rowsum(out * grad) (windows, heads, N) for the other two kernels.
    """
    N: tl.constexpr = call.N
    i_block, i_head, i_residue, i_split, repeats = program(call, (N + BM - 1) // BM)
    o_mine = i_block * BM + tl.arange(0, BM)
    for i_repeat in tl.range(i_split, repeats, splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * call.bias_windows + i_residue
        length = window_rows(call, i_window)
        if i_block * BM < length:
            at, m_row = block_rows(call, i_window, i_head, o_mine, length)
            b_q = load_rows(call, call.q, at, m_row)
            b_grad = load_rows(call, call.grad, at, m_row)
            b_out = load_rows(call, out, at, m_row)
            b_delta = tl.sum(b_out[0].to(tl.float32) * b_grad[0].to(tl.float32), 1)
            if call.D1 > 0:
                b_delta += tl.sum(b_out[1].to(tl.float32) * b_grad[1].to(tl.float32), 1)
            o_stat = (i_window * call.heads + i_head) * N + at[1]
            tl.store(delta + o_stat, b_delta, mask=m_row)
            b_lse = tl.load(lse + o_stat, mask=m_row, other=float("inf"))
            b_dq = zero_rows(call, BM)
            for i_key in tl.range(0, length, BN, num_stages=STAGES):
                o_theirs = tl.cast(i_key, tl.int32) + tl.arange(0, BN)
                there, m_key = block_rows(call, i_window, i_head, o_theirs, length)
                b_k = load_rows(call, call.k, there, m_key)
                b_v = load_rows(call, call.v, there, m_key)
                b_score = block_scores(call, b_q, b_k, at, there, m_key, i_residue, BM, BN, False)
                b_p = tl.exp2(b_score - b_lse[:, None])
                b_ds = b_p * (dot_rows(b_grad, b_v, call.PRECISION) - b_delta[:, None])
                b_dq = add_rows(b_dq, b_ds.to(grads.q.dtype.element_ty), b_k, call.PRECISION)
            o_out = (at[2] * (grads.GROUPS * call.heads) + i_head) * call.D
            store_rows(call, grads.q, o_out, m_row, scale_rows(b_dq, call.scale))


@triton.jit
def window_attention_blocks_dbias_kernel(
    call, lse, delta, sums, splits, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr
):
    """One program: BM queries by BN keys of one head's bias, over every splits-th window of one residue.

    sums (splits, bias_windows, heads, QUERIES * BM, KEYS * BN) float32. Two products more than summing in one of
    the other kernels would take, but there the sum of BM x N does not fit into registers.
    """
    N: tl.constexpr = call.N
    QUERIES: tl.constexpr = (N + BM - 1) // BM
    KEYS: tl.constexpr = (N + BN - 1) // BN
    i_block, i_head, i_residue, i_split, repeats = program(call, QUERIES * KEYS)
    o_query = tl.program_id(0) % QUERIES * BM + tl.arange(0, BM)
    o_key = tl.program_id(0) // QUERIES % KEYS * BN + tl.arange(0, BN)
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_repeat in tl.range(i_split, repeats, splits, num_stages=STAGES):
        i_window = tl.cast(i_repeat, tl.int64) * call.bias_windows + i_residue
        at, m_row = block_slots(call, i_window, i_head, o_query)
        there, m_key = block_slots(call, i_window, i_head, o_key)
        b_q = load_rows(call, call.q, at, m_row)
        b_grad = load_rows(call, call.grad, at, m_row)
        b_k = load_rows(call, call.k, there, m_key)
        b_v = load_rows(call, call.v, there, m_key)
        o_stat = (i_window * call.heads + i_head) * N + o_query
        b_lse = tl.load(lse + o_stat, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + o_stat, mask=m_row, other=0.0)
        b_score = block_scores(call, b_q, b_k, at, there, m_key, i_residue, BM, BN, False)
        b_p = tl.exp2(b_score - b_lse[:, None])
        b_sum += b_p * (dot_rows(b_grad, b_v, call.PRECISION) - b_delta[:, None])
    i_tile = tl.program_id(0) // (QUERIES * KEYS)
    o_sum = (i_tile.to(tl.int64) * (QUERIES * BM) + o_query) * (KEYS * BN)
    tl.store(sums + (o_sum[:, None] + o_key[None, :]), b_sum)


@triton.jit
def window_attention_blocks_dkv_kernel(
    call,
    lse,
    delta,
    grads,
    splits,
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
    N: tl.constexpr = call.N
    i_block, i_head, i_residue, i_split, repeats = program(call, (N + BN - 1) // BN)
    o_mine = i_block * BN + tl.arange(0, BN)
    for i_repeat in tl.range(i_split, repeats, splits, num_stages=1):
        i_window = tl.cast(i_repeat, tl.int64) * call.bias_windows + i_residue
        length = window_rows(call, i_window)
        if i_block * BN < length:
            at, m_row = block_rows(call, i_window, i_head, o_mine, length)
            b_k = load_rows(call, call.k, at, m_row)
            b_v = load_rows(call, call.v, at, m_row)
            b_dk = zero_rows(call, BN)
            b_dv = zero_rows(call, BN)
            for i_query in tl.range(0, length, BM, num_stages=STAGES):
                o_theirs = tl.cast(i_query, tl.int32) + tl.arange(0, BM)
                there, m_query = block_rows(call, i_window, i_head, o_theirs, length)
                b_q = load_rows(call, call.q, there, m_query)
                b_grad = load_rows(call, call.grad, there, m_query)
                o_stat = (i_window * call.heads + i_head) * N + there[1]
                b_lse = tl.load(lse + o_stat, mask=m_query, other=float("inf"))
                b_delta = tl.load(delta + o_stat, mask=m_query, other=0.0)
                b_score = block_scores(call, b_q, b_k, there, at, m_row, i_residue, BM, BN, True)
                b_p = tl.exp2(b_score - b_lse[None, :])
                if DV:
                    b_dv = add_rows(b_dv, b_p.to(grads.v.dtype.element_ty), b_grad, call.PRECISION)
                if DK:
                    b_ds = b_p * (dot_rows(b_v, b_grad, call.PRECISION) - b_delta[None, :])
                    b_dk = add_rows(b_dk, b_ds.to(grads.k.dtype.element_ty), b_q, call.PRECISION)
            o_out = (at[2] * (grads.GROUPS * call.heads) + i_head) * call.D
            if DV:
                store_rows(call, grads.v, o_out, m_row, b_dv)
            if DK:
                store_rows(call, grads.k, o_out, m_row, scale_rows(b_dk, call.scale))


def block_config(kernel: str, q: torch.Tensor) -> dict[str, int]:
    """Blocks, warps and stages of "fwd", "dq", "dbias" or "dkv": pinned, as in `window_attention`.

    64 rows to 4 warps: more warps would compute the same rows twice. Few columns, fewer for wider heads, leave
    registers for two or three programs on a multiprocessor, so that one computes while others load. What is here
    compiles without a spill for sm_80, sm_90, sm_100 and sm_120.
    """
    width, major = q.shape[-1], capability(q)[0]
    major = 8 if major == 12 else major  # the same tensor cores, which multiply registers
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
    keys = 64 if width > 80 and major == 10 else 32
    return {"BM": 64, "BN": keys, "num_warps": 4, "STAGES": 2 if width <= 64 and major != 10 else 1}


# Programs a multiprocessor. Those that sum the bias's gradient over their windows write the sum at their end: few of
# them, over several waves. The others keep nothing from window to window, and windows differ in length: many.
PROGRAMS_PER_SM = {"fwd": 32, "dq": 32, "dkv": 32, "dbias": 8}


def _splits(kernel: str, q: torch.Tensor, call: Call, blocks: int) -> tuple[int, int]:
    """The grid of a kernel that takes a window in `blocks` blocks, and the splits of the windows."""
    programs = blocks * call.heads * call.bias_windows
    repeats = cdiv(call.windows, call.bias_windows)
    splits = max(1, min(repeats, num_sms(q) * PROGRAMS_PER_SM[kernel] // programs))
    return programs * splits, splits


def _close_up(tape: Tape, call: Call, slots: torch.Tensor | None) -> Call:
    """The call with the rows of its windows closed up."""
    if slots is None:
        return call
    rows, positions = (tape.empty(slots.shape, torch.int32) for _ in range(2))
    closed = ClosedUp(rows, positions, tape.empty(slots.shape[:1], torch.int32))
    if call.windows:
        block = next_power_of_2(call.length)
        tape.launch(
            close_up_kernel, call.windows, call.slots, closed, call.rows, N=call.length, BLOCK=block, num_warps=2
        )
    return call._replace(closed=closed)


def blocks_forward(tape: Tape, q, k, v, bias, slots, segment_ids, scale, precision, out, lse) -> None:
    """Fills the rows of out (rows, heads, D) that exist, and lse (windows, heads, N) float32."""
    call = call_of(q, k, v, bias, slots, segment_ids, scale, precision)
    config = block_config("fwd", q)
    grid, splits = _splits("fwd", q, call, cdiv(call.length, config["BM"]))
    tape.launch(window_attention_blocks_fwd_kernel, grid, _close_up(tape, call, slots), out, lse, splits, **config)


def blocks_backward(
    tape: Tape, grad, q, k, v, bias, slots, segment_ids, out, lse, scale, needs_bias, precision, dq, dk, dv
):
    """Fills the rows of dq, dk, dv that exist; returns the gradient of the bias, None unless needs_bias."""
    call = call_of(q, k, v, bias, slots, segment_ids, scale, precision, grad)
    grads = gradients_of(dq, dk, dv)
    delta = tape.empty(lse.shape, torch.float32)
    closed = _close_up(tape, call, slots)
    config = block_config("dq", q)
    grid, splits = _splits("dq", q, call, cdiv(call.length, config["BM"]))
    tape.launch(window_attention_blocks_dq_kernel, grid, closed, heads_of(out), lse, delta, grads, splits, **config)
    config = block_config("dkv", q)
    grid, splits = _splits("dkv", q, call, cdiv(call.length, config["BN"]))
    for dk_too, dv_too in ((True, True),) if q.shape[-1] <= 80 else ((True, False), (False, True)):
        tape.launch(
            window_attention_blocks_dkv_kernel,
            grid,
            closed,
            lse,
            delta,
            grads,
            splits,
            DK=dk_too,
            DV=dv_too,
            **config,
        )
    if not needs_bias:
        return None
    config = block_config("dbias", q)
    queries, keys = cdiv(call.length, config["BM"]), cdiv(call.length, config["BN"])
    grid, splits = _splits("dbias", q, call, queries * keys)
    sides = (queries * config["BM"], keys * config["BN"])
    sums = tape.empty((splits, call.bias_windows, call.heads, *sides), torch.float32)
    tape.launch(window_attention_blocks_dbias_kernel, grid, call, lse, delta, sums, splits, **config)
    return reduce_sums(tape, sums, bias, 1, 1)
