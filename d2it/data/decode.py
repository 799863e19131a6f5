"""Encoded image in, uint8 RGB crop out; written for files that nobody vouches for.

The size is read from the header and held against a cap before a pixel is decoded, only a few formats are opened,
and whatever a decoder throws becomes :class:`Unreadable`, which the loader counts. Cropping follows ADM's
``center_crop_arr``: halve with BOX while both sides stay at least twice the target, resize with BICUBIC, cut.
EXIF orientation is not applied, as in ADM and torchvision.
"""

from __future__ import annotations

import io
import math
import warnings

from PIL import Image

from d2it.seeds import Draws

try:
    import simplejpeg
except ImportError:  # Pillow alone gives the same pixels, at about two thirds of the rate
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20


class Unreadable(Exception):
    """An image that cannot be decoded: damaged, truncated, of another format, or above the pixel cap."""


class TooSmall(Exception):
    """An image with a side below the one asked for; ``args`` are its width and height."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG, WebP or BMP bytes to an RGB image (alpha dropped, gray repeated, first frame).

    simplejpeg decodes ordinary JPEG files where it is installed. Where it finds anything odd, Pillow has the
    last word, so the set of readable files does not depend on what is installed.

    Raises:
        Unreadable: with the reason.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= max_pixels and colorspace in ("YCbCr", "Gray"):
                return Image.fromarray(simplejpeg.decode_jpeg(data))
        except ValueError:
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and its remarks on EXIF blocks
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Unreadable(f"{width} x {height} pixels, above the cap of {max_pixels:,}")
                return image.convert("RGB")
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more pixels than the cap of {max_pixels:,}") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:  # a fuzzed file makes Pillow's parsers raise nearly anything
        raise Unreadable(str(error).strip().split("\n")[0] or type(error).__name__) from None


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that the image just covers height x width, as ADM does."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _check_size(image: Image.Image, size: tuple[int, int], upsample: bool) -> None:
    if not upsample and (image.height < size[0] or image.width < size[1]):
        raise TooSmall(image.width, image.height)


def center_crop(image: Image.Image, size: tuple[int, int], upsample: bool = False) -> Image.Image:
    """Return the centre of ``image`` for ``size`` = (H, W); square sizes equal ADM's.

    Raises:
        TooSmall: a side is shorter than asked and ``upsample`` is False.
    """
    _check_size(image, size, upsample)
    height, width = size
    image = _cover(image, height, width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(
    image: Image.Image, size: tuple[int, int], draws: Draws, upsample: bool = False, least: float = 0.8
) -> Image.Image:
    """Return a random crop of ``size`` = (H, W), as ADM's ``random_crop_arr``.

    The crop spans a share of the covering side drawn uniformly from [least, 1], at a uniform place.

    Raises:
        TooSmall: a side is shorter than asked and ``upsample`` is False.
    """
    _check_size(image, size, upsample)
    height, width = size
    share = least + (1 - least) * draws.uniform()
    image = _cover(image, math.ceil(height / share), math.ceil(width / share))
    left = draws.below(image.width - width + 1)
    top = draws.below(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))
