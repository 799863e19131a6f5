"""Attention inside windows, with a learnable bias, over the tokens that exist (paper Eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.kernels.common import tiled_positions
from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v inside every window (paper Eq. 10).

    Dense windows come as (W, N, H, D). Packed windows come as rows (T, H, D) with `slots`, which says where each
    position of each window lies: windows may hold any number of tokens, and only those cost anything.

    Args:
        q, k, v: (W, N, H, D), or (T, H, D) with `slots`; one dtype and device, any strides.
        bias: (Wb, Hb, N, N) floating point, added to the scaled scores: window i uses bias[i % Wb], Hb is 1 or H. Its
            gradient is summed in a fixed order, the same bits every time. Or None.
        slots: (W, N) int32, the row of each position, or -1 (any negative). No row stands in it twice.
        segment_ids: (Ws, N) integers; tokens attend within equal ids (Swin's shifted windows). Window i uses
            segment_ids[i % Ws].
        scale: D ** -0.5 where None.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        The shape and dtype of `q`. Rows that no slot names are zero, and so are their gradients.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together; on CPU, slots that name a row that is
            not there, or one twice. On a GPU the first is a device-side assertion, raised at the next
            synchronisation, and the row is taken for absent; of a row named twice either result may remain.

    Under autocast q, k and v are cast to its dtype, as PyTorch's own attention does.
    """
    q, k, v = (_autocast(x) for x in (q, k, v))
    ndim = 4 if slots is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.tensor(name, x, ndim=ndim, floating=True)
        _check.same("dtype", "q", q, name, x)
        _check.same("device", "q", q, name, x)
        _check.require(x.shape == q.shape, name, lambda: f"have the shape of q {tuple(q.shape)}", tuple(x.shape))
    windows, n = (q.shape[0], q.shape[1]) if slots is None else _slots(slots, q)
    _extras(windows, n, q.shape[-2], q, bias, segment_ids, scale)
    name = choose("window_attention", backend, q, k, v, bias, slots=slots, segment_ids=segment_ids)
    if name == "reference":
        check_slots(slots, q.shape[0])
        return reference.window_attention(q, k, v, bias, slots=slots, segment_ids=segment_ids, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _call_window_attention(q, k, v, bias, slots, segment_ids, factor, name)[0]


def window_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`window_attention` on one projection, read where the linear layer left it; its gradient is one tensor too.

    Args:
        qkv: (W, N, 3, H, D), or (T, 3, H, D) with `slots`.
        bias, slots, segment_ids, scale, backend: as for `window_attention`.

    Returns:
        (W, N, H, D) or (T, H, D), the dtype of `qkv`.

    Raises:
        TypeError, ValueError: as for `window_attention`.
    """
    qkv = _autocast(qkv)
    _check.tensor("qkv", qkv, ndim=5 if slots is None else 4, floating=True)
    _check.require(qkv.shape[-3] == 3, "qkv", "have 3 in its third dimension from the end", tuple(qkv.shape))
    windows, n = (qkv.shape[0], qkv.shape[1]) if slots is None else _slots(slots, qkv)
    _extras(windows, n, qkv.shape[-2], qkv, bias, segment_ids, scale)
    name = choose("window_attention_qkvpacked", backend, qkv, bias, slots=slots, segment_ids=segment_ids)
    if name == "reference":
        check_slots(slots, qkv.shape[0])
        return reference.window_attention_qkvpacked(qkv, bias, slots=slots, segment_ids=segment_ids, scale=scale)
    factor = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    return _call_window_attention_qkvpacked(qkv, bias, slots, segment_ids, factor, name)[0]


def relative_position_bias(table: Tensor, window: int, *, backend: str | None = None) -> Tensor:
    """Swin's table of relative positions as the bias of a window (Swin Transformer, Eq. 4).

    Args:
        table: ((2w-1)^2, H) floating point.
        window: w, cells along a window's side.
        backend: "reference", "triton", or None to choose.

    Returns:
        (1, H, w*w, w*w): [0, h, i, j] is table[(yi - yj + w - 1) * (2w - 1) + xi - xj + w - 1, h]. Its gradient is
        summed in a fixed order.

    Raises:
        TypeError, ValueError: `table` has not (2w-1)^2 rows.
    """
    _check.tensor("table", table, ndim=2, floating=True)
    _check.integer("window", window, low=1)
    _check.require(
        table.shape[0] == (2 * window - 1) ** 2,
        "table",
        f"have (2 * {window} - 1)^2 = {(2 * window - 1) ** 2} rows",
        f"shape {tuple(table.shape)}",
    )
    name = choose("relative_position_bias", backend, table, window)
    if name == "reference":
        return reference.relative_position_bias(table, window)
    return _call_relative_position_bias(table, window, name)


def _autocast(x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.dtype.is_floating_point and torch.is_autocast_enabled(x.device.type):
        return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _slots(slots: Tensor, q: Tensor) -> tuple[int, int]:
    _check.tensor("slots", slots, ndim=2, floating=False)
    if slots.dtype != torch.int32:
        raise TypeError(f"slots must be int32, got {slots.dtype}")
    _check.same("device", "q", q, "slots", slots)
    return slots.shape[0], slots.shape[1]


def check_slots(slots: Tensor | None, rows: int) -> None:
    """Raises unless every slot names a row below `rows`, or none, and no two name the same."""
    if slots is None or slots.numel() == 0:
        return
    # No size in the rule: torch.compile would take it for a constant.
    _check.values((slots < rows).all(), "slots must name rows that are there", lambda: f"{int(slots.max())} of {rows}")
    if slots.device.type == "cpu":
        named = slots.flatten().sort()[0]
        twice = (named[1:] == named[:-1]) & (named[1:] >= 0)
        _check.values(~twice.any(), "slots must name a row once", lambda: f"row {int(named[1:][twice][0])} twice")


def _extras(
    windows: int,
    n: int,
    heads: int,
    q: Tensor,
    bias: Tensor | None,
    segment_ids: Tensor | None,
    scale: float | None,
) -> None:
    if bias is not None:
        _check.tensor("bias", bias, ndim=4, floating=True)
        _check.same("device", "q", q, "bias", bias)
        _check.require(
            bias.shape[0] >= 1 and bias.shape[1] in (1, heads) and bias.shape[2:] == (n, n),
            "bias",
            f"be (Wb, 1 or {heads}, {n}, {n})",
            tuple(bias.shape),
        )
    if segment_ids is not None:
        _check.tensor("segment_ids", segment_ids, ndim=2, floating=False)
        _check.same("device", "q", q, "segment_ids", segment_ids)
        _check.require(
            segment_ids.shape[0] >= 1 and segment_ids.shape[1] == n,
            "segment_ids",
            f"be (Ws, {n})",
            tuple(segment_ids.shape),
        )
    if scale is not None:
        _check.require(math.isfinite(scale), "scale", "be finite", scale)


def _lse(q: Tensor, slots: Tensor | None, segment_ids: Tensor | None, backend: str) -> Tensor:
    windows, n = (q.shape[0], q.shape[1]) if slots is None else (slots.shape[0], slots.shape[1])
    # Windows that are one tile are computed again from the inputs; of larger ones the backward wants this back.
    kept = backend == "triton" and n > tiled_positions(q, slots, segment_ids)
    return q.new_empty((windows, q.shape[-2], n) if kept else (0,), dtype=torch.float32)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse(q, slots, segment_ids, backend)


def _setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(output if lse.ndim == 3 else (None, None)))


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Sequence[Any]:
    if grad is None:
        return (None,) * 8
    q, k, v, bias, slots, segment_ids, out, lse = ctx.saved_tensors
    needs_bias = bias is not None and ctx.needs[3]
    dq, dk, dv, dbias = _call_window_attention_backward(
        grad, q, k, v, bias, slots, segment_ids, out, lse, ctx.scale, needs_bias, ctx.backend
    )
    return dq, dk, dv, dbias if needs_bias else None, None, None, None, None


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    scale: float,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_bias else q.new_empty(0)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), dbias


def _qkv_fake(
    qkv: Tensor, bias: Tensor | None, slots: Tensor | None, segment_ids: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    q = qkv.select(-3, 0)
    return q.new_empty(q.shape), _lse(q, slots, segment_ids, backend)


def _qkv_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Sequence[Any]:
    if grad is None:
        return (None,) * 6
    qkv, bias, slots, segment_ids, out, lse = ctx.saved_tensors
    needs_bias = bias is not None and ctx.needs[1]
    dqkv, dbias = _call_window_attention_qkvpacked_backward(
        grad, qkv, bias, slots, segment_ids, out, lse, ctx.scale, needs_bias, ctx.backend
    )
    return dqkv, dbias if needs_bias else None, None, None, None, None


def _qkv_backward_fake(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    scale: float,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_bias else qkv.new_empty(0)
    return qkv.new_empty(qkv.shape), dbias


def _table_fake(table: Tensor, window: int, backend: str) -> Tensor:
    return table.new_empty((1, table.shape[1], window**2, window**2))


def _table_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, ctx.window, ctx.backend = inputs


def _table_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    return _call_relative_position_bias_backward(grad, ctx.window, ctx.backend), None, None


_WHERE = "Tensor? bias, Tensor? slots, Tensor? segment_ids"
_BACK = f"{_WHERE}, Tensor? out, Tensor? lse, float scale, bool needs_bias, str backend"

_call_window_attention = operator(
    f"window_attention(Tensor q, Tensor k, Tensor v, {_WHERE}, float scale, str backend) -> (Tensor out, Tensor lse)",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    check=lambda q, k, v, bias, slots, *rest: check_slots(slots, q.shape[0]),
)
_call_window_attention_backward = operator(
    f"window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {_BACK}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    fake=_backward_fake,
)
_call_window_attention_qkvpacked = operator(
    f"window_attention_qkvpacked(Tensor qkv, {_WHERE}, float scale, str backend) -> (Tensor out, Tensor lse)",
    fake=_qkv_fake,
    setup=_setup,
    backward=_qkv_backward,
    check=lambda qkv, bias, slots, *rest: check_slots(slots, qkv.shape[0]),
)
_call_window_attention_qkvpacked_backward = operator(
    f"window_attention_qkvpacked_backward(Tensor grad, Tensor qkv, {_BACK}) -> (Tensor dqkv, Tensor dbias)",
    fake=_qkv_backward_fake,
)
_call_relative_position_bias = operator(
    "relative_position_bias(Tensor table, int window, str backend) -> Tensor",
    fake=_table_fake,
    setup=_table_setup,
    backward=_table_backward,
)
_call_relative_position_bias_backward = operator(
    "relative_position_bias_backward(Tensor grad, int window, str backend) -> Tensor",
    fake=lambda grad, window, backend: grad.new_empty(((2 * window - 1) ** 2, grad.shape[1])),
)


def _table_fits(table: Tensor, window: int) -> list[str]:
    reasons = []
    if table.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"table must be float32, float16 or bfloat16, not {table.dtype}")
    if window > 64:
        reasons.append(f"window must be at most 64, not {window}")
    return reasons


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> list[str]:
    reasons = []
    n, width = (q.shape[1] if slots is None else slots.shape[1]), q.shape[-1]
    if q.dtype not in _DTYPES:
        reasons.append(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    if bias is not None and bias.dtype not in _DTYPES:
        reasons.append(f"bias must be float32, float16 or bfloat16, not {bias.dtype}")
    if n > 256:
        reasons.append(f"windows must have at most 256 positions, not {n}")
    if not 1 <= width <= 128:
        reasons.append(f"heads must be at most 128 wide, not {width}")
    return reasons


def _qkv_fits(qkv: Tensor, bias: Tensor | None, **where: Any) -> list[str]:
    q, k, v = qkv.unbind(-3)
    return _fits(q, k, v, bias, **where)


def _native_fits(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **where: Any) -> list[str]:
    return [] if q.dtype in _DTYPES else [f"q must be float32, float16 or bfloat16, not {q.dtype}"]


def _native_qkv_fits(qkv: Tensor, bias: Tensor | None, **where: Any) -> list[str]:
    return [] if qkv.dtype in _DTYPES else [f"qkv must be float32, float16 or bfloat16, not {qkv.dtype}"]


# ---- C++ on CPU: it takes the bias in float32 and segments in int64, and keeps nothing for the backward --------------


def _native_extras(bias: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    return bias, None if segment_ids is None else segment_ids.to(torch.int64).contiguous()


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    bias, segment_ids = _native_extras(bias, segment_ids)
    if not torch.ops.d2it_C.window_attention(q, k, v, bias, slots, segment_ids, scale, out):
        check_slots(slots, q.shape[0])  # raises: the C++ operator only says that a slot is wrong
    return out, q.new_empty(0, dtype=torch.float32)


def _native_gradients(
    grads: tuple[Tensor, ...],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    scale: float,
    needs_bias: bool,
) -> Tensor:
    """Fills grads (dq, dk, dv) and returns dbias, empty unless needs_bias."""
    wide, segment_ids = _native_extras(bias, segment_ids)
    dbias = torch.empty_like(wide) if needs_bias and wide is not None else None
    given = (grad, q, k, v, wide, slots, segment_ids, scale)
    if not torch.ops.d2it_C.window_attention_backward(*given, *grads, dbias):
        check_slots(slots, q.shape[0])
    return q.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)


def _native_backward(grad: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, _native_gradients((dq, dk, dv), grad, q, *rest)


def _native_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    return _native(q, k, v, *rest)


def _native_qkv_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(-3)
    return dqkv, _native_gradients(dqkv.unbind(-3), grad, q, k, v, *rest)


for _op in ("window_attention", "window_attention_qkvpacked", "relative_position_bias"):
    register_backend(_op, "reference")
register_backend("window_attention", "cpu", _native_fits, native="window_attention")
register_backend("window_attention_qkvpacked", "cpu", _native_qkv_fits, native="window_attention")
implement("window_attention", "cpu", _native, checks_values=True)
implement("window_attention_backward", "cpu", _native_backward)
implement("window_attention_qkvpacked", "cpu", _native_qkv, checks_values=True)
implement("window_attention_qkvpacked_backward", "cpu", _native_qkv_backward)
register_backend("window_attention", "triton", _fits)
register_backend("window_attention_qkvpacked", "triton", _qkv_fits)
register_backend("relative_position_bias", "triton", _table_fits)
for _direction, _name in (("forward", ""), ("backward", "_backward")):
    for _op in ("window_attention", "window_attention_qkvpacked"):
        implement(f"{_op}{_name}", "triton", f"d2it.kernels.window_attention:{_op}_{_direction}")
    implement(
        f"relative_position_bias{_name}",
        "triton",
        f"d2it.kernels.relative_position_bias:relative_position_bias_{_direction}",
    )
