"""The budget of every kernel at the shapes of its goal, counted from the machine code: no GPU needed.

Counted are the bytes between the GPU's memory and its multiprocessors, the instructions that are issued, and the
bytes of shared memory. A block of instructions runs as often as the loops around it: the loops are found in the
code, how often each runs is stated in `budget_cases`, and a kernel whose code has another number of loops is an
error. Every access counts with all of its lanes and at the full width. Of a tensor that a launch reads more often
than once, only its size is counted, since what is read again is found in the L2 cache; `l2_bytes` counts it each time.

An operator meets its budget where the bytes take no longer than the goal, and the instructions too, at
`PLENTY_IPC` instructions a cycle and multiprocessor, or `FEW_IPC` where fewer than `FEW_WARPS` warps are resident.
Where a case is counted at several shares of the tokens, its time is to follow them, to `MOST_FOR_TOKENS`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator
from typing import Any

from bench import Cost
from rows import Result, fastest

from kernel_report.compile import (
    ROOT,
    AheadOfTimeDriver,
    Launch,
    compile_instead_of_launching,
    cuda_key,
    disassemble,
    find_cuda,
    read_launch,
)
from kernel_report.exceptions import BUDGET_EXCEPTIONS
from kernel_report.gpus import ARCHS, Product, occupancy
from kernel_report.ptx import Pointer, loop_accesses, split_functions, traffic_by_line, traffic_by_pointer
from kernel_report.record import modules, recorded, shorten
from kernel_report.sass import Code, read_lines, read_sass
from kernel_report.source import Runs, read_source

PLENTY_IPC, FEW_IPC, FEW_WARPS = 2.5, 1.5, 12

Trips = Callable[[Launch], "list[float] | float"]
"""How often each loop of a launch's PTX runs, in the order of the code, each time it is entered, on average;
one number is that of every loop, however many the compiler leaves."""


@dataclasses.dataclass(frozen=True)
class CudaLaunch:
    """A launch of a kernel of csrc/, as its host code makes it."""

    source: str
    """Name of the .cu file."""
    kernel: str
    """With its template arguments: "k<float, 16>"."""
    blocks: int
    threads: int
    """Of a block."""
    shared_bytes: int
    """Of a block, asked for at the launch."""
    runs: dict[str, float]
    """The beginning of a statement of the source -> how often it runs each time the code around it does: the trips of
    each loop that the compiler leaves, the share of the times that a branch is taken; 1 where nothing is stated."""
    tensors: dict[Pointer, int]
    """The bytes behind each pointer among the parameters."""
    lanes: dict[str, float] = dataclasses.field(default_factory=dict)
    """The beginning of a statement -> the share of a warp's lanes that its accesses to global memory are of."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator, in one direction, at the shape of a goal."""

    operator: str
    case: str
    """The name of the case in the operator's benchmark."""
    direction: str
    floor: Cost
    call: Callable[[], object] | None
    """Runs the launchers of Triton kernels on meta tensors; None for a case of CUDA kernels."""
    trips: dict[str, Trips]
    """By kernel; a kernel without loops needs none."""
    cuda: tuple[CudaLaunch, ...] = ()
    """The launches of a case of CUDA kernels."""
    share: float | None = None
    """Share of the floor that is the goal; or the goal is a time:"""
    ms: float | None = None
    unused: tuple[str, ...] = ()
    """"kernel.argument" of tensors that the kernel touches only for inputs which the case does not have."""

    @property
    def name(self) -> str:
        """How the case is listed and excepted."""
        return f"{self.operator} {self.case} {self.direction}{' CUDA' if self.cuda else ''}"

    def floor_ms(self, product: Product) -> float:
        """The larger of bytes over copy bandwidth and operations over matrix product rate."""
        return max(self.floor.bytes / product.tbps / 1e9, self.floor.flops / product.tflops / 1e9)

    def goal_ms(self, product: Product) -> float:
        """The time that the goal allows."""
        return self.ms if self.ms is not None else self.floor_ms(product) / (self.share or 1.0)


@dataclasses.dataclass(frozen=True)
class Count:
    """What one launch costs."""

    kernel: str
    bytes: float
    l2_bytes: float
    instructions: float
    """Issued by all warps."""
    shared_bytes: float
    warps: float
    """Resident on a multiprocessor."""

    @property
    def ipc_limit(self) -> float:
        """Instructions a cycle that a multiprocessor may be expected to issue of it."""
        return PLENTY_IPC if self.warps >= FEW_WARPS else FEW_IPC


