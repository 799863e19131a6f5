"""Starting from trained weights: what is carried over, interpolated, new and refused; docs/finetuning.md runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.models.base import Model
from d2it.models.finetune import interpolate_bias, interpolate_grid, start_from
from d2it.sampling import D2iT, convert
from d2it.training.run import main
from tests.test_models_dit import original_tensors

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "finetuning.md"
SIZES: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "num_classes": 3}
SMALL: dict[str, Any] = {**SIZES, "image_size": 64}  # 8 x 8 cells, windows of 4
# Sizes at which the commands of the document run in seconds.
TINY = [
    "run.publish_every=0 data.path=demo data.crops=8 data.image_size=32 data.num_classes=8 data.workers=0",
    "dvae.preset=tiny dvae.overrides.channels=8 dvae.overrides.thresholds=[3.0] dvae.steps=1 dvae.batch_size=4",
    "dvae.loss.disc_start=null cache.batch_size=8 grain.preset=tiny grain.overrides.depth=1 grain.steps=1",
    "grain.batch_size=4 content.preset=tiny content.overrides.depth=1 content.steps=1 content.batch_size=4",
    "sample.images=2 sample.steps=2 sample.grain_steps=2",
]
SETTINGS = shlex.split(" ".join(TINY))


def new(kind: type[Model] = DynamicContentTransformer, **settings: Any) -> Any:
    torch.manual_seed(1)
    return kind.from_preset("tiny", **{**(SMALL if kind is not DynamicGrainTransformer else SIZES), **settings})


def trained(kind: type[Model] = DynamicContentTransformer, **settings: Any) -> Any:
    """A model whose weights are all random, with every gate open."""
    model = new(kind, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def saved(model: Model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def inputs(model: Any, batch: int = 2) -> tuple[Tensor, ...]:
    config = model.config
    x = torch.randn(batch, config.in_channels, *config.grid)
    return x, torch.rand(batch) * 900, torch.arange(batch) % 3


def grains(model: Any, batch: int = 2) -> Tensor:
    return torch.randint(2, (batch, *model.config.region_grid))


def test_equal_models_compute_the_same(tmp_path: Path) -> None:
    source, model = trained(), new()
    assert start_from(model, saved(source, tmp_path)) == (
        f"starts from {tmp_path}",
        "  100.0% of the parameters carried over",
    )
    x, maps = inputs(model), grains(model)
    assert torch.equal(model.eval()(*x, maps), source(*x, maps))


@pytest.mark.parametrize("kind", [DynamicContentTransformer, DynamicGrainTransformer, DiT])
def test_another_number_of_classes_has_new_rows_and_the_old_null_row(kind: type[Model], tmp_path: Path) -> None:
    source, model, untouched = trained(kind), new(kind, num_classes=5), new(kind, num_classes=5)
    lines = start_from(model, saved(source, tmp_path))
    assert any("5 new rows (the weights have 3 classes), null row kept" in line for line in lines)
    names = [name for name, _ in model.named_parameters() if "label" in name]
    assert len(names) == (2 if kind is DynamicContentTransformer else 1)
    ours, theirs, fresh = model.state_dict(), source.state_dict(), untouched.state_dict()
    for name in ours:
        if name in names:
            assert torch.equal(ours[name][-1], theirs[name][-1])
            assert torch.equal(ours[name][:-1], fresh[name][:-1])
        else:
            assert torch.equal(ours[name], theirs[name])
    x, t, _ = inputs(model)
    more = [grains(model)] if kind is DynamicContentTransformer else []
    nothing = model.eval()(x, t, torch.tensor([5, 5]), *more)
    torch.testing.assert_close(nothing, source(x, t, torch.tensor([3, 3]), *more))


def test_a_model_without_classes_starts_as_the_null_label(tmp_path: Path) -> None:
    source, model = trained(), new(num_classes=0)
    start_from(model, saved(source, tmp_path))
    (x, t, _), maps = inputs(model), grains(model)
    torch.testing.assert_close(model.eval()(x, t, None, maps), source(x, t, torch.tensor([3, 3]), maps))


def test_classes_can_be_added_to_a_model_without(tmp_path: Path) -> None:
    model = new()
    lines = start_from(model, saved(trained(num_classes=0), tmp_path))
    assert lines[-1] == "  new: multi_grained.condition.label.weight, refine.condition.label.weight", lines


def keys_cubic(before: int, after: int) -> Tensor:
    """(after, before) weights of bicubic interpolation: Keys' kernel with a = -0.5, widened where the grid shrinks."""
    scale = max(1.0, before / after)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        for j in range(before):
            d = abs((i + 0.5) * before / after - (j + 0.5)) / scale
            weights[i, j] = (
                1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0
            )
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("before", "after"), [((8, 8), (16, 16)), ((8, 4), (12, 10)), ((12, 8), (5, 8))])
def test_positions_are_interpolated_over_the_grid(before: tuple[int, int], after: tuple[int, int]) -> None:
    values = torch.randn(before[0] * before[1], 3, dtype=torch.float64)
    rows, columns = (keys_cubic(b, a) for b, a in zip(before, after))
    expected = torch.einsum("ai,bj,ijc->abc", rows, columns, values.unflatten(0, before)).flatten(0, 1)
    torch.testing.assert_close(interpolate_grid(values, before, after), expected)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (3, 5)])
