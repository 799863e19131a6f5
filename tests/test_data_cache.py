"""The latent cache: whole or absent, the same for any number of ranks, and refused over one changed bit."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from d2it import ops
from d2it.data import ImageSource, LatentCache, Loader, build_cache, finish_cache, verify_cache
from d2it.data.decode import Unreadable
from d2it.errors import UserError
from d2it.files import sha256_of, write_sealed

FACTS = {"vae_sha256": "ab12", "thresholds": [4.04], "downsampling": (8, 16), "scaling_factor": 0.9}


class Tiles(ImageSource):
    """Random 32 x 32 pictures, every one its own."""

    def __init__(self, count=50, bad=()):
        super().__init__(32)
        self.count, self.bad = count, set(bad)
        self.labels = np.arange(count) % 5
        self.num_classes = 5
        self.classes = list("abcde")
        self.description = f"{count} tiles"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"tile{index}"

    def picture(self, index):
        if index in self.bad:
            raise Unreadable("broken on purpose")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def encode(images):
    """A stand-in for the VAE that a mirror image does not commute with."""
    assert images.dtype == torch.uint8
    x = (images.float() / 127.5 - 1) * torch.linspace(0, 1, 32)
    coarse, fine = (torch.nn.functional.avg_pool2d(x, side) for side in (16, 8))
    found = {"mean.0": coarse, "std.0": coarse.abs() / 3, "mean.1": fine, "std.1": fine.abs() / 3}
    return found | {"entropy": 4.04 + fine[:, 0, ::2, ::2]}


def latents(encoded, thresholds):
    """mean, std (B, 3, 4, 4) and grain_map (B, 2, 2) of what `encode` returned."""
    grains = ops.reference.grain_map(encoded["entropy"], torch.as_tensor(thresholds))
    pairs = ([encoded[f"{name}.{g}"].half().float() for g in range(2)] for name in ("mean", "std"))
    mean, std = (ops.reference.neighbor_copy(pair, grains) for pair in pairs)
    return mean, std, grains


def make(folder, source=None, **options):
    source = source or Tiles()
    world_size = options.pop("world_size", 1)
    for rank in reversed(range(world_size)):
        build_cache(
            folder, source, encode, **{"facts": FACTS, "batch_size": 4, "unit_size": 15, **options},
            rank=rank, world_size=world_size,
        )  # fmt: skip
    finish_cache(folder)
    return LatentCache(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("sides", "expected"), [((16, 32), 43_024), ((8, 16, 32), 43_536)])
def test_bytes_of_an_image_of_256_pixels(tmp_path, sides, expected):
    """What docs/data.md states for f8f16 and f8f16f32, both flips; files have a header beside it."""

    def moments(images):
        shapes = {f"{name}.{g}": (4, side, side) for name in ("mean", "std") for g, side in enumerate(sides)}
        found = {name: torch.ones(len(images), *shape) for name, shape in shapes.items()}
        return found | {"entropy": torch.ones(len(images), sides[0], sides[0])}

    build_cache(tmp_path, Tiles(3), moments, facts=FACTS, unit_size=3)
    finish_cache(tmp_path)
    data = (tmp_path / "unit-00000.safetensors").read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == 3 * expected
    documentation = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    assert f"{expected:,} " in documentation
    assert f"{expected * 1_281_167 / 1e9:.1f} " in documentation


@pytest.mark.parametrize("flips", [True, False])
def test_a_cache_gives_back_what_was_encoded(tmp_path, flips):
    source = Tiles()
    cache = make(tmp_path / "c", source, flips=flips)
    assert (len(cache), cache.latent_shape, cache.grid) == (50, (3, 4, 4), (2, 2))
    assert (cache.num_classes, cache.classes, cache.image_size, cache.flips) == (5, list("abcde"), (32, 32), flips)
    np.testing.assert_array_equal(cache.labels, source.labels)
    images = torch.stack([source[i]["image"] for i in range(50)])
    mean, std, grains = latents(encode(images), [4.04])
    batch = cache.fetch(range(50))
    assert batch.keys() == {"mean", "std", "grain_map", "label", "index"}
    assert batch["mean"].dtype == batch["std"].dtype == torch.float32
    assert batch["grain_map"].dtype == torch.int64
    torch.testing.assert_close(batch["mean"], mean, rtol=0, atol=0)
    torch.testing.assert_close(batch["std"], std, rtol=0, atol=0)
    assert torch.equal(batch["grain_map"], grains)
    assert 0.3 < grains.float().mean() < 0.7
    assert torch.equal(batch["index"], torch.arange(50))
    assert torch.equal(batch["label"], torch.arange(50) % 5)

    mirrored = latents(encode(images.flip(3)), [4.04])
    seen = {False: 0, True: 0}
    for batch in (next(Loader(cache, 64, seed=s)) for s in range(3)):
        for row, index in enumerate(batch["index"]):
            plain = torch.equal(batch["mean"][row], mean[index])
            seen[plain] += 1
            wanted = (mean, std, grains) if plain else mirrored
            torch.testing.assert_close(batch["mean"][row], wanted[0][index], rtol=0, atol=0)
            torch.testing.assert_close(batch["std"][row], wanted[1][index].half().float(), rtol=0, atol=0)
            assert torch.equal(batch["grain_map"][row], wanted[2][index])
    assert (60 < seen[False] < 132) if flips else seen[False] == 0


def test_the_files_do_not_depend_on_ranks_or_batches(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "three", world_size=3, batch_size=7, workers=1)
    make(tmp_path / "many", world_size=9)  # more ranks than units
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "many")
    assert sorted(contents(tmp_path / "one")) == ["index.json", *(f"unit-{i:05d}.safetensors" for i in range(4))]


def test_an_interrupted_run_is_taken_up_by_any_number_of_ranks(tmp_path):
    make(tmp_path / "whole")
    calls = []

    def dying(images):
        calls.append(len(images))
        if sum(calls) > 60:  # both flips of 30 images and then some
            raise KeyboardInterrupt
        return encode(images)

    options = {"facts": FACTS, "batch_size": 4, "unit_size": 15}
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", Tiles(), dying, **options)
    assert sorted(path.name for path in (tmp_path / "c").glob("*.safetensors")) == [
        "unit-00000.safetensors",
        "unit-00001.safetensors",
    ]
    with pytest.raises(UserError, match="not finished"):
        LatentCache(tmp_path / "c")
    with pytest.raises(UserError, match="2 of 4 units"):
        finish_cache(tmp_path / "c")
    done = []
    for rank in range(2):
        build_cache(tmp_path / "c", Tiles(), encode, **options, rank=rank, world_size=2, progress=done.append)
    assert sum(done) == 20
    finish_cache(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    build_cache(tmp_path / "c", Tiles(), dying, **options)  # nothing left to do, so nothing dies


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": {**FACTS, "vae_sha256": "cd34"}}, r"other settings \(vae_sha256: \"ab12\" there, \"cd34\" asked\)"),
        ({"facts": {**FACTS, "more": 1}}, r"more: null there, 1 asked"),
        ({"source": Tiles(49)}, r"source: "),
        ({"flips": False}, "flips: true there, false asked"),
        ({"unit_size": 20}, "unit_size"),
    ],
)
def test_a_cache_of_other_settings_is_not_mixed_in(tmp_path, change, message, finished):
    build_cache(tmp_path, Tiles(), encode, facts=FACTS, unit_size=15)
    if finished:
        finish_cache(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path, **change)
    assert contents(tmp_path) == before


def test_require_names_the_difference(tmp_path):
    cache = make(tmp_path)
    cache.require(vae_sha256="ab12", downsampling=(8, 16), thresholds=[4.04])
    with pytest.raises(UserError, match=r"thresholds = \[4.04\], not \[3.9\]"):
        cache.require(thresholds=[3.9])


def test_unreadable_images_are_left_out_and_named(tmp_path):
    cache = make(tmp_path, Tiles(200, bad=(17, 90)))
    assert len(cache) == 198
    assert cache.skipped == ["tile17: broken on purpose", "tile90: broken on purpose"]
    assert cache.fetch(range(198))["index"].tolist() == [i for i in range(200) if i not in (17, 90)]
    assert torch.equal(cache.fetch([17, 150])["label"], cache.fetch([17, 150])["index"] % 5)


def test_a_unit_without_a_readable_image(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 200 of them take seconds
    cache = make(tmp_path, Tiles(100, bad=(4,)), unit_size=1)
    assert len(cache) == 99
    assert cache.fetch([3, 4])["index"].tolist() == [3, 5]


def test_more_than_one_percent_unreadable_is_an_error(tmp_path):
    with pytest.raises(UserError, match="3 of 200 images cannot be read"):
        make(tmp_path, Tiles(200, bad=(1, 2, 3)))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_latents_that_are_not_finite_are_refused(tmp_path, value):
    def broken(images):
        found = encode(images)
        found["mean.0"][0, 0, 0, 0] = value  # 1e6 overflows float16
        return found

    with pytest.raises(UserError, match=r"not finite in torch.float16 \(mean.0\)"):
        build_cache(tmp_path, Tiles(), broken, facts=FACTS)


def test_a_loader_over_a_cache_resumes_exactly(tmp_path):
    cache = make(tmp_path)
    whole = Loader(cache, 8, seed=4)
    batches = [next(whole) for _ in range(12)]
    with Loader(cache, 8, seed=4, start=40, workers=2) as loader:
        for batch in batches[5:]:
            resumed = next(loader)
            assert resumed.keys() == batch.keys()
            assert all(torch.equal(batch[key], resumed[key]) for key in batch)


def test_a_cache_survives_the_trip_to_a_spawned_worker(tmp_path):
    cache = make(tmp_path, unit_size=50)
    data = pickle.dumps(cache)
    assert len(data) < 12_000 + cache.labels.nbytes < (tmp_path / "unit-00000.safetensors").stat().st_size
    assert torch.equal(pickle.loads(data).fetch([7])["mean"], cache.fetch([7])["mean"])


# Maps of other shares


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


def everything():
    images = torch.stack([Tiles()[i]["image"] for i in range(50)])
    return images, images.flip(3)


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


# Damage


def seal(folder, index):
    """Writes an index as `finish_cache` does."""
    write_sealed(folder / "index.json", {key: value for key, value in index.items() if key != "sha256"})


@pytest.mark.parametrize("trial", range(12))
def test_one_changed_bit_anywhere_is_refused(tmp_path, trial):
    make(tmp_path)
    draw = np.random.default_rng(trial)
    path = tmp_path / f"unit-{draw.integers(4):05d}.safetensors"
    data = bytearray(path.read_bytes())
    # Half of the trials in the header, where the format itself would notice some.
    data[draw.integers(len(data)) if trial % 2 else draw.integers(400)] ^= 1 << draw.integers(8)
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"num_classes": 5', '"num_classes": 6'),
        ("4.04", "4.14"),
        ('"unit-00002.safetensors"', '"unit-00003.safetensors"'),
    ],
)
def test_an_edited_index_is_refused(tmp_path, old, new):
    make(tmp_path)
    text = (tmp_path / "index.json").read_text()
    assert old in text
    (tmp_path / "index.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"index\.json has changed since it was saved"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean.0", float("nan"), "mean.0 has values that are not finite"),
        ("std.1", float("inf"), "std.1 has values that are not finite"),
        ("entropy", float("-inf"), "entropy has values that are not finite"),
        ("label", -2, r"labels -2 \.\.\."),
        ("label", 5, r"labels .* 5 of 5 classes"),
    ],
)
def test_values_that_no_build_writes_are_refused(tmp_path, name, value, message):
    """By whoever wrote the cache: the hashes are as they should be."""
    make(tmp_path)
    path = tmp_path / "unit-00001.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path)
    index = json.loads((tmp_path / "index.json").read_text())
    changed = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    units = [unit | changed if unit["file"] == path.name else unit for unit in index["units"]]
    seal(tmp_path, index | {"units": units})
    with pytest.raises(UserError, match=message):
        LatentCache(tmp_path)


def test_grains_beyond_the_thresholds_are_refused(tmp_path):
    make(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["plan"]["facts"]["thresholds"] = index["plan"]["facts"]["thresholds"][:-1]
    seal(tmp_path, index)
    with pytest.raises(UserError, match=r"it has mean\.\d, for \d grains"):
        LatentCache(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_file_of_an_unfinished_cache_is_encoded_again(tmp_path, damage):
    whole = make(tmp_path / "whole")
    build_cache(tmp_path / "c", Tiles(), encode, facts=FACTS, unit_size=15)
    path = tmp_path / "c" / "unit-00001.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-10])
    build_cache(tmp_path / "c", Tiles(), encode, facts=FACTS, unit_size=15)
    finish_cache(tmp_path / "c")
    assert LatentCache(tmp_path / "c").fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("name", ["entropy", "mean.1", "std.0"])
def test_an_encoder_that_leaves_something_out_is_refused_at_its_first_batch(tmp_path, name):
    def less(images):
        return {key: value for key, value in encode(images).items() if key != name}

    with pytest.raises(ValueError, match=f"encode must return .*; {name} is missing"):
        build_cache(tmp_path, Tiles(), less, facts=FACTS)


def test_a_truncated_or_missing_file_is_refused_without_hashing(tmp_path):
    make(tmp_path)
    path = tmp_path / "unit-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"unit-00002.safetensors is damaged: [\d,]+ bytes"):
        LatentCache(tmp_path, verify=False)
    path.unlink()
    with pytest.raises(UserError, match=r"unit-00002.safetensors: No such file"):
        LatentCache(tmp_path, verify=False)


def test_a_header_that_disagrees_with_the_index_is_refused_without_hashing(tmp_path):
    make(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    fewer = [{**index["units"][0], "images": 14}, {**index["units"][1], "images": 16}, *index["units"][2:]]
    for spoiled in (index | {"plan": index["plan"] | {"flips": False}}, index | {"units": fewer}):
        seal(tmp_path, spoiled)
        with pytest.raises(UserError, match="is damaged"):
            LatentCache(tmp_path, verify=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index | {"format": "other"},
        lambda index: index | {"version": 3},
        lambda index: {key: value for key, value in index.items() if key != "plan"},
        lambda index: index | {"units": index["units"][1:]},
        lambda index: index | {"units": []},
        lambda index: index | {"units": [{**index["units"][0], "file": "../../etc/passwd"}]},
        lambda index: index | {"units": [{**index["units"][0], "file": "/etc/passwd"}]},
        lambda index: index | {"units": 7},
        lambda index: index | {"plan": index["plan"] | {"flips": "yes"}},
        lambda index: index | {"more": 1},
    ],
)
def test_a_damaged_index_is_refused(tmp_path, spoil):
    make(tmp_path)
    seal(tmp_path, spoil(json.loads((tmp_path / "index.json").read_text())))
    with pytest.raises(UserError, match=r"index\.json") as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_cache_and_no_permission(tmp_path):
    with pytest.raises(UserError, match="no latent cache here"):
        LatentCache(tmp_path / "absent")
    with pytest.raises(UserError, match="no latent cache was begun"):
        finish_cache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the latent cache"):
        build_cache(tmp_path / "file" / "c", Tiles(), encode, facts=FACTS)


def test_a_failed_write_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2it.data.cache.sha256_of", full)
    with pytest.raises(UserError, match="No space left on device"):
        build_cache(tmp_path, Tiles(), encode, facts=FACTS)
    assert os.listdir(tmp_path) == []


def test_verify_command(tmp_path, capsys):
    make(tmp_path)
    verify_cache.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "50 images cached, 0 unreadable" in shown
    assert "vae_sha256: ab12" in shown
    path = tmp_path / "unit-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(UserError, match=r"unit-00001\.safetensors is damaged"):
        verify_cache.main([str(tmp_path)])


def test_labels_are_held_against_the_number_of_classes(tmp_path):
    cache = make(tmp_path / "labelled")
    cache.require_classes(5)
    with pytest.raises(UserError, match="labels reach 4, num_classes is 4"):
        cache.require_classes(4)
    with pytest.raises(UserError, match="num_classes is 6, but there are 5 classes"):
        cache.require_classes(6)
    cache.require_classes(6, allow_missing=True)
    tiles = Tiles()
    tiles.labels, tiles.num_classes, tiles.classes = None, 0, None
    with pytest.raises(UserError, match="num_classes=5 needs labels"):
        make(tmp_path / "unlabelled", tiles).require_classes(5)


# Other data of the same number and names


class Others(Tiles):
    """As many tiles of the same names, of which some differ."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        if what == "labels":
            self.labels = (self.labels + 1) % 5

    def picture(self, index):
        picture = super().picture(index)
        return picture.transpose(Image.Transpose.ROTATE_90) if self.what == "pixels" else picture

    def name(self, index):
        return f"{'other' if self.what == 'names' else 'tile'}{index}"


