"""Modulating and gating, the adaLN of DiT, on images and on packed rows, against the eager formula and the compiled.

python benchmarks/modulate_bench.py [--only 'gate-*'] [--seconds 1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
import torch.nn.functional as F
from bench import Bench, Cost, own, rivals
from torch import Tensor

from d2it import ops


def modulation(batch: int, rows: int, channels: int, packed: bool, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x, branch (B, L, C) or (B * L, C) with sample; shift, scale, gate: float32 slices of one projection (B, 6C)."""
    rng = torch.Generator(machine.device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=rng.device)

    sample = torch.arange(batch, device=rng.device).repeat_interleave(rows).int() if packed else None
    size = (batch * rows, channels) if packed else (batch, rows, channels)
    shift, scale, gate = (p.detach() for p in random(batch, 6 * channels).chunk(6, dim=1)[:3])
    return {
        "x": random(*size).to(dtype),
        "branch": random(*size).to(dtype),
        "shift": shift,
        "scale": scale,
        "gate": gate,
        "sample": sample,
    }


def of_rows(parameter: Tensor, sample: Tensor | None) -> Tensor:
    return parameter[:, None] if sample is None else parameter.index_select(0, sample)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor | None) -> Tensor:
    """As DiT has it; the result has the dtype of x."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (normal * (1 + of_rows(scale, sample)) + of_rows(shift, sample)).to(x.dtype)


def gated(x: Tensor, branch: Tensor, gate: Tensor, sample: Tensor | None) -> Tensor:
    """x + gate * branch; the result has the dtype of x."""
    return (x + of_rows(gate, sample) * branch).to(x.dtype)


def our_modulate(given: dict[str, Any], backend: str) -> Tensor:
    return ops.adaln_modulate(given["x"], given["shift"], given["scale"], sample=given["sample"], backend=backend)


def our_gated(given: dict[str, Any], backend: str) -> Tensor:
    return ops.gated_residual(given["x"], given["branch"], given["gate"], sample=given["sample"], backend=backend)


def gated_modulated(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, sample: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both, one after the other."""
    total = gated(x, branch, gate, sample)
    return total, modulate(total, shift, scale, sample)


def our_gated_modulated(given: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    tensors = (given[name] for name in ("x", "branch", "gate", "shift", "scale"))
    return ops.gated_residual_modulate(*tensors, sample=given["sample"], backend=backend)


OPERATORS: dict[str, tuple[str, Callable[..., Any], dict[str, Callable[..., Any]], tuple[str, ...]]] = {
    "adaln_modulate": ("modulate", our_modulate, {"layer_norm": modulate}, ("x", "shift", "scale")),
    "gated_residual": ("gate", our_gated, {"multiply + add": gated}, ("x", "branch", "gate")),
    "gated_residual_modulate": (
        "gate-modulate",
        our_gated_modulated,
        {"multiply + add, layer_norm": gated_modulated},
        ("x", "branch", "gate", "shift", "scale"),
    ),
}
"""Prefix of the cases, our operator, its rival, and the inputs with a gradient, in the rival's order."""


def costs(op: str, batch: int, rows: int, channels: int, packed: bool, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Forward and backward of an operator: parameters are float32, packed rows read an image number each, and a norm
    keeps two float32 a row. The gradient of gated_residual's x is the cotangent itself."""
    data = batch * rows * channels * dtype.itemsize
    parameter = 4 * batch * channels
    numbers = (4 * batch * rows if packed else 0) + (0 if op == "gated_residual" else 8 * batch * rows)
    tensors, parameters = {
        "adaln_modulate": ((2, 3), (2, 3)),
        "gated_residual": ((3, 3), (1, 2)),
        "gated_residual_modulate": ((4, 6), (3, 5)),
    }[op]
    forward, backward = (Cost(t * data + p * parameter + numbers) for t, p in zip(tensors, parameters))
    return forward, backward


def benches() -> Iterator[Bench]:
    gpu = machine.device() == "cuda"
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = (
        [
            (256, 256, 1152, False, bf16),  # the tokens of DiT-XL/2
            (256, 512, 1152, True, bf16),  # RefineNet at fill 0.5
            (32, 256, 1152, False, bf16),
            (32, 512, 1152, True, bf16),
            (256, 256, 768, False, bf16),
            (256, 512, 768, True, bf16),
            (32, 256, 384, False, fp32),
        ]
        if gpu
        else [(4, 256, 384, False, fp32), (4, 512, 384, True, fp32)]
    )
    for batch, rows, channels, packed, dtype in cases:
        kind = "packed" if packed else "images"
        name = f"B{batch}-L{rows}-C{channels}-{kind}-{str(dtype)[6:]}"
        shape = {"batch": batch, "rows": rows, "channels": channels, "packed": packed}
        inputs = partial(modulation, batch, rows, channels, packed, dtype)
        for op, (prefix, ours, rival, gradients) in OPERATORS.items():
            forward, backward = costs(op, batch, rows, channels, packed, dtype)
            yield Bench(
                case=f"{prefix}-{name}",
                shape=shape,
                dtype=dtype,
                inputs=inputs,
                contenders={**own(op, ours), **rivals(rival, *gradients, "sample")},
                forward=forward,
                backward=backward,
                gradients=gradients,
                expected=partial(ours, backend="reference"),
                operator=op,
            )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "adaln_modulate", benches))
