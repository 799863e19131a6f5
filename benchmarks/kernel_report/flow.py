"""Loops of a flow graph, whatever language its blocks are written in."""

from __future__ import annotations

import dataclasses

Graph = list[set[int]]
"""The successors of every block; block 0 is the entry."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks from which its header is reached again, and the header, which dominates them."""

    header: int
    blocks: frozenset[int]


def reachable(graph: Graph) -> set[int]:
    """The blocks that can be reached from the entry."""
    seen: set[int] = set()
    stack = [0]
    while stack:
        block = stack.pop()
        if block not in seen:
            seen.add(block)
            stack.extend(graph[block])
    return seen


def natural_loops(graph: Graph) -> list[Loop]:
    """Every natural loop in the order of the headers; loops with the same header are one."""
    live = reachable(graph)
    predecessors: list[list[int]] = [[] for _ in graph]
    for block in live:
        for successor in graph[block]:
            predecessors[successor].append(block)
    everything = sum(1 << block for block in live)
    dominators = dict.fromkeys(live, everything)  # bit i: block i dominates
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in sorted(live - {0}):
            common = everything
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True
    bodies: dict[int, set[int]] = {}
    for latch in live:
        for header in graph[latch]:
            if dominators[latch] >> header & 1:
                body = bodies.setdefault(header, {header})
                stack = [latch]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack.extend(predecessors[block])
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def outermost(loops: list[Loop]) -> list[Loop]:
    """The loops that lie in no other."""
    return [loop for loop in loops if not any(loop.blocks < other.blocks for other in loops)]


def executions(graph: Graph, loops: list[Loop], trips: list[float]) -> list[float]:
    """How often each block runs where every branch out of a loop is the loop's end and every other one is taken:
    the product of the trips, counted for each entry, of the loops around it; 0 where it cannot be reached."""
    live = reachable(graph)
    times = [1.0 if block in live else 0.0 for block in range(len(graph))]
    for loop, trip in zip(loops, trips, strict=True):
        for block in loop.blocks:
            times[block] *= trip
    return times
