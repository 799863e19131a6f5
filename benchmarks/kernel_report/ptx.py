"""Reads PTX: the loops of a kernel, and the widths at which it loads and stores.

``load_bits`` is the width of the instructions that load most bytes in the main loop: the loop (outermost, where loops
nest) that loads most, or the whole kernel where no loop loads. ``store_bits`` is the width that stores most bytes in
the whole kernel.
"""

from __future__ import annotations

import re
from collections import Counter

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
