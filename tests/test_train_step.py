"""What a training step computes with: compilation, precisions, counted work, optional libraries; what it reports."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from d2it import ops
from d2it.devices import Energy
from d2it.diffusion import DiffusionConfig
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DynamicVAE, DynamicVAEConfig, VAELoss, VAELossConfig, layers
from d2it.models.layers import FinalLayer, Modulation
from d2it.ops._dispatch import PREFERENCE
from d2it.training.config import Config, RunConfig, StageConfig
from d2it.training.content import ContentStage
from d2it.training.ema import Ema, snapshot_folder
from d2it.training.grain import GrainStage
from d2it.training.latents import LatentData, LatentStage
from d2it.training.learner import Batch
from d2it.training.meters import Meters
from d2it.training.stage import to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORLD = World(0, 1, 1, DEVICE)


def stage(
    kind: type[LatentStage] = ContentStage,
    preset: str = "tiny",
    diffusion: DiffusionConfig | None = None,
    **settings: Any,
) -> Any:
    """A small stage with open gates."""
    config = Config()
    config.diffusion = diffusion or config.diffusion
    config.data.num_classes = 5
    chosen = getattr(config, kind.name)
    chosen.preset, chosen.batch_size = preset, 4
    for key, value in settings.items():
        setattr(chosen, key, value)
    data = LatentData.of_vae(DynamicVAEConfig(), (64, 64), images=8)
    torch.manual_seed(0)
    made = kind(config, chosen, WORLD, data, None)
    assert len(made.learners) == 1
    for part in made.network.modules():
        if isinstance(part, Modulation | FinalLayer):
            torch.nn.init.normal_(part.linear.weight, std=0.05)
    return made


def batch(made: Any, fine: int | None = None) -> Batch:
    """`fine`: regions of each image, the first ones."""
    drawn = made.synthetic(4, torch.device("cpu"))
    if fine is not None:
        drawn["grain_map"] = (torch.arange(16) < fine).long().reshape(1, 4, 4).expand(4, 4, 4).contiguous()
    drawn = made.prepare(drawn)
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in drawn.items()}


def step(made: Any, given: Batch) -> torch.Tensor:
    torch.manual_seed(1)
    learner = made.learners[0]
    logs, _ = learner.backward(given, last=True)
    learner.update(0)
    return logs[f"{made.name}/loss"].detach()


# ---- compilation


def compiled_by(backend: str) -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance(force_backend=backend):
        yield
    torch.compiler.reset()


@pytest.fixture
def aot_eager() -> Iterator[None]:
    yield from compiled_by("aot_eager")


@pytest.fixture
def eager() -> Iterator[None]:
    yield from compiled_by("eager")


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_blocks_compile_once_for_all_packed_lengths(aot_eager: None, recomputed: bool) -> None:
    """One graph for the dense blocks and one for RefineNet's, made in the first step; no break, no other result."""
    made = stage(compile=True, activation_checkpointing=recomputed)
    plain = stage()
    counters = torch._dynamo.utils.counters
    for i, fine in enumerate((5, 16, 0, 1, 9, 12, 3)):
        given = batch(made, fine)
        torch.testing.assert_close(step(made, given), step(plain, given), rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2, f"in step {i}, with {fine} fine regions"
    assert not counters["graph_break"]


def test_stages_of_one_process_share_the_compiler(aot_eager: None) -> None:
    """Two stages, and previews of other shapes between their steps, which are not compiled."""
    counters = torch._dynamo.utils.counters
    for kind, graphs in ((GrainStage, 1), (ContentStage, 3)):
        made = stage(kind, compile=True)
        made.vae = None
        step(made, batch(made))
        made.preview_batch = lambda: (
            torch.ones(3, 4, 4, dtype=torch.long),
            torch.zeros(3, dtype=torch.long),
            [1, 2, 3],
        )
        made.config.sample.steps = made.config.sample.grain_steps = 2
        made.config.sample.images = 3
        if kind is GrainStage:
            published(made)
        step(made, batch(made))
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def published(made: Any) -> list[str]:
    """The names of the pictures."""
    named: list[str] = []
    made.learners[0].share = lambda folder: None
    made.publish(types.SimpleNamespace(picture=lambda name, picture, step: named.append(name)), 1)
    return named


@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_the_vae_runs_level_by_level(eager: None, how: str) -> None:
    """Compiled or recomputed, the adversarial weight from the gradient at the last layer: the same gradients."""
    torch.manual_seed(0)
    small = {"downsampling": (4, 8), "encoder_mult": (1, 1, 2, 2), "decoder_mult": (1, 1, 2), "residual_blocks": 1}
    vae = DynamicVAE.from_preset("tiny", channels=8, **small)
    criterion = VAELoss(VAELossConfig(disc_start=0, disc_channels=8, disc_layers=1))
    images = torch.rand(2, 3, 64, 64) * 2 - 1

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        output = vae(images)
        sizes = vae.config.code_sizes
        terms = criterion.generator(images, output, step=0, last_layer=vae.last_layer, code_sizes=sizes)
        return [terms["loss"], *torch.autograd.grad(terms["loss"], list(vae.parameters()))]

    plain = gradients()
    if how == "compiled":
        vae.compile_blocks()
    else:
        vae.gradient_checkpointing = True
    for _ in range(2):
        for ours, exact in zip(gradients(), plain):
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graphs > 0) == (how == "compiled")
    assert not torch._dynamo.utils.counters["graph_break"]


