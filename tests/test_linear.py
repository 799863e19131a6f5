"""`nn.Linear` by tiles of AMX: as exact as PyTorch in float32, in every layout, and PyTorch where it does not fit."""

from __future__ import annotations

import copy
import functools
import platform
import resource
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2it import nn, ops
from d2it.devices import keep_freed_memory
from d2it.models.layers import Mlp
from d2it.nn import linear

tiles = pytest.mark.skipif(not linear.has_tiles(), reason="this CPU has no AMX")


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def layouts(m: int, k: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns contiguous, in both factors; of magnitudes over many powers of two."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    a *= torch.exp2(torch.randint(-20, 20, (m, 1)))
    b *= torch.exp2(torch.randint(-20, 20, (1, n)))
    return [(x, y) for x in (a, a.t().contiguous().t()) for y in (b, b.t().contiguous().t())]


@tiles
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 17), (64, 32, 64), (130, 1100, 70), (700, 513, 33)])
def test_a_product_is_as_exact_as_in_float32(shape: tuple[int, int, int]) -> None:
    """Blocks that are not whole, sums and rows in several pieces; a split of one bit less would be seen."""
    torch.manual_seed(0)
    for a, b in layouts(*shape):
        for bias in (None, torch.randn(shape[2])):
            out = torch.full((shape[0], shape[2]), float("nan"))
            assert torch.ops.d2it_C.matmul(a, b, bias, out)
            exact = a.double() @ b.double() + (0 if bias is None else bias.double())
            scale = exact.abs().amax(1, keepdim=True)  # rows differ by 2^40
            plain = a @ b + (0 if bias is None else bias)
            assert error(out / scale, exact / scale) <= 2 * error(plain / scale, exact / scale) + 3e-8


@tiles
def test_what_is_not_finite_stays_in_its_row() -> None:
    a, b = torch.randn(70, 64), torch.randn(64, 40)
    a[3, 5], a[40, 63] = float("nan"), float("inf")
    out = linear_product(a, b)
    assert not out[[3, 40]].isfinite().any()
    rest = [i for i in range(70) if i not in (3, 40)]
    assert error(out[rest], a[rest].double() @ b.double()) < 1e-6


def linear_product(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        return linear.product(a, b)


@tiles
def test_a_product_does_not_depend_on_the_number_of_threads() -> None:
    a, b = torch.randn(150, 700), torch.randn(700, 90)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(linear_product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def layers() -> tuple[nn.Linear, torch.nn.Linear, torch.nn.Linear, Tensor, Tensor]:
    """Ours, PyTorch's with its weights, the same in float64; an input that is large enough, and a cotangent."""
    torch.manual_seed(0)
    ours, plain = nn.Linear(256, 160), torch.nn.Linear(256, 160)
    plain.load_state_dict(ours.state_dict())
    exact = torch.nn.Linear(256, 160).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(2, 65, 256)
    assert x.numel() * 160 > linear.LEAST
    return ours, plain, exact, x, torch.randn(2, 65, 160)


def results(layer: torch.nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.to(layer.weight.dtype, copy=True).requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad.to(x.dtype))]


def test_the_layer_and_its_gradients() -> None:
    ours, plain, exact, x, grad = layers()
    for grads in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1)):
        found = [results(layer, x, grads) for layer in (ours, plain, exact)]
        for mine, other, true in zip(*found):
            assert error(mine, true) <= 3 * error(other, true) + 3e-8
    if linear.has_tiles():  # by tiles, indeed
        assert type(ours(x.requires_grad_()).grad_fn).__name__ == "_LinearBackward"


def test_where_tiles_do_not_fit_it_is_pytorchs() -> None:
    """Small, strided, 16 bits, autocast, compiled, forward mode, batched: the same bits."""
    ours, plain, _, x, grad = layers()
    with torch.no_grad():
        for given in (x[:, :2], x.transpose(0, 1)):
            assert torch.equal(ours(given), plain(given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), plain(x))
        assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(plain)(x))
        tangents = torch.func.jvp(ours, (x,), (x + 1,)), torch.func.jvp(plain, (x,), (x + 1,))
        torch.testing.assert_close(*tangents, rtol=0, atol=0)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), plain(x))
        torch.compiler.reset()


def test_second_derivatives() -> None:
    ours, _, exact, x, grad = layers()

    def curvature(layer: torch.nn.Linear) -> list[Tensor]:
        given = x.to(layer.weight.dtype, copy=True).requires_grad_()
        (dx,) = torch.autograd.grad(layer(given).square(), given, grad.to(given.dtype), create_graph=True)
        return list(torch.autograd.grad(dx, [given, layer.weight], dx.detach().roll(1)))

    for mine, true in zip(curvature(ours), curvature(exact)):
        assert error(mine, true) < 1e-6


