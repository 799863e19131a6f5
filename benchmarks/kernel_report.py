"""What the compiler made of every kernel: no GPU needed.

    python benchmarks/kernel_report.py --arch sm_80 sm_90 sm_100 [--json FILE]
    python benchmarks/kernel_report.py --arch sm_90 --heaviest sm_80 sm_100 --library d2it/_C.abi3.so

Triton kernels: the compile cases that each kernel file declares are run through the real launchers on meta
tensors, with launching replaced by compiling, so the alignment hints, constants and warps are the launcher's.
CUDA kernels: every file of csrc/ goes through nvcc, or is read off a library that was built of them.

Registers, stack and shared memory are ptxas's own, read off the cubin; widths are the PTX's. ``load_bits`` is the
width of the instructions that load most bytes in the main loop: the loop (outermost, where loops nest) that loads
most, or the whole kernel where no loop loads. ``store_bits`` is the width that stores most bytes in the whole kernel.

Exit status 1: a kernel spills, loads narrowly in its main loop, does not fit, or is compiled by no case, and
EXCEPTIONS does not say why that is right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fnmatch
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "kernel_report"

# (kernel, config) patterns -> the problem that is accepted, and why.
EXCEPTIONS: list[tuple[str, str, str, str]] = [
    (
        "relative_position_bias_fwd_kernel",
        "*",
        "narrow load",
        "gathers single entries of a table that stays in L1 (65 KB in these cases); 128-bit stores are the bound",
    ),
    (
        "relative_position_bias_bwd_kernel",
        "w[48]-*",
        "narrow load",
        "a row of pairs has 4 or 8 elements, a block fewer bytes than 16 a lane; under 0.4 MB in all",
    ),
    (
        "*_any",
        "*",
        "narrow load",
        "takes the sizes and strides that have no 16-byte vectors, one element at a time",
    ),
    (
        "clear_unnamed_rows_kernel",
        "*",
        "narrow load",
        "reads a flag of one byte a row; the rows are only written, and only those without a name",
    ),
    (
        "close_up_kernel",
        "*",
        "narrow load",
        "one slot a lane, 4 bytes; a window of 64 has no more, and all slots are under 1 % of the bytes",
    ),
    (
        "window_attention_blocks_*_kernel",
        "*-packed-*",
        "narrow load",
        "the bias is gathered by the positions of the tokens that exist, from L2 (256 KB a head at most); q, k, v and "
        "their gradients come 16 bytes at a time",
    ),
    (
        "window_attention_blocks_dkv_kernel",
        "n256-*",
        "narrow load",
        "the bias of a block of scores with keys first is read down a column, from L2 (256 KB a head); q, k, v and "
        "their gradients come 16 bytes at a time",
    ),
    (
        "*window_attention_*_kernel",
        "n49-*",
        "narrow load",
        "rows of 49 entries of the bias start at odd addresses; one matrix of 10 KB a head, from L1",
    ),
    (
        "reduce_sums_kernel",
        "n49-*",
        "narrow load",
        "rows of 49 entries start at odd addresses",
    ),
    (
        "kde_entropy_kernel",
        "S16-*-uint8",
        "narrow load",
        "a region of 256 pixels leaves 8 bytes to a lane; 0.05 us of memory time for an image of 256 x 256",
    ),
    (
        "kde_entropy_kernel",
        "S8-*",
        "narrow load",
        "a region of 64 pixels leaves two to a lane",
    ),
    (
        "kde_entropy_kernel",
        "*-channels_last-*",
        "narrow load",
        "pixels of three channels come one by one; the three loads of a channel each find the same sectors in L1",
    ),
    (
        "plan_tokens_*_kernel",
        "*",
        "narrow load",
        "one int64 grain a lane, 8 bytes, from maps of 0.5 MB for 256 images; the launch is the cost",
    ),
    (
        "gather_rows_kernel",
        "C12-bfloat16-pack-latents",
        "narrow load",
        "channels of a cell are far apart in (B, C, Hf, Wf); lanes run along the cells instead",
    ),
    (
        "gather_rows_kernel",
        "C4-bfloat16-*",
        "narrow load",
        "a row is 8 bytes",
    ),
    (
        "gather_rows_kernel",
        "C12-bfloat16-*",
        "narrow load",
        "a row is 24 bytes and starts on an 8-byte boundary",
    ),
    (
        "sum_runs_kernel",
        "*-float32-packed-modulate",
        "narrow load",
        "the loop counted is the one for images out of order, which reads two statistics a row",
    ),
]

# Per multiprocessor: shared memory, of which a block may take; streaming multiprocessors of the product.
# 65,536 registers, 64 warps and 32 blocks on all three (CUDA C++ Programming Guide, "Compute Capabilities").
ARCHS = {
    "sm_80": {"capability": (8, 0), "shared": 164 * 1024, "block_shared": 163 * 1024, "sms": 108},
    "sm_90": {"capability": (9, 0), "shared": 228 * 1024, "block_shared": 227 * 1024, "sms": 132},
    "sm_100": {"capability": (10, 0), "shared": 228 * 1024, "block_shared": 227 * 1024, "sms": 148},
}

# Bytes in a main loop that may come through loads of 32 bits and less (row indices, per-row scalars).
NARROW_SHARE = 0.25


# --------------------------------------------------------------------------------------------------
# Reading what the compiler made

_ENTRY = re.compile(r"\.entry\s+(\w+)")
_LABEL = re.compile(r"^(\$?\w+):")
_INSTRUCTION = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfus](\d+)$")
_TENSOR = re.compile(r"^(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
# A shared, local, parameter or constant access says so; one without a space may be global, and is counted as such.
_NOT_GLOBAL = (".shared", ".local", ".param", ".const")

Access = tuple[str, int]
"""("load" or "store", bits that a thread moves), or (another opcode, 0)."""


def read_instruction(opcode: str, operands: str) -> Access:
    """What an instruction of PTX does to global memory."""
    if opcode.startswith("cp.async.bulk"):
        # The copy engine moves whole rows: as wide as memory goes, whatever a thread issues.
        return ("load" if ".shared::c" in opcode.partition(".global")[0] else "store", 128)
    if opcode.startswith("cp.async.") and ".shared.global" in opcode:
        return "load", 8 * int(operands.split("]")[2].split(",")[1], 0)
    kind = {"ld": "load", "ldu": "load", "st": "store"}.get(opcode.partition(".")[0])
    if kind and not any(space in opcode for space in _NOT_GLOBAL):
        vector, bits = _WIDTH.search(opcode).groups()
        return kind, int(vector or 1) * int(bits)
    return opcode, 0


def split_functions(ptx: str) -> dict[str, list[str]]:
    """PTX -> kernel name -> its statements and labels, in order."""
    functions: dict[str, list[str]] = {}
    for part in re.split(r"(?=\.entry\s)", ptx)[1:]:
        name = _ENTRY.match(part)[1]
        body = _braced(part)
        body = re.sub(r"//.*|^\s*\.loc\b.*", "", body, flags=re.MULTILINE)
        # A label ends its line, or stands before an instruction of inline assembly; braces open scopes there.
        statements = re.split(r";|\n(?=\s*\$?\w+:)|(?<=\w:)\s", f"{body}\n")
        functions[name] = [stripped for text in statements if (stripped := text.strip().lstrip("{} \t\n"))]
    return functions


def _braced(text: str) -> str:
    """What stands between the first brace and the one that closes it."""
    start = end = text.index("{")
    depth = 1
    while depth:
        end = re.compile("[{}]").search(text, end + 1).start()
        depth += 1 if text[end] == "{" else -1
    return text[start + 1 : end]


def basic_blocks(statements: list[str]) -> tuple[list[list[Access]], list[set[int]]]:
    """What the instructions of each basic block do, and each block's successors."""
    blocks: list[list[Access]] = [[]]
    labels: dict[str, list[int]] = {}
    jumps: list[tuple[int, str]] = []
    falls: list[bool] = [True]

    def begin() -> None:
        blocks.append([])
        falls.append(True)

    for text in statements:
        if match := _LABEL.match(text):
            begin()
            labels.setdefault(match[1], []).append(len(blocks) - 1)
            continue
        match = _INSTRUCTION.match(text)
        if match is None or text.startswith("."):
            continue
        predicate, opcode, operands = match.groups()
        blocks[-1].append(read_instruction(opcode, operands))
        if opcode.partition(".")[0] in ("bra", "ret", "exit", "brx", "trap"):
            if opcode.startswith("bra"):
                jumps.append((len(blocks) - 1, operands.strip()))
            falls[-1] = predicate is not None
            begin()
    successors: list[set[int]] = [{i + 1} if falls[i] and i + 1 < len(blocks) else set() for i in range(len(blocks))]
    for source, label in jumps:
        # Labels of inline assembly are local and may repeat: the nearest is meant.
        successors[source].add(min(labels[label], key=lambda target: abs(target - source)))
    return blocks, successors


