"""Makes docs/results.md, docs/evidence.md, the README's chart and the plots from the result files alone.

    python benchmarks/results.py            # rewrite both documents, the README's chart and its words
    python benchmarks/results.py --check    # exit status 1 where they are not what the files give
    python benchmarks/results.py --plots    # also draw the plots beside the files (matplotlib)

Needs the standard library alone, and matplotlib for the plots. A figure that no file holds does not appear.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

from goals import goal_table
from quality import report
from rows import RESULTS, Result, Row, cases, devices, fastest, is_cpu, load, note, ours, right, speedup

ROOT = Path(__file__).resolve().parent.parent
IN_CACHE = "in cache"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


# -------------------------------------------------------------------------------------------------
# Markdown


def time(ms: float) -> str:
    """Milliseconds as text, in the unit that fits."""
    return f"{ms * 1000:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _ran_on(result: Result) -> str:
    keys = ("driver", "cuda", "torch", "triton", "python", "threads")
    versions = [f"{key} {result[key]}" for key in keys if result.get(key) is not None]
    return ", ".join([f"{result['date']}, commit {result['commit']}", *versions])


def _measured(row: Row) -> str:
    parts = []
    if row.get("bytes"):
        of_copy = f"{row['copy_share']:.0%} of copy" if row["copy_share"] <= 1 else IN_CACHE
        parts = [f"{_short(row['gbps'])} GB/s ({of_copy})"]
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
        lines.append(
            f"| {row['case']} | {row.get('direction', '')} | {row['contender']} | {time(row['ms'])} "
            f"| {time(row['ms_q10'])} .. {time(row['ms_q90'])} | {_measured(row)} | {note(rows, row)} |"
        )
    lines += budget_table(rows)
    skipped = {(row["contender"], row["skipped"]): None for row in rows if "skipped" in row}
    if skipped:
        lines += ["", "Skipped: " + "; ".join(f"{name} ({reason})" for name, reason in skipped) + "."]
    return [*lines, ""]


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """The measured rows of each model at shares of its tokens, fewest tokens first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "ms" in row and "budget" in row["shape"]:
            found.setdefault(f"{row['shape']['preset']}, {row['shape']['image_size']} pixels", []).append(row)
    return {name: sorted(points, key=lambda row: row["shape"]["tokens"]) for name, points in found.items()}


def budget_table(rows: list[Row]) -> list[str]:
    """Time against the share of tokens: both of the point of most tokens, as are the multiply-accumulates."""
    lines: list[str] = []
    for name, points in curves(rows).items():
        most = points[-1]
        lines += ["", f"Time against tokens, {name}:", "", "| tokens | multiply-accumulates | time | |"]
        lines += ["|---|---|---|---|"]
        for row in points:
            work, ms = row["flops"] / most["flops"], row["ms"] / most["ms"]
            tokens = row["shape"]["tokens"]
            lines.append(f"| {tokens:.0%} | {work:.0%} | {ms:.0%} ({time(row['ms'])}) | {ms / work:.2f}x of the work |")
    return lines


def document(folders: list[Path]) -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "Written by `make results` from the files of `benchmarks/results/`. Each file holds one run, with the device,",
        "the versions, the commit and every number below. Times are medians of one call; bytes and operations are",
        "counted from the shapes, every input read once and every output written once. A speed-up is against the",
        "fastest rival whose result is right.",
        "",
        *summary(folders),
    ]
    for folder in folders:
        results = load(folder)
        first = next(iter(results.values()))
        lines += [f"## {first['device']}", ""]
        if is_cpu(first):
            lines += ["Small sizes; these figures do not carry over to a GPU.", ""]
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


class Headline(NamedTuple):
    """Our fastest row on the case of an operator that moves most, and how much faster it is than the best rival."""

    what: str
    row: Row
    times: float
    rival: str


def headlines(results: dict[str, Result]) -> list[Headline]:
    """One for each operator and direction that has a rival whose result is right."""
    found = []
    for result in results.values():
        rows = result["rows"]
        # Neither points of a curve nor what stands beside the precision that auto takes.
        own = [row for row in rows if ours(row) and right(row) and not {"budget", "precision"} & row["shape"].keys()]
        heaviest = max(own, key=lambda row: row.get("floor_ms", row["ms"]), default=None)
        if heaviest is None:
            continue
        for direction in dict.fromkeys(r.get("direction") for r in rows if r["case"] == heaviest["case"]):
            row = fastest(rows, heaviest["case"], direction, own=True)
            faster = speedup(rows, row) if row else None
            if row and faster:
                found.append(Headline(f"{result['operator']} {direction or ''}".strip(), row, *faster))
    return found


def share(value: float) -> str:
    """A share of a measured rate. Copies are measured on buffers larger than the caches: above 1, a cache had it."""
    return f"{value:.0%}" if value <= 1 else IN_CACHE


