"""Relative position bias: a table spread over the pairs of a window, and the gradient's fixed-order sum.

python benchmarks/relative_position_bias_bench.py [--only 'w16-*']
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
from bench import Bench, Cost, Run, own
from torch import Tensor

from d2it import ops


def inputs(window: int, heads: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    rng = torch.Generator(machine.device()).manual_seed(seed)
    shape = ((2 * window - 1) ** 2, heads)
    table = torch.randn(shape, generator=rng, device=machine.device(), dtype=torch.float32).to(dtype)
    return {"table": table, "window": window}


def ours(given: dict[str, Any], backend: str) -> Tensor:
    return ops.relative_position_bias(**given, backend=backend)


def eager() -> Run:
    return lambda given: ops.reference.relative_position_bias(**given)


def compiled() -> Run:
    function = torch.compile(ops.reference.relative_position_bias, fullgraph=True)
    return lambda given: function(**given)


def benches() -> Iterator[Bench]:
    cases = ((4, 6), (8, 12), (16, 16)) if machine.device() == "cuda" else ((4, 6), (8, 4))
    for window, heads in cases:
        for dtype in (torch.bfloat16, torch.float32) if machine.device() == "cuda" else (torch.float32,):
            contenders = own("relative_position_bias", ours)
            contenders["eager"] = eager
            contenders["compiled"] = compiled
            table, bias = (2 * window - 1) ** 2 * heads, window**4 * heads
            # Forward: read the table, write the bias. Backward: read the bias's gradient, write the table's.
            cost = Cost(bytes=(table + bias) * dtype.itemsize)
            yield Bench(
                case=f"w{window}-H{heads}-{str(dtype)[6:]}",
                shape={"window": window, "heads": heads},
                dtype=dtype,
                inputs=partial(inputs, window, heads, dtype),
                contenders=contenders,
                forward=cost,
                backward=cost,
                gradients=("table",),
                expected=lambda given: ops.reference.relative_position_bias(**given),
            )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "relative_position_bias", benches))
