"""The rows of the tokens that exist, laid out from the grain map (paper 3.2.3, Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator
from d2it.ops.plan import MOST_CELLS, TokenPlan, trusted


def plan_tokens(
    grain_map: Tensor,
    *,
    cells_per_region: int = 2,
    window: int = 4,
    min_grain: int = 1,
    capacity: int | None = None,
    backend: str | None = None,
) -> TokenPlan:
    """Lays out the cells of every region with grain >= `min_grain` as rows, without a host synchronisation.

    Args:
        grain_map: (B, h, w) int64, no value below 0; at most 2^31 - 2^22 cells.
        cells_per_region: cells along a region's side; the cell grid is (h, w) times it.
        window: cells along a window's side; divides both sides of the cell grid.
        min_grain: the coarsest grain that gets tokens.
        capacity: rows to lay out; None is B * Hf * Wf, always enough. A smaller one comes from the host, which knows
            the maps.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        A `TokenPlan`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a window that does not divide the grid, a grain below 0,
            or more tokens than `capacity` (the last two on a GPU as device-side assertions, raised at the next
            synchronisation).

    Example:
        >>> plan = ops.plan_tokens(torch.tensor([[[0, 1]]]), cells_per_region=2, window=2, capacity=6)
        >>> plan.slots  # the second window has all its tokens
        tensor([[-1, -1, -1, -1],
                [ 0,  1,  2,  3]], dtype=torch.int32)
        >>> plan.index  # and these are its cells
        tensor([ 2,  3,  6,  7, -1, -1], dtype=torch.int32)
    """
    _check.tensor("grain_map", grain_map, ndim=3, dtypes=_check.INTEGERS)
    if grain_map.dtype != torch.int64:
        raise TypeError(f"grain_map must be int64, got {grain_map.dtype}")
    _check.integer("cells_per_region", cells_per_region, low=1)
    _check.integer("window", window, low=1)
    _check.integer("min_grain", min_grain, low=0)
    batch, h, w = grain_map.shape
    height, width = h * cells_per_region, w * cells_per_region
    _check.require(
        height % window == 0 and width % window == 0,
        "window",
        lambda: f"divide the grid of {height} x {width} cells",
        window,
    )
    cells = batch * height * width
    _check.require(cells <= MOST_CELLS, "grain_map", f"have at most {MOST_CELLS} cells", cells)
    rows = cells if capacity is None else capacity
    _check.integer("capacity", rows, low=0, high=MOST_CELLS)
    name = choose("plan_tokens", backend, grain_map)
    if name == "reference":
        check_tokens(grain_map, cells_per_region, min_grain, rows)
        plan = reference.plan_tokens(
            grain_map, cells_per_region=cells_per_region, window=window, min_grain=min_grain, capacity=rows
        )
    else:
        index, inverse, slots, sample, count = _call_plan_tokens(
            grain_map, cells_per_region, window, min_grain, rows, name
        )
        plan = TokenPlan(index, inverse, slots, sample, count, rows, window, (batch, height, width))
    return plan if torch.compiler.is_compiling() else trusted(plan)


def plan_from_mask(mask: Tensor, *, window: int, capacity: int | None = None) -> TokenPlan:
    """Lays out any cells as rows, as `plan_tokens` lays out those of the fine regions.

    Args:
        mask: (B, Hf, Wf) bool, True where a cell has a token; at most 2^31 - 2^22 cells.
        window: cells along a window's side; divides Hf and Wf.
        capacity: rows to lay out, as for `plan_tokens`.

    Returns:
        A `TokenPlan`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a window that does not divide the grid, or more tokens than `capacity` (on a GPU the latter is a
            device-side assertion, raised at the next synchronisation).

    Example:
        >>> mask = torch.tensor([[[True, False], [True, True]]])
        >>> ops.plan_from_mask(mask, window=2).slots
        tensor([[ 0, -1,  1,  2]], dtype=torch.int32)
    """
    _check.tensor("mask", mask, ndim=3, dtypes=_BOOL)
    _check.require(mask.numel() <= MOST_CELLS, "mask", f"have at most {MOST_CELLS} cells", mask.numel())
    return plan_tokens(mask.to(torch.int64), cells_per_region=1, window=window, capacity=capacity)


def check_tokens(grain_map: Tensor, cells_per_region: int, min_grain: int, capacity: int) -> None:
    """Raises unless no grain is below 0 and the tokens fit `capacity`."""
    count = (grain_map >= min_grain).sum() * cells_per_region**2
    _check.values((grain_map >= 0).all(), "grain_map must have no value below 0", lambda: str(int(grain_map.min())))
    _check.values(
        count <= capacity, "capacity must hold the tokens of the plan", lambda: f"{capacity} for {int(count)}"
    )


def _plan_fake(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int, backend: str
) -> tuple[Tensor, ...]:
    batch, h, w = grain_map.shape
    cells = batch * h * w * cells_per_region**2

    def empty(*shape: int) -> Tensor:
        return grain_map.new_empty(shape, dtype=torch.int32)

    n = window * window
    return empty(capacity), empty(cells), empty(cells // n, n), empty(capacity), empty()


_call_plan_tokens = operator(
    "plan_tokens(Tensor grain_map, SymInt cells_per_region, SymInt window, SymInt min_grain, SymInt capacity, "
    "str backend) -> (Tensor index, Tensor inverse, Tensor slots, Tensor sample, Tensor count)",
    fake=_plan_fake,
    check=lambda grains, cells, window, min_grain, capacity: check_tokens(grains, cells, min_grain, capacity),
)


def _native_plan(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int
) -> tuple[Tensor, ...]:
    plan = _plan_fake(grain_map, cells_per_region, window, min_grain, capacity, "")
    if not torch.ops.d2it_C.plan_tokens(grain_map, cells_per_region, window, min_grain, *plan):
        check_tokens(grain_map, cells_per_region, min_grain, capacity)  # raises: C++ only reports that it must
    return plan


_BOOL = frozenset((torch.bool,))
register_backend("plan_from_mask", "reference")
register_backend("plan_tokens", "reference")
register_backend("plan_tokens", "triton")
register_backend("plan_tokens", "cpu", native="plan_tokens")
implement("plan_tokens", "cpu", _native_plan, checks_values=True)
implement("plan_tokens", "triton", "d2it.kernels.plan_tokens:plan_tokens_forward")
