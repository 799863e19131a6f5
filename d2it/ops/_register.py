"""Operators as PyTorch sees them: `torch.ops.d2it.*` with fakes for the compiler and derivatives of any order.

Registered through `define` and `impl`, the cheap path (an eager call costs a third of a `custom_op`'s), with an
`autograd.Function` each and the backward as an operator of its own. The last argument of every schema is the backend's
name; its implementation is looked up here, so that one operator serves every backend.

A call that is only to be computed (`_eager`: nothing traces, transforms, records or profiles it) goes past the
dispatcher to the backend's function: at small shapes the way through takes longer than the work. torch's stable ABI
(2.13) has no autograd in C++, so the gradient's node is an `autograd.Function` here too.

Derivatives. The backward of an operator calls another operator, which has a derivative too:

- a linear operator (a copy) has its transpose as backward, and is its own forward-mode derivative;
- any other one states itself in plain PyTorch (`composite`). Its forward-mode derivative, and the derivative of its
  backward, are taken through that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import _C, Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C import _len_torch_function_stack as count_function_modes
from torch._C._autograd import _profiler_enabled as is_profiling
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from d2it.ops._dispatch import device_of

LIBRARY = torch.library.Library("d2it", "FRAGMENT")

_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_TARGETS: dict[tuple[str, str], str] = {}
_SELF_CHECKING: set[tuple[str, str]] = set()

_CHECKED: set[str] = set()
"""Operators that check the values of CPU tensors."""

Make = Callable[[Callable[..., Any], str], Callable[..., Any]]
_MAKE_DIRECT: dict[str, Make] = {}
_DIRECT: dict[tuple[str, str], Callable[..., Any]] = {}
"""(op, backend): its function with its gradient, for eager calls. Takes the arguments of the schema but the backend."""

_KNOWN: dict[tuple[Any, ...], Callable[..., Any]] = {}
"""What an eager call runs whose arguments are of kinds that have been judged before, see `known`."""
MOST_KNOWN = 4096
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None), float, int, bool, str}

_JUDGES: dict[type, Callable[[Any], tuple[Any, ...] | None]] = {}
"""Of other types of arguments: what a call is judged by of one, or None where it is to be judged itself."""


def implement(op: str, backend: str, target: str | Callable[..., Any], *, checks_values: bool = False) -> None:
    """Sets the function that runs `op` on `backend`.

    Args:
        op: name of an operator, as in its schema.
        backend: "cpu", "triton" or "cuda".
        target: a callable, or "module:function", imported at the first call. It takes the arguments of the schema but
            the backend.
        checks_values: the function itself checks the values of CPU tensors (range, indices), so that the separate pass
            over them is left out.
    """
    if isinstance(target, str):
        _TARGETS[op, backend] = target
    else:
        _IMPLEMENTATIONS[op, backend] = target
        # Not Triton: it takes what lies in memory. A C++ operator's dispatcher resolves a lazy negation first.
        checked = checks_values or backend == "cuda" or op not in _CHECKED
        if op in _MAKE_DIRECT and backend in ("cpu", "cuda") and checked:
            _DIRECT[op, backend] = _MAKE_DIRECT[op](target, backend)
    if checks_values:
        _SELF_CHECKING.add((op, backend))


def judged_by(kind: type, judge: Callable[[Any], tuple[Any, ...] | None]) -> None:
    """Lets `known` and `remember` take arguments of a type: `judge` returns all that calls are judged by of one, or
    None where nothing was found out about it yet."""
    _JUDGES[kind] = judge


def computed_only() -> bool:
    """Whether a call now is only to be computed: nothing traces, transforms or records it."""
    return not (
        is_compiling()
        or are_transforms_active()
        or forward_ad._current_level >= 0
        or count_dispatch_modes()
        or count_function_modes()
        or is_tracing()
    )


def _eager() -> bool:
    """Whether a call now is only to be computed, and no profiler wants to know its name."""
    return computed_only() and not is_profiling()


def _kinds(op: str, backend: str | None, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that a call is judged by, but for the values in its tensors; None for what is not plain."""
    if backend is not None and type(backend) is not str:
        return None
    kinds: list[Any] = [op, backend]
    try:
        for arg in args:
            kind = type(arg)
            if kind in _TENSORS:
                kinds += arg.shape, arg.dtype, arg.device, arg.layout
            elif arg is None or kind is float:
                kinds.append(arg)
            elif kind is int:
                kinds += int, arg  # 1 is 1.0
            elif (judge := _JUDGES.get(kind)) and (found := judge(arg)):
                kinds += found
            else:
                return None
    except RuntimeError:  # a nested tensor has no shape
        return None
    return tuple(kinds)