def test_bias_matrices_are_interpolated_over_query_and_key(before: int, after: int) -> None:
    bias = torch.randn(1, 3, before**2, before**2, dtype=torch.float64)
    both = torch.kron(keys_cubic(before, after), keys_cubic(before, after))  # (m, n)
    expected = both @ bias @ both.T
    found = interpolate_bias(bias, before, after)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, expected.transpose(2, 3))


@pytest.mark.parametrize("relative_bias", ["matrix", "table"])
def test_another_image_size_and_window(relative_bias: str, tmp_path: Path) -> None:
    source = trained(relative_bias=relative_bias)
    model = new(image_size=(128, 64), window=8, relative_bias=relative_bias)
    lines = start_from(model, saved(source, tmp_path))
    assert "  refine.positions: interpolated from 8 x 8 to 16 x 8 cells" in lines
    assert "  refine's bias: interpolated from windows of 4 to 8" in lines
    positions = torch.einsum(
        "ai,bj,ijc->abc", keys_cubic(8, 16), keys_cubic(8, 8), source.refine.positions.double().unflatten(0, (8, 8))
    )
    torch.testing.assert_close(model.refine.positions.double(), positions.flatten(0, 1), atol=1e-5, rtol=1e-5)
    found, given = model.refine.blocks[0].attn.bias.double(), source.refine.blocks[0].attn.bias.double()
    if relative_bias == "matrix":
        both = torch.kron(keys_cubic(4, 8), keys_cubic(4, 8))
        expected = both @ given @ both.T
    else:
        weights = keys_cubic(7, 15)
        expected = torch.einsum("ai,bj,ijh->abh", weights, weights, given.unflatten(0, (7, 7))).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.eval()(*inputs(model), grains(model)).isfinite().all()


def test_another_image_size_alone_keeps_the_windows(tmp_path: Path) -> None:
    source, model = trained(relative_bias="matrix"), new(image_size=128, relative_bias="matrix")
    start_from(model, saved(source, tmp_path))
    assert torch.equal(model.refine.blocks[0].attn.bias, source.refine.blocks[0].attn.bias)


def test_grain_maps_of_another_size(tmp_path: Path) -> None:
    source, model = trained(DynamicGrainTransformer, grid=(4, 4)), new(DynamicGrainTransformer, grid=(8, 6))
    assert len(start_from(model, saved(source, tmp_path))) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))


