"""Batches in an order that follows from (seed, images seen) and can be taken up at any image.

A training stream is endless: position p holds image `permutation(N, seed, p // N)[p % N]`, and its augmentation
follows from (seed, p). A global batch is a run of positions, of which each rank takes its own block, so the images
of a step do not depend on the number of ranks, workers or prefetched batches, and "images seen" is the whole state.

Worker processes are torch's DataLoader's. They ignore SIGINT and SIGTERM, which a terminal or a scheduler sends to
the whole process group: the main process decides when to stop, after it has saved, and ends them.

No wait is endless. Batches reach the main process through shared memory, which a worker allocates where a failure can
still be reported (in `_Fetch`), not in the thread that sends them: that thread would drop the batch. A worker that
cannot send, or dies, ends the stream with a UserError: the main process looks at its workers every five seconds while
it waits. torch's own watch is switched off, because it raises in the main thread wherever that is.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from d2it.data.sources import UNREADABLE_SHARE
from d2it.errors import UserError, out_of_memory, reason_of
from d2it.seeds import Draws, permutation

logger = logging.getLogger("d2it.data")

Batch = dict[str, Any]


def default_workers(local_ranks: int = 1) -> int:
    """Returns this rank's share of the CPU cores that the process may use, 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_ranks))


_PREFETCH = 4  # batches that each worker prepares ahead
_SHARED_MEMORY = "batches need more of /dev/shm (docker run --shm-size=...), fewer data.workers, or data.workers=0"
_FILES = "raise the limit on open files (ulimit -n), or use fewer data.workers"


class _Fetch:
    """The data set of the DataLoader: requests of (index, position) in, one batch or one error out.

    Args:
        source: an ImageSource or a LatentCache.
        process: run on each batch, or None.
        seed: of the augmentation; None: neither augmented nor replaced.
    """

    def __init__(self, source, process: Callable[[Batch], Batch] | None, seed: int | None) -> None:
        self.source = source
        self.process = process
        self.seed = seed

    def __getitems__(self, requests: Sequence[tuple[int, int]]) -> Batch:
        indices = [index for index, _ in requests]
        seed = self.seed
        try:
            if seed is None:
                batch = self.source.fetch(indices)
            else:
                draws = [Draws(seed, position) for _, position in requests]
                batch = self.source.fetch(indices, draws, replace=True)
            batch = batch if self.process is None else self.process(batch)
            if torch.utils.data.get_worker_info() is not None:
                for value in batch.values():
                    if isinstance(value, torch.Tensor):
                        value.share_memory_()
            return batch
        # An exception that crosses the process boundary comes back wrapped in a traceback; this line does not.
        except (UserError, OSError) as error:
            return {"error": reason_of(error)}
        except (MemoryError, RuntimeError) as error:
            if "shared memory" in str(error):
                return {"error": f"{reason_of(error)}: {_SHARED_MEMORY}"}
            if out_of_memory(error):
                return {"error": f"a data worker ran out of memory: {reason_of(error)}"}
            raise


def _same(batch: Batch) -> Batch:
    return batch


