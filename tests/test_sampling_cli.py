"""sample.py and D2iT: the same images for any batch and any number of ranks, every source of maps, clear errors."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from d2it import pictures
from d2it.diffusion import SCHEDULERS, GaussianDiffusion, Guidance, make_scheduler, sample_content
from d2it.diffusion.solvers import Diffusers
from d2it.evaluation.generation import compare, open_reference, summarize
from d2it.evaluation.inception import Features
from d2it.models import (
    KLVAE,
    DiT,
    DynamicContentTransformer,
    DynamicGrainTransformer,
    DynamicVAE,
    KLVAEConfig,
)
from d2it.models.base import PyTorchModelHubMixin
from d2it.sampling import D2iT, convert, pipeline
from d2it.sampling.cli import main
from d2it.seeds import derived_seed

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy of what diffusers does
]


def randomize(*parts) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in parts:
            for p in part.eval().parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def small(num_classes: int | None = 3) -> D2iT:
    """Random weights with every gate open, images of 64 x 64, maps of 4 x 4."""
    settings = {"dim": 32, "depth": 1, "heads": 2, "num_classes": num_classes}
    parts = (
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **settings),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **settings),
    )
    randomize(*parts)
    names = None if num_classes is None else ["cat", "dog", "golden retriever"]
    sampling = {"scheduler": "ddim", "steps": 2, "guidance": 1.5 if num_classes else 1.0}
    return D2iT(*parts, class_names=names, sampling=sampling)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small().save_pretrained(path)
    return path


def sample(folder: Path, out: Path, *words: object) -> dict:
    """Runs the command; its settings, maps and images."""
    assert main([str(folder), "--output", str(out), *map(str, words)]) == 0
    images = {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("[0-9]*.png"))}
    return {
        "maps": np.load(out / "grain_maps.npy"),
        "images": images,
        **json.loads((out / "settings.json").read_text()),
    }


# ---- the same images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_images_do_not_depend_on_batch_threads_or_company(dtype):
    model, threads = small().to(dtype=dtype), torch.get_num_threads()
    drawn = []
    try:
        for count in (1, 3):
            for batch_size in (1, 8):
                torch.set_num_threads(count)
                drawn.append(model(8, seed=5, batch_size=batch_size))
                assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert 0 < drawn[0].grain_maps.float().mean() < 1
    assert drawn[0].images[0].ne(drawn[0].images[1]).any()
    for other in drawn[1:]:
        assert torch.equal(other.images, drawn[0].images)
        assert torch.equal(other.grain_maps, drawn[0].grain_maps)
    alone = model(seeds=[9], labels=drawn[0].labels[4:5])
    assert torch.equal(alone.images[0], drawn[0].images[4])


def test_threads_are_given_back_after_an_error(monkeypatch):
    model, threads = small(), torch.get_num_threads()
    monkeypatch.setattr(model.vae, "decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(2)
    assert torch.get_num_threads() == threads


WORKER = """
import sys, torch
from d2it.errors import UserError
from d2it.evaluation.generation import summarize
from d2it.sampling.cli import parser, run
from d2it.sampling import D2iT
from d2it.distributed import start, stop
sys.path.insert(0, sys.argv[3])
from test_sampling_cli import features_of, noise_images
folder, out = sys.argv[1:3]
world = start("cpu")  # once: groups that are made anew meet the addresses of the old ones
mine = range(world.rank, 6, 2)
torch.save(D2iT.from_pretrained(folder)(seeds=mine, labels=[1]).images, f"{out}/{world.rank}.pt")
def sample(*words):
    run(parser().parse_args([folder, "--batch-size", "2", *words]), world)
for count, where in (("6", "many"), ("1", "one")):
    sample("--count", count, "--output", f"{out}/{where}", "--npz", f"{out}/{where}.npz")
try:
    sample("--guidance", "2", "--cfg-channels", "9", "--output", f"{out}/wrong", "--count", "1")
except UserError as error:  # on both ranks, though only the first one drew
    print(f"told {error}", file=sys.stderr)
for count in (9, 5, 4):  # of 5 and of 4 the second rank has one batch, and none
    numbers = torch.arange(count).split(4)[world.rank :: 2]
    told = summarize(noise_images(count).split(4)[world.rank :: 2], features_of, labels=numbers)
    if world.first:
        told.save(f"{out}/{count}.npz")
