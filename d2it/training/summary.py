"""What a stage is about to do, in a few lines, and what a step of it costs."""

from __future__ import annotations

import time
from typing import cast

import torch

from d2it.devices import memory_gib, memory_limit, peak_flops
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models.base import Model
from d2it.training.config import StageConfig
from d2it.training.learner import has_masters, snapshot_sigmas
from d2it.training.loop import Stage
from d2it.training.masters import linears

GIB = 2**30


class Summary:
    """The costs of a stage, computed from its networks without memory for weights or activations.

    Args:
        stage: may lie on the meta device.
        settings: of the stage.
        world: the ranks.

    Attributes:
        text: model, parameters, multiply-accumulates, tokens, batch, device and memory, in a few lines.
        state: bytes a rank for weights, gradients, moments and average.
        activations: bytes a rank that a micro-batch keeps for the backward pass, about.
    """

    def __init__(self, stage: Stage, settings: StageConfig, world: World) -> None:
        self.stage, self.settings, self.world = stage, settings, world
        micro = settings.batch_size // (world.size * settings.accumulate)
        few = min(micro, 16)
        batch = stage.synthetic(few, torch.device("meta"))
        work = stage.work(batch)
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in stage.networks.items()}
        bytes_each = 20 + 4 * len(snapshot_sigmas(settings))  # weights, gradients, two moments, averages in float32
        self.state = bytes_each * sum(counts.values()) / (world.size if settings.parallel == "fsdp" else 1)
        masters = has_masters(settings, world.device, stage.bf16)
        if masters and (settings.accumulate > 1 or world.size > 1):  # gradients in float32, beside their weights
            network = cast(Model, stage.networks[stage.name])
            self.state += 2 * sum(part.weight.numel() for part in linears(network.transformer_blocks()))
        self.activations = stage.activations(batch) / few * micro
        lines = [
            f"{name}: {type(net).__name__}{f' {settings.preset}' if name == stage.name else ''}, "
            f"{counts[name] / 1e6:.2f} M parameters"
            for name, net in stage.networks.items()
        ]
        tokens = f" and {work.tokens / work.images:.4g} tokens" if work.tokens else ""
        lines[0] += f", {work.macs / work.images / 1e9:.3g} GMAC{tokens} an image"
        parts = f" = {world.size} ranks x {settings.accumulate} micro-batches x {micro}"
        lines.append(
            f"  batch {settings.batch_size}{parts if micro < settings.batch_size else ''}, "
            f"{settings.steps:,} steps, learning rate {settings.lr:g}, EMA {settings.ema:g}"
        )
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        threads = "" if world.device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
        how = [
            "bf16" if stage.bf16 else "fp32",
            settings.parallel,
            "compiled" if settings.compile else "eager",
            *(["bfloat16 weights with float32 masters" if masters else "float32 weights"] if stage.bf16 else []),
            *([f"float8 ({settings.float8})"] if settings.float8 else []),
            *(["activation checkpointing"] if settings.activation_checkpointing else []),
        ]
        lines.append(f"  {name}{threads}, {', '.join(how)}")
        lines.append(
            f"  {_size(self.state)} a rank for weights, gradients, moments and average, "
            f"about {_size(self.activations)} for activations"
        )
        self.text = "\n".join(lines + [f"  {note}" for note in stage.notes()])

    def require_memory(self) -> None:
        """Raises a UserError if the stage cannot fit the device.

        A GPU's allocator reports what does not fit, so there only the state counts; a CPU's process would be killed.
        """
        cpu = self.world.device.type == "cpu"
        needed, limit = self.state + (self.activations if cpu else 0), memory_limit(self.world.device)
        ranks = self.world.local_size if cpu else 1
        if needed * ranks > limit:
            name = self.stage.name
            raise UserError(
                f"{name}: {ranks if ranks > 1 else 'a'} rank{'s need' if ranks > 1 else ' needs'} about "
                f"{needed * ranks / GIB:.1f} GiB, {limit / GIB:.1f} are there: {name}.accumulate=N (smaller "
                f"micro-batches), {name}.activation_checkpointing=true, a smaller {name}.batch_size or {name}.preset "
                "need less",
                shared=True,
            )


def _size(count: float) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def rehearse(stage: Stage, settings: StageConfig, world: World) -> str:
    """Takes two steps on noise; returns the second one's seconds and speed, and the most memory held, in words."""
    seconds, micro = 0.0, settings.batch_size // (world.size * settings.accumulate)
    for step in range(2):
        _wait(world)
        start = time.perf_counter()
        for part in range(settings.accumulate):
            batch = stage.synthetic(micro, world.device)
            work = stage.work(batch)
            for learner in stage.learners:
                _, batch = learner.backward(batch, last=part == settings.accumulate - 1)
        for learner in stage.learners:
            learner.update(step)
        _wait(world)
        seconds = time.perf_counter() - start
    speed = settings.batch_size / seconds
    text = f"  a step takes {seconds:.3g} s: {speed:.4g} images/s, at most {memory_gib(world.device):.2f} GiB held"
    peak = peak_flops(world.device)
    if peak is not None:
        text += f", MFU {6 * work.macs * settings.accumulate / seconds / peak:.1%}"
    return text


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