def count(launch: Launch, trips: Trips | None, arch: str, unused: tuple[str, ...] = ()) -> Count:
    """Counts one launch.

    Raises:
        ValueError: The machine code has other loops than trips are stated for.
    """
    ((_, code),) = read_sass(disassemble(launch.kernel.asm["cubin"])).items()
    ((_, statements),) = split_functions(launch.kernel.asm["ptx"]).items()
    sizes = loop_accesses(statements)
    stated = trips(launch) if trips else []
    if isinstance(stated, float):
        stated = [stated] * len(sizes)
    if len(stated) != len(sizes):
        raise ValueError(f"{launch.name} has {len(sizes)} loops, but trips are stated for {len(stated)}")
    issued, shared = code.issued(unrolled(launch.name, stated, sizes, code))
    tensors = launch.tensors()
    moved = everything = 0.0
    for pointers, traffic in traffic_by_pointer(statements, stated, {(i, 0) for i in tensors}).items():
        named = [tensors[i] for i, _ in pointers]
        if any(f"{launch.name}.{name}" in unused for name, _ in named):
            continue
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
        read, written = (each * launch.threads * launch.programs for each in (traffic.read, traffic.written))
        moved += min(read, size) + min(written, size)
        everything += read + written
    found = read_launch(launch)
    per_block, sms = launch.threads / 32, ARCHS[arch]["sms"]
    resident = 64 * occupancy(arch, found["registers"], launch.threads, found["shared_bytes"])
    warps = min(resident, per_block * launch.programs / sms)
    all_warps = per_block * launch.programs
    return Count(launch.name, moved, everything, issued * all_warps, shared * all_warps, warps)


def cuda_digest(launch: CudaLaunch, arch: str) -> str:
    """The key in the record of what `count_cuda` counts."""
    readers = modules("budget", "compile", "flow", "gpus", "ptx", "sass", "source")
    return shorten(cuda_key(str(ROOT / "csrc" / launch.source), arch), repr(launch), readers)


def count_cuda(launch: CudaLaunch, arch: str) -> Count:
    """Counts one launch of a CUDA kernel.

    Raises:
        ValueError: What is stated of the source is not in it, or nothing is stated of a loop.
    """
    path = ROOT / "csrc" / launch.source
    row, sass, ptx = find_cuda(str(path), arch, launch.kernel)
    files = read_source(path)
    runs, lanes = Runs(files, launch.runs), Runs(files, launch.lanes)
    issued, shared = read_lines(sass).issued_by_line(runs)
    moved = everything = 0.0
    by_pointer = traffic_by_line(ptx, lambda frames: runs.of(frames) * lanes.of(frames), launch.tensors)
    for pointers, traffic in by_pointer.items():
        size = sum(launch.tensors[pointer] for pointer in pointers)
        read, written = (each * launch.threads * launch.blocks for each in (traffic.read, traffic.written))
        moved += min(read, size) + min(written, size)
        everything += read + written
    per_block, sms = launch.threads / 32, ARCHS[arch]["sms"]
    # The compiler's figure has the kilobyte in it that the system reserves, which `occupancy` adds.
    static = max(row["shared_bytes"] - 1024, 0)
    resident = 64 * occupancy(arch, row["registers"], launch.threads, static + launch.shared_bytes)
    all_warps = per_block * launch.blocks
    warps = min(resident, all_warps / sms)
    return Count(row["kernel"], moved, everything, issued * all_warps, shared * all_warps, warps)


def unrolled(kernel: str, trips: list[float], sizes: list[int], code: Code) -> list[float]:
    """How often the loops of the machine code run, given the trips of those in PTX and the accesses to global memory
    in each. The assembler may unroll a loop: a loop of several copies, and a loop behind it for the rest."""
    found: list[float] = []
    behind = list(code.accesses())
    for trip, size in zip(trips, sizes):
        copies = behind[0] // size if behind and size else 1
        if len(behind) > 1 and copies > 1 and behind[:2] == [copies * size, size]:
            whole, rest = divmod(trip, copies) if trip == int(trip) else (trip / copies, 0.0)
            found += [whole, rest]
            del behind[:2]
        else:
            found.append(trip)
            del behind[:1]
    if len(found) != len(code.loops):
        raise ValueError(f"{kernel}: {len(code.loops)} loops of machine code do not match the {len(trips)} of its PTX")
    return found


