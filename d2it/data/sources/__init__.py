"""Where images come from: folders, npz packs, WebDataset shards, and scikit-image's bundled photos.

Every source is map-style: `source[i]` depends on `i` alone, which is what makes shuffling, sharding and resuming exact
(see `d2it.data.loader`). Images stay uint8 until they reach the device. Nothing is fetched, nothing is extracted,
nothing is unpickled, and no name inside a file is ever used as a path.
"""

from d2it.data.sources.base import UNREADABLE_SHARE, ImageSource, check_classes
from d2it.data.sources.demo import DemoPhotos
from d2it.data.sources.folder import ImageFolder, find_images, read_image
from d2it.data.sources.open import open_source
from d2it.data.sources.pack import NpzPack
from d2it.data.sources.shards import WebDatasetShards

__all__ = [
    "UNREADABLE_SHARE",
    "DemoPhotos",
    "ImageFolder",
    "ImageSource",
    "NpzPack",
    "WebDatasetShards",
    "check_classes",
    "find_images",
    "open_source",
    "read_image",
]
