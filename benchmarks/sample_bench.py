"""Sampling with D2iT and with the DiT of the same width and depth: images/s, memory, share of the matrix product rate.

python benchmarks/sample_bench.py [--model XL] [--batch-size 32] [--fill 0.5] [--only '*guided*']

Timed is `sample_content` over a few DDIM steps (the case names their number): latents of given maps, without and
with guidance (two passes a step), packed and with masks over all cells, eager, compiled, and as a CUDA graph. images/s
counts these steps; for 250 steps divide by 250 / steps. The budget lines are guided sampling at shares of the tokens of
the finest map (--budgets): seconds should follow their multiply-accumulates. Grain maps and decoding are not in it,
both small beside hundreds of steps. The error is that of the model's answer on one noised batch, against the masked
one in float32. Models compute, and hold the weights of their blocks, in the dtype that --precision auto takes, which
the case names; on a CPU where that is bfloat16, a case in float32 stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import machine
import torch
from bench import TOLERANCE, Skip
from models import (
    SIZES,
    Case,
    Job,
    at_budgets,
    case_name,
    case_shape,
    compilable,
    distance,
    each_batch,
    each_dtype,
    grain_maps,
    main,
    open_gates,
    size_arguments,
)
from torch import Tensor

from d2it.diffusion import Guidance, sample_content
from d2it.models import DiT, DynamicContentTransformer
from d2it.models.flops import count_macs, fine_tokens
from d2it.models.layers import cast_blocks

STEPS = 10 if machine.device() == "cuda" else 2
GUIDANCE = 1.5


def build(options: argparse.Namespace, preset: str, **settings: Any) -> DiT | DynamicContentTransformer:
    """Models of one preset have the same weights, but for their rounding to `options.dtype`."""
    kind = DynamicContentTransformer if preset.startswith("D2iT") else DiT
    torch.manual_seed(0)
    model = kind.from_preset(preset, image_size=options.image_size, **settings)
    open_gates(model)
    model.to(machine.device()).eval()
    cast_blocks(model.transformer_blocks(), options.dtype)
    return model


def maps_of(options: argparse.Namespace, model: Any) -> Tensor:
    return grain_maps(options, model.config.region_grid, model.config.num_grains).to(machine.device())


@torch.no_grad()
def answer(model: Any, options: argparse.Namespace) -> list[Tensor]:
    """The answer of a model in `options.dtype` on one batch, the same for every contender."""
    rng = torch.Generator().manual_seed(0)
    count, where = options.batch_size, machine.device()
    x = torch.randn(count, model.config.in_channels, *model.config.grid, generator=rng).to(where)
    t, y = (torch.randint(high, (count,), generator=rng).to(where) for high in (1000, model.config.num_classes))
    with torch.autocast(where, torch.bfloat16, enabled=options.dtype == torch.bfloat16):
        return [model(x, t, y, maps_of(options, model)).float().cpu()]


class Reference:
    """What the masked model answers in float32, computed when first asked for."""

    def __init__(self, options: argparse.Namespace, preset: str) -> None:
        self.options, self.preset = argparse.Namespace(**{**vars(options), "dtype": torch.float32}), preset
        self.found: list[Tensor] | None = None

    def distance(self, model: Any, options: argparse.Namespace) -> float:
        if self.found is None:
            self.found = answer(build(self.options, self.preset, masked=True), self.options)
        return distance(answer(model, options), self.found)


def sampling(
    options: argparse.Namespace, preset: str, reference: Reference | None, *, guided: bool, how: str, **settings: Any
) -> Job:
    """STEPS steps over one batch."""
    if how == "graph" and machine.device() == "cpu":
        raise Skip("CUDA graphs need a GPU")
    if how == "compiled":
        compilable(options)
    model = build(options, preset, **settings)
    if how != "eager":  # the graph is one of compiled blocks
        model.compile_blocks()
    count = options.batch_size
    maps = maps_of(options, model) if reference else None
    fine = None if maps is None else fine_tokens(maps.cpu(), model.config)
    arguments: dict[str, Any] = {
        "labels": torch.arange(count) % model.config.num_classes,
        "seeds": range(count),
        "scheduler": "ddim",
        "steps": STEPS,
        "guidance": Guidance(GUIDANCE if guided else 1.0),
        "autocast": None if options.dtype == torch.float32 else options.dtype,
        "cuda_graph": how == "graph",
    }
    flops = 2 * STEPS * (1 + guided) * count_macs(model.config, count, fine).total
    error = reference.distance(model, options) if reference else None
    return Job(partial(sample_content, model, maps, **arguments), count, flops, error, 2 * TOLERANCE[options.dtype])


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for batch in each_batch(options):
        yield from cases_of(batch)


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The cases of one batch."""
    for size in options.model:
        preset, baseline = SIZES[size]
        reference = Reference(options, preset)
        auto, *others = each_dtype(options, preset)
        for guided in (True, False):
            for some in (auto, *others):
                yield case_of(some, preset, baseline, reference, guided)
        for budget, spending, entries in at_budgets(auto, preset):
            job = partial(sampling, spending, preset, Reference(spending, preset), guided=True, how="eager")
            name = case_name(auto, preset, f"budget{budget:g}-{STEPS}steps-guided")
            shape = case_shape(auto, guided=True, steps=STEPS, **entries)
            yield Case(name, shape, auto.dtype, f"{STEPS} steps", {"d2it packed eager": (preset, job)})


def case_of(options: argparse.Namespace, preset: str, baseline: str, reference: Reference, guided: bool) -> Case:
    """Sampling in the dtype of the options."""
    contenders: dict[str, tuple[str, Callable[[], Job]]] = {}
    for how in ("graph", "compiled", "eager"):
        given: dict[str, Any] = {"guided": guided, "how": how}
        contenders[f"d2it packed {how}"] = preset, partial(sampling, options, preset, reference, **given)
        if how != "graph":
            masked = partial(sampling, options, preset, reference, masked=True, **given)
            contenders[f"masked {how}"] = preset, masked
        contenders[f"dit {how}"] = baseline, partial(sampling, options, baseline, None, **given)
    name = case_name(options, preset, f"fill{options.fill:g}-{STEPS}steps{'-guided' if guided else ''}")
    shape = case_shape(options, fill=options.fill, guided=guided, steps=STEPS)
    return Case(name, shape, options.dtype, f"{STEPS} steps", contenders)


if __name__ == "__main__":
    raise SystemExit(main("sample", size_arguments(__doc__).parse_args(), cases))
