"""Cuts the crops that the showcase is trained on: `python showcase/crops.py` writes showcase/crops.npz.

Each of the photos beside this file gives as many crops: windows of 85 % to all of it, at places that follow from the
crop's number. The class of a crop is the name of its photo. `train.py --config showcase/train.yaml` reads the pack;
`--first 64` cuts others, to judge the model by.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from d2it.npz import save_arrays
from d2it.seeds import Draws

SIZE = 64  # pixels along a crop's side


def main() -> None:
    """Writes the pack."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of each photo's first crop (%(default)s)")
    parser.add_argument("--count", type=int, default=64, help="crops of each photo (%(default)s)")
    parser.add_argument("--output", type=Path, default=here / "crops.npz", help="the pack (showcase/crops.npz)")
    options = parser.parse_args()
    paths = sorted((here / "photos").glob("*.jpg"))
    files, labels = [], []
    for label, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        for number in range(options.first, options.first + options.count):
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
    save_arrays(options.output, arrays)
    print(f"{len(files)} crops of {len(paths)} photos: {options.output}")


if __name__ == "__main__":
    main()
