"""A training step of D2iT: packed, with masks over all cells, and of the DiT of the same width and depth.

python benchmarks/train_bench.py [--model XL B] [--batch-size 32] [--fill 0.5] [--only 'D2iT-XL*']

The step is the trainer's: noise, loss, backward, AdamW, average (d2it.training), on cached latents, bf16 on a GPU. Its
operations are 6 x the multiply-accumulates of the tokens that exist: for the masked contender, of all cells. "part"
lines time pieces of the packed step alone, uncompiled; the loader's is what reading and preparing a batch takes on the
host, which a step does not wait for unless it is longer than the step. The budget lines are steps at shares of the
tokens of the finest map (--budgets).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import machine
import numpy as np
import torch
from bench import TOLERANCE
from models import (
    SIZES,
    Case,
    Job,
    at_budgets,
    compilable,
    distance,
    dtype,
    grain_maps,
    main,
    open_gates,
    size_arguments,
)
from PIL import Image
from torch import Tensor

from d2it.data import ImageSource, LatentCache, build_cache, finish_cache
from d2it.distributed import World
from d2it.models import DynamicVAE
from d2it.training.config import Config
from d2it.training.learner import Batch
from d2it.training.stage import loader, to_device
from d2it.training.transformers import ContentStage, LatentData

CLASSES = 1000


def stage(options: argparse.Namespace, preset: str, *, masked: bool = False, compiled: bool = False) -> ContentStage:
    """The trainer's stage with open gates; presets of one size start from the same weights."""
    config = Config()
    config.data.num_classes = CLASSES
    settings = config.content
    settings.preset, settings.batch_size, settings.compile = preset, options.batch_size, compiled
    if masked:
        settings.overrides = {"masked": True}
    vae = DynamicVAE.preset_config("f8f16f32" if preset.endswith("-3") else "f8f16")
    data = LatentData.of_vae(vae, (options.image_size, options.image_size), images=options.batch_size)
    world = World(0, 1, 1, torch.device(machine.device()))
    made = ContentStage(config, settings, world, data, None)
    open_gates(made.network)
    return made


def batch_of(options: argparse.Namespace, made: ContentStage) -> Batch:
    rng = torch.Generator().manual_seed(0)
    shape = (options.batch_size, *made.data.latent_shape)
    batch = {
        "mean": torch.randn(shape, generator=rng),
        "std": torch.rand(shape, generator=rng),
        "grain_map": grain_maps(options, made.data.grid, made.data.num_grains),
        "label": torch.randint(CLASSES, (options.batch_size,), generator=rng),
    }
    return to_device(made.prepare(batch), made.world.device)


def gradients(made: ContentStage, batch: Batch) -> list[Tensor]:
    """Of one batch, with the same noise, timesteps and dropped labels for every contender."""
    learner = made.learners[0]
    torch.manual_seed(0)
    learner.backward(batch, last=True)
    found = [p.grad.cpu() if p.grad is not None else torch.zeros(p.shape) for p in learner.parameters]
    learner.optimizer.zero_grad(set_to_none=True)
    return found


class Reference:
    """The gradients of the masked model, in float32, computed when first asked for."""

    def __init__(self, options: argparse.Namespace, preset: str) -> None:
        self.options, self.preset = options, preset
        self.found: list[Tensor] | None = None

    def distance(self, made: ContentStage, batch: Batch) -> float:
        if self.found is None:
            exact = stage(self.options, self.preset, masked=True)
            exact.learners[0].bf16 = False
            self.found = gradients(exact, batch_of(self.options, exact))
        return distance(gradients(made, batch), self.found)


def step(options: argparse.Namespace, preset: str, reference: Reference | None, *, masked: bool, compiled: bool) -> Job:
    """The whole step."""
    if compiled:
        compilable(options)
    made = stage(options, preset, masked=masked, compiled=compiled)
    batch, learner = batch_of(options, made), made.learners[0]
    error = reference.distance(made, batch) if reference else None

    def call() -> None:
        learner.backward(batch, last=True)
        learner.update(0)

    return Job(call, options.batch_size, 6 * made.work(batch).macs, error, 2 * TOLERANCE[dtype()])


