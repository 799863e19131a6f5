"""The latent cache: whole or absent, the same for any number of ranks, and of one source, one encoder, one setting."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import LatentCache, Loader, build_cache, finish_cache
from d2it.errors import UserError
from tests.tiles import FACTS, Tiles, contents, encode, latents, make


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
