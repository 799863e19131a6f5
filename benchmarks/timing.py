"""Timers: what one call takes, and the rates of the machine that times are set against.

On a GPU: the median over many calls timed by device events, with the 10 % and 90 % quantiles; short work is captured
in a CUDA graph, so that the gaps between launches are not measured. On a CPU: a wall clock, contenders in turns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import device

from d2it.models.precision import multiplies_bfloat16

SMALL_MS = 0.3
"""Work shorter than this is timed inside a CUDA graph: a launch costs 5 us and more."""

SECONDS = 0.25
"""How long each line is measured by default."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        ms: the median.
        ms_q10: a tenth of the calls are faster.
        ms_q90: a tenth of the calls are slower.
        calls: that were measured.
        how: "graph", "events" or "wall clock".
    """

    ms: float
    ms_q10: float
    ms_q90: float
    calls: int
    how: str


def _quantiles(samples: list[float], calls: int, how: str) -> Timing:
    samples = sorted(samples)

    def at(q: float) -> float:
        return samples[min(len(samples) - 1, round(q * (len(samples) - 1)))]

    return Timing(statistics.median(samples), at(0.1), at(0.9), calls, how)


def time_calls(calls: list[Callable[[], object]], *, graph: bool = True, seconds: float | None = None) -> Timing:
    """The times of one call. The calls do the same work on different memory and take turns.

    Args:
        calls: at least one; on a GPU, enough that their inputs exceed the L2 cache.
        graph: capture short work in a CUDA graph; falls back to events where capture fails.
        seconds: how long to measure; `SECONDS` where None.
    """
    if device() == "cpu":
        return time_in_turns([calls], seconds)[0]
    seconds = SECONDS if seconds is None else seconds
    # Not the default stream, which cannot be captured; a backward runs on the stream of its forward.
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once = _time_events(calls, 0.05)
        timing = None
        # Asked before, since a capture that fails may leave the allocator in capture.
        if graph and once.ms < SMALL_MS and not synchronises(calls[0]):
            try:
                timing = _time_graph(calls, stream, once.ms, seconds)
            except RuntimeError:  # it cannot be captured, for another reason
                torch.cuda.synchronize()
        timing = timing or _time_events(calls, seconds)
    torch.cuda.current_stream().wait_stream(stream)
    return timing


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def synchronises(call: Callable[[], object]) -> bool:
    """Whether a call on the GPU makes the host wait, as `nonzero` or `.item()` does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def time_in_turns(contenders: list[list[Callable[[], object]]], seconds: float | None = None) -> list[Timing]:
    """Times of one call of each contender on a CPU, by the wall clock, in five turns each.

    Args:
        contenders: the calls of each, which take turns as in `time_calls`.
        seconds: how long to measure each contender; `SECONDS` where None.
    """
    seconds = SECONDS if seconds is None else seconds
    samples: list[list[float]] = [[] for _ in contenders]
    for calls in contenders:
        calls[0]()
    for _ in range(5):
        for own, calls in zip(samples, contenders):
            most = len(own) + 200
            end = time.perf_counter() + seconds / 5
            while True:
                call = calls[len(own) % len(calls)]
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                own.append((now - start) * 1e3)
                if now > end or len(own) == most:
                    break
    return [_quantiles(own, len(own), "wall clock") for own in samples]


def _time_events(calls: list[Callable[[], object]], seconds: float) -> Timing:
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    count = int(min(max(seconds / (time.perf_counter() - start), 10), 300))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i, (before, after) in enumerate(events):
        before.record()
        calls[i % len(calls)]()
        after.record()
    torch.cuda.synchronize()
    return _quantiles([before.elapsed_time(after) for before, after in events], count, "events")


def _time_graph(calls: list[Callable[[], object]], stream: torch.cuda.Stream, ms: float, seconds: float) -> Timing:
    # A replay of about 2 ms, in which every copy of the inputs has its turn.
    rounds = max(1, math.ceil(2.0 / (ms * len(calls))))
    rounds = min(rounds, max(1, 256 // len(calls)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    inside = rounds * len(calls)
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    count = int(min(max(seconds / (time.perf_counter() - start), 10), 200))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return _quantiles([b.elapsed_time(a) / inside for b, a in events], count * inside, "graph")


@functools.cache
def machine_rates() -> dict[str, Any]:
    """Copy bandwidth (bytes read plus written) and matrix product rates of this machine, now."""
    gpu = device() == "cuda"
    elements = 2**28 if gpu else 2**23
    source = torch.randn(elements, device=device())
    target = torch.empty_like(source)
    copy = time_calls([functools.partial(target.copy_, source)], graph=False)
    rates: dict[str, Any] = {"copy_gbps": round(2 * 4 * elements / copy.ms / 1e6, 1), "matmul_tflops": {}}
    del source, target
    n = 8192 if gpu else 512
    dtypes = {torch.bfloat16: gpu or multiplies_bfloat16(), torch.float16: gpu, torch.float32: True}
    for dtype in [dtype for dtype, there in dtypes.items() if there]:
        size = n if dtype != torch.float32 else n // 2
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        product = time_calls([functools.partial(torch.mm, a, b)], graph=False)
        rates["matmul_tflops"][str(dtype)[6:]] = round(2 * size**3 / product.ms / 1e9, 3)
    return rates
