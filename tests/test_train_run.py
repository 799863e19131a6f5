"""The whole path in small: train.py from photos to a D2iT that samples, and its errors over wrong input."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2it import pictures
from d2it.data import DemoPhotos, LatentCache
from d2it.models import DiT
from d2it.sampling import D2iT
from d2it.training.config import load
from d2it.training.dvae import DvaeStage
from d2it.training.report import costs, quality, write_report
from d2it.training.run import main
from d2it.training.stage import spread_over
from tests.train_server import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "run.log_every=2",
    "run.publish_every=0",
    "data.path=demo",
    "data.crops=16",
    "data.image_size=32",
    "data.num_classes=8",
    "data.workers=0",
    "dvae.preset=tiny",
    "dvae.overrides.channels=8",
    "dvae.overrides.thresholds=[3.0]",
    "dvae.steps=4",
    "dvae.batch_size=4",
    "dvae.loss.disc_start=2",
    "dvae.loss.disc_channels=8",
    "cache.batch_size=8",
    "cache.unit_size=8",
    "grain.preset=tiny",
    "grain.overrides.depth=1",
    "grain.steps=4",
    "grain.batch_size=4",
    "content.preset=tiny",
    "content.overrides.depth=1",
    "content.steps=4",
    "content.batch_size=4",
    "sample.images=4",
    "sample.steps=2",
    "sample.grain_steps=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    assert main([*SMALL, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own, which it may go on with."""
    return shutil.copytree(finished, tmp_path / "finished")


