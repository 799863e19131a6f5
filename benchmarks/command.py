"""The command line that every benchmark of an operator has.

A script declares its measurements as `bench.Bench` objects and ends in `command.main(...)`; run alone it
prints a table and writes `benchmarks/results/<device>/<operator>.json`. On a CPU the same scripts run at small
sizes, and print that they do.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import timing
import torch
from bench import OUT_OF_TIME, Bench, run_bench, warm
from rows import RESULTS, Row, columns, note, ours


def table(rows: list[Row]) -> str:
    """The table that a benchmark prints."""
    head = ("case", "direction", "contender", "ms", "q10..q90", "GB/s", "of copy", "TFLOP/s", "of floor", "")
    body = []
    for row in rows:
        if "skipped" in row:
            reason = f"skipped: {row['skipped']}"
            body.append((row["case"], row.get("direction", ""), row["contender"], *[""] * 6, reason))
            continue
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
                note(rows, row),
            )
        )
    return columns([head, *body])


def results_folder() -> Path:
    """Where the results of this machine go by default."""
    return RESULTS / machine.slug(machine.device_name())


def write_results(operator: str, rows: list[Row], folder: Path | None = None, *, complete: bool = True) -> Path:
    """`<folder>/<operator>.json`: header, the rates of the same run, rows. Replaced at once, never half written."""
    folder = folder or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{operator}.json"
    content = {"operator": operator, "complete": complete, **machine.header(), "rates": timing.machine_rates()}
    content["rows"] = _rounded(rows)
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case and no rival after that")
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
    """Prints the machine and its rates, and sets what the options ask for."""
    print(machine.title(), flush=True)
    if machine.device() == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.memory)
    elif not args.warm:
        print(f"no GPU: small sizes on {torch.get_num_threads()} threads; these figures do not carry over to a GPU")
    if not args.warm:
        rates = timing.machine_rates()
        print(f"copy {rates['copy_gbps']} GB/s; matrix product {rates['matmul_tflops']} TFLOP/s", flush=True)


def share_of(items: list[Any], shard: str) -> list[Any]:
    """Every N-th item from the I-th on, for a shard "I/N"."""
    i, _, n = shard.partition("/")
    return items[int(i) :: int(n)]


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
        rows.setdefault(name, []).extend(run_bench(bench, args.seconds, end))
        print(f"[{i + 1}/{len(chosen)}] {name} {bench.case}", file=sys.stderr, flush=True)
        if machine.device() == "cuda":
            torch.cuda.empty_cache()
        if not args.no_save:
            finished = all((later.operator or operator) != name for later in chosen[i + 1 :])
            finished &= all(row.get("skipped") != OUT_OF_TIME["skipped"] for row in rows[name])
            write_results(name, rows[name], args.out, complete=args.only == "*" and finished)
        if time.monotonic() > end and i + 1 < len(chosen):
            print(f"out of time: {len(chosen) - i - 1} of {len(chosen)} cases left out")
            break
    for name, own in rows.items():
        print(f"\n{name}\n{table(own)}")
    if not args.no_save and chosen:
        print(f"written to {args.out or results_folder()}")
    return 1 if any(ours(row) and not row.get("correct", True) for own in rows.values() for row in own) else 0
