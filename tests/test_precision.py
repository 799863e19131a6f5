"""`precision=auto`: bfloat16 where it is faster, one answer for all ranks, told at the start and at a change."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2it.data import DemoPhotos
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE, DynamicVAEConfig, precision
from d2it.models.precision import LEAST_CHANNELS, LEAST_WIDTH, why_float32
from d2it.sampling import options
from d2it.sampling.cli import parser
from d2it.training.config import STAGES, Config, StageConfig, describe, load
from d2it.training.content import ContentStage
from d2it.training.dvae import DvaeStage
from d2it.training.grain import GrainStage
from d2it.training.latents import LatentData
from d2it.training.learner import why_fp32
from d2it.training.loop import change_of_precision
from d2it.training.run import rehearse_all, summarize
from d2it.training.stage import check_weights
from d2it.training.summary import Summary
from tests.test_sampling_cli import sample, small
from tests.test_train_step import batch, stage
from tests.train_server import Server, shared_server

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ONE = World(0, 1, 1, CPU)
PLAIN: dict[str, object] = {"avx512_bf16": False, "amx_bf16": False, "avx2": True, "architecture": "x86_64"}
ARM: dict[str, object] = {"bf16": True, "neon": True, "architecture": "arm64"}
WIDE, NARROW = (DynamicContentTransformer.preset_config(name) for name in ("D2iT-S", "tiny"))
UNABLE = "this CPU does not multiply bfloat16"
GAINLESS = "or more, from which on bf16 is faster on a CPU"


def has(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16, whatever this one does."""
    has(monkeypatch, {**PLAIN, request.param: True})


# ---- the rule


@pytest.mark.parametrize("known", [{}, PLAIN, ARM], ids=["nothing known", "plain", "ARM"])
def test_a_cpu_that_does_not_multiply_bfloat16(known: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, known)
    for config in (WIDE, NARROW, DynamicVAEConfig()):
        assert why_float32(config, CPU) == UNABLE


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert why_float32(WIDE, CPU) == UNABLE


@pytest.mark.usefixtures("able")
def test_a_cpu_that_multiplies_bfloat16() -> None:
    for kind, given, preset in (
        (DynamicContentTransformer, {}, "D2iT-S"),
        (DynamicGrainTransformer, {"grid": (16, 16)}, "DiT-S"),
        (DiT, {}, "DiT-S/2"),
    ):
        for width, why in (
            (128, f"it has a width of 128, not {LEAST_WIDTH} {GAINLESS}"),
            (LEAST_WIDTH - 4, f"it has a width of {LEAST_WIDTH - 4}, not {LEAST_WIDTH} {GAINLESS}"),
            (LEAST_WIDTH, None),
            (1152, None),
        ):
            assert why_float32(kind.preset_config(preset, dim=width, heads=4, **given), CPU) == why
    few = LEAST_CHANNELS - 1
    assert why_float32(DynamicVAEConfig(channels=few), CPU) == f"it has {few} channels, not {LEAST_CHANNELS} {GAINLESS}"
    assert why_float32(DynamicVAEConfig(channels=LEAST_CHANNELS), CPU) is None


@pytest.mark.usefixtures("able")
def test_presets() -> None:
    """Those of the demo are float32, the paper's bfloat16."""
    for kind, given in (
        (DynamicVAE, {}),
        (DynamicGrainTransformer, {"grid": (16, 16)}),
        (DynamicContentTransformer, {}),
    ):
        for preset in kind.presets:
            three = {"thresholds": (1, 2)} if preset == "f8f16f32" else {}
            config = kind.preset_config(preset, **given, **three)
            assert (why_float32(config, CPU) is None) == (preset != "tiny"), preset


