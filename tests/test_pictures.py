"""Pictures: what an outline surrounds and leaves alone, and where the names of a sheet stand."""

from __future__ import annotations

import numpy as np
import pytest

from d2it import pictures


@pytest.mark.parametrize(("region", "grains"), [(8, 2), (24, 2), (40, 3), (64, 4)])
def test_an_outline_lies_inside_the_regions_that_it_surrounds(region: int, grains: int) -> None:
    rng = np.random.default_rng(region)
    maps = rng.integers(0, grains, (3, 4, 5))
    images = rng.integers(0, 256, (3, 4 * region, 5 * region, 3), dtype=np.uint8)
    before = images.copy()
    drawn = pictures.outline_grains(images, maps, grains)
    assert np.array_equal(images, before)
    changed = (drawn != images).any(-1)
    coarse = (maps == 0).repeat(region, 1).repeat(region, 2)
    assert not changed[coarse].any()
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=0)
    for image, y, x in np.ndindex(maps.shape):
        tile = changed[image, y * region : (y + 1) * region, x * region : (x + 1) * region]
        around = padded[image, y : y + 3, x : x + 3]
        assert not tile[region // 2 - 1 : region // 2 + 1, region // 2 - 1 : region // 2 + 1].any()
        # A side has a line where the neighbour is coarser, and none where the whole neighbourhood is alike.
        assert tile[0, region // 2] == (around[0, 1] < maps[image, y, x])
        assert tile[region // 2, -1] == (around[1, 2] < maps[image, y, x])
        assert tile.any() == (around < around[1, 1]).any()


def test_colours_of_grains_are_evenly_spread() -> None:
    coarse, middle, fine = pictures.colour_grains(np.array([[[0, 1, 2]]]), 3, 8)[0, 4, 4::8]
    np.testing.assert_allclose(middle, (coarse.astype(float) + fine) / 2, atol=1)
    assert (coarse != fine).any()


@pytest.mark.parametrize(("count", "columns"), [(6, 3), (5, 2), (1, 1)])
@pytest.mark.parametrize("named", [False, True])
def test_a_sheet_holds_every_image_once_and_names_it(count: int, columns: int, named: bool) -> None:
    images = np.random.default_rng(count).integers(1, 255, (count, 40, 56, 3), dtype=np.uint8)
    rows = [f"row {i}" for i in range(-(-count // columns))]
    names = {"columns": [f"column {i}" for i in range(columns)], "rows": rows, "captions": ["a", "very long " * 9] * 3}
    sheet = pictures.sheet(
        images, **(names | {"captions": names["captions"][:count]} if named else {"columns": columns})
    )
    height, width, _ = sheet.shape
    places = [
        (y, x)
        for image in images
        for y in range(height - 39)
        for x in range(width - 55)
        if (sheet[y, x] == image[0, 0]).all() and np.array_equal(sheet[y : y + 40, x : x + 56], image)
    ]
    assert len(places) == count
    assert places == sorted(places)
    outside = sheet.copy()
    for y, x in places:
        outside[y : y + 40, x : x + 56] = 255
    assert (outside < 255).any() == named  # the names, and nothing else


def test_small_images_are_magnified_by_whole_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 10, 20, 3), dtype=np.uint8)
    large = pictures.magnify(images, 3, least=200)
    assert large.shape == (3, 40, 80, 3)
    assert np.array_equal(large[:, ::4, 3::4], images)
    assert pictures.magnify(images, 3, least=30).shape == images.shape
