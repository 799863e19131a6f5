"""The gradients of the blocks' biases, which other operators form than the layers: the same whatever stands around."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from d2it.models import layers
from d2it.models.layers import Attention, Block, FinalLayer, run_blocks
from d2it.nn import WindowAttention
from d2it.ops import plan_tokens

BATCH, DIM = 2, 24


def blocks(packed: bool) -> tuple[torch.nn.ModuleDict, Callable[..., Tensor]]:
    """Two blocks with open gates and random biases and a final layer; and a function that runs them."""
    torch.manual_seed(0)
    made = [Block(DIM, WindowAttention(DIM, 2, 4) if packed else Attention(DIM, 2, "auto")) for _ in range(2)]
    network = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(made), "final": FinalLayer(DIM, 3)})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plan = plan_tokens(torch.tensor([[[0, 1], [1, 1]]]).repeat(BATCH, 1, 1), window=4)
    where = {"sample": plan.sample, "slots": plan.slots} if packed else {}
    return network, functools.partial(run_blocks, network["blocks"], network["final"], **where)


def gradients(network: torch.nn.Module, run: Callable[..., Tensor], packed: bool) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    dtype = next(network.parameters()).dtype
    shape = (BATCH * 16, DIM) if packed else (BATCH, 16, DIM)
    x, c = (torch.randn(*size, generator=rng).to(dtype) for size in (shape, (BATCH, DIM)))
    out = run(x, c)
    if packed:  # what lies behind the rows of tokens is no result
        out = out[: BATCH * 12]
    grad = torch.randn(out.shape, generator=rng).to(out.dtype)
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), grad)))


def compare(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == exact.keys()
    for name, true in exact.items():
        assert (found[name] - true).norm() <= tolerance * true.norm() + 1e-6, name


@pytest.fixture(params=[False, True], ids=["dense", "packed"])
def packed(request: pytest.FixtureRequest) -> Iterator[bool]:
    yield request.param
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["eager", "recomputed", "compiled", "hooks on modules", "hooks on layers", "replaced"])
def test_they_are_those_of_float64(how: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, run = blocks(packed)
    exact, run_exact = blocks(packed)
    exact.double()
    for block in exact["blocks"]:
        block.backend = "reference"  # every layer gives its own bias its gradient
    given = []
    called = layers.ops.gated_residual_modulate

    def noted(*args: Tensor, bias: Tensor | None, **kwargs: object) -> tuple[Tensor, Tensor]:
        given.append(bias is not None)
        return called(*args, bias=bias, **kwargs)

    monkeypatch.setattr(layers.ops, "gated_residual_modulate", noted)
    for block in network["blocks"]:
        block.recompute = how == "recomputed"
        if how == "compiled":
            block.compile(backend="aot_eager", fullgraph=True)
        hooked = {"hooks on modules": (block.attn, block.mlp), "hooks on layers": (block.attn.proj, block.mlp.fc2)}
        for module in hooked.get(how, ()):
            module.register_forward_hook(lambda module, args, out: out + 0)
        if how == "replaced":
            block.attn.proj = torch.nn.Sequential(block.attn.proj)
    found = gradients(network, run, packed)
    assert any(given) == (not how.startswith("hooks"))
    monkeypatch.undo()
    compare(
        {name.replace("proj.0.", "proj."): grad for name, grad in found.items()}, gradients(exact, run_exact, packed)
    )
