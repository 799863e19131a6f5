"""Every differentiable operator on every backend, in every dtype and under every mode of autograd.

Errors are judged as the correctness suite of kernels judges them: against float64 on the same rounded inputs, by the
error that plain PyTorch makes in the same dtype under the same mode.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2it import ops
from tests.test_ops_derivatives import CASES, DEVICE, GRID, penalty, rand, tangents_of

INTERPRETED = DEVICE == "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]


def backward(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


def func_grad(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    return torch.func.grad(lambda *x: (function(*x) * cotangent).sum(), tuple(range(len(inputs))))(*inputs)


def per_sample(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    """vmap, and vmap of grad, over three batches."""
    batches = [torch.stack((x, x / 2, -x)) for x in inputs]
    gradient = torch.func.grad(lambda *x: (function(*x) * cotangent).sum(), tuple(range(len(inputs))))
    return (torch.func.vmap(function)(*batches), *torch.func.vmap(gradient)(*batches))


def jvp(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    return torch.func.jvp(function, inputs, tuple(t.to(x.dtype) for t, x in zip(tangents_of(inputs), inputs)))


def checkpointed(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    return backward(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs, cotangent)


def autocast(function: Function, inputs: Tensors, cotangent: Tensor) -> Tensors:
    """Under autocast to the inputs' dtype: an operator computes in what it is given, so nothing may change."""
    if inputs[0].dtype not in (torch.float16, torch.bfloat16):
        return backward(function, inputs, cotangent)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast(DEVICE, inputs[0].dtype):
        out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


MODES = {f.__name__: f for f in (backward, func_grad, per_sample, jvp, checkpointed, autocast, penalty)}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "backend"), GRID)
def test_every_mode_in_every_dtype(name: str, backend: str, dtype: torch.dtype) -> None:
    _, case, exact = CASES[name]
    inputs = tuple(x.to(DEVICE, dtype) for x in exact)

    def fast(*x: Tensor) -> Tensor:
        return case(*x, backend=backend)

    def reference(*x: Tensor) -> Tensor:
        return case(*x, backend="reference")

    refusal = ""
    try:
        result = fast(*inputs)
    except ValueError as error:
        refusal = str(error)
    if refusal:  # by name, and never computed by another backend
        assert f"backend='{backend}' cannot run" in refusal
        assert backend != "reference"
        assert backend == "cuda" or dtype in (torch.float64, torch.bfloat16)
        return
    modes = MODES
    if INTERPRETED and backend == "triton" and "attention" in name:  # seconds each; test_ops_derivatives has the others
        modes = {mode: MODES[mode] for mode in ("backward", "jvp", "checkpointed", "autocast")}
    cotangent = rand(*result.shape, seed=7).to(DEVICE, result.dtype)
    kept = {}
    for mode, run in modes.items():
        got = kept[mode] = run(fast, inputs, cotangent)
        want = run(reference, tuple(x.double() for x in inputs), cotangent.double())
        eager = run(reference, inputs, cotangent)
        assert len(got) == len(want) > 0
        for i, (g, w, e) in enumerate(zip(got, want, eager)):
            assert g.dtype == e.dtype, f"{mode}: result {i} is {g.dtype}, the reference's {e.dtype}"
            error = (g.double() - w).abs().max().item()
            allowed = 3 * (e.double() - w).abs().max().item() + 4 * torch.finfo(g.dtype).eps * w.abs().max().item()
            assert error <= allowed, f"{mode}: result {i} is off by {error:.3e}, allowed {allowed:.3e}"
    for mode in ("checkpointed", "autocast"):
        for i, (a, b) in enumerate(zip(kept[mode], kept["backward"])):
            assert torch.equal(a, b), f"{mode} changes bits of result {i}"


ATTENTION = [backend for backend in ops.available_backends("window_attention") if DEVICE == "cpu" or backend != "cpu"]


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_float16_under_autocast(backend: str, dtype: torch.dtype) -> None:
    """Scores of -320,000: to float16 they would be -inf, and each token would see none."""
    q = torch.full((1, 2, 1, 16), 141.0, device=DEVICE)
    if ops.why_not("window_attention", backend, *(q.to(dtype),) * 3, None):
        pytest.skip("not on this machine")
    v = torch.tensor([1.0, 2.0], device=DEVICE).view(1, 2, 1, 1).expand(1, 2, 1, 16)
    segments = torch.tensor([[0, 1]], device=DEVICE)
    q.requires_grad_()
    with torch.autocast(DEVICE, dtype):
        out = ops.window_attention(q, -q, v, scale=1.0, segment_ids=segments, backend=backend)
    (gradient,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert out[0, :, 0, 0].tolist() == [1, 2]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(4, 16), (18, 96)])  # windows that share a tile, and larger ones
def test_a_bias_of_the_most_negative_number_masks(backend: str, dtype: torch.dtype, n: int, width: int) -> None:
    """As models write a mask that is not -inf. Where it is all of a row, its keys weigh the same."""
    q, k, v = (rand(2, n, 1, width, seed=i).to(DEVICE, dtype).requires_grad_() for i in range(3))
    if ops.why_not("window_attention", backend, q, k, v, None):
        pytest.skip("not on this machine")
    least, half = torch.finfo(torch.float32).min, n // 2
    bias = torch.zeros(1, 1, n, n, device=DEVICE)
    bias[..., half:] = least
    lost = backend != "triton"  # to base-2 logarithms such a number is -inf, and the row is one without keys
    if lost:
        bias[..., -1, :] = least
    out = ops.window_attention(q, k, v, bias, backend=backend)
    cotangent = rand(*out.shape, seed=5).to(DEVICE, dtype)
    gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(n, n, dtype=torch.float64, device=DEVICE)
    mask[:, half:] = float("-inf")
    if lost:
        mask[-1] = 0
    scores = torch.einsum("wqhd,wkhd->whqk", leaves[0], leaves[1]) * width**-0.5
    # Beside such a number a score is lost, not its derivative.
    last = (torch.arange(n, device=DEVICE)[:, None] == n - 1) & lost
    scores = torch.where(last, scores - scores.detach(), scores) + mask
    want = torch.einsum("whqk,wkhd->wqhd", scores.softmax(-1), leaves[2])
    wanted = torch.autograd.grad(want, leaves, cotangent.double())
    for got, exact in zip((out, *gradients), (want, *wanted)):
        torch.testing.assert_close(got.double(), exact, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=2e-3)