def test_a_dit_becomes_the_trunk(tmp_path: Path) -> None:
    source, model = trained(DiT), new()
    lines = start_from(model, saved(source, tmp_path))
    assert lines[-1] == "  new: grain, refine"
    with torch.no_grad():
        model.grain.weight.zero_()  # the only other way by which a grain reaches the trunk
    x = inputs(model)
    # RefineNet's last layer starts at zero: with either grain the noise is that of the DiT.
    torch.testing.assert_close(model.eval()(*x, grains(model)), source(*x))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DynamicContentTransformer, {"dim": 64}),
        (DynamicContentTransformer, {"depth": 3}),
        (DynamicContentTransformer, {"heads": 4}),
        (DynamicContentTransformer, {"in_channels": 8}),
        (DynamicContentTransformer, {"downsampling": (4, 8)}),
        (DynamicContentTransformer, {"downsampling": (8, 16, 32)}),
        (DynamicContentTransformer, {"patch_size": 1}),
        (DynamicContentTransformer, {"learn_sigma": False}),
        (DynamicContentTransformer, {"refine_depth": 2}),
        (DynamicContentTransformer, {"relative_bias": "matrix"}),
        (DynamicGrainTransformer, {"num_grains": 3}),
        (DynamicGrainTransformer, {"mlp_ratio": 2.0}),
        (DiT, {"downsampling": 16}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_factors_are_refused_by_name(
    kind: type[Model], settings: dict[str, Any], device: str, tmp_path: Path
) -> None:
    folder = saved(new(kind), tmp_path)
    with torch.device(device):
        model = new(kind, **settings)
    name = next(iter(settings))
    with pytest.raises(ValueError, match=rf"has {name}=.*, this {kind.__name__} .*: they must be the same$"):
        start_from(model, folder)


@pytest.mark.parametrize(("name", "value"), [("depth", 3), ("dim", 64), ("patch_size", 4), ("downsampling", 4)])
def test_a_dit_of_another_trunk_is_refused_by_name(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has {name}="):
        start_from(new(), saved(new(DiT, **{name: value}), tmp_path))


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        start_from(new(), tmp_path / "missing")
    saved(new(DynamicGrainTransformer), tmp_path / "grain")
    with pytest.raises(ValueError, match="holds a DynamicGrainTransformer, not a DynamicContentTransformer"):
        start_from(new(), tmp_path / "grain")
    with pytest.raises(ValueError, match=r"there is no folder '.*/content_transformer'"):
        start_from(new(), tmp_path)
    folder = saved(trained(), tmp_path / "damaged")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="SHA-256"):
        start_from(new(), folder)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_vae_is_refused_unless_allowed(device: str, tmp_path: Path) -> None:
    source = trained()
    source.vae_sha256 = "a" * 64
    saved(source, tmp_path)
    with torch.device(device):
        model = new()
    with pytest.raises(ValueError, match="the latents of another VAE"):
        start_from(model, tmp_path, vae_sha256="b" * 64)
    for accepted in ({"vae_sha256": "b" * 64, "any_vae": True}, {"vae_sha256": "a" * 64}, {"vae_sha256": None}):
        assert start_from(model, tmp_path, **accepted)


def test_another_process_is_reported(tmp_path: Path) -> None:
    model = new(learn_sigma=False, diffusion={"path": "linear", "prediction": "velocity"}, min_grain=0)
    lines = start_from(model, saved(trained(learn_sigma=False), tmp_path))
    assert lines[-2:] == (
        "  diffusion changes: path ddpm to linear, prediction epsilon to velocity",
        "  min_grain changes: 1 to 0",
    )
    assert start_from(new(refine_until=0.5, learn_sigma=False), tmp_path)[-1] == "  refine_until changes: 1.0 to 0.5"


def test_a_vae_keeps_its_own_thresholds(tmp_path: Path) -> None:
    source = DynamicVAE.from_preset("tiny", thresholds=(3.0,), scaling_factor=2.0)
    model = DynamicVAE.from_preset("tiny", thresholds=(2.0,))
    lines = start_from(model, saved(source, tmp_path))
    assert lines[-1] == "  thresholds changes: [3.0] to [2.0]"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))
    assert model.thresholds.tolist() == [2.0]
    with pytest.raises(ValueError, match=r"has channels=16, this DynamicVAE 8"):
        start_from(DynamicVAE.from_preset("tiny", channels=8), tmp_path)


