"""The ranks of a run: how they start, how they agree, and how they stop.

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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2it.errors import Interrupted, UserError, reason_of, second_request

#: Seconds that the main thread has to end after a second signal, before the process is ended for it.
LAST_RESORT = 15.0


@dataclass(frozen=True)
class World:
    """The ranks of this run, seen from one of them.

    Args:
        rank: this process, 0 ... size - 1.
        size: number of ranks.
        local_size: number of ranks on this machine.
        device: where this rank computes.
        control: gloo group of the main threads; None for a run of one process.
        saver: gloo group of the threads that write checkpoints. It is a group of its own because all ranks must issue
            the collectives of a group in the same order, and these threads run beside the main ones.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    saver: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0

    def gather(self, item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Returns `item` of every rank, in rank order, on every rank."""
        return gathered(item, group or self.control)

    def mean(self, values: Tensor) -> Tensor:
        """Averages `values` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def announce(self, text: str) -> None:
        """Prints lines on stderr, from rank 0 alone."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def together(self, act: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
        """Runs `act` on this rank and returns its result.

        Raises:
            UserError: on all ranks, if `act` failed with an OSError or UserError on any: a rank that raised alone would
                leave the others waiting in their next collective.
        """
        result, failure = None, None
        try:
            result = act()
        except (OSError, UserError) as error:
            failure = reason_of(error)
        failures = [f for f in self.gather(failure, group) if f is not None]
        if failures:
            raise UserError(failures[0], shared=True)
        return result


def gathered(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns `item` of every rank, in rank order, on every rank; of this process alone where it has joined no run."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def start(device: str = "auto") -> World:
    """Joins the run that torchrun's environment describes; without one, this process is a run of its own.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: `device="cuda"` without a GPU that this torch can use, or an environment that describes no run.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU (auto uses the CPU then)")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    local_rank, local_size = _environment("LOCAL_RANK", 0, 0), _environment("LOCAL_WORLD_SIZE", 1, 1)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
    if "RANK" not in os.environ:
        return World(0, 1, 1, here)
    rank, size = _environment("RANK", None, 0), _environment("WORLD_SIZE", None, 1)
    if rank >= size:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={size}")
    if _environment("MASTER_PORT", None, 0) > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} must be at most 65535")
    # Within one machine the loopback interface always works, whatever the host name resolves to.
    if local_size == size and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"backend": "cpu:gloo,cuda:nccl", "device_id": here} if kind == "cuda" else {"backend": "gloo"}
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(store=dist.PrefixStore(_attempt(), store), rank=rank, world_size=size, **options)
    except (ValueError, OSError, dist.DistError) as error:
        raise UserError(f"the ranks cannot meet: {reason_of(error)} (start them with torchrun)") from None
    return World(
        rank=rank,
        size=size,
        local_size=local_size,
        device=here,
        control=dist.new_group(backend="gloo"),
        saver=dist.new_group(backend="gloo"),
    )


def _environment(name: str, default: int | None, least: int) -> int:
    """Returns an environment variable of torchrun as a number."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < least:
        what = "is not set" if text is None else f"must be a whole number of at least {least}, got {text!r}"
        raise UserError(f"environment variable {name} {what} (torchrun sets it; unset RANK for a run of one process)")
    return int(text)


_starts = itertools.count()


def _attempt() -> str:
    """Returns a name for this meeting of the ranks, the same on all of them and never used before.

    The store may outlive a meeting: torchrun restarts ranks, and a process may leave a run and join the next. Under an
    old name, the rank that comes first would find the address of a process that has gone.
    """
    run, restart = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    return f"d2it/{run}/{restart}/{next(_starts)}"


def stop() -> None:
    """Leaves the run."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Joins the run as `start` does, and leaves it at the end of the context."""
    world = start(device)
    try:
        yield world
    finally:
        stop()


class StopSignal:
    """SIGINT and SIGTERM, as a decision that all ranks take at the same step.

    The ranks' flags are summed over a gloo group one step behind: a step starts a sum and reads the one that the step
    before started, so that no rank waits for the device, and hardly for the network. A second request to stop (see
    `d2it.errors.second_request`) raises `Interrupted` at once. A thread watches the signals as well: a main thread that
    waits in a collective runs no Python handler, and after a second request the process must end all the same.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.caught: signal.Signals | None = None
        self._since, self._twice = 0.0, False
        self._pending: tuple[Tensor, Any] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._catch)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._end_if_stuck, daemon=True, name="stop signal")
        self._left = threading.Event()
        self._watch.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pending is not None and not self._twice:
            self._pending[1].wait()
        self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_writer)
        self._left.set()
        os.write(self._writer, b"\0")
        self._watch.join()
        os.close(self._writer)
        os.close(self._reader)

    def _catch(self, number: int, frame: object) -> None:
        if self.caught is not None and second_request(signal.Signals(number), self.caught, self._since):
            self._twice = True
            raise Interrupted(number, f"{signal.Signals(number).name} again: stopped at once, this step is not saved")
        if self.caught is None:
            self.caught, self._since = signal.Signals(number), time.monotonic()

    def _end_if_stuck(self) -> None:
        first, since = None, 0.0
        while (number := os.read(self._reader, 1)) != b"\0":
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            caught = signal.Signals(number[0])
            if first is None:
                first, since = caught, time.monotonic()
            elif second_request(caught, first, since):
                if not self._left.wait(LAST_RESORT):
                    print(f"{caught.name} again: ended without saving this step", file=sys.stderr, flush=True)
                    os._exit(128 + caught)
                return

    def agreed(self) -> signal.Signals | None:
        """Returns the signal that some rank had caught by the last call, or None; call once a step on every rank."""
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
        """Returns the signal that some rank has caught by now, or None; call after the last step on every rank."""
        caught = max(self.world.gather(int(self.caught or 0)))
        return signal.Signals(caught) if caught else None