def known(op: str, backend: str | None, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """What runs this call: `remember` was told of one whose arguments differ from these in values alone.

    Args:
        op: name of an operator.
        backend: as the caller named it.
        args: all else that the call is judged by.

    Returns:
        A function that takes the arguments of the schema but the backend; None where the call is to be judged.
    """
    return _KNOWN.get(_kinds(op, backend, args)) if _eager() else None  # type: ignore[arg-type]


def remember(op: str, backend: str | None, args: tuple[Any, ...], chosen: str) -> None:
    """Notes that a call was judged right, and which backend was chosen, for `known`."""
    if not _eager() or (op, chosen) not in _DIRECT:
        return
    kinds = _kinds(op, backend, args)
    if kinds is not None:
        if len(_KNOWN) >= MOST_KNOWN:  # packed rows come in any number
            _KNOWN.clear()
        _KNOWN[kinds] = _DIRECT[op, chosen]


def direct(op: str, backend: str, tensor: Tensor) -> Callable[..., Any] | None:
    """Returns what runs a call whose arguments an earlier one has judged, `tensor` the only new one among them: that of
    a backward, on a gradient. None where the call is to go through the dispatcher."""
    return _DIRECT.get((op, backend)) if type(tensor) is Tensor and _eager() else None


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    function = _IMPLEMENTATIONS.get((op, backend))
    if function is None:
        if (op, backend) not in _TARGETS:
            raise ValueError(f"torch.ops.d2it.{op}: backend must be one that implements it, got {backend!r}")
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
    linear: bool = False,
    composite: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `torch.ops.d2it.<schema>`; returns the function that calls it.

    Args:
        schema: ends in `str backend`.
        fake: shapes and dtypes of the result, for the compiler. It takes all arguments, backend included.
        setup: `setup(ctx, inputs, output)` saves what `backward` needs. `ctx.needs` has one bool for each leaf of the
            inputs, in order.
        backward: `backward(ctx, *grads)` returns a gradient or None for each schema argument. Without it the gradients
            are those of `composite`; an operator without either has none (its results are integers).
        check: checks the values of CPU tensors at run time and raises `ValueError`; takes all but the backend.
        linear: the results are linear in the floating-point tensors among the arguments.
        composite: the operator in plain PyTorch; takes all but the backend. Returns as many results, None for those
            that have no derivative.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    if check is not None:
        _CHECKED.add(name)

    def kernel(*args: Any) -> Any:
        *rest, backend = args
        if check is not None and (name, backend) not in _SELF_CHECKING and device_of(rest) == "cpu":
            check(*rest)
        return _implementation(name, backend)(*rest)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"d2it::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.d2it, name).default

    if backward is None and composite is not None:
        setup, backward = _composite_setup, partial(_pull_back, composite)
    flatten = _flatten if "[]" in schema else _as_leaves

    def below(*args: Any) -> Any:
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    def call(*args: Any) -> Any:
        if backward is not None and torch.is_grad_enabled() and _require_gradients(args):
            return apply(*flatten(args))
        return below(*args)

    def make_direct(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
        assert backward is not None
        return _with_gradient(name, function, backend, setup, backward)

    def enter(*args: Any) -> Any:
        # Straight to the autograd function: the dispatcher's way to one in Python takes 14 us.
        if is_compiling():
            return op(*args)
        direct = _DIRECT.get((name, args[-1]))
        if direct is not None and _eager() and _PLAIN.issuperset(map(type, args)):
            return direct(*args[:-1])
        if are_transforms_active() or forward_ad._current_level >= 0:
            return Function.apply(*flatten(args))
        return call(*args)

    class Function(torch.autograd.Function):
        """Takes the lengths of the lists among the operator's arguments, then all leaves, see `_flatten`. Transforms
        call `enter`, for the sake of those around them."""

        @staticmethod
        def forward(lengths: Lengths, *leaves: Any) -> Any:
            output = below(*_unflatten(lengths, leaves))
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            lengths, *leaves = inputs
            args = _unflatten(lengths, leaves)
            ctx.lengths, ctx.needs = lengths, ctx.needs_input_grad[1:]
            if setup is not None:
                setup(ctx, args, output)
            if forward_ad._current_level >= 0:
                ctx.primals = leaves

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if backward is None:
                return (None,) * (1 + len(ctx.needs))
            gradients = backward(ctx, *grads)
            if ctx.lengths is None:
                return None, *gradients
            leaves: list[Any] = [None]
            for gradient, length in zip(gradients, ctx.lengths):
                leaves.extend([gradient] if length is None else [None] * length if gradient is None else gradient)
            return tuple(leaves)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            lengths, leaves = ctx.lengths, ctx.primals
            if linear:
                moved = [
                    (torch.zeros_like(x) if t is None else t) if isinstance(x, Tensor) and x.is_floating_point() else x
                    for x, t in zip(leaves, tangents)
                ]
                results = enter(*_unflatten(lengths, moved))
            elif composite is not None:
                results = _push_forward(composite, lengths, leaves, tangents)
            else:
                results = None
            return tuple(results) if isinstance(results, list) else results

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], lengths: Lengths, *leaves: Any) -> Any:
            return _one_by_one(enter, info.batch_size, in_dims[1:], lengths, leaves)

    Function.__name__ = f"{name}_autograd"
    # The C++ method itself: torch.autograd.Function's binds the arguments to a signature first, which takes longer than
    # the call.
    apply = super(torch.autograd.Function, Function).apply
    if backward is not None:
        LIBRARY.impl(name, call, "Autograd")
        if "[]" not in schema:
            _MAKE_DIRECT[name] = make_direct
    return enter


