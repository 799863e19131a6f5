"""What the compiler made of every kernel, read off the machine code: no GPU needed.

    python benchmarks/kernel_report.py --arch sm_80 sm_90 sm_100 [--json FILE]

Triton kernels: the compile cases that each kernel file declares are run through the real launchers on meta
tensors, with launching replaced by compiling, so the alignment hints, constants and warps are the launcher's.
CUDA kernels: every file of csrc/ goes through nvcc. Both end as a cubin, which is disassembled.

Registers, stack and shared memory are ptxas's own (cuobjdump -res-usage). ``load_bits`` is the width of the
instructions that load most bytes in the main loop: the loop (outermost, where loops nest) that loads most, or
the whole kernel where no loop loads. ``store_bits`` is the width that stores most bytes in the whole kernel.

Exit status 1: a kernel spills, loads narrowly in its main loop, does not fit, or is compiled by no case, and
EXCEPTIONS does not say why that is right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import functools
import hashlib
import importlib
import json
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
# Reading machine code

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_SECTION = re.compile(r"^\.text\.([^\s:]+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_LOADS = ("LDG", "LD", "LDGSTS")
_STORES = ("STG", "ST")
# The copy engine moves whole rows: as wide as memory goes, whatever a thread issues.
_BULK_LOADS, _BULK_STORES = ("UTMALDG", "UBLKCP"), ("UTMASTG", "UBLKRED")
_TENSOR = re.compile(r"^(?:[HIDQO](?:G)?MMA|UTC\w*MMA)$")


def access_bits(opcode: str, modifiers: str) -> int:
    """Bits a thread moves by a global memory instruction of SASS, from its modifiers (none: 32)."""
    if opcode in _BULK_LOADS + _BULK_STORES:
        return 128
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    # ".E" (64-bit address) and cache hints may stand between; ENL2.256 is Blackwell's 32-byte access.
    widths = [sizes[part] for part in modifiers.split(".") if part in sizes]
    return max(widths, default=32)


def split_functions(sass: str) -> dict[str, list[str]]:
    """nvdisasm's text -> function name -> its lines."""
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if match := _SECTION.match(line):
            lines = functions.setdefault(match[1], [])
        elif line.startswith("\t.section"):
            lines = []
        else:
            lines.append(line)
    return functions


def basic_blocks(lines: list[str]) -> tuple[list[list[tuple[str, str]]], list[set[int]]]:
    """Instructions (opcode, modifiers) by basic block, and each block's successors."""
    blocks: list[list[tuple[str, str]]] = [[]]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls: list[bool] = [True]
    for line in lines:
        if match := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
                falls.append(True)
            labels[match[1]] = len(blocks) - 1
        elif match := _INSTRUCTION.match(line):
            predicate, opcode, modifiers, operands = match.groups()
            blocks[-1].append((opcode, modifiers))
            if opcode in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                if opcode in ("BRA", "JMP") and (target := _TARGET.search(operands)):
                    jumps.append((len(blocks) - 1, target[1]))
                # "BRA.U UP0, L" and "BRA.DIV" carry their condition as an operand.
                conditional = predicate not in (None, "PT") or (opcode == "BRA" and "," in operands)
                falls[-1] = conditional
                blocks.append([])
                falls.append(True)
    successors: list[set[int]] = [set() for _ in blocks]
    for i in range(len(blocks) - 1):
        if falls[i]:
            successors[i].add(i + 1)
    for source, label in jumps:
        if label in labels:
            successors[source].add(labels[label])
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


def memory_traffic(instructions: list[tuple[str, str]], opcodes: tuple[str, ...]) -> Counter[int]:
    """Width in bits -> bytes that one pass over the instructions moves at that width."""
    traffic: Counter[int] = Counter()
    for opcode, modifiers in instructions:
        if opcode in opcodes:
            bits = access_bits(opcode, modifiers)
            traffic[bits] += bits // 8
    return traffic


def read_function(lines: list[str]) -> dict:
    """Widths, tensor-core instructions, atomics and local memory of one kernel's SASS."""
    blocks, successors = basic_blocks(lines)
    everything = [instruction for block in blocks for instruction in block]
    loads, stores = _LOADS + _BULK_LOADS, _STORES + _BULK_STORES
    bodies = [[i for b in component for i in blocks[b]] for component in loops(successors)]
    main = max(bodies, key=lambda body: sum(memory_traffic(body, loads).values()), default=[])
    in_loop = bool(memory_traffic(main, loads))
    load = memory_traffic(main if in_loop else everything, loads)
    store = memory_traffic(everything, stores)
    opcodes = Counter(opcode for opcode, _ in everything)
    return {
        "load_bits": max(load, key=lambda bits: (load[bits], bits), default=0),
        "store_bits": max(store, key=lambda bits: (store[bits], bits), default=0),
        "load_bytes_by_bits": {str(bits): load[bits] for bits in sorted(load)},
        "store_bytes_by_bits": {str(bits): store[bits] for bits in sorted(store)},
        "main_loop": in_loop,
        "narrow_load_share": round(sum(v for bits, v in load.items() if bits < 64) / max(sum(load.values()), 1), 3),
        "tensor_core": {op: n for op, n in sorted(opcodes.items()) if _TENSOR.match(op)},
        "atomics": sum(n for op, n in opcodes.items() if op in ("ATOMG", "ATOM", "RED", "REDG")),
        "local_accesses": opcodes["LDL"] + opcodes["STL"],
        "instructions": len(everything),
    }


