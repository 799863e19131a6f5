"""REPA: a trunk block follows a teacher's features, which the cache holds; nothing of it is published."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from d2it.data import DemoPhotos, LatentCache
from d2it.distributed import World
from d2it.models import DiT, DynamicContentTransformer, DynamicVAE
from d2it.models.efficientnet import efficientnet_lite
from d2it.models.repa import Alignment, RepaConfig, open_teacher, token_grid
from d2it.training.config import load
from d2it.training.content import ContentStage
from d2it.training.latents import LatentData
from d2it.training.run import main
from d2it.training.summary import Summary
from tests.test_train_run import SMALL

lite = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="d2it[lite] is not there"
)
OF_TWO = ["content.overrides.depth=2", "content.repa.block=1", "content.repa.hidden=16"]
WORLD = World(0, 1, 1, torch.device("cpu"))
TEACHER = ["content.repa.teacher=efficientnet-lite0"]


def network(kind):
    if kind is DiT:
        return DiT.from_preset("DiT-S/2", dim=32, heads=2, depth=3, image_size=32, downsampling=4, num_classes=3)
    return DynamicContentTransformer.from_preset(
        "tiny", dim=32, heads=2, depth=3, image_size=32, downsampling=(4, 8), num_classes=3
    )


def inputs(net, batch, generator):
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    t, y = torch.full((batch,), 300), torch.arange(batch) % 3
    given = {} if isinstance(net, DiT) else {"grain_map": torch.randint(2, (batch, 4, 4), generator=generator)}
    return (x, t, y), given


@pytest.mark.parametrize("kind", [DiT, DynamicContentTransformer])
@pytest.mark.parametrize("recompute", [False, True])
def test_alignment_is_the_cosine_after_its_block(kind, recompute):
    """Against the definition in float64 on the stream as it enters the next block, gradients included."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    net = network(kind)
    for p in net.parameters():  # the modulations begin at zero
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    net.gradient_checkpointing = recompute
    trunk = net.trunk if kind is DiT else net.multi_grained
    alignment = Alignment(net, RepaConfig(block=2, hidden=24), 7)
    assert token_grid(net) == (4, 4)
    features = torch.randn(5, 7, 4, 4, generator=generator)
    seen = []
    trunk.blocks[2].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    arguments, given = inputs(net, 5, generator)
    net(*arguments, **given)
    loss = alignment(features)

    mapped = alignment.projector.double()(seen[0].double())
    alignment.projector.float()
    wanted = features.double().permute(0, 2, 3, 1).reshape(5, 16, 7)
    cosine = (mapped * wanted).sum(-1) / (mapped.norm(dim=-1) * wanted.norm(dim=-1))
    torch.testing.assert_close(loss.double(), 1 - cosine.mean(1), rtol=1e-5, atol=1e-5)

    cotangent = torch.randn(5, generator=generator)
    net(*arguments, **given)
    alignment(features).backward(cotangent)
    assert all(p.grad.abs().max() > 0 for p in trunk.blocks[1].attn.parameters() if p.ndim > 1)
    assert trunk.blocks[2].attn.qkv.weight.grad is None
    assert not any("projector" in name for name in net.state_dict())


def test_a_block_that_the_trunk_has_not():
    with pytest.raises(ValueError, match="block must be at most the 3 blocks of the trunk, got 4"):
        Alignment(network(DiT), RepaConfig(block=4), 7)


@lite
@pytest.mark.parametrize(
    ("name", "channels", "blocks"), [("efficientnet-lite0", 112, 11), ("efficientnet-lite2", 120, 15)]
)
def test_lite_teachers_end_at_stride_16(name, channels, blocks):
    teacher = open_teacher(name)
    images = torch.randint(256, (2, 3, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = teacher(images, (3, 2))  # 48 x 32 pixels: as they are
    network, _ = efficientnet_lite(name)
    x = network._swish(network._bn0(network._conv_stem((images.float() - 127) / 128)))
    for block in network._blocks[:blocks]:
        x = block(x)
    assert teacher.channels == channels
    assert found.shape == (2, channels, 3, 2)
    torch.testing.assert_close(found, x)
    assert teacher(images, (4, 4)).shape == (2, channels, 4, 4)


def test_vision_transformers_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    teacher = open_teacher(str(tmp_path))
    images = torch.randint(256, (2, 3, 28, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    with torch.no_grad():
        tokens = model(pixel_values=(images / 255 - mean) / deviation).last_hidden_state
    assert tokens.shape == (2, 7, 12)  # a class token, then six patches
    torch.testing.assert_close(teacher(images, (2, 3)), tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 3)))


SMALL_TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "reg_tokens": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)},
    "mixer_s32_224": {"img_size": 32},
}


def timm_model(name, folder):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model(name, num_classes=3, **SMALL_TIMM[name]).eval()
    timm.models.save_for_hf(model, folder, model_args=SMALL_TIMM[name], safe_serialization=True)
    return model


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("vit_tiny_patch16_224", (48, 32), 24), ("convnext_atto", (96, 64), 16)]
)
def test_models_of_timm_from_a_folder(tmp_path, name, size, channels):
    """The features before pooling and head, of images with another size than the model's."""
    model = timm_model(name, tmp_path)
    teacher = open_teacher(str(tmp_path))
    assert (teacher.channels, teacher.facts["name"]) == (channels, name)
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    with torch.no_grad():
        features = model.forward_features((images / 255 - mean) / deviation)
    if features.ndim == 3:  # a class token and two registers, then six patches
        assert features.shape[1] == 9
        features = features[:, 3:].transpose(1, 2).unflatten(2, (3, 2))
    found = teacher(images, (3, 2))
    torch.testing.assert_close(found, features)
    assert teacher(images, (2, 2)).shape == (2, channels, 2, 2)
    torch.testing.assert_close(teacher(images, (3, 2)), found)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=f"{tmp_path}: "):
        open_teacher(str(tmp_path))


