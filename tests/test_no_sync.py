"""A training step through the packing operators never makes the host wait for the device."""

import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import d2it.ops as ops

ROOT = Path(__file__).resolve().parents[1]
BATCH, SIDE, WINDOW, HEADS, WIDTH, CHANNELS = 4, 4, 4, 2, 64, 8


def parameters(device: str) -> dict[str, torch.Tensor]:
    shapes = {
        "embed": (WIDTH, CHANNELS),
        "condition": (4 * WIDTH, WIDTH),
        "qkv": (3 * WIDTH, WIDTH),
        "table": ((2 * WINDOW - 1) ** 2, HEADS),
        "out": (CHANNELS, WIDTH),
    }
    return {
        name: torch.nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.1)
        for name, shape in shapes.items()
    }


def step(
    weights: dict[str, torch.Tensor],
    grains: torch.Tensor,
    latents: torch.Tensor,
    c: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """RefineNet in small: plan, pack, modulate, attend, gate, merge, and all gradients. Returns the loss."""
    plan = ops.plan_tokens(grains, window=WINDOW, capacity=BATCH * (2 * SIDE) ** 2, backend=backend)
    cells = latents.flatten(2).transpose(1, 2)
    rows = ops.pack_tokens(cells, plan, backend=backend) @ weights["embed"].t()
    shift, scale, gate, _ = (c @ weights["condition"].t()).chunk(4, dim=1)
    normed = ops.adaln_modulate(rows, shift, scale, sample=plan.sample, backend=backend)
    qkv = (normed @ weights["qkv"].t()).unflatten(1, (3, HEADS, WIDTH // HEADS))
    bias = ops.relative_position_bias(weights["table"], WINDOW, backend=backend)
    branch = ops.window_attention_qkvpacked(qkv, bias, slots=plan.slots).flatten(1)
    rows = ops.gated_residual(rows, branch, gate, sample=plan.sample, backend=backend)
    merged = ops.unpack_tokens(rows @ weights["out"].t(), plan, cells, backend=backend)
    loss = (merged.float() - 1).square().mean()
    for weight, grad in zip(weights.values(), torch.autograd.grad(loss, list(weights.values()))):
        weight.grad = grad
    return loss.detach()


def arguments(device: str) -> tuple[torch.Tensor, ...]:
    grains = torch.randint(0, 2, (BATCH, SIDE, SIDE), device=device)
    latents = torch.randn(BATCH, CHANNELS, 2 * SIDE, 2 * SIDE, device=device, dtype=torch.bfloat16)
    return grains, latents, torch.randn(BATCH, WIDTH, device=device, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_does_not_synchronise() -> None:
    weights, given = parameters("cuda"), arguments("cuda")
    step(weights, *given)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(weights, *given) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.skipif("triton" not in ops.available_backends("plan_tokens"), reason="needs Triton, or its interpreter")
def test_the_host_reads_no_value() -> None:
    """The host's part of the step, on tensors that hold nothing: to read a value, or a shape from values, raises."""
    with FakeTensorMode():
        weights = parameters("cpu")
        loss = step(weights, *arguments("cpu"), backend="triton")
        assert all(weight.grad.shape == weight.shape for weight in weights.values())
        with pytest.raises(DataDependentOutputException):
            loss.item()
        # The reference judges the maps of CPU tensors at once, and that is noticed.
        with pytest.raises(DataDependentOutputException):
            step(weights, *arguments("cpu"), backend="reference")


def test_no_launcher_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher of kernels/ runs on tensors without storage, its kernels left out."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from d2it.kernels.common import COMPILE_CASES

    launched = []
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **kwargs: launched.append(self))
    for path in sorted((ROOT / "kernels").glob("*.py")):
        importlib.import_module(f"d2it.kernels.{path.stem}")
    for cases in COMPILE_CASES.values():
        for _, call in cases():
            call()
    assert len(launched) >= len(COMPILE_CASES) > 0
