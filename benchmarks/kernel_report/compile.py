"""Compiles every kernel for an architecture and reads what the compiler made of it.

Triton kernels: the compile cases that each kernel file declares are run through the real launchers on meta tensors,
with launching replaced by compiling, so the alignment hints, constants and warps are the launcher's. CUDA kernels:
every file of csrc/ goes through nvcc, or is read off a library that was built of them. Registers, stack and shared
memory are ptxas's own, read off the cubin.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernel_report.gpus import ARCHS
from kernel_report.ptx import read_function, split_functions
from kernel_report.record import Recalled, recorded, watch_compiler

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "kernel_report"


@functools.cache
def cuobjdump() -> str:
    """Bundled with Triton, else on PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("cuobjdump is neither bundled with triton nor on PATH")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(cubin: bytes, ptx: str) -> dict[str, dict]:
    """Kernel name -> its row of the report, without what the launch adds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_usage(_output(cuobjdump(), "-res-usage", file.name), ptx)


def read_usage(usage: str, ptx: str) -> dict[str, dict]:
    """The same from the registers and memory that cuobjdump prints."""
    bodies = split_functions(ptx)
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", usage):
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        bound = re.search(rf"\.entry\s+{re.escape(name)}\b[^{{]*?\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", ptx)
        found[name] = {
            "registers": resources["REG"],
            "spill_bytes": resources["STACK"] + resources["LOCAL"],
            "shared_bytes": resources["SHARED"],
            "max_threads": math.prod(int(n) for n in bound.groups() if n) if bound else 0,
            **read_function(bodies[name]),
        }
    return found


class AheadOfTimeDriver:
    """Stands where Triton expects a GPU's driver and names the target; nothing can be launched on it."""

    def __init__(self, capability: tuple[int, int]):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device of its own per architecture: kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel that was compiled and not run."""

    function: Any
    kernel: Any
    """What Triton compiled."""
    programs: int
    arguments: dict[str, Any]
    """By name; the fields of a named tuple as "argument.field"."""
    types: dict[str, str]
    """Triton's type of each argument by the same names: "*bf16", "i32", "constexpr"."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def threads(self) -> int:
        return 32 * self.kernel.metadata.num_warps

    def tensors(self) -> dict[int, tuple[str, Any]]:
        """Number among the machine code's parameters -> name and tensor of every pointer."""
        passed = [name for name, kind in self.types.items() if kind != "constexpr"]
        return {i: (name, self.arguments[name]) for i, name in enumerate(passed) if self.types[name].startswith("*")}


def _flat(name: str, value: Any, kind: Any) -> Iterator[tuple[str, Any, str]]:
    """An argument, or the fields of one that is a tuple, with Triton's types."""
    if isinstance(kind, (tuple, list)):
        fields = getattr(value, "_fields", range(len(kind)))
        for field, inner, inner_kind in zip(fields, value, kind, strict=True):
            yield from _flat(f"{name}.{field}", inner, inner_kind)
    else:
        yield name, getattr(value, "value", value) if kind == "constexpr" else value, kind