def count_case(case: Case, arch: str, recall: bool = True) -> list[Count]:
    """Counts every launch of a case; recall: of CUDA kernels, what has a line in `record` is not compiled."""
    from triton.runtime import driver

    from d2it.kernels.common import compile_target

    if case.call is None:
        keys = [cuda_digest(launch, arch) for launch in case.cuda]
        return [
            Count(launch.kernel.partition("<")[0], **recorded()[key])
            if recall and key in recorded()
            else count_cuda(launch, arch)
            for key, launch in zip(keys, case.cuda)
        ]
    launches = compile_instead_of_launching()
    launches.clear()
    driver.set_active(AheadOfTimeDriver(ARCHS[arch]["capability"]))
    with compile_target(ARCHS[arch]["capability"], ARCHS[arch]["sms"]):
        case.call()
    return [count(launch, case.trips.get(launch.name), arch, case.unused) for launch in launches]


def verdicts(case: Case, counts: list[Count], product: Product) -> list[dict[str, Any]]:
    """Rows of the report: one for each launch, then one for the operator, whose kernel is "all"."""
    goal = case.goal_ms(product)
    slots = product.issue_slots(goal)
    shared = {"case": case.name, "arch": product.arch}
    shared |= {"floor_bytes": case.floor.bytes, "goal_ms": goal}

    def row(kernel: str, some: list[Count]) -> dict[str, Any]:
        size = sum(each.bytes for each in some)
        memory_ms = size / product.tbps / 1e9
        # The goal's share that the instructions take at the rate that each launch may be expected to reach.
        issue = sum(each.instructions / each.ipc_limit for each in some) / slots
        return {
            "kernel": kernel,
            **shared,
            "bytes": round(size),
            "l2_bytes": round(sum(each.l2_bytes for each in some)),
            "shared_bytes": round(sum(each.shared_bytes for each in some)),
            "instructions": round(sum(each.instructions for each in some)),
            "ipc_needed": sum(each.instructions for each in some) / slots,
            "ipc_limit": sum(each.instructions for each in some) / max(issue * slots, 1e-9),
            "warps": min(each.warps for each in some),
            "predicted_ms": max(memory_ms, issue * goal),
            "floor_ms": case.floor_ms(product),
            "ok": memory_ms <= goal and issue <= 1,
        }

    return [row(each.kernel, [each]) for each in counts] + [row("all", counts)]


def excuse(case: str, exceptions: list[tuple[str, str, str]] = BUDGET_EXCEPTIONS) -> tuple[str, str] | None:
    """Why an operator may miss its budget, and what would lift that; None where nothing excuses it."""
    for pattern, reason, lifted in exceptions:
        if fnmatch.fnmatch(case, pattern):
            return reason, lifted
    return None


MOST_FOR_TOKENS = 1.15
"""How much longer a share of a window's tokens may take than that share of the time of all."""


def over_tokens(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """The cases at a share of the tokens, "... fill0.5 ...", and the predicted time over that share of the time at
    "fill1"."""
    times = {row["case"]: row["predicted_ms"] for row in rows if row["kernel"] == "all"}
    for case, ms in times.items():
        match = re.search(r"-fill(0\.\d+)-", case)
        if match and (whole := times.get(case.replace(match[0], "-fill1-"))):
            yield case, ms / (float(match[1]) * whole)


def measured(case: Case, results: dict[str, Result]) -> float | None:
    """Milliseconds of our fastest right row of the case, where a result file has one."""
    if case.operator not in results:
        return None
    row = fastest(results[case.operator]["rows"], case.case, case.direction, own=True)
    return row["ms"] if row else None


def table(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The lines that are printed."""
    yield ("case", "kernel", "MB", "of floor", "L2 MB", "shared GB", "M instr.", "IPC needed", "may be", "warps",
           "floor ms", "goal ms", "predicted", "measured", "")  # fmt: skip
    for row in rows:
        whole = row["kernel"] == "all"
        verdict = ("ok" if row["ok"] else "excepted" if excuse(row["case"]) else "FAILED") if whole else ""
        times = [f"{row[key]:.4f}" if whole else "" for key in ("floor_ms", "goal_ms")]
        seen = row.get("measured_ms")
        yield (
            row["case"] if whole else "", row["kernel"], f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes'] / row['floor_bytes']:.2f}", f"{row['l2_bytes'] / 1e6:.0f}",
            f"{row['shared_bytes'] / 1e9:.2f}", f"{row['instructions'] / 1e6:.1f}", f"{row['ipc_needed']:.2f}",
            f"{row['ipc_limit']:.2f}", f"{row['warps']:.0f}", *times, f"{row['predicted_ms']:.4f}",
            f"{seen:.4f}" if seen is not None else "", verdict,
        )  # fmt: skip
