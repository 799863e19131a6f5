"""What the compiler made of every kernel: no GPU needed.

    python benchmarks/kernel_report.py --arch sm_80 sm_90 sm_100 sm_120 [--json FILE]
    python benchmarks/kernel_report.py --budget [--gpu H200] [--only 'window_attention n256*'] [--json FILE]
    python benchmarks/kernel_report.py --arch sm_90 --heaviest sm_80 sm_100 --library d2it/_C.abi3.so
    python benchmarks/kernel_report.py --arch sm_90 --heaviest sm_80 sm_100 --only 'pack*' --record

What stands unchanged in `record.jsonl` is not compiled again; `--record` after a change of a kernel renews its lines.

Exit status 1: a kernel spills, loads narrowly in its main loop, does not fit, or is compiled by no case, and is not
listed in `exceptions.py` with the reason why that is right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import itertools
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

from rows import columns, devices, load

from kernel_report.budget import MOST_FOR_TOKENS, excuse, over_tokens
from kernel_report.budget import table as table_of_budget
from kernel_report.compile import ROOT, compile_cuda, compile_triton, nvcc, read_library
from kernel_report.exceptions import BUDGET_EXCEPTIONS, EXCEPTIONS, TOKEN_EXCEPTIONS
from kernel_report.gpus import ARCHS, PRODUCTS, occupancy
from kernel_report.record import all_lines, out_of_date, renew

# Bytes in a main loop that may come through loads of 32 bits and less (row indices, per-row scalars).
NARROW_SHARE = 0.25

# Cases of the budget that one process counts in turn: many share a kernel, and each process disassembles its own.
TOGETHER = 12


def processes(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes to compile in, forked after the imports that all of them need."""
    import triton  # noqa: F401

    return concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))


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
    archs: list[str],
    heaviest: list[str],
    folder: Path,
    only: str,
    jobs: int,
    cuda: bool,
    library: Path | None,
    recall: bool,
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
    with processes(jobs) as pool:
        cuda_tasks = [pool.submit(compile_cuda, str(path), arch) for path in sources for arch in archs + heaviest]
        triton_tasks = [
            pool.submit(compile_triton, str(folder), stem, arch, slot, slots, recall)
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
                pool.submit(compile_triton, str(folder), stem, arch, 0, 1, recall, cases) for arch in heaviest if cases
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
    return columns([head, *body])


def report_budget(product: str, only: str, jobs: int, json_file: str | None, recall: bool, record: bool) -> int:
    """Counts every case of a goal, prints the table; 1 where one misses its budget and no exception excuses it."""
    from kernel_report.budget_cases import cases

    chosen = [i for i, case in enumerate(cases()) if fnmatch.fnmatch(case.name, only)]
    with processes(jobs) as pool:
        rows, of_cuda = [], []
        each = pool.map(budget_rows, chosen, itertools.repeat(product), itertools.repeat(recall), chunksize=TOGETHER)
        for found, counted in each:
            rows += found
            of_cuda += counted
    if record:
        renew(of_cuda)
    print(columns(list(table_of_budget(rows))))
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")
    excused = {
        row["case"]: found
        for row in rows
        if row["kernel"] == "all" and not row["ok"] and (found := excuse(row["case"]))
    }
    for case, (reason, lifted) in excused.items():
        print(f"excepted: {case}: {reason}; lifted by {lifted}")
    missed = [row["case"] for row in rows if row["kernel"] == "all" and not row["ok"] and row["case"] not in excused]
    for case in missed:
        print(f"FAILED {case}")
    slow = [(case, ratio) for case, ratio in over_tokens(rows) if ratio > MOST_FOR_TOKENS]
    for case, ratio in slow:
        text = f"{case}: {ratio:.2f} times its share of the time at fill 1"
        if found := excuse(case, TOKEN_EXCEPTIONS):
            print(f"excepted: {text}: {found[0]}; lifted by {found[1]}")
        else:
            missed.append(case)
            print(f"FAILED {text}")
    if nvcc() is None:
        print("skipped the cases of CUDA kernels: no nvcc")
    if only == "*":
        for exceptions, needed in ((BUDGET_EXCEPTIONS, set(excused)), (TOKEN_EXCEPTIONS, {case for case, _ in slow})):
            for pattern, *_ in exceptions:
                if not any(fnmatch.fnmatch(case, pattern) for case in needed):
                    print(f"not needed here: {pattern}")
    print(f"{len(chosen)} cases on {product}, {len(missed)} over their budget, {len(excused)} excepted")
    return 1 if missed else 0


def budget_rows(number: int, product: str, recall: bool) -> tuple[list[dict], list[dict]]:
    """The rows of one case of the budget, and what the record keeps of it."""
    from kernel_report.budget import count_case, cuda_digest, measured, verdicts
    from kernel_report.budget_cases import cases

    case, arch = cases()[number], PRODUCTS[product].arch
    counts = count_case(case, arch, recall)
    rows = verdicts(case, counts, PRODUCTS[product])
    for folder in devices():
        if product.lower() in folder.name and (ms := measured(case, load(folder))) is not None:
            rows[-1]["measured_ms"] = ms
    lines = [
        dataclasses.asdict(counted)
        | {"source": launch.source, "kernel": launch.kernel, "config": case.name, "arch": arch}
        | {"key": cuda_digest(launch, arch)}
        for launch, counted in zip(case.cuda, counts)
    ]
    return rows, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(ARCHS), default=list(ARCHS))
    parser.add_argument(
        "--heaviest", nargs="+", choices=sorted(ARCHS), default=[], metavar="ARCH",
        help="also these, but of each Triton kernel only the case that takes most registers on the first --arch",
    )  # fmt: skip
    parser.add_argument("--library", type=Path, metavar="FILE", help="read csrc/'s kernels off this built library")
    parser.add_argument("--no-cuda", action="store_true", help="leave csrc/'s kernels out")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as a list of objects")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="kernel files by name, such as 'window_*', or cases of --budget"
    )
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", metavar="DIR", help="another folder")
    parser.add_argument("--anew", action="store_true", help="compile also what the record has")
    parser.add_argument("--record", action="store_true", help="renew the record's lines of these Triton kernels")
    parser.add_argument("--budget", action="store_true", help="count bytes and instructions at the goals' shapes")
    parser.add_argument("--gpu", choices=sorted(PRODUCTS), default="H200", help="whose budget (%(default)s)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args()

    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth faster, the same code
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    if args.anew or args.record:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    if args.budget:
        return report_budget(args.gpu, args.only, args.jobs, args.json, not (args.anew or args.record), args.record)
    home = args.kernels == ROOT / "kernels"
    rows, missing = report(
        args.arch,
        args.heaviest,
        args.kernels.resolve(),
        args.only,
        args.jobs,
        home and not args.no_cuda,
        args.library,
        not args.anew,
    )
    if args.record:
        renew(rows)
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
    for kernel in out_of_date(rows, all_lines()):
        print(f"the record's line is of other code (--record renews it): {kernel}")
    wrong = [f"{row['kernel']} [{row['config']}] {row['arch']}: {p}" for row in rows for p in row["problems"]]
    wrong += [f"{name}: no compile case launches it" for name in missing]
    for line in wrong:
        print(f"FAILED {line}")
    print(f"{len(rows)} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