def loops(successors: list[set[int]]) -> list[list[int]]:
    """Outermost loops of a flow graph: its strongly connected components that hold a cycle (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in range(len(successors)):
        if root in order:
            continue
        order[root] = low[root] = len(order)
        stack.append(root)
        work = [(root, iter(successors[root]))]
        while work:
            node, children = work[-1]
            child = next(children, None)
            if child is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    if len(component) > 1 or node in successors[node]:
                        found.append(component)
            elif child not in order:
                order[child] = low[child] = len(order)
                stack.append(child)
                work.append((child, iter(successors[child])))
            elif child in stack:
                low[node] = min(low[node], order[child])
    return found


def traffic(accesses: list[Access], kind: str) -> Counter[int]:
    """Width in bits -> bytes that a thread moves at that width, passing over the instructions once."""
    moved: Counter[int] = Counter()
    for what, bits in accesses:
        if what == kind and bits:
            moved[bits] += bits // 8
    return moved


def read_function(statements: list[str]) -> dict:
    """Widths, tensor-core instructions and atomics of one kernel's PTX."""
    blocks, successors = basic_blocks(statements)
    everything = [access for block in blocks for access in block]
    bodies = [[access for b in component for access in blocks[b]] for component in loops(successors)]
    main = max(bodies, key=lambda body: sum(traffic(body, "load").values()), default=[])
    in_loop = bool(traffic(main, "load"))
    load = traffic(main if in_loop else everything, "load")
    store = traffic(everything, "store")
    opcodes = [opcode for opcode, bits in everything if not bits]
    tensor = Counter(match[1] for opcode in opcodes if (match := _TENSOR.match(opcode)))
    return {
        "load_bits": max(load, key=lambda bits: (load[bits], bits), default=0),
        "store_bits": max(store, key=lambda bits: (store[bits], bits), default=0),
        "load_bytes_by_bits": {str(bits): load[bits] for bits in sorted(load)},
        "store_bytes_by_bits": {str(bits): store[bits] for bits in sorted(store)},
        "main_loop": in_loop,
        "narrow_load_share": round(sum(v for bits, v in load.items() if bits < 64) / max(sum(load.values()), 1), 3),
        "tensor_core": dict(sorted(tensor.items())),
        "atomics": sum(opcode.startswith(("atom.", "red.")) and ".shared" not in opcode for opcode in opcodes),
        "instructions": len(everything),
    }


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
    """Kernel name -> what the report says of it, but for what the launch adds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_usage(_output(cuobjdump(), "-res-usage", file.name), ptx)


def read_usage(usage: str, ptx: str) -> dict[str, dict]:
    """The same from what cuobjdump says of registers and memory."""
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


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Resident warps per multiprocessor / 64, bound by registers, shared memory and block slots."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256 a warp
    by_registers = (65536 // per_warp) // warps if per_warp else 32
    # Each block also holds 1 KB that the system reserves; allocation is by 128 bytes.
    by_shared = ARCHS[arch]["shared"] // (1024 + -(-shared // 128) * 128)
    return min(by_registers, by_shared, 32, 64 // warps) * warps / 64


# --------------------------------------------------------------------------------------------------
# Triton


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


@functools.cache
def _compile_instead_of_launching() -> list:
    """Make ``kernel[grid](...)`` compile and append (function, compiled kernel) to the list returned."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self, kernel))
        return kernel

    JITFunction.run = compile_only
    return compiled


