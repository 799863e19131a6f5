"""The latent cache: whole or absent, the same for any number of ranks, and refused over one changed bit."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import ImageSource, LatentCache, Loader, build_cache, finish_cache, verify_cache
from d2it.data.decode import Unreadable
from d2it.errors import UserError

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
    x = images.float() / 127.5 - 1
    mean = torch.nn.functional.avg_pool2d(x * torch.linspace(0, 1, 32), 8)  # (B, 3, 4, 4)
    return mean, mean.abs() / 3, (mean[:, 0, ::2, ::2] > 0).long() + (mean[:, 1, ::2, ::2] > 0).long()


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


@pytest.mark.parametrize("flips", [True, False])
def test_a_cache_gives_back_what_was_encoded(tmp_path, flips):
    source = Tiles()
    cache = make(tmp_path / "c", source, flips=flips)
    assert (len(cache), cache.latent_shape, cache.grid) == (50, (3, 4, 4), (2, 2))
    assert (cache.num_classes, cache.classes, cache.image_size, cache.flips) == (5, list("abcde"), (32, 32), flips)
    np.testing.assert_array_equal(cache.labels, source.labels)
    images = torch.stack([source[i]["image"] for i in range(50)])
    mean, std, grains = encode(images)
    batch = cache.fetch(range(50))
    assert batch["mean"].dtype == batch["std"].dtype == torch.float32
    assert batch["grain_map"].dtype == torch.int64
    torch.testing.assert_close(batch["mean"], mean.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(batch["std"], std.half().float(), rtol=0, atol=0)
    assert torch.equal(batch["grain_map"], grains)
    assert torch.equal(batch["index"], torch.arange(50))
    assert torch.equal(batch["label"], torch.arange(50) % 5)

    mirrored = encode(images.flip(3))
    seen = {False: 0, True: 0}
    for batch in (next(Loader(cache, 64, seed=s)) for s in range(3)):
        for row, index in enumerate(batch["index"]):
            plain = torch.equal(batch["mean"][row], mean[index].half().float())
            seen[plain] += 1
            wanted = (mean, std, grains) if plain else mirrored
            torch.testing.assert_close(batch["mean"][row], wanted[0][index].half().float(), rtol=0, atol=0)
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
        mean, std, grains = encode(images)
        mean[0, 0, 0, 0] = value  # 1e6 overflows float16
        return mean, std, grains

    with pytest.raises(UserError, match=r"not finite in torch.float16 \(mean\)"):
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
    assert len(data) < 3000 + cache.labels.nbytes < (tmp_path / "unit-00000.safetensors").stat().st_size
    assert torch.equal(pickle.loads(data).fetch([7])["mean"], cache.fetch([7])["mean"])


# Damage


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
        (tmp_path / "index.json").write_text(json.dumps(spoiled))
        with pytest.raises(UserError, match="is damaged"):
            LatentCache(tmp_path, verify=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index | {"format": "other"},
        lambda index: index | {"version": 2},
        lambda index: {key: value for key, value in index.items() if key != "plan"},
        lambda index: index | {"units": index["units"][1:]},
        lambda index: index | {"units": []},
        lambda index: index | {"units": [{**index["units"][0], "file": "../../etc/passwd"}]},
        lambda index: index | {"units": [{**index["units"][0], "file": "/etc/passwd"}]},
        lambda index: index | {"units": 7},
        lambda index: index | {"plan": index["plan"] | {"flips": "yes"}},
        lambda index: [index],
    ],
)
def test_a_damaged_index_is_refused(tmp_path, spoil):
    make(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(spoil(index)))
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
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(spoil(index)))
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
