"""The scored benchmark: what is killed goes on to the same bits, budgets are equal, verdicts need three spreads."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import quality_bench
import torch
from PIL import Image
from quality import report, verdicts
from quality.scores import TIMES, Scorer
from quality.stages import Bench, configure, content_settings, digest, plan, prepare, train_variant
from quality.tiers import CPU, TIERS, VARIANTS
from quality.verdicts import (
    CLAIMS,
    CONTRADICTED,
    HOLDS,
    MISSING,
    OPEN,
    SAME,
    Claim,
    judge,
    training_spread,
    verdict,
)

from d2it import distributed
from d2it.data import LatentCache
from d2it.evaluation.metrics import Gaussian
from d2it.models import DiT, DynamicContentTransformer, DynamicVAE
from d2it.models.layers import Block
from d2it.models.repa import check_block
from d2it.npz import save_arrays
from d2it.training.content import ContentStage
from d2it.training.latents import LatentData
from d2it.training.learner import Learner

MICRO = dataclasses.replace(
    CPU,
    image_size=16,
    classes=("b", "c"),
    vae={
        **CPU.vae,
        "overrides": {**CPU.vae["overrides"], "channels": 4, "latent_channels": 2},
        "steps": 2,
        "batch_size": 4,
        "loss": {"disc_start": None},
    },
    grain={**CPU.grain, "steps": 2, "batch_size": 4},
    content={**CPU.content, "overrides": {"dim": 32, "heads": 2, "learn_sigma": False}, "batch_size": 4, "warmup": 0},
    depth=3,
    budget=1.2e7,
    samples=20,
    errors=20,
    rebuilt=20,
    steps=2,
    side=32,
    checkpoints=2,
)


@pytest.fixture(autouse=True)
def short_distance(monkeypatch):
    """Of 1,280 features it takes seconds, and tests/test_evaluation.py has it."""
    monkeypatch.setattr(Gaussian, "frechet_distance", lambda a, b: float((a.mean - b.mean).square().sum()))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Two packs of three classes: a gray level each, half of the image with noise."""
    rng = np.random.default_rng(0)
    paths = []
    for name, count in (("train", 60), ("held_out", 36)):
        files, labels = [], [i % 3 for i in range(count)]
        for label in labels:
            pixels = np.full((16, 16, 3), 60 + 60 * label, np.int64)
            pixels[:, : rng.integers(4, 12)] += rng.integers(-50, 50, (16, 1, 3))
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        paths.append(tmp_path_factory.mktemp("packs") / f"{name}.npz")
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(paths[-1], jpeg=np.concatenate(files), offsets=offsets, labels=labels, classes=["a", "b", "c"])
    return tuple(paths)


@pytest.fixture(scope="module")
def world():
    with distributed.joined("cpu") as joined:
        yield joined


@pytest.fixture(scope="module")
def trained(packs, world, tmp_path_factory):
    """A bench with d2it-v and dit-v trained."""
    bench = Bench(MICRO, tmp_path_factory.mktemp("work"), world, packs)
    plans = {name: train_variant(bench, name, VARIANTS[name]) for name in ("d2it-v", "dit-v")}
    return bench, plans


def words(packs, folder, *more):
    paths = ["--train", str(packs[0]), "--held-out", str(packs[1])]
    return ["--tier", "cpu", *paths, "--work", str(folder / "work"), "--results", str(folder / "results"), *more]


def result(folder, name):
    found = json.loads((folder / "results" / "cpu" / f"{name}.json").read_text())
    return {key: found[key] for key in ("scores", "reconstruction", "macs_image", "steps")}


