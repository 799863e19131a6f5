"""Reads SASS, the machine code: its blocks, its loops, and what they issue.

Left out is what runs only when something is wrong or rare: blocks that call (a failed assertion, a division of
subnormals), and the paths of a warp whose lanes have come apart at a collective instruction.
"""

from __future__ import annotations

import dataclasses
import re

from kernel_report.flow import Graph, Loop, executions, natural_loops, reachable
from kernel_report.source import Frames, Runs, Statement

_FUNCTION = re.compile(r"^\s*Function : (\S+)\n", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"(?:^|,\s*)0x([0-9a-f]+)\s*$")
_GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "ATOMG", "UBLKCP")
# Bytes of shared memory that a warp moves: of the data of 32 lanes, or of matrices of 8 x 8 elements of 16 bits.
_MATRICES = re.compile(r"\.(\d)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: where it lies, the predicate that guards it or "", its opcode with modifiers, its operands."""

    address: int
    guard: str
    opcode: str
    operands: str
    frames: Frames = ()
    """The lines of the source that it comes from, where the listing has them."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code as a flow graph."""

    blocks: list[list[Instruction]]
    graph: Graph
    loops: list[Loop]

    def accesses(self) -> list[int]:
        """Instructions of each loop that read or write global memory."""
        return [
            sum(each.opcode.partition(".")[0] in _GLOBAL for block in loop.blocks for each in self.blocks[block])
            for loop in self.loops
        ]

    def issued(self, trips: list[float]) -> tuple[float, float]:
        """Instructions that a warp issues and bytes of shared memory that it moves, from entry to exit.

        Args:
            trips: of each loop of `loops`, how often it runs each time it is entered.
        """
        instructions = shared = 0.0
        for block, times in zip(self.blocks, executions(self.graph, self.loops, trips)):
            if not any(each.opcode.startswith("CALL") for each in block):
                instructions += times * len(block)
                shared += times * sum(shared_bytes(each.opcode) for each in block)
        return instructions, shared

    def issued_by_line(self, runs: Runs) -> tuple[float, float]:
        """The same, each instruction as often as its line runs; what the compiler does before a loop, such as to clear
        its sums, has the line at which the loop begins and runs once.

        Raises:
            ValueError: A loop of the machine code begins at no line whose trips are stated.
        """
        for loop in self.loops:
            inner = set().union(*(other.blocks for other in self.loops if other.blocks < loop.blocks))
            own = [each for block in loop.blocks - inner for each in self.blocks[block]]
            if not any(runs.names_loop(each.frames) or not runs.of(each.frames) for each in own):
                raise ValueError(f"the loop of {own[0].frames} has no trips")
        instructions = shared = 0.0
        live = reachable(self.graph)
        inside = {loop: self._inside(loop) for loop in runs.loops()}
        for i, block in enumerate(self.blocks):
            if i in live and not any(each.opcode.startswith("CALL") for each in block):
                outside = [loop for loop, blocks in inside.items() if blocks and i not in blocks]
                for each in block:
                    times = runs.of(each.frames, [loop for loop in outside if loop.begins(each.frames)])
                    instructions += times
                    shared += times * shared_bytes(each.opcode)
        return instructions, shared

    def _inside(self, statement: Statement) -> frozenset[int]:
        """The blocks of the loops that a statement became: those which its lines jump back in. None where it was
        unrolled."""
        return frozenset().union(
            *(
                loop.blocks
                for loop in self.loops
                for block in loop.blocks
                if loop.header in self.graph[block] and statement.holds(self.blocks[block][-1].frames)
            )
        )


def shared_bytes(opcode: str) -> int:
    """Bytes of shared memory that a warp moves by one instruction."""
    name = opcode.partition(".")[0]
    if name in ("LDSM", "STSM"):
        match = _MATRICES.search(opcode)
        return 128 * int(match[1] if match else 1)
    if name in ("LDS", "STS", "LDGSTS", "ATOMS"):
        widths = [int(part) for part in opcode.split(".") if part in ("64", "128")]
        narrow = [int(part[1:]) for part in opcode.split(".") if part in ("U8", "S8", "U16", "S16")]
        return 32 * ([*widths, *narrow, 32][0] // 8)
    return 0


def read_sass(listing: str) -> dict[str, Code]:
    """The functions of a listing of `cuobjdump -sass`, by name."""
    parts = _FUNCTION.split(listing)
    return {name: read_code(body) for name, body in zip(parts[1::2], parts[2::2])}


_FRAME = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L_x_\d+):")


def read_lines(listing: str) -> Code:
    """The flow graph of one function, from a listing of `nvdisasm -gi`, each instruction with its lines."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    frames: list[tuple[str, int]] = []
    complete = True
    instructions = []
    for line in listing.splitlines():
        if match := _FRAME.match(line):
            frames = [] if complete else frames
            complete = False
            frames.append((match[1].rpartition("/")[2], int(match[2])))
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _INSTRUCTION.match(line):
            complete = True
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            instructions.append(Instruction(address, match[2] or "", match[3], match[4].strip(), tuple(frames)))
    return _code(
        [
            dataclasses.replace(
                each, operands=re.sub(r"`\((\.L_x_\d+)\)", lambda m: f"{labels[m[1]]:#x}", each.operands)
            )
            for each in instructions
        ]
    )


def read_code(body: str) -> Code:
    """The flow graph of one function's listing."""
    instructions = [
        Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip())
        for match in _INSTRUCTION.finditer(body)
    ]
    return _code(instructions)


def _code(instructions: list[Instruction]) -> Code:
    targets = {each.address: _target(each) for each in instructions}
    starts = {target for target in targets.values() if target is not None}
    blocks: list[list[Instruction]] = [[]]
    for each in instructions:
        if each.address in starts and blocks[-1]:
            blocks.append([])
        blocks[-1].append(each)
        if _ends(each) or targets[each.address] is not None:
            blocks.append([])
    blocks = [block for block in blocks if block]
    at = {block[0].address: i for i, block in enumerate(blocks)}
    graph: Graph = []
    for i, block in enumerate(blocks):
        last = block[-1]
        successors = {i + 1} if i + 1 < len(blocks) and not _never_falls_through(last) else set()
        target = targets[last.address]
        if target is not None and not last.opcode.startswith("BRA.DIV"):
            successors.add(at[target])
        graph.append(successors)
    return Code(blocks, graph, natural_loops(graph))


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode.partition(".")[0] in ("EXIT", "RET", "BSYNC", "BPT")


def _never_falls_through(instruction: Instruction) -> bool:
    name = instruction.opcode.partition(".")[0]
    if name == "BRA":  # one with a predicate among its operands may fall through
        return not instruction.guard and instruction.operands.startswith(("0x", "`"))
    return name in ("EXIT", "RET") and not instruction.guard


def _target(instruction: Instruction) -> int | None:
    name = instruction.opcode.partition(".")[0]
    if name in ("BRX", "JMX", "BRXU", "JMXU"):
        raise ValueError(f"{instruction.opcode} at {instruction.address:#x}: where it goes is not in the listing")
    match = _TARGET.search(instruction.operands) if name == "BRA" else None
    return int(match[1], 16) if match else None
