"""Everything that a GPU can say about d2it, in one command and ten minutes; `make gpu` runs it.

    python benchmarks/run_gpu.py                        # all parts
    python benchmarks/run_gpu.py tests attn_bench       # these parts alone
    python benchmarks/run_gpu.py --list

Parts, in order: build (the CUDA extension, in place, for this GPU), tests (tests/kernels and every test marked gpu),
memcheck and racecheck (compute-sanitizer, where it exists, on the smallest shape of every operator), warm (what the
benchmarks compile, so that they find it in the compilers' caches), then every benchmark alone on the device, plots,
goals. Up to warm, parts run side by side in many processes: compiling is most of their work. Needs no network and only
what the environment has. A benchmark writes its file after every case and starts none when its share of the time is
used up; its first cases are those that matter most.

Logs go to runs/gpu/, results to benchmarks/results/<device>/. Exit status 1 where a part failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import machine
import torch
from goals import goal_table
from results import plot
from rows import columns, load

ROOT = machine.ROOT
LOGS = ROOT / "runs" / "gpu"
TESTS = ROOT / "tests" / "kernels"
SHARDS = 4 if torch.cuda.is_available() else 1
"""Processes for each test file of the suite, and for what a benchmark compiles."""

# What matters most first, with its share of the time.
SHARES = {
    "attn": 5,
    "train": 5,
    "kde_entropy": 2,
    "modulate": 2,
    "plan_tokens": 1,
    "pack_tokens": 2,
    "neighbor_copy": 2,
    "sample": 2,
}
CHECKS = 0.45
"""Share of the time in which everything before the benchmarks ends."""


@dataclasses.dataclass
class Outcome:
    part: str
    state: str
    """"passed", "failed", "stopped at its limit" or "skipped: ..."."""
    seconds: float = 0.0
    tail: str = ""


BAD = ("failed", "stopped at its limit")


def benchmarks() -> list[str]:
    names = {path.stem.removesuffix("_bench") for path in (ROOT / "benchmarks").glob("*_bench.py")}
    order = list(SHARES)
    return [f"{name}_bench" for name in sorted(names, key=lambda n: (order.index(n) if n in order else 99, n))]


def share(benchmark: str) -> int:
    return SHARES.get(benchmark.removesuffix("_bench"), 1)


def run(part: str, command: list[str], limit: float, **environment: str) -> Outcome:
    """Runs a command with its output in runs/gpu/<part>.log; ends it, and what it started, at its limit."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            code = None
    # pytest's 5: this shard had nothing to run; its 2: the file could not be imported.
    suite = part.startswith("tests")
    passed = code == 0 or (code == 5 and suite)
    tail = log.read_text(errors="replace")
    state = "stopped at its limit" if code is None else "passed" if passed else "failed"
    absent = re.search(r"^(?:E +)?ModuleNotFoundError: No module named '(\w+)'$", tail[-1000:], re.MULTILINE)
    if code == (2 if suite else 1) and absent:
        state = f"skipped: needs {absent[1]}, which is not installed"
    return Outcome(part, state, time.monotonic() - start, tail)


def build(limit: float) -> Outcome:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    environment = {"D2IT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count())}
    if not major:
        environment = {"D2IT_BUILD": "cpu"}
    return run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, **environment)


Task = tuple[str, list[str], dict[str, str]]
"""A part, its command, its environment."""


def suite_tasks(parts: list[str]) -> tuple[list[Task], list[Outcome]]:
    """The suite and the sanitizers; and those that are skipped."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    alone = {"OMP_NUM_THREADS": "1"}
    tasks: list[Task] = []
    skipped: list[Outcome] = []
    if "tests" in parts:
        for shard in range(SHARDS):
            for path in sorted(TESTS.glob("test_*.py")):
                name = f"tests.{path.stem.removeprefix('test_')}.{shard}"
                tasks.append((name, [*pytest, str(path)], {**alone, "D2IT_TEST_SHARD": f"{shard}/{SHARDS}"}))
        for path in sorted(TESTS.parent.glob("test_*.py")):
            if "mark.gpu" in path.read_text():
                name = f"tests.{path.stem.removeprefix('test_')}"
                tasks.append((name, [*pytest, "-m", "gpu", str(path)], alone))
    for tool in ("memcheck", "racecheck"):
        if tool not in parts:
            continue
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer is None or not torch.cuda.is_available():
            skipped.append(Outcome(tool, f"skipped: {'no GPU' if sanitizer else 'no compute-sanitizer here'}"))
            continue
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        words += [*pytest, str(TESTS), "-k", "against_reference and not float32"]
        # Without the caching allocator every tensor is an allocation of its own, whose end memcheck knows.
        environment = {**alone, "D2IT_KERNEL_SHAPES": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for shard in range(2):
            tasks.append((f"{tool}.{shard}", words, {**environment, "D2IT_TEST_SHARD": f"{shard}/2"}))
    return tasks, skipped


def warm_tasks(chosen: list[str]) -> list[Task]:
    """The benchmarks' compilers, each in its own process, since there are many of them, and within so little of the
    GPU's memory that the tests beside them have theirs. What does not fit compiles when it is measured."""
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    tasks: list[Task] = []
    for name in chosen:
        shards, memory = (1, 0.2) if name in ("train_bench", "sample_bench") else (SHARDS, 0.05)
        for i in range(shards):
            words = [f"benchmarks/{name}.py", "--warm", f"{i}/{shards}", "--memory", str(memory)]
            tasks.append((f"warm.{name}.{i}", [sys.executable, *words], environment))
    return tasks


