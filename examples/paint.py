"""Samples of a trained D2iT under a grain map of one's own: the same noise, detail in another place.

python examples/paint.py runs/demo
"""

import sys
from pathlib import Path

import torch

from d2it import D2iT, pictures

if __name__ == "__main__":
    d2it = D2iT.from_pretrained(sys.argv[1])
    rows, columns = d2it.region_grid
    left = torch.zeros(rows, columns, dtype=torch.int64)
    left[:, : columns // 2] = d2it.num_grains - 1  # fine on the left half, coarse on the right
    maps = torch.stack([left, left.flip(1)])
    samples = d2it(grain_map=maps, labels=0 if d2it.num_classes else None, seeds=[7, 7])
    images = pictures.magnify(samples.uint8(), 2)
    images = pictures.outline_grains(images, samples.grain_maps.numpy(), d2it.num_grains)
    pictures.save_png(Path("painted.png"), pictures.sheet(images, columns=["fine on the left", "fine on the right"]))
    print("wrote painted.png")
