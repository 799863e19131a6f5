"""Eager calls go past the dispatcher, and judge arguments of known kinds once: nothing else may show it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from d2it import ops
from d2it.ops import _register, reference

Call = tuple[Callable[..., Any], dict[str, Any]]
OPS = ["adaln_modulate", "gated_residual", "gated_residual_modulate", "window_attention", "window_attention_qkvpacked"]
pytestmark = pytest.mark.skipif("cpu" not in ops.available_backends("adaln_modulate"), reason="needs the C++ operators")


def arguments(op: str, packed: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of random sizes that `op` takes; floating-point ones require a gradient."""
    images, rows, channels, heads = (int(torch.randint(1, 6, ())) for _ in range(4))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    if op.startswith("window"):
        size = (images * rows,) if packed else (images, rows)
        slots = torch.arange(images * rows, dtype=torch.int32).view(images, rows).flip(1) if packed else None
        bias = torch.randn(1, heads, rows, rows).requires_grad_()
        if op == "window_attention":
            q, k, v = (random(*size, heads, channels) for _ in range(3))
            return {"q": q, "k": k, "v": v, "bias": bias, "slots": slots}
        return {"qkv": random(*size, 3, heads, channels), "bias": bias, "slots": slots}
    sample = torch.randint(images, (rows,)) if packed else None
    size = (rows, channels) if packed else (images, rows, channels)
    given: dict[str, Any] = {"x": random(*size)}
    if op.startswith("gated"):
        given |= {"branch": random(*size), "gate": random(images, channels)}
    if op.endswith("modulate"):
        given |= {"shift": random(images, channels), "scale": random(images, channels)}
    return given | {"sample": sample}


def results(op: str, given: dict[str, Any], seed: int = 0) -> list[Tensor]:
    """Outputs, and the gradients of what requires one under cotangents that the seed gives."""
    out = getattr(ops, op)(**given)
    outs = list(out) if isinstance(out, tuple) else [out]
    rng = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.dtype) for o in outs]
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*outs, *torch.autograd.grad(outs, wanted, cotangents)]


def frames(call: Callable[[], Any]) -> int:
    """The Python functions that a call enters."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


class Seen(TorchDispatchMode):
    """Notes the operators of d2it that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "d2it":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_second_call_is_the_first_and_that_of_the_dispatcher(op: str, packed: bool) -> None:
    given = arguments(op, packed)
    first = results(op, given)
    again = {
        k: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for k, x in given.items()
    }
    assert len(_register._KNOWN) == 1
    second = results(op, again)
    assert len(_register._KNOWN) == 1
    with Seen() as seen:
        dispatched = results(op, again)
    assert seen.names == [op, f"{op}_backward"]
    for a, b, c in zip(first, second, dispatched, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with torch.no_grad():
        plain = getattr(ops, op)(**again)
    assert torch.equal(plain[0] if isinstance(plain, tuple) else plain, first[0])
    exact = results_of_reference(op, given)
    for a, b in zip(first, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def results_of_reference(op: str, given: dict[str, Any]) -> list[Tensor]:
    """`results` in float64, by the specification."""
    wide = {
        k: x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in given.items()
    }
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(ops, op, getattr(reference, op))
        return results(op, wide)


@pytest.mark.parametrize("op", OPS)
def test_what_looks_on_sees_a_known_call(op: str) -> None:
    given = arguments(op, packed=False)
    want = results(op, given)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        results(op, given)
    assert {f"d2it::{op}", f"d2it::{op}_backward"} <= {event.key for event in profiler.key_averages()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        got = results(op, given)
    assert kept
    assert all(map(torch.equal, got, want))
    again = torch.utils.checkpoint.checkpoint(lambda: getattr(ops, op)(**given), use_reentrant=False)
    assert torch.equal(again[0] if isinstance(again, tuple) else again, want[0])
    name, first = next((name, x) for name, x in given.items() if isinstance(x, Tensor))
    out = torch.func.vmap(lambda moved: getattr(ops, op)(**given | {name: first + moved}))(torch.zeros(2))
    torch.testing.assert_close(out[0][1] if isinstance(out, tuple) else out[1], want[0])


@pytest.mark.parametrize("op", OPS)
def test_a_known_call_enters_few_functions(op: str) -> None:
    """A frame costs 0.1 us and more: at small shapes they are the time of a call."""
    given = arguments(op, packed=False)
    call = lambda: getattr(ops, op)(**given)  # noqa: E731
    judged = frames(call)
    most = 26 if op.startswith("window_attention") else 16
    with torch.no_grad():
        assert frames(call) <= most - 4
    assert frames(call) <= most < judged


def test_a_call_of_other_kinds_is_judged() -> None:
    x, row = torch.randn(2, 3, 4), torch.zeros(2, 4)
    ops.adaln_modulate(x, row, row, eps=1.0)
    ops.adaln_modulate(x, row, row, eps=0.0)
    for eps in (True, False, -1.0, float("nan"), float("inf"), torch.tensor(1.0), "1"):
        with pytest.raises((TypeError, ValueError), match="eps must be"):
            ops.adaln_modulate(x, row, row, eps=eps)
    for shift in (x.to_sparse()[:, 0], torch.zeros(3, 4), row.long(), row.double(), None, [0.0]):
        with pytest.raises((TypeError, ValueError), match=r"s(hift|cale) must "):
            ops.adaln_modulate(x, shift, row, eps=1.0)
    nested = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)])
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        ops.adaln_modulate(nested, row, row, eps=1.0)
    with pytest.raises(TypeError, match="backend must be a string"):
        ops.adaln_modulate(x, row, row, eps=1.0, backend=["cpu"])
    with pytest.raises(ValueError, match="cannot run"):
        ops.adaln_modulate(x, row, row, eps=1.0, backend="cuda")
    sample = torch.zeros(3, dtype=torch.int32)
    ops.adaln_modulate(x[0], row, row, sample=sample)
    with pytest.raises(ValueError, match=r"sample must name images 0\.\.1"):
        ops.adaln_modulate(x[0], row, row, sample=sample + 2)


