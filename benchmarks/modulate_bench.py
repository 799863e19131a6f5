"""Modulating and gating, the adaLN of DiT, on images and on packed rows, against the eager formula and the compiled.

python benchmarks/modulate_bench.py [--only 'gate-*'] [--seconds 1]
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


def costs(op: str, batch: int, rows: int, channels: int, packed: bool, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Forward and backward of "adaln_modulate" or "gated_residual": parameters are float32; packed rows read an image
    number each. The gradient of gated_residual's x is the cotangent itself."""
    data = batch * rows * channels * dtype.itemsize + (4 * batch * rows if packed else 0)
    parameter = 4 * batch * channels
    if op == "adaln_modulate":
        return Cost(2 * data + 2 * parameter), Cost(3 * data + 3 * parameter)
    return Cost(3 * data + parameter), Cost(3 * data + 2 * parameter)


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
        modulate_costs, gate_costs = (
            costs(op, batch, rows, channels, packed, dtype) for op in ("adaln_modulate", "gated_residual")
        )
        inputs = partial(modulation, batch, rows, channels, packed, dtype)

        yield Bench(
            case=f"modulate-{name}",
            shape=shape,
            dtype=dtype,
            inputs=inputs,
            contenders={
                **own("adaln_modulate", our_modulate),
                **rivals({"layer_norm": modulate}, "x", "shift", "scale", "sample"),
            },
            forward=modulate_costs[0],
            backward=modulate_costs[1],
            gradients=("x", "shift", "scale"),
            expected=lambda given: our_modulate(given, "reference"),
            operator="adaln_modulate",
        )
        yield Bench(
            case=f"gate-{name}",
            shape=shape,
            dtype=dtype,
            inputs=inputs,
            contenders={
                **own("gated_residual", our_gated),
                **rivals({"multiply + add": gated}, "x", "branch", "gate", "sample"),
            },
            forward=gate_costs[0],
            backward=gate_costs[1],
            gradients=("x", "branch", "gate"),
            expected=lambda given: our_gated(given, "reference"),
            operator="gated_residual",
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "adaln_modulate", benches))