def _import_kernels(folder: str, stem: str):
    if Path(folder) == ROOT / "kernels":
        return importlib.import_module(f"d2it.kernels.{stem}")
    sys.path.insert(0, folder)
    return importlib.import_module(stem)


def compile_triton(
    folder: str, stem: str, arch: str, slot: int, slots: int, chosen: frozenset[int] | None = None
) -> tuple[list[dict], list[str]]:
    """Rows for every slots-th compile case of one kernel file (of those chosen), and the kernels it declares."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = _compile_instead_of_launching()
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
            for function, kernel in compiled:
                metadata = kernel.metadata
                ((_, found),) = read(kernel.asm["cubin"], kernel.asm["ptx"]).items()
                threads = metadata.num_warps * 32
                row = {
                    "kernel": function.__name__,
                    "config": config,
                    "arch": arch,
                    "source": f"kernels/{stem}.py",
                    "case": i,
                    **found,
                    "threads": threads,
                    "num_stages": metadata.num_stages,
                }
                row["shared_bytes"] = max(metadata.shared, found["shared_bytes"])
                rows.append(row)
    declared = [
        function.__name__
        for function in vars(module).values()
        if isinstance(function, JITFunction)
        and function.__name__.endswith("_kernel")
        and function.__module__ == module.__name__
    ]
    return rows, declared


# --------------------------------------------------------------------------------------------------
# CUDA


@functools.cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def compile_cuda(source: str, arch: str) -> list[dict]:
    """Rows for every kernel of one .cu file."""
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as in setup.py
    flags += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-I{ROOT / 'csrc'}"]
    headers = sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc").glob("*.cuh"))
    key = hashlib.sha256(" ".join([arch, *flags, torch.__version__, _output(nvcc(), "--version")]).encode())
    for path in [Path(source), *headers]:
        key.update(path.read_bytes())
    kept = CACHE / f"{Path(source).stem}-{arch}-{key.hexdigest()[:16]}"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
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
            with contextlib.suppress(OSError):  # another process made the same
                kernels.rename(kept)
    found = read((kept / "cubin").read_bytes(), (kept / "ptx").read_text())
    return [_cuda_row(mangled, arch, numbers) for mangled, numbers in found.items()]


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


def _cuda_row(mangled: str, arch: str, found: dict) -> dict:
    name = _demangle(mangled).replace("(anonymous namespace)::", "")
    kernel, _, parameters = name.partition("<")
    kernel = kernel.partition("(")[0].rpartition(" ")[2].rpartition("::")[2]
    return {
        "kernel": kernel,
        "config": parameters.rpartition(">(")[0] or "-",
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
    return _output(demangler, name).strip() if demangler else name


# --------------------------------------------------------------------------------------------------
# The report


def problems(row: dict) -> list[str]:
    """What is wrong with a kernel, exceptions taken out."""
    found = []
    if row["spill_bytes"]:
        found.append(("spill", f"{row['spill_bytes']} bytes of stack"))
    if row["load_bits"] and (row["load_bits"] < 128 or row["narrow_load_share"] > NARROW_SHARE):
        share = f"{row['narrow_load_share']:.0%} of its bytes in loads of 32 bits or less"
        found.append(("narrow load", f"main loop loads {row['load_bits']} bits, {share}"))
    if row["shared_bytes"] > ARCHS[row["arch"]]["block_shared"] or row["occupancy"] == 0:
        found.append(("does not fit", f"{row['shared_bytes']} bytes of shared memory, {row['registers']} registers"))
    return [f"{kind}: {detail}" for kind, detail in found if not excused(row, kind)]


def excused(row: dict, kind: str) -> bool:
    for kernel, config, accepted, reason in EXCEPTIONS:
        names = fnmatch.fnmatch(row["kernel"], kernel) and fnmatch.fnmatch(row["config"], config)
        if names and kind == accepted:
            row.setdefault("accepted", []).append(f"{kind} in {kernel} [{config}]: {reason}")
            return True
    return False


def report(
    archs: list[str], heaviest: list[str], folder: Path, only: str, jobs: int, cuda: bool, library: Path | None
) -> tuple[list[dict], list[str]]:
    """All rows, and the kernels that no case compiles.

    heaviest: more architectures, for which only those cases are compiled in which a kernel of Triton takes most
    registers on the first of `archs`. CUDA kernels are in it for all.
    """
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem != "common")
    stems = [stem for stem in stems if fnmatch.fnmatch(stem, only)]
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cu")) if cuda and fnmatch.fnmatch(path.stem, only)]
    rows: list[dict] = []
    if library:
        names = {f"csrc/{path.name}" for path in sources}
        rows += [row for row in read_library(library, archs + heaviest) if row["source"] in names]
        sources = []
    if sources and nvcc() is None:
        print(f"skipped csrc/: no nvcc ({', '.join(path.name for path in sources)})")
        sources = []
    slots = 1 if jobs == 1 else 4
    declared: set[str] = set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        cuda_tasks = [pool.submit(compile_cuda, str(path), arch) for path in sources for arch in archs + heaviest]
        triton_tasks = [
            pool.submit(compile_triton, str(folder), stem, arch, slot, slots)
            for stem in stems
            for arch in archs
            for slot in range(slots)
        ]
        of_triton: list[dict] = []
        for task in triton_tasks:
            some, names = task.result()
            of_triton += some
            declared |= set(names)
        most: dict[str, dict] = {}
        for row in of_triton:
            if row["arch"] == archs[0] and row["registers"] > most.get(row["kernel"], {"registers": -1})["registers"]:
                most[row["kernel"]] = row
        triton_tasks = []
        for stem in stems:
            cases = frozenset(row["case"] for row in most.values() if row["source"] == f"kernels/{stem}.py")
            triton_tasks += [
                pool.submit(compile_triton, str(folder), stem, arch, 0, 1, cases) for arch in heaviest if cases
            ]
        for task in triton_tasks:
            of_triton += task.result()[0]
        rows += of_triton
        for task in cuda_tasks:
            rows += task.result()
    order = archs + heaviest
    seen: Counter[tuple] = Counter()
    for row in rows:
        row["occupancy"] = occupancy(row["arch"], row["registers"], row["threads"], row["shared_bytes"])
        row["problems"] = problems(row)
        key = (row["kernel"], row["config"], row["arch"])
        seen[key] += 1
        if seen[key] > 1:
            row["config"] += f" ({seen[key]})"
    rows.sort(key=lambda row: (row["source"], row["kernel"], row["config"], order.index(row["arch"])))
    for row in rows:
        row.pop("case", None)
    return rows, sorted(declared - {row["kernel"] for row in rows})


def table(rows: list[dict]) -> str:
    head = (
        "kernel",
        "config",
        "arch",
        "regs",
        "spill",
        "shared",
        "load",
        "store",
        "tensor core",
        "occupancy",
        "",
    )
    body = [
        (
            row["kernel"],
            row["config"],
            row["arch"],
            str(row["registers"]),
            str(row["spill_bytes"]),
            str(row["shared_bytes"]),
            f"{row['load_bits']}{' loop' if row['main_loop'] else ''}",
            str(row["store_bits"]),
            " ".join(f"{name} {count}" for name, count in row["tensor_core"].items()) or "-",
            f"{row['occupancy']:.0%}",
            "; ".join(row["problems"]),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(ARCHS), default=list(ARCHS))
    parser.add_argument(
        "--heaviest", nargs="+", choices=sorted(ARCHS), default=[], metavar="ARCH",
        help="also these, but of each Triton kernel only the case that takes most registers on the first --arch",
    )  # fmt: skip
    parser.add_argument("--library", type=Path, metavar="FILE", help="read csrc/'s kernels off this built library")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as a list of objects")
    parser.add_argument("--only", default="*", metavar="GLOB", help="kernel files by name, such as 'window_*'")
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", metavar="DIR", help="another folder")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args()

    # Interpreted kernels have no machine code; the workers import Triton after this.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth faster, the same code
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    home = args.kernels == ROOT / "kernels"
    rows, missing = report(
        args.arch, args.heaviest, args.kernels.resolve(), args.only, args.jobs, cuda=home, library=args.library
    )
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")

    accepted = {line for row in rows for line in row.get("accepted", ())}
    for line in sorted(accepted):
        print(f"accepted: {line}")
    if home and args.only == "*":
        for kernel, config, kind, reason in EXCEPTIONS:
            line = f"{kind} in {kernel} [{config}]: {reason}"
            if line not in accepted:
                print(f"not needed here: {line}")
    wrong = [f"{row['kernel']} [{row['config']}] {row['arch']}: {p}" for row in rows for p in row["problems"]]
    wrong += [f"{name}: no compile case launches it" for name in missing]
    for line in wrong:
        print(f"FAILED {line}")
    print(f"{len(rows)} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
