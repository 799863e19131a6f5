"""Encoded image in, uint8 RGB crop out; the files need not be trusted.

The size is read from the header and checked against a cap before a pixel is decoded, only a few formats are opened,
and whatever a decoder raises becomes `Unreadable`, which the loader counts. Cropping follows ADM's `center_crop_arr`:
halve with BOX while both sides stay at least twice the target, resize with BICUBIC, cut. EXIF orientation is not
applied, as in ADM and torchvision.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from d2it.errors import reason_of
from d2it.seeds import Draws

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20

# Modes that Pillow converts to RGB and L faithfully; it clips those of more than 8 bits to white.
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# A picture that is scaled to many times the pixels of its crop is cut first.
_WASTE = 16


class Unreadable(Exception):
    """An image that cannot be decoded: damaged, truncated, of another format or depth, or above the pixel cap."""


class TooSmall(Exception):
    """An image with a side below the one asked for; `args` are its width and height."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes JPEG, PNG, WebP or BMP bytes to an RGB image.

    Alpha is dropped, gray repeated, 16-bit gray scaled to 8 bits, and of an animation the first frame is taken.

    Raises:
        Unreadable: with the reason.
    """
    with _opened(data, max_pixels) as image:
        if image.mode in _SIXTEEN_BITS:
            image = Image.fromarray(((_wide(image) * 255 + 32767) // 65535).astype(np.uint8))
        return image.convert("RGB")


def decode_gray(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int]:
    """Decodes an image to gray levels (H, W) and the level of white: uint8 and 255, or int64 and 65535.

    Raises:
        Unreadable: with the reason.
    """
    with _opened(data, max_pixels) as image:
        if image.mode in _SIXTEEN_BITS:
            return _wide(image), 65535
        return np.asarray(image.convert("L")), 255


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and its remarks on EXIF blocks
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Unreadable(f"{width} x {height} pixels, above the cap of {max_pixels:,}")
                if image.mode not in _EIGHT_BITS + _SIXTEEN_BITS:
                    raise Unreadable(f"pixels of mode {image.mode}, which have no fixed range")
                yield image
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more pixels than the cap of {max_pixels:,}") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:  # a fuzzed file makes Pillow's parsers raise nearly anything
        raise Unreadable(reason_of(error)) from None


def _wide(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Unreadable(f"levels {levels.min()} ... {levels.max()}, outside 16 bits")
    return levels


def _cut(image: Image.Image, cover: tuple[int, int], size: tuple[int, int], place: Callable[[int], int]) -> Image.Image:
    """Scales the image until it just covers `cover` = (H, W), as ADM does, and cuts `size` = (H, W) out of it.

    Args:
        image: RGB.
        cover: at least `size`.
        size: of the result.
        place: the first pixel of the cut, given how many pixels are left over; called for x, then for y.
    """
    height, width = cover
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    full = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = place(full[0] - size[1]), place(full[1] - size[0])
    window = (left, top, left + size[1], top + size[0])
    if full[0] * full[1] > _WASTE * width * height:
        # A line of pixels would need gigabytes. Equal to resizing it whole to one level of rounding.
        across, down = image.width / full[0], image.height / full[1]
        box = (window[0] * across, window[1] * down, window[2] * across, window[3] * down)
        return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    if full != image.size:
        image = image.resize(full, Image.Resampling.BICUBIC)
    return image.crop(window)


def _check_size(image: Image.Image, size: tuple[int, int], upsample: bool) -> None:
    if not upsample and (image.height < size[0] or image.width < size[1]):
        raise TooSmall(image.width, image.height)


def center_crop(image: Image.Image, size: tuple[int, int], upsample: bool = False) -> Image.Image:
    """Returns the centre of `image` for `size` = (H, W); square sizes equal ADM's.

    Raises:
        TooSmall: a side is shorter than asked and `upsample` is False.
    """
    _check_size(image, size, upsample)
    return _cut(image, size, size, lambda left_over: left_over // 2)


def random_crop(
    image: Image.Image, size: tuple[int, int], draws: Draws, upsample: bool = False, least: float = 0.8
) -> Image.Image:
    """Returns a random crop of `size` = (H, W), as ADM's `random_crop_arr`.

    The crop spans a share of the covering side drawn uniformly from [least, 1], at a uniform place.

    Raises:
        TooSmall: a side is shorter than asked and `upsample` is False.
    """
    _check_size(image, size, upsample)
    share = least + (1 - least) * draws.uniform()
    cover = (math.ceil(size[0] / share), math.ceil(size[1] / share))
    return _cut(image, cover, size, lambda left_over: draws.below(left_over + 1))