def mlps() -> tuple[list[Any], Tensor, Tensor]:
    """The MLP of a block, the same of PyTorch's layers, and that in float64."""
    torch.manual_seed(0)
    ours = Mlp(96)
    plain = torch.nn.Sequential(torch.nn.Linear(96, 384), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(384, 96))
    for mine, other in ((ours.fc1, plain[0]), (ours.fc2, plain[2])):
        other.load_state_dict(mine.state_dict())
    return [ours, plain, copy.deepcopy(plain).double()], 3 * torch.randn(2, 131, 96), torch.randn(2, 131, 96)


def test_the_mlp_and_its_gradients() -> None:
    made, x, grad = mlps()
    found = []
    for mlp in made:
        given = x.to(next(mlp.parameters()).dtype, copy=True).requires_grad_()
        out = mlp(given)
        found.append([out.detach(), *torch.autograd.grad(out, [given, *mlp.parameters()], grad.to(given.dtype))])
    for mine, other, true in zip(*found):
        assert error(mine, true) <= 3 * error(other, true) + 3e-8


def test_second_derivatives_of_the_mlp() -> None:
    """Also in the bias whose gradient GELU gives."""
    made, x, grad = mlps()
    found = []
    for mlp in made:
        given = x.to(next(mlp.parameters()).dtype, copy=True).requires_grad_()
        parts = [given, *mlp.parameters()]
        firsts = torch.autograd.grad(mlp(given), parts, grad.to(given.dtype), create_graph=True)
        penalty = sum(first.square().mean() for first in firsts)
        found.append(torch.autograd.grad(penalty, parts[:-1]))
    for mine, other, true in zip(*found):
        assert error(mine, true) <= 3 * error(other, true) + 1e-7


def test_no_rows() -> None:
    """A batch without a fine token: empty results, gradients of zero."""
    made, _, _ = mlps()
    x = torch.empty(0, 96, requires_grad=True)
    out = made[0](x)
    assert out.shape == (0, 96)
    found = torch.autograd.grad(out, [x, *made[0].parameters()], torch.empty(0, 96))
    assert not any(gradient.any() for gradient in found)


def test_gelu_at_its_ends() -> None:
    """Far out it is 0 or x; the numbers of a last vector that is not whole; what is not a number stays there."""
    x = torch.cat([torch.linspace(-40, 40, 1001), torch.tensor([float("nan"), 1e30, -1e30, 0.0])])
    out, again, grad = (torch.full_like(x, float("nan")) for _ in range(3))
    torch.ops.d2it_C.gelu(x[None], out[None])
    grad.fill_(2.0)
    torch.ops.d2it_C.gelu_backward(grad[None], x[None], grad[None], again[None], None)
    assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0))
    exact = x[:1001].double().requires_grad_()
    true = torch.nn.functional.gelu(exact, approximate="tanh")
    torch.testing.assert_close(out[:1001].double(), true, rtol=1e-6, atol=1e-7)
    (slope,) = torch.autograd.grad(true, exact, torch.full_like(true, 2.0))
    torch.testing.assert_close(grad[:1001].double(), slope, rtol=1e-5, atol=1e-6)
    assert out[1001:].nan_to_num(7.0).tolist()[::3] == [7.0, 0.0]
    assert out[1002] == x[1002]
    assert grad[1001].isnan()


def test_the_mlp_keeps_gelus_input_alone() -> None:
    """Bytes kept for the backward: the input and the hidden layer, which PyTorch's keeps before and after GELU."""
    made, x, _ = mlps()
    kept = []
    for mlp in made[:2]:
        found: dict[int, int] = {}

        def pack(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = mlp(x.clone().requires_grad_())
        weights = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        kept.append(sum(size for at, size in found.items() if at not in weights) / (4 * x.numel()))
        del out
    assert kept == [1 + 4, 1 + 8]  # in rows of the model's width


def test_hooks_on_the_layer_after_gelu_are_called() -> None:
    made, x, _ = mlps()
    mlp = made[0]
    with torch.no_grad():
        plain = mlp(x)
        with mlp.fc2.register_forward_hook(lambda layer, given, out: out + 1):
            torch.testing.assert_close(mlp(x), plain + 1)
        mlp.fc2.forward = lambda given: given
        assert mlp(x).shape[-1] == mlp.fc2.in_features


def test_hooks_on_the_layer_before_gelu_are_called() -> None:
    """Forward and backward ones, and what stands in for the layer; its bias has its gradient all the same."""
    made, x, grad = mlps()
    ours, plain, _ = made
    seen = []
    for mlp, first in ((ours, ours.fc1), (plain, plain[0])):
        doubled = first.register_forward_hook(lambda layer, given, out: 2 * out)
        with doubled, first.register_full_backward_hook(lambda layer, given, out: seen.append(out[0].sum())):
            mlp(x.clone().requires_grad_()).backward(grad)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.fc1.bias.grad, plain[0].bias.grad, rtol=1e-4, atol=1e-4)
    ours.fc1.forward = lambda given: torch.zeros(2, 7, ours.fc2.in_features)
    assert ours(x).shape == (2, 7, 96)


