"""Swin's table of relative positions as the bias of a window (Swin Transformer, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator


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

    Example:
        >>> table = torch.arange(9.0).reshape(9, 1)  # window 2: offsets (-1..1, -1..1), one head
        >>> ops.relative_position_bias(table, window=2)
        tensor([[[[4., 3., 1., 0.],
                  [5., 4., 2., 1.],
                  [7., 6., 4., 3.],
                  [8., 7., 5., 4.]]]])
    """
    _check.tensor("table", table, ndim=2, dtypes=_check.FLOATS)
    _check.integer("window", window, low=1)
    _check.require(
        table.shape[0] == (2 * window - 1) ** 2,
        "table",
        lambda: f"have (2 * {window} - 1)^2 = {(2 * window - 1) ** 2} rows",
        f"shape {tuple(table.shape)}",
    )
    name = choose("relative_position_bias", backend, table, window)
    if name == "reference":
        return reference.relative_position_bias(table, window)
    return _call_relative_position_bias(table, window, name)


def _fake(table: Tensor, window: int, backend: str) -> Tensor:
    return table.new_empty((1, table.shape[1], window**2, window**2))


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, ctx.window, ctx.backend = inputs


def _backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    return _call_relative_position_bias_backward(grad, ctx.window, ctx.backend), None, None


def _backward_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    return _call_relative_position_bias(grad, ctx.window, ctx.backend), None, None


_call_relative_position_bias = operator(
    "relative_position_bias(Tensor table, SymInt window, str backend) -> Tensor",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    linear=True,
)
_call_relative_position_bias_backward = operator(
    "relative_position_bias_backward(Tensor grad, SymInt window, str backend) -> Tensor",
    fake=lambda grad, window, backend: grad.new_empty(((2 * window - 1) ** 2, grad.shape[1])),
    setup=_setup,
    backward=_backward_backward,
    linear=True,
)


def _fits(table: Tensor, window: int) -> list[str]:
    reasons = []
    if table.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"table must be float32, float16 or bfloat16, not {table.dtype}")
    if window > 64:
        reasons.append(f"window must be at most 64, not {window}")
    return reasons


register_backend("relative_position_bias", "reference")
register_backend("relative_position_bias", "triton", _fits)
for _direction, _name in (("forward", ""), ("backward", "_backward")):
    implement(
        f"relative_position_bias{_name}",
        "triton",
        f"d2it.kernels.relative_position_bias:relative_position_bias_{_direction}",
    )
