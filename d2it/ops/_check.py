"""Judging arguments at the public edge: one clear error that names the argument and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def require(condition: bool, argument: str, rule: str | Callable[[], str], value: Any) -> None:
    """Raises `ValueError("<argument> must <rule>, got <value>")` unless `condition`.

    A rule that tells sizes is a function, called when it is broken: a size put into a string is a constant to
    torch.compile, which would compile again for the next one.
    """
    if not condition:
        raise ValueError(f"{argument} must {rule if isinstance(rule, str) else rule()}, got {value}")


def tensor(argument: str, value: Any, *, ndim: int | tuple[int, ...], floating: bool | None = None) -> None:
    """`value` is a tensor of `ndim` dimensions; floating point where `floating`, an integer type where False."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    dims = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{argument} must have {wanted} dimensions, got shape {tuple(value.shape)}")
    if floating is not None and value.dtype.is_floating_point != floating:
        kind = "a floating-point" if floating else "an integer"
        raise TypeError(f"{argument} must be {kind} tensor, got {value.dtype}")


def integer(argument: str, value: Any, *, low: int, high: int | None = None) -> None:
    """`value` is an int in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{argument} must be {bound}, got {value}")


def same(attribute: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Both tensors have the same `attribute`: "device" or "dtype"."""
    if getattr(a, attribute) != getattr(b, attribute):
        error = TypeError if attribute == "dtype" else ValueError
        raise error(
            f"{second} must have the {attribute} of {first} ({getattr(a, attribute)}), got {getattr(b, attribute)}"
        )


def values(ok: Tensor, rule: str, got: Callable[[], str]) -> None:
    """A condition on values: `ok` is a 0-dim bool tensor, `got` tells what broke the rule.

    On the CPU a violation raises `ValueError` at once. On a GPU it must not stop the host: it is a device-side
    assertion, raised at the next synchronisation, as PyTorch does for an embedding's index out of range.
    """
    if ok.device.type == "cpu" and not torch.compiler.is_compiling():
        if not ok:
            raise ValueError(f"{rule}, got {got()}")
    elif ok.device.type != "meta":
        torch._assert_async(ok, rule)
