"""How often the instructions of a CUDA kernel run, by the lines of its source that they come from.

The compiler writes the line of every instruction, and the lines of the calls that were inlined around it, into the
machine code and the PTX. A count states how often a statement of the source runs each time the code around it does:
the trips of a loop, the share of the times that a branch is taken. An instruction runs as often as the product of
what is stated of the statements that it lies in; each copy that the compiler makes of a line counts as written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

Frame = tuple[str, int]
"""Name of a file and a line in it."""
Frames = tuple[Frame, ...]
"""A line, the line of the call that was inlined there, the line of the call around that, ..."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """A loop, a branch or a simple statement of a source: its lines, the last one included."""

    file: str
    first: int
    last: int
    loop: bool

    def holds(self, frames: Frames) -> bool:
        """Whether one of the lines lies in it."""
        return any(file == self.file and self.first <= line <= self.last for file, line in frames)

    def begins(self, frames: Frames) -> bool:
        """Whether one of the lines is its first."""
        return (self.file, self.first) in frames


def read_source(path: Path) -> dict[str, str]:
    """The text of a source and of the headers beside it that it includes, by file name; comments are blank."""
    found: dict[str, str] = {}

    def add(name: str) -> None:
        file = path.parent / name
        if name in found or not file.exists():
            return
        text = file.read_text()
        found[name] = re.sub(r"//.*", "", text)
        for included in re.findall(r'^#include "(\S+)"$', text, flags=re.MULTILINE):
            add(included)

    add(path.name)
    return found


def find_statement(files: Mapping[str, str], text: str) -> Statement:
    """The statement that begins with `text`, in which any white space stands for any other: up to the brace that
    closes its block, or to its semicolon.

    Raises:
        ValueError: `text` does not stand in the files once.
    """
    pattern = r"\s+".join(re.escape(word) for word in text.split())
    places = [(name, match) for name, whole in files.items() for match in re.finditer(pattern, whole)]
    if len(places) != 1:
        raise ValueError(f"{text!r} stands {len(places)} times in {', '.join(files)}")
    ((name, match),) = places
    whole = files[name]
    start = match.start() + (match[0][0] == "}")  # of an else, which follows the end of another block
    first, end = whole.count("\n", 0, match.start()) + 1, _end(whole, start)
    last = whole.count("\n", 0, end) + 1
    # What follows a closing brace on its line, an `else`, is another statement.
    return Statement(name, first, max(first, last - 1) if whole[end] == "}" else last, "for (" in match[0])


def _end(text: str, start: int) -> int:
    """Where the statement ends that begins at `start`, perhaps inside of its parentheses."""
    parentheses = braces = 0
    for at in range(start, len(text)):
        parentheses += {"(": 1, ")": -1}.get(text[at], 0)
        if parentheses > 0:
            continue
        braces += {"{": 1, "}": -1}.get(text[at], 0)
        if (text[at] == ";" and not braces) or (text[at] == "}" and not braces):
            return at
    raise ValueError(f"{text[start : start + 40]!r} does not end")


class Runs:
    """How often what comes from a source's lines runs.

    Args:
        files: from `read_source`.
        stated: the beginning of a statement -> how often it runs each time the code around it does. "outer => inner":
            so often the inner statement runs where it comes from inlining into the outer one.
    """

    def __init__(self, files: Mapping[str, str], stated: Mapping[str, float]) -> None:
        self._stated = {
            tuple(find_statement(files, part) for part in text.split(" => ")): times for text, times in stated.items()
        }

    def of(self, frames: Frames, before: Collection[Statement] = ()) -> float:
        """How often an instruction of these lines runs.

        Args:
            before: loops that it does not lie in, though their lines say so.
        """
        product = 1.0
        for statements, times in self._stated.items():
            if all(statement.holds(frames) and statement not in before for statement in statements):
                product *= times
        return product

    def loops(self) -> set[Statement]:
        """The loops of which the trips are stated."""
        return {part for parts in self._stated for part in parts if part.loop}

    def names_loop(self, frames: Frames) -> bool:
        """Whether one of the lines begins a loop of which the trips are stated."""
        return any(part.loop and part.begins(frames) for parts in self._stated for part in parts)