# ---- precision


class Dtypes(TorchDispatchMode):
    """The lowest precision in which each operation's floating-point arguments came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.setdefault(func.name(), set()).update(x.dtype for x in tensors if x.is_floating_point())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [GrainStage, ContentStage])
def test_bf16_stays_within_matrix_products(kind: type[LatentStage]) -> None:
    """Softmax, norms, exponentials and the loss see float32 alone; weights, moments, average, gradients are float32."""
    made = stage(kind, precision="bf16")
    learner = made.learners[0]
    modulated: list[torch.dtype] = []
    for part in made.network.modules():
        if isinstance(part, Modulation):
            part.register_forward_hook(lambda part, given, out: modulated.extend(x.dtype for x in (*given, *out)))
    with Dtypes() as dtypes, sdpa_kernel(SDPBackend.MATH):
        learner.backward(batch(made), last=True)
    low = {name.split("::")[1].split(".")[0] for name, seen in dtypes.seen.items() if torch.bfloat16 in seen}
    assert {"mm", "addmm"} & low  # bf16 was on
    sensitive = {
        "_softmax",
        "_log_softmax",
        "native_layer_norm",
        "var",
        "var_mean",
        "rsqrt",
        "exp",
        "log",
        "pow",
        "mean",
    }
    sensitive |= {"_softmax_backward_data", "native_layer_norm_backward"}
    assert not low & (sensitive | {"special_ndtr", "nll_loss2d_forward", "silu", "cos", "sin"})
    assert set(modulated) == {torch.float32}
    states = [t for p in learner.parameters for t in (p, p.grad)] + list(learner.ema.shadow.values())
    assert {t.dtype for t in states} == {torch.float32}
    learner.update(0)
    moments = [t for state in learner.optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in moments} == {torch.float32}


def test_average_leaves_frozen_weights_and_buffers_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    module[2].requires_grad_(False)
    ema = Ema(module, 0.5)
    assert sorted(ema.shadow) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    before = {name: t.clone() for name, t in ema.shadow.items()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    ema.update()
    for name, t in ema.shadow.items():
        torch.testing.assert_close(t, before[name] + 0.5)


def test_shared_weights_are_the_averages(tmp_path: Path) -> None:
    made = stage(GrainStage, snapshot_every=1, ema=0.5, lr=1e-2)
    learner = made.learners[0]
    for i in range(2):
        learner.backward(batch(made), last=True)
        learner.update(i)
    trained = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    names = {id(p): name for name, p in made.network.named_parameters()}
    learner.share(tmp_path / "shared")
    learner.snapshot(tmp_path, 2)
    averages = [(tmp_path / "shared", learner.ema)]
    averages += [(snapshot_folder(tmp_path, "grain", 2, power.sigma), power) for power in learner.powers]
    assert len(averages) == 3
    for folder, average in averages:
        written = load_file(folder / "model.safetensors")
        for key, shadow in average.shadow.items():
            name = names[id(average.parameters[key])]
            assert torch.equal(written[name], shadow.cpu()), (folder, name)
        assert any(not torch.equal(written[name], p.cpu()) for name, p in trained.items()), folder
    assert all(torch.equal(p, trained[name]) for name, p in made.network.named_parameters())


# ---- counted work


@pytest.mark.parametrize(("kind", "preset"), [(GrainStage, "tiny"), (ContentStage, "tiny"), (ContentStage, "DiT-S/2")])
def test_work_is_what_torchs_counter_sees(kind: type[LatentStage], preset: str) -> None:
    """Forward and backward of a step with every region fine, against the multiply-accumulates that MFU is made of."""
    small = {"overrides": {"dim": 64, "heads": 2, "depth": 2}} if preset.startswith("DiT") else {}
    made = stage(kind, preset, **small)
    given = batch(made, fine=16)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        made.learners[0].losses(given)
    assert forward.get_total_flops() == 2 * made.work(given).macs
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        made.learners[0].backward(given, last=True)
    # Three times the forward but for the first layers, whose input needs no gradient, and scores computed again.
    assert both.get_total_flops() == pytest.approx(6 * made.work(given).macs, rel=0.03)


@pytest.mark.skipif("triton" not in ops.available_backends("adaln_modulate"), reason="needs Triton, or its interpreter")
def test_kept_activations_are_those_of_the_fast_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of the start-up summary against the storages that autograd holds on to."""
    monkeypatch.setitem(PREFERENCE, "cpu", ("triton", "cpu", "reference"))
    made = stage(overrides={"depth": 1, "refine_depth": 1})
    given = batch(made, fine=8)
    weights = {p.untyped_storage().data_ptr() for p in made.network.parameters()}
    held: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no address is given twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    call = layers.Block.__call__

    def recorded(block: layers.Block, *args: Any) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return call(block, *args)

    monkeypatch.setattr(layers.Block, "__call__", recorded)
    made.learners[0].losses(given)
    assert sum(held.values()) == pytest.approx(made.activations(given), rel=0.1)


