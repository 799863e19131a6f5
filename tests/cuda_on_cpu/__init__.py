"""Compiles a source of csrc/ by itself for the CPU, with mutations to choose from; a CUDA source as C++.

The launches of a .cu file become calls that run every thread, and `cuda.h` in this folder stands in for the real one:
indexing, arithmetic and synchronisation within warps are tested where there is no GPU. What that cannot show is what
the hardware does: speed, races between warps, asynchronous errors.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "cuda_on_cpu"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

LAUNCH = re.compile(r"(\w+(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)
Mutations = Mapping[str, tuple[str, str]]


class Source:
    """csrc/<file>, compiled: `ops` holds its operators for CPU tensors, and `mutate` breaks them.

    `most_shared.value`, of a .cu file: the bytes of shared memory that a block of the pretended GPU can have.

    Args:
        file: name of a .cpp or .cu file.
        mutations: by name, ("context «expression» context", "other expression"). The text occurs once, in the source
            or in the headers of csrc/ that it includes, and the expression is the one that changes. All are compiled
            in together, none is active.
    """

    def __init__(self, file: str, mutations: Mutations) -> None:
        self._names = list(mutations)
        source = with_headers(file)
        for number, (place, other) in enumerate(mutations.values(), start=1):
            before, expression, after = re.split("[«»]", place)
            if source.count(before + expression + after) != 1:
                raise ValueError(
                    f"{place!r} occurs {source.count(before + expression + after)} times in {file} and its headers"
                )
            choice = f"(d2it_mutant == {number} ? ({other}) : ({expression}))"
            source = source.replace(before + expression + after, before + choice + after)
        parts = [file, source, torch.__version__, (CSRC / "registration.cpp").read_text()]
        parts += [path.read_text() for path in sorted(HERE.glob("*.*"))]
        namespace = f"d2it_on_cpu_{hashlib.sha256(''.join(parts).encode()).hexdigest()[:12]}"
        library = BUILD / f"{namespace}.so"
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / f"{namespace}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want the same
            if not library.exists():
                unit = BUILD / f"{namespace}.cpp"
                unit.write_text(translate(source, namespace))
                compile_library(unit, library)
        torch.ops.load_library(library)
        self.ops: Any = getattr(torch.ops, namespace)
        variables = ctypes.CDLL(str(library))
        self._mutant = ctypes.c_int.in_dll(variables, "d2it_mutant")
        self.most_shared = ctypes.c_int.in_dll(variables, "d2it_most_shared") if file.endswith(".cu") else None

    def mutate(self, name: str | None) -> None:
        """Makes the mutation `name` the active one; None: none of them."""
        self._mutant.value = 0 if name is None else self._names.index(name) + 1

    def replace(self, monkeypatch: pytest.MonkeyPatch, mutation: str | None = None) -> None:
        """From here on, the "cpu" backends run this source, with the mutation of this name."""
        self.mutate(mutation)
        monkeypatch.setattr(torch.ops, "d2it_C", self.ops)


class Sources(dict[str, Source]):
    """A test file's sources by name, each compiled when it is first asked for, with the mutations given for it."""

    def __init__(self, mutations: Mapping[str, Mutations]) -> None:
        super().__init__()
        self._mutations = mutations

    def __missing__(self, file: str) -> Source:
        self[file] = Source(file, self._mutations[file])
        return self[file]


def with_headers(file: str) -> str:
    """A source with every header of csrc/ in its place, `cuda.h` that of this folder."""
    seen: set[str] = set()

    def expand(text: str) -> str:
        return re.sub(r'^#include "(\S+)"$', header, text, flags=re.MULTILINE)

    def header(include: re.Match[str]) -> str:
        name = include[1]
        if name in seen:
            return ""
        seen.add(name)
        path = HERE / name if (HERE / name).exists() else CSRC / name
        return expand(path.read_text().replace("#pragma once\n", ""))

    return expand((CSRC / file).read_text())


def translate(source: str, namespace: str) -> str:
    """The source with its launches as calls, registering itself for the CPU as `torch.ops.<namespace>`."""
    source = LAUNCH.sub(r"d2it::launch(\2, [&] { \1(\3); });", source)
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", source)
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"auto* \2 = reinterpret_cast<\1*>(d2it::dynamic_shared.data());", source
    )
    source = re.sub(r"LIBRARY_IMPL\(d2it_C, \w+, m\)", f"LIBRARY_IMPL({namespace}, CPU, m)", source)
    schemas = (CSRC / "registration.cpp").read_text().split("STABLE_TORCH_LIBRARY(d2it_C, m)")[1]
    return f'extern "C" {{ int d2it_mutant = 0; }}\n{source}\nSTABLE_TORCH_LIBRARY({namespace}, m){schemas}'


def compile_library(unit: Path, library: Path) -> None:
    command = [str(COMPILER), "-std=c++20", "-O0", "-g0", "-w", "-shared", "-fPIC"]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-o", f"{library}.part", str(unit)]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu"]
    subprocess.run(command, check=True)
    os.replace(f"{library}.part", library)
