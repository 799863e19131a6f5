"""Planning, packing, merging and modulating tokens against what PyTorch offers for them.

    python benchmarks/packing_bench.py [--only 'pack-*'] [--seconds 1]

The plan, the boolean mask and the indices are given where they are not what is measured: packing, merging and
modulating are timed alone. A contender that finds its indices in the call ("nonzero + ...") says so by its name.
One window covers an image's grid, so that rows lie as a boolean mask has them and results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import Bench, Cost, Run, Skip
from neighbor_copy_bench import grain_map
from torch import Tensor

from d2it import ops

SIDE, REGION = 16, 2  # a 256-pixel image: 16 x 16 regions of 2 x 2 cells
CELLS = (SIDE * REGION) ** 2


def maps(batch: int, fill: float, seed: int) -> Tensor:
    rng = torch.Generator(common.device()).manual_seed(seed)
    return grain_map(batch, SIDE, (1 - fill, fill), rng)


def on(operator: Callable[..., Any], backend: str) -> Run:
    return lambda given: operator(given, backend)


def own(op: str, operator: Callable[..., Any]) -> dict[str, Callable[[], Run]]:
    """Our contenders: the fast backends, or the reference where there is none."""
    backends = [name for name in ops.available_backends(op) if name != "reference"]
    return {f"d2it {name}": partial(on, operator, name) for name in backends or ["reference"]}


def rivals(functions: dict[str, Callable[..., Any]], *arguments: str) -> dict[str, Callable[[], Run]]:
    """Each function on these inputs, eager and compiled."""

    def eager(function: Callable[..., Any]) -> Run:
        return lambda given: function(*(given[name] for name in arguments))

    contenders: dict[str, Callable[[], Run]] = {}
    for name, function in functions.items():
        contenders[f"eager {name}"] = partial(eager, function)
        contenders[f"compiled {name}"] = lambda function=function: eager(torch.compile(function))
    return contenders


# -------------------------------------------------------------------------------------------------
# Plan


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


def plan_benches() -> Iterator[Bench]:
    for batch, window in ((256, 16), (32, 16), (256, 4)) if common.device() == "cuda" else ((32, 16), (256, 4)):

        def inputs(seed: int, batch: int = batch, window: int = window) -> dict[str, Any]:
            grains = maps(batch, 0.5, seed)
            capacity = int((grains >= 1).sum()) * REGION**2
            return {"grain_map": grains, "cells_per_region": REGION, "window": window, "capacity": capacity}

        rows = batch * CELLS // 2
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
            forward=Cost(bytes=batch * SIDE**2 * 8 + 2 * 4 * batch * CELLS + 2 * 4 * rows),
            expected=plan_by_cumsum,
            operator="plan_tokens",
        )


# -------------------------------------------------------------------------------------------------
# Pack and merge


def tokens(batch: int, channels: int, fill: float, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x and base (B, L, C), packed (T, C), the plan, and the same as a mask (B, L), indices (T,) and a count."""
    rng = torch.Generator(common.device()).manual_seed(seed)
    grains = maps(batch, fill, seed)
    count = int((grains >= 1).sum()) * REGION**2
    plan = ops.plan_tokens(grains, cells_per_region=REGION, window=SIDE * REGION, capacity=count)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=rng.device, dtype=torch.float32).to(dtype)

    return {
        "x": random(batch, CELLS, channels),
        "base": random(batch, CELLS, channels),
        "packed": random(count, channels),
        "mask": (plan.inverse >= 0).reshape(batch, CELLS),
        "index": plan.index.long(),
        "count": count,
        "plan": plan,
    }


def pack_by_unpad(compiled: bool) -> Run:
    try:
        from flash_attn.bert_padding import unpad_input
    except ImportError as error:
        raise Skip("flash-attn is not installed") from error

    def pack(x: Tensor, mask: Tensor) -> Tensor:
        return unpad_input(x, mask)[0]

    function = torch.compile(pack) if compiled else pack
    return lambda given: function(given["x"], given["mask"])


