"""A training step never makes the host wait for the device: the operators, and the whole step of the content stage."""

import collections
import contextlib
import importlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import d2it.ops as ops
from d2it.distributed import World
from d2it.models import DynamicVAEConfig
from d2it.ops import _dispatch
from d2it.training import adamw, config
from d2it.training.content import ContentStage
from d2it.training.latents import LatentData

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
        # The reference checks the values of CPU tensors, but tensors that hold none are no reason to fail.
        assert step(weights, *arguments("cpu"), backend="reference").shape == loss.shape


class OnlyViews(TorchDispatchMode):
    """Raises at an operation of PyTorch other than allocations and views: a launch that is kept would leave it out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allowed = func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.full)
        assert allowed, f"a launcher runs {func}"
        return func(*args, **(kwargs or {}))


def test_no_launcher_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher of kernels/ runs on tensors without storage, its kernels left out, and does nothing else."""
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
            with OnlyViews():
                call()
    assert len(launched) >= len(COMPILE_CASES) > 0


# ---- the content stage as it is trained and sampled ---------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes every d2it operator; raises at a copy from the host that waits.

    A copy to the host, or a value that is read, raises by itself on tensors that hold nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "d2it":
            self.calls.append((func.overloadpacket.__name__, args[-1]))
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if source.device.type == "cpu" and out.device.type != "cpu" and source.numel() and waits:
                raise AssertionError(f"{func} waits for {tuple(source.shape)} to be copied to the device")
        return out


@pytest.fixture
def gpu_without_storage(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose tensors hold nothing, where operators choose as they do on a GPU."""
    monkeypatch.setattr(_dispatch, "device_of", lambda args: "cuda")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    clip_grad = importlib.import_module("torch.nn.utils.clip_grad")
    monkeypatch.setattr(clip_grad, "_device_has_foreach_support", lambda device: True)
    optimizer = importlib.import_module("torch.optim.optimizer")
    supported = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setitem(adamw.PREFERENCE, "meta", "triton")  # its kernels are left out
    for name in ("square_sum_kernel", "adamw_kernel"):
        monkeypatch.setattr(importlib.import_module("d2it.kernels.adamw"), name, collections.defaultdict(Mock))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])
    return torch.device("meta")


def content_stage(device: torch.device, weights: str = "float32") -> ContentStage:
    chosen = config.Config()  # not from text, which takes a package that the machine with the GPU may lack
    chosen.data.path, chosen.data.num_classes = "unused", 10
    chosen.content.preset, chosen.content.batch_size, chosen.content.clip = "tiny", 4, 1.0
    chosen.content.weights = weights
    data = LatentData.of_vae(DynamicVAEConfig(), (64, 64), images=4)
    stage = ContentStage(chosen, chosen.content, World(0, 1, 1, device), data, None)
    assert len(stage.learners) == 1
    return stage


def steps_of(stage: ContentStage, count: int) -> None:
    (learner,) = stage.learners
    batch = stage.synthetic(4, stage.world.device)
    for step in range(count):
        learner.backward(batch, last=True)
        learner.update(step)


@pytest.mark.skipif("triton" not in ops.available_backends("plan_tokens"), reason="needs Triton, or its interpreter")
def test_a_step_of_the_content_stage_reads_no_value(gpu_without_storage: torch.device) -> None:
    """Batch, noise, plan, both nets, loss, gradients, clipping, AdamW, average: on tensors that hold nothing."""
    stage = content_stage(gpu_without_storage)
    with Watch() as watch:
        steps_of(stage, 2)
    assert stage.learners[0].optimizer.backend == "triton"
    ran = {name for name, backend in watch.calls if backend == "triton"}
    assert ran >= {"plan_tokens", "pack_tokens", "unpack_tokens"}
    assert ran >= {"adaln_modulate", "adaln_modulate_backward"}
    assert ran >= {"gated_residual_modulate", "gated_residual_modulate_backward"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=gpu_without_storage).sum().item()
    with pytest.raises(AssertionError, match="waits for"), Watch():
        torch.zeros(3).to(gpu_without_storage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_step_of_the_content_stage_does_not_synchronise(weights: str) -> None:
    stage = content_stage(torch.device("cuda"), weights)
    steps_of(stage, 1)  # compiles
    torch.cuda.synchronize()
    batch = stage.synthetic(4, stage.world.device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            stage.learners[0].backward(batch, last=True)
            stage.learners[0].update(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_capacity_of_a_batch_holds_its_tokens_in_few_sizes() -> None:
    stage = content_stage(torch.device("cpu"))
    sizes = set()
    for seed in range(30):
        torch.manual_seed(seed)
        grains = (torch.rand(4, 4, 4) < torch.rand(())).long()
        batch = stage.prepare({"grain_map": grains})
        plan = stage.network.make_plan(grains, batch["capacity"])  # raises where it does not fit
        assert plan.count == batch["fine"].rows == 4 * int(grains.sum())
        sizes.add(batch["capacity"])
    assert len(sizes) <= 16  # capacity_step is 1/16 of all cells
    assert max(sizes) - min(sizes) >= 64  # and it follows the tokens
