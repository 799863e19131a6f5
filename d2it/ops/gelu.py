"""GELU by tanh, which gives the bias of the layer before it its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator, unwritten_bias


def gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel): x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Args:
        x: (B, L, C), or rows (T, C); floating point, any strides.
        bias: (C,) floating point, of the layer that made `x`, where the layer was given it without its gradient
            (`bias.detach()`): it is in `x` already, and not added here. Its gradient is that of `x` summed over the
            rows, in float32 and in a fixed order, by the pass that writes that of `x`.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        The shape and dtype of `x`, computed in float32.

    Raises:
        TypeError, ValueError: shapes or devices that do not go together.

    Example:
        >>> x, weight, bias = torch.ones(3, 2), torch.eye(2), torch.zeros(2, requires_grad=True)
        >>> out = ops.gelu(torch.nn.functional.linear(x, weight, bias.detach()), bias)
        >>> torch.autograd.grad(out.sum(), bias)[0].round(decimals=3)
        tensor([3.2490, 3.2490])
    """
    _check.tensor("x", x, ndim=None, dtypes=_check.FLOATS)
    _check.require(x.ndim in (2, 3), "x", "be (B, L, C) or (T, C)", tuple(x.shape))
    _check.bias(bias, x)
    name = choose("gelu", backend, x, bias)
    return reference.gelu(x, bias) if name == "reference" else _call(x, bias, name)


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    x, bias = ctx.saved_tensors
    dx, dbias = _call_backward(grad, x, bias if ctx.needs[1] else None, ctx.backend)
    return dx, dbias if ctx.needs[1] else None, None


def _pull_back(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if bias is None:
        return *torch.func.vjp(reference.gelu, x)[1](grad), x.new_zeros((0,))
    return torch.func.vjp(reference.gelu, x, bias)[1](grad)


_call = operator(
    "gelu(Tensor x, Tensor? bias, str backend) -> Tensor",
    fake=lambda x, bias, backend: x.new_empty(x.shape),
    setup=_setup,
    backward=_backward,
    composite=reference.gelu,
)
_call_backward = operator(
    "gelu_backward(Tensor grad, Tensor x, Tensor? bias, str backend) -> (Tensor dx, Tensor dbias)",
    fake=lambda grad, x, bias, backend: (x.new_empty(x.shape), unwritten_bias(x, bias)),
    composite=_pull_back,
)


def _dtype_reasons(x: Tensor, bias: Tensor | None = None) -> list[str]:
    return [
        f"it computes in float32 and takes no {tensor.dtype}"
        for tensor in (x, bias)
        if tensor is not None and tensor.dtype == torch.float64
    ]


def _triton_reasons(x: Tensor, bias: Tensor | None = None) -> list[str]:
    rows = math.prod(x.shape[:-1])  # `numel` of a shape would fix its sizes under `torch.export`
    many = [f"it counts rows in int32, and {rows} are too many"] if rows > 2**31 - 2**16 else []
    return _dtype_reasons(x, bias) + many


def _native(x: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape)
    torch.ops.d2it_C.gelu(x, out)
    return out


def _native_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dx, dbias = x.new_empty(x.shape), unwritten_bias(x, bias)
    sums = None if bias is None else dbias.float()  # itself where it is float32
    torch.ops.d2it_C.gelu_backward(grad, x, dx, None, sums)
    return dx, dbias if sums is None else sums.to(dbias.dtype)


register_backend("gelu", "reference")
register_backend("gelu", "cpu", _dtype_reasons, native="gelu")
register_backend("gelu", "triton", _triton_reasons)
implement("gelu", "triton", "d2it.kernels.gelu:gelu_forward")
implement("gelu_backward", "triton", "d2it.kernels.gelu:gelu_backward")
implement("gelu", "cpu", _native)
implement("gelu_backward", "cpu", _native_backward)
