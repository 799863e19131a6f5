"""Packing tokens by a plan and merging them back, against what PyTorch and flash-attn offer for it.

    python benchmarks/pack_tokens_bench.py [--only 'pack-*'] [--seconds 1]

The plan, the boolean mask and the indices are given: packing and merging are timed alone. A contender that finds its
indices within the call has "nonzero" in its name. One window covers an image's grid, so that rows lie in the order of
a boolean mask and results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
from bench import Bench, Cost, Run, Skip, own, rivals
from plan_tokens_bench import CELLS, REGION, SIDE, maps
from torch import Tensor

from d2it import ops


def tokens(batch: int, channels: int, fill: float, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """x and base (B, L, C), packed (T, C), the plan, and the same as a mask (B, L), indices (T,) and a count."""
    rng = torch.Generator(machine.device()).manual_seed(seed)
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


def costs(batch: int, channels: int, fill: float, dtype: torch.dtype) -> tuple[tuple[Cost, Cost], tuple[Cost, Cost]]:
    """(forward, backward) of packing and of merging: rows, and the indices that name them."""
    row, cells = channels * dtype.itemsize, batch * CELLS
    count = round(batch * SIDE**2 * fill) * REGION**2
    pack = Cost(2 * count * row + 4 * count), Cost((count + cells) * row + 4 * cells)
    merge = Cost(2 * cells * row + 4 * cells), Cost((2 * cells + count) * row + 4 * (cells + count))
    return pack, merge


def benches() -> Iterator[Bench]:
    gpu = machine.device() == "cuda"
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
        pack, merge = costs(batch, channels, fill, dtype)
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
            forward=pack[0],
            backward=pack[1],
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
            forward=merge[0],
            backward=merge[1],
            gradients=("packed", "base"),
            expected=lambda given: ops.reference.unpack_tokens(given["packed"], given["plan"], given["base"]),
            operator="unpack_tokens",
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "pack_tokens", benches))
