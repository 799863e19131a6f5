"""The tokens that exist, packed: planning by the grain map, packing, and merging back (paper 3.2.3, Eqs. 7 and 9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator

MOST_CELLS = 2**31 - 2**22  # of a plan, and most rows: int32 positions, rounded up to whole blocks


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every packed token comes from and goes to. Made by `plan_tokens`; every tensor is int32 on one device.

    Rows follow the images in order, the windows row-major in the image, the cells row-major in the window.

    Attributes:
        index: (capacity,) the cell of each row, flat over B * Hf * Wf, or -1 past the count.
        inverse: (B * Hf * Wf,) the row of each cell, or -1.
        slots: (B * windows, w * w) the row of each position of each window, or -1.
        sample: (capacity,) the image of each row, never descending; B - 1 past the count.
        count: () rows in use.
        capacity: rows there are, a host integer.
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
        """The same plan on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


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
        backend: "reference", "triton", or None to choose.

    Returns:
        A `TokenPlan`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a window that does not divide the grid, a grain below 0,
            or more tokens than `capacity` (the last two on a GPU as device-side assertions, raised at the next
            synchronisation).
    """
    _check.tensor("grain_map", grain_map, ndim=3, floating=False)
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
        f"divide the grid of {height} x {width} cells",
        window,
    )
    cells = batch * height * width
    _check.require(cells <= MOST_CELLS, "grain_map", f"have at most {MOST_CELLS} cells", cells)
    rows = cells if capacity is None else capacity
    _check.integer("capacity", rows, low=0, high=MOST_CELLS)
    name = choose("plan_tokens", backend, grain_map)
    if name == "reference":
        check_plan(grain_map, cells_per_region, min_grain, rows)
        return reference.plan_tokens(
            grain_map, cells_per_region=cells_per_region, window=window, min_grain=min_grain, capacity=rows
        )
    index, inverse, slots, sample, count = _call_plan_tokens(grain_map, cells_per_region, window, min_grain, rows, name)
    return TokenPlan(index, inverse, slots, sample, count, rows, window, (batch, height, width))


def check_plan(grain_map: Tensor, cells_per_region: int, min_grain: int, capacity: int) -> None:
    """Raises unless no grain is below 0 and the tokens fit `capacity`."""
    count = (grain_map >= min_grain).sum() * cells_per_region**2
    _check.values((grain_map >= 0).all(), "grain_map must have no value below 0", lambda: str(int(grain_map.min())))
    _check.values(
        count <= capacity, "capacity must hold the tokens of the plan", lambda: f"{capacity} for {int(count)}"
    )


def pack_tokens(x: Tensor, plan: TokenPlan, *, backend: str | None = None) -> Tensor:
    """Gathers the cells of a plan into rows (the router of paper Eq. 7).

    Args:
        x: (B, Hf*Wf, C) floating point, any strides.
        plan: of the same grid.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        (capacity, C); rows past the count are zero. The gradient is `unpack_tokens` of the cotangent.

    Raises:
        TypeError, ValueError: `x` does not fit the plan.
    """
    _check.tensor("x", x, ndim=3, floating=True)
    _plan(plan)
    _check.same("device", "plan", plan.index, "x", x)
    _check.require(
        x.shape[:2] == (plan.batch, plan.cells_per_image),
        "x",
        lambda: f"have the plan's {plan.batch} images of {plan.cells_per_image} cells",
        tuple(x.shape),
    )
    name = choose("pack_tokens", backend, x, plan)
    if name == "reference":
        return reference.pack_tokens(x, plan)
    return _call_pack_tokens(x, plan.index, plan.inverse, name)


def unpack_tokens(packed: Tensor, plan: TokenPlan, base: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Puts packed rows back into their cells, over `base` (the merge of paper Eq. 9) or zero.

    Args:
        packed: (capacity, C) floating point, any strides.
        plan: of the wanted grid.
        base: (B, Hf*Wf, C) of the same dtype, or None.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        (B, Hf*Wf, C): the packed row where there is a token, `base` (or 0) elsewhere.

    Raises:
        TypeError, ValueError: `packed` or `base` does not fit the plan.
    """
    _check.tensor("packed", packed, ndim=2, floating=True)
    _plan(plan)
    _check.same("device", "plan", plan.index, "packed", packed)
    _check.require(
        packed.shape[0] == plan.capacity,
        "packed",
        lambda: f"have the plan's {plan.capacity} rows",
        tuple(packed.shape),
    )
    if base is not None:
        shape = (plan.batch, plan.cells_per_image, packed.shape[1])
        _check.tensor("base", base, ndim=3, floating=True)
        _check.same("dtype", "packed", packed, "base", base)
        _check.same("device", "packed", packed, "base", base)
        _check.require(tuple(base.shape) == shape, "base", lambda: f"have shape {shape}", tuple(base.shape))
    name = choose("unpack_tokens", backend, packed, plan, base)
    if name == "reference":
        return reference.unpack_tokens(packed, plan, base)
    return _call_unpack_tokens(packed, base, plan.index, plan.inverse, plan.batch, plan.cells_per_image, name)


def _plan(plan: Any) -> None:
    if not isinstance(plan, TokenPlan):
        raise TypeError(f"plan must be a TokenPlan, got {type(plan).__name__}")