def test_models_of_timm_that_cannot_teach(tmp_path):
    timm_model("mixer_s32_224", tmp_path)
    with pytest.raises(ValueError, match="mixer_s32_224 takes images of one size alone"):
        open_teacher(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "nothing"}))
    with pytest.raises(ValueError, match=r"timm .* has no model 'nothing'"):
        open_teacher(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is no model of timm: there is no model\.safetensors"):
        open_teacher(str(tmp_path))


def test_teachers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder: nowhere; by name there are efficientnet-lite0"):
        open_teacher("nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "patch_size": 14}))
    with pytest.raises(ValueError, match=r"is no vision transformer: .*model\.safetensors"):
        open_teacher(str(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with REPA, of a content transformer alone."""
    folder = tmp_path_factory.mktemp("repa") / "run"
    stages = ["run.stages=[dvae,cache,content]", f"run.dir={folder}"]
    assert main([*SMALL, *OF_TWO, *TEACHER, *stages]) == 0
    return folder


@lite
def test_a_run_with_repa(trained):
    """The cache has the teacher's features of the images and their mirror images; the model is as without."""
    cache = LatentCache(trained / "cache", extras=("teacher",))
    source = DemoPhotos(32, crops=16)
    images = source.fetch([3, 8])["image"]
    found = cache.fetch([3, 8])["teacher"]
    assert found.shape == (2, 112, 2, 2)
    assert cache.facts["teacher"]["grid"] == [2, 2]
    teacher = open_teacher("efficientnet-lite0")
    torch.testing.assert_close(found.float(), teacher(images, (2, 2)), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        cache._tensors[0]["teacher"][3, 1].float(), teacher(images[:1].flip(3), (2, 2))[0], rtol=2e-3, atol=2e-3
    )
    rows = [json.loads(line) for line in (trained / "logs" / "content.jsonl").read_text().splitlines()]
    assert all(0 < row["content/repa"] < 2 for row in rows)
    saved = load_file(trained / "content_transformer" / "model.safetensors")
    plain = DynamicContentTransformer.from_pretrained(trained / "content_transformer")
    assert saved.keys() == plain.state_dict().keys()


@lite
def test_its_costs_are_counted():
    """The projector's products are in the meters, its weights and what it keeps in the summary's memory."""
    found = {}
    for name, given in (("without", []), ("with", TEACHER)):
        config = load(None, [*SMALL, *OF_TWO, *given])
        data = LatentData.of_vae(DynamicVAE.preset_config("tiny"), (32, 32), images=4)
        with torch.device("meta"):
            stage = ContentStage(config, config.content, WORLD, data, None)
        torch.manual_seed(0)
        batch = stage.synthetic(4, torch.device("meta"))
        torch.manual_seed(0)  # for the summary's own maps
        found[name] = stage.work(batch), Summary(stage, config.content, WORLD)
    (plain, before), (work, after) = found["without"], found["with"]
    projector = stage.alignment.projector
    with FlopCounterMode(display=False) as counter:
        projector(torch.empty(4 * 4, 128, device="meta"))  # four tokens an image
    assert work.macs - plain.macs == counter.get_total_flops() // 2
    assert work.tokens == plain.tokens
    assert after.state - before.state == 20 * sum(p.numel() for p in projector.parameters())
    kept = 4 * 4 * (128 + 4 * 16 + 112)  # its input, both hidden layers before and after SiLU, its output
    assert after.activations - before.activations == 4 * kept
    assert "repa: Alignment, 0.00 M parameters" in after.text
    assert "REPA: trunk block 1 follows efficientnet-lite0" in after.text


@lite
def test_repa_over_other_caches(trained, tmp_path, capsys):
    """A run without REPA takes a cache that has features; one with it says what is missing from another."""
    folder = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "content")
    stages = [f"run.dir={folder}", "run.stages=[cache,content]"]
    assert main([*SMALL, *OF_TWO, *stages]) == 0
    rows = (folder / "logs" / "content.jsonl").read_text()
    assert "content/repa" not in rows
    shutil.rmtree(folder / "cache")
    shutil.rmtree(folder / "checkpoints" / "content")
    assert main([*SMALL, *OF_TWO, *stages]) == 0
    shutil.rmtree(folder / "checkpoints" / "content")
    capsys.readouterr()
    for stage in ("content", "cache"):
        assert main([*SMALL, *OF_TWO, *TEACHER, f"run.dir={folder}", f"run.stages=[{stage}]"]) != 0
        assert "teacher" in capsys.readouterr().err.splitlines()[-1]


@lite
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["content.repa.block=3"], "content.repa: block must be at most the 2 blocks of the trunk, got 3"),
        (["content.repa.teacher=nowhere"], "content.repa: no such folder: nowhere"),
        (["content.repa.block=0"], "content.repa.block must be at least 1, got 0"),
        (["content.repa.weight=-1"], "content.repa.weight must be 0 or more, got -1.0"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_trained(tmp_path, capsys, settings, line):
    assert main([*SMALL, *OF_TWO, *TEACHER, f"run.dir={tmp_path / 'run'}", *settings]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "vae").exists()
