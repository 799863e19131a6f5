"""Operators under torch.compile, torch.export, and on meta and fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from d2it import ops
from tests.test_ops_errors import CALLS

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
Q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
X = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(2))
GRAINS = torch.tensor([[[1, 0], [2, 1]]])
EDGES = torch.tensor([0, 2, 3], dtype=torch.int32)

CHANGING: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "scale": (lambda s: ops.window_attention(Q, Q, Q, scale=s), [(0.1,), (0.2,), (0.3,), (1,)]),
    "sigma": (lambda s: ops.kde_entropy(IMAGES, sigma=s), [(0.01,), (0.02,), (0.03,)]),
    "value_range": (lambda a, b: ops.kde_entropy(IMAGES, value_range=(a, b)), [(-1.0, 1.0), (-1.5, 1.5), (-1.2, 1.1)]),
    "num_bins": (lambda n: ops.kde_entropy(IMAGES, num_bins=n), [(256,), (200,), (100,)]),
    "region_size": (lambda n: ops.kde_entropy(IMAGES, n, num_bins=64), [(16,), (8,), (32,)]),
    "normalize": (lambda b: ops.kde_entropy(IMAGES, normalize=b), [(True,), (False,)]),
    "thresholds": (lambda t: ops.encode_grains(IMAGES, [t]), [(1.0,), (2.0,), (3.0,)]),
    "eps": (lambda e: ops.adaln_modulate(X, X[:, 0], X[:, 1], eps=e), [(1e-6,), (1e-5,), (1e-4,)]),
    "min_grain": (lambda n: ops.plan_tokens(GRAINS, window=2, min_grain=n), [(1,), (2,), (0,)]),
    "cells_per_region": (lambda n: ops.plan_tokens(GRAINS, cells_per_region=n, window=2), [(2,), (4,), (6,)]),
    "window": (lambda n: ops.plan_tokens(GRAINS, cells_per_region=6, window=n), [(2,), (3,), (4,)]),
    "capacity": (lambda n: ops.pack_tokens(X, ops.plan_tokens(GRAINS, capacity=n)), [(12,), (13,), (16,)]),
    "size": (lambda n: ops.slots_from_cu_seqlens(EDGES, n), [(2,), (3,), (4,)]),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CHANGING)
def test_one_graph_whatever_number_changes(name: str, dynamic: bool | None) -> None:
    function, calls = CHANGING[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for call in calls:
        got, want = (_pytree.tree_leaves(f(*call)) for f in (compiled, function))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_change_in_one_graph(dynamic: bool | None) -> None:
    def function(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        plan = ops.plan_from_mask(mask, window=2)
        rows = ops.adaln_modulate(ops.pack_tokens(x, plan), weight, weight, sample=plan.sample)
        out = ops.window_attention(*(rows.unflatten(1, (2, 4)),) * 3, slots=plan.slots).flatten(1)
        return ops.unpack_tokens(ops.gated_residual(rows, out, weight, sample=plan.sample), plan, x)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, side in ((2, 4), (3, 4), (4, 6)):
        x = torch.randn(batch, side * side, 8, requires_grad=True)
        weight, mask = torch.randn(batch, 8), torch.rand(batch, side, side) < 0.5
        got, want = compiled(x, weight, mask), function(x, weight, mask)
        cotangent = torch.randn_like(want)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
        torch.testing.assert_close(*gradients)


def test_a_plan_goes_into_a_graph_and_out_of_an_exported_program() -> None:
    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor, plan: ops.TokenPlan) -> tuple[Tensor, ops.TokenPlan]:
            return ops.window_attention_qkvpacked(qkv, slots=plan.slots), plan

    plan = ops.plan_tokens(GRAINS, window=2, capacity=12)
    qkv = torch.randn(12, 3, 1, 8)
    want = ops.window_attention_qkvpacked(qkv, slots=plan.slots)
    torch._dynamo.reset()
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(qkv, plan)
    exported = torch.export.export(Attention(), (qkv, plan)).module()(qkv, plan)
    for out, same in (compiled, exported):
        torch.testing.assert_close(out, want)
        assert torch.equal(same.index, plan.index)


@pytest.mark.parametrize("backend", [b for b in ops.available_backends("adaln_modulate") if b != "cuda"])
def test_modulation_is_exported_with_a_batch_of_any_size(backend: str) -> None:
    class Modulation(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gated = ops.gated_residual(x, x, weight, backend=backend)
            total, out = ops.gated_residual_modulate(x, gated, weight, weight, weight, backend=backend)
            return total, out, ops.adaln_modulate(x, weight, weight, backend=backend)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(3, 4, 8, device=device), torch.randn(3, 8, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Modulation(), (x[:2], weight[:2]), dynamic_shapes=({0: batch}, {0: batch}))
    for size in (1, 3):
        for got, want in zip(program.module()(x[:size], weight[:size]), Modulation()(x[:size], weight[:size])):
            assert torch.equal(got, want)


def on(make: Callable[[Tensor], Tensor], call: dict[str, Any]) -> dict[str, Any]:
    return {name: _pytree.tree_map_only(Tensor, make, value) for name, value in call.items()}


@pytest.mark.parametrize("op", sorted(CALLS))
def test_meta_and_fake_tensors_give_shapes(op: str) -> None:
    function, call = getattr(ops, op), CALLS[op]
    want = [(t.shape, t.dtype) for t in _pytree.tree_leaves(function(**call))]
    meta = _pytree.tree_leaves(function(**on(lambda t: t.to("meta"), call)))
    assert [(t.shape, t.dtype) for t in meta] == want
    assert {t.device.type for t in meta} == {"meta"}
    with FakeTensorMode() as mode:
        fake = _pytree.tree_leaves(function(**on(mode.from_tensor, call)))
    assert [(t.shape, t.dtype) for t in fake] == want
