"""Elastic budgets: from the share of tokens to grain maps, in training and in sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2it.data import DemoPhotos, LatentCache
from d2it.data.calibration import calibrate
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DiT, DynamicContentTransformer, DynamicVAE
from d2it.models.budget import BudgetRange, budget_of, grain_tokens, least_budget, shares_of
from d2it.training.config import Config, load
from d2it.training.dvae import DvaeStage, budget_range
from d2it.training.run import main
from d2it.training.transformers import ContentStage, LatentData
from tests.test_train_run import SMALL

WORLD = World(0, 1, 1, torch.device("cpu"))
THREE = {"dvae": "{downsampling: [4, 8, 16], encoder_mult: [1, 1, 2, 2, 4], channels: 8, decoder_mult: [1, 1, 2]}"}


# What a budget buys


@pytest.mark.parametrize("tokens", [(1, 5), (1, 5, 17), (4, 20), (2, 2, 18), (1, 5, 17, 65)])
def test_shares_spend_their_budget_and_only_grow_with_it(tokens: tuple[int, ...]) -> None:
    before = [0.0] * (len(tokens) - 1)
    for budget in [least_budget(tokens), *np.linspace(least_budget(tokens), 1, 23)[1:]]:
        shares = shares_of(float(budget), tokens)
        assert budget_of(shares, tokens) == pytest.approx(budget, abs=1e-9)
        assert shares == sorted(shares, reverse=True)
        assert all(now >= then - 1e-9 for now, then in zip(shares, before))
        before = shares
    assert before == [1.0] * (len(tokens) - 1)


def test_presets_spend_their_default_shares() -> None:
    """0.353 of the tokens are half of the regions at 16 pixels or finer and a quarter at 8, as the VAE's thresholds."""
    three = grain_tokens(DynamicContentTransformer.preset_config("D2iT-XL-3"))
    assert three == grain_tokens(DynamicVAE.preset_config("f8f16f32")) == (1, 5, 17)
    assert shares_of(budget_of([0.5, 0.25], three), three) == pytest.approx([0.5, 0.25])
    two = grain_tokens(DynamicContentTransformer.preset_config("D2iT-B"))
    assert two == grain_tokens(DynamicVAE.preset_config("f8f16")) == (1, 5)
    assert shares_of(0.6, two) == pytest.approx([0.5])


