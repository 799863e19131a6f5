"""The photographs of the demo, which scikit-image bundles."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from d2it.data.decode import decode
from d2it.data.sources.base import ImageSource
from d2it.errors import UserError
from d2it.seeds import Draws


class DemoPhotos(ImageSource):
    """Crops of eight photos that scikit-image bundles, so that a demo needs no data.

    Each photo has a square frame around its subject, wide enough that stars, bricks and stones are more than a pixel
    at 64 pixels. Crop i is photo `i % 8`, a window of 85 % to all of what fits the frame, at a place drawn from i: the
    same set every time. The label is the photo. Astronaut, chelsea (a cat), coffee, rocket, Hubble deep field; gray:
    brick, gravel, camera.

    Args:
        image_size: edge, or (height, width), in pixels.
        crops: images of the set.
        options: as for `ImageSource`.
    """

    #: Photo -> (left, top, side) of its frame, in pixels.
    FRAMES: ClassVar[dict[str, tuple[int, int, int]]] = {
        "astronaut.png": (40, 0, 400),
        "chelsea.png": (90, 0, 300),
        "coffee.png": (75, 0, 400),
        "rocket.jpg": (180, 127, 300),
        "hubble_deep_field.jpg": (400, 350, 440),
        "brick.png": (110, 150, 288),
        "gravel.png": (128, 128, 256),
        "camera.png": (60, 40, 360),
    }
    PHOTOS = tuple(FRAMES)

    def __init__(self, image_size: int | tuple[int, int], *, crops: int = 2048, **options: Any) -> None:
        super().__init__(image_size, **options)
        if crops < 1:
            raise ValueError(f"crops must be positive, got {crops}")
        package = importlib.util.find_spec("skimage")
        if package is None or not package.submodule_search_locations:
            raise UserError("the demo's photos come with scikit-image: pip install scikit-image")
        folder = Path(package.submodule_search_locations[0]) / "data"
        self._paths = [folder / name for name in self.PHOTOS]
        for path in self._paths:
            if not path.is_file():
                raise UserError(f"this scikit-image does not bundle {path.name}: install scikit-image 0.26")
        self._photos: dict[int, Image.Image] = {}
        self._crops = crops
        self.labels = np.arange(crops) % len(self.PHOTOS)
        self.classes = [path.stem for path in self._paths]
        self.num_classes = len(self.classes)
        self.description = f"{crops:,} crops of {len(self.PHOTOS)} photos bundled with scikit-image"

    def __len__(self) -> int:
        return self._crops

    def name(self, index: int) -> str:
        return f"{self._paths[self.label(index)]}, crop {index}"

    def picture(self, index: int) -> Image.Image:
        number = self.label(index)
        if number not in self._photos:
            self._photos[number] = decode(self._paths[number].read_bytes())
        photo = self._photos[number]
        left, top, side = self.FRAMES[self.PHOTOS[number]]
        height, width = self.image_size
        fit = side / max(height, width)  # the largest window, in units of the image size
        draws = Draws(0, index)
        # Little of place and size changes, which minutes suffice to learn; below 1 the crop would be too small.
        scale = fit if fit <= 1 else max(1.0, fit * (0.85 + 0.15 * draws.uniform()))
        crop_width, crop_height = round(width * scale), round(height * scale)
        left += draws.below(side - crop_width + 1)
        top += draws.below(side - crop_height + 1)
        return photo.crop((left, top, left + crop_width, top + crop_height))

    def _identify(self, digest: Any) -> None:
        for path in self._paths:
            digest.update(path.read_bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_photos": {}}
