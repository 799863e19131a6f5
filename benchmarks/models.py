"""What train_bench and sample_bench share: the sizes, how a contender is measured, the table, the main.

A contender is set up, checked, timed and dropped before the next one is built, so that each has the memory to itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gc
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import Any

import command
import machine
import step_parts
import timing
import torch
from bench import Skip
from rows import Row, columns, note, ours
from timing import Timing
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.profiler import ProfilerActivity, profile

from d2it.devices import peak_flops
from d2it.diffusion import random_grain_map
from d2it.models import DiT, DynamicContentTransformer
from d2it.models.budget import grain_tokens, shares_of
from d2it.models.layers import FinalLayer, Modulation
from d2it.models.precision import why_float32
from d2it.nn import WindowAttention

#: Size -> (preset of the DynamicContentTransformer, preset of the DiT of the same width and depth); "-3": three grains.
SIZES = {
    f"{size}{grains}": (f"D2iT-{size}{grains}", f"DiT-{size}/2")
    for size in ("S", "B", "L", "XL")
    for grains in ("", "-3")
}


@dataclasses.dataclass
class Job:
    """A contender that is ready: one call of it is timed.

    Attributes:
        call: what is timed.
        images: of one call.
        flops: of one call: two for each multiply-accumulate of the tokens that exist.
        error: against the reference; None where there is nothing to compare with.
        tolerance: the largest error of a right result.
        counted: figures of the row that follow from counts.
        profiled: whether the row names the kernels that take longest.
        part_of: where the row adds up operators by part, what tells the part (`step_parts.parts_of`).
        host: whether nothing of it runs on a GPU.
        close: frees what the contender holds.
    """

    call: Callable[[], object]
    images: int
    flops: int = 0
    error: float | None = None
    tolerance: float = 0.0
    counted: dict[str, float] = dataclasses.field(default_factory=dict)
    profiled: bool = False
    part_of: step_parts.PartOf | None = None
    host: bool = False
    close: Callable[[], object] = lambda: None


@dataclasses.dataclass
class Case:
    """Contenders that share a line of the table.

    Attributes:
        name: of the case.
        shape: what the name abbreviates.
        dtype: in which the contenders compute.
        direction: what is measured of them.
        contenders: name -> its preset, and what sets it up or raises Skip.
    """

    name: str
    shape: dict[str, Any]
    dtype: torch.dtype
    direction: str
    contenders: dict[str, tuple[str, Callable[[], Job]]]


def size_arguments(description: str, batches: Sequence[int] = (32,)) -> argparse.ArgumentParser:
    """The options of both scripts; `batches`: the default on a GPU, what matters most first."""
    gpu = machine.device() == "cuda"
    parser = command.arguments(description)
    parser.add_argument("--model", nargs="+", choices=sorted(SIZES), default=["XL", "B"] if gpu else ["S"])
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=list(batches) if gpu else [2], help="images (%(default)s)"
    )
    parser.add_argument("--image-size", type=int, default=256 if gpu else 128, help="pixels (%(default)s)")
    parser.add_argument(
        "--fill", type=float, default=0.5, help="share of regions finer than the coarsest (%(default)s)"
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="*",
        default=[0.25, 0.5, 0.75, 1.0],
        metavar="B",
        help="shares of the tokens, of those of the finest map, of the curve of seconds against tokens (%(default)s)",
    )
    parser.set_defaults(shares=None)
    parser.add_argument("--compiled", action="store_true", help="on a CPU too, where compiling takes minutes")
    return parser


def each_batch(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options for each of the batches."""
    for batch in options.batch_size:
        yield argparse.Namespace(**{**vars(options), "batch_size": batch})


def grain_maps(options: argparse.Namespace, grid: tuple[int, ...], num_grains: int) -> Tensor:
    """Random maps of a batch, the same for every contender: of three grains, half of the finer regions are finest.

    `options.shares`, where they are not None, are the shares of the grains instead.
    """
    shares = options.shares or [options.fill * i / (num_grains - 1) for i in range(num_grains - 1, 0, -1)]
    generators = [torch.Generator().manual_seed(i) for i in range(options.batch_size)]
    return random_grain_map(grid, shares, num_grains, generator=generators)