def test_every_stage_leaves_what_it_promises(run: Path) -> None:
    for name in ("dvae", "grain", "content"):
        assert [p.name for p in (run / "checkpoints" / name).iterdir()] == ["step-00000004"]
        rows = [json.loads(line) for line in (run / "logs" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert all(np.isfinite(row[f"{name}/loss"]) and row["images_per_second"] > 0 for row in rows)
        assert list((run / "logs" / name).glob("events*"))
    assert "discriminator/loss" in rows_of(run, "dvae")[-1]
    assert "discriminator/loss" not in rows_of(run, "dvae")[0]  # the discriminator starts at step 2
    for picture in ("reconstructions", "samples", "samples_grains", "denoising", "curves"):
        assert Image.open(run / f"{picture}.png").width >= 300
    assert load(run / "config.yaml").content.steps == 4


def rows_of(run: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "logs" / f"{name}.jsonl").read_text().splitlines()]


def test_the_run_is_a_pretrained_d2it(run: Path) -> None:
    d2it = D2iT.from_pretrained(run)
    assert d2it.num_classes == 8
    assert d2it.sampling["steps"] == 2
    assert d2it.class_names is not None
    assert d2it.class_names[2] == "coffee"  # as the source calls it: the configuration names no class
    drawn = d2it(3, labels=[1, 2, 3], seed=7)
    assert drawn.images.shape == (3, 3, 32, 32)
    assert drawn.grain_maps.shape == (3, 2, 2)
    again = d2it(seeds=[8], labels=[2])
    torch.testing.assert_close(drawn.images[1:2], again.images, rtol=1e-3, atol=1e-3)
    given = d2it(2, grain_map=torch.tensor([[0, 1], [1, 0]]), labels=[0])
    assert given.grain_maps.tolist() == [[[0, 1], [1, 0]]] * 2
    assert float(d2it.vae.scaling_factor) != 1.0


def test_the_baseline_is_trained_and_sampled_in_the_same_way(run: Path, tmp_path: Path) -> None:
    for part in ("vae", "grain_transformer", "cache"):
        shutil.copytree(run / part, tmp_path / part)
    plain = ["content.preset=DiT-S/2", "content.overrides.dim=32", "content.overrides.heads=2", "run.stages=[content]"]
    assert main([*SMALL, *plain, f"run.dir={tmp_path}"]) == 0
    d2it = D2iT.from_pretrained(tmp_path)
    assert isinstance(d2it.content_transformer, DiT)
    assert d2it(2).grain_maps.shape == (2, 2, 2)
    assert Image.open(tmp_path / "samples.png").width >= 300


def test_save_pretrained_and_back(run: Path, tmp_path: Path) -> None:
    d2it = D2iT.from_pretrained(run)
    d2it.save_pretrained(tmp_path)
    for part in ("vae", "grain_transformer", "content_transformer"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (run, tmp_path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(D2iT.from_pretrained(tmp_path)(1).images, d2it(1).images)


def test_shared_weights_hold_no_optimiser(run: Path) -> None:
    size = (run / "content_transformer" / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in D2iT.from_pretrained(run).content_transformer.parameters())
    assert 4 * parameters <= size <= 4 * parameters * 1.1


def test_the_same_command_again_is_done_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "content_transformer" / "model.safetensors").stat().st_mtime_ns
    assert main([*SMALL, f"run.dir={run}"]) == 0
    assert not re.search(r"step \d+/4", capsys.readouterr().err)
    assert (run / "content_transformer" / "model.safetensors").stat().st_mtime_ns == before


def test_more_steps_go_on_from_where_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, f"run.dir={run}", "grain.steps=6", "run.stages=[grain]"]) == 0
    assert "grain: step 6/6" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(run, "grain")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run.sed=1"], "no such configuration key: run.sed (did you mean seed?)"),
        (["content.lr=fast"], "content.lr"),
        (["content.lr"], "write section.key=value"),
        (["content.batch_size=0"], "content.batch_size must be at least 1, got 0"),
        (["run.stages=[dvea]"], "run.stages must be among"),
        (["data.path=/nowhere"], "/nowhere: no such file or folder"),
        (["data.path=EMPTY"], "no images"),
        (["data.path=BROKEN"], "images cannot be read, more than 1%"),
        (["data.path=SMALL"], "smaller than the 32 x 32 asked for"),
        (["data.num_classes=4"], "labels reach 7, num_classes is 4"),
        (
            ["data.image_size=40", "run.dir=FRESH"],
            "data.image_size must be a multiple of the VAE's region of 16 pixels",
        ),
        (["dvae.preset=huge"], "preset must be one of"),
        (["dvae.overrides.width=3"], "has no setting width"),
        (["content.overrides.window=3", "run.stages=[content]"], "window must divide the latent grid 4 x 4, got 3"),
        (["content.overrides.window=0", "run.dir=FRESH"], "window must be a whole number of at least 1, got 0"),
        (["content.overrides.heads=5", "run.dir=FRESH"], "heads must divide the width 128, got 5"),
        (
            ["dvae.overrides.channels=wide", "run.dir=FRESH"],
            "channels must be a whole number of at least 1, got 'wide'",
        ),
        (["dvae.overrides.sigma=0", "run.dir=FRESH"], "sigma must be positive and finite, got 0"),
        (["dvae.loss.disc_channels=0"], "dvae.loss.disc_channels must be at least 1, got 0"),
        (["sample.scheduler=magic"], "sample.scheduler must be one of ddpm, ddim, "),
        (["sample.grain_steps=2000"], "sample.grain_steps must be in 1 ... 1000, got 2000"),
        (["sample.guidance=2", "data.num_classes=null"], "sample.guidance must be 1 where data.num_classes is null"),
        (["data.class_names=[cat]"], "data.class_names must be null or 8 names"),
        (["content.overrides.image_size=64", "run.stages=[content]"], "follows from the data and the VAE"),
        (["run.stages=[content]", "run.dir=FRESH"], "no latent cache here"),
        (["run.stages=[cache]", "run.dir=FRESH"], "no trained VAE here"),
        (
            ["grain.overrides.dim=64", "grain.steps=8"],
            "checkpoint of another model or data set: model.dim is 128 there",
        ),
        (["content.accumulate=3", "run.stages=[content]"], "must be a multiple of 1 ranks x 3 micro-batches"),
        (["run.device=cuda"], "torch finds no GPU"),
        (["--config", "nowhere.yaml"], "no such configuration file: nowhere.yaml"),
        (["dvae.loss.lpips_path=/nowhere", "run.dir=FRESH"], "no LPIPS weights"),
        (["run.dir=/proc/nowhere"], "cannot write here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    if "run.device=cuda" in arguments and torch.cuda.is_available():
        arguments, said = ["run.device=tpu"], "run.device must be auto, cpu or cuda"
    folders = {name: tmp_path / name.lower() for name in ("EMPTY", "BROKEN", "SMALL", "FRESH")}
    for name in ("EMPTY", "BROKEN", "SMALL"):
        folders[name].mkdir()
    (folders["BROKEN"] / "a.jpg").write_bytes(b"\xff\xd8 nothing")
    Image.new("RGB", (24, 24)).save(folders["SMALL"] / "a.png")
    filled = [re.sub("|".join(folders), lambda m: str(folders[m[0]]), a) for a in arguments]
    given = [a for a in SMALL if a.split("=")[0] not in {f.split("=")[0] for f in filled}]
    if any(a.startswith("data.path") for a in filled):
        given = [a for a in given if not a.startswith("data.num_classes")]
        filled.append(f"run.dir={tmp_path / 'other'}")
    if not any(a.startswith("run.dir") for a in filled):
        given.append(f"run.dir={run}")
    capfd.readouterr()
    assert main([*given, *filled]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "fresh" / "checkpoints").exists()  # before the first step, whichever stage it is about


@pytest.mark.parametrize(
    ("stage", "limit", "said"),
    [
        ("cache", 6_000, "cache: cannot write the latent cache: "),
        ("grain", 20_000, "step-00000004: could not be saved"),
        ("published", 20_000, "model.safetensors"),
        ("", 6_000, "reconstructions.png"),
    ],
    ids=["units", "checkpoint", "weights", "pictures"],
)
def test_a_full_disk_is_one_line_at_any_file(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str, limit: int, said: str
) -> None:
    """A limit on the size of files stands for the disk."""
    shutil.copytree(run / "vae", tmp_path / "vae")
    arguments = [*SMALL, f"run.dir={tmp_path}", f"run.stages=[{stage or 'cache'}]", "cache.unit_size=16"]
    if stage != "cache":
        shutil.copytree(run / "cache", tmp_path / "cache")
        arguments[-1] = "cache.unit_size=8"
    if stage == "published":  # as where the start before this one ended between the last checkpoint and the weights
        shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
        (tmp_path / "checkpoints" / "grain" / "unpublished").touch()
        arguments[-2] = "run.stages=[grain]"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capfd.readouterr().err.strip().splitlines()
    assert code == 2
    assert lines[-1].startswith("error: ")
    assert said in lines[-1]
    assert "File too large" in lines[-1]


def test_dry_run_measures_every_stage_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", *SMALL, f"run.dir={tmp_path / 'dry'}"]) == 0
    said = capsys.readouterr().err
    for word in ("DynamicVAE tiny", "DynamicGrainTransformer", "DynamicContentTransformer", "GMAC", "GiB"):
        assert word in said
    assert said.count("a step takes") == 3
    assert not (tmp_path / "dry").exists()


def test_the_plain_dit_trains_in_the_same_stage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("vae", "grain_transformer"):
        shutil.copytree(run / part, tmp_path / part)
    arguments = ["content.preset=DiT-S/2", "content.overrides.dim=64", "content.overrides.heads=2"]
    arguments += [f"run.dir={tmp_path}", f"cache.path={run / 'cache'}", "run.stages=[content]"]
    # No images: the command of configs/imagenet256_b.yaml.
    given = [a for a in SMALL if not a.startswith(("content.preset", "data.path"))]
    assert main([*given, *arguments]) == 0
    assert main(["--dry-run", *given, *arguments]) == 0
    assert "content: DiT DiT-S/2" in capsys.readouterr().err
    assert DiT.from_pretrained(tmp_path / "content_transformer").num_parameters() > 0


def test_a_photo_that_cannot_be_read_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even the first one, which every sheet of reconstructions shows."""
    photos = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i:03d}.png")
    (tmp_path / "photos" / "000.png").write_bytes(b"not a photo")
    given = [a for a in SMALL if not a.startswith(("data.path", "data.num_classes"))]
    given += [f"data.path={tmp_path / 'photos'}", f"run.dir={tmp_path / 'run'}", "run.stages=[dvae,cache]"]
    assert main(given) == 0
    assert "000.png" in caplog.text
    assert Image.open(tmp_path / "run" / "reconstructions.png").width >= 300
    assert len(LatentCache(tmp_path / "run" / "cache")) == 119


def test_curves_are_left_out_where_nothing_draws_them(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    assert main([*SMALL, f"run.dir={run}", "run.stages=[]"]) == 0
    assert "curves.png is left out: matplotlib is not installed" in capsys.readouterr().err


def test_sigterm_outside_the_steps(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the cache stage, for one: it ends in one line, and the handlers of whoever called are back."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("d2it.training.run.build_cache", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*SMALL, f"run.dir={run}", "run.stages=[cache]"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == f"SIGTERM: what is finished is in {run}; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_last_step_publishes_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = DvaeStage.publish

    def interrupted(stage: DvaeStage, *given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        publish(stage, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(DvaeStage, "publish", interrupted)
    assert main([*SMALL, f"run.dir={tmp_path}", "run.stages=[dvae,cache]"]) == 128 + signal.SIGTERM
    assert f"saved {tmp_path}/checkpoints/dvae/step-00000004" in capsys.readouterr().err
    assert (tmp_path / "vae" / "model.safetensors").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configurations_load_and_fit(name: str) -> None:
    from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE

    given = [] if name == "demo.yaml" else ["data.path=/data"]
    config = load(ROOT / "configs" / name, given)
    vae = DynamicVAE.preset_config(config.dvae.preset, **config.dvae.overrides)
    size = config.data.image_size
    content = DynamicContentTransformer.preset_config(
        config.content.preset, image_size=size, downsampling=vae.downsampling, **config.content.overrides
    )
    DynamicGrainTransformer.preset_config(config.grain.preset, grid=content.region_grid, **config.grain.overrides)
    if name != "demo.yaml":
        with pytest.raises(Exception, match=r"data\.path must be given"):
            load(ROOT / "configs" / name)


@pytest.mark.long
def test_torchrun_with_two_ranks(tmp_path: Path) -> None:
    """The command of the README, on CPU: both ranks train every stage, sharded in the last, and one model comes out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(
        [*command, *SMALL, f"run.dir={tmp_path}", "content.parallel=fsdp"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "checkpoints" / "content" / "step-00000004").glob("__*_0.distcp"))) == 2
    assert D2iT.from_pretrained(tmp_path)(1).images.isfinite().all()


