"""Shared by every benchmark: what is measured, against what, how it is timed, and the file that keeps it.

A script declares its measurements as :class:`Bench` objects and ends in ``common.main(...)``; run alone it
prints a table and writes ``benchmarks/results/<device>/<operator>.json``. On a GPU:

- the median over many calls timed by device events, with the 10 % and 90 % quantiles; short work is captured
  in a CUDA graph, so that the gaps between launches are not measured;
- calls take turns over enough copies of the inputs that none is found in the L2 cache;
- forward and backward apart: the backward is ``torch.autograd.grad`` on a graph that is kept;
- bytes and operations are counted from the shapes by the script, and set against a copy bandwidth and a matrix
  product rate measured in the same run;
- a result is compared with the reference before it is timed, and no speed-up is given for a wrong one.

On a CPU the same scripts run at small sizes with a wall clock, contenders in turns, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from results import RESULTS, Row, ours, speedup  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map_only  # noqa: E402

# ||result - reference|| / ||reference|| above which a result is wrong; gradients may be twice as far.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

SMALL_MS = 0.3
"""Work shorter than this is timed inside a CUDA graph: a launch costs 5 us and more."""


SECONDS = 0.25
"""How long each line is measured, where nobody says."""


class Skip(Exception):
    """Raised by a contender that cannot run here; its text is printed in the contender's place."""


