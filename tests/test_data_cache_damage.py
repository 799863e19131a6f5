"""A damaged latent cache is refused in one line: over one changed bit, or an index that no build writes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from d2it.data import LatentCache, build_cache, finish_cache, verify_cache
from d2it.errors import UserError
from d2it.files import sha256_of, write_sealed
from tests.tiles import FACTS, Tiles, encode, make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose units are all encoded, but which is not finished."""
    folder = tmp_path_factory.mktemp("begun")
    build_cache(folder, Tiles(), encode, facts=FACTS, unit_size=15)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished cache, to damage."""
    return shutil.copytree(whole, tmp_path / "cache")


def seal(folder, index):
    """Writes an index as `finish_cache` does."""
    write_sealed(folder / "index.json", {key: value for key, value in index.items() if key != "sha256"})


@pytest.mark.parametrize("trial", range(12))
def test_one_changed_bit_anywhere_is_refused(folder, trial):
    draw = np.random.default_rng(trial)
    path = folder / f"unit-{draw.integers(4):05d}.safetensors"
    data = bytearray(path.read_bytes())
    # Half of the trials in the header, where the format itself would notice some.
    data[draw.integers(len(data)) if trial % 2 else draw.integers(400)] ^= 1 << draw.integers(8)
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        LatentCache(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"num_classes": 5', '"num_classes": 6'),
        ("4.04", "4.14"),
        ('"unit-00002.safetensors"', '"unit-00003.safetensors"'),
    ],
)
def test_an_edited_index_is_refused(folder, old, new):
    text = (folder / "index.json").read_text()
    assert old in text
    (folder / "index.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"index\.json has changed since it was saved"):
        LatentCache(folder)


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
def test_values_that_no_build_writes_are_refused(folder, name, value, message):
    """By whoever wrote the cache: the hashes are as they should be."""
    path = folder / "unit-00001.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path)
    index = json.loads((folder / "index.json").read_text())
    changed = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    units = [unit | changed if unit["file"] == path.name else unit for unit in index["units"]]
    seal(folder, index | {"units": units})
    with pytest.raises(UserError, match=message):
        LatentCache(folder)


def test_grains_beyond_the_thresholds_are_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    index["plan"]["facts"]["thresholds"] = index["plan"]["facts"]["thresholds"][:-1]
    seal(folder, index)
    with pytest.raises(UserError, match=r"it has mean\.\d, for \d grains"):
        LatentCache(folder)


def test_a_truncated_or_missing_file_is_refused_without_hashing(folder):
    path = folder / "unit-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"unit-00002.safetensors is damaged: [\d,]+ bytes"):
        LatentCache(folder, verify=False)
    path.unlink()
    with pytest.raises(UserError, match=r"unit-00002.safetensors: No such file"):
        LatentCache(folder, verify=False)


def test_a_header_that_disagrees_with_the_index_is_refused_without_hashing(folder):
    index = json.loads((folder / "index.json").read_text())
    fewer = [{**index["units"][0], "images": 14}, {**index["units"][1], "images": 16}, *index["units"][2:]]
    for spoiled in (index | {"plan": index["plan"] | {"flips": False}}, index | {"units": fewer}):
        seal(folder, spoiled)
        with pytest.raises(UserError, match="is damaged"):
            LatentCache(folder, verify=False)


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
def test_a_damaged_index_is_refused(folder, spoil):
    seal(folder, spoil(json.loads((folder / "index.json").read_text())))
    with pytest.raises(UserError, match=r"index\.json") as caught:
        LatentCache(folder)
    assert "\n" not in str(caught.value)


def test_verify_command(folder, capsys):
    verify_cache.main([str(folder)])
    shown = capsys.readouterr().out
    assert "50 images cached, 0 unreadable" in shown
    assert "vae_sha256: ab12" in shown
    path = folder / "unit-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(UserError, match=r"unit-00001\.safetensors is damaged"):
        verify_cache.main([str(folder)])


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
def test_an_index_of_other_types_or_without_hashes_is_one_line(folder, spoil):
    seal(folder, spoil(json.loads((folder / "index.json").read_text())))
    with pytest.raises(UserError, match=r"index\.json is damaged") as caught:
        LatentCache(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"plan": 1}', b'{"plan": {"units": 4}, "file": "x"}', b"\xff", b"[" * 9**5]
)
def test_a_damaged_record_of_an_unfinished_cache_is_one_line(begun, tmp_path, content):
    unfinished = shutil.copytree(begun, tmp_path / "cache")
    (unfinished / "unit-00000.json").write_bytes(content)
    with pytest.raises(UserError, match=r"unit-") as caught:
        finish_cache(unfinished)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["index.json", "unit-00001.safetensors"])
def test_a_fifo_in_a_cache_is_one_line_and_no_wait(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=name):
        LatentCache(folder)