def at_budgets(options: argparse.Namespace, preset: str) -> Iterator[tuple[float, argparse.Namespace, dict[str, Any]]]:
    """Yields (budget, options of maps that spend it, the shape's entries of it) for every point of a preset's curve."""
    config = DynamicContentTransformer.preset_config(preset, image_size=options.image_size)
    tokens = grain_tokens(config)
    for budget in options.budgets:
        spending = argparse.Namespace(**{**vars(options), "shares": shares_of(budget, tokens)})
        maps = grain_maps(spending, config.region_grid, config.num_grains)
        spent = int(torch.tensor(tokens)[maps].sum()) / (maps.numel() * tokens[-1])
        yield budget, spending, {"budget": budget, "tokens": round(spent, 4)}


def each_dtype(options: argparse.Namespace, preset: str) -> Iterator[argparse.Namespace]:
    """The options with the `dtype` that precision=auto takes for a preset here; then, on a CPU, float32 if it is not.

    `auto` of the options says which of the two it is.
    """
    kind = DynamicContentTransformer if preset in DynamicContentTransformer.presets else DiT
    why = why_float32(kind.preset_config(preset), torch.device(machine.device()))
    auto = torch.bfloat16 if why is None else torch.float32
    for dtype in dict.fromkeys([auto, *([torch.float32] if machine.device() == "cpu" else [])]):
        yield argparse.Namespace(**{**vars(options), "dtype": dtype, "auto": dtype == auto})


def case_name(options: argparse.Namespace, preset: str, what: str) -> str:
    """The name of a case of a preset, with its dtype."""
    return f"{preset}-{options.image_size}-B{options.batch_size}-{what}-{str(options.dtype)[6:]}"


def case_shape(options: argparse.Namespace, **entries: Any) -> dict[str, Any]:
    """What such a name abbreviates; "precision" is there where it is not auto's."""
    other = {} if options.auto else {"precision": str(options.dtype)[6:]}
    return {"batch": options.batch_size, "image_size": options.image_size, **entries, **other}


def compilable(options: argparse.Namespace) -> None:
    if machine.device() != "cpu":
        return
    if not options.compiled:
        raise Skip("compiling takes minutes on a CPU: --compiled")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise Skip("Inductor finds no C++ compiler") from None


def open_gates(network: nn.Module) -> None:
    """Weights where the initialisation has zeros, the same in every call: else no block would reach the result."""
    with torch.no_grad():
        rng = torch.Generator(next(network.parameters()).device).manual_seed(0)
        for part in network.modules():
            if isinstance(part, (Modulation, FinalLayer)):
                part.linear.weight.normal_(std=0.02, generator=rng)
            if isinstance(part, WindowAttention) and part.bias is not None:
                part.bias.normal_(std=0.02, generator=rng)


