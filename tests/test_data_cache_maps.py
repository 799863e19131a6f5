"""What a latent cache gives beside the map of its thresholds: maps of other shares, further arrays, older caches."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2it.data import LatentCache, Loader, build_cache, finish_cache
from d2it.errors import UserError
from d2it.files import sha256_of
from tests.tiles import FACTS, Tiles, contents, encode, latents, make


def everything():
    images = torch.stack([Tiles()[i]["image"] for i in range(50)])
    return images, images.flip(3)


def test_shares_are_drawn_for_each_image_of_a_stream(tmp_path):
    make(tmp_path)
    cache = LatentCache(tmp_path, shares=the_whole_range, extras=("entropy",))
    whole = Loader(cache, 16, seed=4)
    batches = [next(whole) for _ in range(40)]
    entropies = torch.cat([encode(image)["entropy"].flatten() for image in everything()])
    shares = []
    for batch in batches:
        grains, entropy = batch["grain_map"].bool(), batch["entropy"]
        for image in range(16):
            # A map is one threshold of the entropies, a quantile of the whole cache.
            fine, coarse = entropy[image][grains[image]], entropy[image][~grains[image]]
            assert not len(fine) or not len(coarse) or fine.min() > coarse.max()
            if len(fine) and len(coarse):
                shares.append([(entropies > limit).float().mean().item() for limit in (fine.min(), coarse.max())])
    assert min(low for low, _ in shares) < 0.15
    assert max(high for _, high in shares) > 0.85
    mean = torch.cat([batch["grain_map"] for batch in batches]).float().mean().item()
    assert abs(mean - 0.5) < 0.05
    with Loader(cache, 8, seed=4, rank=1, world_size=2, start=32, workers=1) as loader:
        for batch in batches[2:6]:  # the second half of each, whoever reads it
            resumed = next(loader)
            assert all(torch.equal(value, batch[key][8:]) for key, value in resumed.items())


def the_whole_range(uniform):
    return [uniform]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_fixed_share_is_the_map_of_that_quantile(tmp_path, share):
    make(tmp_path)
    cache = LatentCache(tmp_path, shares=lambda uniform: [share])
    grains = torch.cat([next(Loader(cache, 100, seed=s))["grain_map"] for s in range(3)])
    assert grains.float().mean().item() == pytest.approx(share, abs=0.06)
    (limit,) = cache.quantiles([share])
    wanted = torch.cat([encode(images)["entropy"] for images in everything()])
    assert (wanted > limit).float().mean().item() == pytest.approx(share, abs=0.003)
    assert cache.shares_above([limit]) == pytest.approx([share], abs=0.003)
    # Out of a stream, without draws, the map is that of the facts' thresholds.
    assert torch.equal(cache.fetch(range(50))["grain_map"], LatentCache(tmp_path).fetch(range(50))["grain_map"])


def test_a_share_at_the_thresholds_gives_the_same_bits(tmp_path):
    cache = make(tmp_path)
    point = LatentCache(tmp_path, shares=Point(cache.shares()))
    for one, other in zip(Loader(cache, 24, seed=3), [next(Loader(point, 24, seed=3))]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


class Point:
    def __init__(self, shares):
        self.shares = shares

    def __call__(self, uniform):
        return self.shares


def test_further_arrays_are_kept_by_name(tmp_path):
    def more(images):
        return encode(images) | {"features": images[:, :, ::16, ::16].to(torch.bfloat16), "seen": images[:, 0, :2, 0]}

    build_cache(tmp_path, Tiles(), more, facts=FACTS, unit_size=15)
    finish_cache(tmp_path)
    assert LatentCache(tmp_path).fetch([1]).keys() == {"mean", "std", "grain_map", "label", "index"}
    batch = LatentCache(tmp_path, extras=("features", "seen")).fetch([17, 3])
    images = torch.stack([Tiles()[i]["image"] for i in (17, 3)])
    assert torch.equal(batch["features"], images[:, :, ::16, ::16].to(torch.bfloat16))
    assert torch.equal(batch["seen"], images[:, 0, :2, 0])
    with pytest.raises(UserError, match="it has no teacher"):
        LatentCache(tmp_path, extras=("teacher",))


def older(folder):
    """Turns a cache into one of version 1: the latents of one map."""
    index = json.loads((folder / "index.json").read_text())
    for unit in index["units"]:
        path = folder / unit["file"]
        tensors = load_file(path)
        views = [latents({k: v[:, f] for k, v in tensors.items() if v.ndim > 1}, [4.04]) for f in range(2)]
        mean, std, grains = (torch.stack(parts, 1) for parts in zip(*views))
        old = {"mean": mean.half(), "std": std.half(), "grain_map": grains.to(torch.uint8)}
        save_file(old | {key: tensors[key] for key in ("label", "index")}, path)
        unit |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    del index["entropies"], index["resolution"], index["plan"]["version"]
    (folder / "index.json").write_text(json.dumps(index | {"version": 1}))


def test_a_cache_of_version_1_is_read_with_its_own_map(tmp_path):
    new = make(tmp_path / "new")
    make(tmp_path / "old")
    older(tmp_path / "old")
    old = LatentCache(tmp_path / "old")
    assert (old.fixed, new.fixed) == (True, False)
    assert (old.latent_shape, old.grid, old.num_grains) == (new.latent_shape, new.grid, new.num_grains)
    assert old.shares() == new.shares()
    for one, other in zip(Loader(old, 24, seed=3), [next(Loader(new, 24, seed=3))]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for settings in ({"shares": the_whole_range}, {"extras": ("entropy",)}):
        with pytest.raises(UserError, match=r"earlier version, whose grain maps are fixed.*run the cache stage again"):
            LatentCache(tmp_path / "old", **settings)
    before = contents(tmp_path / "old")
    build_cache(tmp_path / "old", Tiles(), encode, facts=FACTS, unit_size=15)  # finished, so nothing is added
    assert contents(tmp_path / "old") == before
