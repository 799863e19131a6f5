"""Entropy calibration: thresholds that give the ratios they are named for, and never without what they depend on."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import Calibration, calibrate, open_source
from d2it.data.calibration import CELLS, EntropySketch
from d2it.data.calibration import calibrate as run_calibration
from d2it.errors import UserError
from d2it.ops import encode_grains, kde_entropy


def photo(seed, size=64):
    """Regions of very different detail: noise whose strength grows from left to right over a slope."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, size)
    gray = 90 + 60 * ramp[:, None] + draw.normal(0, 1, (size, size)) * (60 * ramp**2)[None]
    return Image.fromarray(np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, 2))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        photo(i).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("count", [1, 2, 1000, 5000])
def test_sketch_quantiles_are_exact_to_one_cell(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(0)) ** 2 * math.log(256)
    sketch = EntropySketch(math.log(256))
    for part in values.split(300):
        sketch.add(part)
    shares = np.linspace(0, 1, 101)
    exact = np.quantile(values.double().numpy(), shares, method="inverted_cdf")
    assert sketch.total == count
    assert np.abs(sketch.quantiles(shares) - exact).max() <= sketch.width
    assert sketch.width == math.log(256) / CELLS


def test_sketch_keeps_the_ends_and_does_not_grow():
    sketch = EntropySketch(math.log(256))
    sketch.add(torch.tensor([0.0, math.log(256), math.log(256) + 1e-6]))
    assert sketch.total == 3
    assert abs(sketch.quantiles(np.array([1.0]))[0] - math.log(256)) <= sketch.width
    assert sketch.counts.nbytes == 8 * 2**20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "kde", [{}, {"num_bins": 32, "sigma": 0.02}, {"normalize": False}, {"value_range": (0.0, 1.0)}]
)
def test_thresholds_give_the_ratios_they_are_named_for(photos, workers, kde):
    source = open_source(photos, 64)
    found = run_calibration(source, region_size=8, batch_size=5, workers=workers, **kde)
    assert (found.images, found.regions, found.skipped) == (12, 12 * 64, 0)
    images = torch.stack([source[i]["image"] for i in range(12)])
    for ratios in (0.5, [0.3], [0.7, 0.3], (0.9, 0.5, 0.1)):
        thresholds = found.thresholds(ratios)
        grains, _ = encode_grains(images, thresholds, **found.kde)
        for grain, ratio in enumerate([ratios] if isinstance(ratios, float) else ratios, 1):
            # One region of 768, half a step of the stored percentiles, and ties within the sketch's cell.
            assert abs((grains >= grain).double().mean().item() - ratio) <= 0.003


def test_ratios_of_zero_and_one_leave_no_region_out(photos):
    source = open_source(photos, 64)
    found = run_calibration(source, region_size=8)
    images = torch.stack([source[i]["image"] for i in range(12)])
    assert (encode_grains(images, found.thresholds(0.0), **found.kde)[0] == 0).all()
    assert (encode_grains(images, found.thresholds(1.0), **found.kde)[0] == 1).all()
    flat = torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)
    assert (encode_grains(flat, found.thresholds([1.0, 0.0]), **found.kde)[0] == 1).all()


@pytest.mark.parametrize("ratios", [[], [0.3, 0.7], [0.5, 0.5], 1.5, [-0.1], [float("nan")]])
def test_ratios_are_checked(ratios):
    with pytest.raises(UserError, match="fine ratios"):
        Calibration.load().thresholds(ratios)


def test_images_that_cannot_be_told_apart_are_said_to_be(tmp_path):
    for i in range(4):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / f"{i}.png")
    found = run_calibration(open_source(tmp_path, 32))
    assert found.entropies[0] == found.entropies[-1]
    with pytest.raises(UserError, match="coincide"):
        found.thresholds([0.7, 0.6])
    assert found.shares(found.thresholds([0.7, 0.3])) == [1, 0]