def distance(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """||got - want|| / ||want|| over all tensors together."""
    off = total = 0.0
    for a, b in zip(got, want, strict=True):
        off += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    return (off / total) ** 0.5


def warm(case: Case) -> None:
    """Runs what compiles once, and checks nothing."""
    for name, (_, setup) in case.contenders.items():
        if not name.endswith(("compiled", "graph")):
            continue
        torch.compiler.reset()
        gc.collect()
        try:
            job = setup()
            job.call()
            machine.synchronize()
            job.close()
        except (Skip, RuntimeError) as reason:  # reported when it is measured
            print(f"{case.name} {name}: {reason}")


def run_case(case: Case, seconds: float | None) -> Iterator[Row]:
    """A row for each contender, as soon as it is measured."""
    for name, (preset, setup) in case.contenders.items():
        shape = {**case.shape, "preset": preset}
        base = {"case": case.name, "contender": name, "dtype": str(case.dtype)[6:], "shape": shape}
        job: Job | None = None  # the one before lets go of its memory
        torch.compiler.reset()
        gc.collect()
        if machine.device() == "cuda":
            torch.cuda.empty_cache()
        try:
            job = setup()
            if machine.device() == "cuda":  # what the check took is not the contender's
                torch.cuda.reset_peak_memory_stats()
            with machine.Power() as power:
                if job.host:
                    time = timing.time_in_turns([[job.call]], seconds)[0]
                else:
                    time = timing.time_calls([job.call], graph=False, seconds=seconds)
            kernels = profiled(job.call, job.part_of) if job.profiled else {}
        except Skip as reason:
            yield {**base, "skipped": str(reason)}
            continue
        except torch.OutOfMemoryError:
            yield {**base, "skipped": "out of memory"}
            continue
        finally:
            if job is not None:
                job.close()
        print(f"{case.name} {name}: {time.ms:.1f} ms", file=sys.stderr, flush=True)
        yield {**base, "direction": case.direction, **_figures(job, time, case.dtype), **power.read(), **kernels}


KERNELS = 25
"""How many kernels a row names."""


def profiled(call: Callable[[], object], part_of: step_parts.PartOf | None = None) -> dict[str, Any]:
    """Entries of a row from one call: "kernels", the kernels on a GPU, the operators on a CPU, that take longest (name,
    milliseconds, calls); and "parts" by `part_of`, if given."""
    gpu = machine.device() == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=part_of is not None) as profiler:
        call()
        machine.synchronize()

    def ms(event: Any) -> float:
        return (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3

    on_device, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    found = [
        {"name": event.key[:120], "ms": ms(event), "calls": event.count}
        for event in profiler.key_averages()
        if event.device_type == (on_device if gpu else on_host)
    ]
    row: dict[str, Any] = {"kernels": sorted(found, key=lambda kernel: -kernel["ms"])[:KERNELS]}
    if part_of is not None:
        # The operators, to which the profiler adds the time of the kernels that they launch.
        events = [e for e in profiler.key_averages(group_by_input_shape=True) if e.device_type == on_host and ms(e)]
        row["parts"] = step_parts.by_part(((e.key, e.input_shapes, ms(e), e.count) for e in events), part_of)
    return row


def _figures(job: Job, time: Timing, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {
        **dataclasses.asdict(time),
        "images_per_s": job.images / time.ms * 1e3,
        **job.counted,
    }
    if job.error is not None:
        row |= {"error": job.error, "correct": job.error <= job.tolerance}
    if job.flops:
        rate = timing.machine_rates()["matmul_tflops"][str(dtype)[6:]]
        row |= {"flops": job.flops, "tflops": job.flops / time.ms / 1e9, "floor_ms": job.flops / rate / 1e9}
        row["matmul_share"] = row["floor_share"] = row["floor_ms"] / time.ms
        peak = peak_flops(torch.device(machine.device()))
        if peak:
            row["mfu"] = job.flops / time.ms * 1e3 / peak
    if machine.device() == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def table(rows: list[Row]) -> str:
    lines = [
        ("case", "contender", "ms", "q10..q90", "images/s", "TFLOP/s", "of matmul rate", "MFU", "predicted", "GB", "")
    ]
    for row in rows:
        if "skipped" in row:
            lines.append((row["case"], row["contender"], *[""] * 8, f"skipped: {row['skipped']}"))
            continue
        lines.append(
            (
                row["case"],
                row["contender"],
                f"{row['ms']:.2f}",
                f"{row['ms_q10']:.2f}..{row['ms_q90']:.2f}",
                f"{row['images_per_s']:.2f}",
                f"{row['tflops']:.3g}" if "tflops" in row else "",
                f"{row['matmul_share']:.0%}" if "matmul_share" in row else "",
                f"{row['mfu']:.1%}" if "mfu" in row else "",
                f"{row['predicted_ms']:.2f}" if "predicted_ms" in row else "",
                f"{row['memory_gb']:.1f}" if "memory_gb" in row else "",
                note(rows, row),
            )
        )
    return columns(lines)


def main(operator: str, options: argparse.Namespace, cases: Callable[[argparse.Namespace], Iterator[Case]]) -> int:
    """Measures the cases, prints the table, keeps the results after each line; 1 where a result of ours is wrong."""
    chosen = [case for case in cases(options) if fnmatch.fnmatch(case.name, options.only)]
    command.begin(options)
    if options.warm:
        for case in command.share_of(chosen, options.warm):
            warm(case)
        return 0
    end = monotonic() + 60 * options.minutes
    rows: list[Row] = []
    lines = sum(len(case.contenders) for case in chosen)
    for row in itertools.chain.from_iterable(run_case(case, options.seconds) for case in chosen):
        rows.append(row)
        if not options.no_save:
            complete = options.only == "*" and len(rows) == lines
            command.write_results(operator, rows, options.out, complete=complete)
        if monotonic() > end:
            break
    if len(rows) < lines:
        print(f"out of time: {lines - len(rows)} of {lines} lines left out")
    print(f"\n{table(rows)}")
    if parts := step_parts.table(rows):
        print(f"\n{parts}")
    return 1 if any(row.get("correct") is False and ours(row) for row in rows) else 0