def test_tokens_are_those_that_the_networks_count() -> None:
    for settings in (
        {"patch_size": 1},
        {"patch_size": 2, "downsampling": (4, 8, 16), "min_grain": 2},
        {"downsampling": (4, 8, 32), "min_grain": 0},
    ):
        config = DynamicContentTransformer.preset_config("tiny", image_size=64, window=8, **settings)
        rows, columns = (side // config.downsampling[-1] for side in config.image_size)
        for grain, tokens in enumerate(grain_tokens(config)):
            fine = config.region_tokens(torch.full((1, rows, columns), grain)).sum().item()
            assert tokens * rows * columns == config.num_tokens + fine


@pytest.mark.parametrize("budget", [0.05, 1.01, -1, float("nan"), True, "0.5", None])
def test_a_budget_that_cannot_be_spent_is_named(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"budget must be a share of the tokens in 0.2 ... 1, got"):
        shares_of(budget, (1, 5))


# Training at budgets from a range


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three grains at 64 pixels with a VAE trained at budgets from the whole range."""
    folder = tmp_path_factory.mktemp("elastic")
    images = DemoPhotos(64, crops=16)
    calibrate(images, region_size=16).save(folder / "calibration.json")
    assert main([*settings(folder), "dvae.steps=1", "run.stages=[dvae,cache]"]) == 0
    return folder


def settings(folder: Path) -> list[str]:
    overrides = [each for each in SMALL if not each.startswith(("dvae.overrides", "data.image_size", "dvae.loss"))]
    return [
        *overrides,
        f"run.dir={folder}",
        "data.image_size=64",
        f"dvae.overrides={THREE['dvae']}",
        "dvae.loss.disc_start=null",
        f"dvae.calibration={folder / 'calibration.json'}",
        "dvae.fine_ratios=[0.5,0.25]",
        "dvae.budget=[0.1,1.0]",
        "content.batch_size=8",
        "content.overrides.window=4",
    ]


def stage_of(folder: Path, *overrides: str) -> ContentStage:
    config: Config = load(None, [*settings(folder), *overrides])
    data = LatentData.of_cache(LatentCache(folder / "cache"))
    return ContentStage(config, config.content, WORLD, data, None)


def batches(stage: Any, first: int, count: int) -> list[dict[str, Any]]:
    stream = stage.batches(first)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def test_images_spend_budgets_of_the_range(run: Path) -> None:
    stage = stage_of(run, "content.budget=[0.1,0.9]")
    config = stage.network.config
    tokens = grain_tokens(config)
    spent = []
    for batch in batches(stage, 0, 12):
        maps = batch["grain_map"]
        fine = config.region_tokens(maps)
        assert batch["fine"].rows == fine.sum() <= batch["capacity"]
        spent.append((fine.sum(dim=(1, 2)) + config.num_tokens) / (tokens[-1] * maps[0].numel()))
    spent = torch.cat(spent)
    assert spent.std() > 0.15  # a point's is what the images differ by, 0.1
    assert spent.mean().item() == pytest.approx(0.5, abs=0.06)


def test_the_stream_of_budgets_resumes_exactly(run: Path) -> None:
    stage = stage_of(run, "content.budget=[0.1,1.0]", "content.accumulate=2")
    whole, rest = batches(stage, 0, 10), batches(stage, 3, 4)
    for one, other in zip(whole[6:], rest):
        assert torch.equal(one["grain_map"], other["grain_map"])
        assert torch.equal(one["mean"], other["mean"])
        assert one["capacity"] == other["capacity"]
    assert not torch.equal(whole[0]["grain_map"], whole[2]["grain_map"])


def test_a_point_is_the_map_at_the_thresholds(run: Path) -> None:
    fixed = stage_of(run)
    cache = fixed.data.cache
    assert cache is not None
    spent = budget_of(cache.shares_above(cache.thresholds), (1, 5, 17))
    point = stage_of(run, f"content.budget=[{spent},{spent}]")
    for one, other in zip(batches(fixed, 0, 4), batches(point, 0, 4)):
        assert (one["grain_map"] != other["grain_map"]).float().mean() < 0.05  # the shares are not quite s and s^2


def test_the_packed_length_follows_budgets_and_timesteps(run: Path) -> None:
    stage = stage_of(run, "content.budget=[0.5,1.0]", "content.overrides.refine_until=0.5")
    for batch in batches(stage, 0, 4):
        seen = stage.network.config.refined_maps(batch["grain_map"], batch["timesteps"])
        assert batch["fine"].rows == stage.network.config.region_tokens(seen).sum() <= batch["capacity"]


def test_the_vae_sees_maps_of_its_range(run: Path) -> None:
    config = load(None, settings(run))
    stage = DvaeStage(config, WORLD, DemoPhotos(64, crops=16))
    found = batches(stage, 0, 3)
    again = batches(stage, 2, 1)
    assert torch.equal(found[2]["thresholds"], again[0]["thresholds"])
    limits = torch.cat([batch["thresholds"] for batch in found])
    assert limits.shape == (12, 2)
    assert (limits[:, 0] <= limits[:, 1]).all()
    assert limits.std(dim=0).min() > 0.1
    for batch in found:
        entropy = stage.vae.grain_map(batch["image"])[1]
        fine = (entropy > batch["thresholds"][:, :1, None]).float().mean()
        assert stage.learners[0].losses(batch)[1]["dvae/fine_ratio"] == fine


@pytest.mark.parametrize("key", ["content.budget", "dvae.budget"])
@pytest.mark.parametrize("value", ["[0.9,0.5]", "[0.5]", "[[0.5],[1]]", "[0,1]", "[0.5,1.1]", "[]"])
def test_a_range_that_is_none_is_one_line(run: Path, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"configuration: {key} must be null or \[least, most\], shares of the tokens"):
        load(None, [*settings(run), f"{key}={value}"])


def test_budgets_need_maps_and_a_calibration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*settings(run), "content.budget=[0.01,1.0]"]) == 2
    assert "configuration: content: budget must be a share of the tokens in 0.0588 ... 1, got 0.01" in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"configuration: content.budget has no effect on a plain DiT: leave it out"):
        ContentStage.reads(load(None, [*settings(run), "content.budget=[0.5,1]"]), DiT.from_preset("tiny"))
    config = load(None, [*settings(run), "dvae.budget=[0.01,1]"])
    with pytest.raises(UserError, match=r"configuration: dvae: budget must be a share of the tokens in 0.2 ... 1"):
        budget_range(config, DynamicVAE.preset_config("f8f16"))
    with pytest.raises(UserError, match=r"dvae.budget has no effect on a VAE of one grain: leave it out"):
        budget_range(config, DynamicVAE.preset_config("f8"))
    with pytest.raises(UserError, match=r"dvae.budget takes thresholds from a calibration: set dvae.overrides.thresh"):
        budget_range(load(None, [*SMALL, "dvae.budget=[0.5,1.0]"]), DynamicVAE.preset_config("f8f16"))


def test_ranges_are_checked_where_they_are_made() -> None:
    assert BudgetRange(0.25, 1.0, (1, 5))(0.5) == shares_of(0.625, (1, 5))
    with pytest.raises(ValueError, match=r"budget must be \[least, most\], got \[0.8, 0.5\]"):
        BudgetRange(0.8, 0.5, (1, 5))
