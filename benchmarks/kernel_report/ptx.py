"""Reads PTX: the loops of a kernel, and the widths at which it loads and stores.

`load_bits` is the width of the instructions that load most bytes in the main loop: the loop (outermost, where loops
nest) that loads most, or the whole kernel where no loop loads. `store_bits` is the width that stores most bytes in
the whole kernel.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection

from kernel_report.flow import Graph, executions, natural_loops, outermost
from kernel_report.source import Frames

_ENTRY = re.compile(r"\.entry\s+(\w+)")
_LABEL = re.compile(r"^(\$?\w+):")
_INSTRUCTION = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfus](\d+)$")
_TENSOR = re.compile(r"^(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
# A shared, local, parameter or constant access names its space; one without may be global, and counts as such.
_NOT_GLOBAL = (".shared", ".local", ".param", ".const")

Instruction = tuple[str, str]
"""Opcode and operands."""
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
        body = re.sub(r"//.*", "", _braced(part))
        body = re.sub(r"^(\s*\.loc\b.*)$", r"\1;", body, flags=re.MULTILINE)
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


def basic_blocks(statements: list[str]) -> tuple[list[list[Instruction]], Graph]:
    """The instructions of each basic block, and each block's successors."""
    blocks: list[list[Instruction]] = [[]]
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
        blocks[-1].append((opcode, operands))
        if opcode.partition(".")[0] in ("bra", "ret", "exit", "brx", "trap"):
            if opcode.startswith("bra"):
                jumps.append((len(blocks) - 1, operands.strip()))
            falls[-1] = predicate is not None
            begin()
    successors: Graph = [{i + 1} if falls[i] and i + 1 < len(blocks) else set() for i in range(len(blocks))]
    for source, label in jumps:
        # Labels of inline assembly are local and may repeat: the nearest is meant.
        successors[source].add(min(labels[label], key=lambda target: abs(target - source)))
    return blocks, successors


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
    accesses = [[read_instruction(*instruction) for instruction in block] for block in blocks]
    everything = [access for block in accesses for access in block]
    bodies = [
        [access for block in sorted(loop.blocks) for access in accesses[block]]
        for loop in outermost(natural_loops(successors))
    ]
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