stop()
"""


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


def features_of(images: torch.Tensor) -> Features:
    rows = images.float().flatten(1) / 255
    return Features(rows[:, :6], rows[:, 6:16], rows[:, :5].softmax(dim=1))


def test_two_ranks_draw_what_one_draws(folder, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), str(tmp_path), str(ROOT / "tests")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("told guidance channels must be at most 4, got 9") == 2
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = D2iT.from_pretrained(folder)(seeds=range(6), labels=[1], batch_size=4).images
    assert torch.equal(torch.stack([ranks[i % 2][i // 2] for i in range(6)]), alone)
    one = sample(folder, tmp_path / "alone", "--count", 6, "--npz", tmp_path / "alone.npz")
    for name, image in one["images"].items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "many" / name)), image)
    assert np.array_equal(np.load(tmp_path / "many" / "grain_maps.npy"), one["maps"])
    for name in ("grid.png", "grid_grain_maps.png"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    with np.load(tmp_path / "many.npz") as many, np.load(tmp_path / "alone.npz") as other:
        assert np.array_equal(many["arr_0"], other["arr_0"])
        assert np.array_equal(many["arr_1"], [0, 1, 2, 0, 1, 2])
        assert np.array_equal(many["arr_0"], np.stack(list(one["images"].values())))
    assert len(list((tmp_path / "one").glob("0*.png"))) == 1  # the second rank had nothing to draw
    for count in (9, 5, 4):
        both, alone = (
            open_reference(tmp_path / f"{count}.npz", features_of),
            summarize([noise_images(count)], features_of),
        )
        assert both.count == count
        # Features and labels of the ranks are joined in one order.
        assert sorted(both.labels.tolist()) == list(range(count))
        torch.testing.assert_close(both.features, alone.features[both.labels])
        torch.testing.assert_close(both.pool.covariance, alone.pool.covariance, rtol=1e-9, atol=1e-12)
        assert compare(alone, both, ["sfid"])["sfid"] == pytest.approx(0, abs=1e-6)
    assert not list(tmp_path.glob("*rank*"))
    assert not list(tmp_path.rglob("*.tmp"))


# ---- what the options mean


def test_bare(folder, tmp_path):
    told = sample(folder, tmp_path / "a", "--count", 3)
    assert list(told["images"]) == ["000000.png", "000001.png", "000002.png"]
    assert (told["labels"], told["scheduler"], told["steps"], told["guidance"]) == ("balanced", "ddim", 2, 1.5)
    expected = D2iT.from_pretrained(folder)(3, labels=[0, 1, 2]).uint8()
    assert np.array_equal(np.stack(list(told["images"].values())), expected)
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert grid.shape == np.asarray(Image.open(tmp_path / "a" / "grid_grain_maps.png")).shape
    assert min(grid.shape[:2]) >= 64
    again = sample(folder, tmp_path / "a", "--count", 3, "--seed", 1)  # over the old ones
    assert np.array_equal(again["maps"][0], D2iT.from_pretrained(folder)(seeds=[1], labels=[0]).grain_maps[0])


def test_labels(folder, tmp_path):
    named = sample(folder, tmp_path, "--count", 3, "--labels", "golden retriever", "0", "--npz", tmp_path / "x.npz")
    assert named["labels"] == [2, 0]
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_1"].tolist() == [2, 0, 2]
    drawn = sample(folder, tmp_path / "r", "--count", 3, "--random", "--npz", tmp_path / "r.npz")
    expected = D2iT.from_pretrained(folder)(3)
    with np.load(tmp_path / "r.npz") as archive:
        assert archive["arr_1"].tolist() == expected.labels.tolist()
    assert drawn["labels"] == "random"
    assert np.array_equal(np.stack(list(drawn["images"].values())), expected.uint8())


def test_sampler_options_reach_the_sampler(folder, tmp_path):
    words = ["--scheduler", "heun", "--steps", 3, "--grain-steps", 2, "--guidance", 2, "--cfg-channels", 3]
    told = sample(folder, tmp_path, "--count", 1, *words, "--guidance-interval", 0.1, 0.5, "--precision", "bf16")
    guidance = Guidance(2.0, "interval", (0.1, 0.5), channels=3)
    model = D2iT.from_pretrained(folder, dtype=torch.bfloat16)
    expected = model(1, labels=[0], scheduler="heun", grain_scheduler="ddpm", steps=3, grain_steps=2, guidance=guidance)
    assert np.array_equal(told["images"]["000000.png"], expected.uint8()[0])
    assert told["guidance"] == {"scale": 2, "mode": "interval", "interval": [0.1, 0.5], "power": 4, "channels": 3}
    assert told["dtype"] == "bfloat16"
    plain = sample(folder, tmp_path, "--count", 1, *words[:6])
    assert (plain["images"]["000000.png"] != told["images"]["000000.png"]).any()


def test_a_weaker_model_guides(folder, tmp_path, capsys):
    model, weaker = D2iT.from_pretrained(folder), small()
    with torch.no_grad():
        for p in weaker.content_transformer.parameters():
            p.mul_(0.9)
    weaker.save_pretrained(tmp_path / "weaker")
    words = ["--count", 2, "--steps", 2, "--guidance", 2, "--guide", tmp_path / "weaker"]
    told = sample(folder, tmp_path / "out", *words)
    expected = model(2, labels=[0, 1], steps=2, guidance=2.0, guide=weaker.content_transformer)
    assert np.array_equal(np.stack(list(told["images"].values())), expected.uint8())
    assert told["guide"] == str(tmp_path / "weaker")
    assert told["weights"]["guide"] == weaker.content_transformer.weights_sha256
    capsys.readouterr()
    assert main([*map(str, [folder, "--output", tmp_path / "out", *words[:5], 1, *words[6:]])]) == 2
    assert capsys.readouterr().err.startswith(f"error: --guide {tmp_path / 'weaker'} has no effect at a guidance of 1")


def test_without_classes(tmp_path, capsys):
    small(None).save_pretrained(tmp_path / "m")
    told = sample(tmp_path / "m", tmp_path / "s", "--count", 2, "--no-images", "--npz", tmp_path / "n" / "x.npz")
    assert (told["images"], told["labels"]) == ({}, None)
    with np.load(tmp_path / "n" / "x.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == (2, 64, 64, 3)
    for words, line in ((["--labels", "0"], "this model is unconditional"), (["--guidance", "2"], "guidance needs")):
        assert main([str(tmp_path / "m"), "--output", str(tmp_path / "t"), *words]) == 2
        assert line in capsys.readouterr().err


MAP = np.array([[0, 0, 1, 1]] * 3 + [[1, 0, 1, 0]])


def written(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, grain_maps=values)
    elif path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def test_maps_from_files(folder, tmp_path):
    noise = np.random.default_rng(0).integers(-50, 50, MAP.shape)
    painted = (MAP * 255 + noise).clip(0, 255)
    for name, values in {"a.npy": MAP, "b.png": MAP * 255, "c.png": MAP, "d.png": painted}.items():
        told = sample(folder, tmp_path / "s", "--count", 2, "--grain-map", written(tmp_path / name, values))
        assert np.array_equal(told["maps"], np.stack([MAP, MAP])), name
    told = sample(
        folder, tmp_path / "s", "--count", 3, "--grain-map", written(tmp_path / "e.npz", np.stack([MAP, 1 - MAP]))
    )
    assert np.array_equal(told["maps"], np.stack([MAP, 1 - MAP, MAP]))
    assert told["fine_ratio"] == pytest.approx(told["maps"].mean())


def test_map_of_a_photo(folder, tmp_path):
    pixels = np.full((64, 80, 3), 128, np.uint8)
    pixels[32:] = np.random.default_rng(0).integers(0, 256, (32, 80, 3))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    told = sample(folder, tmp_path / "s", "--count", 2, "--photo", tmp_path / "photo.png")
    lower = np.tile(np.array([[0], [0], [1], [1]]), (1, 4))
    assert np.array_equal(told["maps"], np.stack([lower, lower]))
    (tmp_path / "photos").mkdir()
    os.replace(tmp_path / "photo.png", tmp_path / "photos" / "a.png")
    Image.fromarray(pixels[::-1]).save(tmp_path / "photos" / "b.png")
    told = sample(folder, tmp_path / "s", "--count", 3, "--photo", tmp_path / "photos")
    assert np.array_equal(told["maps"], np.stack([lower, lower[::-1], lower]))
    assert told["grain_maps"].endswith("photos, 2 photos in turn")


def test_random_maps(folder, tmp_path):
    told = sample(folder, tmp_path, "--count", 4, "--fine-ratio", 0.3)
    assert told["maps"].sum(axis=(1, 2)).tolist() == [5] * 4
    assert len({m.tobytes() for m in told["maps"]}) == 4
    assert np.array_equal(sample(folder, tmp_path, "--count", 4, "--fine-ratio", 0.3)["maps"], told["maps"])


@pytest.fixture(scope="module")
def three_grains(tmp_path_factory) -> Path:
    settings = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    factors = {"downsampling": (4, 8, 16)}
    parts = (
        DynamicVAE.from_preset(
            "tiny", encoder_mult=(1, 1, 2, 2, 4), decoder_mult=(1, 1, 2), thresholds=(3.0, 4.5), **factors
        ),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), num_grains=3, **settings),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **factors, **settings),
    )
    randomize(*parts)
    path = tmp_path_factory.mktemp("three")
    D2iT(*parts, sampling={"scheduler": "ddim", "steps": 2, "guidance": 1.5}).save_pretrained(path)
    return path


def test_three_grains_are_sampled_drawn_and_photographed(three_grains, tmp_path):
    out = tmp_path / "s"
    told = sample(three_grains, out, "--count", 2)
    assert told["maps"].shape == (2, 4, 4)
    assert set(np.unique(told["maps"])) <= {0, 1, 2}
    levels = np.arange(16).reshape(4, 4) % 3
    drawn = written(tmp_path / "black-gray-white.png", levels * 127.5)
    told = sample(three_grains, out, "--count", 2, "--grain-map", drawn)
    assert np.array_equal(told["maps"], np.stack([levels, levels]))
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:32, :32] += 3 * np.arange(32, dtype=np.uint8)[:, None]  # an entropy between the thresholds
    pixels[:, 32:] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    told = sample(three_grains, out, "--count", 2, "--photo", tmp_path / "photo.png")
    assert told["maps"].tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]]] * 2
    told = sample(three_grains, out, "--count", 2, "--fine-ratio", 0.5, 0.25)
    assert [np.bincount(m.flat, minlength=3).tolist() for m in told["maps"]] == [[8, 4, 4]] * 2
    assert told["grain_maps"] == "random, fine ratio 0.5 0.25"
    told = sample(three_grains, out, "--count", 2, "--fine-ratio", 0.5)
    assert [np.bincount(m.flat, minlength=3).tolist() for m in told["maps"]] == [[8, 0, 8]] * 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--fine-ratio", 0.5, 0.25, 0.1], "--fine-ratio must be 1 or 2 shares for 3 grains, got 3"),
        (["--fine-ratio", 0.25, 0.5], "--fine-ratio must descend"),
    ],
)
def test_shares_that_do_not_fit_three_grains(three_grains, tmp_path, capsys, words, line):
    assert main([str(three_grains), "--output", str(tmp_path), *map(str, words)]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--count", 0], "--count must be at least 1, got 0"),
        (["--count", 10**20], "--count must be at most 10,000,000, got 100000000000000000000"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--scheduler", "magic"], "scheduler must be one of ddpm, ddim"),
        (["--grain-scheduler", "heun"], "scheduler must be one of ddpm, ddim, dpm++, sde-dpm++, dpm++s, unipc, deis,"),
        (["--steps", 2000], "steps must be in 1 ... 1000, got 2000"),
        (["--labels", 0, 3], "--labels must be in 0 ... 2, got 3"),
        (["--labels", -1], "--labels must be in 0 ... 2, got -1"),
        (["--labels", "retriever"], "--labels: no class 'retriever'; there are golden retriever, ..."),
        (["--guidance", "nan"], "guidance scale must be finite"),
        (["--guidance-interval", 0.9, 0.1], "guidance interval must be"),
        (["--guidance", 2, "--guide", "missing"], "there is no folder 'missing/content_transformer'"),
        (["--guidance", 2, "--cfg-channels", 5], "guidance channels must be at most 4, got 5"),
        (["--fine-ratio", 1.5], "--fine-ratio must be in 0 ... 1, got 1.5"),
        (["--grain-map", "missing.npy"], "missing.npy: not a grain map"),
        (["--grain-map", "text.npy"], "text.npy: not a grain map"),
        (["--grain-map", "large.npy"], "large.npy: this model's grain maps have 4 x 4 regions, got 8 x 4"),
        (["--grain-map", "three.npy"], "three.npy: grains must be in 0 ... 1, got 0 ... 2"),
        (["--grain-map", "three.png"], "three.png: gray 128 in row 0, column 1 is none of the levels 0, 255 of"),
        (["--grain-map", "dark.png"], "dark.png: grains must be in 0 ... 1, got 0 ... 2"),
        (["--grain-map", "float.npy"], "float.npy: a grain map is whole numbers"),
        (["--photo", "missing.jpg"], "missing.jpg: No such file"),
        (["--photo", "text.npy"], "text.npy: not a JPEG, PNG, WEBP or BMP image"),
        (["--photo", "three.png"], "three.png: 4 x 4 pixels, the model's images have 64 x 64"),
        (["--photo", "."], "no images"),
        (["--npz", "samples.zip"], "--npz: the name must end in .npz"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs a GPU"),
    ],
    ids=lambda v: "".join(map(str, v)) if isinstance(v, list) else "",
)  # fmt: skip
def test_what_does_not_fit_is_one_line(folder, tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    three = np.tile([0, 1, 2, 0], (4, 1))
    written(Path("large.npy"), np.zeros((8, 4), int))
    written(Path("three.npy"), three)
    written(Path("three.png"), three * 128)
    written(Path("dark.png"), three)
    written(Path("float.npy"), MAP.astype(float))
    Path("text.npy").write_text("words")
    if words == ["--photo", "."]:
        for path in Path().glob("*.png"):
            path.unlink()
    assert main([str(folder), "--output", "out", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert not list(Path("out").glob("*.png"))


def test_no_model_and_another_model(folder, tmp_path, capsys):
    def told(path: Path) -> str:
        assert main([str(path), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "path must be a folder with a trained D2iT" in told(tmp_path / "nowhere")
    other = tmp_path / "other"
    small().save_pretrained(other)
    DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=3).save_pretrained(tmp_path / "wide")
    os.replace(tmp_path / "wide" / "model.safetensors", other / "content_transformer" / "model.safetensors")
    assert "content_transformer/model.safetensors cannot be read: its SHA-256 is" in told(other)
    config = json.loads((other / "content_transformer" / "config.json").read_text())
    del config["sha256"], config["weights"]  # as earlier versions wrote it
    (other / "content_transformer" / "config.json").write_text(json.dumps(config))
    assert "do not fit this DynamicContentTransformer" in told(other)
    small().save_pretrained(other)
    shutil.copy(other / "vae" / "config.json", other / "grain_transformer" / "config.json")
    assert "holds a DynamicVAE, not a DynamicGrainTransformer" in told(other)
    DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=7).save_pretrained(tmp_path / "wide")
    small().save_pretrained(other)
    for name in ("config.json", "model.safetensors"):
        os.replace(tmp_path / "wide" / name, other / "content_transformer" / name)
    assert "the parts of a D2iT must share their number of classes, got 3 and 7" in told(other)


def test_a_smaller_run_does_not_mix_with_a_larger_one(folder, tmp_path, capsys):
    sample(folder, tmp_path, "--count", 3)
    assert main([str(folder), "--output", str(tmp_path), "--count", "2"]) == 2
    assert "holds images of a larger run, 000002.png for one" in capsys.readouterr().err


# ---- the baseline


def test_a_plain_dit_is_sampled_in_the_same_way(tmp_path):
    vae = DynamicVAE.from_preset("tiny", downsampling=(8,), encoder_mult=(1, 1, 2, 2), decoder_mult=(1, 1, 2, 2))
    dit = DiT.from_preset("tiny", image_size=64, dim=32, depth=1, heads=2, num_classes=3)
    randomize(vae, dit)
    D2iT(vae, None, dit).save_pretrained(tmp_path / "m")
    assert pipeline.has_parts(tmp_path / "m")
    told = sample(tmp_path / "m", tmp_path / "s", "--count", 2, "--steps", 2, "--guidance", 2, "--cfg-channels", 3)
    assert told["grain_maps"] == "finest everywhere"
    assert told["maps"].tolist() == np.zeros((2, 8, 8), int).tolist()
    assert told["weights"].keys() == {"vae", "content_transformer"}
    guidance = Guidance(2.0, channels=3)
    seeds = [derived_seed(i, "content") for i in range(2)]
    latents = sample_content(dit, labels=torch.tensor([0, 1]), seeds=seeds, steps=2, guidance=guidance)
    with torch.no_grad():
        images = pictures.to_pictures(vae.decode(latents, torch.zeros(2, 8, 8, dtype=torch.int64)))
    off = np.abs(np.stack(list(told["images"].values())).astype(int) - images)
    assert off.max() <= 1
    # Over a VAE of two grains the map goes to the decoder: the finest grain, or what is given.
    mixed = D2iT(DynamicVAE.from_preset("tiny").eval(), None, dit)
    assert mixed(1, steps=1).grain_maps.float().mean() == 1
    assert mixed(1, steps=1, grain_map=torch.from_numpy(MAP)).grain_maps[0].tolist() == MAP.tolist()


def test_a_d2it_without_grain_transformer_wants_maps():
    whole = small()
    model = D2iT(whole.vae, None, whole.content_transformer)
    with pytest.raises(ValueError, match="grain_map must be given: this model has no Grain Transformer"):
        model(1)
    fine = torch.from_numpy(MAP)
    given = {"grain_map": fine, "scheduler": "ddim", "steps": 2, "guidance": 1.0}
    assert torch.equal(model(1, **given).images, whole(1, **given).images)


def test_dits_released_weights_are_converted_with_their_vae(tmp_path, capsys, monkeypatch):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, scaling_factor=0.18, **blocks)
    kl.save_pretrained(tmp_path / "vae")
    dit = DiT.from_preset("tiny", image_size=64, dim=32, depth=1, heads=2, num_classes=3)
    randomize(dit)
    monkeypatch.setattr(convert, "load_dit", lambda path, **options: dit)
    assert convert.main(["dit.pt", str(tmp_path / "m"), "--vae", str(tmp_path / "vae")]) == 0
    assert "DiT, width 32, 1 blocks, 3 classes" in capsys.readouterr().out
    model = D2iT.from_pretrained(tmp_path / "m")
    assert isinstance(model.vae, KLVAE)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.vae.decode(z, torch.zeros(1, 8, 8)), kl.eval().decode(z).sample)
    assert model.vae.scaling_factor == 0.18
    assert model(2, steps=1).images.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="is no folder with an AutoencoderKL of diffusers"):
        KLVAE.from_diffusers(tmp_path)
    wide = KLVAE(KLVAEConfig({**model.vae.config.network, "latent_channels": 8}))
    with pytest.raises(ValueError, match="must share their latent channels, got 8 and 4"):
        D2iT(wide, None, dit)


# ---- the library


def test_the_example_in_the_docstring():
    found = doctest.DocTestFinder(recurse=False).find(pipeline.D2iT.__call__, "D2iT.__call__", module=pipeline)
    assert len(found) == 1
    assert doctest.DocTestRunner().run(found[0]).failed == 0


def test_the_hub(folder, tmp_path, monkeypatch):
    model = D2iT.from_pretrained(folder, local_files_only=False)  # a folder needs no hub
    assert isinstance(model, PyTorchModelHubMixin)
    pushed = []
    monkeypatch.setattr(D2iT, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs) or "url")
    assert model.save_pretrained(tmp_path / "m", push_to_hub=True, private=True) == "url"
    assert pushed == [{"repo_id": "m", "private": True}]
    files = {str(path.relative_to(tmp_path / "m")) for path in (tmp_path / "m").rglob("*.*")}
    beside = {"d2it.json", "README.md", "model_index.json", "pipeline.py"}
    assert files == {*beside, *(f"{p}/{f}" for p in pipeline.PARTS for f in ("config.json", "model.safetensors"))}
    with pytest.raises(ValueError, match="there is no folder 'no such/repository/name' to read a D2iT from"):
        D2iT.from_pretrained("no such/repository/name", local_files_only=False)


def test_bf16_weights(folder, tmp_path):
    model, half = D2iT.from_pretrained(folder), D2iT.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    block = half.content_transformer.transformer_blocks()[-1]
    assert block.attn.qkv.weight.dtype == torch.bfloat16
    assert block.modulation.linear.weight.dtype == torch.float32
    assert next(half.vae.parameters()).dtype == torch.float32
    full, rounded = (m(2, grain_map=torch.from_numpy(MAP)) for m in (model, half))
    assert 0 < (full.images - rounded.images).norm() / full.images.norm() < 0.05
    half.save_pretrained(tmp_path)
    assert torch.equal(D2iT.from_pretrained(tmp_path, dtype=torch.bfloat16)(2).images, half(2).images)
    assert D2iT.from_pretrained(tmp_path).dtype == torch.float32


def test_compile(folder):
    plain, compiled = D2iT.from_pretrained(folder), D2iT.from_pretrained(folder).compile(backend="eager")
    torch.testing.assert_close(compiled(2).images, plain(2).images)


def test_images_side_by_side_share_what_is_compiled(folder):
    """Hardly more graphs than one image alone takes, guided at some steps alone, which are of two sizes."""
    counters, threads, graphs = torch._dynamo.utils.counters, torch.get_num_threads(), []
    given = {"guidance": Guidance(1.5, "interval", (0.1, 0.7)), "steps": 3, "grain_map": torch.from_numpy(MAP)}
    try:
        torch.set_num_threads(4)
        for count in (1, 4):
            torch._dynamo.reset()
            counters.clear()
            D2iT.from_pretrained(folder).compile(backend="eager")(count, **given)
            graphs.append(counters["stats"]["unique_graphs"])
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
    assert 0 < graphs[0] <= graphs[1] < 2 * graphs[0]


class Traffic(TorchDispatchMode):
    """Copies between devices, for each of which the host waits on a GPU. (Reading a value of a meta tensor raises.)"""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() in ("aten::_to_copy", "aten::copy_"):
            devices = {x.device.type for x in (*args[:2], out) if isinstance(x, torch.Tensor)}
            self.seen |= {function.name()} if len(devices) > 1 else set()
        return out


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_not_wait_for_the_device(name, monkeypatch):
    solver = make_scheduler(name, GaussianDiffusion(), 6)
    x, out = (torch.empty(2, 4, 8, 8, device="meta") for _ in range(2))
    if isinstance(solver, Diffusers):
        module = sys.modules[type(solver.scheduler).__module__]
        if hasattr(module, "randn_tensor"):  # the noise is drawn where its generator lives
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **kw: torch.empty(shape, device="meta"))
    else:
        solver.to("meta")
    with Traffic() as traffic:
        for i in range(len(solver.timesteps)):
            if isinstance(solver, Diffusers):
                x = solver.step(out + solver.scale_model_input(x, i), i, x, [])
            else:
                x, *_ = solver.step(out, torch.empty((), dtype=torch.int64, device="meta"), x, x)
    # In diffusers' own code a few numbers move to the device at every step.
    assert traffic.seen == ({"aten::_to_copy"} if name == "unipc" else set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++"])
def test_cuda_graph(folder, compiled, scheduler):
    model = D2iT.from_pretrained(folder, device="cuda")
    if compiled:
        model.compile()
    plain = model(4, steps=5, scheduler=scheduler)
    graph = model(4, steps=5, scheduler=scheduler, cuda_graph=True)
    torch.testing.assert_close(graph.images, plain.images)
    assert torch.equal(graph.grain_maps, plain.grain_maps)


def test_cuda_graph_on_a_cpu():
    model = small().content_transformer
    with pytest.raises(ValueError, match="cuda_graph needs a model on a GPU, got one on cpu"):
        sample_content(model, torch.zeros(1, 4, 4, dtype=torch.int64), torch.tensor([0]), seeds=[0], cuda_graph=True)
