"""The training loop: one for all stages.

A stage brings learners (what is trained, with its loss inside) and batches; everything else is here. To
resume, run the same command again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import torch

from d2it.distributed import StopSignal, World
from d2it.errors import UserError
from d2it.seeds import seed_of
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import RunConfig, StageConfig
from d2it.training.learner import Batch, Learner, learning_rate
from d2it.training.meters import Meters, Work


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` is why."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str
    learners: list[Learner]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must be of to be resumed here, as JSON values."""

    def active(self, step: int) -> list[Learner]:
        """The learners that take part in this step, in the order in which the batch passes through them."""

    def batches(self, first: int) -> Generator[Batch]:
        """Micro-batches on the device from step `first` on, this rank's part, without end."""

    def synthetic(self) -> Batch:
        """A micro-batch of noise on the device, of the right shapes."""

    def notes(self) -> list[str]:
        """Lines for the start-up summary."""

    def work(self, batch: Batch) -> Work:
        """What this micro-batch costs on this rank."""

    def activations(self, batch: Batch) -> int | None:
        """Bytes that this micro-batch keeps for the backward pass, where that can be told beforehand."""

    def publish(self, meters: Meters, step: int) -> None:
        """Write the averaged weights to share, and pictures for tensorboard; called on all ranks."""


def train(stage: Stage, settings: StageConfig, run: RunConfig, world: World) -> None:
    """Train the stage to its last step, from the newest checkpoint if there is one.

    Raises:
        UserError: a checkpoint that cannot be read or written, or `run.skip_limit` non-finite steps in a row.
        Stopped: SIGINT or SIGTERM came; everything is saved.
    """
    folder = Path(run.dir) / "checkpoints" / stage.name
    checkpoints = Checkpoints(folder, world, stage.identity(), keep=run.keep, background=run.async_save)
    weights = sum(p.numel() for learner in stage.learners for p in learner.parameters)
    checkpoints.prepare(16 * weights)  # float32 weights, average, two moments
    newest = checkpoints.newest()
    first = 0 if newest is None else newest["step"]
    if first >= settings.steps:
        return
    if newest is not None:
        restore(stage, checkpoints, first)
    batches = stage.batches(first)
    meters = Meters(stage.name, run, settings.steps, first, world)

    with (
        StopSignal(world) as stop,
        contextlib.closing(checkpoints),
        contextlib.closing(meters),
        contextlib.closing(batches),
    ):
        for step in range(first, settings.steps):
            torch.manual_seed(seed_of(run.seed, stage.name, step, world.rank))  # noise, timesteps, dropout
            learners = stage.active(step)
            for micro in range(settings.accumulate):
                with meters.loading():
                    batch = next(batches)
                meters.count(stage.work(batch))
                for learner in learners:
                    logs, batch = learner.backward(batch, last=micro == settings.accumulate - 1)
                    meters.add(logs)
            for learner in learners:
                meters.add({f"{learner.name}/gradient_norm": learner.update(step)})

            done = step + 1
            signal = stop.agreed()
            if done % run.log_every == 0 or done == settings.steps or signal:
                meters.add({f"{x.name}/skipped_steps": x.guard[0] for x in stage.learners})
                meters.report(done, learning_rate(settings, step))
                check_guard(stage, run, done)
                checkpoints.settle()
            last = done == settings.steps
            if last or (run.publish_every and done % run.publish_every == 0 and not signal):
                stage.publish(meters, done)
            if last or done % run.save_every == 0 or signal:
                saved = checkpoints.save(done, {x.name: x.state() for x in stage.learners})
            if last and not signal:
                signal = stop.at_last()  # while the last step published and saved: the next stage would not know
            if signal:
                checkpoints.wait()
                raise Stopped(signal, f"{signal.name} at step {done}: saved {saved}; the same command resumes")


def restore(stage: Stage, checkpoints: Checkpoints, step: int) -> None:
    """Load the checkpoint of `step` into the stage's learners."""
    states = {learner.name: learner.state() for learner in stage.learners}
    checkpoints.load(step, states)
    for learner in stage.learners:
        learner.restore(states[learner.name])


def check_guard(stage: Stage, run: RunConfig, step: int) -> None:
    """Stop if steps were skipped too often in a row since the last look. Reads the device: for log steps."""
    for learner in stage.learners:
        total, _, worst = learner.guard.tolist()
        if worst >= run.skip_limit:
            raise UserError(
                f"{stage.name}: {worst:.0f} steps in a row without a finite gradient in {learner.name}, by step {step} "
                f"({total:.0f} skipped in all, none applied): lower {stage.name}.lr or set {stage.name}.clip"
            )
        learner.guard[2] = learner.guard[1]