def _plan_fake(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int, backend: str
) -> tuple[Tensor, ...]:
    batch, h, w = grain_map.shape
    cells = batch * h * w * cells_per_region**2

    def empty(*shape: int) -> Tensor:
        return grain_map.new_empty(shape, dtype=torch.int32)

    n = window * window
    return empty(capacity), empty(cells), empty(cells // n, n), empty(capacity), empty()


def _pack_fake(x: Tensor, index: Tensor, inverse: Tensor, backend: str) -> Tensor:
    return x.new_empty((index.shape[0], x.shape[2]))


def _pack_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, index, inverse, backend = inputs
    ctx.save_for_backward(index, inverse)
    ctx.batch, ctx.cells, ctx.backend = x.shape[0], x.shape[1], backend


def _pack_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    index, inverse = ctx.saved_tensors
    grad_x = _call_unpack_tokens(grad, None, index, inverse, ctx.batch, ctx.cells, ctx.backend)
    return grad_x, None, None, None


def _unpack_fake(
    packed: Tensor, base: Tensor | None, index: Tensor, inverse: Tensor, batch: int, cells: int, backend: str
) -> Tensor:
    return packed.new_empty((batch, cells, packed.shape[1]))


def _unpack_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, base, index, inverse, _, _, backend = inputs
    ctx.save_for_backward(index, inverse)
    ctx.base_needs = base is not None and base.requires_grad
    ctx.backend = backend


def _unpack_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    index, inverse = ctx.saved_tensors
    grad_packed, grad_base = _call_unpack_tokens_backward(grad, index, inverse, ctx.base_needs, ctx.backend)
    return grad_packed, grad_base if ctx.base_needs else None, None, None, None, None, None


def _unpack_backward_fake(
    grad: Tensor, index: Tensor, inverse: Tensor, base_needs: bool, backend: str
) -> tuple[Tensor, Tensor]:
    grad_base = grad.new_empty(grad.shape if base_needs else (0,))
    return grad.new_empty((index.shape[0], grad.shape[2])), grad_base


_call_plan_tokens = operator(
    "plan_tokens(Tensor grain_map, int cells_per_region, int window, int min_grain, SymInt capacity, str backend) -> "
    "(Tensor index, Tensor inverse, Tensor slots, Tensor sample, Tensor count)",
    fake=_plan_fake,
    check=lambda grains, cells, window, min_grain, capacity: check_plan(grains, cells, min_grain, capacity),
)
_call_pack_tokens = operator(
    "pack_tokens(Tensor x, Tensor index, Tensor inverse, str backend) -> Tensor",
    fake=_pack_fake,
    setup=_pack_setup,
    backward=_pack_backward,
)
_call_unpack_tokens = operator(
    "unpack_tokens(Tensor packed, Tensor? base, Tensor index, Tensor inverse, SymInt batch, "
    "SymInt cells, str backend) -> Tensor",
    fake=_unpack_fake,
    setup=_unpack_setup,
    backward=_unpack_backward,
)
_call_unpack_tokens_backward = operator(
    "unpack_tokens_backward(Tensor grad, Tensor index, Tensor inverse, bool base_needs, str backend) -> "
    "(Tensor grad_packed, Tensor grad_base)",
    fake=_unpack_backward_fake,
)


def _native_plan(
    grain_map: Tensor, cells_per_region: int, window: int, min_grain: int, capacity: int
) -> tuple[Tensor, ...]:
    plan = _plan_fake(grain_map, cells_per_region, window, min_grain, capacity, "")
    if not torch.ops.d2it_C.plan_tokens(grain_map, cells_per_region, window, min_grain, *plan):
        check_plan(grain_map, cells_per_region, min_grain, capacity)  # raises: the operator only says that it must
    return plan


def _native_pack(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    packed = _pack_fake(x, index, inverse, "")
    torch.ops.d2it_C.gather_rows(index, x, None, packed)
    return packed


def _native_unpack(
    packed: Tensor, base: Tensor | None, index: Tensor, inverse: Tensor, batch: int, cells: int
) -> Tensor:
    out = _unpack_fake(packed, base, index, inverse, batch, cells, "")
    torch.ops.d2it_C.gather_rows(inverse, packed, base, out)
    return out


def _native_unpack_backward(grad: Tensor, index: Tensor, inverse: Tensor, base_needs: bool) -> tuple[Tensor, Tensor]:
    grad_packed, grad_base = _unpack_backward_fake(grad, index, inverse, base_needs, "")
    torch.ops.d2it_C.gather_rows(index, grad, None, grad_packed)
    if base_needs:
        torch.ops.d2it_C.gather_rows(inverse, None, grad, grad_base)
    return grad_packed, grad_base


for _op in ("plan_tokens", "pack_tokens", "unpack_tokens"):
    register_backend(_op, "reference")
    register_backend(_op, "triton")
    register_backend(_op, "cpu", native="plan_tokens" if _op == "plan_tokens" else "gather_rows")
implement("plan_tokens", "cpu", _native_plan, checks_values=True)
implement("pack_tokens", "cpu", _native_pack)
implement("unpack_tokens", "cpu", _native_unpack)
implement("unpack_tokens_backward", "cpu", _native_unpack_backward)
implement("plan_tokens", "triton", "d2it.kernels.plan_tokens:plan_tokens_forward")
implement("pack_tokens", "triton", "d2it.kernels.pack_tokens:pack_tokens_forward")
implement("unpack_tokens", "triton", "d2it.kernels.pack_tokens:unpack_tokens_forward")
implement("unpack_tokens_backward", "triton", "d2it.kernels.pack_tokens:unpack_tokens_backward")
