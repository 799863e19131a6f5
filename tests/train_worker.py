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
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from d2it import distributed
from d2it.diffusion import GaussianDiffusion
from d2it.errors import Interrupted, UserError
from d2it.models import DynamicContentTransformer
from d2it.models.layers import FinalLayer, Modulation
from d2it.models.repa import TEACHER, Alignment, RepaConfig, token_grid
from d2it.seeds import seed_of
from d2it.training import loop
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import RunConfig, StageConfig
from d2it.training.content import ContentLosses, count_tokens
from d2it.training.learner import Batch, Learner
from d2it.training.loop import restore, train
from d2it.training.meters import Work


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
        self.bf16 = settings.precision == "bf16"
        self.learners = [Learner("toy", losses, settings, world, self.bf16)]

    def identity(self) -> dict[str, Any]:
        return {"stage": "toy", "model": {"width": int(self.extra.get("width", 16))}}

    def active(self, step: int) -> list[Learner]:
        return self.learners

    def batches(self, first: int) -> Iterator[Batch]:
        step, parts = first, self.settings.accumulate
        rows = self.settings.batch_size // (self.world.size * parts)
        with open(os.path.join(self.run.dir, f"starts-{self.world.rank}"), "a") as file:
            file.write(f"{first}\n")
        progress = os.open(os.path.join(self.run.dir, f"step-{self.world.rank}"), os.O_WRONLY | os.O_CREAT)
        nan = [int(s) for s in str(self.extra.get("nan", "")).split("-") if s]
        while True:
            os.pwrite(progress, b"%8d" % step, 0)
            if step == self.extra.get("spoil_at"):
                spoil(self.learners[0], self.extra["spoil"])
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
                yield self.batch(x[place : place + rows], bad)
            step += 1

    def batch(self, x: torch.Tensor, bad: bool) -> Batch:
        return {
            "x": x,
            "fine": 0 if self.extra.get("uneven") and self.world.rank else len(x),
            "scale": float("nan") if bad else 1.0,
            "noise": float(self.extra.get("noise", 0.1)),
        }

    def work(self, batch: Batch) -> Work:
        return Work(self.settings.batch_size // (self.world.size * self.settings.accumulate), 0, 0)

    held_out = None

    def publish(self, meters: Any, step: int) -> None:
        if self.extra.get("picture_fails"):
            raise UserError("no such picture")
        with open(os.path.join(self.run.dir, f"published-{self.world.rank}"), "a") as file:
            file.write(f"{step}\n")

    def warning(self, figures: dict[str, float]) -> None:
        pass


class Dynamic(Toy):
    """As `Toy`, with a D2iT whose second rank has no fine region; `x` seeds the latents. `repa` adds a teacher's.

    `apart`: every rank draws weights of its own.
    """

    def __init__(self, settings: StageConfig, run: RunConfig, world: distributed.World, extra: dict[str, Any]) -> None:
        torch.manual_seed(run.seed + world.rank * int(extra.get("apart", 0)))
        self.settings, self.run, self.world, self.extra = settings, run, world, extra
        network = DynamicContentTransformer.from_preset("tiny", image_size=64, depth=1, refine_depth=1, num_classes=3)
        for part in network.modules():  # zeros would keep the blocks from the loss
            if isinstance(part, Modulation | FinalLayer):
                torch.nn.init.normal_(part.linear.weight, std=0.05)
        self.tokens = token_grid(network)
        alignment = Alignment(network, RepaConfig(block=1, hidden=16), 7) if extra.get("repa") else None
        losses = ContentLosses(network, GaussianDiffusion(), 1.0, alignment=alignment, weight=0.5)
        self.bf16 = settings.precision == "bf16"
        self.learners = [Learner("toy", losses, settings, world, self.bf16, network)]
        self.config = network.config

    def batch(self, x: torch.Tensor, bad: bool) -> Batch:
        generator = torch.Generator().manual_seed(int(x.view(torch.int32)[0, 0]))
        count, grid = len(x), self.config.grid
        grains = torch.randint(2, (count, *self.config.region_grid), generator=generator)
        batch = {
            "mean": torch.randn(count, 4, *grid, generator=generator),
            "std": torch.full((count, 4, *grid), float("nan") if bad else 0.1),
            "grain_map": grains * 0 if self.world.rank else grains,
            "label": torch.randint(3, (count,), generator=generator),
        }
        if self.extra.get("repa"):
            batch[TEACHER] = torch.randn(count, 7, *self.tokens, generator=generator)
        return count_tokens(batch, self.config, capacity_step=0.125)


def spoil(learner: Learner, what: str) -> None:
    """Makes one value of the weights, their average or the moments infinite, as an overflow would."""
    p = learner.parameters[0]
    of = {"weights": p, "average": learner.ema.shadow["first.weight"], "moments": learner.optimizer.state[p]["exp_avg"]}
    of[what].data.view(-1)[0] = float("inf")


def record(learner: Learner) -> list[str]:
    """The events of DDP's steps in their order, as they will come: "forward", "gradient" for each one that is added
    up, "reduce" for each bucket of them that is sent."""
    events: list[str] = []
    module = learner.module
    assert isinstance(module, DistributedDataParallel)

    # A lambda: DDP compares a hook's annotations with classes, and here they are text.
    module.register_comm_hook(
        dist.group.WORLD, lambda group, bucket: events.append("reduce") or allreduce_hook(group, bucket)
    )
    module.register_forward_pre_hook(lambda *_: events.append("forward"))
    for p in learner.parameters:
        p.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    return events


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
    for _ in range(int(extra.get("earlier", 0))):
        distributed.start("cpu")
        distributed.stop()
        time.sleep(int(os.environ["RANK"]))  # the first rank comes back a second before the other
    world = distributed.start("cpu")
    try:
        if settings.compile:  # traced and cut as ever, and run as it stands
            torch.compiler.set_stance(force_backend="eager")
        if extra.get("unchecked"):
            loop.check_finite = lambda *given: None
        stage = (Dynamic if extra.get("dynamic") else Toy)(settings, run, world, extra)
        events = record(stage.learners[0]) if extra.get("recorded") else []
        train(stage, settings, run, world)
        if events:
            (Path(run.dir) / f"events-{world.rank}").write_text("\n".join(events))
        checkpoints = Checkpoints(Path(run.dir) / "checkpoints" / stage.name, world, stage.identity())
        restore(stage, checkpoints, settings.steps)
        result = digest(stage.learners[0])
        if world.first:
            print("hash", result, flush=True)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        return 128 + stop.signal
    finally:
        distributed.stop()


def serve() -> None:
    """Fork the ranks of a run for every line: torch is imported once, so that a run takes a fraction of a second."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "tqdm", "torch.distributed.fsdp"):
        importlib.import_module(name)  # where a run would; here, before the forks
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    for run, line in enumerate(sys.stdin):
        arguments = line.split()
        ranks = next((int(a.split("=")[1]) for a in arguments if a.startswith("ranks=")), 1)
        arguments = [a for a in arguments if not a.startswith("ranks=")]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        where |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_RUN_ID": run}
        gate = os.pipe()  # on a busy machine a rank may end before this process runs again: the pids come first
        pids = [fork(arguments, where | {"RANK": rank, "LOCAL_RANK": rank}, gate) for rank in range(ranks)]
        print(*pids, flush=True)
        for descriptor in gate:
            os.close(descriptor)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("exit", *codes, flush=True)


def fork(arguments: list[str], where: dict[str, Any], gate: tuple[int, int]) -> int:
    """A child that runs `main` as one rank under torchrun's environment, once the gate is closed."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(gate[1])
        os.read(gate[0], 1)
        os.close(gate[0])
        if where["WORLD_SIZE"] > 1:
            os.environ.update({k: str(v) for k, v in where.items()})
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