# ---- optional libraries


def test_float8_without_torchao_or_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"content\.float8=emulated needs the package torchao, which is not installed"):
        stage(float8="emulated")
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    sys.modules["torchao"].__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    if DEVICE.type == "cpu":
        with pytest.raises(UserError, match=r"content\.float8=rowwise needs a GPU of compute capability 9\.0"):
            stage(float8="rowwise")


def test_float8_rounds_the_blocks_products_alone(tmp_path: Path) -> None:
    """Emulated: the loss moves a little, the state dict keeps names and dtypes, the modulations are left alone."""
    pytest.importorskip("torchao")
    made, plain = stage(float8="emulated"), stage()
    kinds = {name: type(part).__name__ for name, part in made.network.named_modules()}
    eighths = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert {name.split(".", 3)[-1] for name in eighths} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    made.learners[0].restore(plain.learners[0].state())
    given = batch(made, fine=5)
    ours, exact = step(made, given), step(plain, given)
    assert 0 < (ours - exact).abs() < 0.02 * exact
    assert {k: v.dtype for k, v in made.network.state_dict().items()} == {
        k: v.dtype for k, v in plain.network.state_dict().items()
    }


@contextlib.contextmanager
def modules_of(package: str) -> Iterator[None]:
    """Within it `package` is imported afresh; afterwards `sys.modules` holds what it held before."""

    def its() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}

    before = its()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in its():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize("package", ["flash_attn", "xformers"])
