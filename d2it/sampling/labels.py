"""Classes by number or by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from d2it.diffusion.solvers import whole_number

Label = int | str


def class_number(label: Label, names: Sequence[str], classes: int) -> int:
    """Returns the number of a class.

    Args:
        label: its number, its name, or its number as text.
        names: of all classes; empty where they have none.
        classes: how many there are, 0 for an unconditional model.

    Raises:
        ValueError: no such class, where the message lists similar names; a name of several; an unconditional model.

    Example:
        >>> class_number("dog", ["cat", "dog"], 2)
        1
    """
    if not classes:
        raise ValueError("labels: this model is unconditional")
    if label in names:
        if names.count(str(label)) > 1:  # ImageNet has two cranes and two maillots
            numbers = ", ".join(str(i) for i, name in enumerate(names) if name == label)
            raise ValueError(f"labels: {label!r} is the name of the classes {numbers}: give the number")
        return names.index(str(label))
    if not isinstance(label, str):
        return whole_number("labels", label, 0, classes - 1)
    if re.fullmatch(r"-?\d{1,18}", label):
        return whole_number("labels", int(label), 0, classes - 1)
    if not names:
        raise ValueError(f"labels: this model has no class names, only numbers 0 ... {classes - 1}, got {label!r}")
    near = difflib.get_close_matches(label, names, n=3) or names[:8]
    more = ", ..." if classes > len(near) else ""
    raise ValueError(f"labels: no class {label!r}; there are {', '.join(near)}{more}")
