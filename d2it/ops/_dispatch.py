"""Which backend runs an operator, and why another one does not.

A backend is a name and a function that lists the reasons why it cannot take a call. The same list serves the choice,
the error of a backend asked for by name, and the skips of the test suite.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from d2it.kernels.common import INTERPRET
from d2it.ops import _native

Reasons = list[str]

HAS_TRITON = importlib.util.find_spec("triton") is not None

# The order in which backends are tried where the caller names none. Measured, not guessed: see docs/results.md.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}

Fits = Callable[..., Reasons]

_BACKENDS: dict[str, dict[str, Fits | None]] = {}
_MACHINE: dict[tuple[str, str], Reasons] = {}
_RUNS: dict[tuple[str, str, str], Fits | None] = {}
"""(op, backend, device): of what this machine can run: all that a call without a named backend looks up."""


def register_backend(op: str, backend: str, fits: Fits | None = None, *, native: str | None = None) -> None:
    """Adds `backend` to `op`.

    Args:
        op: the operator's name.
        backend: "reference", "cpu", "triton" or "cuda".
        fits: takes the operator's own arguments and lists what is in the way; None where nothing ever is.
        native: the operator of csrc/ (`torch.ops.d2it_C.<native>`) that it runs on. Looked up now, at import, so that
            a call costs a dictionary and the compiler traces no library loading.
    """
    _BACKENDS.setdefault(op, {})[backend] = fits
    reasons = _native.why_not(native, backend) if native else []
    if backend == "triton" and not HAS_TRITON:
        reasons = ["Triton is not installed"]
    _MACHINE[op, backend] = reasons
    for device in PREFERENCE:
        if not reasons and not _device_reasons(backend, device):
            _RUNS[op, backend, device] = fits


def _device_reasons(backend: str, device: str | None) -> Reasons:
    if device is None:
        return []
    if backend == "triton" and device != "cuda" and not INTERPRET:
        return [f"Triton needs CUDA tensors, not {device} (TRITON_INTERPRET=1 runs it on CPU tensors)"]
    if backend == "cuda" and device != "cuda":
        return [f"the CUDA extension needs CUDA tensors, not {device}"]
    if backend == "cpu" and device != "cpu":
        return [f"the CPU backend needs CPU tensors, not {device}"]
    return []


def device_of(args: Any) -> str | None:
    """The type of the device of the first tensor among the arguments, or in a list there."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)):
            device = device_of(arg)
            if device is not None:
                return device
    return None


def _interprets_bfloat16(args: Any) -> bool:
    """Whether a CPU tensor that holds values is among the arguments, and is bfloat16."""
    return any(
        _interprets_bfloat16(arg)
        if isinstance(arg, (list, tuple))
        else isinstance(arg, torch.Tensor)
        and arg.dtype == torch.bfloat16
        and arg.device.type == "cpu"
        and getattr(arg, "fake_mode", None) is None
        for arg in args
    )


def _known(op: str) -> dict[str, Fits | None]:
    if not isinstance(op, str) or op not in _BACKENDS:
        raise ValueError(f"op must be one of {', '.join(sorted(_BACKENDS))}, got {op!r}")
    return _BACKENDS[op]


def available_backends(op: str) -> list[str]:
    """The backends of operator `op` that this machine can run, the preferred one first.

    Args:
        op: name of an operator of `d2it.ops`.

    Raises:
        ValueError: `op` is not an operator.

    Example:
        >>> "reference" in ops.available_backends("window_attention")
        True
    """
    known = _known(op)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = PREFERENCE[device]
    names = [name for name in known if not _MACHINE[op, name]]
    if device == "cpu":
        names = [name for name in names if name != "cuda" and (name != "triton" or INTERPRET)]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def why_not(op: str, backend: str, *args: Any, **kwargs: Any) -> list[str]:
    """The reasons why `backend` cannot run this call of `op`; an empty list where it can.

    Args:
        op: name of an operator of `d2it.ops`.
        backend: "reference", "cpu", "triton" or "cuda".
        *args, **kwargs: the operator's arguments. Without them only the machine is considered.

    Raises:
        ValueError: `op` is not an operator.

    Example:
        >>> ops.why_not("gated_residual", "cuda", torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), torch.zeros(1, 8))
        ["gated_residual has no backend 'cuda'; it has cpu, reference, triton"]
    """
    known = _known(op)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    if backend not in known:
        return [f"{op} has no backend {backend!r}; it has {', '.join(sorted(known))}"]
    kwargs.pop("backend", None)
    given = (*args, *kwargs.values())
    reasons = _MACHINE[op, backend] + _device_reasons(backend, device_of(given))
    if backend == "triton" and INTERPRET and not reasons and _interprets_bfloat16(given):
        reasons.append("Triton's interpreter (TRITON_INTERPRET=1) does not compute in bfloat16")
    fits = known[backend]
    if reasons or fits is None or not given:
        return reasons
    return fits(*args, **kwargs)


def choose(op: str, backend: str | None, *args: Any, **kwargs: Any) -> str:
    """The backend that runs this call: the one asked for, or the first in the order of preference that fits.

    Raises:
        ValueError: `backend` is named and cannot run this call; the message lists the reasons.
    """
    if backend is not None:
        reasons = why_not(op, backend, *args, **kwargs)
        if reasons:
            raise ValueError(f"backend={backend!r} cannot run {op}: {'; '.join(reasons)}")
        return backend
    device = device_of(args) or "cpu"
    for name in PREFERENCE.get(device, ("reference",)):
        if (op, name, device) in _RUNS:
            fits = _RUNS[op, name, device]
            if fits is None or not fits(*args, **kwargs):
                return name
    return "reference"
