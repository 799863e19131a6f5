"""Image sources, the training loader, entropy calibration and the latent cache (see docs/data.md)."""

from d2it.data.cache import LatentCache, build_cache, finish_cache
from d2it.data.calibration import Calibration
from d2it.data.loader import Batch, Loader, SinglePass, default_workers
from d2it.data.sources import DemoPhotos, ImageFolder, ImageSource, NpzPack, WebDatasetShards, open_source

__all__ = [
    "Batch",
    "Calibration",
    "DemoPhotos",
    "ImageFolder",
    "ImageSource",
    "LatentCache",
    "Loader",
    "NpzPack",
    "SinglePass",
    "WebDatasetShards",
    "build_cache",
    "default_workers",
    "finish_cache",
    "open_source",
]