def test_a_gpu_is_asked_whatever_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, PLAIN)
    for supported, why in ((True, None), (False, "this GPU has no bfloat16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert [why_float32(config, GPU) for config in (WIDE, NARROW, DynamicVAEConfig())] == [why] * 3


def test_what_is_written_of_the_rule() -> None:
    assert f"width {LEAST_WIDTH}" in describe()
    assert f"{LEAST_CHANNELS} channels" in describe()
    assert f"{LEAST_WIDTH} wide" in " ".join(parser().format_help().split())
    row = next(
        line for line in (ROOT / "docs" / "training.md").read_text().splitlines() if "<stage>.precision`" in line
    )
    assert f"width {LEAST_WIDTH}" in row
    assert f"{LEAST_CHANNELS} channels" in row


@pytest.mark.usefixtures("able")
def test_a_setting_comes_first() -> None:
    for config in (WIDE, NARROW):
        assert why_fp32(StageConfig(precision="bf16"), ONE, config) is None
        assert why_fp32(StageConfig(precision="fp32"), ONE, config) == "precision is fp32"
    assert why_fp32(StageConfig(), ONE, WIDE) is None
    assert why_fp32(StageConfig(), ONE, NARROW) == why_float32(NARROW, CPU)


@pytest.mark.usefixtures("able")
def test_one_rank_that_cannot_decides_for_all() -> None:
    class Mixed(World):
        def gather(self, item: Any, group: Any = None) -> list[Any]:
            return [item, UNABLE]

    assert why_fp32(StageConfig(), Mixed(0, 2, 1, CPU), WIDE) == UNABLE
    assert why_fp32(StageConfig(precision="bf16"), Mixed(0, 2, 1, CPU), WIDE) is None


# ---- what is said


def made(kind: Any, preset: str, size: int = 256, **settings: Any) -> Any:
    """A stage on this CPU, on noise."""
    config = Config()
    config.data.num_classes, config.data.image_size = 5, (size, size)
    chosen = getattr(config, kind.name)
    chosen.preset, chosen.batch_size = preset, 2
    for key, value in settings.items():
        setattr(chosen, key, value)
    if kind is DvaeStage:
        chosen.overrides["thresholds"] = [1.95]
        return DvaeStage(config, ONE, DemoPhotos((size, size), crops=8, augment=False))
    return kind(config, chosen, ONE, LatentData.of_vae(DynamicVAE.preset_config("f8f16"), (size, size), 8), None)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(("kind", "wide"), [(DvaeStage, "f8f16"), (GrainStage, "DiT-S"), (ContentStage, "D2iT-S")])
def test_the_summary_names_it(kind: Any, wide: str) -> None:
    for preset, settings, named in (
        (wide, {}, "bf16, ddp"),
        ("tiny", {}, "fp32, ddp"),
        (wide, {"precision": "fp32"}, "fp32, ddp"),
    ):
        with torch.device("meta"):
            outline = made(kind, preset, **settings)
        assert f"threads), {named}" in Summary(outline, outline.settings, ONE).text


@pytest.mark.usefixtures("able")
def test_the_demo_is_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("demo", ["run.device=cpu"])
    source = DemoPhotos(config.data.image_size, crops=16, augment=False)
    for name in set(STAGES) - {"cache"}:
        summarize(name, config, ONE, source, dry=True)
    said = capsys.readouterr().err
    assert said.count("threads), fp32, ddp") == 3
    assert "bf16" not in said


def test_weights_that_are_refused_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {**PLAIN, "avx512_bf16": True})
    settings = StageConfig(weights="bfloat16")
    check_weights(settings, "content", ONE, WIDE)
    asked = r"content\.weights=bfloat16 needs bf16: set content\.precision=bf16, for auto is fp32 here: "
    with pytest.raises(UserError, match=f"{asked}it has a width of 128, not {LEAST_WIDTH} {GAINLESS}"):
        check_weights(settings, "content", ONE, NARROW)
    has(monkeypatch, ARM)
    with pytest.raises(UserError, match=f"{asked}{UNABLE}"):
        check_weights(settings, "content", ONE, WIDE)


def test_a_run_refuses_them_before_it_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has(monkeypatch, {**PLAIN, "avx512_bf16": True})
    config = load("demo", [f"run.dir={tmp_path / 'run'}", "data.crops=16", "grain.weights=bfloat16"])
    with pytest.raises(UserError, match=r"grain\.weights=bfloat16 needs bf16: set grain\.precision=bf16, for auto is"):
        rehearse_all(config, ONE)
    assert not (tmp_path / "run").exists()


# ---- training


@pytest.mark.parametrize("kind", [GrainStage, ContentStage])
def test_bf16_learns_as_float32_does(kind: Any) -> None:
    found = {}
    for name in ("fp32", "bf16"):
        trained = stage(kind, precision=name, lr=2e-3)
        learner, given, losses = trained.learners[0], batch(trained), []
        for step in range(40):
            torch.manual_seed(step % 4)  # four draws of noise, seen ten times
            logs, _ = learner.backward(given, last=True)
            learner.update(step)
            losses.append(logs[f"{trained.name}/loss"].item())
        found[name] = losses
    first, last = ({name: sum(losses[part]) for name, losses in found.items()} for part in (slice(4), slice(-4, None)))
    assert last["fp32"] < 0.8 * first["fp32"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.02)
    assert abs(last["bf16"] - last["fp32"]) < 0.02 * first["fp32"]
    assert found["bf16"] != found["fp32"]


@pytest.mark.parametrize(("kind", "preset"), [(DvaeStage, "tiny"), (GrainStage, "tiny"), (ContentStage, "tiny")])
def test_learners_compute_as_the_stage_says(kind: Any, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and held-out loss, the discriminator's too."""
    overrides = {"channels": LEAST_CHANNELS} if kind is DvaeStage else {"dim": LEAST_WIDTH}
    for known, dtype in ((ARM, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        has(monkeypatch, known)
        this = made(kind, preset, 64, overrides=dict(overrides))
        if kind is DvaeStage:
            this.settings.loss.disc_start = 0
            this = DvaeStage(this.config, ONE, this.source)
        given, seen = this.synthetic(2, CPU), []
        for network in this.networks.values():
            deep = [part for part in network.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))]
            part = deep[1] if kind is DvaeStage else network.transformer_blocks()[0].attn.qkv
            part.register_forward_hook(lambda part, given, out, seen=seen: seen.append(out.dtype))
        for learner in this.learners:
            _, given = learner.backward(given, last=True)
        this.learners[0].evaluate(this.synthetic(2, CPU) | {"step": -1}, 0)
        assert len(seen) > len(this.networks)
        assert set(seen) == {dtype}


# ---- sampling


def test_samples_are_bf16_where_it_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save_pretrained(tmp_path)

    def told(*words: str) -> tuple[str, Any]:
        found = sample(tmp_path, tmp_path / "samples", "--count", 1, *words)
        return found["dtype"], found["images"]["000000.png"]

    exact, rounded = (told("--device", "cpu", "--precision", name) for name in ("float32", "bf16"))
    assert (exact[0], rounded[0]) == ("float32", "bfloat16")
    assert (exact[1] != rounded[1]).any()
    has(monkeypatch, {**PLAIN, "avx512_bf16": True})
    for least, (dtype, image) in ((33, exact), (32, rounded)):
        monkeypatch.setattr(precision, "LEAST_WIDTH", least)
        found = told("--device", "cpu")
        assert found[0] == dtype
        assert (found[1] == image).all()
    has(monkeypatch, ARM)
    assert told("--device", "cpu")[0] == "float32"


@pytest.mark.usefixtures("able")
def test_the_narrowest_transformer_and_every_rank_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(World):
        def gather(self, item: Any, group: Any = None) -> list[Any]:
            return [item, False]

    monkeypatch.setattr(precision, "LEAST_WIDTH", 32)
    model, settings = small(), {"image_size": 64, "depth": 1, "heads": 2, "num_classes": 3}
    assert options.prefers_bf16(model, ONE)
    assert not options.prefers_bf16(model, Mixed(0, 2, 1, CPU))
    for config in (model.content_transformer.config, model.grain_transformer.config):  # type: ignore[union-attr]
        config.dim = 28
        assert not options.prefers_bf16(model, ONE)
        config.dim = 32
    for width, bf16 in ((32, True), (28, False)):
        model.guide = DynamicContentTransformer.from_preset("tiny", dim=width, **settings)
        assert options.prefers_bf16(model, ONE) == bf16


# ---- resuming


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def test_a_resume_in_another_precision_says_so(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dynamic": 1, "save_every": 2, "log_every": 1, "batch_size": 2}
    line = "toy: up to step 2 in fp32, in bf16 from here on; toy.precision=fp32 goes on as before"
    for steps, how, said in ((2, "fp32", False), (4, "bf16", True), (6, "bf16", False)):
        code, _, log = server.run(tmp_path, steps=steps, precision=how, **settings)
        assert code == 0, log
        assert (line in log) == said
        assert ("from here on" in log) == said
    manifest = tmp_path / "checkpoints" / "toy" / "step-00000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("precision") == "bf16"
    manifest.write_text(json.dumps(content))  # as earlier versions wrote it
    code, _, log = server.run(tmp_path, steps=8, precision="fp32", **settings)
    assert code == 0, log
    assert "from here on" not in log


def test_a_checkpoint_that_records_no_precision() -> None:
    """Of an earlier version: `auto` was float32 on a CPU then. What is set by name is known to have been chosen."""

    def said(now: str, setting: str, recorded: str | None = None, device: torch.device = CPU) -> str | None:
        this: Any = SimpleNamespace(name="content", bf16=now == "bf16")
        return change_of_precision(this, StageConfig(precision=setting), World(0, 1, 1, device), recorded)

    line = said("bf16", "auto")
    assert line is not None
    assert line.startswith("in fp32 if on a CPU")
    assert line.endswith("in bf16 from here on; content.precision=fp32 goes on as before")
    assert said("fp32", "auto") is said("bf16", "bf16") is said("bf16", "auto", device=GPU) is None
    assert said("bf16", "auto", "bf16") is None
    assert said("bf16", "auto", "fp32") == line.replace(" if on a CPU (precision=auto of an earlier version)", "")


def test_a_run_that_is_done_says_nothing(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "save_every": 2, "log_every": 1}
    assert server.run(tmp_path, precision="fp32", **settings)[0] == 0
    code, _, log = server.run(tmp_path, precision="bf16", **settings)
    assert code == 0
    assert "from here on" not in log
