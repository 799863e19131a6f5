"""The training loop, one for all stages.

A stage brings learners (what is trained, with its loss inside) and batches; everything else is here. To resume, run the
same command again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from d2it.distributed import StopSignal, World
from d2it.errors import Interrupted, UserError
from d2it.files import write_text
from d2it.seeds import seed_of
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import LatentStageConfig, RunConfig, StageConfig
from d2it.training.ema import FOLDER
from d2it.training.learner import Batch, Learner, learning_rate, snapshot_sigmas
from d2it.training.meters import Meters, Work


class Stage(Protocol):
    """What a run needs of a stage.

    Args:
        name: of the stage, and of its section of the configuration.
        networks: what is trained, by name; on the meta device where only its costs are asked for.
        bf16: whether it computes in bfloat16 autocast.
    """

    name: str
    networks: dict[str, nn.Module]
    bf16: bool

    @property
    def learners(self) -> list[Learner]:
        """The networks with their losses and optimisers, made at the first access."""

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must be of to be resumed here, as JSON values."""

    def active(self, step: int) -> list[Learner]:
        """Returns the learners of this step, in the order in which the batch passes through them."""

    def batches(self, first: int) -> Generator[Batch]:
        """Yields this rank's micro-batches on the device from step `first` on, without end."""

    def synthetic(self, images: int, device: torch.device) -> Batch:
        """Returns a micro-batch of noise: for costs, rehearsals and benchmarks."""

    def notes(self) -> list[str]:
        """Returns lines for the start-up summary."""

    @property
    def held_out(self) -> Batch | None:
        """A batch that is not trained on, on the device, whose loss each report measures; or None."""

    def work(self, batch: Batch) -> Work:
        """Returns what a micro-batch costs on this rank."""

    def activations(self, batch: Batch) -> int:
        """Returns the bytes that a micro-batch keeps for the backward pass, about."""

    def publish(self, meters: Meters, step: int) -> None:
        """Writes the averaged weights to share, and pictures for tensorboard; called on all ranks."""

    def warning(self, figures: dict[str, float]) -> str | None:
        """Returns what a report's figures should make the user look at, or None."""