def test_three_grains_by_the_override_that_the_demo_names(tmp_path: Path) -> None:
    """The command in the head of configs/demo.yaml, in small: every stage, then samples of three grains."""
    lines = (ROOT / "configs" / "demo.yaml").read_text().splitlines()
    (override,) = [line.split("'")[1] for line in lines if line.startswith("#   python train.py '")]
    assert load(ROOT / "configs" / "demo.yaml", [override]).dvae.overrides["channels"] == 16
    small = [
        "dvae.steps=2",
        "grain.steps=2",
        "content.steps=2",
        "content.overrides.window=2",
        "content.overrides.refine_until=0.5",
    ]
    folder = tmp_path / "three"
    assert (
        main(
            ["data.image_size=32", *SMALL, override, "dvae.overrides.decoder_mult=[1,1,2]", *small, f"run.dir={folder}"]
        )
        == 0
    )
    d2it = D2iT.from_pretrained(folder)
    assert d2it.vae.downsampling == (4, 8, 16)
    assert d2it.content_transformer.config.refines_codes
    assert d2it(2, grain_map=torch.tensor([[0, 1], [2, 1]]), labels=[0]).images.shape == (2, 3, 32, 32)
    assert all(np.isfinite(row["content/loss"]) for row in rows_of(folder, "content"))