def test_a_file_carries_all_that_a_threshold_depends_on(photos, tmp_path):
    found = run_calibration(open_source(photos, (32, 64)), region_size=8, sigma=0.02, description="twelve ramps")
    found.save(tmp_path / "c.json")
    back = Calibration.load(tmp_path / "c.json")
    assert np.abs(np.subtract(back.entropies, found.entropies)).max() <= 5e-7
    assert dataclasses.replace(back, entropies=()) == dataclasses.replace(found, entropies=())
    assert (back.image_size, back.sigma, back.region_size, back.source) == ((32, 64), 0.02, 8, "twelve ramps")
    assert back.kde == {
        "region_size": 8,
        "num_bins": 64,
        "value_range": (-1.0, 1.0),
        "sigma": 0.02,
        "normalize": True,
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda fields: fields | {"format": "something else"},
        lambda fields: fields | {"version": 99},
        lambda fields: {key: value for key, value in fields.items() if key != "sigma"},
        lambda fields: fields | {"surplus": 1},
        lambda fields: fields | {"entropies": fields["entropies"][:-1]},
        lambda fields: fields | {"entropies": fields["entropies"][::-1]},
        lambda fields: fields | {"entropies": [float("nan")] * 1001},
        lambda fields: fields | {"entropies": 3},
        lambda fields: [1, 2],
    ],
)
def test_a_damaged_file_is_refused(tmp_path, spoil):
    Calibration.load().save(tmp_path / "c.json")
    fields = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(spoil(fields)))
    with pytest.raises(UserError, match=r"c\.json"):
        Calibration.load(tmp_path / "c.json")
    for content in (b"", b"\xff\xfe", b"{", b"[" * 100000):
        (tmp_path / "c.json").write_bytes(content)
        with pytest.raises(UserError, match=r"c\.json"):
            Calibration.load(tmp_path / "c.json")
    with pytest.raises(UserError, match="absent"):
        Calibration.load(tmp_path / "absent.json")


def test_the_shipped_calibration_is_the_papers_setting_on_photographs():
    shipped = Calibration.load()
    assert shipped.kde == {
        "region_size": 16,
        "num_bins": 256,
        "value_range": (-1.0, 1.0),
        "sigma": 0.01,
        "normalize": True,
    }
    assert (shipped.image_size, shipped.images, shipped.regions) == ((256, 256), 1000, 256000)
    assert "ImageNet" in shipped.source
    # The deciles of 1,000 photographs, known from an independent computation to two digits.
    for share, entropy in ((100, 2.45), (500, 4.04), (750, 4.55), (900, 4.87)):
        assert abs(shipped.entropies[share] - entropy) < 0.006
    # Its floor is what a flat region has at the end of the range; its ceiling cannot be passed.
    flat = kde_entropy(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).item()
    assert abs(shipped.entropies[0] - flat) < 1e-4
    assert shipped.entropies[-1] < math.log(256)


def test_unreadable_images_are_counted(tmp_path):
    for i in range(100):
        file = io.BytesIO()
        photo(i, 16).save(file, "PNG")
        (tmp_path / f"{i:02d}.png").write_bytes(file.getvalue()[: 50 if i == 7 else None])
    found = run_calibration(open_source(tmp_path, 16))
    assert (found.images, found.regions, found.skipped) == (99, 99, 1)


def test_a_region_size_that_does_not_divide_is_one_line(photos):
    with pytest.raises(UserError, match="region_size=24 does not divide the image size 64 x 64"):
        run_calibration(open_source(photos, 64), region_size=24)


def test_command(photos, tmp_path, capsys):
    path = tmp_path / "c.json"
    size = ["--image-size", "64", "--region-size", "8", "--workers", "0"]
    calibrate.main([str(photos), *size, "--ratios", "0.7", "0.3", "--output", str(path)])
    shown = capsys.readouterr().out
    limits = ", ".join(f"{t:.4f}" for t in Calibration.load(path).thresholds([0.7, 0.3]))
    assert f"thresholds for fine ratios 0.7, 0.3: {limits}" in shown
    assert "768 regions" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no such file or folder"),
        (["demo", "--ratios", "0.3", "0.7"], "must descend"),
        (["demo", "--image-size", "16", "16", "16"], "--image-size"),
        (["demo", "--image-size", "40"], "does not divide"),
        (["demo", "--region-size", "1"], "--region-size must be"),
        (["demo", "--sigma", "0"], "--sigma must be positive"),
        (["demo", "--image-size", "512", "--workers", "0"], "smaller than the 512 x 512"),
        (["demo", "--device", "tpu"], "--device is"),
    ],
)
def test_command_refuses_bad_input(arguments, message):
    with pytest.raises(UserError, match=message):
        calibrate.main(arguments)


