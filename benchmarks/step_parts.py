"""Where a measured step spends its time: a profile's operators, by the part of the network that they belong to.

A profile knows names and shapes. Our operators, GELU and PyTorch's attention tell by their names; the rest by sizes:
the MLP's hidden width, three widths of q, k and v, the six (or two) of a modulation. What tells by neither is "other":
gradients of biases as wide as the network, embeddings, the loss, Python between operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from rows import Row, columns

from d2it.models.dit import TransformerConfig

PARTS = ("attention", "MLP", "modulation", "optimiser", "fused by the compiler", "other")
MOST = 3
"""How many operators of a part are named."""

_NAMES = {
    "attention": ("attention",),
    "MLP": ("gelu",),
    "modulation": ("modulate", "gated_residual"),
    "optimiser": ("adamw", "square_sum", "lerp", "optimizer"),
    "fused by the compiler": ("torch-compiled", "compiledf", "triton_", "cpp_fused"),
}

PartOf = Callable[[str, Iterable[Any]], str]


def part_of(name: str, shapes: Iterable[Any], dim: int, hidden: int) -> str:
    """Returns the part of `PARTS` that an operator belongs to.

    Args:
        name: of the operator.
        shapes: of its inputs; what is no tensor has none.
        dim: width of the network.
        hidden: of its MLPs' hidden layers.
    """
    for part, words in _NAMES.items():
        if any(word in name.lower() for word in words):
            return part
    shapes = [shape for shape in shapes if shape]
    sizes = {size for shape in shapes for size in shape}
    if hidden in sizes:
        return "MLP"
    if 3 * dim in sizes:
        return "attention"
    if name in ("aten::mm", "aten::addmm"):  # of the projection, or of its gradients
        (rows, inner), (_, outer) = shapes[-2:]
        if (rows, inner, outer).count(dim) == 2:
            return "attention"
    if sizes & {2 * dim, 6 * dim}:
        return "modulation"
    return "other"


def parts_of(config: TransformerConfig) -> PartOf:
    """Returns `part_of` for the sizes of a transformer."""
    return partial(part_of, dim=config.dim, hidden=int(config.dim * config.mlp_ratio))


def by_part(operators: Iterable[tuple[str, Any, float, int]], belongs: PartOf) -> dict[str, Any]:
    """Adds operators up: part -> its milliseconds, and those of its operators that take longest.

    Args:
        operators: name, shapes of the inputs, milliseconds in itself, calls.
        belongs: name and shapes to part.
    """
    found: dict[str, dict[str, list[float]]] = {part: {} for part in PARTS}
    for name, shapes, ms, calls in operators:
        total = found[belongs(name, shapes)].setdefault(name[:80], [0.0, 0])
        total[0] += ms
        total[1] += calls
    parts = {}
    for part, names in found.items():
        if names:
            longest = sorted(names.items(), key=lambda item: -item[1][0])[:MOST]
            named = [{"name": name, "ms": ms, "calls": calls} for name, (ms, calls) in longest]
            parts[part] = {"ms": sum(ms for ms, _ in names.values()), "operators": named}
    return parts


def table(rows: Iterable[Row]) -> str:
    """The parts of every row that was profiled by them, and beside a case what its data take on the host."""
    lines = [("case", "contender", "part", "ms", "share", "operators: ms, calls")]
    for row in rows:
        for part, found in row.get("parts", {}).items():
            total = sum(each["ms"] for each in row["parts"].values())
            named = [f"{each['name']} {each['ms']:.2f}, {each['calls']}" for each in found["operators"]]
            share = f"{found['ms'] / total:.1%}" if total else ""
            lines.append((row["case"], row["contender"], part, f"{found['ms']:.2f}", share, "; ".join(named)))
        if row["contender"] == "part: loader" and "ms" in row:
            lines.append((row["case"], "", "data", f"{row['ms']:.2f}", "", "read on the host while a step runs"))
    return columns(lines) if len(lines) > 1 else ""