# ---- the document ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the document run: a finished runs/demo, photos, the original's weights."""
    folder = tmp_path_factory.mktemp("finetuning")
    assert main([*SETTINGS, f"run.dir={folder / 'runs' / 'demo'}"]) == 0
    pixels = np.random.default_rng(0)
    for i in range(8):
        (folder / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels.integers(0, 256, (40, 48, 3), np.uint8))
        picture.save(folder / "photos" / "ab"[i % 2] / f"{i}.png")
    generator = torch.Generator().manual_seed(0)
    tensors = original_tensors(128, 1, 32, 8, True, lambda *shape: torch.randn(*shape, generator=generator) * 0.02)
    torch.save(tensors, folder / "DiT-XL-2-256x256.pt")
    return folder


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_document_run(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    told = []
    # At the size of the test: the width and depth of the weights above.
    smaller = {"D2iT-XL": "tiny", "depth=28": "depth=1"}
    for command in commands():
        words = shlex.split(command)
        if words[0] == "mkdir":
            assert words[1:2] + words[3:6] == ["-p", "&&", "cp", "-r"]
            shutil.copytree(words[6], Path(words[7]) / Path(words[6]).name)
        elif words[:3] == ["python", "-m", "d2it.sampling.convert"]:
            assert convert.main([*words[3:], "--heads", "4", "--num-classes", "8"]) == 0
        else:
            assert words[:2] == ["python", "train.py"]
            arguments = words[2:]
            for before, after in smaller.items():
                arguments = [word.replace(before, after) for word in arguments]
            if "runs/dit_xl" in command:
                shutil.rmtree("runs/mine/checkpoints/content")  # else it would resume
            assert main([*SETTINGS, *arguments, "grain.steps=1", "content.steps=1", "dvae.steps=1"]) == 0, command
            told.append(capsys.readouterr().err)
    mine, large, sharper, dit = told
    assert "starts from runs/demo/grain_transformer" in mine
    assert mine.count("2 new rows (the weights have 8 classes), null row kept") == 3
    assert "refine.positions: interpolated from 4 x 4 to 16 x 16 cells" in large
    assert "refine's bias: interpolated from windows of 4 to 8" in large
    assert "starts from runs/demo/vae" in sharper
    assert "new: grain, refine" in dit
    assert D2iT.from_pretrained("runs/large").image_size == (128, 128)
    assert D2iT.from_pretrained("runs/mine").num_classes == 2


def test_a_checkpoint_wins_over_the_weights_to_start_from(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo / "runs" / "demo" / "vae", tmp_path / "run" / "vae")
    source = shutil.copytree(demo / "runs" / "demo", tmp_path / "source")
    command = [*SETTINGS, f"run.dir={tmp_path / 'run'}", "run.stages=[cache,grain]", f"grain.init={source}"]
    assert main(command) == 0
    assert "starts from" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main([*command, "grain.steps=2"]) == 0
    assert "starts from" not in capsys.readouterr().err


def test_training_starts_at_the_weights(demo: Path, tmp_path: Path) -> None:
    """One step of a rate of (almost) nothing leaves the weights that it started from."""
    shutil.copytree(demo / "runs" / "demo" / "vae", tmp_path / "vae")
    source = demo / "runs" / "demo"
    stages = [f"run.dir={tmp_path}", "run.stages=[cache,grain,content]", "grain.lr=1e-30", "content.lr=1e-30"]
    assert main([*SETTINGS, *stages, f"grain.init={source}", f"content.init={source / 'content_transformer'}"]) == 0
    kinds: list[type[Model]] = [DynamicGrainTransformer, DynamicContentTransformer]
    for kind, name in zip(kinds, ("grain_transformer", "content_transformer")):
        ours, theirs = (kind.from_pretrained(folder / name).state_dict() for folder in (tmp_path, source))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-29)  # zeros move by the rate


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (["content.overrides.depth=2"], "content.init: .* has depth=1, this DynamicContentTransformer 2"),
        (["content.init=/missing"], "content.init: there is no folder '/missing' to start from"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_stage(
    spoil: list[str], message: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SETTINGS, f"run.dir={tmp_path / 'run'}", f"content.init={demo / 'runs' / 'demo'}", *spoil]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: configuration: {message}.*\n", error), error
    assert not (tmp_path / "run").exists()


def test_weights_of_another_vae_are_refused_by_the_command(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, vae = tmp_path / "run", DynamicVAE.from_pretrained(demo / "runs" / "demo" / "vae")
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    saved(vae, run / "vae")
    command = [*SETTINGS, f"run.dir={run}", "run.stages=[cache,content]", f"content.init={demo / 'runs' / 'demo'}"]
    assert main(command) == 2
    assert "trained on the latents of another VAE" in capsys.readouterr().err
    assert not (run / "cache").exists()


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    saved(trained(), tmp_path / "weights")
    start: Callable[..., Any] = start_from
    assert start(new(), "~/weights")[0] == f"starts from {tmp_path / 'weights'}"
