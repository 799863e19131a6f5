"""adaLN for images and for packed rows (DiT, Sec. 3.2): normalise and modulate, gate and add."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, known, operator, remember, unwritten_bias


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    sample: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters.

    Args:
        x: (B, L, C), or packed rows (T, C) with `sample`; floating point, any strides.
        shift, scale: (B, C) floating point, of one dtype, which may differ from that of `x`.
        sample: (T,) int32 or int64, the image of each row, in 0..B-1.
        eps: added to the variance.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        The shape and dtype of `x`, computed in float32. Gradients of shift and scale are summed in a fixed order.

    Raises:
        TypeError, ValueError: shapes or devices that do not go together, or a sample that names no image (on a GPU as
            a device-side assertion, raised at the next synchronisation).

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]])
        >>> ops.adaln_modulate(x, shift=torch.zeros(1, 2), scale=torch.ones(1, 2)).round(decimals=3)
        tensor([[[-2.,  2.],
                 [ 2., -2.]]])
    """
    args = (x, shift, scale, sample, eps)
    if (run := known("adaln_modulate", backend, args)) is not None:
        return run(*args)[0]
    _validate(x, sample, eps, shift=shift, scale=scale)
    name = choose("adaln_modulate", backend, x, shift, scale, sample=sample)
    remember("adaln_modulate", backend, args, name)
    if name == "reference":
        check_sample(sample, scale.shape[0])
        return reference.adaln_modulate(x, shift, scale, sample=sample, eps=eps)
    return _call_adaln_modulate(*args, name)[0]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    bias: Tensor | None = None,
    sample: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + gate * branch.

    Args:
        x, branch: (B, L, C), or packed rows (T, C) with `sample`; floating point, any strides, dtypes may differ.
        gate: (B, C) floating point.
        bias: (C,) floating point, of the layer that made `branch`, where the layer was given it without its gradient
            (`bias.detach()`): it is in the branch already, and not added here. Its gradient is that of the branch
            summed over the rows, in float32 and in a fixed order, by the pass that writes that of the branch.
        sample: (T,) int32 or int64, the image of each row, in 0..B-1.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        The shape and dtype of `x`, computed in float32. The gradient of the gate is summed in a fixed order.

    Raises:
        TypeError, ValueError: shapes or devices that do not go together, or a sample that names no image (on a GPU as
            a device-side assertion, raised at the next synchronisation).

    Example:
        >>> x, branch = torch.ones(3, 2), torch.ones(3, 2)
        >>> gate = torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # of two images
        >>> ops.gated_residual(x, branch, gate, sample=torch.tensor([0, 0, 1]))  # packed rows
        tensor([[1., 2.],
                [1., 2.],
                [3., 4.]])
    """
    args = (x, branch, gate, bias, sample)
    if (run := known("gated_residual", backend, args)) is not None:
        return run(*args)
    _validate(x, sample, gate=gate)
    _check_branch(x, branch, bias)
    name = choose("gated_residual", backend, x, branch, gate, bias=bias, sample=sample)
    remember("gated_residual", backend, args, name)
    if name == "reference":
        check_sample(sample, gate.shape[0])
        return reference.gated_residual(x, branch, gate, bias=bias, sample=sample)
    return _call_gated_residual(*args, name)


def gated_residual_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    sample: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `adaln_modulate` of its result, in one pass over the rows.

    Args:
        x, branch: (B, L, C), or packed rows (T, C) with `sample`; floating point, any strides, dtypes may differ.
        gate: (B, C) floating point.
        shift, scale: (B, C) floating point, of one dtype.
        bias: (C,) floating point, of the layer that made `branch`, where the layer was given it without its gradient
            (`bias.detach()`): it is in the branch already, and not added here. Its gradient is that of the branch
            summed over the rows, in float32 and in a fixed order, by the pass that writes that of the branch.
        sample: (T,) int32 or int64, the image of each row, in 0..B-1.
        eps: added to the variance.
        backend: "reference", "cpu", "triton", or None to choose.

    Returns:
        (total, LayerNorm(total) * (1 + scale) + shift) with total = x + gate * branch, each of the shape and dtype of
        `x`, computed in float32. Gradients of the parameters are summed in a fixed order.

    Raises:
        TypeError, ValueError: shapes or devices that do not go together, or a sample that names no image (on a GPU as
            a device-side assertion, raised at the next synchronisation).

    Example:
        >>> x, branch, zeros = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 2)
        >>> total, modulated = ops.gated_residual_modulate(x, branch, zeros + 3, zeros, zeros)
        >>> total, modulated.round(decimals=3)
        (tensor([[[4., 8.]]]), tensor([[[-1.,  1.]]]))
    """
    args = (x, branch, gate, shift, scale, bias, sample, eps)
    if (run := known("gated_residual_modulate", backend, args)) is not None:
        return run(*args)[:2]
    _validate(x, sample, eps, gate=gate, shift=shift, scale=scale)
    _check_branch(x, branch, bias)
    name = choose("gated_residual_modulate", backend, x, branch, gate, shift, scale, bias=bias, sample=sample)
    remember("gated_residual_modulate", backend, args, name)
    if name == "reference":
        check_sample(sample, scale.shape[0])
        return reference.gated_residual_modulate(x, branch, gate, shift, scale, bias=bias, sample=sample, eps=eps)
    total, modulated, _ = _call_fused(*args, name)
    return total, modulated