def test_command_ends_with_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "d2it.data.calibrate", "absent"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: absent: no such file or folder\n")


# Regions that share one entropy


def pages(folder, white, count=8):
    """Product photos: noise, and around it a white margin over the share `white` of the regions."""
    folder.mkdir()
    rows = round(8 * (1 - white))
    for i in range(count):
        page = np.full((128, 128, 3), 255, np.uint8)
        page[: 16 * rows] = np.random.default_rng(i).integers(0, 255, (16 * rows, 128, 3), dtype=np.uint8)
        Image.fromarray(page).save(folder / f"{i}.png")
    return open_source(folder, 128)


@pytest.mark.parametrize("white", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("asked", [0.05, 0.2, 0.3, 0.45, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_ties_go_to_the_nearer_side(tmp_path, caplog, white, asked):
    source = pages(tmp_path / "pages", white)
    found = run_calibration(source)
    caplog.clear()
    threshold = found.thresholds(asked)
    images = torch.stack([source[i]["image"] for i in range(len(source))])
    got = float((encode_grains(images, threshold, **found.kde)[0] == 1).double().mean())
    nearest = asked if asked <= 1 - white else min(1 - white, 1.0, key=lambda share: abs(share - asked))
    assert abs(got - nearest) <= 0.004
    assert abs(found.shares(threshold)[0] - got) <= 0.004
    assert ("is the nearest there is" in caplog.text) == (abs(nearest - asked) > 0.02)


def test_a_threshold_lies_in_the_middle_of_a_gap_and_not_on_the_tie(tmp_path):
    found = run_calibration(pages(tmp_path / "pages", 0.5))
    tie, above = found.entropies[0], found.entropies[-1]
    assert tie + 1 < found.thresholds(0.6)[0] < above - 1


def test_without_ties_a_threshold_is_the_percentile():
    shipped = Calibration.load()
    for i in range(100, 1000):  # below, flat regions share one entropy
        assert shipped.thresholds(1 - i / 1000)[0] == pytest.approx(shipped.entropies[i], abs=1e-9)
        assert shipped.shares([shipped.entropies[i]])[0] == pytest.approx(1 - i / 1000)
    assert shipped.shares(shipped.thresholds([1.0, 0.5, 0.0])) == pytest.approx([1, 0.5, 0])


def test_the_command_prints_the_shares(tmp_path, capsys):
    pages(tmp_path / "pages", 0.5)
    calibrate.main([str(tmp_path / "pages"), "--image-size", "128", "--ratios", "0.7", "0.2", "--workers", "0"])
    assert "shares of regions above them: 0.500, 0.200" in capsys.readouterr().out


def test_a_calibration_for_something_else_is_refused():
    shipped = Calibration.load()
    shipped.require(region_size=16, image_size=(256, 256), sigma=0.01)
    shipped.require(image_size=[256, 256])
    for facts, message in (
        ({"image_size": (64, 64)}, r"image_size=\(256, 256\), asked for is \(64, 64\)"),
        ({"region_size": 8}, "region_size=16, asked for is 8"),
    ):
        with pytest.raises(UserError, match=message):
            shipped.require(**facts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("region_size", "16"),
        ("region_size", 16.0),
        ("region_size", -16),
        ("region_size", True),
        ("num_bins", None),
        ("sigma", "small"),
        ("sigma", 0),
        ("sigma", 10**400),
        ("normalize", 1),
        ("value_range", [0]),
        ("value_range", [0, "1"]),
        ("value_range", 1.0),
        ("image_size", [256, 256.5]),
        ("image_size", [256]),
        ("images", [1]),
        ("source", 5),
        ("entropies", [0.0] * 1000 + ["1"]),
        ("entropies", [0.0] * 1000 + [None]),
        ("resolution", {}),
        ("made_with", None),
    ],
)
def test_a_field_of_another_type_is_one_line(tmp_path, key, value):
    Calibration.load().save(tmp_path / "c.json")
    fields = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(fields | {key: value}))
    with pytest.raises(UserError, match=rf"c\.json is not a readable calibration: {key}") as caught:
        Calibration.load(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