def tool(name: str) -> str:
    """A CUDA binary utility: Triton bundles cuobjdump and nvdisasm, else PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is neither bundled with triton nor on PATH")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes) -> dict[str, dict]:
    """What the report says of each kernel in a cubin, launch aside. Kept under build/ by content."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    kept = CACHE / f"{hashlib.sha256(cubin).hexdigest()[:24]}-{version}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tool("cuobjdump"), "-res-usage", str(path))
        elf = _output(tool("cuobjdump"), "-elf", str(path))
        functions = split_functions(_output(tool("nvdisasm"), "-c", str(path)))
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", usage):
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        # nv.info: EIATTR_MAX_THREADS is what __launch_bounds__ (or Triton's warps) fixed.
        info = elf.partition(f"\n.nv.info.{name}\n")[2].partition("\n\n")[0]
        bound = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+) (0x[0-9a-f]+) (0x[0-9a-f]+)", info
        )
        found[name] = {
            "registers": resources["REG"],
            "spill_bytes": resources["STACK"] + resources["LOCAL"],
            "shared_bytes": resources["SHARED"],
            "max_threads": int(bound[1], 16) * int(bound[2], 16) * int(bound[3], 16) if bound else 0,
            **read_function(functions[name]),
        }
    CACHE.mkdir(parents=True, exist_ok=True)
    partial_file = kept.with_suffix(f".{os.getpid()}")
    partial_file.write_text(json.dumps(found))
    partial_file.replace(kept)
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


def compile_triton(folder: str, stem: str, arch: str, slot: int, slots: int) -> tuple[list[dict], list[str]]:
    """Rows for every slots-th compile case of one kernel file, and the kernels that file declares."""
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
            if i % slots != slot:
                continue
            compiled.clear()
            call()
            if not compiled:
                raise SystemExit(f"{stem}: compile case {config} launched nothing")
            for function, kernel in compiled:
                metadata = kernel.metadata
                ((_, read),) = read_cubin(kernel.asm["cubin"]).items()
                threads = metadata.num_warps * 32
                row = {
                    "kernel": function.__name__,
                    "config": config,
                    "arch": arch,
                    "source": f"kernels/{stem}.py",
                    **read,
                    "threads": threads,
                    "num_stages": metadata.num_stages,
                }
                row["shared_bytes"] = max(metadata.shared, read["shared_bytes"])
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
    kept = CACHE / f"{Path(source).stem}-{arch}-{key.hexdigest()[:16]}.cubin"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial_file = kept.with_suffix(f".{os.getpid()}.cubin")
        made = subprocess.run(
            [nvcc(), "-cubin", f"-arch={arch}", *flags, "-o", str(partial_file), source],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise SystemExit(f"nvcc on {source}:\n{made.stderr}")
        partial_file.replace(kept)
    rows = []
    for mangled, read in read_cubin(kept.read_bytes()).items():
        name = _demangle(mangled)
        kernel, _, parameters = name.partition("<")
        rows.append(
            {
                "kernel": kernel.rpartition(" ")[2].rpartition("::")[2].partition("(")[0],
                "config": parameters.rpartition(">(")[0] or "-",
                "arch": arch,
                "source": f"csrc/{Path(source).name}",
                **read,
                "threads": read["max_threads"] or 1024,
                "num_stages": 0,
            }
        )
    return rows


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
            row["accepted"] = f"{kind} in {kernel} [{config}]: {reason}"
            return True
    return False


def report(archs: list[str], folder: Path, only: str, jobs: int, cuda: bool) -> tuple[list[dict], list[str]]:
    """All rows, and the kernels that no case compiles."""
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem != "common")
    sources = sorted((ROOT / "csrc").glob("*.cu")) if cuda else []
    if sources and nvcc() is None:
        print(f"skipped csrc/: no nvcc ({', '.join(path.name for path in sources)})")
        sources = []
    stems = [stem for stem in stems if fnmatch.fnmatch(stem, only)]
    sources = [path for path in sources if fnmatch.fnmatch(path.stem, only)]
    slots = 1 if jobs == 1 else 4
    rows: list[dict] = []
    declared: set[str] = set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        cuda_tasks = [pool.submit(compile_cuda, str(path), arch) for path in sources for arch in archs]
        triton_tasks = [
            pool.submit(compile_triton, str(folder), stem, arch, slot, slots)
            for stem in stems
            for arch in archs
            for slot in range(slots)
        ]
        for task in triton_tasks:
            some, names = task.result()
            rows += some
            declared |= set(names)
        for task in cuda_tasks:
            rows += task.result()
    seen: Counter[tuple] = Counter()
    for row in rows:
        row["occupancy"] = occupancy(row["arch"], row["registers"], row["threads"], row["shared_bytes"])
        row["problems"] = problems(row)
        key = (row["kernel"], row["config"], row["arch"])
        seen[key] += 1
        if seen[key] > 1:
            row["config"] += f" ({seen[key]})"
    rows.sort(key=lambda row: (row["source"], row["kernel"], row["config"], archs.index(row["arch"])))
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
    parser.add_argument("--json", metavar="FILE", help="write the rows there as a list of objects")
    parser.add_argument("--only", default="*", metavar="GLOB", help="kernel files by name, such as 'window_*'")
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", metavar="DIR", help="another folder")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args()

    # Interpreted kernels have no machine code; the workers import Triton after this.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    home = args.kernels == ROOT / "kernels"
    rows, missing = report(args.arch, args.kernels.resolve(), args.only, args.jobs, cuda=home)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")

    for line in sorted({row["accepted"] for row in rows if "accepted" in row}):
        print(f"accepted: {line}")
    wrong = [f"{row['kernel']} [{row['config']}] {row['arch']}: {p}" for row in rows for p in row["problems"]]
    wrong += [f"{name}: no compile case launches it" for name in missing]
    for line in wrong:
        print(f"FAILED {line}")
    print(f"{len(rows)} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
