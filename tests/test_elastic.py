"""Elastic budgets: from the share of tokens to grain maps, in training and in sampling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import DemoPhotos, LatentCache
from d2it.data.calibration import calibrate
from d2it.diffusion import level_grains, ranked_grains, sample_grain_maps
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.models.budget import BudgetRange, budget_of, grain_tokens, least_budget, shares_of, spendable
from d2it.models.finetune import start_from
from d2it.models.flops import count_macs
from d2it.sampling import D2iT, cli
from d2it.seeds import derived_seed
from d2it.training.config import Config, load
from d2it.training.content import ContentStage
from d2it.training.dvae import DvaeStage, budget_range
from d2it.training.grain import GrainStage
from d2it.training.latents import LatentData
from d2it.training.run import main
from tests.test_sampling_cli import sample, small
from tests.test_train_run import ROOT, SMALL

WORLD = World(0, 1, 1, torch.device("cpu"))
THREE = {"dvae": "{downsampling: [4, 8, 16], encoder_mult: [1, 1, 2, 2, 4], channels: 8, decoder_mult: [1, 1, 2]}"}


# What a budget buys


@pytest.mark.parametrize("tokens", [(1, 5), (1, 5, 17), (4, 20), (2, 2, 18), (1, 5, 17, 65)])
def test_shares_spend_their_budget_and_only_grow_with_it(tokens: tuple[int, ...]) -> None:
    before = [0.0] * (len(tokens) - 1)
    for digits in (2, 4):
        shown = spendable(tokens, digits)
        assert shares_of(shown, tokens)[0] >= 0  # what is shown as the least can be spent
        assert shown - least_budget(tokens) < 10.0**-digits
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
    """A finished run of three grains at 64 pixels: VAE and content at budgets from a range, maps in 8 levels."""
    folder = tmp_path_factory.mktemp("elastic")
    calibrate(DemoPhotos(64, crops=64), region_size=16).save(folder / "calibration.json")
    assert main(settings(folder)) == 0
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
        "dvae.steps=1",
        "data.crops=64",
        "cache.unit_size=64",
        "grain.overrides.levels=8",
        "grain.steps=300",
        "grain.batch_size=32",
        "grain.lr=2e-3",
        "grain.schedule=cosine",
        "grain.ema=0.98",
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
    stage = DvaeStage(config, WORLD, DemoPhotos(64, crops=64))
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
    assert "configuration: content: budget must be a share of the tokens in 0.0589 ... 1, got 0.01" in (
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


# Levels of the entropy


def test_levels_as_many_as_grains_are_the_paper() -> None:
    """The same parameters and the same bits, whether the levels are named or not."""
    made = []
    for more in ({}, {"levels": 0}, {"levels": 3}):
        torch.manual_seed(0)
        made.append(DynamicGrainTransformer.from_preset("tiny", num_classes=3, grid=(4, 4), num_grains=3, **more))
    assert made[0].config == made[1].config == made[2].config
    assert not made[0].config.has_levels
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 2])
    assert torch.equal(made[0](x, t, y), made[2](x, t, y))
    assert made[0](x, t, y).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("shares", [[0.5], [0.3, 0.1], [1.0, 0.0], [0.77, 0.5, 0.03]])
def test_any_shares_are_thresholds_of_levels(shares: list[float]) -> None:
    levels = torch.randint(0, 16, (64, 16, 16), generator=torch.Generator().manual_seed(1))
    grains = level_grains(levels, 16, shares, generator=generators(64))
    for grain, share in enumerate(shares, start=1):
        assert (grains >= grain).float().mean().item() == pytest.approx(share, abs=0.01)
    order = torch.stack([levels[grains == grain].double().mean() for grain in grains.unique()])
    assert (order.diff() > 0).all()
    # A region of a higher level is never coarser than one of a lower level, but for those within one level.
    finest, coarsest = grains == len(shares), grains == 0
    if finest.any() and coarsest.any():
        assert levels[finest].min() >= levels[coarsest].max() or shares[0] - shares[-1] < 1 / 8


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_maps_only_get_finer_with_the_budget() -> None:
    levels = torch.randint(0, 8, (5, 6, 4))
    values = torch.rand(5, 6, 4).mul(4).round()
    before = torch.zeros(2, 5, 6, 4, dtype=torch.int64)
    for budget in (0.1, 0.25, 0.353, 0.6, 0.9, 1.0):
        shares = shares_of(budget, (1, 5, 17))
        now = [level_grains(levels, 8, shares, generator=generators(5))]
        now.append(ranked_grains(values, shares, generator=generators(5)))
        assert (torch.stack(now) >= before).all()
        before = torch.stack(now)
    assert (before == 2).all()


def test_ranks_spend_shares_exactly_and_break_ties_at_random() -> None:
    values = torch.randint(0, 3, (40, 5, 4)).float()
    grains = ranked_grains(values, [0.55, 0.2], generator=generators(40))
    assert ((grains > 0).sum(dim=(1, 2)) == 11).all()
    assert ((grains == 2).sum(dim=(1, 2)) == 4).all()
    for value, grain in zip(values, grains):
        assert value[grain > 0].min() >= value[grain == 0].max()
    flat = ranked_grains(torch.zeros(200, 5, 4), [0.5], generator=generators(200)).double().mean(dim=0)
    assert flat.min() > 0.3  # no place is preferred: 0.5 +- 0.035
    assert flat.max() < 0.7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"levels": 1}, "levels must be a whole number of at least 2, got 1"),
        ({"levels": 2.5}, "levels must be a whole number of at least 2, got 2.5"),
        ({"edges": (0.0, 1.0, 2.0)}, "edges must be none where levels are the grains for 2 levels"),
        ({"levels": 4, "edges": (0.0, 1.0, 2.0, 3.0)}, "edges must be 5 ascending entropies for 4 levels"),
        ({"levels": 3, "edges": (0.0, 2.0, 1.0, 3.0)}, "edges must be 4 ascending entropies for 3 levels"),
        ({"levels": 3, "edges": (0.0, 1.0, float("nan"), 3.0)}, "edges must be 4 ascending entropies for 3 levels"),
    ],
)
def test_levels_that_are_none_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DynamicGrainTransformer.preset_config("tiny", **settings)


def test_levels_survive_a_save_and_cost_what_their_logits_cost(tmp_path: Path) -> None:
    given = {"num_classes": 3, "grid": (4, 4), "num_grains": 2}
    edges = (0.1, 1.0, 1.0, 2.5, 3.0)
    model = DynamicGrainTransformer.from_preset("tiny", **given, levels=4, edges=edges)
    model.save_pretrained(tmp_path)
    again = DynamicGrainTransformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.config.edges == edges
    plain = DynamicGrainTransformer.preset_config("tiny", **given)
    more = count_macs(model.config).total - count_macs(plain).total
    assert more == 2 * model.config.dim * model.config.num_tokens * model.config.patch_size**2


def test_a_model_of_grains_starts_one_of_levels(tmp_path: Path) -> None:
    given = {"num_classes": 3, "grid": (4, 4)}
    source = DynamicGrainTransformer.from_preset("tiny", **given)
    torch.nn.init.normal_(source.trunk.final.linear.weight)
    source.save_pretrained(tmp_path)
    model = DynamicGrainTransformer.from_preset("tiny", **given, levels=16, edges=tuple(range(17)))
    lines = start_from(model, tmp_path)
    assert torch.equal(model.trunk.blocks[0].mlp.fc1.weight, source.trunk.blocks[0].mlp.fc1.weight)
    assert not model.trunk.final.linear.weight.any()
    assert any("trunk.final.linear.weight: new" in line for line in lines)
    assert any("levels changes: 2 to 16" in line for line in lines)
    # Other edges alone change no weights.
    model.save_pretrained(tmp_path / "sixteen")
    other = DynamicGrainTransformer.from_preset("tiny", **given, levels=16, edges=tuple(range(1, 18)))
    start_from(other, tmp_path / "sixteen")
    assert torch.equal(other.trunk.final.linear.weight, model.trunk.final.linear.weight)


def test_levels_of_a_cache_are_equally_frequent(run: Path) -> None:
    config = load(None, [*settings(run), "grain.overrides.levels=5"])
    data = LatentData.of_cache(LatentCache(run / "cache"))
    stage = GrainStage(config, config.grain, WORLD, data, None)
    edges = stage.network.config.edges
    found = torch.cat([batch["level_map"].flatten() for batch in batches(stage, 0, 12)])
    frequency = found.bincount(minlength=5) / len(found)
    assert frequency.min() > 0.1
    assert frequency.max() < 0.35  # 0.2 each, drawn from few images
    batch = data.cache.reading(extras=["entropy"]).fetch(range(8)) if data.cache else {}
    level = torch.bucketize(batch["entropy"], torch.tensor(edges[1:-1]))
    wanted = torch.stack([(batch["entropy"] > edge) for edge in edges[1:-1]]).sum(dim=0)
    assert torch.equal(level, wanted)
    loss, logs, _ = stage.learners[0].losses(batches(stage, 0, 1)[0])
    assert loss.item() == pytest.approx(np.log(5), rel=1e-4)  # a final layer of zeros
    assert stage.synthetic(2, torch.device("cpu"))["level_map"].shape == (2, 4, 4)


# Sampling at a budget


def test_one_checkpoint_serves_every_budget(run: Path) -> None:
    """Trained for seconds at budgets from a range, it spends on average what it is asked to spend."""
    d2it = D2iT.from_pretrained(run)
    labels = list(range(8))
    before = torch.zeros(8, 4, 4)
    for budget in (0.25, 0.5, 1.0):
        drawn = d2it(8, labels=labels, budget=budget)
        assert drawn.images.isfinite().all()
        spent = d2it.token_shares(drawn.grain_maps)
        assert spent.mean().item() == pytest.approx(budget, abs=0.1)
        assert (drawn.grain_maps >= before).all()
        before = drawn.grain_maps
    assert (before == 2).all()
    assert spent.tolist() == [1.0] * 8
    default = d2it(8, labels=labels)
    assert d2it.token_shares(default.grain_maps).mean().item() == pytest.approx(0.353, abs=0.12)
    one = d2it(seeds=[3], labels=[3], budget=0.5).grain_maps[0]
    assert torch.equal(one, d2it(8, labels=labels, budget=0.5).grain_maps[3])


def test_sampled_maps_are_thresholds_of_sampled_levels(run: Path) -> None:
    d2it = D2iT.from_pretrained(run)
    assert d2it.grain_transformer is not None
    seeds = [derived_seed(seed, "grain") for seed in range(4)]
    labels = torch.tensor([0, 1, 2, 3])
    given: dict[str, Any] = {"scheduler": "ddim", "steps": 2}
    levels = sample_grain_maps(d2it.grain_transformer, labels, seeds=seeds, **given)
    found = d2it(4, labels=labels, budget=0.6, grain_scheduler="ddim", grain_steps=2, steps=1).grain_maps
    sure = shares_of(0.6, (1, 5, 17))
    for grain, share in enumerate(sure, start=1):
        assert (found >= grain)[levels >= 8 * (1 - share)].all()
        assert (found < grain)[levels + 1 <= 8 * (1 - share)].all()


def test_drawings_and_photos_spend_a_budget_exactly(run: Path, tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 16).reshape(4, 4).astype(np.uint8)
    Image.fromarray(gray, "L").save(tmp_path / "drawn.png")
    np.save(tmp_path / "numbers.npy", gray / 7.0 - 3)
    wanted = np.zeros(16, int)
    wanted[-10:], wanted[-6:] = 1, 2
    for file in ("drawn.png", "numbers.npy"):
        told = sample(run, tmp_path / "s", "--count", 2, "--budget", 0.45, "--grain-map", tmp_path / file)
        shares = shares_of(0.45, (1, 5, 17))
        assert [round(16 * share) for share in shares] == [10, 6]
        assert told["maps"].tolist() == [wanted.reshape(4, 4).tolist()] * 2
        assert told["budget"] == 0.45
        assert told["tokens"] == pytest.approx((6 + 4 * 5 + 6 * 17) / (16 * 17), abs=1e-3)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    pixels[:, :32] //= 16  # less detail on the left, and above none
    pixels[:16, :32] = 90
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (map_,) = sample(run, tmp_path / "p", "--count", 1, "--budget", 0.45, "--photo", tmp_path / "photo.png")["maps"]
    assert np.bincount(map_.flat, minlength=3).tolist() == [6, 4, 6]
    assert (map_[:, 2:] > 0).all()
    assert (map_[0, :2] == 0).all()


def test_two_grains_and_a_model_without_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d2it = small()
    with pytest.raises(ValueError, match=r"samples the grains at one budget: train it with levels of the entropy"):
        d2it(budget=0.5)
    for budget in (0.2, 0.25, 0.5, 1.0):
        drawn = d2it(2, grain_map=torch.rand(2, 4, 4), budget=budget, steps=1)
        assert d2it.token_shares(drawn.grain_maps).tolist() == pytest.approx([budget] * 2, abs=0.5 * 4 / 5 / 16 + 1e-9)
    for budget in (0.1, 1.5):
        with pytest.raises(ValueError, match=r"budget must be a share of the tokens in 0.2 ... 1, got"):
            d2it(grain_map=torch.rand(4, 4), budget=budget)
    with pytest.raises(ValueError, match=r"grain_map must be \(N, 4, 4\), got \(3, 4\)"):
        d2it(grain_map=torch.rand(3, 4), budget=0.5)
    with pytest.raises(ValueError, match="grain_map must hold finite real numbers"):
        d2it(grain_map=torch.full((4, 4), torch.nan), budget=0.5)
    d2it.save_pretrained(tmp_path)
    for words, line in (
        (["--budget", 0.5], "grain.overrides.levels=16"),
        (["--budget", 0.5, "--fine-ratio", 0.3], "--budget and --fine-ratio both say how fine the maps are"),
        (["--budget", 0.01, "--photo", ROOT / "docs" / "images" / "demo.png"], "budget must be a share of the tokens"),
    ):
        assert cli.main([str(tmp_path), "--output", str(tmp_path / "s"), *map(str, words)]) == 2
        assert line in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_plain_dit_and_levels_without_edges_say_what_to_do() -> None:
    d2it = small()
    settings = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    levels = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), levels=4, **settings)
    bare = D2iT(d2it.vae, levels, d2it.content_transformer, any_vae=True)
    with pytest.raises(ValueError, match=r"budget must be given: this model's Grain Transformer has no edges"):
        bare()
    assert bare(2, budget=0.3, steps=1, grain_steps=1).grain_maps.shape == (2, 4, 4)
    plain = D2iT(d2it.vae, None, DiT.from_preset("tiny", image_size=64, downsampling=8, **settings))
    with pytest.raises(ValueError, match=r"budget: a plain DiT spends all tokens on every image"):
        plain(budget=0.5, grain_map=torch.zeros(4, 4))
    assert plain.token_shares(torch.zeros(3, 4, 4, dtype=torch.int64)).tolist() == [1, 1, 1]