@pytest.mark.parametrize("how", ["eager", "checkpointed", "compiled", "autocast"])
def test_the_way_of_a_gpu(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ops.gelu` gives the bias before it its gradient, whatever a step has around it; here on a CPU's backend."""
    made, x, grad = mlps()
    monkeypatch.setattr(linear, "_NATIVE_GELU", False)
    monkeypatch.setattr(linear, "_sums", lambda x: True)
    given = []

    def gelu(x: Tensor, bias: Tensor, gelu: Any = ops.gelu) -> Tensor:
        given.append(bias.shape)
        return gelu(x, bias)

    monkeypatch.setattr(ops, "gelu", gelu)
    run: Any = made[0]
    if how == "checkpointed":
        run = functools.partial(checkpoint, made[0], use_reentrant=False)
    elif how == "compiled":
        run = torch.compile(made[0], backend="aot_eager", fullgraph=True)
    found = []
    for function, mlp in ((run, made[0]), (made[1], made[1]), (made[2], made[2])):
        dtype = next(mlp.parameters()).dtype
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and dtype == torch.float32):
            out = function(leaf)
        found.append([out.detach(), *torch.autograd.grad(out, [leaf, *mlp.parameters()], grad.to(out.dtype))])
    torch.compiler.reset()
    assert given
    assert set(given) == {made[0].fc1.bias.shape}
    for mine, other, true in zip(*found):
        assert error(mine, true) <= 3 * error(other, true) + 3e-8


def test_the_mlp_under_transforms() -> None:
    """`torch.func`'s derivatives, of both kinds and one of the other, with respect to everything; mapped ones, too."""
    made, x, _ = mlps()
    found = []
    for mlp in made[:2]:
        names, leaves = [name for name, _ in mlp.named_parameters()], [x, *(p.detach() for p in mlp.parameters())]
        rng = torch.Generator().manual_seed(3)
        tangents = tuple(torch.randn(leaf.shape, generator=rng) for leaf in leaves)

        def loss(x: Tensor, *values: Tensor, mlp: Any = mlp, names: Any = names) -> Tensor:
            return torch.func.functional_call(mlp, dict(zip(names, values)), (x,)).square().mean()

        gradients = torch.func.grad(loss, argnums=tuple(range(5)))
        found.append(
            [
                *torch.func.jvp(loss, tuple(leaves), tangents),
                *gradients(*leaves),
                *torch.func.vmap(gradients, in_dims=(0, None, None, None, None))(*leaves),
                *torch.func.jvp(gradients, tuple(leaves), tangents)[1],
            ]
        )
    assert len(found[0]) == 17
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["autocast", "model"])
def test_the_mlp_in_bfloat16(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU is ours and gives fc1's bias its gradient; products and the gradients' dtypes are those of PyTorch's."""
    made, x, grad = mlps()
    given = []

    def gelu(x: Tensor, bias: Tensor, gelu: Any = ops.gelu) -> Tensor:
        given.append((x.dtype, bias.dtype))
        return gelu(x, bias)

    monkeypatch.setattr(ops, "gelu", gelu)
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    found, dtypes = [], []
    for mlp in (made[0].to(dtype), made[1].to(dtype), made[2]):
        leaf = x.to(next(mlp.parameters()).dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and leaf.dtype == torch.float32):
            out = mlp(leaf)
        grads = torch.autograd.grad(out, [leaf, *mlp.parameters()], grad.to(out.dtype))
        found.append([out.detach(), *grads])
        dtypes.append([part.dtype for part in found[-1]])
    assert given == ([(torch.bfloat16, dtype)] if linear._NATIVE_GELU else [])
    assert dtypes[0] == dtypes[1]
    for mine, other, true in zip(*found):
        assert error(mine, true) <= 1.2 * error(other, true) + 3e-8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """Tensors that are freed and made again take no page faults."""
    keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            held = [torch.ones(2 << 20) for _ in range(6)]  # 8 MiB each
            del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 2000  # one round of the six has 12,288 pages
