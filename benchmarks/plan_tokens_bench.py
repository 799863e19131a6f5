"""Planning the tokens of a grain map, against the nonzero and the cumulative sum of eager code.

python benchmarks/plan_tokens_bench.py [--only 'B256-*'] [--seconds 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import command
import machine
import torch
from bench import Bench, Cost, own
from neighbor_copy_bench import grain_map
from torch import Tensor

from d2it import ops

SIDE, REGION = 16, 2  # a 256-pixel image: 16 x 16 regions of 2 x 2 cells
CELLS = (SIDE * REGION) ** 2


def maps(batch: int, fill: float, seed: int) -> Tensor:
    rng = torch.Generator(machine.device()).manual_seed(seed)
    return grain_map(batch, SIDE, (1 - fill, fill), rng)


def plan_fields(plan: ops.TokenPlan) -> tuple[Tensor, ...]:
    return plan.index, plan.inverse, plan.slots, plan.sample, plan.count


def plan_with(given: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    return plan_fields(ops.plan_tokens(**given, backend=backend))


def plan_by_cumsum(given: dict[str, Any]) -> tuple[Tensor, ...]:
    return plan_fields(ops.reference.plan_tokens(**given))


def plan_by_nonzero(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """As the masks of an eager model would: nonzero, and a scatter for the way back."""
    fine = given["grain_map"].repeat_interleave(REGION, 1).repeat_interleave(REGION, 2) >= 1
    batch, height, width = fine.shape
    windows = ops.reference.to_windows(fine, given["window"])
    where = ops.reference.to_windows(
        torch.arange(fine.numel(), device=fine.device).reshape(fine.shape), given["window"]
    ).flatten()
    places = windows.flatten().nonzero().squeeze(1)
    rows = torch.arange(places.shape[0], device=fine.device)
    index = where[places]
    slots = torch.full((fine.numel(),), -1, device=fine.device)
    slots[places] = rows
    inverse = torch.full_like(slots, -1)
    inverse[index] = rows
    count = torch.tensor(places.shape[0], device=fine.device)
    return index, inverse, slots.reshape(windows.shape), index // (height * width), count


def cost(batch: int) -> Cost:
    """Reads the maps; writes a number for every cell and slot, and two for each of the rows, half as many."""
    return Cost(batch * SIDE**2 * 8 + 2 * 4 * batch * CELLS + 2 * 4 * (batch * CELLS // 2))


def benches() -> Iterator[Bench]:
    for batch, window in ((256, 16), (32, 16), (256, 4)) if machine.device() == "cuda" else ((32, 16), (256, 4)):

        def inputs(seed: int, batch: int = batch, window: int = window) -> dict[str, Any]:
            grains = maps(batch, 0.5, seed)
            capacity = int((grains >= 1).sum()) * REGION**2
            return {"grain_map": grains, "cells_per_region": REGION, "window": window, "capacity": capacity}

        yield Bench(
            case=f"plan-B{batch}-{SIDE}x{SIDE}-w{window}",
            shape={"batch": batch, "regions": SIDE, "window": window, "fill": 0.5},
            dtype=torch.float32,
            inputs=inputs,
            contenders={
                **own("plan_tokens", plan_with),
                "eager cumsum": lambda: plan_by_cumsum,
                "compiled cumsum": lambda: torch.compile(plan_by_cumsum),
                "eager nonzero": lambda: plan_by_nonzero,
                "compiled nonzero": lambda: torch.compile(plan_by_nonzero),
            },
            forward=cost(batch),
            expected=plan_by_cumsum,
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "plan_tokens", benches))