def train(
    stage: Stage, settings: StageConfig, run: RunConfig, world: World, begin: Callable[[], None] = lambda: None
) -> None:
    """Trains the stage to its last step, from the newest checkpoint if there is one.

    Args:
        stage: what is trained.
        settings: of the stage.
        run: where everything is written, and how often.
        world: the ranks.
        begin: called before the first step, when nothing can refuse the start any more.

    Raises:
        UserError: a checkpoint that cannot be read or written, `run.skip_limit` steps in a row without a finite
            gradient, or weights that are not finite.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    folder = Path(run.dir) / "checkpoints" / stage.name
    sigmas = snapshot_sigmas(settings)
    identity = stage.identity() | ({"snapshot_sigmas": sigmas} if sigmas else {})
    precision = "bf16" if stage.bf16 else "fp32"
    how: dict[str, Any] = {"keep": run.keep, "background": run.async_save, "precision": precision}
    checkpoints = Checkpoints(folder, world, identity, **how)
    newest = checkpoints.newest()
    first = newest or 0
    publication = Publication(folder, world)
    if first >= settings.steps and not publication.due():
        return
    kept = Path(run.dir) / FOLDER / stage.name
    if sigmas and newest is None and world.together(kept.exists):
        raise UserError(f"{kept}: snapshots of an earlier training are here: move the folder away", shared=True)
    weights = sum(p.numel() for learner in stage.learners for p in learner.parameters)
    checkpoints.prepare((16 + 4 * len(sigmas)) * weights)  # float32 weights, averages, two moments
    if newest is not None:
        restore(stage, checkpoints, first)
    begin()
    if first >= settings.steps:
        with contextlib.closing(Meters(stage.name, run, settings, first, world)) as meters:
            publication.make(stage, meters, first)
        return
    if newest is not None and (change := change_of_precision(stage, settings, world, checkpoints.precision_at(first))):
        world.announce(f"{stage.name}: up to step {first} {change}")
    batches = stage.batches(first)
    meters = Meters(stage.name, run, settings, first, world)
    warned = False

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

            done, saved = step + 1, None
            last, signal = done == settings.steps, stop.agreed()
            if done % run.log_every == 0 or last or signal:
                meters.add({f"{x.name}/skipped_steps": x.guard[0] for x in stage.learners})
                if stage.held_out is not None:
                    found = stage.learners[0].evaluate(stage.held_out, seed_of(run.seed, stage.name, "held out"))
                    meters.add({name.replace("/", "/held_out_"): value for name, value in found.items()})
                figures = meters.report(done, learning_rate(settings, step))
                warning = None if warned else stage.warning(figures)
                if warning:
                    world.announce(f"warning: {warning}")
                    warned = True
                check_guard(stage, run, done, checkpoints, min(2, settings.steps) if last else run.skip_limit)
                checkpoints.settle()
            publishing = last or (run.publish_every and done % run.publish_every == 0 and not signal)
            saving = last or done % run.save_every == 0 or signal
            every = settings.snapshot_every if isinstance(settings, LatentStageConfig) else 0
            keeping = every and (last or done % every == 0)
            if publishing or saving or keeping:
                check_finite(stage, world, done, checkpoints)
            if keeping:
                for learner in stage.learners:
                    learner.snapshot(run.dir, done)
            # Saved before it is published: a picture that fails costs no step. Weights before a gradient that was not
            # finite may be the reason for it: not kept in the place of others.
            if last:
                publication.announce()
            if last or (saving and not any(learner.guard[1] for learner in stage.learners)):
                saved = checkpoints.save(done, {x.name: x.state() for x in stage.learners})
            if last:
                publication.make(stage, meters, done)
            elif publishing:
                stage.publish(meters, done)
            if last and not signal:
                signal = stop.at_last()  # one that came while the last step published and saved
            if signal:
                checkpoints.wait()
                where = f"saved {saved}" if saved else f"not saved (no finite gradient); {checkpoints.refuge()}"
                raise Interrupted(signal, f"{signal.name} at step {done}: {where}; the same command resumes")


def change_of_precision(stage: Stage, settings: StageConfig, world: World, recorded: str | None) -> str | None:
    """Returns what to say of a training that goes on in another precision than before, or None where it does not.

    Args:
        stage: what is trained.
        settings: of the stage.
        world: the ranks.
        recorded: precision up to now, or None where the checkpoint is of a version that recorded none. Such a one took
            float32 on a CPU for `precision=auto`.
    """
    now, before, where = "bf16" if stage.bf16 else "fp32", recorded, ""
    if recorded is None and settings.precision == "auto" and world.device.type == "cpu":
        before, where = "fp32", " if on a CPU (precision=auto of an earlier version)"
    if before in (None, now):
        return None
    return f"in {before}{where}, in {now} from here on; {stage.name}.precision={before} goes on as before"


class Publication:
    """What is published of a stage's last step: it comes after the last checkpoint, and a start that finds that one
    without it makes up for it.

    Args:
        folder: of the stage's checkpoints, where the file `unpublished` stands for a publication that is due.
        world: the ranks.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._mark, self._world = folder / "unpublished", world

    def due(self) -> bool:
        """Returns whether the last step was announced and is not published; the same on all ranks."""
        return any(self._world.gather(self._world.first and self._mark.exists()))

    def announce(self) -> None:
        """Notes that the last step is about to be saved and published."""
        self._world.together(lambda: write_text(self._mark, "") if self._world.first else None)

    def make(self, stage: Stage, meters: Meters, step: int) -> None:
        """Publishes the stage after its last step."""
        stage.publish(meters, step)
        self._world.together(lambda: self._mark.unlink(missing_ok=True) if self._world.first else None)


def restore(stage: Stage, checkpoints: Checkpoints, step: int) -> None:
    """Loads the checkpoint of `step` into the stage's learners.

    Raises:
        UserError: it is damaged, of something else, or not finite.
    """
    states = {learner.name: learner.state() for learner in stage.learners}
    checkpoints.load(step, states)
    for learner in stage.learners:
        learner.restore(states[learner.name])
    found = _not_finite(stage, checkpoints.world)
    if found:
        raise UserError(
            f"{checkpoints.path(step)}: {found} is not finite: move the folder away to resume from the one before it",
            shared=True,
        )


def check_guard(stage: Stage, run: RunConfig, step: int, checkpoints: Checkpoints, limit: int) -> None:
    """Raises a UserError if `limit` steps in a row, or `run.skip_limit` since the last look, had no finite gradient.

    Reads the device: for steps that report.
    """
    for learner in stage.learners:
        total, streak, worst = learner.guard.tolist()
        if worst >= run.skip_limit or streak >= limit:
            checkpoints.wait()
            raise UserError(
                f"{stage.name}: {max(streak, worst):.0f} steps in a row without a finite gradient in {learner.name}, "
                f"by step {step} ({total:.0f} skipped in all, none applied): lower {stage.name}.lr or set "
                f"{stage.name}.clip, and start again; {checkpoints.refuge()}",
                shared=True,
            )
        learner.guard[2] = learner.guard[1]


def check_finite(stage: Stage, world: World, step: int, checkpoints: Checkpoints) -> None:
    """Raises a UserError on all ranks if weights, average or moments are not finite on any; reads the device."""
    found = _not_finite(stage, world)
    if found:
        checkpoints.wait()
        raise UserError(
            f"{stage.name}: {found} is not finite at step {step}, so it is neither saved nor published: lower "
            f"{stage.name}.lr or set {stage.name}.clip, and start again; {checkpoints.refuge()}",
            shared=True,
        )


def _not_finite(stage: Stage, world: World) -> str | None:
    mine = next((found for learner in stage.learners if (found := learner.not_finite())), None)
    return next((found for found in world.gather(mine) if found), None)
