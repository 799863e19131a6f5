"""Configurations in one form, folders that are whole or refused, and code that was written for earlier versions."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import d2it
from d2it import models, sampling
from d2it.models import (
    KLVAE,
    DiT,
    DiTConfig,
    DynamicContentTransformer,
    DynamicGrainTransformer,
    DynamicVAE,
    DynamicVAEConfig,
    PatchDiscriminator,
    VAELoss,
    VAELossConfig,
    convert,
)
from d2it.sampling import D2iT

SMALL = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}


def make() -> D2iT:
    torch.manual_seed(0)
    return D2iT(
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=4, **SMALL),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **SMALL),
        class_names=["ant", "bee", "cup"],
        sampling={"scheduler": "ddim", "steps": 1},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


# ---- configurations


@pytest.mark.parametrize(
    ("model", "given", "same"),
    [
        (DiT, {"num_classes": None}, {"num_classes": 0}),
        (DiT, {"image_size": 64}, {"image_size": [64, 64]}),
        (DynamicGrainTransformer, {"grid": 6, "num_classes": None}, {"grid": (6, 6), "num_classes": 0}),
        (DynamicContentTransformer, {"patch_size": None}, {"patch_size": 2}),
        (DynamicContentTransformer, {"downsampling": [8, 16, 32]}, {"downsampling": (8, 16, 32), "patch_size": 4}),
        (DynamicVAE, {"thresholds": None, "num_bins": None}, {"thresholds": (4.04,), "num_bins": 256}),
        (DynamicVAE, {"value_range": [0, 1], "num_bins": 0}, {"value_range": (0.0, 1.0), "num_bins": 256}),
    ],
)
def test_a_field_has_one_type(model, given, same):
    """Whatever form a setting is given in, it is held in the one that its annotation names; JSON gives it back."""
    config = model.preset_config("tiny", **given)
    assert config == model.preset_config("tiny", **same)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert type(value).__name__ == re.match(r"\w+", field.type)[0], field.name
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (DiT, {"image_size": (64, 64, 64)}, r"image_size must be a side or \(height, width\)"),
        (DiT, {"image_size": "64"}, "image_size must be a side"),
        (DiT, {"image_size": 64.0}, "image_size must be a side"),
        (DiT, {"image_size": True}, "image_size must be a side"),
        (DiT, {"num_classes": -1}, "num_classes must be a whole number of at least 0, got -1"),
        (DiT, {"num_classes": 2.0}, "num_classes must be a whole number"),
        (DiT, {"class_dropout_prob": 1.5}, r"class_dropout_prob must be in 0 ... 1, got 1.5"),
        (DiT, {"class_dropout_prob": float("nan")}, "class_dropout_prob must be in 0 ... 1"),
        (DiT, {"mlp_ratio": float("nan")}, "mlp_ratio must be positive and finite"),
        (DiT, {"mlp_ratio": "4"}, "mlp_ratio must be positive and finite"),
        (DiT, {"patch_size": 3}, "patch_size must divide the grid 32 x 32, got 3"),
        (DynamicGrainTransformer, {"grid": (3, 4)}, "patch_size must divide the grid 3 x 4, got 2"),
        (DynamicGrainTransformer, {"num_grains": 1}, "num_grains must be a whole number of at least 2, got 1"),
        (DynamicVAE, {"scaling_factor": 0}, "scaling_factor must be positive and finite, got 0"),
        (DynamicVAE, {"num_bins": 1}, "num_bins must be a whole number of at least 2, got 1"),
    ],
)
def test_settings_that_no_model_has(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.preset_config("tiny", **settings)


def public_records():
    for module in pkgutil.walk_packages(d2it.__path__, "d2it."):
        if module.name.startswith(("d2it.kernels", "d2it._C")):
            continue
        if module.name == "d2it.studio.page" and not importlib.util.find_spec("gradio"):  # of an extra, [studio]
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, type) and value.__module__ == module.name and not name.startswith("_"):
                if dataclasses.is_dataclass(value):
                    yield value, [field.name for field in dataclasses.fields(value)]
                elif hasattr(value, "_fields"):
                    yield value, value._fields


def test_every_field_is_explained_where_help_shows_it():
    records = list(public_records())
    assert {DiTConfig, DynamicVAEConfig, VAELossConfig} <= {record for record, _ in records}
    for record, fields in records:
        text = record.__doc__ or ""
        if record.__module__ == "d2it.training.config":  # what the stages share is explained once, in their base
            text += "".join(base.__doc__ for base in record.__mro__[1:-1])
        assert re.match(r"[A-Z][^\n]*\.\n", text.split("\n\n")[0] + "\n"), f"{record} does not start with a sentence"
        for name in fields:
            assert re.search(rf"^ +{name}: |`{name}`", text, re.MULTILINE), f"{record} does not explain {name}"


# ---- folders


@pytest.mark.parametrize("part", ["vae", "grain_transformer", "content_transformer"])
@pytest.mark.parametrize("place", [3, 0.3, 0.6, -1])
def test_a_flipped_bit_of_the_weights_is_found(folder, part, place):
    file = folder / part / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place if isinstance(place, int) else int(place * len(content))] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        D2iT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("d2it.json", lambda file: D2iT.from_pretrained(file.parent)),
        ("vae/config.json", lambda file: D2iT.from_pretrained(file.parents[1])),
        ("content_transformer/config.json", lambda file: DynamicContentTransformer.from_pretrained(file.parent)),
    ],
)
def test_a_flipped_bit_of_a_description_is_found(folder, name, read):
    file = folder / name
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        for bit in (1, 0x10):
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with contextlib.suppress(ValueError):
                if json.loads(file.read_bytes()) == json.loads(content):  # a blank between the values
                    continue
            with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
                read(file)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"class_names": 5}, {"class_names": ["ant"]}, {"sampling": {"steps": "abc"}},
                                    {"sampling": {"colour": 1}}, {"sampling": 5}])  # fmt: skip
def test_descriptions_that_fit_no_model(folder, change):
    description = json.loads((folder / "d2it.json").read_text()) | change
    (folder / "d2it.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has changed since it was saved"):
        D2iT.from_pretrained(folder)
    del description["sha256"]
    (folder / "d2it.json").write_text(json.dumps(description))
    with (
        pytest.warns(UserWarning, match="has no sha256"),
        pytest.raises(ValueError, match=r"class_names|sampling|steps"),
    ):
        D2iT.from_pretrained(folder)(1)


def test_a_folder_of_an_earlier_version_is_read_with_a_warning(folder):
    whole = D2iT.from_pretrained(folder)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        for key in ("sha256", "weights", "vae"):
            content.pop(key, None)
        if file.parent.name == "grain_transformer":
            content["config"]["num_classes"] = 3
        file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="config.json has no sha256: damage would go unnoticed"):
        old = D2iT.from_pretrained(folder)
    assert torch.equal(old(1, seed=3).images, whole(1, seed=3).images)
    old.save_pretrained(folder)  # which adds the hashes
    assert D2iT.from_pretrained(folder).content_transformer.vae_sha256 is not None


def test_parts_of_another_vae_are_refused(folder, tmp_path):
    torch.manual_seed(1)
    DynamicVAE.from_preset("tiny").save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match=r"grain_transformer was trained on the latents of another VAE \(SHA-256"):
        D2iT.from_pretrained(folder)
    mixed = D2iT.from_pretrained(folder, any_vae=True)
    mixed.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="any_vae=True uses it all the same"):
        D2iT.from_pretrained(tmp_path / "again")
    make().save_pretrained(folder)
    D2iT.from_pretrained(folder)


def test_a_vae_in_half_precision_stays_with_its_transformers(saved, tmp_path):
    model = D2iT.from_pretrained(saved)
    model.vae.half()
    model.save_pretrained(tmp_path)
    assert D2iT.from_pretrained(tmp_path).vae.weights_sha256 != D2iT.from_pretrained(saved).vae.weights_sha256


def test_a_fifo_is_no_description(folder):
    (folder / "d2it.json").unlink()
    os.mkfifo(folder / "d2it.json")
    with pytest.raises(ValueError, match=r"no d2it\.json"):
        D2iT.from_pretrained(folder)


# ---- the original DiT


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    from tests.test_models_dit import original_state

    return original_state()


class Touch:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_as_dits_trainer_writes_them(original, tmp_path):
    file = tmp_path / "0400000.pt"
    arguments = argparse.Namespace(lr=1e-4, num_classes=3, results_dir="results")
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in original.items()}
    table = "y_embedder.embedding_table.weight"
    for content, null in (
        ({"model": {}, "ema": original, "opt": {}, "args": arguments}, True),
        ({"model": prefixed}, True),
        ({"ema": prefixed}, True),
        ({"ema": original | {table: original[table][:3]}, "args": arguments}, False),
    ):
        torch.save(content, file)
        with pytest.warns(UserWarning, match="label table") if "args" not in content else pytest.MonkeyPatch.context():
            model = convert.load_dit(file, heads=2)
        assert model.config.num_classes == 3
        assert model.config.class_dropout_prob == (0.1 if null else 0.0)
        assert torch.equal(model.trunk.condition.label.weight[:3], original[table][:3])
        assert torch.equal(model.trunk.condition.label.weight[3], original[table][3] if null else torch.zeros(16))


def test_a_table_without_a_null_row(original, tmp_path):
    state = original | {"y_embedder.embedding_table.weight": original["y_embedder.embedding_table.weight"][:3]}
    torch.save(state, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="has 3 rows, read as 2 classes and the null label; num_classes=3 reads"):
        assert convert.load_dit(tmp_path / "x.pt", heads=2).config.num_classes == 2
    assert convert.load_dit(tmp_path / "x.pt", heads=2, num_classes=3).config.num_classes == 3
    with pytest.raises(ValueError, match="num_classes must be 2 or 3 for a label table of 3 rows, got 5"):
        convert.load_dit(tmp_path / "x.pt", heads=2, num_classes=5)
    assert sampling.convert.main([str(tmp_path / "x.pt"), str(tmp_path / "m"), "--heads=2", "--num-classes=3"]) == 0
    dit = DiT.from_pretrained(tmp_path / "m")
    vae = DynamicVAE.from_preset("tiny", downsampling=(8,), encoder_mult=(1, 1, 2, 2))
    with pytest.raises(ValueError, match="guidance needs a model that was trained with the null label"):
        D2iT(vae, None, dit)(1, steps=1, guidance=2.0)


def test_nothing_in_a_checkpoint_is_executed(original, tmp_path):
    mark = tmp_path / "mark"
    for content in (
        Touch(mark),
        {"ema": original, "args": Touch(mark)},
        {"ema": original, "args": argparse.Namespace(hidden=Touch(mark))},
        {**original, "x_embedder.proj.bias": Touch(mark)},
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="cannot be read as weights"):
            convert.load_dit(tmp_path / "x.pt", heads=2)
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="cannot be read as weights"):
            convert.load_dit(tmp_path / "x.pt", heads=2)
    assert not mark.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_nothing_in_a_folder_of_diffusers_is_executed(tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, **blocks).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"encoder.conv_in.bias": Touch(tmp_path / "mark")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is no folder with an AutoencoderKL of diffusers"):
        KLVAE.from_diffusers(tmp_path)
    assert not (tmp_path / "mark").exists()


# ---- earlier versions, and models without memory


def test_the_operators_import_nothing_else_of_the_package():
    code = "import sys, d2it.ops; print(*(m for m in sys.modules if m.startswith('d2it.')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[1] for name in found} == {"kernels", "ops"}


def test_names_that_have_moved_are_found():
    with pytest.warns(DeprecationWarning, match="D2iT has moved: from d2it.sampling import D2iT"):
        assert models.D2iT is D2iT
    with pytest.warns(DeprecationWarning, match="Samples has moved"):
        assert models.Samples is sampling.Samples
    with pytest.raises(AttributeError, match="no attribute 'Sample'"):
        _ = models.Sample
    from d2it.evaluation.drawing import read_grain_maps

    assert read_grain_maps is importlib.import_module("d2it.sampling.grain_maps").read_grain_maps


def test_the_command_that_has_moved():
    done = subprocess.run([sys.executable, "-m", "d2it.models.convert", "a", "b"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this command has moved: python -m d2it.sampling.convert\n"


def test_models_without_memory():
    with torch.device("meta"):
        parts = [
            DynamicVAE.from_preset("f8f16"),
            DynamicGrainTransformer.from_preset("DiT-S"),
            DynamicContentTransformer.from_preset("D2iT-XL"),
            DiT.from_preset("DiT-XL/2"),
            PatchDiscriminator(),
            VAELoss(VAELossConfig()),
        ]
        for part in parts:
            assert {x.device.type for x in (*part.parameters(), *part.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 8, device="meta")}, "x must be on cpu as the model is, got meta"),
        ({"y": torch.zeros(2, dtype=torch.long, device="meta")}, "y must be on cpu as the model is, got meta"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.float16)}, "x must be torch.float32 as the weights are"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.int64)}, "x must be torch.float32 as the weights are"),
    ],
)
def test_inputs_of_another_device_or_dtype(change, message):
    model = DiT.from_preset("tiny", image_size=64, **SMALL)
    given = {"x": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        model(**given | change)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int64])
def test_images_of_another_dtype(dtype):
    with pytest.raises(ValueError, match=r"images must be torch\.float32 as the weights are"):
        DynamicVAE.from_preset("tiny").encode(torch.zeros(1, 3, 64, 64, dtype=dtype))
