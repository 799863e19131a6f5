"""The rows of the tokens that exist, laid out from the grain map (paper 3.2.3, Eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    code_sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> TokenPlan:
    """Lays out the cells of every region with grain >= `min_grain` as rows, without a host synchronisation.

    With `code_sizes` these are the first cells of the regions' latent codes, one a code.

    Args:
        grain_map: (B, h, w) int64, no value below 0; at most 2^31 - 2^22 cells.
        cells_per_region: cells along a region's side; the cell grid is (h, w) times it.
        window: cells along a window's side; divides both sides of the cell grid.
        min_grain: the coarsest grain that gets tokens.
        capacity: rows to lay out; None is B * Hf * Wf, always enough. A smaller one comes from the host, which has
            the maps.
        code_sizes: cells along a latent code's side by grain, coarsest first, such as (4, 2, 1): descending divisors
            of `cells_per_region`, one for every grain of the map. None lays out every cell.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        A `TokenPlan`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a window that does not divide the grid, a grain below 0 or
            without a code size, or more tokens than `capacity` (the last two on a GPU as device-side assertions,
            raised at the next synchronisation).

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
    sizes = [] if code_sizes is None else _checked_sizes(code_sizes, cells_per_region)
    name = choose("plan_tokens", backend, grain_map)
    if name == "reference":
        check_tokens(grain_map, cells_per_region, min_grain, rows, sizes)
        plan = reference.plan_tokens(
            grain_map,
            cells_per_region=cells_per_region,
            window=window,
            min_grain=min_grain,
            capacity=rows,
            code_sizes=sizes,
        )
    else:
        index, inverse, slots, sample, count = _call_plan_tokens(
            grain_map, cells_per_region, window, min_grain, rows, sizes, name
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


def _checked_sizes(code_sizes: Sequence[int], cells_per_region: int) -> list[int]:
    """The sizes as a list; raises unless they are descending divisors of `cells_per_region`."""
    if not isinstance(code_sizes, (list, tuple)):
        raise TypeError(f"code_sizes must be a tuple of ints or None, got {type(code_sizes).__name__}")
    for size in code_sizes:
        _check.integer("code_sizes", size, low=1)
    descending = list(code_sizes) == sorted(set(code_sizes), reverse=True)
    _check.require(
        len(code_sizes) > 0 and descending and not any(cells_per_region % size for size in code_sizes),
        "code_sizes",
        lambda: f"be descending divisors of the {cells_per_region} cells of a region's side",
        tuple(code_sizes),
    )
    return list(code_sizes)


def check_tokens(
    grain_map: Tensor, cells_per_region: int, min_grain: int, capacity: int, code_sizes: Sequence[int] = ()
) -> None:
    """Raises unless every grain is one and the tokens fit `capacity`."""
    _check.values((grain_map >= 0).all(), "grain_map must have no value below 0", lambda: str(int(grain_map.min())))
    if code_sizes:
        most = len(code_sizes) - 1
        fits = (grain_map <= most).all()
        _check.values(fits, f"grain_map must have no value above {most}", lambda: str(int(grain_map.max())))
        codes = [(cells_per_region // size) ** 2 if g >= min_grain else 0 for g, size in enumerate(code_sizes)]
        count = torch.stack([(grain_map == grain).sum() * n for grain, n in enumerate(codes)]).sum()
    else:
        count = (grain_map >= min_grain).sum() * cells_per_region**2
    _check.values(
        count <= capacity, "capacity must hold the tokens of the plan", lambda: f"{capacity} for {int(count)}"
    )


def _plan_fake(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int, *rest: Any
) -> tuple[Tensor, ...]:
    batch, h, w = grain_map.shape
    cells = batch * h * w * cells_per_region**2

    n = window * window
    shapes = ((capacity,), (cells,), (cells // n, n), (capacity,), ())
    return tuple(grain_map.new_empty(shape, dtype=torch.int32) for shape in shapes)


_call_plan_tokens = operator(
    "plan_tokens(Tensor grain_map, SymInt cells_per_region, SymInt window, SymInt min_grain, SymInt capacity, "
    "SymInt[] code_sizes, str backend) -> (Tensor index, Tensor inverse, Tensor slots, Tensor sample, Tensor count)",
    fake=_plan_fake,
    check=lambda grains, cells, window, *rest: check_tokens(grains, cells, *rest),
)


def _native_plan(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int, code_sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    plan = _plan_fake(grain_map, cells_per_region, window, min_grain, capacity)
    if not torch.ops.d2it_C.plan_tokens(grain_map, cells_per_region, window, min_grain, code_sizes, *plan):
        check_tokens(grain_map, cells_per_region, min_grain, capacity, code_sizes)  # raises what C++ only reports
    return plan


_BOOL = frozenset((torch.bool,))
register_backend("plan_from_mask", "reference")
register_backend("plan_tokens", "reference")
register_backend("plan_tokens", "triton")
register_backend("plan_tokens", "cpu", native="plan_tokens")
implement("plan_tokens", "cpu", _native_plan, checks_values=True)
implement("plan_tokens", "triton", "d2it.kernels.plan_tokens:plan_tokens_forward")
