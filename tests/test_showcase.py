"""The trained model in the repository: it loads, is small, draws the same bits every time, and each its class."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2it import pictures
from d2it.sampling import D2iT

SHOWCASE = Path(__file__).resolve().parents[1] / "showcase"


@pytest.fixture(scope="module")
def d2it() -> D2iT:
    return D2iT.from_pretrained(SHOWCASE)


def test_every_file_is_small_and_every_photo_has_its_licence() -> None:
    weights = list(SHOWCASE.glob("*/model.safetensors"))
    assert len(weights) == 3
    assert sum(file.stat().st_size for file in weights) <= 12e6
    with open(SHOWCASE / "photos" / "LICENSES.csv", newline="") as file:
        rows = {row["file"]: row["licence"] for row in csv.DictReader(file)}
    assert rows.keys() == {path.name for path in (SHOWCASE / "photos").glob("*.jpg")}
    assert all("CC0" in licence or "Public domain" in licence for licence in rows.values())


def test_it_draws_the_same_bits_alone_and_in_a_batch(d2it: D2iT) -> None:
    labels = ["stars", "dog", "sunset"]
    drawn = d2it(labels=labels, seed=3, steps=4)
    assert torch.equal(d2it(labels=labels[1:2], seed=4, steps=4).images[0], drawn.images[1])
    again = D2iT.from_pretrained(SHOWCASE)(labels=labels, seed=3, steps=4)
    assert torch.equal(again.images, drawn.images)
    assert torch.equal(again.grain_maps, drawn.grain_maps)


def test_a_sample_looks_like_the_photo_of_its_class(d2it: D2iT) -> None:
    """Nearer to the crops of its own photo than to those of any other, in pixels of 4 x 4 means."""

    def coarse(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1)

    assert d2it.class_names is not None
    photos = [Image.open(SHOWCASE / "photos" / f"{name}.jpg").convert("RGB") for name in d2it.class_names]
    resized = np.stack([np.asarray(photo.resize((64, 64), Image.Resampling.BOX)) for photo in photos]).astype(float)
    drawn = d2it(labels=range(12), seed=0).uint8().astype(float)
    assert drawn.shape == (12, 64, 64, 3)
    far = np.square(coarse(drawn)[:, None] - coarse(resized)[None]).mean(-1)
    assert (far.argmin(1) == np.arange(12)).all()


def test_its_autoencoder_rebuilds_the_photos(d2it: D2iT) -> None:
    files = sorted((SHOWCASE / "photos").glob("*.jpg"))
    photos = [Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for file in files]
    images = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos])).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean, _, grains, _ = d2it.vae.encode(pictures.from_uint8(images))
        rebuilt = pictures.to_uint8(d2it.vae.decode(mean, grains))
    error = (rebuilt.float() - images.float()).div(255).square().mean(dim=(1, 2, 3))
    assert float((-10 * error.log10()).min()) > 20
    assert 0.3 < float((grains > 0).float().mean()) < 0.7