Run = Callable[[dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the work costs at least: every input read once, every output written once; 2 operations a MAC."""

    bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """One measurement: the same inputs through every contender."""

    case: str
    """Short name, such as "n64-D72-fill0.5-bfloat16"."""
    shape: dict[str, Any]
    """What `case` abbreviates; kept with the result."""
    dtype: torch.dtype
    inputs: Callable[[int], dict[str, Any]]
    """Seed -> arguments on the device. Called once for each copy of the inputs."""
    contenders: dict[str, Callable[[], Run]]
    """Name -> a function that sets the contender up, or raises Skip, and returns what runs it on inputs. Ours are
    named "d2it ..." and come first."""
    forward: Cost
    backward: Cost | None = None
    gradients: tuple[str, ...] = ()
    """Inputs with a gradient; needed for a backward."""
    expected: Run | None = None
    """The reference, given the inputs with floating point widened. None: nothing to check, no speed-ups."""
    operator: str = ""
    """Result file that the rows go to, where a script measures several operators; the script's own if empty."""


@dataclasses.dataclass(frozen=True)
class Timing:
    ms: float
    ms_q10: float
    ms_q90: float
    calls: int
    how: str
    """"graph", "events" or "wall clock"."""


# -------------------------------------------------------------------------------------------------
# The machine


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


@functools.cache
def device_name() -> str:
    if device() == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.machine()}"


def slug(name: str) -> str:
    """A device's name as a folder: lower case, dashes."""
    name = re.sub(r"\((?:r|tm)\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_hash() -> str:
    """Of everything that is measured: names the code where git is absent or the tree has changes."""
    digest = hashlib.sha256()
    for folder, pattern in (("kernels", "*.py"), ("csrc", "*"), ("d2it", "**/*.py"), ("benchmarks", "*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def header() -> dict[str, Any]:
    """Device, driver, versions and commit: what a figure means nothing without."""
    # D2IT_COMMIT: of a copy without its git folder, as on a machine that only measures.
    commit = os.environ.get("D2IT_COMMIT") or _command("git", "rev-parse", "--short", "HEAD") or "unknown"
    # Results are written while others are measured; they are no change of what is measured.
    changes = _command("git", "status", "--porcelain", "--", ":!benchmarks/results", ":!docs", ":!README.md")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    info = {
        "device": device_name(),
        "small": device() == "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if changes else ""),
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["cuda"] = torch.version.cuda
        info["driver"] = Power.driver()
        info["sms"] = properties.multi_processor_count
        info["l2_mb"] = round(properties.L2_cache_size / 2**20)
        info["memory_gb"] = round(properties.total_memory / 2**30)
    else:
        info["threads"] = torch.get_num_threads()
    return info


class Power:
    """Board power and SM clock while something runs, from NVML; empty where there is no driver."""

    PERIOD = 0.01

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    @functools.cache
    def _nvml() -> Any:
        if device() != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # not installed, or NVMLError_LibraryNotFound and its kin: measured without
            return None
        return pynvml

    @staticmethod
    @functools.cache
    def driver() -> str | None:
        nvml = Power._nvml()
        return str(nvml.nvmlSystemGetDriverVersion()) if nvml else None

    @staticmethod
    @functools.cache
    def _handle() -> Any:
        nvml = Power._nvml()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        try:
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError:
            return nvml.nvmlDeviceGetHandleByIndex(0)

    def _sample(self) -> None:
        nvml, handle = self._nvml(), self._handle()
        while not self._stop.is_set():
            try:
                watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
                self._samples.append((watts, nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))
            except nvml.NVMLError:
                return
            self._stop.wait(self.PERIOD)

    def __enter__(self) -> Power:
        if self._nvml():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def read(self) -> dict[str, float]:
        if not self._samples:
            return {}
        watts, clocks = zip(*self._samples)
        return {"watts": round(statistics.fmean(watts), 1), "sm_mhz": statistics.median(clocks)}


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
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,):
        size = n if dtype != torch.float32 else n // 2
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        product = time_calls([functools.partial(torch.mm, a, b)], graph=False)
        rates["matmul_tflops"][str(dtype)[6:]] = round(2 * size**3 / product.ms / 1e9, 3)
    return rates


# -------------------------------------------------------------------------------------------------
# Timing


def _quantiles(samples: list[float], calls: int, how: str) -> Timing:
    samples = sorted(samples)

    def at(q: float) -> float:
        return samples[min(len(samples) - 1, round(q * (len(samples) - 1)))]

    return Timing(statistics.median(samples), at(0.1), at(0.9), calls, how)


def time_calls(calls: list[Callable[[], object]], *, graph: bool = True, seconds: float | None = None) -> Timing:
    """Time of one call. The calls do the same work on different memory and take turns.

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
            except RuntimeError:  # capture refuses it for another reason
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


# -------------------------------------------------------------------------------------------------
# One benchmark


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _floats(value: Any) -> list[Tensor]:
    return [t for t in _tensors(value) if t.is_floating_point()]


def _require_gradients(inputs: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    leaves = [t for name in names for t in _floats(inputs.get(name))]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def input_sets(bench: Bench) -> list[dict[str, Any]]:
    """Copies of the inputs: so many that a call finds none of its own in the L2 cache (one on a CPU)."""
    first = bench.inputs(0)
    if device() == "cpu":
        return [first]
    size = max(1, sum(t.nbytes for t in _tensors(first)))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    free = torch.cuda.mem_get_info()[0]
    # Outputs and gradients take as much again, per copy, while a backward is timed.
    count = min(1 + math.ceil(2 * l2 / size), max(1, int(0.4 * free / (4 * size))), 64)
    return [first, *(bench.inputs(seed) for seed in range(1, count))]


def _distance(got: list[Tensor], want: list[Tensor], tolerance: float) -> tuple[float, bool]:
    """The largest relative error over the results, and whether all are within the tolerance."""
    worst, correct = 0.0, len(got) == len(want)
    for a, b in zip(got, want):
        if a.shape != b.shape:
            return math.inf, False
        if a.is_floating_point():
            b = b.to(torch.float64)
            error = ((a.to(torch.float64) - b).norm() / b.norm().clamp(min=1e-30)).item()
            worst = max(worst, error if error == error else math.inf)
        elif not torch.equal(a.to(b.dtype), b):
            return math.inf, False
    return worst, correct and worst <= tolerance


@dataclasses.dataclass
class _Reference:
    outputs: list[Tensor]
    gradients: list[Tensor]


def _evaluate(run: Run, inputs: dict[str, Any], gradients: tuple[str, ...], cotangents: list[Tensor]) -> _Reference:
    leaves = _require_gradients(inputs, gradients)
    outputs = run(inputs)
    grads: tuple[Tensor, ...] = ()
    if leaves:
        floats = _floats(outputs)
        grads = torch.autograd.grad(floats, leaves, [c.to(t.dtype) for c, t in zip(cotangents, floats)])
    return _Reference([t.detach() for t in _tensors(outputs)], list(grads))


def cotangents_like(outputs: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator(device=outputs[0].device).manual_seed(1) if outputs else None
    return [torch.randn(t.shape, generator=rng, device=t.device, dtype=t.dtype) for t in outputs]


def fresh_compiler() -> None:
    """Every case compiles for its own static shapes. A kept graph forbids donated buffers, and what is compiled with
    them would not be found in the compilers' caches."""
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False


def run_bench(bench: Bench, seconds: float | None = None) -> list[Row]:
    """Rows of the result file: one for each contender and direction, or one that says why it was skipped."""
    rates = machine_rates()
    fresh_compiler()
    sets = input_sets(bench)
    rows: list[Row] = []
    reference: _Reference | None = None
    directions = ["forward"] + (["backward"] if bench.backward else [])

    timed: list[_Timed] = []
    for name, setup in bench.contenders.items():
        base = {"case": bench.case, "contender": name, "dtype": str(bench.dtype)[6:], "shape": bench.shape}
        try:
            run = setup()
            warm = run(sets[0])
            cotangents = cotangents_like(_floats(warm)) if bench.backward else []
            del warm
            gradients = bench.gradients if bench.backward else ()
            if reference is None and bench.expected is not None:
                wide = tree_map_only(Tensor, _widen, {k: _detached(v) for k, v in sets[0].items()})
                reference = _evaluate(bench.expected, wide, gradients, cotangents)
            got = _evaluate(run, sets[0], gradients, cotangents)
        except Skip as reason:
            rows.append({**base, "skipped": str(reason)})
            continue
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({**base, **OUT_OF_MEMORY})
            continue
        for direction in directions:
            row = {**base, "direction": direction}
            backward = direction == "backward"
            if reference is not None:
                tolerance = TOLERANCE[bench.dtype] * (2 if backward else 1)
                a = got.gradients if backward else got.outputs
                b = reference.gradients if backward else reference.outputs
                row["error"], row["correct"] = _distance(a, b, tolerance)
            rows.append(row)
            calls = functools.partial(_direction_calls, direction, run, sets, gradients)
            timed.append(_Timed(row, calls, bench.backward if backward else bench.forward))
        del got
    for one, timing, power in _time_all(timed, seconds):
        one.row.update({**_figures(timing, one.cost, bench.dtype, rates), **power} if timing else OUT_OF_MEMORY)
    return rows


@dataclasses.dataclass
class _Timed:
    row: Row
    calls: Callable[[], list[Callable[[], object]]]
    cost: Cost


OUT_OF_MEMORY = {"skipped": "out of memory"}


def _time_all(timed: list[_Timed], seconds: float | None) -> Iterator[tuple[_Timed, Timing | None, dict[str, float]]]:
    """Each with its time, None where its memory did not suffice. On a GPU one after the other, with the watts; on a CPU
    in turns, since its speed drifts: what slows one contender slows all of them."""
    if device() == "cpu":
        for one, timing in zip(timed, time_in_turns([one.calls() for one in timed], seconds)):
            yield one, timing, {}
        return
    for one in timed:
        try:
            with Power() as power:
                timing = time_calls(one.calls(), seconds=seconds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield one, None, {}
        else:
            yield one, timing, power.read()


def _detached(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, value)


def _widen(tensor: Tensor) -> Tensor:
    # float64 on a CPU; on a GPU float32, which holds the large sizes and is exact enough to judge halves.
    wide = torch.float32 if tensor.is_cuda and tensor.dtype != torch.float32 else torch.float64
    return tensor.detach().to(wide) if tensor.is_floating_point() else tensor


def direction_call(
    direction: str, run: Run, inputs: dict[str, Any], gradients: tuple[str, ...]
) -> Callable[[], object]:
    """What is timed: the forward as in training (with a graph where there are gradients), or the backward alone."""
    leaves = _require_gradients(inputs, gradients)
    if direction == "forward":
        return functools.partial(run, inputs)
    outputs = _floats(run(inputs))
    return functools.partial(torch.autograd.grad, outputs, leaves, cotangents_like(outputs), retain_graph=True)


def _direction_calls(
    direction: str, run: Run, sets: list[dict[str, Any]], gradients: tuple[str, ...]
) -> list[Callable[[], object]]:
    if device() == "cpu":
        return [direction_call(direction, run, inputs, gradients) for inputs in sets]
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):  # where a backward then runs, and may be captured
        return [direction_call(direction, run, inputs, gradients) for inputs in sets]


def _figures(timing: Timing, cost: Cost, dtype: torch.dtype, rates: dict[str, Any]) -> dict[str, Any]:
    """The row's numbers. floor_ms: the larger of bytes / copy bandwidth and operations / matrix product rate."""
    gbps = cost.bytes / timing.ms / 1e6
    row = {
        "ms": timing.ms,
        "ms_q10": timing.ms_q10,
        "ms_q90": timing.ms_q90,
        "calls": timing.calls,
        "how": timing.how,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gbps": gbps,
        "copy_share": gbps / rates["copy_gbps"],
    }
    floor = cost.bytes / rates["copy_gbps"] / 1e6
    peak = rates["matmul_tflops"].get(str(dtype)[6:])
    if cost.flops and peak:
        row["tflops"] = cost.flops / timing.ms / 1e9
        row["matmul_share"] = row["tflops"] / peak
        floor = max(floor, cost.flops / peak / 1e9)
    row["floor_ms"] = floor
    row["floor_share"] = floor / timing.ms
    return row


# -------------------------------------------------------------------------------------------------
# Results


def table(rows: list[Row]) -> str:
    head = ("case", "direction", "contender", "ms", "q10..q90", "GB/s", "of copy", "TFLOP/s", "of floor", "")
    body = []
    for row in rows:
        if "skipped" in row:
            note = f"skipped: {row['skipped']}"
            body.append((row["case"], row.get("direction", ""), row["contender"], *[""] * 6, note))
            continue
        faster = speedup(rows, row)
        note = f"{faster[0]:.2f}x {faster[1]}" if faster else ""
        if not row.get("correct", True):
            note = f"WRONG: relative error {row['error']:.1e}"
        body.append(
            (
                row["case"],
                row["direction"],
                row["contender"],
                f"{row['ms']:.4f}",
                f"{row['ms_q10']:.4f}..{row['ms_q90']:.4f}",
                f"{row['gbps']:.1f}",
                f"{row['copy_share']:.0%}",
                f"{row['tflops']:.2f}" if "tflops" in row else "",
                f"{row['floor_share']:.0%}",
                note,
            )
        )
    return columns([head, *body])


def columns(lines: list[tuple[str, ...]]) -> str:
    """Cells padded to columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def title() -> str:
    info = header()
    parts = [
        info["device"],
        *(f"{k} {info[k]}" for k in ("driver", "cuda", "torch", "triton", "python") if info.get(k)),
    ]
    return ", ".join([*parts, f"commit {info['commit']}"])


def results_folder() -> Path:
    return RESULTS / slug(device_name())


def write_results(operator: str, rows: list[Row], folder: Path | None = None, *, complete: bool = True) -> Path:
    """`<folder>/<operator>.json`: header, the rates of the same run, rows. Replaced at once, never half written."""
    folder = folder or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{operator}.json"
    content = {"operator": operator, "complete": complete, **header(), "rates": machine_rates(), "rows": _rounded(rows)}
    partial_file = path.with_suffix(f".{os.getpid()}")
    partial_file.write_text(json.dumps(content, indent=1) + "\n")
    partial_file.replace(path)
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases by name, such as 'n64-*'")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go, not benchmarks/results/<device>")
    parser.add_argument("--no-save", action="store_true", help="print the table, write nothing")
    parser.add_argument("--seconds", type=float, help="how long to measure each line")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after that")
    parser.add_argument(
        "--warm",
        nargs="?",
        const="0/1",
        metavar="I/N",
        help="run everything once and time nothing, which fills compilers' caches; I/N: every N-th case, from I on",
    )
    parser.add_argument("--memory", type=float, default=1.0, help="share of the GPU's memory that may be used")
    return parser


def begin(args: argparse.Namespace) -> None:
    """What every benchmark says and sets before it starts."""
    print(title(), flush=True)
    if device() == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.memory)
    elif not args.warm:
        print(f"no GPU: small sizes on {torch.get_num_threads()} threads; these figures say nothing about a GPU")
    if not args.warm:
        rates = machine_rates()
        print(f"copy {rates['copy_gbps']} GB/s; matrix product {rates['matmul_tflops']} TFLOP/s", flush=True)


def share_of(items: list[Any], shard: str) -> list[Any]:
    """The part of them that "I/N" names."""
    i, _, n = shard.partition("/")
    return items[int(i) :: int(n)]


def warm(bench: Bench) -> None:
    """Runs every contender once, forward and backward, and looks at nothing."""
    fresh_compiler()
    for name, setup in bench.contenders.items():
        try:
            direction_call("backward" if bench.backward else "forward", setup(), bench.inputs(0), bench.gradients)()
            synchronize()
        except (Skip, RuntimeError) as reason:  # reported when it is measured
            print(f"{bench.case} {name}: {reason}")


def main(
    description: str,
    operator: str,
    benches: Callable[[], Iterator[Bench]],
    args: argparse.Namespace | None = None,
) -> int:
    """A benchmark script's main: runs its benches, prints the table and keeps the results after each case.

    `args`: parsed by the script, where it has options of its own beside those of `arguments`.
    Exit status 1 where a result of ours is wrong.
    """
    args = args or arguments(description).parse_args()
    chosen = [bench for bench in benches() if fnmatch.fnmatch(bench.case, args.only)]
    begin(args)
    if args.warm:
        for bench in share_of(chosen, args.warm):
            warm(bench)
        return 0
    end = time.monotonic() + 60 * args.minutes
    rows: dict[str, list[Row]] = {}
    for i, bench in enumerate(chosen):
        name = bench.operator or operator
        rows.setdefault(name, []).extend(run_bench(bench, args.seconds))
        print(f"[{i + 1}/{len(chosen)}] {name} {bench.case}", file=sys.stderr, flush=True)
        if device() == "cuda":
            torch.cuda.empty_cache()
        if not args.no_save:
            finished = all((later.operator or operator) != name for later in chosen[i + 1 :])
            write_results(name, rows[name], args.out, complete=args.only == "*" and finished)
        if time.monotonic() > end and i + 1 < len(chosen):
            print(f"out of time: {len(chosen) - i - 1} of {len(chosen)} cases left out")
            break
    for name, own in rows.items():
        print(f"\n{name}\n{table(own)}")
    if not args.no_save and chosen:
        print(f"written to {args.out or results_folder()}")
    return 1 if any(ours(row) and not row.get("correct", True) for own in rows.values() for row in own) else 0