@pytest.mark.parametrize("based", [False, True])
def test_packing_by_a_known_plan(based: bool) -> None:
    grains = (torch.rand(3, 4, 2) < 0.5).long()
    plan = ops.plan_tokens(grains, cells_per_region=2, window=2, capacity=96)
    x, packed, base = torch.randn(3, 32, 5), torch.randn(96, 5), torch.randn(3, 32, 5)
    given = [t.requires_grad_() for t in (x, packed, *([base] if based else []))]
    cotangents = torch.randn(96, 5), torch.randn(3, 32, 5)

    def run() -> list[Tensor]:
        outs = ops.pack_tokens(x, plan), ops.unpack_tokens(packed, plan, base if based else None)
        return [*outs, *torch.autograd.grad(outs, given, cotangents)]

    first, second = run(), run()
    with Seen() as seen:
        dispatched = run()
    assert sorted(seen.names) == ["pack_tokens"] * 2 + ["unpack_tokens"] * (3 if based else 2)
    for a, b, c in zip(first, second, dispatched, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert frames(lambda: ops.pack_tokens(x, plan)) <= 17
    assert frames(lambda: ops.unpack_tokens(packed, plan, base if based else None)) <= 19
    assert torch.autograd.gradgradcheck(lambda t: ops.pack_tokens(t, plan) ** 2, x.detach().double().requires_grad_())
    with pytest.raises(ValueError, match="x must have the plan's 3 images of 32 cells"):
        ops.pack_tokens(x.reshape(1, 96, 5), plan)
    other = dataclasses.replace(plan, grid=(1, 12, 8))
    assert ops.pack_tokens(x.reshape(1, 96, 5), other).shape == (96, 5)
    with pytest.raises(ValueError, match="x must have the plan's 1 images of 96 cells"):
        ops.pack_tokens(x, other)
    with pytest.raises(ValueError, match="base must have shape"):
        ops.unpack_tokens(packed, plan, base.reshape(1, 96, 5))
    plan.index[0] = 96
    with pytest.raises(ValueError, match=r"plan\.index must contain values below 96"):
        ops.pack_tokens(x, plan)


def test_a_lazy_negation_is_resolved() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    row = torch.randn(2, 4)
    want = ops.adaln_modulate(x.resolve_neg(), row, row)
    for _ in range(2):
        assert torch.equal(ops.adaln_modulate(x, row, row), want)


def test_few_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_register, "MOST_KNOWN", 3)
    for rows in range(1, 9):
        ops.gated_residual(torch.ones(1, rows, 2), torch.ones(1, rows, 2), torch.ones(1, 2))
        assert 1 <= len(_register._KNOWN) <= 3
