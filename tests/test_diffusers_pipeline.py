"""A saved D2iT as diffusers loads it, and its model card as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.models.base import local_folder
from d2it.sampling import D2iT
from d2it.sampling.diffusers_pipeline import D2iTPipeline

SMALL = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = D2iT(
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **SMALL),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **SMALL),
        class_names=["cat", "dog", "golden retriever"],
        sampling={"scheduler": "ddim", "steps": 2},
        facts={"data": {"source": "photos|mine", "images": 7}, "settings": {"seed": 3}, "license": "cc0-1.0"},
    )
    path = tmp_path_factory.mktemp("saved") / "small"
    model.save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DiffusionPipeline]:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


def test_pil_images_of_seeded_generators(pipe: DiffusionPipeline, folder: Path) -> None:
    out = pipe(class_labels=["cat", 2], generator=torch.Generator().manual_seed(5))
    assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in out.images)
    assert out.grain_maps.shape == (2, 4, 4)
    generator = torch.Generator().manual_seed(5)
    seeds = [int(torch.randint(2**63 - 1, (), generator=generator)) for _ in range(2)]
    expected = D2iT.from_pretrained(folder)(labels=[0, 2], seeds=seeds)
    assert np.array_equal(np.stack([np.asarray(image) for image in out.images]), expected.uint8())
    again = [torch.Generator().manual_seed(5) for _ in range(2)]
    both = pipe(class_labels=[0, 0], generator=again, num_inference_steps=1, output_type="pt", return_dict=False)
    assert torch.equal(both[0][0], both[0][1])
    assert 0 <= both[0].min() < both[0].max() <= 1
    array = pipe(num_images=1, grain_map=torch.ones(4, 4, dtype=torch.int64), output_type="np")
    assert array.images.shape == (1, 64, 64, 3)
    assert array.grain_maps.min() == 1


def test_callbacks_and_the_progress_bar(pipe: DiffusionPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    seen = []
    pipe(
        class_labels="dog",
        num_images=2,
        num_inference_steps=3,
        callback_on_step_end=lambda p, step, t, given: seen.append((p is pipe, step, given["latents"].shape)),
    )
    assert sorted(seen) == sorted([(True, step, (1, 4, 8, 8)) for step in range(3)] * 2)
    assert "6/6" in capsys.readouterr().err


def test_bad_arguments(pipe: DiffusionPipeline) -> None:
    for given, message in [
        ({"output_type": "jpeg"}, "output_type must be pil, np or pt, got 'jpeg'"),
        ({"class_labels": "cow"}, "labels: no class 'cow'"),
        ({"num_images": 3, "generator": [torch.Generator()] * 2}, "generator must be one, or one for each of the 3"),
        ({"num_inference_steps": 0}, "num_inference_steps must be in 1 ... 1000, got 0"),
        ({"num_inference_steps": "ten"}, "num_inference_steps must be a whole number in 1 ... 1000, got 'ten'"),
        ({"num_images": "3"}, "num_images must be a whole number"),
        ({"class_labels": 1.5}, "labels must be a whole number"),
        ({"generator": 3}, "generator must be one or several torch.Generator on the CPU, got 3"),
        ({"generator": [None, "cpu"]}, "generator must be one or several torch.Generator on the CPU, got 'cpu'"),
        ({"grain_map": "fine"}, "grain_map must be a tensor, got str"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be callable, got 5"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            pipe(**given)


def test_saved_cast_and_read_again(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    want = pipe(generator=torch.manual_seed(0)).images[0]
    pipe.save_pretrained(str(tmp_path / "again"))
    again = D2iTPipeline.from_pretrained(str(tmp_path / "again"))
    assert again(generator=torch.manual_seed(0)).images[0] == want
    assert again.to(torch.bfloat16).model.dtype == torch.bfloat16
    assert next(again.model.vae.parameters()).dtype == torch.float32
    half = D2iTPipeline.from_pretrained(str(tmp_path / "again"), torch_dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16


def test_the_model_card(folder: Path, tmp_path: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.library_name == "d2it"
    model = D2iT.from_pretrained(folder)
    for part in model.parts.values():
        assert f"`{part.weights_sha256}`" in card.text
    for line in ("| source | photos\\|mine |", "| seed | 3 |", "| steps | 2 |", "Not evaluated"):
        assert line in card.text
    # Scores of the evaluation's report, and somebody's own text.
    (tmp_path / "evaluation.json").write_text(json.dumps({"metrics": {"fid": 12.34567, "count": 50}}))
    del model.facts["license"]
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| fid | 12.35 |" in text
    assert "not stated" in text
    # Names may hold anything: they stay in their cells, and the code in its block.
    hostile = tmp_path / 'a"b\n# c'
    model.facts = {"data": {"source\n\n# x": "a|b\n---\n<script>`"}, "license": "mine\n\n# y"}
    model.save_pretrained(hostile)
    text = (hostile / "README.md").read_text()
    assert "| source # x | a\\|b --- \\<script\\>\\` |" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ['# a"b # c']
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    (tmp_path / "README.md").write_text("my own")
    D2iT.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"
    assert D2iT.from_pretrained(tmp_path).facts["settings"] == {"seed": 3}


def test_a_name_is_a_repository_of_the_hub_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **given: asked.append((name, given)) or "/cache/model"
    )
    assert local_folder("user/model", "D2iT", revision="v2") == "/cache/model"
    assert asked == [("user/model", {"revision": "v2"})]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert local_folder("user/model", "D2iT") == "user/model"
    assert local_folder(Path("other/model"), "D2iT") == "other/model"
    assert len(asked) == 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"there is no folder 'nobody/nothing' to read a D2iT from, nor can it be had"):
        local_folder("nobody/nothing", "D2iT", local_files_only=True, cache_dir=str(tmp_path))