@pytest.mark.long
def test_the_page_of_a_run_and_the_loss_of_images_that_nothing_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "held" / f"{i}.png")
    folder = tmp_path / "run"
    held = ["data.num_classes=null", "run.publish_every=2", f"data.held_out={tmp_path / 'held'}"]
    assert main([*SMALL, *held, f"run.dir={folder}"]) == 0
    for name in ("dvae", "grain", "content"):
        losses = [row[f"{name}/held_out_loss"] for row in rows_of(folder, name)]
        assert np.isfinite(losses).all()
        assert losses[0] != losses[1], "the averaged weights have changed"
        assert [p.name for p in sorted((folder / "logs" / "pictures" / name).iterdir())] == [
            "00000002.png",
            "00000004.png",
        ]
    page = (folder / "report.html").read_text()
    for part in (
        "<h2>Stage dvae</h2>",
        "content at step 2",
        "content at step 4",
        "Entropy of the regions",
        "PSNR",
        "GMAC",
        "held out loss",
    ):
        assert part in page
    assert page.count("data:image/png;base64,") >= 4 + 6  # the results, and two published pictures a stage
    assert page.count("<svg") == 3 + 2
    assert 'src="http' not in page
    assert main([*SMALL, "data.held_out=/missing", f"run.dir={tmp_path / 'other'}"]) == 2


def test_the_page_of_a_run_takes_any_name_for_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>\"&'"
    (folder / "logs" / "pictures" / "dvae").mkdir(parents=True)
    settings = "data: {path: '</pre><script>alert(1)</script>'}"
    (folder / "config.yaml").write_text(settings)
    rows = [{"step": step, "dvae/loss": 1.0, "images_per_second": 2.0, "<script>/loss": 3.0} for step in (1, 2)]
    (folder / "logs" / "dvae.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("00000001", "00000002", "a <b> picture of somebody's"):
        Image.new("RGB", (8, 8)).save(folder / "logs" / "pictures" / "dvae" / f"{name}.png")
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attributes)

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Reader().feed(write_report(folder).read_text())
    assert "script" not in tags
    assert tags.count("img") == 2
    assert settings in texts
    assert texts.count(f"d2it run {folder.name}") == 2  # the title and the heading


def test_figures_of_the_page_are_those_of_the_model(run: Path) -> None:
    model = D2iT.from_pretrained(run).content_transformer
    rows = costs(model, "cpu")
    assert [row["tokens"] for row in rows] == ["4", "8", "12", "16", "20"]  # 2 x 2 regions, 4 more for a fine one
    assert [float(row["GMAC"]) for row in rows] == sorted(float(row["GMAC"]) for row in rows)
    vae, source = D2iT.from_pretrained(run).vae, DemoPhotos(32, crops=16)
    found = quality(vae, source, "cpu")
    images = source.fetch(spread_over(16, 16), replace=True)["image"]
    with torch.no_grad():
        fine = torch.ones(16, 2, 2, dtype=torch.int64)
        rebuilt = pictures.to_uint8(vae.decode(vae.encode(pictures.from_uint8(images), fine)[0], fine))
    error = (rebuilt.double() - images.double()).square().mean().item()
    assert found[-1] == pytest.approx(10 * np.log10(255**2 / error))
