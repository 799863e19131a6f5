"""GELU by tanh with the gradient of the bias before it, against PyTorch's GELU and a sum over the rows.

python benchmarks/gelu_bench.py [--only 'B32-*'] [--seconds 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
import torch.nn.functional as F
from bench import Bench, Cost, own, rivals
from torch import Tensor

from d2it import ops


def hidden(batch: int, rows: int, channels: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x (B, L, C), an MLP's hidden layer, and its bias (C,) in float32."""
    rng = torch.Generator(machine.device()).manual_seed(seed)
    x = torch.randn(batch, rows, channels, generator=rng, device=rng.device).to(dtype)
    return {"x": x, "bias": torch.randn(channels, generator=rng, device=rng.device)}


class GeluAndSum(torch.autograd.Function):
    """What PyTorch does after a linear layer: GELU; the gradient of its input, which the layer sums over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.ops.aten.gelu_backward(grad, ctx.saved_tensors[0], approximate="tanh")
        return dx, dx.flatten(0, -2).sum(0).float()


def gelu_and_sum(x: Tensor, bias: Tensor) -> Tensor:
    return GeluAndSum.apply(x, bias)


def ours(given: dict[str, Any], backend: str) -> Tensor:
    return ops.gelu(given["x"], given["bias"], backend=backend)


def costs(batch: int, rows: int, channels: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Forward and backward: x and the result; x, its cotangent and its gradient, and the float32 one of the bias."""
    data = batch * rows * channels * dtype.itemsize
    return Cost(2 * data), Cost(3 * data + 4 * channels)


def benches() -> Iterator[Bench]:
    gpu = machine.device() == "cuda"
    # The hidden layers of DiT-XL/2, of RefineNet at fill 0.5, of DiT-B; on a CPU of DiT-S.
    shapes = [(256, 256, 4608), (256, 512, 4608), (32, 256, 4608), (256, 256, 3072)] if gpu else [(4, 256, 1536)]
    dtype = torch.bfloat16 if gpu else torch.float32
    for batch, rows, channels in shapes:
        forward, backward = costs(batch, rows, channels, dtype)
        yield Bench(
            case=f"B{batch}-L{rows}-C{channels}-{str(dtype)[6:]}",
            shape={"batch": batch, "rows": rows, "channels": channels},
            dtype=dtype,
            inputs=partial(hidden, batch, rows, channels, dtype),
            contenders={**own("gelu", ours), **rivals({"gelu, sum": gelu_and_sum}, "x", "bias")},
            forward=forward,
            backward=backward,
            gradients=("x", "bias"),
            expected=partial(ours, backend="reference"),
            operator="gelu",
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "gelu", benches))
