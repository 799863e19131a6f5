"""The parts of `make gpu`, in their order. Standard library alone."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent

# What matters most first, with its share of the time that benchmarks have.
SHARES = {
    "attn": 5,
    "modulate": 2,
    "kde_entropy": 2,
    "pack_tokens": 2,
    "neighbor_copy": 2,
    "plan_tokens": 1,
    "train": 5,
    "sample": 2,
}
MODELS = ("train_bench", "sample_bench")
CHECKS = ("tests", "assertions", "profile", "memcheck", "racecheck")


def benchmarks() -> list[str]:
    """Every benchmark, those that matter most first."""
    names = {path.stem.removesuffix("_bench") for path in FOLDER.glob("*_bench.py")} - {"quality"}
    order = list(SHARES)
    return [f"{name}_bench" for name in sorted(names, key=lambda n: (order.index(n) if n in order else 99, n))]


def share(benchmark: str) -> int:
    """The share of a benchmark in the time that benchmarks have."""
    return SHARES.get(benchmark.removesuffix("_bench"), 1)


def default_parts() -> list[str]:
    """The parts of a run that names none."""
    operators = [name for name in benchmarks() if name not in MODELS]
    return ["build", "smoke", "warm", *operators, "goals", *MODELS, *CHECKS, "plots"]


def known_parts() -> list[str]:
    """Every part that can be named."""
    return [*default_parts(), "quality"]