def part(options: argparse.Namespace, preset: str, name: str) -> Job:
    """A piece of the packed step: forward and backward of a half of the network, or the update."""
    made = stage(options, preset)
    batch, network, learner = batch_of(options, made), made.network, made.learners[0]
    device, config, count = made.world.device, network.config, options.batch_size
    if name == "optimiser":
        for p in learner.parameters:
            p.grad = torch.randn_like(p) * 1e-3
        learner.optimizer.found_inf = torch.zeros((), device=device)

        def update() -> None:
            learner.optimizer.step()
            learner.ema.update()

        return Job(update, count)
    t, y = torch.randint(1000, (count,), device=device), batch["label"]
    if name == "dense blocks":
        x = torch.randn(count, config.in_channels, *config.grid, device=device)
        forward: Callable[[], Tensor] = partial(network.multi_grained, x, t, y)
    else:
        plan = network.make_plan(batch["grain_map"], batch["capacity"])
        width = network.refine.in_features + config.num_grains
        features = torch.randn(plan.capacity, width, device=device)
        positions = torch.randn(plan.capacity, config.dim, device=device, dtype=dtype())
        forward = partial(network.refine, features, positions, t, y, sample=plan.sample, slots=plan.slots)

    def both() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.bf16):
            out = forward()
        out.backward(torch.randn_like(out))
        learner.optimizer.zero_grad(set_to_none=True)

    return Job(both, count)


class Noise(ImageSource):
    """Random pictures; the cache that is read holds random latents all the same."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size)
        self.count, self.labels = count, np.arange(count) % CLASSES
        self.num_classes, self.description = CLASSES, "noise"

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (self.image_size[1], self.image_size[0]), (index % 256, 0, 0))


def reading(options: argparse.Namespace, preset: str) -> Job:
    """A batch from the latent cache, as the trainer's loader makes it."""
    made = stage(options, preset)
    data = made.data
    opened = contextlib.ExitStack()
    folder = opened.enter_context(tempfile.TemporaryDirectory())

    def encode(images: Tensor) -> dict[str, Tensor]:
        found = {"entropy": torch.rand(len(images), *data.grid)}
        for grain, factor in enumerate(reversed(data.downsampling)):
            shape = (len(images), data.latent_shape[0], *(side // factor for side in data.image_size))
            found |= {f"mean.{grain}": torch.randn(shape), f"std.{grain}": torch.rand(shape)}
        return found

    # Of three grains half of the finer regions are finest, as in `grain_maps`.
    limits = [1 - options.fill * i / (data.num_grains - 1) for i in range(data.num_grains - 1, 0, -1)]
    facts: dict[str, Any] = {"thresholds": limits, "downsampling": list(data.downsampling), "scaling_factor": 1.0}
    build_cache(folder, Noise(options.image_size, 4 * options.batch_size), encode, facts=facts)
    finish_cache(folder)
    stream = loader(made.config, made.settings, LatentCache(folder), made.world, 0, made.prepare)
    batches = iter(opened.enter_context(stream))
    return Job(lambda: next(batches), options.batch_size, host=True, close=opened.close)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for size in options.model:
        preset, baseline = SIZES[size]
        reference = Reference(options, preset)
        contenders: dict[str, tuple[str, Callable[[], Job]]] = {}
        for how in ("compiled", "eager"):
            flag = {"compiled": how == "compiled"}
            contenders[f"d2it packed {how}"] = preset, partial(step, options, preset, reference, masked=False, **flag)
            contenders[f"masked {how}"] = preset, partial(step, options, preset, reference, masked=True, **flag)
            contenders[f"dit {how}"] = baseline, partial(step, options, baseline, None, masked=False, **flag)
        for name in ("dense blocks", "RefineNet", "optimiser"):
            contenders[f"part: {name}"] = preset, partial(part, options, preset, name)
        contenders["part: loader"] = preset, partial(reading, options, preset)
        shape = {"batch": options.batch_size, "image_size": options.image_size, "fill": options.fill}
        name = f"{preset}-{options.image_size}-B{options.batch_size}-fill{options.fill:g}-{str(dtype())[6:]}"
        yield Case(name, shape, dtype(), "step", contenders)
        for budget, spending, entries in at_budgets(options, preset):
            shape = {"batch": options.batch_size, "image_size": options.image_size, **entries}
            name = f"{preset}-{options.image_size}-B{options.batch_size}-budget{budget:g}-{str(dtype())[6:]}"
            reference = Reference(spending, preset)
            job = partial(step, spending, preset, reference, masked=False, compiled=False)
            yield Case(name, shape, dtype(), "step", {"d2it packed eager": (preset, job)})


if __name__ == "__main__":
    raise SystemExit(main("train", size_arguments(__doc__).parse_args(), cases))
