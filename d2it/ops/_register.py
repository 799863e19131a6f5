"""Operators as PyTorch sees them: `torch.ops.d2it.*` with fakes for the compiler and gradients.

Registered through `define` and `impl`, the cheap path (an eager call costs a third of a `custom_op`'s), with an
`autograd.Function` at the Autograd key and the backward as an operator of its own. The last argument of every schema is
the backend's name; its implementation is looked up here, so that one operator serves every backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("d2it", "FRAGMENT")

_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_TARGETS: dict[tuple[str, str], str] = {}
_SELF_CHECKING: set[tuple[str, str]] = set()


def implement(op: str, backend: str, target: str | Callable[..., Any], *, checks_values: bool = False) -> None:
    """Names the function that runs `op` on `backend`: a callable, or "module:function", imported at the first call.

    It takes the operator's schema arguments without the backend. `checks_values`: it judges the values of CPU tensors
    itself (range, indices), so that the separate pass over them is left out.
    """
    if isinstance(target, str):
        _TARGETS[op, backend] = target
    else:
        _IMPLEMENTATIONS[op, backend] = target
    if checks_values:
        _SELF_CHECKING.add((op, backend))


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    function = _IMPLEMENTATIONS.get((op, backend))
    if function is None:
        if (op, backend) not in _TARGETS:
            raise ValueError(f"torch.ops.d2it.{op}: backend must name an implementation, got {backend!r}")
        module, name = _TARGETS[op, backend].split(":")
        function = _IMPLEMENTATIONS[op, backend] = getattr(importlib.import_module(module), name)
    return function


def operator(
    schema: str,
    *,
    fake: Callable[..., Any],
    setup: Callable[[Any, Sequence[Any], Any], None] | None = None,
    backward: Callable[..., Sequence[Any]] | None = None,
    check: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines `torch.ops.d2it.<schema>`; returns the function that calls it.

    Args:
        schema: ends in `str backend`.
        fake: shapes and dtypes of the result, for the compiler. It takes all arguments, backend included.
        setup: `setup(ctx, inputs, output)` saves what `backward` needs. `ctx.needs` has one bool for each leaf of the
            inputs, in order.
        backward: `backward(ctx, *grads)` returns a gradient or None for each schema argument.
        check: judges the values of CPU tensors at run time and raises `ValueError`; takes all but the backend.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)

    def kernel(*args: Any) -> Any:
        *rest, backend = args
        if check is not None and (name, backend) not in _SELF_CHECKING and _on_cpu(rest):
            check(*rest)
        return _implementation(name, backend)(*rest)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"d2it::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.d2it, name).default
    function = None
    if backward is not None and setup is not None:
        function = _function(op, setup, backward)
        LIBRARY.impl(name, _caller(op, function), "Autograd")
    call = _caller(op, function)

    def enter(*args: Any) -> Any:
        # Straight to the autograd function: the dispatcher's way to one in Python takes 14 us. What looks at the
        # dispatcher itself (the compiler, torch.func) is not led around it.
        if torch.compiler.is_compiling() or _C._are_functorch_transforms_active():
            return op(*args)
        return call(*args)

    return enter


def _caller(op: Any, function: Any) -> Callable[..., Any]:
    """What `op` is to autograd: `function` where a gradient is asked for, else the operator without it."""

    def call(*args: Any) -> Any:
        if function is not None and torch.is_grad_enabled() and _require_gradients(args):
            return function.apply(*_flatten(args))
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _on_cpu(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type == "cpu"
        if isinstance(arg, (list, tuple)) and arg:
            return _on_cpu(arg)
    return False


def _function(op: Any, setup: Callable[..., None], backward: Callable[..., Sequence[Any]]) -> Any:
    def gradients(ctx: Any, *grads: Any) -> Any:
        leaves: list[Any] = [None]
        for gradient in backward(ctx, *grads):
            leaves.extend(gradient) if isinstance(gradient, (list, tuple)) else leaves.append(gradient)
        return tuple(leaves)

    once = once_differentiable(gradients)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: Sequence[int | None], *leaves: Any) -> Any:
            args = _unflatten(lengths, leaves)
            with _C._AutoDispatchBelowAutograd():
                output = op(*args)
            ctx.needs = ctx.needs_input_grad[1:]
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return once(ctx, *grads) if torch.is_grad_enabled() else gradients(ctx, *grads)

    Function.__name__ = f"{op.name().split('::')[1].split('.')[0]}_autograd"
    return Function


def _flatten(args: Sequence[Any]) -> list[Any]:
    """The length of every list among the arguments, None for the rest; then all of them, one by one. Autograd sees only
    tensors that are arguments themselves; pytree takes 6.6 us where this takes 1.5."""
    lengths: list[int | None] = []
    leaves: list[Any] = [lengths]
    for arg in args:
        if isinstance(arg, (list, tuple)):
            lengths.append(len(arg))
            leaves.extend(arg)
        else:
            lengths.append(None)
            leaves.append(arg)
    return leaves


def _unflatten(lengths: Sequence[int | None], leaves: Sequence[Any]) -> list[Any]:
    args: list[Any] = []
    at = 0
    for length in lengths:
        args.append(leaves[at] if length is None else list(leaves[at : at + length]))
        at += 1 if length is None else length
    return args


def _require_gradients(args: Sequence[Any]) -> bool:
    """Whether a tensor in there, or in a list there, does."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _require_gradients(arg):
            return True
    return False
