"""The rows of the result files, and how they are read. Standard library only.

A result file is `benchmarks/results/<device>/<operator>.json`: "operator", "complete", the header of
`machine.header`, "rates" and "rows"; a row is one contender in one case and direction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]
Result = dict[str, Any]


def ours(row: Row) -> bool:
    """Whether a row's contender is one of d2it's."""
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


def note(rows: Iterable[Row], row: Row) -> str:
    """The last column of a table: a row's speed-up over its best rival, or by how much its result is wrong."""
    if row.get("correct") is False:
        return f"wrong: relative error {float(row['error']):.1e}"
    faster = speedup(rows, row)
    return f"{faster[0]:.2f}x {faster[1]}" if faster else ""


def cases(rows: Iterable[Row]) -> list[str]:
    """The cases of some rows, each once, in their order."""
    return list(dict.fromkeys(row["case"] for row in rows))


def load(folder: Path) -> dict[str, Result]:
    """Operator -> its result file in the folder of one device."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def devices(root: Path = RESULTS) -> list[Path]:
    """The folders that hold results, GPUs first."""
    folders = {path.parent for path in root.glob("*/*.json")}
    return sorted(folders, key=lambda folder: (folder.name.startswith("cpu"), folder.name))


def is_cpu(result: Result) -> bool:
    """Whether a result was measured at a CPU's small sizes."""
    return bool(result["small"])


def columns(lines: list[tuple[str, ...]]) -> str:
    """Cells padded to columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
