"""The tokens that exist gathered into rows, and merged back into the grid (paper 3.2.3, Eqs. 7 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import direct, implement, known, operator, remember
from d2it.ops.plan import TokenPlan, check_plan, check_range


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

    Example:
        >>> plan = ops.plan_tokens(torch.tensor([[[0, 1]]]), cells_per_region=2, window=2, capacity=4)
        >>> ops.pack_tokens(torch.arange(8.0).reshape(1, 8, 1), plan).flatten()
        tensor([2., 3., 6., 7.])
    """
    if (run := known("pack_tokens", backend, (x, plan))) is not None:
        return run(x, plan.index, plan.inverse)
    _check.tensor("x", x, ndim=3, dtypes=_check.FLOATS)
    check_plan(plan)
    _check.same("device", "plan", plan.index, "x", x)
    _check.require(
        x.shape[:2] == (plan.batch, plan.cells_per_image),
        "x",
        lambda: f"have the plan's {plan.batch} images of {plan.cells_per_image} cells",
        tuple(x.shape),
    )
    name = choose("pack_tokens", backend, x, plan)
    remember("pack_tokens", backend, (x, plan), name)
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

    Example:
        >>> plan = ops.plan_tokens(torch.tensor([[[0, 1]]]), cells_per_region=2, window=2, capacity=4)
        >>> ops.unpack_tokens(torch.arange(1.0, 5.0).reshape(4, 1), plan).flatten()
        tensor([0., 0., 1., 2., 0., 0., 3., 4.])
    """
    if (run := known("unpack_tokens", backend, (packed, base, plan))) is not None:
        return run(packed, base, plan.index, plan.inverse, plan.batch, plan.cells_per_image)
    _check.tensor("packed", packed, ndim=2, dtypes=_check.FLOATS)
    check_plan(plan)
    _check.same("device", "plan", plan.index, "packed", packed)
    _check.require(
        packed.shape[0] == plan.capacity,
        "packed",
        lambda: f"have the plan's {plan.capacity} rows",
        tuple(packed.shape),
    )
    if base is not None:
        shape = (plan.batch, plan.cells_per_image, packed.shape[1])
        _check.tensor("base", base, ndim=3, dtypes=_check.FLOATS)
        _check.same("dtype", "packed", packed, "base", base)
        _check.same("device", "packed", packed, "base", base)
        _check.require(tuple(base.shape) == shape, "base", lambda: f"have shape {shape}", tuple(base.shape))
    name = choose("unpack_tokens", backend, packed, plan, base)
    remember("unpack_tokens", backend, (packed, base, plan), name)
    if name == "reference":
        return reference.unpack_tokens(packed, plan, base)
    return _call_unpack_tokens(packed, base, plan.index, plan.inverse, plan.batch, plan.cells_per_image, name)


def _pack_fake(x: Tensor, index: Tensor, inverse: Tensor, backend: str) -> Tensor:
    return x.new_empty((index.shape[0], x.shape[2]))


def _pack_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, index, inverse, ctx.backend = inputs
    ctx.save_for_backward(index, inverse)
    ctx.batch, ctx.cells, _ = x.shape


def _pack_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    return _unpack(grad, grad, None, ctx.saved_tensors, ctx), None, None, None


def _unpack_fake(
    packed: Tensor | None, base: Any, index: Tensor, inverse: Tensor, batch: int, cells: int, backend: str
) -> Tensor:
    like = base if packed is None else packed
    return like.new_empty((batch, cells, like.shape[-1]))


def _unpack_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, _, index, inverse, ctx.batch, ctx.cells, ctx.backend = inputs
    ctx.save_for_backward(index, inverse)


def _unpack_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    grad_packed = grad_base = None
    plan = ctx.saved_tensors  # once: recomputation gives them out no second time
    if ctx.needs[0]:
        run = direct("pack_tokens", ctx.backend, grad)
        grad_packed = run(grad, *plan) if run else _call_pack_tokens(grad, *plan, ctx.backend)
    if ctx.needs[1]:
        grad_base = _unpack(grad, None, grad, plan, ctx)
    return grad_packed, grad_base, None, None, None, None, None


def _unpack(grad: Tensor, packed: Tensor | None, base: Tensor | None, plan: Sequence[Tensor], ctx: Any) -> Tensor:
    args = (packed, base, *plan, ctx.batch, ctx.cells)
    run = direct("unpack_tokens", ctx.backend, grad)
    return run(*args) if run else _call_unpack_tokens(*args, ctx.backend)


_call_pack_tokens = operator(
    "pack_tokens(Tensor x, Tensor index, Tensor inverse, str backend) -> Tensor",
    fake=_pack_fake,
    setup=_pack_setup,
    backward=_pack_backward,
    check=lambda x, index, inverse: check_range(index, x.shape[0] * x.shape[1], "index"),
    linear=True,
)
# `packed` is None for the gradient of `base`: what flows back where there is no token, zero elsewhere.
_call_unpack_tokens = operator(
    "unpack_tokens(Tensor? packed, Tensor? base, Tensor index, Tensor inverse, SymInt batch, "
    "SymInt cells, str backend) -> Tensor",
    fake=_unpack_fake,
    setup=_unpack_setup,
    backward=_unpack_backward,
    check=lambda packed, base, index, inverse, *rest: check_range(inverse, index.shape[0], "inverse"),
    linear=True,
)


def _native_pack(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    try:
        return torch.ops.d2it_C.pack_tokens(x, index)
    except RuntimeError:
        check_range(index, x.shape[0] * x.shape[1], "index")  # the same error, as a ValueError
        raise


def _native_unpack(packed: Tensor | None, base: Any, index: Tensor, inverse: Tensor, batch: int, cells: int) -> Tensor:
    try:
        return torch.ops.d2it_C.unpack_tokens(packed, base, inverse, batch, cells)
    except RuntimeError:
        check_range(inverse, index.shape[0], "inverse")
        raise


for _op, _native in (("pack_tokens", _native_pack), ("unpack_tokens", _native_unpack)):
    register_backend(_op, "reference")
    register_backend(_op, "triton")
    register_backend(_op, "cpu", native=_op)
    implement(_op, "triton", f"d2it.kernels.pack_tokens:{_op}_forward")
    implement(_op, "cpu", _native, checks_values=True)
