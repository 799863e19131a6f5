"""Window attention over packed tokens on a CPU: windows with equally many tokens are one batched product.

Work follows the pairs of tokens that exist. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Scores held at a time: 64 MiB in float32.
CHUNK = 2**24


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    segment_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q, k, v (T, H, D) -> the result, and nothing to keep for the backward: the softmax is computed again."""
    return _forward(q, k, v, bias, slots, segment_ids, scale), q.new_empty(0, dtype=torch.float32)


def window_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slots: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias), dbias empty where it is not needed."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    into: tuple[Any, ...] = (dq, dk, dv)
    dbias = _backward(grad, q, k, v, bias, slots, *rest, *into)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def window_attention_qkvpacked_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same on one projection (T, 3, H, D)."""
    q, k, v = qkv.unbind(-3)
    return window_attention_forward(q, k, v, *rest)


def window_attention_qkvpacked_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias): the three gradients written into one tensor."""
    dqkv = torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = qkv.unbind(-3)
    dbias = _backward(grad, q, k, v, *rest, *dqkv.unbind(-3))
    return dqkv, qkv.new_empty(0) if dbias is None else dbias


class Group(NamedTuple):
    """Windows of n tokens each."""

    rows: Tensor  # (W', n) the tokens' rows
    pairs: Tensor | None  # (W', n, n) where their bias lies in (Wb * N * N)
    hidden: Tensor | None  # (W', 1, n, n) pairs of different segments


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    segment_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """q, k, v (T, H, D), bias (Wb, Hb, N, N) -> (T, H, D); rows that no slot names are zero."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    table = _table(bias)
    for group in _groups(slots, bias, segment_ids, q.shape[1]):
        weights = _weights(_take(q, group.rows) * scale, _take(k, group.rows), table, group)
        _put(out, group.rows, weights @ _take(v, group.rows))
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    segment_ids: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    scale: float,
    needs_bias: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor | None:
    """Fills dq, dk, dv (zero before, any strides); returns the gradient of the bias where it is needed."""
    table = _table(bias)
    sums = torch.zeros_like(table) if needs_bias and table is not None else None
    for group in _groups(slots, bias, segment_ids, q.shape[1]):
        rows = group.rows
        b_q, b_k, b_v, b_grad = (_take(x, rows) for x in (q, k, v, grad))  # (W', H, n, D)
        weights = _weights(b_q * scale, b_k, table, group)
        _put(dv, rows, weights.mT @ b_grad)
        ds = b_grad @ b_v.mT
        # rowsum(P dP) is the product's diagonal with the output: no need of the output itself.
        ds = weights * (ds - (weights * ds).sum(dim=-1, keepdim=True))
        _put(dq, rows, (ds @ b_k) * scale)
        _put(dk, rows, (ds.mT @ b_q) * scale)
        if sums is not None and group.pairs is not None:
            by_head = (
                ds.transpose(0, 1) if sums.shape[0] == ds.shape[1] else ds.sum(dim=1, keepdim=True).transpose(0, 1)
            )
            # One head after the other, pairs in their order: the same bits every time.
            index = group.pairs.flatten().expand(sums.shape[0], -1)
            sums.scatter_add_(1, index, by_head.reshape(sums.shape[0], -1))
    if sums is None or bias is None:
        return None
    windows, heads, n, _ = bias.shape
    return sums.view(heads, windows, n, n).transpose(0, 1).to(bias.dtype).contiguous()


def _groups(slots: Tensor, bias: Tensor | None, segment_ids: Tensor | None, heads: int) -> Iterator[Group]:
    n = slots.shape[1]
    exists = slots >= 0
    counts = exists.sum(dim=1)
    for tokens in counts.unique().tolist():
        if tokens == 0:
            continue
        chosen = (counts == tokens).nonzero().flatten()
        for windows in chosen.split(max(1, CHUNK // (heads * tokens * tokens))):
            positions = exists[windows].nonzero()[:, 1].view(-1, tokens)  # (W', n)
            rows = slots[windows].gather(1, positions)
            pairs = hidden = None
            if bias is not None:
                own = (windows % bias.shape[0])[:, None, None] * (n * n)
                pairs = own + positions[:, :, None] * n + positions[:, None, :]
            if segment_ids is not None:
                ids = segment_ids[windows % segment_ids.shape[0]].gather(1, positions)
                hidden = (ids[:, :, None] != ids[:, None, :])[:, None]
            yield Group(rows, pairs, hidden)


def _table(bias: Tensor | None) -> Tensor | None:
    """(Wb, Hb, N, N) -> (Hb, Wb * N * N)."""
    if bias is None:
        return None
    return bias.transpose(0, 1).reshape(bias.shape[1], -1).to(_wide(bias.dtype))


def _weights(scaled_q: Tensor, k: Tensor, table: Tensor | None, group: Group) -> Tensor:
    scores = scaled_q @ k.mT  # (W', H, n, n)
    if table is not None and group.pairs is not None:
        scores += table[:, group.pairs].transpose(0, 1)
    if group.hidden is not None:
        scores = scores.masked_fill(group.hidden, -torch.inf)
    return scores.softmax(dim=-1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """(T, H, D) -> (W', H, n, D), float32 at least."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2).to(_wide(x.dtype))


def _put(x: Tensor, rows: Tensor, values: Tensor) -> None:
    x.index_copy_(0, rows.flatten().long(), values.transpose(1, 2).flatten(0, 1).to(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
