"""Image sources, the training loader, entropy calibration and the latent cache (see docs/data.md)."""

from .loader import Batch, Loader, SinglePass, default_workers
from .order import step_generator
from .sources import DemoPhotos, ImageFolder, ImageSource, NpzPack, WebDatasetShards, open_source

__all__ = [
    "Batch",
    "DemoPhotos",
    "ImageFolder",
    "ImageSource",
    "Loader",
    "NpzPack",
    "SinglePass",
    "WebDatasetShards",
    "default_workers",
    "open_source",
    "step_generator",
]