def test_what_is_killed_goes_on_to_the_same_bits(trained, packs, tmp_path, monkeypatch):
    monkeypatch.setitem(TIERS, "cpu", MICRO)
    shutil.copytree(trained[0].work, tmp_path / "whole" / "work")
    assert quality_bench.main(words(packs, tmp_path / "whole", "--only", "fine-70")) == 0
    steps = result(tmp_path / "whole", "fine-70")["steps"]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for folder in ("results", "work/variants"):
        shutil.rmtree(tmp_path / "killed" / folder)
    update, kill = Learner.update, {"left": 2}

    def dying(self, step):
        if self.name == "content" and step == steps // 2 + 1 and kill["left"]:
            kill["left"] -= 1
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(Learner, "update", dying)
    assert quality_bench.main(words(packs, tmp_path / "killed", "--only", "fine-70")) != 0
    assert not (tmp_path / "killed" / "results").exists()
    kill["left"] = 0
    assert quality_bench.main(words(packs, tmp_path / "killed", "--only", "fine-70")) == 0
    assert result(tmp_path / "killed", "fine-70") == result(tmp_path / "whole", "fine-70")
    assert [point["step"] for point in result(tmp_path / "whole", "fine-70")["scores"]["curve"]] == [steps]


def test_a_missing_pack_or_class_is_one_line(packs, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TIERS, "cpu", MICRO)
    absent = (tmp_path / "absent.npz", packs[1])
    assert quality_bench.main(words(absent, tmp_path, "--only", "dit")) == 2
    assert "absent.npz: no such pack of images; --train and --held-out name them" in capsys.readouterr().err
    monkeypatch.setitem(TIERS, "cpu", dataclasses.replace(MICRO, classes=("b", "zebra")))
    assert quality_bench.main(words(packs, tmp_path / "zebra", "--only", "dit")) == 2
    assert "no class 'zebra' among a, b, c" in capsys.readouterr().err


