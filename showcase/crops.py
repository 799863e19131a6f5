"""Cuts the crops that the showcase is trained on: `python showcase/crops.py` writes showcase/crops.npz.

Each of the photos beside this file gives as many crops: windows of 85 % to all of it, at places that follow from the
crop's number. The class of a crop is the name of its photo. `train.py --config showcase` reads the pack.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from d2it.npz import save_arrays
from d2it.seeds import Draws

CROPS, SIZE = 64, 64  # of a photo; pixels along a crop's side


def main() -> None:
    """Writes the pack."""
    here = Path(__file__).resolve().parent
    paths = sorted((here / "photos").glob("*.jpg"))
    files, labels = [], []
    for label, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        for number in range(CROPS):
            draws = Draws(label, number)
            side = round(photo.width * (0.85 + 0.15 * draws.uniform()))
            left, top = (draws.below(photo.width - side + 1) for _ in range(2))
            crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            crop.save(file, "png")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
            labels.append(label)
    offsets = np.cumsum([0, *map(len, files)])
    names = np.array([path.stem for path in paths])
    arrays = {"jpeg": np.concatenate(files), "offsets": offsets, "labels": np.array(labels), "classes": names}
    save_arrays(here / "crops.npz", arrays)
    print(f"{len(files)} crops of {len(paths)} photos: {here / 'crops.npz'}")


if __name__ == "__main__":
    main()
