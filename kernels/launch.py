"""Launchers: what a launch of a Triton kernel costs the host is paid once for each kind of call.

Triton binds, specialises and hashes every argument at every launch: tens of microseconds for the tuples of one of our
kernels, and our own description of the tensors, their allocation sizes and block sizes come on top. A function under
`@launcher` allocates and launches through a `Tape`, and what went through it is kept as straight code: allocate these
shapes, call these compiled kernels with these pointers. It is kept by all that a launcher may depend on: device,
dtypes, shapes, strides and alignment of the tensors, and the other arguments by value. The next call of that kind runs
the code alone.

A launcher therefore depends on nothing but its arguments and their GPU, and does nothing to tensors but allocate, take
views and launch: an operation of PyTorch in it would be missing from the second call on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()
_MOST_KEPT = 4096

_KEPT: dict[tuple[Any, ...], Callable[..., Any]] = {}


class Launch(NamedTuple):
    """A launch that was made."""

    kernel: Any
    compiled: Any
    """What Triton compiled for it; None in the interpreter."""
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


class Tape:
    """What a launcher allocates and launches through. On a GPU it is written down."""

    def __init__(self, device: torch.device):
        self.device = device
        self.allocated: list[tuple[Tensor, float | None]] = []
        self.launched: list[Launch] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a contiguous tensor that the kernels fill."""
        return self._allocate(torch.empty(shape, dtype=dtype, device=self.device), None)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
        """Returns a contiguous tensor filled with a value."""
        return self._allocate(torch.full(shape, value, dtype=dtype, device=self.device), value)

    def _allocate(self, tensor: Tensor, value: float | None) -> Tensor:
        self.allocated.append((tensor, value))
        return tensor

    def launch(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        """Launches `kernel[(programs,)](*args, **options)`.

        Args:
            kernel: a kernel under `triton.jit` whose constants are its last parameters.
            programs: size of the grid.
            *args: the first of its parameters, in order: tensors, numbers, None, and tuples of them.
            **options: the others by name, and Triton's own options.
        """
        compiled = kernel[(programs,)](*args, **options)
        self.launched.append(Launch(kernel, compiled, programs, args, options))


def launcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function(tape, *args)` a function of the arguments, whose second call of a kind skips it.

    Args:
        function: takes a `Tape`, then tensors (at least one, all on one device), None and hashable values, all by
            position. Returns tensors that it allocated, whole; None; or a tuple of them.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        key: list[Any] = [function]
        pointers: list[int] = []
        device = -1
        for arg in args:
            kind = type(arg)
            if arg is None:
                key.append(None)
            elif kind is Tensor or isinstance(arg, Tensor):
                pointer, device = arg.data_ptr(), arg.get_device()
                pointers.append(pointer)
                key += (arg.dtype, arg.shape, arg.stride(), device << 4 | pointer & 15)
            else:
                key += (kind, arg)  # 1, 1.0 and True are equal
        if not _is_gpu(device):
            return function(Tape(_device_of(args)), *args)
        kept = _KEPT.get(whole := tuple(key))
        with _device_guard(device):
            return kept(*pointers) if kept is not None else _first_call(function, whole, args)

    return call


def _is_gpu(device: int) -> bool:
    return device >= 0


def _device_guard(index: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU current for a launch; nothing where it is."""
    return _NOTHING if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _device_of(args: Sequence[Any]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def _first_call(function: Callable[..., Any], key: tuple[Any, ...], args: Sequence[Any]) -> Any:
    """Runs a launcher, and keeps what it did."""
    # Every argument as a tensor of its own: the same one given twice need not be the same the next time.
    own = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    tape = Tape(_device_of(args))
    results = function(tape, *own)
    code = _straight_code(tape, [arg for arg in own if isinstance(arg, Tensor)], results)
    if code is not None:
        if len(_KEPT) >= _MOST_KEPT:  # of sizes that never come again
            _KEPT.clear()
        _KEPT[key] = code
    return results


def _straight_code(tape: Tape, given: list[Tensor], results: Any) -> Callable[..., Any] | None:
    """A function of the pointers of the given tensors that does what is on the tape, and returns such results.

    None where Triton's hooks want to see every launch, and where given tensors share memory, of which a view may be of
    either. What PyTorch allocates anew is aligned to 16 bytes, as `torch.compile` takes for granted too.
    """
    names: dict[str, Any] = {"torch": torch, "device": tape.device}
    known = [(f"given{i}", tensor) for i, tensor in enumerate(given)]
    known += [(f"pointer{i}", tensor) for i, (tensor, _) in enumerate(tape.allocated)]
    unclear = any(launch.kernel.pre_run_hooks for launch in tape.launched)

    def constant(value: Any) -> str:
        names[name := f"c{len(names)}"] = value
        return name

    def pointer(tensor: Tensor) -> str:
        nonlocal unclear
        storage = tensor.untyped_storage().data_ptr()
        of = [each for each in known if each[1] is tensor]
        of = of or [each for each in known if each[1].untyped_storage().data_ptr() == storage]
        if not of:
            raise RuntimeError("a launcher's kernels take its arguments, what its tape allocated, and views of these")
        unclear |= len(of) > 1
        offset = tensor.data_ptr() - of[0][1].data_ptr()
        return f"{of[0][0]} + {offset}" if offset else of[0][0]

    def argument(value: Any) -> str:
        if isinstance(value, Tensor):
            return pointer(value)
        if isinstance(value, tuple) and _has_tensor(value):
            return f"({', '.join(map(argument, value))},)"
        return constant(value)

    def result(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({''.join(f'{result(each)}, ' for each in value)})"
        of = (
            ["None"] if value is None else [f"tensor{i}" for i, (each, _) in enumerate(tape.allocated) if each is value]
        )
        if not of:
            raise RuntimeError("a launcher returns what its tape allocated")
        return of[0]

    lines = []
    for i, (tensor, value) in enumerate(tape.allocated):
        how = f"empty({tuple(tensor.shape)}, " if value is None else f"full({tuple(tensor.shape)}, {constant(value)}, "
        lines.append(f"tensor{i} = torch.{how}dtype={tensor.dtype}, device=device)")
        lines.append(f"pointer{i} = tensor{i}.data_ptr()")
    for kernel, compiled, programs, args, options in tape.launched:
        others = [options.get(p.name, p.default) for p in kernel.params[len(args) :]]
        arguments = ", ".join(map(argument, (*args, *others)))
        lines.append(f"{constant(compiled[programs, 1, 1])}({arguments})")
    lines.append(f"return {result(results)}")
    parameters = ", ".join(f"given{i}" for i in range(len(given)))
    exec(f"def kept({parameters}):\n    " + "\n    ".join(lines), names)
    return None if unclear else names["kept"]


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_has_tensor, value)))
