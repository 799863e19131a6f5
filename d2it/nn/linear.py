"""A linear layer whose products of float32 matrices are taken by the tiles of AMX where a CPU has them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from d2it.ops import _native
from d2it.ops._register import computed_only

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
        weight, bias = self.weight, self.bias
        if suits(x, weight) and (bias is None or _plain(bias)) and x.is_contiguous() and weight.is_contiguous():
            return _Linear.apply(x, weight, bias)
        return F.linear(x, weight, bias)


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


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Returns layer(gelu(x)), GELU by tanh; of float32 on a CPU with x alone kept for the backward.

    GELU is computed again there, in the pass that multiplies by its derivative.

    Args:
        x: (..., in_features).
        layer: what follows.
    """
    weight, bias = layer.weight, layer.bias
    if torch.compiler.is_compiling():
        return layer(F.gelu(x, approximate="tanh"))
    fits = type(layer) is Linear and not _hooked(layer)
    fits = fits and _plain(x) and _plain(weight) and _plain(bias) and x.is_contiguous()
    if fits and computed_only() and not torch.is_autocast_enabled("cpu") and not _native.why_not("gelu", "cpu"):
        return _GeluLinear.apply(x, weight, bias)
    return layer(F.gelu(x, approximate="tanh"))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns a (M, K) times b (K, N), plus bias (N,): by tiles, or by PyTorch where they would not be faster.

    Rows or columns of both are contiguous. A gradient can be asked for of what PyTorch computes, and then it does.
    """
    if torch.is_grad_enabled() or a.numel() * b.shape[1] < LEAST or not has_tiles():
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    torch.ops.d2it_C.matmul(a, b, bias, out)
    return out


def _hooked(layer: nn.Module) -> bool:
    """Whether something waits for a call of the layer, or stands in for it."""
    own = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(own) or "forward" in vars(layer) or _has_any_global_hook()


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32


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
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = torch.empty_like(x)
        torch.ops.d2it_C.gelu(x, out)
        return product(out.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx = product(rows, weight).view(x.shape)
        if torch.is_grad_enabled():  # a derivative of this is asked for
            out = F.gelu(x, approximate="tanh")
            dx = torch.ops.aten.gelu_backward(dx, x, approximate="tanh")
        else:
            out = torch.empty_like(x)
            torch.ops.d2it_C.gelu_backward(dx, x, out)
        return dx, product(rows.t(), out.flatten(0, -2)), rows.sum(0)
