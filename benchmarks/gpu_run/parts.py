"""Runs the parts: each in processes of its own, with its log in runs/gpu/."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import children
import command
import machine
import torch
from goals import goal_table
from results import plot
from resume_plugin import read_log
from rows import columns, load

from d2it.ops import _native
from gpu_run.bundle import LOGS, Bundle
from gpu_run.plan import MODELS, benchmarks, share

ROOT = machine.ROOT
TESTS = ROOT / "tests" / "kernels"
GPU = torch.cuda.is_available()
SHARDS = 4 if GPU else 1
"""Processes for each test file of the suite, and for what a benchmark compiles."""

# Where the time of a whole run ends for each stage, as a share of it.
ENDS = {"build": 0.25, "smoke": 0.32, "operators": 0.6, "models": 0.75, "tests": 0.9, "last": 1.0}

# Kernels that are profiled: the benchmark that launches them, its case, and a pattern of their names.
PROFILED = [
    ("attn_bench", "n256-*-fill0.5-*", "window_attention.*fwd|attention_forward"),
    ("attn_bench", "n256-*-fill0.5-*", "window_attention.*(bwd|dkv)|attention_backward"),
    ("attn_bench", "n64-*-fill0.5-*", "window_attention_bwd"),
    ("modulate_bench", "modulate-B256-L512-*", "adaln_modulate_bwd"),
    ("pack_tokens_bench", "pack-B256-C1152-fill0.5-*", "gather_rows"),
    ("kde_entropy_bench", "B8-256x256-C3-bins256-float32", "kde_entropy"),
]
METRICS = (
    "gpu__time_duration.sum,dram__bytes.sum,lts__t_bytes.sum,smsp__inst_executed.sum,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,sm__inst_executed.avg.per_cycle_active"
)


@dataclasses.dataclass
class Outcome:
    """How a part ended.

    Attributes:
        part: its name.
        state: "passed", "failed", "stopped at its limit" or "skipped: ...".
        seconds: that it took.
        tail: the end of what it printed.
        optional: whether its limit is no failure.
    """

    part: str
    state: str
    seconds: float = 0.0
    tail: str = ""
    optional: bool = False

    @property
    def bad(self) -> bool:
        """Whether the run has failed by it."""
        return self.state == "failed" or (self.state == "stopped at its limit" and not self.optional)


def run(
    part: str, words: list[str], limit: float, *, optional: bool = False, folder: Path = ROOT, **environment: str
) -> Outcome:
    """Runs a command in `folder` with its output in runs/gpu/<part>.log; ends it, and what it started, at its limit."""
    if limit < 1:
        return Outcome(part, "stopped at its limit", optional=optional)
    start, log = time.monotonic(), LOGS / f"{part}.log"
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    whole = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    code = children.run(words, log, limit, whole, folder)
    tail = log.read_text(errors="replace")
    # pytest's 5: this shard had nothing to run; its 2: the file could not be imported.
    suite = "pytest" in words
    passed = code == 0 or (code == 5 and suite)
    state = "stopped at its limit" if code is None else "passed" if passed else "failed"
    absent = re.search(r"^(?:E +)?ModuleNotFoundError: No module named '(\w+)[\w.]*'$", tail[-1000:], re.MULTILINE)
    if code == (2 if suite else 1) and absent:
        state = f"skipped: needs {absent[1]}, which is not installed"
    return Outcome(part, state, time.monotonic() - start, tail, optional)


Task = Callable[[], Outcome]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def build(limit: float) -> Outcome:
    """Builds the extension in place: for this GPU where nvcc is here, too."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        return Outcome("build", "skipped: no C++ compiler here")
    environment, device = {"D2IT_BUILD": "cpu", "MAX_JOBS": str(os.cpu_count())}, "cpu"
    if GPU and tool("nvcc"):
        major, minor = torch.cuda.get_device_capability()
        environment |= {"D2IT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
        device = "cuda"
    elif GPU:
        print("no nvcc here: the operators in CUDA C++ are left out", flush=True)
    words = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # A library that is newer than its sources is kept, but not one without the operators of this device.
    words += ["--force"] if _native.why_not("neighbor_copy", device) else []
    with tempfile.TemporaryDirectory() as folder:
        # Beside no pyproject.toml: a setuptools older than the licence there would refuse it.
        for name in ("setup.py", "csrc", "d2it", "kernels", "configs"):
            (Path(folder) / name).symlink_to(ROOT / name)
        return run("build", words, limit, folder=Path(folder), **environment)


def suites() -> list[tuple[str, str]]:
    """(file, class) of the suite of every operator."""
    found = []
    for path in sorted(TESTS.glob("test_*.py")):
        for name, body in re.findall(r"^class (Test\w+)\(\w+\):\n((?:(?!^\S).*\n)*)", path.read_text(), re.MULTILINE):
            if re.search(r'^    op = "', body, re.MULTILINE):
                found.append((path.stem, name))
    return found


def smoke(limit: float, workers: int) -> Outcome:
    """Every operator in a process of its own; prints the table of what they found."""
    start = time.monotonic()

    def one(suite: tuple[str, str]) -> Outcome:
        left = start + limit - time.monotonic()  # of all, however few run at once
        return run(f"smoke.{suite[1]}", [sys.executable, "benchmarks/smoke.py", *suite], left, **ONE_THREAD)

    lines = [("operator", "backend", "shape", "", "seconds")]
    states = set()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for (_, name), outcome in zip(suites(), pool.map(one, suites())):
            states.add(outcome.state)
            rows = [json.loads(line) for line in outcome.tail.splitlines() if line.startswith("{")]
            lines += [(*(row[key] for key in ("op", "backend", "shape", "state")), f"{row['seconds']}") for row in rows]
            if outcome.state != "passed" and not any(row["state"] != "right" for row in rows):
                lines.append((name, "", "", outcome.state, f"{outcome.seconds:.1f}"))
                lines += [("", "", "", line.strip(), "") for line in outcome.tail.splitlines()[-3:]]
    print(f"\n{columns(lines)}", flush=True)
    worst = next((state for state in ("failed", "stopped at its limit") if state in states), "passed")
    return Outcome("smoke", worst, time.monotonic() - start)


def run_shard(part: str, words: list[str], limit: float, environment: dict[str, str]) -> Outcome:
    """Runs tests, and those that are left again after one that takes its process or the device with it."""
    end, log = time.monotonic() + limit, LOGS / f"{part}.tests"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    start, tail, attempt = time.monotonic(), "", 0
    while True:
        before = read_log(log)
        name = f"{part}.{attempt}" if attempt else part
        outcome = run(name, words, end - time.monotonic(), D2IT_SUITE_LOG=str(log), **environment)
        tail += outcome.tail
        states = read_log(log)
        culprits = [test for test, state in states.items() if state in ("start", "fault")]
        if outcome.state != "failed" or not set(culprits) - set(before):
            break
        attempt += 1
    failed = [test for test, state in states.items() if state == "failed"]
    if outcome.state == "stopped at its limit":
        tail += "".join(f"was running at the limit: {test}\n" for test in set(culprits) - set(before))
        culprits = [test for test in culprits if test in before]
    tail += "".join(f"failed: {test}\n" for test in failed)
    tail += "".join(f"took its process or the device with it: {test}\n" for test in culprits)
    if failed or culprits:
        outcome.state = "failed"
    return Outcome(part, outcome.state, time.monotonic() - start, tail)


def suite_tasks(limit: Callable[[], float]) -> list[Task]:
    """The suite in shards, and the other tests of a GPU."""
    words = [*PYTEST, "-p", "resume_plugin"]
    tasks: list[Task] = []

    def add(name: str, more: list[str], **environment: str) -> None:
        tasks.append(lambda: run_shard(name, [*words, *more], limit(), {**ONE_THREAD, **environment}))

    for shard in range(SHARDS):
        for path in sorted(TESTS.glob("test_*.py")):
            name = f"tests.{path.stem.removeprefix('test_')}.{shard}"
            add(name, [str(path), "-k", "not asserted_on_the_device"], D2IT_TEST_SHARD=f"{shard}/{SHARDS}")
    for path in sorted(TESTS.parent.glob("test_*.py")):
        if "mark.gpu" in path.read_text():
            add(f"tests.{path.stem.removeprefix('test_')}", ["-m", "gpu", str(path)])
    return tasks


def assertions(limit: float) -> Outcome:
    """The tests of what kernels assert, which start a process for each."""
    words = [*PYTEST, "-m", "gpu", "-k", "asserted_on_the_device", str(TESTS)]
    return run("assertions", words, limit, **ONE_THREAD)


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the path or beside nvcc."""
    return shutil.which(name) or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{name}")


def profile(limit: float) -> list[Outcome]:
    """Six kernels, one launch of each, under ncu."""
    ncu = tool("ncu")
    if ncu is None or not GPU:
        return [Outcome("profile", f"skipped: {'no GPU' if ncu else 'no ncu here'}")]
    end, outcomes = time.monotonic() + limit, []
    for i, (benchmark, case, kernels) in enumerate(PROFILED):
        words = [
            ncu,
            "--csv",
            "--clock-control",
            "none",
            "--metrics",
            METRICS,
            "--kernel-name",
            f"regex:{kernels}",
            "--launch-count",
            "1",
        ]
        words += [sys.executable, f"benchmarks/{benchmark}.py", "--only", case, "--warm"]
        each = (end - time.monotonic()) / (len(PROFILED) - i)
        outcomes.append(run(f"profile.{i}.{benchmark}", words, each, optional=True))
    return outcomes


def kernel_names() -> list[str]:
    """The names of our kernels, as sanitizers see them."""
    triton = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
    cuda = re.compile(r"__global__ void(?: __launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(")
    sources = [(triton, ROOT / "kernels", "*.py"), (cuda, ROOT / "csrc", "*.cu")]
    texts = [(pattern, path.read_text()) for pattern, folder, files in sources for path in folder.glob(files)]
    return sorted({name for pattern, text in texts for name in pattern.findall(text)})


def sanitizer_tasks(name: str, limit: Callable[[], float]) -> list[Task]:
    """The smallest shape of every operator under a sanitizer that looks at our kernels alone."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None or not GPU:
        return [lambda: Outcome(name, f"skipped: {'no GPU' if sanitizer else 'no compute-sanitizer here'}")]
    words = [sanitizer, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
    words += [word for kernel in kernel_names() for word in ("--kernel-regex", f"kns={kernel}")]
    words += [*PYTEST, str(TESTS), "-k", "against_reference and not float32"]
    # Without the caching allocator every tensor is an allocation of its own, and memcheck finds where it ends.
    environment = {**ONE_THREAD, "D2IT_KERNEL_SHAPES": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def shard(i: int) -> Outcome:
        return run(f"{name}.{i}", words, limit(), optional=True, **environment, D2IT_TEST_SHARD=f"{i}/2")

    return [lambda i=i: shard(i) for i in range(2)]


def warm_tasks(chosen: list[str], limit: Callable[[], float]) -> list[Task]:
    """The benchmarks' compilers, each in its own process, since there are many of them, and within so little of the
    GPU's memory that others have theirs. What does not fit compiles when it is measured."""

    def one(part: str, words: list[str]) -> Outcome:
        return run(part, words, limit(), optional=True, TORCHINDUCTOR_COMPILE_THREADS="1")

    tasks: list[Task] = []
    for name in chosen:
        shards, memory = (1, 0.2) if name in MODELS else (SHARDS, 0.05)
        for i in range(shards):
            words = [sys.executable, f"benchmarks/{name}.py", "--warm", f"{i}/{shards}", "--memory", str(memory)]
            tasks.append(functools.partial(one, f"warm.{name}.{i}", words))
    return tasks


def draw_plots(folder: Path) -> Outcome:
    """<operator>.png beside each result file."""
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
    """A line for a part, and the end of its output where it failed."""
    print(f"{outcome.part:<34} {outcome.state:<24} {outcome.seconds:6.1f} s", flush=True)
    if outcome.bad and not outcome.part.startswith("warm"):
        print("\n".join(f"    {line}" for line in outcome.tail.splitlines()[-15:]), flush=True)


def side_by_side(tasks: Iterable[Task], workers: int) -> Iterable[Outcome]:
    """The outcomes of tasks, each as it ends."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(task) for task in tasks]):
            yield future.result()


def print_goals(folder: Path) -> None:
    """The goals, and what was measured of them so far."""
    results = load(folder)
    print(f"\nGoals on {machine.device_name()}, from {os.path.relpath(folder, ROOT)}")
    print(columns([("work", "goal", "measured", ""), *goal_table(results)]) if results else "no results", flush=True)


def run_all(parts: list[str], args: argparse.Namespace, bundle: Bundle) -> int:
    """Runs the parts with the options of the command; 1 where one failed or there is no GPU."""
    if not GPU and not args.without_gpu:
        print(f"no GPU: torch {torch.__version__} sees no CUDA device (--without-gpu rehearses on the CPU)")
        return 1
    folder = (args.out or command.results_folder()).resolve()
    bundle.add("results", folder)
    return run_parts(parts, folder, 60 * args.minutes)


def run_parts(parts: list[str], folder: Path, seconds: float) -> int:
    """Runs the parts in their order; 1 where one failed."""
    begin = time.monotonic()
    cores = os.cpu_count() or 1
    alone = len(parts) == 1  # has all the time
    outcomes: list[Outcome] = []

    def until(stage: str) -> float:
        """Seconds that are left of a stage."""
        return begin + seconds * (1.0 if alone else ENDS[stage]) - time.monotonic()

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        show(outcome)

    def measure(chosen: list[str], stage: str) -> None:
        for i, name in enumerate(chosen):
            left = max(10.0, until(stage) * share(name) / sum(share(later) for later in chosen[i:]))
            words = [sys.executable, f"benchmarks/{name}.py", "--out", str(folder)]
            words += ["--seconds", "0.1", "--minutes", f"{left / 60:.2f}"]
            outcome = run(name, words, min(1.5 * left + 15, max(until("last") - 5, 10.0)))
            print(f"\n{outcome.tail.rstrip()}")
            note(outcome)

    print(machine.title(), flush=True)
    chosen = [name for name in benchmarks() if name in parts]
    warm = warm_tasks(chosen or benchmarks(), lambda: until("build")) if "warm" in parts else []
    with concurrent.futures.ThreadPoolExecutor(max(2, cores)) as pool:
        # Compiling goes on beside the build and the smoke, and is over before anything is measured.
        built = pool.submit(build, until("build")) if "build" in parts else None
        compiling = [pool.submit(task) for task in warm]
        if built:
            note(built.result())
        if "smoke" in parts:
            note(smoke(max(until("smoke"), 45.0), cores))
        for future in concurrent.futures.as_completed(compiling):
            note(future.result())
    measure([name for name in chosen if name not in MODELS], "operators")
    if "goals" in parts and len(parts) > 1:
        print_goals(folder)
    measure([name for name in chosen if name in MODELS], "models")
    # Processes wait for the GPU and for files, too.
    tasks: list[Task] = suite_tasks(lambda: until("tests")) if "tests" in parts else []
    for outcome in side_by_side(tasks, max(2, 3 * cores // 2)):
        note(outcome)
    if "assertions" in parts:
        note(assertions(until("last") / 2))
    if "profile" in parts:
        for outcome in profile(until("last") / 2):
            note(outcome)
    tools = [name for name in ("memcheck", "racecheck") if name in parts]
    tasks = [task for name in tools for task in sanitizer_tasks(name, lambda: until("last"))]
    for outcome in side_by_side(tasks, 4):
        note(outcome)
    if "quality" in parts:
        words = [sys.executable, "benchmarks/quality_bench.py", "--tier", "gpu", "--core"]
        there = (ROOT / words[1]).exists()
        note(run("quality", words, until("last")) if there else Outcome("quality", f"skipped: no {words[1]}"))
    if "plots" in parts:
        note(draw_plots(folder))
    print(f"\n{time.monotonic() - begin:.0f} s in all; logs in {LOGS.relative_to(ROOT)}")
    for outcome in outcomes:
        print(f"  {outcome.part:<34} {outcome.state}")
    if "goals" in parts:
        print_goals(folder)
        print("`make results` puts the figures into docs/results.md and the README")
    return int(any(outcome.bad for outcome in outcomes))
