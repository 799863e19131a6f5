"""neighbor_copy against repeating or interpolating every grain and choosing with `where`.

python benchmarks/neighbor_copy_bench.py [--only 'B30-*'] [--seconds 1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import command
import machine
import torch
import torch.nn.functional as F
from bench import Bench, Cost, Run, own
from torch import Tensor

from d2it import ops


def grain_map(batch: int, side: int, fills: Sequence[float], rng: torch.Generator) -> Tensor:
    """(batch, side, side): `fills` are the shares of the grains. In patches, as in photographs."""
    noise = torch.rand(batch, 1, max(side // 4, 1) + 1, max(side // 4, 1) + 1, generator=rng, device=rng.device)
    field = F.interpolate(noise, size=(side, side), mode="bilinear")[:, 0]
    order = field.flatten().argsort().argsort().reshape(field.shape) / field.numel()
    limits = torch.tensor(fills, device=rng.device).cumsum(0)[:-1]
    return torch.bucketize(order, limits, right=True)


def inputs(
    batch: int, channels: int, side: int, fills: Sequence[float], dtype: torch.dtype, layout: Any, seed: int
) -> dict[str, Any]:
    rng = torch.Generator(machine.device()).manual_seed(seed)
    latents = [
        torch.randn(batch, channels, side << i, side << i, generator=rng, device=rng.device)
        .to(dtype)
        .contiguous(memory_format=layout)
        for i in range(len(fills))
    ]
    return {"latents": latents, "grain_map": grain_map(batch, side, fills, rng)}


def ours(given: dict[str, Any], backend: str) -> Tensor:
    return ops.neighbor_copy(**given, backend=backend)


def repeat(x: Tensor, ratio: int) -> Tensor:
    return x.repeat_interleave(ratio, -2).repeat_interleave(ratio, -1)


def interpolate(x: Tensor, ratio: int) -> Tensor:
    return F.interpolate(x, scale_factor=ratio, mode="nearest")


def choose(widen: Callable[[Tensor, int], Tensor], latents: list[Tensor], grain_map: Tensor) -> Tensor:
    side = latents[-1].shape[-1]
    grains = repeat(grain_map, side // grain_map.shape[-1])[:, None]
    merged = latents[-1]
    for i, latent in enumerate(latents[:-1]):
        merged = torch.where(grains == i, widen(latent, side // latent.shape[-1]), merged)
    return merged


def rival(widen: Callable[[Tensor, int], Tensor], compiled: bool) -> Run:
    function = torch.compile(choose, fullgraph=True) if compiled else choose
    return lambda given: function(widen, **given)


SECTOR = 32
"""Bytes that memory moves at once; a CPU moves twice as many."""


def share_moved(grain_map: Tensor, grain: int, together: int) -> float:
    """Of the sectors of a grain's latents, each of `together` adjacent cells, the share that has a cell to be read."""
    wanted = (grain_map == grain).repeat_interleave(1 << grain, 1).repeat_interleave(1 << grain, 2)
    return wanted.flatten(1).unflatten(1, (-1, together)).any(-1).float().mean().item()


def shares_moved(
    batch: int, channels: int, side: int, fills: Sequence[float], dtype: torch.dtype, layout: Any
) -> list[float]:
    """`share_moved` of every grain, on a map like those that are measured."""
    of_cell = dtype.itemsize * (1 if layout is torch.contiguous_format else channels)
    regions = grain_map(batch, side, fills, torch.Generator().manual_seed(0))
    return [share_moved(regions, grain, max(SECTOR // of_cell, 1)) for grain in range(len(fills))]


def costs(
    batch: int, channels: int, side: int, fills: Sequence[float], dtype: torch.dtype, layout: Any
) -> tuple[Cost, Cost]:
    """Floors of forward and backward: of every grain the sectors with a cell that is read, and the finest grid; its
    gradient, and every grain's."""
    # Of a coarser grain, a fine cell is a quarter, a sixteenth, ... of an element.
    finest = batch * channels * (side << len(fills) - 1) ** 2 * dtype.itemsize
    sizes = [0.25**i for i in range(len(fills) - 1, -1, -1)]
    regions = batch * side**2 * 8
    moved = shares_moved(batch, channels, side, fills, dtype, layout)
    read = sum(share * size for share, size in zip(moved, sizes))
    return Cost(bytes=int(finest * (read + 1)) + regions), Cost(bytes=int(finest * (1 + sum(sizes))) + regions)


def benches() -> Iterator[Bench]:
    gpu = machine.device() == "cuda"
    half, tenth, three = (0.5, 0.5), (0.9, 0.1), (0.3, 0.3, 0.4)
    rows, pixels = torch.contiguous_format, torch.channels_last
    # The features that the DynamicVAE merges (256 channels) and latents (4), on grids of 256-pixel images.
    cases = (
        [
            (30, 256, 16, half, torch.float32, rows),
            (256, 256, 16, half, torch.bfloat16, rows),
            (256, 256, 16, tenth, torch.bfloat16, rows),
            (256, 256, 16, (0.0, 1.0), torch.bfloat16, rows),
            (256, 256, 16, half, torch.bfloat16, pixels),
            (64, 256, 8, three, torch.bfloat16, rows),
            (64, 256, 8, three, torch.bfloat16, pixels),
            (256, 4, 16, half, torch.float32, rows),
        ]
        if gpu
        else [
            (4, 256, 16, half, torch.float32, rows),
            (4, 256, 16, half, torch.float32, pixels),
            (4, 256, 16, half, torch.bfloat16, rows),
            (2, 256, 8, three, torch.float32, rows),
            (32, 4, 16, half, torch.float32, rows),
        ]
    )
    for batch, channels, side, fills, dtype, layout in cases:
        contenders = own("neighbor_copy", ours)
        for name, widen in (("repeat_interleave", repeat), ("interpolate", interpolate)):
            contenders[f"eager {name} + where"] = partial(rival, widen, False)
            contenders[f"compiled {name} + where"] = partial(rival, widen, True)
        forward, backward = costs(batch, channels, side, fills, dtype, layout)
        yield Bench(
            case=f"B{batch}-C{channels}-{side}x{side}-fill{'-'.join(map(str, fills[1:]))}-{str(dtype)[6:]}"
            f"{'-channels_last' if layout is pixels else ''}",
            shape={"batch": batch, "channels": channels, "regions": side, "fill": fills[-1], "fills": list(fills)},
            dtype=dtype,
            inputs=partial(inputs, batch, channels, side, fills, dtype, layout),
            contenders=contenders,
            forward=forward,
            backward=backward,
            gradients=("latents",),
            expected=lambda given: ops.reference.neighbor_copy(**given),
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "neighbor_copy", benches))