def test_work_of_other_settings_is_refused(packs, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    (work / "tier.json").write_text(json.dumps({"digest": digest(MICRO)}))
    monkeypatch.setitem(TIERS, "cpu", dataclasses.replace(MICRO, budget=2e7))
    assert quality_bench.main(words(packs, tmp_path, "--only", "dit")) == 2
    assert "tier.json: the work of a tier with other settings" in capsys.readouterr().err


def test_held_out_images_come_from_each_class_in_turn(packs, world, tmp_path):
    bench = Bench(MICRO, tmp_path, world, packs)
    prepare(bench)
    with np.load(bench.data[1]) as pack:
        assert pack["labels"].tolist() == [0, 1] * 12
        assert pack["classes"].tolist() == ["b", "c"]


def test_variants_have_one_budget(trained):
    bench, plans = trained
    for name, made in plans.items():
        step = 3 * made.macs * made.batch_size
        assert abs(made.steps * step - MICRO.budget) <= step * MICRO.checkpoints / 2, name
        assert made.steps % MICRO.checkpoints == 0
    assert plans["dit-v"].macs < plans["d2it-v"].macs
    trunk = plan(bench, "refine-0", VARIANTS["refine-0"])
    assert trunk.config.content.overrides["refine_until"] == 0
    assert trunk.macs < plans["d2it-v"].macs


@pytest.mark.parametrize("tier", [each for each in TIERS.values() if each is not MICRO], ids=lambda tier: tier.name)
def test_every_variant_of_every_tier_can_be_built(tier, packs, world, tmp_path):
    bench = Bench(dataclasses.replace(tier, classes=()), tmp_path, world, packs)
    prepare(bench)
    for name, variant in VARIANTS.items():
        config = configure(bench, tmp_path, ["content"], content_settings(bench, variant))
        settings = {**tier.vae["overrides"], **tier.vaes[variant.vae]}
        settings["thresholds"] = tuple(range(1, len(settings["downsampling"])))
        vae = DynamicVAE.preset_config(tier.vae["preset"], **settings)
        with torch.device("meta"):
            network = ContentStage.make(config, LatentData.of_vae(vae, config.data.image_size, 0))
        assert isinstance(network, DiT) == (variant.refine is None), name
        blocks = sum(isinstance(part, Block) for part in network.transformer_blocks())
        depth = tier.depth + variant.added
        assert blocks == depth + (variant.refine == 0), name  # a RefineNet that corrects nothing has a block too
        check_block(config.content.repa, depth - (variant.refine or 0) if "repa" in variant.content else 99)


@pytest.mark.parametrize(("prediction", "keys"), [("epsilon", ("all", "grain.0", "grain.1")), ("v", ("all",))])
def test_the_error_of_a_network_that_predicts_nothing(trained, prediction, keys):
    """Its final layer is zero, so its error follows from the path: (s/a)^2 of epsilon, s^4 + a^2 s^2 = s^2 of v (where
    the latents' variance is 1, which it is over all grains together)."""
    bench, plans = trained
    network = DynamicContentTransformer.from_pretrained(bench.average("d2it-v", plans["d2it-v"].steps))
    config = dataclasses.replace(network.config, diffusion={"prediction": prediction})
    fresh = DynamicContentTransformer(config)
    found = Scorer(bench).error(VARIANTS["d2it-v"], fresh, 0)
    abar = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[list(TIMES)]
    wanted = (1 - abar) / abar if prediction == "epsilon" else 1 - abar
    for key in keys:
        errors = torch.tensor(found[key], dtype=torch.float64)
        wanted = (1 - abar) / abar if prediction == "epsilon" else 1 - abar
        # 20 images have about 80 variates of the coarse codes at each of ten times: a standard deviation of 5 %.
        assert (errors / wanted).mean() == pytest.approx(1, abs=0.2), key
    assert found["mean"] == pytest.approx(math.exp(sum(map(math.log, found["all"])) / len(TIMES)))
    assert Scorer(bench).error(VARIANTS["d2it-v"], fresh, 0) == found
    assert Scorer(bench).error(VARIANTS["d2it-v"], fresh, 1) != found


def test_maps_of_the_samples(trained):
    """True maps are the held-out images', random ones have their share, and labels come from each class in turn."""
    bench, plans = trained
    scorer, variant = Scorer(bench), VARIANTS["d2it-v"]
    network = scorer.network(bench.average("d2it-v", plans["d2it-v"].steps))
    seen = {}
    forward = type(network).forward

    def watched(self, x, t, y=None, grain_map=None, *args, **kwargs):
        seen["maps"] = grain_map
        return forward(self, x, t, y, grain_map, *args, **kwargs)

    type(network).forward, counts = watched, {}
    try:
        for maps in ("true", "random", "predicted"):
            images, labels = scorer.sample("d2it-v", variant, network, 0, maps)
            counts[maps] = seen["maps"]
            assert images.shape == (20, 3, 16, 16)
            assert labels.tolist() == [0, 1] * 10
    finally:
        type(network).forward = forward
    kept = bench.vae_folder(variant) / "maps-0.npz"
    kept.unlink()
    assert torch.equal(scorer.predicted_maps(variant, 0), counts["predicted"])  # drawn again, they are the same
    with np.load(kept) as file:
        save_arrays(kept, {"maps": 1 - file["maps"]})
    assert torch.equal(scorer.predicted_maps(VARIANTS["d2it"], 0), 1 - counts["predicted"])  # of any variant on the VAE
    assert torch.equal(scorer.predicted_maps(variant, 1), counts["predicted"])  # of this seed; two steps teach one map
    kept.unlink()
    held_out = scorer.images(20)
    cache = LatentCache(bench.vae_folder(variant) / "held_out")
    assert torch.equal(counts["true"], cache.fetch(range(20))["grain_map"])
    assert next(held_out).shape == (20, 3, 16, 16)
    wanted = round(cache.shares()[0] * cache.grid[0] * cache.grid[1])
    assert (counts["random"].flatten(1).sum(dim=1) == wanted).all()


def test_real_images_and_rebuilt_ones_are_the_floor(trained):
    """Training images, as many as samples, from each class in turn; each seed takes others."""
    bench, _ = trained
    scorer = Scorer(bench)
    images, labels = scorer._real(0)
    assert images.shape == (20, 3, 16, 16)
    assert labels.view(10, 2).sum(dim=1).tolist() == [1] * 10
    with np.load(bench.data[0]) as pack:
        known = {pack["jpeg"][a:b].tobytes() for a, b in zip(pack["offsets"], pack["offsets"][1:])}
    pixels = {np.asarray(Image.open(io.BytesIO(file))).tobytes() for file in known}
    assert all(image.permute(1, 2, 0).contiguous().numpy().tobytes() in pixels for image in images)
    assert not torch.equal(images, scorer._real(1)[0])
    floor, rebuilt = scorer.floor(), scorer.rebuilt(VARIANTS["d2it-v"])
    assert floor["fd"]["spread"] > 0
    assert rebuilt["fd"] > floor["fd"]["mean"]  # two steps teach a VAE nothing


# ---- verdicts and the report: figures that are made up ---------------------------------------------------------------


def scored(error, fd, spread=1.0, **maps):
    def own(value):
        figures = {key: {"mean": 0.5, "spread": 0.01} for key in ("precision", "recall", "accuracy")}
        return {key: {"mean": value, "spread": spread} for key in ("fd", "kd")} | figures

    point = {"step": 2, "images": 8, "macs": 1e9, "error": error, "fd": fd, "kd": fd}
    return {
        "scores": {
            "error": {"mean": error, "spread": 0.01, "values": [error - 0.01, error, error + 0.01]},
            "error_by_level": {"levels": [4, -4], "all": [error, error]},
            "samples": {"predicted": own(fd)} | {key: own(value) for key, value in maps.items()},
            "rebuilt": {"fd": 50.0, "kd": 5.0},
            "curve": [{**point, "error": 2 * error, "fd": 2 * fd, "kd": 2 * fd}, point],
        },
        "reconstruction": [{"fine_share": s, "codes": 40, "psnr": 20.0, "ssim": 0.7, "rfd": 9.0} for s in (0.0, 1.0)],
        "floor": own(40),
        "tier_digest": "made up",
        "seconds": {"training": [1.0, 2.0]},
        "settings": {"vae": "two", "refine": 1},
        "vae": "two",
        "what": "made up",
        "macs_image": 2e7,
        "steps": 2,
        "batch_size": 4,
        "samples": 20,
        "device": "a machine",
        "threads": 1,
        "torch": "2.13",
        "extractor": "made up",
    }


CLAIM = Claim("", "", "", "d2it-v", "dit-v", ("fd",))


def test_a_difference_counts_beyond_three_spreads():
    spread = math.sqrt(2)
    for gain, told in (
        (3.01 * spread, HOLDS),
        (2.99 * spread, OPEN),
        (-2.99 * spread, OPEN),
        (-3.01 * spread, CONTRADICTED),
    ):
        results = {"d2it-v": scored(1, 100), "dit-v": scored(1, 100 + gain)}
        assert verdict(results, CLAIM) == told
    equal = dataclasses.replace(CLAIM, equal=True)
    assert verdict({"d2it-v": scored(1, 100), "dit-v": scored(1, 100)}, equal) == SAME
    assert verdict({"d2it-v": scored(1, 100)}, CLAIM) == MISSING


def test_a_repeated_training_widens_the_spread_between_trainings_alone():
    results = {"d2it-v": scored(1, 100, true=90), "dit-v": scored(1, 110)}
    assert verdict(results, CLAIM) == HOLDS
    results["d2it-v-seed1"] = scored(1, 106)
    (found,) = judge(results, CLAIM)
    assert found.spread == pytest.approx(math.sqrt(1 + 1 + 2 * 18))
    assert found.verdict == OPEN
    maps = Claim("", "", "", "d2it-v:true", "d2it-v", ("fd",))
    assert judge(results, maps)[0].spread == pytest.approx(math.sqrt(2))
    assert verdict(results, maps) == HOLDS


def test_repetitions_are_pooled_by_what_is_predicted():
    results = {"d2it-v": scored(1, 100), "d2it-v-seed1": scored(1, 106)}
    assert training_spread(results, "dit-v", "fd") == pytest.approx(math.sqrt(18))
    results |= {"dit-v": scored(1, 120), "dit-v-seed1": scored(1, 120)}
    assert training_spread(results, "dit-v", "fd") == pytest.approx(3)  # 18 and 0, a degree of freedom each
    assert training_spread(results, "refine-0", "fd") == pytest.approx(math.sqrt(18))  # none of its own: the largest
    results |= {"d2it": scored(1, 130), "d2it-seed1": scored(1, 150)}
    assert training_spread(results, "dit-v", "fd") == pytest.approx(3)
    assert training_spread(results, "refine-0", "fd") == pytest.approx(math.sqrt(200))
    assert training_spread(results, "d2it-x0", "fd") == pytest.approx(math.sqrt(200))


def test_errors_of_the_same_noise_are_compared_seed_by_seed():
    claim = dataclasses.replace(CLAIM, measures=("error",))
    results = {"d2it-v": scored(0.500, 1), "dit-v": scored(0.504, 1)}
    for name, moved in (("d2it-v", 0.0), ("dit-v", 0.001)):
        results[name]["scores"]["error"]["values"][0] += moved
    (found,) = judge(results, claim)
    assert found.spread == pytest.approx(0.001 / math.sqrt(3))
    assert found.verdict == HOLDS
    results["d2it-v-seed1"] = scored(0.502, 1)
    assert judge(results, claim)[0].spread == pytest.approx(math.sqrt(0.001**2 / 3 + 2 * 0.002**2 / 2))
    assert verdict(results, claim) == OPEN


def test_in_the_same_seconds_the_point_of_the_curve_within_them_counts():
    claim = dataclasses.replace(CLAIM, seconds=True)
    results = {"d2it-v": scored(1, 40), "dit-v": scored(1, 60)}
    assert judge(results, claim)[0].better["mean"] == 40
    results["dit-v"]["seconds"]["training"] = [0.5, 1.9]
    assert judge(results, claim)[0].better["mean"] == 80  # its first point: the curve begins at twice its end
    assert verdict(results, claim) == CONTRADICTED
    results["dit-v"]["seconds"]["training"] = [0.5, 0.9]
    assert verdict(results, claim) == MISSING
    assert verdict(results, CLAIM) == HOLDS


def test_a_distance_that_does_not_follow_the_training_judges_nothing():
    results = {"d2it-v": scored(1, 100), "dit-v": scored(1, 120)}
    for result in results.values():
        result["scores"]["curve"][0]["fd"] = result["scores"]["curve"][1]["fd"] + 2.9
    assert verdict(results, CLAIM) == OPEN
    results["dit-v"]["scores"]["curve"][0]["fd"] += 0.2
    assert verdict(results, CLAIM) == HOLDS


def test_every_claim_names_variants_that_are_trained():
    for claim in CLAIMS:
        for name in (claim.better, claim.worse):
            variant, _, maps = name.partition(":")
            assert not maps or maps in VARIANTS[variant].maps
        if "error" in claim.measures:
            assert len({VARIANTS[name].vae for name in claim.variants}) == 1, claim.text


def test_the_report_says_what_the_files_hold(tmp_path):
    assert "has not been measured yet" in report.document(tmp_path)
    folder = tmp_path / "cpu"
    folder.mkdir()
    made = {"dit-v": scored(0.5, 120), "d2it-v": scored(0.4, 100), "fine-30": scored(0.4, 105)}
    made |= {"d2it": scored(0.4, 100, true=99, random=150), "dit": scored(0.5, 120)}
    made["dit-v"]["settings"] = {"vae": "fine", "refine": None}
    for name, content in made.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    text = report.document(tmp_path)
    row = next(line for line in text.splitlines() if "the same, both predicting v" in line)
    assert "FD 100.0 ± 1.0 and 120.0 ± 1.0" in row
    assert "+14.1; +14.1" in row
    assert "**holds**" in row
    assert "`d2it-v dit-v`" in row
    assert "| real images | as many, of the training set | | | | | 40.0 ± 1.0 |" in text
    assert "**not measured**" in next(line for line in text.splitlines() if "RefineNet adds" in line)
    assert "**no difference seen**" in next(line for line in text.splitlines() if "predicted maps" in line)
    assert "after 100% of its" in text
    assert "| 100% | 100.0, 100; 8, 2 s | 100.0, 100; 8, 2 s | 120.0, 120; 8, 2 s |" in text
    (folder / "fine-30.json").write_text(json.dumps(made["fine-30"] | {"tier_digest": "another"}))
    with pytest.raises(ValueError, match="dit-v and fine-30 were measured with different settings"):
        report.document(tmp_path)
    (folder / "fine-30.json").write_text(json.dumps(made["fine-30"]))
    assert "has never been run" in text
    report.plots(tmp_path)
    for name in ("curves", "levels", "shares"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"results/quality/cpu/{name}.png" in report.document(tmp_path)


def test_the_tiers_of_the_repository_are_reported():
    assert verdicts.SPREADS == 3
    assert (quality_bench.ROOT / "docs" / "evidence.md").read_text() == report.document(
        quality_bench.RESULTS / "quality"
    )
