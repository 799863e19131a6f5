"""What a stage is about to do, in a few lines, and what a step of it costs."""

from __future__ import annotations

import time

import torch

from d2it.distributed import World
from d2it.training.config import Config, StageConfig
from d2it.training.loop import Stage
from d2it.training.meters import memory_gib, peak_flops


def summarize(stage: Stage, settings: StageConfig, config: Config, world: World) -> str:
    """Model, parameters, multiply-accumulates, tokens, batch, device and memory of a stage."""
    batch = stage.synthetic()
    work = stage.work(batch)
    sharded = world.size if settings.parallel == "fsdp" else 1
    state = 20 * sum(p.numel() for learner in stage.learners for p in learner.parameters) / sharded / 2**30
    lines = []
    for learner in stage.learners:
        count = sum(p.numel() for p in learner.parameters)
        lines.append(f"{learner.name}: {learner.kind.__name__} {settings.preset}, {count / 1e6:.2f} M parameters")
    lines[0] += f", {work.macs / work.images / 1e9:.3g} GMAC and {work.tokens / work.images:.4g} tokens an image"
    micro = settings.batch_size // (world.size * settings.accumulate)
    lines.append(
        f"  batch {settings.batch_size} = {world.size} ranks x {settings.accumulate} micro-batches x {micro}, "
        f"{settings.steps:,} steps, learning rate {settings.lr:g}, EMA {settings.ema:g}"
    )
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = "" if world.device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    how = [
        "bf16" if stage.learners[0].bf16 else "fp32",
        settings.parallel,
        "compiled" if settings.compile else "eager",
        *([f"float8 ({settings.float8})"] if settings.float8 else []),
        *(["activation checkpointing"] if settings.activation_checkpointing else []),
    ]
    lines.append(f"  {name}{threads}, {', '.join(how)}")
    kept = stage.activations(batch)
    activations = "activations come on top" if kept is None else f"about {kept / 2**30:.2f} for activations"
    lines.append(f"  {state:.2f} GiB a rank for weights, gradients, moments and average, {activations}")
    return "\n".join(lines + [f"  {note}" for note in stage.notes()])


def rehearse(stage: Stage, settings: StageConfig, world: World) -> str:
    """Two steps on noise: the second one's seconds, speed, and the most memory held."""
    seconds = 0.0
    for step in range(2):
        _wait(world)
        start = time.perf_counter()
        for micro in range(settings.accumulate):
            batch = stage.synthetic()
            images = stage.work(batch).images
            for learner in stage.learners:
                _, batch = learner.backward(batch, last=micro == settings.accumulate - 1)
        for learner in stage.learners:
            learner.update(step)
        _wait(world)
        seconds = time.perf_counter() - start
    work = stage.work(stage.synthetic())
    speed = images * settings.accumulate * world.size / seconds
    text = f"  a step takes {seconds:.3g} s: {speed:.4g} images/s, at most {memory_gib(world.device):.2f} GiB held"
    peak = peak_flops(world.device)
    if peak is not None:
        text += f", MFU {6 * work.macs * settings.accumulate / seconds / peak:.1%}"
    return text


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
