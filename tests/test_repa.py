"""REPA: a trunk block follows a teacher's features, which the cache holds; nothing of it is published."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2it.data import DemoPhotos, LatentCache
from d2it.models import DiT, DynamicContentTransformer
from d2it.models.efficientnet import efficientnet_lite
from d2it.models.repa import Alignment, RepaConfig, open_teacher, token_grid
from d2it.training.run import main
from tests.test_train_run import SMALL

lite = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="d2it[lite] is not there"
)
OF_TWO = ["content.overrides.depth=2", "content.repa.block=1", "content.repa.hidden=16"]
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
        (["content.parallel=fsdp"], "content.parallel must be ddp with content.repa, got fsdp"),
        (["content.repa.block=0"], "content.repa.block must be at least 1, got 0"),
        (["content.repa.weight=-1"], "content.repa.weight must be 0 or more, got -1.0"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_trained(tmp_path, capsys, settings, line):
    assert main([*SMALL, *OF_TWO, *TEACHER, f"run.dir={tmp_path / 'run'}", *settings]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "vae").exists()