def _validate(x: Tensor, sample: Tensor | None, eps: float = 0.0, **parameters: Tensor) -> None:
    """Raises unless the arguments of an operator fit each other; `parameters` are its (B, C) tensors by name."""
    _check.tensor("x", x, ndim=3 if sample is None else 2, dtypes=_check.FLOATS)
    images = None if sample is not None else x.shape[0]
    for name, parameter in parameters.items():
        _check.tensor(name, parameter, ndim=2, dtypes=_check.FLOATS)
        _check.same("device", "x", x, name, parameter)
        images = parameter.shape[0] if images is None else images
        _check.require(
            parameter.shape == (images, x.shape[-1]),
            name,
            lambda: f"be ({x.shape[0] if sample is None else 'B'}, {x.shape[-1]})",
            tuple(parameter.shape),
        )
    if "shift" in parameters:
        _check.same("dtype", "shift", parameters["shift"], "scale", parameters["scale"])
    if sample is not None:
        _check.tensor("sample", sample, ndim=1, dtypes=_SAMPLE)
        _check.same("device", "x", x, "sample", sample)
        _check.require(
            sample.shape[0] == x.shape[0], "sample", lambda: f"have the {x.shape[0]} rows of x", sample.shape[0]
        )
    _check.number("eps", eps, low=0.0, rule="be finite and not negative")


def _check_branch(x: Tensor, branch: Tensor, bias: Tensor | None) -> None:
    _check.tensor("branch", branch, ndim=x.ndim, dtypes=_check.FLOATS)
    _check.same("device", "x", x, "branch", branch)
    _check.require(
        branch.shape == x.shape, "branch", lambda: f"have the shape of x {tuple(x.shape)}", tuple(branch.shape)
    )
    _check.bias(bias, x)


_SAMPLE = frozenset((torch.int32, torch.int64))