def summary(folders: list[Path]) -> list[str]:
    """The table at the head of docs/results.md, of the first device."""
    body = [
        f"| `{h.what.partition(' ')[0]}` {h.what.partition(' ')[2]} | {h.row['case']} | {time(h.row['ms'])} "
        f"| {share(h.row['floor_share'])} | {h.times:.1f}x {h.rival} |"
        for h in (headlines(load(folders[0])) if folders else [])
    ]
    if not body:
        return []
    return [
        "## At a glance",
        "",
        f"{_where(folders)}, the case of each operator that moves most:",
        "",
        "| operator | case | time | floor / time | against the best rival |",
        "|---|---|---|---|---|",
        *body,
        "",
        "The floor is the time that the bytes need at the rate of a copy, or the operations at that of a matrix",
        "product, whichever is longer; both rates are measured in the same run. The copy's buffers are larger than the",
        f'caches, so an operator whose tensors stay in a cache can be faster than that floor: "{IN_CACHE}".',
        "",
    ]


CHART = ROOT / "docs" / "images" / "speed.svg"


def in_readme(folders: list[Path]) -> str:
    """What stands between the README's markers: the chart, and where its figures were measured."""
    if not folders or not headlines(load(folders[0])):
        return "Not measured yet."
    words = (
        f"*{_where(folders)}: the time of the fastest rival whose result is right, over ours. All figures, with the "
        "floor of each: [docs/results.md](docs/results.md).*"
    )
    picture = f"![Times of the fastest rival over ours, by operator]({CHART.relative_to(ROOT)})"
    return "\n".join([picture, "", *textwrap.wrap(words, 118)])


def _where(folders: list[Path]) -> str:
    first = next(iter(load(folders[0]).values()))
    where = f"On {first['device']}, torch {first['torch']}"
    return where + (", at small sizes (no GPU has run this code yet)" if is_cpu(first) else "")


def chart(folders: list[Path]) -> str:
    """Bars of the headlines' factors on a logarithmic scale, as SVG that is read on light and on dark pages."""
    bars = headlines(load(folders[0])) if folders else []
    left, width, step = 250, 380, 22
    most = max([4.0, *(bar.times for bar in bars)])
    least = min([1.0, *(bar.times for bar in bars)])

    def x(times: float) -> float:
        return left + width * math.log(times / least) / math.log(most / least)

    height = step * len(bars) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="13">',
        f'<line x1="{x(1):.1f}" y1="4" x2="{x(1):.1f}" y2="{height - 26}" stroke="#888"/>',
        f'<text x="{x(1):.1f}" y="{height - 8}" fill="#888" text-anchor="middle">as fast as the best rival</text>',
    ]
    for i, bar in enumerate(bars):
        y = 6 + i * step
        start, end = sorted((x(1), x(bar.times)))
        colour = "#2a9d5c" if bar.times >= 1 else "#c8553d"
        rest = f"{bar.times:.1f}x {bar.rival}"
        lines += [
            f'<text x="{left - 12}" y="{y + 13}" fill="#888" text-anchor="end">{bar.what}</text>',
            f'<rect x="{start:.1f}" y="{y}" width="{max(1.0, end - start):.1f}" height="{step - 6}" fill="{colour}"/>',
            f'<text x="{max(end, x(1)) + 6:.1f}" y="{y + 13}" fill="#888">{escape(rest)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


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
    size = (max(10, 6 * len(directions)), height)  # the title is long
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


def plot_curves(result: Result, path: Path) -> None:
    """Time and multiply-accumulates against the share of tokens, of the most tokens, for every model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for i, (name, points) in enumerate(curves(result["rows"]).items()):
        tokens = [row["shape"]["tokens"] for row in points]
        axis.plot(tokens, [row["ms"] / points[-1]["ms"] for row in points], "o-", color=f"C{i}", label=f"{name}: time")
        work = [row["flops"] / points[-1]["flops"] for row in points]
        axis.plot(tokens, work, "--", color=f"C{i}", label=f"{name}: multiply-accumulates")
    axis.set(xlabel="share of the tokens of the finest map", ylabel="of that map's", xlim=(0, 1.02), ylim=(0, 1.1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle(f"{result['operator']}: {result['device']}\n{_ran_on(result)}", fontsize="medium")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where something would")
    parser.add_argument("--plots", action="store_true", help="draw the plots beside the files")
    args = parser.parse_args()
    folders = devices()
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "docs" / "results.md": document(folders),
        ROOT / "docs" / "evidence.md": report.document(RESULTS / "quality"),
        readme: with_table(readme.read_text(), in_readme(folders)),
        CHART: chart(folders),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not what the result files give' if args.check else 'written'}")
        if not args.check:
            path.write_text(wanted[path])
    if args.plots:
        report.plots(RESULTS / "quality")
        for folder in folders:
            for operator, result in load(folder).items():
                if any("ms" in row for row in result["rows"]):
                    plot(result, folder / f"{operator}.png")
                if curves(result["rows"]):
                    plot_curves(result, folder / f"{operator}_budget.png")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