def _launch(function: Any, kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    given = dict(zip(function.arg_names, args)) | kwargs
    defaults = {p.name: p.default for p in function.params if p.has_default}
    flat = [
        each
        for name, kind in kernel.src.signature.items()
        for each in _flat(name, given.get(name, defaults.get(name)), kind)
    ]
    arguments, types = {name: value for name, value, _ in flat}, {name: kind for name, _, kind in flat}
    size = grid(given) if callable(grid) else grid
    return Launch(function, kernel, math.prod(size), arguments, types)


@functools.cache
def compile_instead_of_launching() -> list[Launch]:
    """Makes `kernel[grid](...)` compile and append its `Launch` to the list that is returned."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_launch(self, kernel, grid, args, kwargs))
        return kernel

    JITFunction.run = compile_only
    return compiled


@functools.cache
def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output(cuobjdump(), "-sass", file.name)


def read_launch(launch: Launch) -> dict:
    """What the report has of a compiled kernel."""
    if isinstance(launch.kernel, Recalled):
        return recorded()[launch.kernel.key]
    ((_, found),) = read(launch.kernel.asm["cubin"], launch.kernel.asm["ptx"]).items()
    metadata = launch.kernel.metadata
    shared = max(metadata.shared, found["shared_bytes"])
    return {**found, "shared_bytes": shared, "threads": launch.threads, "num_stages": metadata.num_stages}


def _import_kernels(folder: str, stem: str):
    if Path(folder) == ROOT / "kernels":
        return importlib.import_module(f"d2it.kernels.{stem}")
    sys.path.insert(0, folder)
    return importlib.import_module(stem)


def compile_triton(
    folder: str, stem: str, arch: str, slot: int, slots: int, recall: bool, chosen: frozenset[int] | None = None
) -> tuple[list[dict], list[str]]:
    """Rows for every slots-th compile case of one kernel file (of those chosen), and the kernels it declares.

    recall: what has a line in `record` is not compiled.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    watch_compiler(recall)
    compiled = compile_instead_of_launching()
    module = _import_kernels(folder, stem)
    from d2it.kernels.common import COMPILE_CASES, compile_target

    capability = ARCHS[arch]["capability"]
    driver.set_active(AheadOfTimeDriver(capability))
    rows = []
    with compile_target(capability, ARCHS[arch]["sms"]):
        cases = COMPILE_CASES[module.__name__]() if module.__name__ in COMPILE_CASES else ()
        for i, (config, call) in enumerate(cases):
            if i % slots != slot or (chosen is not None and i not in chosen):
                continue
            compiled.clear()
            call()
            if not compiled:
                raise SystemExit(f"{stem}: compile case {config} launched nothing")
            for launch in compiled:
                row = {
                    "kernel": launch.name,
                    "config": config,
                    "arch": arch,
                    "source": f"kernels/{stem}.py",
                    "case": i,
                    "key": launch.kernel.key,
                    **read_launch(launch),
                }
                rows.append(row)
    declared = [
        function.__name__
        for function in vars(module).values()
        if isinstance(function, JITFunction)
        and function.__name__.endswith("_kernel")
        and function.__module__ == module.__name__
    ]
    return rows, declared


@functools.cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def compile_cuda(source: str, arch: str) -> list[dict]:
    """Rows for every kernel of one .cu file."""
    folder = build_cuda(source, arch)
    found = read((folder / "cubin").read_bytes(), (folder / "ptx").read_text())
    return [_cuda_row(mangled, arch, numbers) for mangled, numbers in found.items()]


def find_cuda(source: str, arch: str, kernel: str) -> tuple[dict, str, str]:
    """One kernel of a .cu file by its name with template arguments, "k<float, 16>": its row of the report, its machine
    code with the lines of the source, as `nvdisasm -gi` prints it, and its PTX, each of this function alone.

    Raises:
        ValueError: The file has no such kernel.
    """
    folder = build_cuda(source, arch)
    whole = (folder / "ptx").read_text()
    files = "".join(re.findall(r"^\s*\.file\s.*\n", whole, flags=re.MULTILINE))
    ptx = {re.match(r"\.entry\s+(\w+)", p)[1]: p + files for p in _ENTRIES.split(whole)[1:]}
    for mangled in ptx:
        name = _cuda_name(mangled)
        if kernel in (name[0], f"{name[0]}<{name[1]}>"):
            usage = _output(cuobjdump(), "-res-usage", str(folder / "cubin"))
            own = re.search(rf"Function {re.escape(mangled)}:\n.*", usage)[0]
            ((_, numbers),) = read_usage(own, ptx[mangled]).items()
            return _cuda_row(mangled, arch, numbers), (folder / f"{mangled}.sass").read_text(), ptx[mangled]
    raise ValueError(f"{source} has no kernel {kernel}")


_ENTRIES = re.compile(r"(?=\.entry\s)")


FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-lineinfo"]  # as in setup.py, and lines


@functools.cache
def cuda_key(source: str, arch: str) -> str:
    """A digest of all that nvcc makes a .cu file's machine code of."""
    import torch

    key = hashlib.sha256(" ".join([arch, *FLAGS, torch.__version__, _output(nvcc(), "--version")]).encode())
    headers = sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc").glob("*.cuh"))
    for path in [Path(source), *headers]:
        key.update(path.read_bytes())
    return key.hexdigest()[:16]


@functools.cache
def build_cuda(source: str, arch: str) -> Path:
    """The folder with what nvcc makes of a .cu file: "cubin", "ptx" and, of every kernel, its machine code with the
    lines of the source."""
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = [*FLAGS, f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-I{ROOT / 'csrc'}"]
    kept = CACHE / f"{Path(source).stem}-{arch}-{cuda_key(source, arch)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes want the same
        if kept.exists():
            return kept
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            kernels = Path(folder) / "kernels"
            kernels.mkdir()
            command = [nvcc(), "-cubin", f"-arch={arch}", *flags, "--keep", "--keep-dir", folder]
            made = subprocess.run(
                [*command, "-o", str(kernels / "cubin"), source], capture_output=True, text=True, cwd=folder
            )
            if made.returncode:
                raise SystemExit(f"nvcc on {source}:\n{made.stderr}")
            shutil.copy(Path(folder) / f"{Path(source).stem}.ptx", kernels / "ptx")
            listing = _output(str(Path(cuobjdump()).with_name("nvdisasm")), "-gi", "-c", str(kernels / "cubin"))
            parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
            for mangled, code in zip(parts[1::2], parts[2::2]):
                (kernels / f"{mangled}.sass").write_text(code)
            kernels.rename(kept)
    return kept


def read_library(library: Path, archs: list[str]) -> list[dict]:
    """Rows for every kernel of csrc/ as the built library has it: registers and memory of each architecture. It carries
    PTX of the newest one alone, so the widths are those."""
    ptx = _output(cuobjdump(), "-ptx", str(library))
    rows = []
    for part in re.split(r"^Fatbin elf code:", _output(cuobjdump(), "-res-usage", str(library)), flags=re.MULTILINE)[
        1:
    ]:
        arch = re.search(r"^arch = (\w+)", part, re.MULTILINE)[1]
        if arch in archs:
            rows += [_cuda_row(mangled, arch, found) for mangled, found in read_usage(part, ptx).items()]
    if absent := set(archs) - {row["arch"] for row in rows}:
        raise SystemExit(f"{library} has no code for {', '.join(sorted(absent))}")
    return rows


def _cuda_name(mangled: str) -> tuple[str, str]:
    """The name of a kernel, and its template arguments or "-"."""
    name = _demangle(mangled).replace("(anonymous namespace)::", "")
    kernel, _, parameters = name.partition("<")
    return kernel.partition("(")[0].rpartition(" ")[2].rpartition("::")[2], parameters.rpartition(">(")[0] or "-"


def _cuda_row(mangled: str, arch: str, found: dict) -> dict:
    kernel, config = _cuda_name(mangled)
    return {
        "kernel": kernel,
        "config": config,
        "arch": arch,
        "source": _source_of(kernel),
        **found,
        "threads": found["max_threads"] or 1024,
        "num_stages": 0,
    }


@functools.cache
def _source_of(kernel: str) -> str:
    for path in sorted((ROOT / "csrc").glob("*.cu")):
        if re.search(rf"\b{kernel}\b", path.read_text()):
            return f"csrc/{path.name}"
    raise SystemExit(f"no file of csrc/ holds {kernel}: the library is older than they are")


@functools.cache
def _demangle(name: str) -> str:
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    found = _output(demangler, name).strip() if demangler else name
    # cu++filt gives constants their types, c++filt does not.
    return found.replace("(int)", "").replace("(bool)0", "false").replace("(bool)1", "true")