def check_sample(sample: Tensor | None, images: int) -> None:
    """Raises unless every row names an image."""
    if sample is None:
        return
    _check.values(
        ((sample >= 0) & (sample < images)).all(),
        "sample must name images",
        lambda: f"{int(sample.min())}..{int(sample.max())}",
        limits=lambda: f" 0..{images - 1}",
    )


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Unwritten contiguous tensors of the shapes and dtypes of these."""
    return tuple(t.new_empty(t.shape) for t in tensors)


def _modulate_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, sample, ctx.eps, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], scale, sample)


def _modulate_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Sequence[Any]:
    x, stats, scale, sample = ctx.saved_tensors
    dx, dshift, dscale = _call_adaln_modulate_backward(grad, x, stats, scale, sample, ctx.eps, ctx.backend)
    return dx, dshift, dscale, None, None, None


def _modulate_composite(
    x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    return reference.adaln_modulate(x, shift, scale, sample=sample, eps=eps), None


def _modulate_pull_back(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, sample: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return reference.adaln_modulate(x, shift, scale, sample=sample, eps=eps)

    return torch.func.vjp(modulate, x, torch.zeros_like(scale), scale)[1](grad)


def _gate_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, branch, gate, bias, sample, ctx.backend = inputs
    ctx.save_for_backward(branch, gate, bias, sample)


def _gate_backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    branch, gate, bias, sample = ctx.saved_tensors
    bias = bias if ctx.needs[3] else None
    dbranch, dgate, dbias = _call_gated_residual_backward(grad, branch, gate, bias, sample, ctx.backend)
    return grad, dbranch, dgate, None if bias is None else dbias, None, None


def _gate_pull_back(
    grad: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, sample: Tensor | None
) -> tuple[Tensor, ...]:
    def gated(branch: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.gated_residual(torch.zeros_like(grad), branch, gate, bias=bias, sample=sample)

    if bias is None:
        return *torch.func.vjp(gated, branch, gate)[1](grad), branch.new_zeros((0,))
    return torch.func.vjp(gated, branch, gate, bias)[1](grad)


def _fused_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, _, scale, bias, sample, ctx.eps, ctx.backend = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(total, stats, branch, gate, scale, bias, sample)


def _fused_backward(ctx: Any, grad_total: Tensor, grad: Tensor, _: Tensor | None) -> Sequence[Any]:
    total, stats, branch, gate, scale, bias, sample = ctx.saved_tensors
    bias = bias if ctx.needs[5] else None
    *gradients, dbias = _call_fused_backward(
        grad_total, grad, total, stats, branch, gate, scale, bias, sample, ctx.eps, ctx.backend
    )
    return *gradients, None if bias is None else dbias, None, None, None


def _fused_composite(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sample: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    both = reference.gated_residual_modulate(x, branch, gate, shift, scale, bias=bias, sample=sample, eps=eps)
    return *both, None


def _fused_pull_back(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    stats: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sample: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    of_total, dshift, dscale = _modulate_pull_back(grad, total, stats, scale, sample, eps)
    dx = grad_total + of_total
    dbranch, dgate, dbias = _gate_pull_back(dx, branch, gate, bias, sample)
    return dx, dbranch, dgate, dshift, dscale, dbias


def _stats(x: Tensor) -> Tensor:
    """Room for mean and 1 / deviation of the rows, which the backward takes from the forward."""
    return x.new_empty((math.prod(x.shape[:-1]), 2), dtype=torch.float32)


def _dtype_reasons(*tensors: Tensor) -> list[str]:
    return [
        f"it computes in float32 and takes no {tensor.dtype}"
        for tensor in tensors
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    ]


def _triton_reasons(x: Tensor, *others: Tensor) -> list[str]:
    reasons = _dtype_reasons(x, *others)
    if x.shape[-1] > 16384:
        reasons.append(f"it holds a row in registers, at most 16384 channels, not {x.shape[-1]}")
    rows = math.prod(x.shape[:-1])  # `numel` of a shape would fix its sizes under `torch.export`
    if rows > 2**31 - 2**16:
        reasons.append(f"it counts rows in int32, and {rows} are too many")
    return reasons


_call_adaln_modulate = operator(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? sample, float eps, str backend) -> "
    "(Tensor out, Tensor stats)",
    fake=lambda x, *rest: (*_like(x), _stats(x)),
    setup=_modulate_setup,
    backward=_modulate_backward,
    check=lambda x, shift, scale, sample, eps: check_sample(sample, scale.shape[0]),
    composite=_modulate_composite,
)
_call_adaln_modulate_backward = operator(
    "adaln_modulate_backward(Tensor grad, Tensor x, Tensor stats, Tensor scale, Tensor? sample, float eps, "
    "str backend) -> (Tensor dx, Tensor dshift, Tensor dscale)",
    fake=lambda grad, x, stats, scale, *rest: _like(x, scale, scale),
    composite=_modulate_pull_back,
)
_call_gated_residual = operator(
    "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? bias, Tensor? sample, str backend) -> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
    setup=_gate_setup,
    backward=_gate_backward,
    check=lambda x, branch, gate, bias, sample: check_sample(sample, gate.shape[0]),
    composite=lambda x, branch, gate, bias, sample: reference.gated_residual(x, branch, gate, bias=bias, sample=sample),
)
_call_gated_residual_backward = operator(
    "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor? bias, Tensor? sample, str backend) -> "
    "(Tensor dbranch, Tensor dgate, Tensor dbias)",
    fake=lambda grad, branch, gate, bias, *rest: (*_like(branch, gate), unwritten_bias(branch, bias)),
    composite=_gate_pull_back,
)
_call_fused = operator(
    "gated_residual_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? bias, "
    "Tensor? sample, float eps, str backend) -> (Tensor total, Tensor out, Tensor stats)",
    fake=lambda x, *rest: (*_like(x, x), _stats(x)),
    setup=_fused_setup,
    backward=_fused_backward,
    check=lambda x, branch, gate, shift, scale, bias, sample, eps: check_sample(sample, scale.shape[0]),
    composite=_fused_composite,
)
_call_fused_backward = operator(
    "gated_residual_modulate_backward(Tensor grad_total, Tensor grad, Tensor total, Tensor stats, Tensor branch, "
    "Tensor gate, Tensor scale, Tensor? bias, Tensor? sample, float eps, str backend) -> "
    "(Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale, Tensor dbias)",
    fake=lambda of_total, grad, total, stats, branch, gate, scale, bias, *rest: (
        *_like(total, branch, gate, scale, scale),
        unwritten_bias(branch, bias),
    ),
    composite=_fused_pull_back,
)


# ---- C++ on CPU: it sums the gradients of parameters in float32 ------------------------------------------------------


def _native_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    try:
        return torch.ops.d2it_C.adaln_modulate(x, shift, scale, sample, eps)
    except RuntimeError:
        check_sample(sample, scale.shape[0])  # the same error, as a ValueError
        raise


def _native_modulate_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, sample: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dx, dshift, dscale = torch.ops.d2it_C.adaln_modulate_backward(grad, x, stats, scale, sample)
    return dx, dshift.to(scale.dtype), dscale.to(scale.dtype)


def _native_gate(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, sample: Tensor | None) -> Tensor:
    try:
        return torch.ops.d2it_C.gated_residual(x, branch, gate, sample)
    except RuntimeError:
        check_sample(sample, gate.shape[0])
        raise


def _native_gate_backward(
    grad: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, sample: Tensor | None
) -> tuple[Tensor, ...]:
    dbranch, dgate, dbias = torch.ops.d2it_C.gated_residual_backward(grad, branch, gate, bias, sample)
    return dbranch, dgate.to(gate.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _native_fused(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sample: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    try:
        return torch.ops.d2it_C.gated_residual_modulate(x, branch, gate, shift, scale, sample, eps)
    except RuntimeError:
        check_sample(sample, scale.shape[0])
        raise


def _native_fused_backward(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    stats: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sample: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    dx, dbranch, dgate, dshift, dscale, dbias = torch.ops.d2it_C.gated_residual_modulate_backward(
        grad_total, grad, total, stats, branch, gate, scale, bias, sample
    )
    of_scale = dshift.to(scale.dtype), dscale.to(scale.dtype)
    return dx, dbranch, dgate.to(gate.dtype), *of_scale, dbias if bias is None else dbias.to(bias.dtype)


def _of_modulate(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda x, shift, scale, *, sample=None, eps=1e-6: reasons(x, shift, scale)


def _given(bias: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias is None else (bias,)


def _of_gate(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda x, branch, gate, *, bias=None, sample=None: reasons(x, branch, gate, *_given(bias))


def _of_fused(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda x, branch, gate, shift, scale, *, bias=None, sample=None, eps=1e-6: reasons(
        x, branch, gate, shift, scale, *_given(bias)
    )


for _op, _of, _file, _functions in (
    ("adaln_modulate", _of_modulate, "modulate", (_native_modulate, _native_modulate_backward)),
    ("gated_residual", _of_gate, "modulate_gate", (_native_gate, _native_gate_backward)),
    ("gated_residual_modulate", _of_fused, "modulate", (_native_fused, _native_fused_backward)),
):
    register_backend(_op, "reference")
    register_backend(_op, "cpu", _of(_dtype_reasons), native=_op)
    register_backend(_op, "triton", _of(_triton_reasons))
    implement(_op, "triton", f"d2it.kernels.{_file}:{_op}_forward")
    implement(f"{_op}_backward", "triton", f"d2it.kernels.{_file}:{_op}_backward")
    implement(_op, "cpu", _functions[0], checks_values=True)
    implement(f"{_op}_backward", "cpu", _functions[1])