def test_attention_of_other_packages(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are called with their own layouts: stand-ins that follow their documentation give SDPA's result."""
    source = "import torch.nn.functional as F\n"
    if package == "flash_attn":  # (B, L, 3, H, D) -> (B, L, H, D)
        source += (
            "def flash_attn_qkvpacked_func(qkv):\n"
            "    q, k, v = qkv.permute(2, 0, 3, 1, 4)\n"
            "    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)\n"
        )
        (tmp_path / "flash_attn.py").write_text(source)
    else:  # (B, L, H, D) each
        source += (
            "def unbind(x, dim):\n"
            "    return x.unbind(dim)\n"
            "def memory_efficient_attention(query, key, value):\n"
            "    q, k, v = (x.transpose(1, 2) for x in (query, key, value))\n"
            "    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)\n"
        )
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text("")
        (tmp_path / "xformers" / "ops.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with modules_of(package):
        given = batch(stage(), fine=5)
        chosen = [stage(overrides={"attention": name}, precision="bf16") for name in ("sdpa", package)]
        torch.testing.assert_close(*(step(made, given) for made in chosen))
        if package == "flash_attn":
            with pytest.raises(UserError, match="attention=flash_attn takes no float32"):
                stage(overrides={"attention": package}, precision="fp32")


def test_wandb_goes_on_in_the_run_of_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, Any]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            pass

    fake = types.ModuleType("wandb")
    fake.init = lambda **given: started.append(given) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = RunConfig(dir=str(tmp_path), wandb="project")
    for first in (0, 2):
        meters = Meters("toy", run, StageConfig(steps=4), first, WORLD)
        meters.add({"toy/loss": torch.ones((), device=DEVICE)})
        with meters.loading():
            pass
        meters.report(first + 2, 0.1)
        meters.close()
    assert [step for step, _ in logged] == [2, 4]
    assert logged[0][1]["toy/loss"] == 1
    assert 0 <= logged[0][1]["loader_wait"] <= 1
    assert started[0]["id"] == started[1]["id"]
    Meters("other", run, StageConfig(steps=4), 0, WORLD).close()
    assert started[2]["id"] != started[0]["id"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the wandb package is not installed"):
        Meters("toy", run, StageConfig(steps=4), 4, WORLD)


@pytest.mark.parametrize("installed", [True, False])
def test_energy_is_the_gpus_own_counter(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = types.ModuleType("pynvml")
    millijoules = iter((7_500,))
    nvml.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(millijoules)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="0-1"))
    assert Energy(torch.device("cuda", 0)).joules() == (7.5 if installed else None)
    assert Energy(torch.device("cpu")).joules() is None


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for a full disk."""
    monkeypatch.setattr(threading, "excepthook", lambda *args: None)  # tensorboard's thread prints it too
    meters = Meters("toy", RunConfig(dir=str(tmp_path)), StageConfig(steps=4), 0, WORLD)
    meters.add({"toy/loss": torch.ones((), device=DEVICE)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(UserError, match="logs: cannot write the logs: File too large"):
            meters.report(2, 0.1)
        meters.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- the device is not waited for


# ---- timesteps drawn on the host


@pytest.mark.parametrize(
    "process",
    [
        DiffusionConfig(),
        DiffusionConfig(timesteps="logit_normal", shift=2.0),
        DiffusionConfig(path="linear", prediction="velocity"),
    ],
    ids=["ddpm", "shifted", "linear"],
)
def test_the_packed_length_follows_the_timesteps(process: DiffusionConfig) -> None:
    """With `refine_until` the host draws the timesteps: tokens and capacity are those of the images below it."""
    made = stage(overrides={"refine_until": 0.4, "learn_sigma": False}, diffusion=process, accumulate=2)
    assert made.network.config.refine_until == 0.4
    maps = torch.ones(4, 4, 4, dtype=torch.int64)
    seen, rows, shares = set(), [], []
    for number in range(60):
        given = made.with_timesteps(made.prepare({"grain_map": maps}), number)
        t = given["timesteps"]
        again = made.with_timesteps({"grain_map": maps}, number)
        assert torch.equal(t, again["timesteps"])
        seen.add(tuple(t.tolist()))
        below = int((t < 400).sum())
        assert given["fine"].rows == 64 * below
        assert max(1, given["fine"].rows) <= given["capacity"] <= 64 * below + 16
        rows.append(given["fine"].rows)
        shares.append(float(t.double().mean()) / 1000)
    assert len(seen) == 60, "two micro-batches have the same timesteps"
    assert len(set(rows)) >= 3
    many = made.diffusion.sample_timesteps(20_000, generator=torch.Generator().manual_seed(1)).double()
    assert sum(shares) / 60 == pytest.approx(float(many.mean()) / 1000, abs=0.05)


def test_a_step_takes_the_timesteps_of_its_batch() -> None:
    made = stage(overrides={"refine_until": 0.4})
    given = to_device(made.with_timesteps(made.synthetic(4, torch.device("cpu")), 3), DEVICE)
    asked: list[torch.Tensor] = []
    made.network.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    assert step(made, given).isfinite()
    assert torch.equal(asked[0], given["timesteps"])
    work = made.work(given)
    assert work.tokens == 4 * 16 + given["fine"].rows

    plain = stage()
    assert "timesteps" not in plain.with_timesteps(batch(plain), 3)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [GrainStage, ContentStage])
def test_the_host_of_a_step_reads_nothing_and_brings_nothing(
    kind: type[LatentStage], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors, which have no values to read; a tensor made from Python values would be copied to the device."""
    # The operators check the values of CPU tensors at once, those of a GPU on the GPU.
    monkeypatch.setattr("d2it.ops._check.values", lambda *args: None)
    given = batch(stage(kind))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a copy from the host, which waits for the device")

    with FakeTensorMode() as mode:
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)  # fake parameters cannot be moved
        made = stage(kind, weights=weights, precision="bf16")
        learner = made.learners[0]
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, refuse)
        logs, _ = learner.backward(fake, last=True)
        learner.update(0)
        with pytest.raises(DataDependentOutputException):
            logs[f"{made.name}/loss"].item()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_does_not_wait_for_the_gpu(compiled: bool) -> None:
    made = stage(compile=compiled)
    given = [batch(made, fine) for fine in (5, 9)]
    for each in given:
        step(made, each)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(made, each) for each in given]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)