def _init_worker(reasons: Connection, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def cannot_send(error: BaseException, batch: object) -> None:
        reasons.send_bytes(reason_of(error).encode()[:2000])
        os._exit(1)

    # Called in the thread that sends batches; it would print a traceback, and the main process wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_send)  # type: ignore[attr-defined]


def _shut_down(holder: list) -> None:
    """Ends the worker processes of the iterator in `holder`; they ignore SIGTERM, so a stuck one is killed."""
    if not holder:
        return
    iterator = holder.pop()
    workers = list(getattr(iterator, "_workers", ()))
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


class _Stream:
    """What an endless and a single pass share: worker processes, and the count of unreadable images.

    Args:
        fetch: answers the requests.
        population: images of the pass.
        workers: processes; 0 reads in the calling process.
        pin_memory: page-locked batches, where there is a GPU.
    """

    def __init__(self, fetch: _Fetch, population: int, workers: int, pin_memory: bool) -> None:
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self._fetch = fetch
        self._options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": pin_memory and torch.cuda.is_available(),
        }
        if workers:
            self._reasons, send = multiprocessing.Pipe(duplex=False)
            self._options.update(prefetch_factor=_PREFETCH, worker_init_fn=functools.partial(_init_worker, send))
        self._holder: list = []
        self._population = population
        self._unreadable: dict[int, str] = {}
        # Runs before multiprocessing joins its children at exit: these ignore SIGTERM, and it would wait for ever.
        self._finalizer = util.Finalize(self, _shut_down, args=(self._holder,), exitpriority=100)

    def _start(self, requests: Iterator[list[tuple[int, int]]]) -> None:
        loader: DataLoader = DataLoader(
            self._fetch,  # type: ignore[arg-type]
            batch_sampler=requests,
            collate_fn=_same,  # type: ignore[arg-type]
            # A private generator: the iterator draws a seed for its workers, by default from the global one.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        before = set(multiprocessing.active_children())
        try:
            iterator = iter(loader)
        except OSError as error:
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()  # those that did start; they ignore the SIGTERM that the exit of Python would send
            raise UserError(f"cannot start {self._options['num_workers']} data workers: {reason_of(error)}") from None
        if getattr(iterator, "_worker_pids_set", False):
            torch._C._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False  # type: ignore[attr-defined]
        self._holder.append(iterator)

    def _next(self) -> Batch:
        try:
            batch = next(self._holder[0])
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            line = self._worker_failure(error)
            self.close()
            if line is None:
                raise
            raise UserError(line) from error
        if "error" in batch:
            self.close()
            raise UserError(batch["error"])
        self._count(batch.get("unreadable", ()))
        return batch

    def _worker_failure(self, error: Exception) -> str | None:
        """Returns the line for an error that a worker, or the lack of something workers need, has caused."""
        if not self._options["num_workers"]:
            return None
        if self._reasons.poll():
            reason = self._reasons.recv_bytes().decode()
            return (
                f"a data worker could not send its batch: {reason}: {_FILES if 'files' in reason else _SHARED_MEMORY}"
            )
        workers = self._holder[0]._workers
        if isinstance(error, (EOFError, ConnectionError)):  # a worker that is dying may not be dead yet
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=2)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()
        dead = [worker for worker in workers if not worker.is_alive()]
        if dead:
            how = f"exit code {dead[0].exitcode}"
            if dead[0].exitcode < 0:
                how = f"killed by {signal.Signals(-dead[0].exitcode).name}"
            return (
                f"data worker {dead[0].pid} ended unexpectedly ({how}): if the machine ran out of memory, fewer "
                "data.workers need less"
            )
        if "ancdata" in str(error) or "Too many open files" in str(error):
            return f"a batch could not be received: {reason_of(error)}: {_FILES}"
        return None

    def _count(self, unreadable: Sequence[tuple[int, str, str]]) -> None:
        for index, name, reason in unreadable:
            if index not in self._unreadable:
                self._unreadable[index] = f"{name}: {reason}"
                logger.warning("skipped %s: %s", name, reason)
        if len(self._unreadable) > UNREADABLE_SHARE * self._population:
            self.close()
            raise UserError(
                f"{len(self._unreadable)} of {self._population:,} images cannot be read, more than "
                f"{UNREADABLE_SHARE:.0%}; the last: {next(reversed(self._unreadable.values()))}"
            )

    @property
    def unreadable(self) -> list[str]:
        """The images that could not be read so far, each with its reason."""
        return list(self._unreadable.values())

    def close(self) -> None:
        """Ends the worker processes. Iterating again starts new ones at the same position."""
        _shut_down(self._holder)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Loader(_Stream):
    """An endless, shuffled, augmented stream of training batches for one rank.

    Yields `{"image": uint8 (B, 3, H, W), "label": int64 (B,), "index": int64 (B,)}` for images and what
    `d2it.data.cache.LatentCache.fetch` returns for a cache. Unreadable images are replaced by the next one in
    the source, reported once through `logging`, and raise UserError past 1 % of the source.

    Args:
        source: an ImageSource or a LatentCache.
        batch_size: images of one batch of this rank.
        seed: fixes order and augmentation; the same on every rank.
        rank: of this process: it takes block `rank` of every global batch.
        world_size: number of ranks.
        start: images seen by all ranks together, where the stream is taken up.
        workers: processes; 0 reads in the calling process.
        pin_memory: page-locked batches, where there is a GPU.
        process: run on each batch inside the worker; must be picklable where processes are spawned.

    Attributes:
        images_seen: images that all ranks together have been given: the position in the stream.

    Raises:
        UserError: while iterating; an image too small, too many unreadable ones, a dead worker.
    """

    def __init__(
        self,
        source,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        process: Callable[[Batch], Batch] | None = None,
    ) -> None:
        super().__init__(_Fetch(source, process, seed), len(source), workers, pin_memory)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.images_seen = start

    def _requests(self, position: int) -> Iterator[list[tuple[int, int]]]:
        count, epoch, order = self._population, -1, np.empty(0, np.int64)
        while True:
            first = position + self.rank * self.batch_size
            requests = []
            for p in range(first, first + self.batch_size):
                if p // count != epoch:
                    epoch = p // count
                    order = permutation(count, self.seed, epoch)
                requests.append((int(order[p % count]), p))
            yield requests
            position += self.world_size * self.batch_size

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not self._holder:
            self._start(self._requests(self.images_seen))
        batch = self._next()
        batch.pop("unreadable", None)
        self.images_seen += self.world_size * self.batch_size
        return batch


class SinglePass(_Stream):
    """Every image once, in order, not augmented; for calibration, caching and evaluation.

    Yields batches as `Loader` does, and in `batch["unreadable"]` a list of (index, name, reason): images
    that could not be read are left out, so a batch may be smaller than asked, or empty. Iterating again starts over.

    Args:
        batches: images of a batch, over the whole source; or the batches themselves, as sequences of indices.
        source: an ImageSource or a LatentCache.
        workers: processes; 0 reads in the calling process.
        pin_memory: page-locked batches, where there is a GPU.
        process: run on each batch inside the worker.

    Raises:
        UserError: as for `Loader`, over more than 1 % of this pass.
    """

    def __init__(
        self,
        source,
        batches: int | Sequence[Sequence[int]],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        process: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if isinstance(batches, int):
            if batches < 1:
                raise ValueError(f"batches must be positive, got {batches}")
            total = len(source)
            batches = [range(at, min(at + batches, total)) for at in range(0, total, batches)]
        super().__init__(_Fetch(source, process, None), sum(map(len, batches)), workers, pin_memory)
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._start([(int(index), -1) for index in batch] for batch in self._batches)
        while True:
            try:
                batch = self._next()
            except StopIteration:
                return
            yield batch
