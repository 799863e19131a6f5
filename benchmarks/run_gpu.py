"""Everything that a GPU can say about d2it, in one command and ten minutes; `make gpu` runs it.

    python benchmarks/run_gpu.py                        # all parts
    python benchmarks/run_gpu.py tests attn_bench       # these parts alone
    python benchmarks/run_gpu.py --list

Parts, in order: build (the CUDA extension, in place, for this GPU), tests (tests/kernels and every test marked gpu),
memcheck and racecheck (compute-sanitizer, where it exists, on the smallest shape of every operator), warm (every
benchmark once, so that its compilers find their caches full), then every benchmark alone on the device, plots, goals.
Up to warm, parts run side by side in many processes: compiling is most of their work. Needs no network and only what
the environment has; every part has its own limit, and a benchmark that is stopped keeps the cases it has finished.

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

import common
import torch
from goals import goal_table
from results import load, plot

ROOT = common.ROOT
LOGS = ROOT / "runs" / "gpu"
TESTS = ROOT / "tests" / "kernels"
SHARDS = 4 if torch.cuda.is_available() else 1
"""Processes for each test file of the suite."""

# What matters most first: where the time runs out, it runs out at the end.
ORDER = ("attn", "entropy", "packing", "neighbor_copy", "train", "sample")


@dataclasses.dataclass
class Outcome:
    part: str
    state: str
    """"passed", "failed", "stopped at its limit" or "skipped: ..."."""
    seconds: float = 0.0
    tail: str = ""


def benchmarks() -> list[str]:
    names = {path.stem.removesuffix("_bench") for path in (ROOT / "benchmarks").glob("*_bench.py")}
    return [f"{name}_bench" for name in sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else 99, n))]


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
            code = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            code = None
    # pytest's 5: this shard had nothing to run.
    passed = code == 0 or (code == 5 and part.startswith("tests"))
    tail = log.read_text(errors="replace")
    state = "stopped at its limit" if code is None else "passed" if passed else "failed"
    absent = re.search(r"^ModuleNotFoundError: No module named '(\w+)'$", tail[-500:], re.MULTILINE)
    if state == "failed" and absent:
        state = f"skipped: needs {absent[1]}, which is not installed"
    return Outcome(part, state, time.monotonic() - start, tail)


def build(limit: float) -> Outcome:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    environment = {"D2IT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count())}
    if not major:
        environment = {"D2IT_BUILD": "cpu"}
    return run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, **environment)


def correctness(parts: list[str], limit: float) -> list[Outcome]:
    """The suite, the sanitizers and the compilers of the benchmarks, side by side."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    tasks: list[tuple[str, list[str], dict[str, str]]] = []
    skipped: list[Outcome] = []
    if "tests" in parts:
        for path in sorted(TESTS.glob("test_*.py")):
            for shard in range(SHARDS):
                name = f"tests.{path.stem.removeprefix('test_')}.{shard}"
                tasks.append((name, [*pytest, str(path)], {"D2IT_TEST_SHARD": f"{shard}/{SHARDS}"}))
        elsewhere = [str(path) for path in sorted(TESTS.parent.glob("test_*.py")) if "mark.gpu" in path.read_text()]
        if elsewhere:
            tasks.append(("tests.gpu", [*pytest, "-m", "gpu", *elsewhere], {}))
    for tool in ("memcheck", "racecheck"):
        if tool not in parts:
            continue
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer is None or not torch.cuda.is_available():
            skipped.append(Outcome(tool, f"skipped: {'no GPU' if sanitizer else 'no compute-sanitizer here'}"))
            continue
        # Without the caching allocator every tensor is an allocation of its own, whose end memcheck knows.
        environment = {"D2IT_KERNEL_SHAPES": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        tasks.append((tool, [*words, *pytest, str(TESTS), "-k", "against_reference and not float32"], environment))
    for name in benchmarks() if "warm" in parts else ():
        script = ROOT / "benchmarks" / f"{name}.py"
        if "common.main(" in script.read_text():
            tasks.append((f"warm.{name}", [sys.executable, str(script), "--warm"], {}))
    if not tasks:
        return skipped
    workers = max(1, min(len(tasks), os.cpu_count() or 2))
    end = time.monotonic() + limit

    def before_the_end(part: str, command: list[str], environment: dict[str, str]) -> Outcome:
        return run(part, command, end - time.monotonic(), **environment)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        # What takes longest starts first.
        tasks.sort(key=lambda task: task[0].startswith("tests"))
        running = [pool.submit(before_the_end, *task) for task in tasks]
        outcomes = [future.result() for future in running]
    return skipped + outcomes


def draw_plots() -> Outcome:
    start = time.monotonic()
    folder = common.results_folder()
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
    if outcome.state in ("failed", "stopped at its limit"):
        print("\n".join(f"    {line}" for line in outcome.tail.splitlines()[-15:]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["build", "tests", "memcheck", "racecheck", "warm", *benchmarks(), "plots", "goals"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all where none is named")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
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
    end = time.monotonic() + 60 * args.minutes

    def left() -> float:
        return end - time.monotonic()

    print(common.title(), flush=True)
    outcomes: list[Outcome] = []
    if "build" in parts:
        outcomes.append(build(min(150, left())))
        show(outcomes[-1])
    if {"tests", "memcheck", "racecheck", "warm"} & set(parts):
        for outcome in correctness(parts, min(170, 0.4 * left())):
            outcomes.append(outcome)
            show(outcome)
    chosen = [name for name in benchmarks() if name in parts]
    for i, name in enumerate(chosen):
        # An even share of what is left, and more for those that come first.
        limit = max(10.0, 1.5 * (left() - 15) / (len(chosen) - i))
        limit = min(limit, max(10.0, left() - 15))
        outcomes.append(run(name, [sys.executable, f"benchmarks/{name}.py"], limit))
        print(f"\n{outcomes[-1].tail.rstrip()}")
        show(outcomes[-1])
    if "plots" in parts:
        outcomes.append(draw_plots())
        show(outcomes[-1])
    print(f"\n{60 * args.minutes - left():.0f} s in all; logs in {LOGS.relative_to(ROOT)}")
    for outcome in outcomes:
        print(f"  {outcome.part:<28} {outcome.state}")
    if "goals" in parts:
        results = load(common.results_folder())
        print(f"\nGoals on {common.device_name()}, from {common.results_folder().relative_to(ROOT)}")
        print(common.columns([("work", "goal", "measured", ""), *goal_table(results)]) if results else "no results")
        print("`make results` puts the figures into docs/results.md and the README")
    bad = [outcome for outcome in outcomes if outcome.state in ("failed", "stopped at its limit")]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
