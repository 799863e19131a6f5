"""What the compilers made of every kernel, one a line in `record.jsonl`: what they are given unchanged is not compiled
again, and a change of a kernel shows what became of its registers.

A line is found by a digest of all that its figures follow from. Of a Triton kernel: the code after Triton's first
passes, the options of the launch, the architecture, the versions of Triton and of its assembler. Of a CUDA kernel's
budget: its source and headers, the version of nvcc, the launch. Of both, the modules here that read machine code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("record.jsonl")
NAMES = ("source", "kernel", "config", "arch", "key")
NO_FIGURES = {*NAMES, "occupancy", "problems", "accepted"}
"""Of a row of the report, what says which kernel it is, and what follows from the figures."""

# Where an operation stands in the source: it moves with every line that is written above it.
_LOCATION = re.compile(r'^#loc.*\n| ?loc\((?:#\w+|unknown|"[^"]*"(?:\(#\w+\))?)\)', re.MULTILINE)


class Recalled(Exception):
    """Ends the compilation of a kernel that has a line, and stands where Triton's compiled kernel would."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key
        self.src: Any = None


@functools.cache
def modules(*names: str) -> str:
    """A digest of modules of this package."""
    return shorten(*(Path(__file__).with_name(f"{name}.py").read_text() for name in names))


def shorten(*parts: str) -> str:
    """A digest of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _versions(arch: int) -> str:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    return " ".join((triton.__version__, get_ptxas_version(arch), str(arch), modules("compile", "flow", "ptx")))


def digest(code: str, options: Any, arch: int) -> str:
    """The key of a kernel: its code as Triton's IR, its `CUDAOptions` and 90 for sm_90."""
    return shorten(_versions(arch), options.hash(), _LOCATION.sub("", code))


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """Key -> the figures of the kernel."""
    return {line["key"]: line["figures"] for line in all_lines()}


def all_lines() -> list[dict[str, Any]]:
    """The record."""
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def _place(line: dict[str, Any]) -> tuple[str, ...]:
    return line["source"], line["kernel"], line["config"], line["arch"]


def out_of_date(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> list[str]:
    """The kernels whose lines are of other code than any row of the same file and architecture has.

    Nothing is known of a file with a row that has no key: Triton's own cache had it.
    """
    found: dict[tuple[str, str], set[str | None]] = {}
    for row in rows:
        found.setdefault((row["source"], row["arch"]), set()).add(row.get("key"))
    old = [line for line in lines if None not in (keys := found.get(_file(line), {None})) and line["key"] not in keys]
    return [f"{line['kernel']} [{line['config']}] {line['arch']}" for line in old]


def _file(line: dict[str, Any]) -> tuple[str, str]:
    return line["source"], line["arch"]


def renew(rows: Iterable[dict[str, Any]]) -> None:
    """Replaces the lines of every file and architecture that the rows of a report are of."""
    made = [
        {name: row[name] for name in NAMES} | {"figures": {k: row[k] for k in row if k not in NO_FIGURES}}
        for row in rows
        if row.get("key")
    ]
    renewed = set(map(_file, made))
    stay = [line for line in all_lines() if _file(line) not in renewed]
    lines = {line["key"]: line for line in sorted(stay + made, key=_place, reverse=True)}  # several cases share a key
    text = [json.dumps(line, separators=(",", ":")) + "\n" for line in sorted(lines.values(), key=_place)]
    FILE.write_text("".join(text))


@functools.cache
def watch_compiler(recall: bool) -> None:
    """From here on, what Triton compiles has its `key`; recall: a kernel that has a line becomes a `Recalled`."""
    import triton.compiler
    from triton.backends.nvidia.compiler import CUDABackend

    compile_all, make_ttgir = triton.compiler.compile, CUDABackend.make_ttgir
    keys: list[str] = []

    def lower(module: Any, metadata: dict, options: Any, capability: int) -> Any:
        keys.append(digest(str(module), options, capability))
        if recall and keys[-1] in recorded():
            raise Recalled(keys[-1])
        return make_ttgir(module, metadata, options, capability)

    def compile_or_recall(src: Any, **settings: Any) -> Any:
        keys.clear()
        try:
            kernel = compile_all(src, **settings)
        except Recalled as known:
            known.src = src
            return known
        kernel.key = keys[-1] if keys else None  # none: it came from Triton's cache
        return kernel

    CUDABackend.make_ttgir = staticmethod(lower)
    triton.compiler.compile = compile_or_recall
