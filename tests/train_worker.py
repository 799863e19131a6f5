"""A training run small enough to be killed often: two linear layers behind the real loop.

    python tests/train_worker.py key=value ...          one rank
    torchrun --nproc-per-node=2 tests/train_worker.py   several
    python tests/train_worker.py serve                  forks for each line of arguments on stdin, ranks=2 for two:
                                                        prints their pids, then their exit codes (a kill: minus the
                                                        signal)

Prints `hash <sha256 of all weights, averages and moments>` at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2it.errors import UserError
from d2it.training import distributed
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import RunConfig, StageConfig
from d2it.training.loop import Batch, Learner, Stopped, Work, restore, seed_of, train


class Losses(nn.Module):
    """A layer that every sample passes and one that a rank may have no rows for."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 8)
        self.register_buffer("frozen", torch.ones(8))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], Batch]:
        x = batch["x"] + batch.get("noise", 0.1) * torch.randn_like(batch["x"])
        y = self.first(x)
        rows = batch["fine"]
        fine = self.second(torch.tanh(y[:rows])) * self.frozen
        loss = (y**2).mean() + (fine - x[:rows]).square().sum() / x.numel()
        return loss * batch["scale"], {"toy/loss": loss}, batch


class Toy:
    """The stage. `nan` lists the steps at which the last rank's loss is not finite."""

    name = "toy"

    def __init__(self, settings: StageConfig, run: RunConfig, world: distributed.World, extra: dict[str, Any]) -> None:
        torch.manual_seed(run.seed)
        self.settings, self.run, self.world, self.extra = settings, run, world, extra
        losses = Losses(int(extra.get("width", 16)))
        self.learners = [Learner("toy", losses, settings, world)]

    def identity(self) -> dict[str, Any]:
        return {"stage": "toy", "model": {"width": int(self.extra.get("width", 16))}}

    def active(self, step: int) -> list[Learner]:
        return self.learners

    def batches(self, first: int) -> Iterator[Batch]:
        step, parts = first, self.settings.accumulate
        rows = self.settings.batch_size // (self.world.size * parts)
        nan = [int(s) for s in str(self.extra.get("nan", "")).split("-") if s]
        while True:
            if step == self.extra.get("die") and self.world.rank == self.world.size - 1:
                marker = os.path.join(self.run.dir, "died")
                if not os.path.exists(marker):
                    open(marker, "w").close()
                    os._exit(9)
            generator = torch.Generator().manual_seed(seed_of("data", step))
            x = torch.randn(self.settings.batch_size, 8, generator=generator)
            bad = step in nan and self.world.rank == self.world.size - 1
            for part in range(parts):
                place = (part * self.world.size + self.world.rank) * rows
                yield {
                    "x": x[place : place + rows],
                    "fine": 0 if self.extra.get("uneven") and self.world.rank else rows,
                    "scale": float("nan") if bad else 1.0,
                    "noise": float(self.extra.get("noise", 0.1)),
                }
            step += 1

    def work(self, batch: Batch) -> Work:
        return Work(len(batch["x"]), 0, 0)

    def publish(self, meters: Any, step: int) -> None:
        pass


def digest(learner: Learner) -> str:
    """SHA-256 of everything that a resume must bring back."""
    state = learner.state()
    tensors = {**state["model"], **{f"ema.{k}": v for k, v in state["ema"].items()}, "guard": state["guard"]}
    for name, moments in state["optimizer"]["state"].items():
        tensors |= {f"{name}.{k}": v for k, v in moments.items()}
    result = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        result.update(name.encode() + value.detach().numpy().tobytes())
    return result.hexdigest()


def main(arguments: list[str]) -> int:
    run = RunConfig(log_every=5, save_every=4, keep=2, publish_every=0, skip_limit=3)
    settings = StageConfig(steps=40, batch_size=8, lr=1e-2, ema=0.9)
    extra: dict[str, Any] = {}
    for argument in arguments:
        key, value = argument.split("=")
        target = next((t for t in (run, settings) if hasattr(t, key)), None)
        if target is None:
            extra[key] = int(value) if value.isdigit() else value
        else:
            kind = type(getattr(dataclasses.replace(target), key))
            setattr(
                target,
                key,
                value == "True" if kind is bool else kind(value) if kind is not type(None) else float(value),
            )
    if "file_limit" in extra:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(extra["file_limit"]),) * 2)
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    try:
        stage = Toy(settings, run, world, extra)
        train(stage, settings, run, world)
        checkpoints = Checkpoints(Path(run.dir) / "checkpoints" / stage.name, world, stage.identity())
        restore(stage, checkpoints, settings.steps)
        result = digest(stage.learners[0])
        if world.first:
            print("hash", result, flush=True)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return 128 + stopped.signal
    finally:
        distributed.stop()


def serve() -> None:
    """Fork the ranks of a run for every line: torch is imported once, so that a run takes a fraction of a second."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "tqdm", "torch.distributed.fsdp"):
        importlib.import_module(name)  # where a run would; here, before the forks
    for line in sys.stdin:
        arguments = line.split()
        ranks = next((int(a.split("=")[1]) for a in arguments if a.startswith("ranks=")), 1)
        arguments = [a for a in arguments if not a.startswith("ranks=")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [fork(arguments, rank, ranks, port) for rank in range(ranks)]
        print(*pids, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("exit", *codes, flush=True)


def fork(arguments: list[str], rank: int, ranks: int, port: int) -> int:
    """A child that runs `main` as this rank, with the environment that torchrun would give it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if ranks > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({k: str(v) for k, v in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()})
        code = main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
