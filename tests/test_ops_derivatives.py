"""Every derivative of every operator on every backend: of first and second order, in reverse and in forward mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from d2it import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRAINS = torch.randint(0, 2, (1, 2, 2), generator=torch.Generator().manual_seed(3)).to(DEVICE)
PLAN = ops.plan_tokens(GRAINS, window=2, capacity=14)
SAMPLE = torch.tensor([0, 0, 1, 1, 1, 0], device=DEVICE)
SEGMENTS = torch.tensor([[0, 0, 1, 1]], device=DEVICE)

# The operator as a function of its differentiable tensors and a backend, and such tensors.
CASES: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "kde_entropy": (
        "kde_entropy",
        lambda x, **kw: ops.kde_entropy(x.tanh(), 4, num_bins=16, sigma=0.2, **kw),
        (rand(1, 3, 4, 8),),
    ),
    "encode_grains": (
        "encode_grains",
        lambda x, **kw: ops.encode_grains(x.tanh(), [1.0], 4, num_bins=16, sigma=0.2, **kw)[1],
        (rand(1, 3, 4, 8),),
    ),
    "neighbor_copy": (
        "neighbor_copy",
        lambda a, b, **kw: ops.neighbor_copy([a, b], GRAINS, **kw),
        (rand(1, 2, 2, 2), rand(1, 2, 4, 4)),
    ),
    "pack_tokens": ("pack_tokens", lambda x, **kw: ops.pack_tokens(x, PLAN, **kw), (rand(1, 16, 3),)),
    "unpack_tokens": (
        "unpack_tokens",
        lambda p, b, **kw: ops.unpack_tokens(p, PLAN, b, **kw),
        (rand(14, 3), rand(1, 16, 3)),
    ),
    "unpack_tokens without a base": (
        "unpack_tokens",
        lambda p, **kw: ops.unpack_tokens(p, PLAN, **kw),
        (rand(14, 3),),
    ),
    "window_attention": (
        "window_attention",
        lambda q, k, v, b, **kw: ops.window_attention(q, k, v, b, segment_ids=SEGMENTS, **kw),
        (*(rand(2, 4, 2, 8, seed=i) for i in range(3)), rand(2, 4, 4)),
    ),
    "window_attention_qkvpacked": (
        "window_attention_qkvpacked",
        lambda x, b, **kw: ops.window_attention_qkvpacked(x, b, slots=PLAN.slots, **kw),
        (rand(14, 3, 2, 8), rand(4, 4)),
    ),
    "relative_position_bias": (
        "relative_position_bias",
        lambda t, **kw: ops.relative_position_bias(t, 2, **kw),
        (rand(9, 2),),
    ),
    "adaln_modulate": (
        "adaln_modulate",
        lambda x, shift, scale, **kw: ops.adaln_modulate(x, shift, scale, sample=SAMPLE, **kw),
        (rand(6, 8), rand(2, 8), rand(2, 8, seed=1)),
    ),
    "gated_residual": (
        "gated_residual",
        lambda x, branch, gate, bias, **kw: ops.gated_residual(
            x, branch + bias.detach(), gate, bias=bias, sample=SAMPLE, **kw
        ),
        (rand(6, 8), rand(6, 8, seed=1), rand(2, 8), rand(8, seed=4)),
    ),
    "gelu": (
        "gelu",
        lambda x, bias, **kw: ops.gelu(x + bias.detach(), bias, **kw),
        (rand(6, 8), rand(8, seed=1)),
    ),
    "gated_residual_modulate": (
        "gated_residual_modulate",
        lambda x, branch, gate, shift, scale, bias, **kw: torch.cat(
            ops.gated_residual_modulate(x, branch + bias.detach(), gate, shift, scale, bias=bias, sample=SAMPLE, **kw)
        ),
        (rand(6, 8), rand(6, 8, seed=1), rand(2, 8), rand(2, 8, seed=2), rand(2, 8, seed=3), rand(8, seed=4)),
    ),
}
GRID = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name, (op, _, _) in CASES.items()
    for backend in ops.available_backends(op)
    if DEVICE == "cpu" or backend != "cpu"
]


def made(name: str, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., Tensor]]:
    """The function on `backend`, its float32 inputs, and the same function on the reference, in float64."""
    _, function, inputs = CASES[name]
    return (
        lambda *x: function(*x, backend=backend),
        tuple(x.float().to(DEVICE) for x in inputs),
        lambda *x: function(*x, backend="reference"),
    )


def close(got: Any, want: Any) -> None:
    got, want = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want):
        scale = float(w.abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(g.double(), w.double(), rtol=2e-3, atol=2e-4 * max(scale, 1e-2))


def cotangent_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    shape = function(*inputs).shape
    return rand(*shape, seed=7).float().to(DEVICE)


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(rand(*x.shape, seed=9 + i).float().to(DEVICE) for i, x in enumerate(inputs))


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_func_grad(name: str, backend: str) -> None:
    function, inputs, reference = made(name, backend)
    cotangent = cotangent_of(function, inputs)
    which = tuple(range(len(inputs)))
    got = torch.func.grad(lambda *x: (function(*x) * cotangent).sum(), which)(*inputs)
    close(got, torch.func.grad(lambda *x: (reference(*x) * cotangent).sum(), which)(*double(inputs)))


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_vjp_called_after_its_transform_has_ended(name: str, backend: str) -> None:
    function, inputs, reference = made(name, backend)
    cotangent = cotangent_of(function, inputs)
    got, want = torch.func.vjp(function, *inputs)[1], torch.func.vjp(reference, *double(inputs))[1]
    close(got(cotangent), want(cotangent.double()))


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_jvp(name: str, backend: str) -> None:
    function, inputs, reference = made(name, backend)
    tangents = tangents_of(inputs)
    want = torch.func.jvp(reference, double(inputs), double(tangents))
    assert want[1].abs().max() > 0
    close(torch.func.jvp(function, inputs, tangents), want)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]
        close(tuple(forward_ad.unpack_dual(function(*duals))), want)


@pytest.mark.parametrize(("name", "backend"), GRID)
@pytest.mark.parametrize("argument", [0, -1])
def test_jvp_in_one_argument(name: str, backend: str, argument: int) -> None:
    function, inputs, reference = made(name, backend)
    at = argument % len(inputs)
    tangent = tangents_of(inputs)[at]

    def of_one(f: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(*given[:at], x, *given[at + 1 :])

    want = torch.func.jvp(of_one(reference, double(inputs)), (inputs[at].double(),), (tangent.double(),))
    close(torch.func.jvp(of_one(function, inputs), (inputs[at],), (tangent,)), want)


@pytest.mark.parametrize(("name", "backend"), GRID)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(name: str, backend: str, dim: int) -> None:
    function, inputs, _ = made(name, backend)
    batches = [tuple(x + i for x in inputs) for i in range(3)]
    stacked = [torch.stack(parts, dim) for parts in zip(*batches)]
    got = torch.func.vmap(function, in_dims=dim)(*stacked)
    close(got, torch.stack([function(*batch) for batch in batches]))
    first_only = torch.func.vmap(function, in_dims=(dim, *(None,) * (len(inputs) - 1)))(stacked[0], *inputs[1:])
    close(first_only, torch.stack([function(batch[0], *inputs[1:]) for batch in batches]))


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_gradients_of_samples(name: str, backend: str) -> None:
    """vmap of grad: what per-sample gradients are made of."""
    function, inputs, _ = made(name, backend)
    cotangent = cotangent_of(function, inputs)
    gradient = torch.func.grad(lambda *x: (function(*x) * cotangent).sum())
    batches = [tuple(x + i for x in inputs) for i in range(2)]
    got = torch.func.vmap(gradient)(*(torch.stack(parts) for parts in zip(*batches)))
    close(got, torch.stack([gradient(*batch) for batch in batches]))


def penalty(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Second derivatives: of a penalty on the gradients, whose cotangents depend on the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = (function(*leaves).sin() * cotangent).sum() + sum((x**3).sum() for x in leaves)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_second_derivatives(name: str, backend: str) -> None:
    function, inputs, reference = made(name, backend)
    cotangent = cotangent_of(function, inputs)
    close(penalty(function, inputs, cotangent), penalty(reference, double(inputs), cotangent.double()))


@pytest.mark.parametrize(("name", "backend"), GRID)
def test_second_derivatives_under_a_fixed_cotangent(name: str, backend: str) -> None:
    function, inputs, reference = made(name, backend)
    cotangent = cotangent_of(function, inputs)

    def second(f: Callable[..., Tensor], given: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        gradients = torch.autograd.grad(f(*leaves), leaves, cotangent, create_graph=True)
        total = sum((g**2).sum() for g in gradients)
        if not total.requires_grad:  # of a copy: its gradient depends on the cotangent alone
            return [torch.zeros_like(x) for x in leaves]
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]

    close(second(function, inputs, cotangent), second(reference, double(inputs), cotangent.double()))


@pytest.mark.parametrize(("name", "backend"), GRID)
@pytest.mark.parametrize("outer", ["forward over reverse", "reverse over forward"])
def test_mixed_second_derivatives(name: str, backend: str, outer: str) -> None:
    function, inputs, reference = made(name, backend)
    cotangent, tangents = cotangent_of(function, inputs), tangents_of(inputs)

    def product(f: Callable[..., Tensor], x: tuple, t: tuple, c: Tensor) -> Any:
        def loss(*y: Tensor) -> Tensor:
            return (f(*y).sin() * c).sum()

        which = tuple(range(len(x)))
        if outer == "forward over reverse":
            return torch.func.jvp(torch.func.grad(loss, which), x, t)[1]
        return torch.func.grad(lambda *y: torch.func.jvp(loss, y, t)[1], which)(*x)

    close(
        product(function, inputs, tangents, cotangent), product(reference, double(inputs), double(tangents), cotangent)
    )


@pytest.mark.parametrize("name", CASES)
def test_both_orders_of_mixed_second_derivatives_agree_in_the_reference(name: str) -> None:
    _, inputs, reference = made(name, "reference")
    inputs, cotangent = double(inputs), cotangent_of(reference, double(inputs)).double()
    which, tangents = tuple(range(len(inputs))), double(tangents_of(inputs))

    def loss(*y: Tensor) -> Tensor:
        return (reference(*y).sin() * cotangent).sum()

    first = torch.func.jvp(torch.func.grad(loss, which), inputs, tangents)[1]
    close(first, torch.func.grad(lambda *y: torch.func.jvp(loss, y, tangents)[1], which)(*inputs))


@pytest.mark.parametrize("backend", ops.available_backends("adaln_modulate"))
def test_third_derivative(backend: str) -> None:
    if DEVICE == "cuda" and backend == "cpu":
        pytest.skip("the tensors lie on the GPU")
    function, inputs, reference = made("adaln_modulate", backend)
    cotangent = cotangent_of(function, inputs)

    def third(f: Callable[..., Tensor], x: tuple, c: Tensor) -> Tensor:
        leaves = [y.detach().requires_grad_() for y in x]
        value = (f(*leaves).sin() * c).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaves[0], create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    close(third(function, inputs, cotangent), third(reference, double(inputs), cotangent.double()))


@pytest.mark.parametrize("backend", ops.available_backends("adaln_modulate"))
def test_vmap_over_no_element(backend: str) -> None:
    if DEVICE == "cuda" and backend == "cpu":
        pytest.skip("the tensors lie on the GPU")
    function, inputs, _ = made("adaln_modulate", backend)
    empty = [x.new_zeros((0, *x.shape)) for x in inputs]
    assert torch.func.vmap(function)(*empty).shape == (0, 6, 8)
