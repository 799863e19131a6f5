"""Checks of arguments at the public edge: one clear error that names the argument and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
INTEGERS = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_NAMES = {
    FLOATS: "a floating-point tensor (float16, bfloat16, float32 or float64)",
    INTEGERS: "an integer tensor (bool, uint8, int8, int16, int32 or int64)",
}

MOST_INTEGER = 2**31 - 1
# The largest float32: kernels take numbers in that type.
MOST_NUMBER = (2 - 2**-23) * 2.0**127


def require(condition: bool, argument: str, rule: str | Callable[[], str], value: Any) -> None:
    """Raises `ValueError("<argument> must <rule>, got <value>")` unless `condition`.

    A rule that contains sizes is a function, called when it is broken: a size put into a string is a constant to
    torch.compile, which would compile again for the next one.
    """
    if not condition:
        raise ValueError(f"{argument} must {rule if isinstance(rule, str) else rule()}, got {value}")


def tensor(argument: str, value: Any, *, ndim: int | None, dtypes: frozenset[torch.dtype] | None = None) -> None:
    """Raises unless `value` is a dense tensor of `ndim` dimensions and of one of `dtypes`; None allows any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{argument} must be a dense tensor, got one of layout {layout}")
    if dtypes is not None and value.dtype not in dtypes:
        names = _NAMES.get(dtypes) or " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"{argument} must be {names}, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{argument} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def integer(argument: str, value: Any, *, low: int, high: int = MOST_INTEGER) -> None:
    """Raises unless `value` is an int in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{argument} must be an int, got {shown(value)}")
    if value < low or value > high:
        bound = f"at least {low}" if high == MOST_INTEGER and value < low else f"in {low}..{high}"
        raise ValueError(f"{argument} must be {bound}, got {shown(value)}")


def number(
    argument: str,
    value: Any,
    *,
    low: float = -MOST_NUMBER,
    rule: str = "be finite in float32",
    instead: str = "pass its value",
) -> None:
    """Raises unless `value` is a Python number that is finite in float32 and not below `low`.

    Args:
        argument: its name.
        value: what the caller gave.
        low: the least value allowed.
        rule: what a number must be, for the error.
        instead: what to do with a tensor, which has no gradient here.
    """
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        if isinstance(value, Tensor):
            kind = "a tensor that requires a gradient" if value.requires_grad else "a tensor"
            raise TypeError(f"{argument} must be a Python number, got {kind}: {instead}")
        raise TypeError(f"{argument} must be a number, got {shown(value)}")
    # Comparisons, not math.isfinite: under torch.compile the number may be symbolic. NaN fails them.
    if not (low <= value <= MOST_NUMBER):
        raise ValueError(f"{argument} must {rule}, got {shown(value)}")


def flag(argument: str, value: Any) -> None:
    """Raises unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be a bool, got {shown(value)}")


def same(attribute: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raises unless both tensors have the same `attribute`: "device" or "dtype"."""
    if getattr(a, attribute) != getattr(b, attribute):
        error = TypeError if attribute == "dtype" else ValueError
        raise error(
            f"{second} must have the {attribute} of {first} ({getattr(a, attribute)}), got {getattr(b, attribute)}"
        )


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"an int of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, (str, int, float, complex, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def values(ok: Tensor, rule: str, got: Callable[[], str], limits: Callable[[], str] = str) -> None:
    """A condition on values: `ok` is a 0-dim bool tensor, `got` returns what broke the rule.

    Numbers that end the rule are given apart, by `limits`: in the rule they were constants to torch.compile.

    On the CPU a violation raises `ValueError` at once. On a GPU it must not stop the host: it is a device-side
    assertion, raised at the next synchronisation, as PyTorch does for an embedding's index out of range. Meta and
    fake tensors have no values, and are not checked.
    """
    if ok.device.type == "meta":
        return
    if torch.compiler.is_compiling():
        torch._assert_async(ok, rule)
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(ok):
        ok = _unwrapped(ok).all()
    if getattr(ok, "fake_mode", None) is not None:
        return
    if ok.device.type != "cpu":
        torch._assert_async(ok, rule)
    elif not ok:
        raise ValueError(f"{rule}{limits()}, got {_described(got)}")


def _unwrapped(x: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _described(got: Callable[[], str]) -> str:
    try:
        return got()
    except RuntimeError:  # inside torch.func.vmap a value cannot be read
        return "a value that breaks this"


def bias(value: Any, x: Tensor) -> None:
    """Raises unless `value` is None or a bias of the channels of x, the (..., C) tensor that has it in it."""
    if value is None:
        return
    tensor("bias", value, ndim=1, dtypes=FLOATS)
    same("device", "x", x, "bias", value)
    require(value.shape == x.shape[-1:], "bias", lambda: f"be ({x.shape[-1]},)", tuple(value.shape))