@pytest.mark.parametrize("what", ["pixels", "labels", "names"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_other_images_is_not_mixed_in(tmp_path, what, finished):
    build_cache(tmp_path, Tiles(), encode, facts=FACTS, unit_size=15)
    if finished:
        finish_cache(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(fingerprint: "):
        make(tmp_path, Others(what))
    assert contents(tmp_path) == before
    build_cache(tmp_path, Tiles(), encode, facts=FACTS, unit_size=15)


def test_a_cache_has_a_fingerprint_of_its_content(tmp_path):
    one, two = make(tmp_path / "a"), make(tmp_path / "b")
    assert one.fingerprint() == two.fingerprint() == LatentCache(tmp_path / "a").fingerprint()
    assert one.fingerprint() != make(tmp_path / "c", Others("pixels")).fingerprint()


def unit(**change):
    return lambda index: index | {"units": [{**index["units"][0], **change}, *index["units"][1:]]}


def without(*keys):
    return lambda index: (
        index | {"units": [{k: v for k, v in index["units"][0].items() if k not in keys}, *index["units"][1:]]}
    )


def plan(**change):
    return lambda index: index | {"plan": index["plan"] | change}


@pytest.mark.parametrize(
    "spoil",
    [
        without("sha256"),
        unit(sha256=""),
        unit(sha256=None),
        unit(sha256="0" * 63),
        unit(sha256="z" * 64),
        unit(images=15.0),
        unit(images=-15),
        unit(images=True),
        unit(images=10**30),
        unit(bytes="1"),
        unit(file=5),
        unit(file=["unit-00000.safetensors"]),
        plan(image_size=[32, 32.5]),
        plan(image_size=[32, 0]),
        plan(image_size=32),
        plan(num_classes="5"),
        plan(num_classes=-1),
        plan(classes="abcde"),
        plan(classes=[1, 2, 3, 4, 5]),
        plan(classes=["a"]),
        plan(flips=1),
        plan(facts=[1]),
        lambda index: index | {"skipped": 3},
        lambda index: index | {"images": 50.0},
        lambda index: index | {"plan": None},
        lambda index: index | {"units": [None]},
    ],
)
def test_an_index_of_other_types_or_without_hashes_is_one_line(tmp_path, spoil):
    make(tmp_path)
    seal(tmp_path, spoil(json.loads((tmp_path / "index.json").read_text())))
    with pytest.raises(UserError, match=r"index\.json is damaged") as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"plan": 1}', b'{"plan": {"units": 4}, "file": "x"}', b"\xff", b"[" * 9**5]
)
def test_a_damaged_record_of_an_unfinished_cache_is_one_line(tmp_path, content):
    build_cache(tmp_path, Tiles(), encode, facts=FACTS, unit_size=15)
    (tmp_path / "unit-00000.json").write_bytes(content)
    with pytest.raises(UserError, match=r"unit-") as caught:
        finish_cache(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["index.json", "unit-00001.safetensors"])
def test_a_fifo_in_a_cache_is_one_line_and_no_wait(tmp_path, name):
    make(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=name):
        LatentCache(tmp_path)
