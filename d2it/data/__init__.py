"""Image sources, the training loader, entropy calibration and the latent cache (see docs/data.md)."""

from .cache import LatentCache, build_cache, finish_cache
from .calibration import Calibration
from .loader import Batch, Loader, SinglePass, default_workers
from .sources import DemoPhotos, ImageFolder, ImageSource, NpzPack, WebDatasetShards, open_source

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