def merge_by_pad(compiled: bool) -> Run:
    try:
        from flash_attn.bert_padding import pad_input
    except ImportError as error:
        raise Skip("flash-attn is not installed") from error

    def merge(packed: Tensor, base: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        return torch.where(mask[..., None], pad_input(packed, index, *mask.shape), base)

    function = torch.compile(merge) if compiled else merge
    return lambda given: function(given["packed"], given["base"], given["mask"], given["index"])


def no_nested_merge() -> Run:
    raise Skip("a nested tensor pads its rows at the end, it does not put them back into chosen cells")


PACK: dict[str, Callable[..., Tensor]] = {
    "boolean mask": lambda x, mask, index, count: x[mask],
    "nonzero + index_select": lambda x, mask, index, count: x.flatten(0, 1).index_select(
        0, mask.flatten().nonzero().squeeze(1)
    ),
    "nonzero_static + index_select": lambda x, mask, index, count: x.flatten(0, 1).index_select(
        0, torch.nonzero_static(mask.flatten(), size=count).squeeze(1)
    ),
    "index_select, indices given": lambda x, mask, index, count: x.flatten(0, 1).index_select(0, index),
    # The values of a jagged nested tensor of the images' tokens.
    "nested tensor": lambda x, mask, index, count: torch.nested.as_nested_tensor(
        [image[which] for image, which in zip(x.unbind(), mask.unbind())], layout=torch.jagged
    ).values(),
}


def merge_by_mask(packed: Tensor, base: Tensor, mask: Tensor, index: Tensor, count: int) -> Tensor:
    out = base.clone()
    out[mask] = packed
    return out


MERGE: dict[str, Callable[..., Tensor]] = {
    "boolean mask": merge_by_mask,
    "masked_scatter": lambda packed, base, mask, index, count: base.masked_scatter(mask[..., None], packed),
    "nonzero + index_copy": lambda packed, base, mask, index, count: (
        base.flatten(0, 1).index_copy(0, mask.flatten().nonzero().squeeze(1), packed).reshape(base.shape)
    ),
    "nonzero_static + index_copy": lambda packed, base, mask, index, count: (
        base.flatten(0, 1)
        .index_copy(0, torch.nonzero_static(mask.flatten(), size=count).squeeze(1), packed)
        .reshape(base.shape)
    ),
    "index_copy, indices given": lambda packed, base, mask, index, count: (
        base.flatten(0, 1).index_copy(0, index, packed).reshape(base.shape)
    ),
}


def moving_benches() -> Iterator[Bench]:
    gpu = common.device() == "cuda"
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = (
        # D2iT packs latents, a dozen channels; other models the width of their hidden states.
        [
            (256, 1152, 0.5, bf16),
            (256, 12, 0.5, bf16),
            (32, 1152, 0.5, bf16),
            (256, 768, 0.5, bf16),
            (256, 1152, 0.1, bf16),
            (256, 1152, 1.0, bf16),
            (32, 768, 0.5, fp32),
            (32, 384, 0.5, bf16),
            (256, 1024, 0.5, bf16),
            (32, 12, 0.5, fp32),
        ]
        if gpu
        else [(32, 12, 0.5, fp32), (32, 4, 0.1, fp32), (32, 12, 1.0, bf16), (4, 384, 0.5, fp32), (4, 768, 0.5, bf16)]
    )
    for batch, channels, fill, dtype in cases:
        name = f"B{batch}-C{channels}-fill{fill}-{str(dtype)[6:]}"
        shape = {"batch": batch, "cells": CELLS, "channels": channels, "fill": fill}
        row, cells = channels * dtype.itemsize, batch * CELLS
        count = round(batch * SIDE**2 * fill) * REGION**2
        yield Bench(
            case=f"pack-{name}",
            shape=shape,
            dtype=dtype,
            inputs=partial(tokens, batch, channels, fill, dtype),
            contenders={
                **own(
                    "pack_tokens", lambda given, backend: ops.pack_tokens(given["x"], given["plan"], backend=backend)
                ),
                **rivals(PACK, "x", "mask", "index", "count"),
                "eager flash-attn unpad_input": partial(pack_by_unpad, False),
                "compiled flash-attn unpad_input": partial(pack_by_unpad, True),
            },
            forward=Cost(bytes=2 * count * row + 4 * count),
            backward=Cost(bytes=(count + cells) * row + 4 * cells),
            gradients=("x",),
            expected=lambda given: ops.reference.pack_tokens(given["x"], given["plan"]),
            operator="pack_tokens",
        )
        yield Bench(
            case=f"merge-{name}",
            shape=shape,
            dtype=dtype,
            inputs=partial(tokens, batch, channels, fill, dtype),
            contenders={
                **own(
                    "unpack_tokens",
                    lambda given, backend: ops.unpack_tokens(
                        given["packed"], given["plan"], given["base"], backend=backend
                    ),
                ),
                **rivals(MERGE, "packed", "base", "mask", "index", "count"),
                "eager flash-attn pad_input + where": partial(merge_by_pad, False),
                "compiled flash-attn pad_input + where": partial(merge_by_pad, True),
                "nested tensor": no_nested_merge,
            },
            forward=Cost(bytes=2 * cells * row + 4 * cells),
            backward=Cost(bytes=(2 * cells + count) * row + 4 * (cells + count)),
            gradients=("packed", "base"),
            expected=lambda given: ops.reference.unpack_tokens(given["packed"], given["plan"], given["base"]),
            operator="unpack_tokens",
        )


# -------------------------------------------------------------------------------------------------
# Modulate


def modulation(batch: int, rows: int, channels: int, packed: bool, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x, branch (B, L, C) or (B * L, C) with sample; shift, scale, gate: slices of one projection (B, 6C)."""
    rng = torch.Generator(common.device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=rng.device).to(dtype)

    sample = torch.arange(batch, device=rng.device).repeat_interleave(rows).int() if packed else None
    size = (batch * rows, channels) if packed else (batch, rows, channels)
    shift, scale, gate = (p.detach() for p in random(batch, 6 * channels).chunk(6, dim=1)[:3])
    return {
        "x": random(*size),
        "branch": random(*size),
        "shift": shift,
        "scale": scale,
        "gate": gate,
        "sample": sample,
    }


def of_rows(parameter: Tensor, sample: Tensor | None) -> Tensor:
    return parameter[:, None] if sample is None else parameter.index_select(0, sample)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor | None) -> Tensor:
    """As DiT has it, in the dtype of x."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + of_rows(scale, sample)) + of_rows(shift, sample)


def gated(x: Tensor, branch: Tensor, gate: Tensor, sample: Tensor | None) -> Tensor:
    return x + of_rows(gate, sample) * branch


def modulation_benches() -> Iterator[Bench]:
    gpu = common.device() == "cuda"
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
        data = batch * rows * channels * dtype.itemsize + (4 * batch * rows if packed else 0)
        parameter = batch * channels * dtype.itemsize
        inputs = partial(modulation, batch, rows, channels, packed, dtype)

        def ours_modulate(given: dict[str, Any], backend: str) -> Tensor:
            return ops.adaln_modulate(
                given["x"], given["shift"], given["scale"], sample=given["sample"], backend=backend
            )

        def ours_gated(given: dict[str, Any], backend: str) -> Tensor:
            return ops.gated_residual(
                given["x"], given["branch"], given["gate"], sample=given["sample"], backend=backend
            )

        yield Bench(
            case=f"modulate-{name}",
            shape=shape,
            dtype=dtype,
            inputs=inputs,
            contenders={
                **own("adaln_modulate", ours_modulate),
                **rivals({"layer_norm": modulate}, "x", "shift", "scale", "sample"),
            },
            forward=Cost(bytes=2 * data + 2 * parameter),
            backward=Cost(bytes=3 * data + 3 * parameter),
            gradients=("x", "shift", "scale"),
            expected=lambda given: ours_modulate(given, "reference"),
            operator="adaln_modulate",
        )
        yield Bench(
            case=f"gate-{name}",
            shape=shape,
            dtype=dtype,
            inputs=inputs,
            contenders={
                **own("gated_residual", ours_gated),
                **rivals({"multiply + add": gated}, "x", "branch", "gate", "sample"),
            },
            forward=Cost(bytes=3 * data + parameter),
            # The gradient of x is the cotangent itself.
            backward=Cost(bytes=3 * data + 2 * parameter),
            gradients=("x", "branch", "gate"),
            expected=lambda given: ours_gated(given, "reference"),
            operator="gated_residual",
        )


def benches() -> Iterator[Bench]:
    """The shapes of the largest preset first: a run that is cut short has measured them."""
    moving, modulating = list(moving_benches()), list(modulation_benches())
    yield from plan_benches()
    yield from moving[:4]
    yield from modulating[:4]
    yield from moving[4:]
    yield from modulating[4:]


if __name__ == "__main__":
    raise SystemExit(common.main(__doc__, "pack_tokens", benches))
