"""Ranks: who takes part, and how they agree.

Launch:
    python train.py                                              one process
    torchrun --standalone --nproc-per-node=gpu train.py ...      one machine
    torchrun --nnodes=4 --node-rank=... --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --nproc-per-node=8
    train.py ...
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2it.errors import UserError


@dataclass(frozen=True)
class World:
    """The ranks of this run. `control` and `saver` are gloo groups: host-side talk never waits for the
    device.

    They are two because the saver's thread talks at its own pace: collectives of one group must be
    issued in the same order everywhere.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    saver: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """`item` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=group or self.control)
        return items

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def together(self, act: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
        """Run `act` on this rank; if it failed with an OSError or UserError on any rank, raise a
        UserError on all.

        A rank that raised alone would leave the others waiting in their next collective.
        """
        result, failure = None, None
        try:
            result = act()
        except (OSError, UserError) as error:
            failure = str(error)
        failures = [f for f in self.gather(failure, group) if f is not None]
        if failures:
            raise UserError(failures[0])
        return result


def start(device: str = "auto") -> World:
    """Join the run that torchrun's environment describes, or be a run of one.

    Raises:
        UserError: `device="cuda"` without a GPU that this torch can use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU (auto takes the CPU then)")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
    if "RANK" not in os.environ:
        return World(0, 1, 1, here)
    store, rank, size = next(dist.rendezvous("env://"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # One machine talks to itself, whatever its host name resolves to.
    if local_size == size and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"backend": "cpu:gloo,cuda:nccl", "device_id": here} if kind == "cuda" else {"backend": "gloo"}
    dist.init_process_group(store=dist.PrefixStore(_attempt(), store), rank=rank, world_size=size, **options)
    return World(
        rank=rank,
        size=size,
        local_size=local_size,
        device=here,
        control=dist.new_group(backend="gloo"),
        saver=dist.new_group(backend="gloo"),
    )


_starts = itertools.count()


def _attempt() -> str:
    """A name for this meeting of the ranks, the same on all of them and never used before.

    The store may outlive a meeting: torchrun restarts ranks, a process may leave a run and join the next. Under an old
    name the rank that comes first finds the address where another one was, and never gets through.
    """
    run, restart = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    return f"d2it/{run}/{restart}/{next(_starts)}"


def stop() -> None:
    """Leave the run."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM outside the training loop."""

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted: in stages without steps, between stages, and while pictures are drawn."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(signal.Signals(number))

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopSignal:
    """SIGINT and SIGTERM, as a decision that all ranks take at the same step.

    The flags are summed over a gloo group one step behind: a step starts the sum and reads the one that
    the step before started, so nobody waits for the device, and hardly for the network. A second SIGINT
    acts at once; a second SIGTERM does not, because a batch system and torchrun's agent each send one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.caught: signal.Signals | None = None
        self._pending: tuple[Tensor, Any] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: object) -> None:
        if self.caught is signal.SIGINT and number == signal.SIGINT:
            raise Interrupted(signal.SIGINT)
        self.caught = signal.Signals(number)

    def agreed(self) -> signal.Signals | None:
        """Call once a step on every rank: the signal that some rank had caught by the last call, or None."""
        if self.world.size == 1:
            return self.caught
        before, flag = self._pending, torch.tensor([int(self.caught or 0)], dtype=torch.int32)
        self._pending = (
            flag,
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True),
        )
        if before is None:
            return None
        before[1].wait()
        return signal.Signals(int(before[0])) if before[0] else None

    def at_last(self) -> signal.Signals | None:
        """Call once after the last step on every rank: the signal that some rank has caught by now, or None."""
        caught = max(self.world.gather(int(self.caught or 0)))
        return signal.Signals(caught) if caught else None
