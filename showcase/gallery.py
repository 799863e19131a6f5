"""Draws the pictures of docs/gallery.md with the showcase's weights: `python showcase/gallery.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2it import pictures
from d2it.sampling import D2iT
from d2it.sampling.sheets import denoising_sheet

HERE = Path(__file__).resolve().parent
FOUR = ["dog", "guitar", "rocket", "astronaut"]


def maps() -> dict[str, Tensor]:
    """Grain maps of 8 x 8 regions, by name."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    return {
        "all coarse": torch.zeros(8, 8),
        "left half": x < 0,
        "disc": x.square() + y.square() < 10,
        "chequered": (x + y) % 2 == 0,
        "all fine": torch.ones(8, 8),
    }


def main() -> None:
    """Writes the pictures."""
    d2it = D2iT.from_pretrained(HERE)
    assert d2it.class_names is not None
    width, k = 8, d2it.num_grains

    def save(name: str, images: np.ndarray, **names: object) -> None:
        pictures.save_png(HERE.parent / "docs" / "images" / f"gallery_{name}.png", pictures.sheet(images, **names))  # type: ignore[arg-type]

    # Every class: two samples and their maps.
    names = d2it.class_names
    rows: list[np.ndarray] = []
    for seed in (0, 100):
        drawn = d2it(labels=names, seed=seed)
        large = pictures.magnify(drawn.uint8(), len(names), 1400)
        rows += [large, pictures.outline_grains(large, drawn.grain_maps.numpy(), k)]
    save("classes", np.concatenate(rows), columns=names, rows=["sample", "its grains"] * 2)

    # One seed a class at several scales of guidance.
    scales = [1.0, 1.5, 2.0, 3.0, 5.0]
    strengths = np.stack([d2it(labels=FOUR, seed=10, guidance=scale).uint8() for scale in scales], 1)
    flat = strengths.reshape(-1, *strengths.shape[2:])
    save("guidance", pictures.magnify(flat, width), columns=[f"w = {scale:g}" for scale in scales], rows=FOUR)

    # The same seeds under maps drawn by hand, and that of the Grain Transformer.
    own = d2it(labels=FOUR, seed=20)
    columns = {"sampled": own.grain_maps, **{name: m.long().expand(4, 8, 8) for name, m in maps().items()}}
    tiles = []
    for grains in columns.values():
        drawn = d2it(labels=FOUR, seed=20, grain_map=grains)
        tiles.append(pictures.outline_grains(pictures.magnify(drawn.uint8(), width), grains.numpy(), k))
    stacked = np.stack(tiles, 1)
    save("maps", stacked.reshape(-1, *stacked.shape[2:]), columns=list(columns), rows=FOUR)

    # The same seeds at growing budgets.
    budgets = [0.3, 0.45, 0.6, 0.8, 1.0]
    tiles = []
    for budget in budgets:
        drawn = d2it(labels=FOUR, seed=20, budget=budget)
        tiles.append(pictures.outline_grains(pictures.magnify(drawn.uint8(), width), drawn.grain_maps.numpy(), k))
    stacked = np.stack(tiles, 1)
    save("budgets", stacked.reshape(-1, *stacked.shape[2:]), columns=[f"budget {b:g}" for b in budgets], rows=FOUR)

    strip = denoising_sheet(d2it, FOUR, seed=20)
    pictures.save_png(HERE.parent / "docs" / "images" / "gallery_denoising.png", strip)


if __name__ == "__main__":
    main()