_REGISTER = re.compile(r"%(?!p)[a-z]+\d+")
_PARAMETER = re.compile(r"\w+_param_(\d+)(?:\s*\+\s*(\d+))?")
_WRITES_NO_REGISTER = ("st", "red", "bra", "bar", "ret", "exit", "trap", "membar", "fence", "prefetch", "barrier")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the threads of a block read from and write to the memory behind one pointer argument, in bytes a thread,
    with every lane active."""

    read: float = 0.0
    written: float = 0.0


Pointer = tuple[int, int]
"""A 64-bit parameter of a kernel: its number, and an offset where it lies in a structure."""


def loop_accesses(statements: list[str]) -> list[int]:
    """Instructions of each natural loop that read or write global memory."""
    blocks, graph = basic_blocks(statements)
    return [
        sum(read_instruction(*each)[1] > 0 for block in loop.blocks for each in blocks[block])
        for loop in natural_loops(graph)
    ]


def traffic_by_pointer(
    statements: list[str], trips: list[float], pointers: Collection[Pointer] | None = None
) -> dict[frozenset[Pointer], Traffic]:
    """What one thread moves, by the pointer, or the pointers among which it chooses, that its addresses come from.

    Args:
        statements: of the kernel, from `split_functions`.
        trips: of each natural loop, in their order, how often it runs each time it is entered.
        pointers: the parameters that are pointers; every 64-bit one where None.

    Raises:
        ValueError: An address that comes from none of them.
    """
    blocks, graph = basic_blocks(statements)
    times = executions(graph, natural_loops(graph), trips)
    counted = [(each, t) for block, t in zip(blocks, times) for each in block]
    return _traffic(counted, pointers)


def traffic_by_line(
    ptx: str, times: Callable[[Frames], float], pointers: Collection[Pointer]
) -> dict[frozenset[Pointer], Traffic]:
    """The same of one function's whole PTX, made with line information.

    Args:
        times: how often an instruction of these lines runs.
    """
    names = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx, flags=re.MULTILINE))
    ((_, statements),) = split_functions(ptx).items()
    frames: Frames = ()
    before: dict[tuple[str, ...], Frames] = {}
    counted = []
    for text in statements:
        if match := _LINE.match(text):
            *place, around = match.group(1, 2, 3, 4)
            outer = before.get(tuple(around.split())) if around else ()
            if place[1] != "0":  # what the compiler made of several lines stands by the last
                frames = ((names[place[0]], int(place[1])), *(outer or ()))
                before[tuple(place)] = frames
        elif (match := _INSTRUCTION.match(text)) and not text.startswith(".") and not _LABEL.match(text):
            counted.append(((match[2], match[3]), times(frames)))
    return _traffic(counted, pointers)


_LINE = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+\s+\d+\s+\d+))?")


def _traffic(
    counted: list[tuple[Instruction, float]], pointers: Collection[Pointer] | None
) -> dict[frozenset[Pointer], Traffic]:
    """Of instructions, each with how often it runs."""
    origins = _origins([instruction for instruction, _ in counted], pointers)
    moved: dict[frozenset[Pointer], Traffic] = {}
    for (opcode, operands), times in counted:
        kind, bits = read_instruction(opcode, operands)
        if not bits or not times:
            continue
        address = _address(opcode, operands)
        key = frozenset().union(*(origins.get(register, ()) for register in _REGISTER.findall(address)))
        if not key:
            raise ValueError(f"{opcode} {operands}: its address comes from no pointer among the parameters")
        before, size = moved.get(key, Traffic()), times * bits / 8
        read, written = (size, 0.0) if kind == "load" else (0.0, size)
        moved[key] = Traffic(before.read + read, before.written + written)
    return moved


def _address(opcode: str, operands: str) -> str:
    """The operand in brackets that is an address of global memory."""
    addresses = re.findall(r"\[([^\]]*)\]", operands)
    return addresses[1 if opcode.startswith("cp.async") and ".shared" in opcode.partition(".global")[0] else 0]


def _parameter(address: str, structures: dict[str, Pointer]) -> Pointer | None:
    """The parameter, and the place in it, that an address of parameters is: by its name, or by a register."""
    if match := _PARAMETER.search(address):
        return int(match[1]), int(match[2] or 0)
    base, _, offset = address.replace(" ", "").partition("+")
    number, start = structures.get(base, (-1, 0))
    return (number, start + int(offset or 0)) if number >= 0 else None


def _parameter_addresses(instructions: list[Instruction]) -> tuple[dict[str, Pointer], dict[str, int]]:
    """Register -> the parameter, and the place in it, whose address it holds: nvcc reads structures through such; and
    register -> the parameter, where the place depends on an index or on the turn of a loop."""
    found: dict[str, Pointer] = {}
    indexed: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for opcode, operands in instructions:
            if opcode not in _MAKES_ADDRESS:
                continue
            target, *sources = (part.strip() for part in operands.split(","))
            number = next((indexed[source] for source in sources if source in indexed), None)
            parameter = None
            if number is None:
                if opcode in ("mov.b64", "mov.u64", "cvta.param.u64"):
                    parameter = _parameter(sources[0], found)
                elif opcode in ("add.s64", "add.u64") and sources[-1].lstrip("-").isdigit():
                    parameter = _parameter("+".join(sources), found)
                else:
                    number = next((found[source][0] for source in sources if source in found), None)
            if parameter is not None and found.get(target, parameter) != parameter:
                number = parameter[0]  # two places
            if number is not None:
                changed |= indexed.setdefault(target, number) != number or found.pop(target, None) is not None
            elif parameter is not None and target not in indexed:
                changed |= target not in found
                found[target] = parameter
    return found, indexed


_MAKES_ADDRESS = (
    *("mov.b64", "mov.u64", "cvta.param.u64", "add.s64", "add.u64"),
    *("mad.wide.u32", "mad.wide.s32", "mad.lo.s64"),
)


def _shared_places(address: str, number: int, count: int) -> list[str]:
    """Names for the 8 bytes that come `number`-th of `count` at an address of shared memory: the place where they lie,
    and those that may be the same. That is an offset from the beginning; or, where each lane has its own, the first or
    the second of every two, of which an address without an offset may be either."""
    symbol, _, offset = address.replace(" ", "").partition("+")
    if not _REGISTER.match(symbol):
        return [f"[{int(offset or 0) + 8 * number}]"]
    if not int(offset or 0):
        return ["[lanes]", "[lanes 0]", "[lanes 8]"]
    return [f"[lanes {(int(offset) + 8 * number) % 16}]", "[lanes]"]


def _origins(instructions: list[Instruction], pointers: Collection[Pointer] | None) -> dict[str, set[Pointer]]:
    """Register -> the pointers that its value is made from. What is loaded from memory is made from none, but for
    addresses that threads hand to each other through shared memory: each may be any that is stored there."""
    origins: dict[str, set[Pointer]] = {}
    structures, indexed = _parameter_addresses(instructions)
    flows: list[tuple[list[str], list[str]]] = []
    for opcode, operands in instructions:
        name = opcode.partition(".")[0]
        if ".shared" in opcode and opcode.endswith(("b64", "u64")) and name in ("ld", "st"):
            before, _, rest = operands.partition("[")
            address, _, behind = rest.partition("]")
            registers = _REGISTER.findall(behind if name == "st" else before)
            for i, register in enumerate(registers):
                places = _shared_places(address, i, len(registers))
                flows.append((places[:1], [register]) if name == "st" else ([register], places))
        elif name == "ld":
            pointer = _parameter(operands.partition("[")[2].rstrip("]"), structures)
            named = pointer is not None and (pointers is None or pointer in pointers)
            if named and ".param" in opcode and opcode.endswith("64"):
                for register in _REGISTER.findall(operands.partition("[")[0]):
                    origins.setdefault(register, set()).add(pointer)
            elif ".param" in opcode and opcode.endswith("64"):
                number = indexed.get(re.split(r"[\[+\]]", operands)[1].strip())
                for register in _REGISTER.findall(operands.partition("[")[0]):
                    origins.setdefault(register, set()).update(p for p in pointers or () if p[0] == number)
        elif name not in _WRITES_NO_REGISTER:
            target, _, sources = operands.partition("}" if operands.startswith("{") else ",")
            flows.append((_REGISTER.findall(target), _REGISTER.findall(sources)))
    changed = True
    while changed:
        changed = False
        for targets, sources in flows:
            found = set().union(*(origins.get(source, set()) for source in sources))
            for target in targets:
                if not found <= origins.get(target, set()):
                    origins[target] = origins.get(target, set()) | found
                    changed = True
    return origins
