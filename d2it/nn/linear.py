"""A linear layer whose products of float32 matrices are taken by the tiles of AMX where a CPU has them.

The gradient of a layer's bias is a sum over the rows of the gradient of its output. `bias_apart` leaves it to the
operator that takes the output, which has the rows at hand while it writes them; `branch_apart` that of a module's last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from d2it import ops
from d2it.ops import _native
from d2it.ops._register import computed_only

_NATIVE_GELU = not ops.why_not("gelu", "cpu")
_TRITON_GELU = not ops.why_not("gelu", "triton")

LEAST = 1 << 22
"""Multiply-accumulates from which on tiles are faster than PyTorch's product (MKL), measured on two cores."""


class Linear(nn.Linear):
    """nn.Linear, of the same parameters, precision and gradients; faster in float32 on a CPU with AMX.

    A tile of AMX multiplies bfloat16. Each float32 is split into three of them, and the six largest of the nine
    products are added in float32 (csrc/tiles.h): the error is at most twice that of PyTorch's float32 product.
    Elsewhere, under autocast, in compiled code and under the transforms of `torch.func` it is nn.Linear.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        bias: whether one is added.

    Example:
        >>> import torch
        >>> from d2it import nn
        >>> layer = nn.Linear(384, 1536)
        >>> layer(torch.randn(2, 256, 384)).shape
        torch.Size([2, 256, 1536])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (..., in_features) times the weight's transpose, plus the bias: (..., out_features)."""
        return _linear(x, self.weight, self.bias)


@functools.cache
def has_tiles() -> bool:
    """Returns whether this machine multiplies by tiles: it has AMX, the system allows it, and d2it's C++ is built."""
    if _native.why_not("matmul", "cpu"):
        return False
    one = torch.ones(1, 1)
    return torch.ops.d2it_C.matmul(one, one, None, torch.empty(1, 1))


def suits(x: Tensor, weight: Tensor) -> bool:
    """Returns whether x times the weight's transpose is a product for tiles: large, float32, on a CPU, eager."""
    return (
        not torch.compiler.is_compiling()  # first: a compiled graph would be bound to what is asked of shapes
        and _plain(x)
        and _plain(weight)
        and x.numel() * weight.shape[0] >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and computed_only()
        and has_tiles()
    )


def bias_apart(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns layer(x), and the layer's bias where its gradient is left to what takes the output.

    In its place None where the layer gives it, if any, itself: what is no `Linear`, or has hooks.

    Args:
        layer: what is called.
        x: (..., in_features).
    """
    if type(layer) is not Linear or layer.bias is None or hooked(layer):
        return layer(x), None
    return _linear(x, layer.weight, layer.bias.detach()), layer.bias


def branch_apart(module: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
    """Returns module(*args), and the bias of its last layer as `bias_apart` does.

    Args:
        module: with a method `apart` that returns both; what has none, or has hooks, is called whole.
        *args: what it takes.
    """
    apart = getattr(module, "apart", None)
    return (module(*args), None) if apart is None or hooked(module) else apart(*args)


def gelu_between(x: Tensor, first: nn.Linear, second: nn.Linear, *, apart: bool) -> tuple[Tensor, Tensor | None]:
    """Returns second(gelu(first(x))), GELU by tanh, whose backward has the gradient of the first layer's bias.

    In float32 on a CPU GELU's input alone is kept for the backward. Elsewhere its output is kept beside it: on a GPU to
    write it again would be one more pass over a tensor of the hidden width, and in 16 bits on a CPU it would save half
    the memory and hardly any time.

    Args:
        x: (..., in_features of the first).
        first: what makes the hidden layer.
        second: what follows.
        apart: whether the gradient of the second layer's bias is left to what takes the output: then it is the second
            result, as that of `bias_apart`.
    """
    native = _NATIVE_GELU and x.is_cpu and not torch.compiler.is_compiling()
    if x.ndim not in (2, 3) or x.dtype == torch.float64 or not (native or _sums(x)):
        out = F.gelu(first(x), approximate="tanh")
    else:
        hidden, bias = bias_apart(first, x)
        fits = native and type(second) is Linear and second.bias is not None and not hooked(second)
        fits = fits and not torch.is_autocast_enabled("cpu") and computed_only()
        if fits and all(map(_plain, (hidden, second.weight, second.bias))) and hidden.is_contiguous():
            added = second.bias.detach() if apart else second.bias
            return _GeluLinear.apply(hidden, bias, second.weight, added), second.bias if apart else None
        out = F.gelu(hidden, approximate="tanh") if bias is None else ops.gelu(hidden, bias)
    return bias_apart(second, out) if apart else (second(out), None)


def _sums(x: Tensor) -> bool:
    """Whether `ops.gelu` has a kernel of a GPU for x that sums its gradient."""
    return _TRITON_GELU and x.is_cuda


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns a (M, K) times b (K, N), plus bias (N,): by tiles, or by PyTorch where they would not be faster.

    Rows or columns of both are contiguous. A gradient can be asked for of what PyTorch computes, and then it does.
    """
    if torch.is_grad_enabled() or a.numel() * b.shape[1] < LEAST or not has_tiles():
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    torch.ops.d2it_C.matmul(a, b, bias, out)
    return out


def hooked(layer: nn.Module) -> bool:
    """Returns whether something waits for a call of the layer, or stands in for it."""
    own = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(own) or "forward" in vars(layer) or _has_any_global_hook()


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if suits(x, weight) and (bias is None or _plain(bias)) and x.is_contiguous() and weight.is_contiguous():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx = product(rows, weight).view(x.shape) if of_x else None
        dweight = product(rows.t(), x.flatten(0, -2)) if of_weight else None
        return dx, dweight, rows.sum(0) if of_bias else None


class _GeluLinear(torch.autograd.Function):
    """What follows GELU, of its input x, which has `inner` in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, inner, weight)
        out = torch.empty_like(x)
        torch.ops.d2it_C.gelu(x.flatten(0, -2), out.flatten(0, -2))
        return product(out.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight = ctx.saved_tensors
        _, of_inner, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx = product(rows, weight).view(x.shape)
        if torch.is_grad_enabled():  # a derivative of this is asked for
            x = x if inner is None else x + (inner - inner.detach())
            out = F.gelu(x, approximate="tanh")
            dx = torch.ops.aten.gelu_backward(dx, x, approximate="tanh")
            dinner = dx.flatten(0, -2).sum(0) if of_inner else None
        else:
            out, dinner = torch.empty_like(x), x.new_empty(x.shape[-1:]) if of_inner else None
            torch.ops.d2it_C.gelu_backward(*(t.flatten(0, -2) for t in (dx, x, dx, out)), dinner)
        dweight = product(rows.t(), out.flatten(0, -2)) if of_weight else None
        return dx, dinner, dweight, rows.sum(0) if of_bias else None
