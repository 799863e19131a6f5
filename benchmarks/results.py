"""What the result files say: docs/results.md, the README's table and the plots are made from them alone.

    python benchmarks/results.py            # rewrite docs/results.md and the table in README.md
    python benchmarks/results.py --check    # exit status 1 where they are not what the files give
    python benchmarks/results.py --plots    # also draw <operator>.png beside each file (matplotlib)

Standard library only, but for the plots. A figure that no file holds does not appear.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

Row = dict[str, Any]
Result = dict[str, Any]
"""A result file: "operator", "complete", the header of `common.header`, "rates" and "rows"."""


# -------------------------------------------------------------------------------------------------
# Rows


def ours(row: Row) -> bool:
    return row["contender"].startswith("d2it")


def right(row: Row) -> bool:
    """Measured, and compared with the reference, and within the tolerance."""
    return "ms" in row and row.get("correct") is True


def fastest(rows: Iterable[Row], case: str, direction: str | None, *, own: bool) -> Row | None:
    """The fastest right row of a case and direction among ours, or among the rivals."""
    found = [r for r in rows if r["case"] == case and r.get("direction") == direction and right(r) and ours(r) == own]
    return min(found, key=lambda row: row["ms"], default=None)


def speedup(rows: Iterable[Row], row: Row) -> tuple[float, str] | None:
    """How many times faster than its best rival a row of ours is, and that rival. None where either is wrong."""
    if not ours(row) or not right(row):
        return None
    rival = fastest(rows, row["case"], row.get("direction"), own=False)
    return (rival["ms"] / row["ms"], rival["contender"]) if rival else None


def total_ms(rows: Iterable[Row], case: str, contender: str) -> float | None:
    """Forward and backward of a contender; None unless both were measured and right."""
    found = {r.get("direction"): r["ms"] for r in rows if (r["case"], r["contender"]) == (case, contender) and right(r)}
    return found["forward"] + found["backward"] if {"forward", "backward"} <= found.keys() else None


def total_speedup(rows: list[Row], case: str) -> tuple[float, str] | None:
    """Forward + backward: our fastest against the fastest rival that does both, and that rival."""
    names = {r["contender"]: ours(r) for r in rows if r["case"] == case}
    totals = [(ms, name) for name in names if (ms := total_ms(rows, case, name)) is not None]
    own = min((t for t in totals if names[t[1]]), default=None)
    rival = min((t for t in totals if not names[t[1]]), default=None)
    return (rival[0] / own[0], rival[1]) if own and rival else None


def cases(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


# -------------------------------------------------------------------------------------------------
# Files


def load(folder: Path) -> dict[str, Result]:
    """Operator -> its result file in the folder of one device."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def devices(root: Path = RESULTS) -> list[Path]:
    """The folders that hold results, GPUs first."""
    folders = {path.parent for path in root.glob("*/*.json")}
    return sorted(folders, key=lambda folder: (folder.name.startswith("cpu"), folder.name))


def is_cpu(result: Result) -> bool:
    return bool(result["small"])


# -------------------------------------------------------------------------------------------------
# Markdown


def time(ms: float) -> str:
    return f"{ms * 1000:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _ran_on(result: Result) -> str:
    keys = ("driver", "cuda", "torch", "triton", "python", "threads")
    versions = [f"{key} {result[key]}" for key in keys if result.get(key) is not None]
    return ", ".join([f"{result['date']}, commit {result['commit']}", *versions])


def _measured(row: Row) -> str:
    parts = [f"{_short(row['gbps'])} GB/s ({row['copy_share']:.0%} of copy)"] if row.get("bytes") else []
    if "matmul_share" in row:
        parts.append(f"{_short(row['tflops'])} TFLOP/s ({row['matmul_share']:.0%})")
    if "mfu" in row:
        parts.append(f"{row['mfu']:.0%} MFU")
    if "images_per_s" in row:
        parts.append(f"{_short(row['images_per_s'])} images/s")
    if "memory_gb" in row:
        parts.append(f"{row['memory_gb']:.1f} GB")
    return ", ".join(parts)