def draw_plots(folder: Path) -> Outcome:
    start = time.monotonic()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return Outcome("plots", "skipped: matplotlib is not installed")
    drawn = []
    for operator, result in load(folder).items():
        if any("ms" in row for row in result["rows"]):
            plot(result, folder / f"{operator}.png")
            drawn.append(operator)
    return Outcome("plots", "passed", time.monotonic() - start, ", ".join(drawn))


def show(outcome: Outcome) -> None:
    print(f"{outcome.part:<28} {outcome.state:<24} {outcome.seconds:6.1f} s", flush=True)
    if outcome.state in BAD and not outcome.part.startswith("warm"):
        print("\n".join(f"    {line}" for line in outcome.tail.splitlines()[-15:]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["build", "tests", "memcheck", "racecheck", "warm", *benchmarks(), "plots", "goals"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all where none is named")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go, not benchmarks/results/<device>")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--without-gpu", action="store_true", help="rehearse the same parts on the CPU, small")
    args = parser.parse_args()
    if args.list:
        print("\n".join(known))
        return 0
    if unknown := [part for part in args.parts if part not in known]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    if not torch.cuda.is_available() and not args.without_gpu:
        print(f"no GPU: torch {torch.__version__} sees no CUDA device (--without-gpu rehearses on the CPU)")
        return 1
    parts = args.parts or known
    folder = (args.out or command.results_folder()).resolve()
    chosen = [name for name in benchmarks() if name in parts]
    end = time.monotonic() + 60 * args.minutes
    checked = time.monotonic() + 60 * args.minutes * (CHECKS if chosen else 1)

    def left() -> float:
        return end - time.monotonic()

    def before_the_benchmarks(part: str, command: list[str], environment: dict[str, str]) -> Outcome:
        limit = checked - time.monotonic()
        return run(part, command, limit, **environment) if limit > 1 else Outcome(part, "stopped at its limit")

    cores = os.cpu_count() or 1
    print(machine.title(), flush=True)
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        show(outcome)

    few, many = max(1, cores // 2), max(2, 3 * cores // 2)  # processes wait for the GPU and for files, too
    with concurrent.futures.ThreadPoolExecutor(few) as beside, concurrent.futures.ThreadPoolExecutor(many) as pool:
        # What has no need of the extension starts beside its build.
        warm = warm_tasks(chosen or benchmarks()) if "warm" in parts else []
        running = [beside.submit(before_the_benchmarks, *task) for task in warm]
        if "build" in parts:
            note(build(checked - time.monotonic()))
        tasks, skipped = suite_tasks(parts)
        running += [pool.submit(before_the_benchmarks, *task) for task in tasks]
        for outcome in skipped:
            note(outcome)
        for future in concurrent.futures.as_completed(running):
            note(future.result())
    for i, name in enumerate(chosen):
        seconds = max(10.0, (left() - 15) * share(name) / sum(share(later) for later in chosen[i:]))
        words = [sys.executable, f"benchmarks/{name}.py", "--out", str(folder)]
        words += ["--seconds", "0.1", "--minutes", f"{seconds / 60:.2f}"]
        outcome = run(name, words, min(1.5 * seconds + 15, max(left() - 5, 10.0)))
        print(f"\n{outcome.tail.rstrip()}")
        note(outcome)
    if "plots" in parts:
        note(draw_plots(folder))
    print(f"\n{60 * args.minutes - left():.0f} s in all; logs in {LOGS.relative_to(ROOT)}")
    for outcome in outcomes:
        print(f"  {outcome.part:<28} {outcome.state}")
    if "goals" in parts:
        results = load(folder)
        print(f"\nGoals on {machine.device_name()}, from {os.path.relpath(folder, ROOT)}")
        print(columns([("work", "goal", "measured", ""), *goal_table(results)]) if results else "no results")
        print("`make results` puts the figures into docs/results.md and the README")
    bad = [outcome for outcome in outcomes if outcome.state in BAD and not outcome.part.startswith("warm")]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
