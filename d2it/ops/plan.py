"""`TokenPlan`: where every packed token comes from and goes to, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from d2it.ops import _check
from d2it.ops._register import judged_by

MOST_CELLS = 2**31 - 2**22  # of a plan, and most rows: int32 positions, rounded up to whole blocks


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every packed token comes from and goes to; every tensor is int32 on one device.

    Made by `plan_tokens` or `plan_from_mask`. One made by hand is checked at its first use. A plan is a pytree whose
    leaves are its tensors, and `torch.load(..., weights_only=True)` reads one.

    Rows follow the images in order, the windows row-major in the image, the cells row-major in the window.

    Attributes:
        index: (capacity,) the cell of each row, flat over B * Hf * Wf, or -1 past the count.
        inverse: (B * Hf * Wf,) the row of each cell, or -1.
        slots: (B * windows, w * w) the row of each position of each window, or -1.
        sample: (capacity,) the image of each row, never descending; B - 1 past the count.
        count: () rows in use.
        capacity: number of rows, a host integer.
        window: cells along a window's side.
        grid: (B, Hf, Wf).
    """

    index: Tensor
    inverse: Tensor
    slots: Tensor
    sample: Tensor
    count: Tensor
    capacity: int
    window: int
    grid: tuple[int, int, int]

    @property
    def batch(self) -> int:
        """B."""
        return self.grid[0]

    @property
    def cells_per_image(self) -> int:
        """Hf * Wf."""
        return self.grid[1] * self.grid[2]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenPlan:
        """Returns the same plan on another device."""
        tensors = (getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS)
        return TokenPlan(*tensors, *(getattr(self, name) for name in _NUMBERS))

    def __getstate__(self) -> dict[str, Any]:
        # Without the mark of `trusted`: what was written can have been changed.
        return {name: getattr(self, name) for name in (*_TENSORS, *_NUMBERS)}


_TENSORS = ("index", "inverse", "slots", "sample", "count")
_NUMBERS = ("capacity", "window", "grid")


def _flatten(plan: TokenPlan) -> tuple[list[Tensor], list[Any]]:
    return [getattr(plan, name) for name in _TENSORS], [plan.capacity, plan.window, tuple(plan.grid)]


def _unflatten(tensors: Iterable[Any], numbers: list[Any]) -> TokenPlan:
    return TokenPlan(*tensors, *numbers)


_pytree.register_pytree_node(
    TokenPlan,
    _flatten,
    _unflatten,
    serialized_type_name="d2it.ops.TokenPlan",
    to_dumpable_context=lambda numbers: [*numbers[:2], list(numbers[2])],
    from_dumpable_context=lambda numbers: [*numbers[:2], tuple(numbers[2])],
    flatten_with_keys_fn=lambda plan: (
        [(_pytree.GetAttrKey(name), tensor) for name, tensor in zip(_TENSORS, _flatten(plan)[0])],
        _flatten(plan)[1],
    ),
)
torch.serialization.add_safe_globals([TokenPlan])


def trusted(plan: TokenPlan) -> TokenPlan:
    """Marks a plan as right, so that its use does not check it again."""
    kinds = None
    if type(plan.index) is Tensor is type(plan.inverse):
        kinds = plan.capacity, plan.batch, plan.cells_per_image, plan.index.device
    object.__setattr__(plan, "_trusted", (_versions(plan), kinds))
    return plan


def _versions(plan: TokenPlan) -> tuple[int, int]:
    """Of the tensors that packing reads: a change in place counts them up."""
    index, inverse = plan.index, plan.inverse
    return (
        0 if index.is_inference() else index._version,
        0 if inverse.is_inference() else inverse._version,
    )


def is_trusted(plan: Any) -> bool:
    """Whether `plan` is a `TokenPlan` that was found right and whose tensors have not been written to since."""
    return (
        type(plan) is TokenPlan
        and not torch.compiler.is_compiling()
        and "_trusted" in plan.__dict__
        and plan.__dict__["_trusted"][0] == _versions(plan)
    )


def _kinds(plan: TokenPlan) -> tuple[Any, ...] | None:
    """All that a call is judged by of a plan, once it is trusted."""
    mark = plan.__dict__.get("_trusted")
    return mark[1] if mark is not None and mark[0] == _versions(plan) else None


judged_by(TokenPlan, _kinds)


def check_plan(plan: Any) -> None:
    """Raises unless `plan` is a `TokenPlan` whose parts fit each other, and whose rows and cells are those it has."""
    if not isinstance(plan, TokenPlan):
        raise TypeError(f"plan must be a TokenPlan, got {type(plan).__name__}")
    if is_trusted(plan):
        return
    _check.integer("plan.capacity", plan.capacity, low=0, high=MOST_CELLS)
    _check.integer("plan.window", plan.window, low=1)
    if not isinstance(plan.grid, (tuple, list)) or len(plan.grid) != 3:
        raise TypeError(f"plan.grid must be (B, Hf, Wf), got {_check.shown(plan.grid)}")
    for size in plan.grid:
        _check.integer("plan.grid", size, low=0, high=MOST_CELLS)
    cells, n = plan.batch * plan.cells_per_image, plan.window**2
    _check.require(
        plan.grid[1] % plan.window == 0 and plan.grid[2] % plan.window == 0,
        "plan.window",
        lambda: f"divide the grid of {plan.grid[1]} x {plan.grid[2]} cells",
        plan.window,
    )
    for name, shape in (
        ("index", (plan.capacity,)),
        ("inverse", (cells,)),
        ("slots", (cells // n, n)),
        ("sample", (plan.capacity,)),
        ("count", ()),
    ):
        tensor = getattr(plan, name)
        _check.tensor(f"plan.{name}", tensor, ndim=len(shape), dtypes=_INT32)
        _check.same("device", "plan.index", plan.index, f"plan.{name}", tensor)
        _check.require(
            tuple(tensor.shape) == shape,
            f"plan.{name}",
            partial("have shape {}".format, shape),
            tuple(tensor.shape),
        )
    if not torch.compiler.is_compiling():
        check_rows(plan)
        trusted(plan)


def check_rows(plan: TokenPlan) -> None:
    """Raises unless `index` and `inverse` stay inside of each other and are each other's inverse."""
    ways = (("index", plan.index, plan.inverse), ("inverse", plan.inverse, plan.index))
    for name, there, back in ways:
        check_range(there, back.shape[0], name)
    for name, there, back in ways:
        if there.shape[0] and back.shape[0]:
            start = torch.arange(there.shape[0], dtype=torch.int32, device=there.device)
            returned = back.index_select(0, there.clamp(0, back.shape[0] - 1))
            ok = ((there < 0) | (returned == start)).all()
            rule = f"plan.{name} must be the inverse of the other of plan.index and plan.inverse"
            _check.values(ok, rule, lambda: "one that is not")


def check_range(rows_of: Tensor, rows: int, name: str) -> None:
    """Raises unless every row that `rows_of`, the plan's `name`, contains is below `rows`."""
    if rows_of.shape[0]:
        most = rows_of.max()
        _check.values(most < rows, f"plan.{name} must contain values below {rows}", lambda: str(int(most)))


_INT32 = frozenset((torch.int32,))
