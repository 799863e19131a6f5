"""A latent cache of random tiles, whose encoder is a few lines: what the tests of the cache share."""

import numpy as np
import torch
from PIL import Image

from d2it import ops
from d2it.data import ImageSource, LatentCache, build_cache, finish_cache
from d2it.data.decode import Unreadable

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
    x = (images.float() / 127.5 - 1) * torch.linspace(0, 1, 32)
    coarse, fine = (torch.nn.functional.avg_pool2d(x, side) for side in (16, 8))
    found = {"mean.0": coarse, "std.0": coarse.abs() / 3, "mean.1": fine, "std.1": fine.abs() / 3}
    return found | {"entropy": 4.04 + fine[:, 0, ::2, ::2]}


def latents(encoded, thresholds):
    """mean, std (B, 3, 4, 4) and grain_map (B, 2, 2) of what `encode` returned."""
    grains = ops.reference.grain_map(encoded["entropy"], torch.as_tensor(thresholds))
    pairs = ([encoded[f"{name}.{g}"].half().float() for g in range(2)] for name in ("mean", "std"))
    mean, std = (ops.reference.neighbor_copy(pair, grains) for pair in pairs)
    return mean, std, grains


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