def operator_section(result: Result) -> list[str]:
    rows = result["rows"]
    lines = [f"### {result['operator']}", "", f"{_ran_on(result)}.", ""]
    rates = result.get("rates")
    if rates:
        products = ", ".join(f"{name} {rate} TFLOP/s" for name, rate in rates["matmul_tflops"].items())
        lines[-2] += f" Measured in the same run: copy {rates['copy_gbps']} GB/s, matrix product {products}."
    if not result["complete"]:
        lines += ["Not every case was run.", ""]
    lines += ["| case | | contender | median | 10 % .. 90 % | | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "ms" not in row:
            continue
        faster = speedup(rows, row)
        note = f"{faster[0]:.2f}x {faster[1]}" if faster else ""
        if row.get("correct") is False:
            note = f"wrong: relative error {row['error']}"
        lines.append(
            f"| {row['case']} | {row.get('direction', '')} | {row['contender']} | {time(row['ms'])} "
            f"| {time(row['ms_q10'])} .. {time(row['ms_q90'])} | {_measured(row)} | {note} |"
        )
    skipped = {(row["contender"], row["skipped"]): None for row in rows if "skipped" in row}
    if skipped:
        lines += ["", "Skipped: " + "; ".join(f"{name} ({reason})" for name, reason in skipped) + "."]
    return [*lines, ""]


def document(folders: list[Path]) -> str:
    """docs/results.md."""
    from goals import goal_table

    lines = [
        "# Results",
        "",
        "Written by `make results` from the files of `benchmarks/results/`. Each file holds one run, with the device,",
        "the versions, the commit and every number below. Times are medians of one call; bytes and operations are",
        "counted from the shapes, every input read once and every output written once. A speed-up is against the",
        "fastest rival whose result is right.",
        "",
    ]
    for folder in folders:
        results = load(folder)
        first = next(iter(results.values()))
        lines += [f"## {first['device']}", ""]
        if is_cpu(first):
            lines += ["Small sizes; these figures say nothing about a GPU.", ""]
        goals = goal_table(results)
        if goals:
            lines += ["| work | goal | measured | |", "|---|---|---|---|"]
            lines += [f"| {' | '.join(line)} |" for line in goals]
            lines.append("")
        for result in results.values():
            lines += operator_section(result)
    if not folders:
        lines += ["Nothing has been measured yet.", ""]
    if all(folder.name.startswith("cpu") for folder in folders):
        lines += ["No GPU has run this code yet: `make gpu` on one measures it.", ""]
    return "\n".join(lines).rstrip() + "\n"


def summary(folders: list[Path]) -> str:
    """The README's table: for each operator, our fastest row on the case that moves most, on the first device."""
    if not folders:
        return "Not measured yet."
    results = load(folders[0])
    first = next(iter(results.values()))
    body = []
    for result in results.values():
        rows = result["rows"]
        own = [row for row in rows if ours(row) and right(row)]
        heaviest = max(own, key=lambda row: row.get("floor_ms", row["ms"]), default=None)
        if heaviest is None:
            continue
        for direction in dict.fromkeys(r.get("direction") for r in rows if r["case"] == heaviest["case"]):
            row = fastest(rows, heaviest["case"], direction, own=True)
            faster = speedup(rows, row) if row else None
            if row and faster:
                what = f"`{result['operator']}` {direction or ''}".strip()
                times = f"{faster[0]:.1f}x {faster[1]}"
                body.append(f"| {what} | {row['case']} | {time(row['ms'])} | {row['floor_share']:.0%} | {times} |")
    if not body:
        return "Not measured yet."
    where = f"On {first['device']}, torch {first['torch']}"
    where += ", at small sizes; no GPU has run this code yet:" if is_cpu(first) else ":"
    head = ["| operator | case | time | of the floor | against the best rival |", "|---|---|---|---|---|"]
    foot = [
        "The floor is the larger of bytes over copy bandwidth and operations over matrix product rate, both measured",
        "in the same run. All figures: [docs/results.md](docs/results.md).",
    ]
    return "\n".join([where, "", *head, *body, "", *foot])


def with_table(readme: str, table: str) -> str:
    """The README with what stands between the markers replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


# -------------------------------------------------------------------------------------------------
# Plots


def plot(result: Result, path: Path) -> None:
    """Times of every contender by case, a panel for each direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [row for row in result["rows"] if "ms" in row and row.get("correct") is not False]
    directions = list(dict.fromkeys(row.get("direction", "") for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    every = cases(rows)
    height = 1.5 + 0.16 * len(every) * (len(names) + 1) + 0.2 * len(names)
    size = (max(10, 6 * len(directions)), height)  # the title says much
    figure, axes = plt.subplots(1, len(directions), figsize=size, squeeze=False, sharey=True, layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for axis, direction in zip(axes[0], directions):
        for i, name in enumerate(names):
            times = {r["case"]: r["ms"] for r in rows if r["contender"] == name and r.get("direction", "") == direction}
            places = [every.index(case) * (len(names) + 1) + i for case in times]
            mark = "*" if ours({"contender": name}) else "o"
            axis.plot(list(times.values()), places, mark, color=colours[i % len(colours)], label=name)
        axis.set_yticks([j * (len(names) + 1) + (len(names) - 1) / 2 for j in range(len(every))], every)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.set_xlabel(f"{direction} ms")
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="outside lower center")
    figure.suptitle(f"{result['operator']}: {result['device']}\n{_ran_on(result)}", fontsize="medium")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where something would")
    parser.add_argument("--plots", action="store_true", help="draw <operator>.png beside each file")
    args = parser.parse_args()
    folders = devices()
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "docs" / "results.md": document(folders),
        readme: with_table(readme.read_text(), summary(folders)),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not what the result files give' if args.check else 'written'}")
        if not args.check:
            path.write_text(wanted[path])
    if args.plots:
        for folder in folders:
            for operator, result in load(folder).items():
                if any("ms" in row for row in result["rows"]):
                    plot(result, folder / f"{operator}.png")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