def _with_gradient(
    name: str,
    function: Callable[..., Any],
    backend: str,
    setup: Callable[[Any, Sequence[Any], Any], None] | None,
    backward: Callable[..., Sequence[Any]],
) -> Callable[..., Any]:
    """A backend's function with its gradient, in as few Python frames as it takes."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            ctx.lengths = None
            if setup is not None:
                setup(ctx, (*args, backend), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            ctx.needs = ctx.needs_input_grad
            return tuple(backward(ctx, *grads))

    Direct.__name__ = f"{name}_{backend}_autograd"
    apply = super(torch.autograd.Function, Direct).apply
    is_grad_enabled, any_requires_grad = torch.is_grad_enabled, _C._any_requires_grad

    def call(*args: Any) -> Any:
        return apply(*args) if is_grad_enabled() and any_requires_grad(*args) else function(*args)

    return call


def _one_by_one(
    enter: Callable[..., Any], size: int, in_dims: Sequence[Any], lengths: Lengths, leaves: Sequence[Any]
) -> Any:
    """The vmap of an operator: a call for each element of the batch; of an empty batch, one on zeros for the shapes."""
    batched = [isinstance(x, Tensor) and d is not None for x, d in zip(leaves, in_dims)]
    rows = [x.movedim(d, 0) if b else x for x, b, d in zip(leaves, batched, in_dims)]
    if not size:
        rows = [x.new_zeros((1, *x.shape[1:])) if b else x for x, b in zip(rows, batched)]

    def at(i: int) -> tuple[Any, ...]:
        results = enter(*_unflatten(lengths, [x[i] if b else x for x, b in zip(rows, batched)]))
        return tuple(results) if isinstance(results, (list, tuple)) else (results,)

    parts = [at(i) for i in range(size or 1)]
    stacked = tuple(torch.stack(part)[:size] for part in zip(*parts))
    return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)


# ---- Derivatives through plain PyTorch -------------------------------------------------------------------------------


def _composite_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    leaves = inputs if ctx.lengths is None else _flatten(inputs)[1:]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in leaves))
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]


def _pull_back(composite: Callable[..., Any], ctx: Any, *grads: Any) -> list[Any]:
    """The gradient of every argument of `composite`, saved by `_composite_setup`, from those of its results."""
    leaves = [o if t is None else t for o, t in zip(ctx.others, unwrap_dead_wrappers(ctx.saved_tensors))]
    if not torch.is_grad_enabled():
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    which = [i for i, needed in enumerate(ctx.needs) if needed]
    function = _of_floats(composite, ctx.lengths, leaves, which)
    results, pull, *_ = torch.func.vjp(function, *(leaves[i] for i in which))
    # The results that have a derivative are the floating-point ones, in order.
    given = [g for g in grads if g is not None and g.is_floating_point()]
    wanted = pull(tuple(g.to(r.dtype) for g, r in zip(given, results)))
    gradients: list[Any] = [None] * len(leaves)
    for i, gradient in zip(which, wanted):
        gradients[i] = gradient
    return _unflatten(ctx.lengths, gradients)


def _push_forward(
    composite: Callable[..., Any], lengths: Lengths, leaves: Sequence[Any], tangents: Sequence[Any]
) -> Any:
    """The forward-mode derivative of `composite`: the transpose of its transpose, for which reverse mode is enough."""
    which = [i for i, t in enumerate(tangents) if t is not None and isinstance(leaves[i], Tensor)]
    function = _of_floats(composite, lengths, leaves, which)
    primals = tuple(leaves[i] for i in which)

    def transpose(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(function, *primals)[1](cotangents)

    results = composite(*_unflatten(lengths, leaves)[:-1])
    listed = results if isinstance(results, (list, tuple)) else (results,)
    zeros = [torch.zeros_like(r) for r in listed if _has_derivative(r)]
    pushed = iter(torch.func.vjp(transpose, *zeros)[1](tuple(tangents[i] for i in which)))
    outputs = tuple(next(pushed) if _has_derivative(r) else None for r in listed)
    return outputs if isinstance(results, (list, tuple)) else outputs[0]


def _has_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _of_floats(
    composite: Callable[..., Any], lengths: Lengths, leaves: Sequence[Any], which: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:
    """`composite` as a function of its leaves `which`, with the results that have a derivative."""

    def function(*primals: Tensor) -> tuple[Tensor, ...]:
        all_leaves = list(leaves)
        for i, primal in zip(which, primals):
            all_leaves[i] = primal
        results = composite(*_unflatten(lengths, all_leaves)[:-1])
        listed = results if isinstance(results, (list, tuple)) else (results,)
        return tuple(r for r in listed if _has_derivative(r))

    return function


# ---- Arguments with lists in them ------------------------------------------------------------------------------------


Lengths = list[int | None] | None


def _as_leaves(args: Sequence[Any]) -> list[Any]:
    """`_flatten` of arguments none of which is a list."""
    return [None, *args]


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


def _unflatten(lengths: Lengths, leaves: Sequence[Any]) -> list[Any]:
    if lengths is None:
        return list(leaves)
    args: list[Any] = []
    at = 0
    for length in lengths:
        args.append(leaves[at] if length is None else list(leaves[at : at + length]))
        at += 1 if length is None else length
    return args


def _require_gradients(args: Sequence[Any]) -> bool:
    """Whether a tensor among the arguments, or in a list there, requires a gradient."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _require_gradients(arg):
            return True
    return False


# ---- The gradient of a bias that is in an argument already -----------------------------------------------------------


def unwritten_bias(like: Tensor, bias: Tensor | None) -> Tensor:
    """An unwritten gradient of the bias; (0,) without one, since an operator returns tensors."""
    return like.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
