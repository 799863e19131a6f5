"""The goals of the project and what was measured of them.

A goal is evaluated on the result files of one device; without a row for it there, it is "not measured", never met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from rows import Result, Row, cases, fastest, is_cpu, ours, right, total_speedup

Results = dict[str, Result]
Measured = tuple[float, str]
"""A figure and where it was read: (0.82, "n64-D72-fill0.5-bfloat16 backward")."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that the project wants to reach.

    Attributes:
        work: what is measured.
        text: the goal in words.
        figures: what was measured for it, from the results of one device.
        target: the figure that is wanted.
        shown: format of a figure.
        at_most: whether a figure must not exceed the target; else it must reach it.
        cpu: whether it is a goal of CPUs; else of GPUs.
    """

    work: str
    text: str
    figures: Callable[[Results], Iterator[Measured]]
    target: float
    shown: str = "{:.0%}"
    at_most: bool = False
    cpu: bool = False


def _rows(results: Results, operator: str) -> list[Row]:
    return results[operator]["rows"] if operator in results else []


def _best(results: Results, operator: str) -> Iterator[Row]:
    """Our fastest right row of every case and direction."""
    rows = _rows(results, operator)
    for case in cases(rows):
        for direction in dict.fromkeys(row.get("direction") for row in rows if row["case"] == case):
            if row := fastest(rows, case, direction, own=True):
                yield row


def share(operator: str, figure: str, cells: tuple[int, ...] | None = None) -> Callable[[Results], Iterator[Measured]]:
    """`figure` ("copy_share" or "floor_share") of every case whose floor is 20 us or more: below, launches count.

    `cells`: only windows of that many cells (the case's shape["n"]).
    """

    def figures(results: Results) -> Iterator[Measured]:
        for row in _best(results, operator):
            if row["floor_ms"] >= 0.02 and (cells is None or row["shape"].get("n") in cells):
                yield row[figure], f"{row['case']} {row['direction']}"

    return figures


def times_rival(operator: str, fill: float) -> Callable[[Results], Iterator[Measured]]:
    """Forward + backward against the fastest rival that does both, at one fill (shape["fill"])."""

    def figures(results: Results) -> Iterator[Measured]:
        rows = _rows(results, operator)
        for case in cases(rows):
            shape = next(row["shape"] for row in rows if row["case"] == case)
            faster = total_speedup(rows, case)
            if faster and shape.get("fill") == fill:
                yield faster[0], f"{case} against {faster[1]}"

    return figures


def times(operator: str, rival: str) -> Callable[[Results], Iterator[Measured]]:
    """Our fastest against the contenders whose name starts with `rival`."""

    def figures(results: Results) -> Iterator[Measured]:
        rows = _rows(results, operator)
        for own in _best(results, operator):
            for row in rows:
                same = row["case"] == own["case"] and row.get("direction") == own.get("direction")
                if same and right(row) and not ours(row) and row["contender"].startswith(rival):
                    yield row["ms"] / own["ms"], f"{row['case']} {own.get('direction', '')} against {row['contender']}"

    return figures


def proportional(operator: str) -> Callable[[Results], Iterator[Measured]]:
    """Time at fill 0.5 over half the time at fill 1, for cases that differ in shape["fill"] alone."""

    def figures(results: Results) -> Iterator[Measured]:
        by_shape: dict[tuple, dict[float, Row]] = {}
        for row in _best(results, operator):
            rest = tuple(sorted((k, str(v)) for k, v in row["shape"].items() if k != "fill"))
            by_shape.setdefault((rest, row["dtype"], row["direction"]), {})[row["shape"].get("fill")] = row
        for at in by_shape.values():
            if 0.5 in at and 1.0 in at:
                yield at[0.5]["ms"] / (at[1.0]["ms"] / 2), f"{at[0.5]['case']} {at[0.5]['direction']}"

    return figures


def plan_us(results: Results) -> Iterator[Measured]:
    """Only what a CUDA graph could capture: a plan that makes the host wait is none."""
    for row in _best(results, "plan_tokens"):
        if row["shape"].get("batch") == 256 and row["how"] == "graph":
            yield row["ms"] * 1000, row["case"]


def entropy_us(results: Results) -> Iterator[Measured]:
    """Microseconds for an RGB image of 256 x 256 in float32, 256 bins, in batches that fill the GPU."""
    for row in _best(results, "kde_entropy"):
        shape = row["shape"]
        images = shape.get("batch", 0) * (shape.get("side", 0) / 256) ** 2
        if images >= 8 and row["case"].endswith("-C3-bins256-float32"):
            yield row["ms"] * 1000 / images, row["case"]


def training(contender: str, figure: str, preset: str) -> Callable[[Results], Iterator[Measured]]:
    """`figure` of one contender of the training benchmark (shape["preset"])."""

    def figures(results: Results) -> Iterator[Measured]:
        for row in _rows(results, "train"):
            if row["shape"].get("preset") == preset and row["contender"].startswith(contender) and figure in row:
                yield row[figure], f"{row['case']} {row['contender']}"

    return figures


def packed_against_masked(results: Results) -> Iterator[Measured]:
    rows = [row for row in _rows(results, "train") if right(row)]
    for case in cases(rows):
        at = {row["contender"]: row["ms"] for row in rows if row["case"] == case}
        packed = min((ms for name, ms in at.items() if name.startswith("d2it packed")), default=None)
        masked = min((ms for name, ms in at.items() if name.startswith("masked")), default=None)
        if packed and masked:
            yield masked / packed, case


def by_rival(work: str, operator: str, copy: str) -> Iterator[Goal]:
    """A mask is what eager code has. Copies by indices move the same bytes: on wide rows nothing is to be gained."""
    for rival, least in (("boolean mask", 3.0), (f"nonzero + {copy}", 1.0), (f"{copy}, indices given", 1.0)):
        text = f"{f'>= {least:g}x' if least > 1 else 'no slower than'} eager {rival}"
        yield Goal(work, text, times(operator, f"eager {rival}"), least, "{:.1f}x", cpu=True)


ATTENTION_SHARE = {16: 0.7, 64: 0.7, 256: 0.5}
"""Cells of a window -> share of the floor that its attention is to reach."""
MOVER_SHARE = 0.8
ENTROPY_US = 2.2
"""For an image of 256 x 256: 1.8 times the time of the instructions that exact taps need in Triton (docs/numerics.md),
which is more than six times that of the bytes."""
PLAN_US = 20.0
"""For 256 images."""

MOVERS = (
    "pack_tokens",
    "unpack_tokens",
    "neighbor_copy",
    "adaln_modulate",
    "gated_residual",
    "gated_residual_modulate",
    "gelu",
)

GOALS = [
    Goal("window attention, 16 and 64 cells", ">= 70 % of copy bandwidth",
         share("window_attention", "copy_share", (16, 64)), ATTENTION_SHARE[64]),
    Goal("window attention, 256 cells", ">= 50 % of the nearer of bandwidth and tensor-core rate",
         share("window_attention", "floor_share", (256,)), ATTENTION_SHARE[256]),
    Goal("window attention, fill 0.5", ">= 3x the best rival, forward + backward",
         times_rival("window_attention", 0.5), 3.0, "{:.2f}x"),
    Goal("window attention, fill 1", ">= 1.5x the best rival, forward + backward",
         times_rival("window_attention", 1.0), 1.5, "{:.2f}x"),
    Goal("window attention, time by tokens", "fill 0.5 at most 1.15x half of fill 1",
         proportional("window_attention"), 1.15, "{:.2f}x", at_most=True),
    Goal("KDE entropy", ">= 100x eager", times("kde_entropy", "eager"), 100.0, "{:.0f}x"),
    Goal("KDE entropy", ">= 10x compiled", times("kde_entropy", "compiled"), 10.0, "{:.1f}x"),
    Goal("KDE entropy, an image of 256 x 256", "<= 2.2 us", entropy_us, ENTROPY_US, "{:.2f} us", at_most=True),
    *(Goal(f"{name}", ">= 80 % of copy bandwidth", share(name, "copy_share"), MOVER_SHARE) for name in MOVERS),
    Goal("plan, 256 images", "<= 20 us, no sync", plan_us, PLAN_US, "{:.1f} us", at_most=True),
    Goal("D2iT-XL training step", ">= 45 % MFU", training("d2it packed", "mfu", "D2iT-XL"), 0.45),
    Goal("training step, packed", ">= 1.25x the same model with masks", packed_against_masked, 1.25, "{:.2f}x"),
    Goal("DiT-XL/2 training", ">= 500 images/s", training("dit", "images_per_s", "DiT-XL/2"), 500.0, "{:.0f} images/s"),
    Goal("KDE entropy, one core", ">= 20x eager", times("kde_entropy", "eager"), 20.0, "{:.0f}x", cpu=True),
    Goal("window attention on CPU", "no slower than eager with masks",
         times("window_attention", "eager"), 1.0, "{:.1f}x", cpu=True),
    Goal("neighbour copy on CPU", ">= 3x eager", times("neighbor_copy", "eager"), 3.0, "{:.1f}x", cpu=True),
    *by_rival("packing on CPU", "pack_tokens", "index_select"),
    *by_rival("merging on CPU", "unpack_tokens", "index_copy"),
    Goal("modulating on CPU", "no slower than eager", times("adaln_modulate", "eager"), 1.0, "{:.1f}x", cpu=True),
    Goal("gating on CPU", "no slower than eager", times("gated_residual", "eager"), 1.0, "{:.1f}x", cpu=True),
    Goal("training step on CPU, packed", "faster than with masks", packed_against_masked, 1.0, "{:.2f}x", cpu=True),
]  # fmt: skip


def goal_table(results: Results) -> list[tuple[str, str, str, str]]:
    """(work, goal, measured: worst .. best and where the worst was, verdict) for the device that the files are of."""
    lines = []
    cpu = all(is_cpu(result) for result in results.values())
    for goal in GOALS:
        if goal.cpu != cpu:
            continue
        found = sorted(goal.figures(results), reverse=goal.at_most)
        if not found:
            lines.append((goal.work, goal.text, "not measured", ""))
            continue
        worst, best = found[0], found[-1]
        measured = f"{goal.shown.format(worst[0])} ({worst[1]})"
        if len(found) > 1:
            measured = f"{goal.shown.format(worst[0])} .. {goal.shown.format(best[0])} (worst: {worst[1]})"
        met = worst[0] <= goal.target if goal.at_most else worst[0] >= goal.target
        lines.append((goal.work, goal.text, measured, "met" if met else "missed"))
    return lines
