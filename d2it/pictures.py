"""Conversion of images, and pictures of a run as (H, W, 3) uint8: named sheets, grain maps as outlines, loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from d2it.files import atomic_write

_COARSE, _FINE = np.array([40, 90, 255]), np.array([255, 50, 40])  # blue and red, as in the paper's Figure 3
_LINES = np.array([60, 200, 255]), np.array([255, 214, 10])  # of the second-coarsest and of the finest grain
_DARK = 20  # beside every line, so that it is seen on any picture


def colour_grains(grain_maps: np.ndarray, num_grains: int = 2, side: int = 12) -> np.ndarray:
    """Draws grain maps alone: every region a square of its grain's colour, from blue (coarsest) to red (finest).

    Args:
        grain_maps: (N, h, w) integers.
        num_grains: k.
        side: of a region, in pixels.

    Returns:
        (N, h * side, w * side, 3) uint8.
    """
    share = grain_maps[..., None] / max(1, num_grains - 1)
    colour = (_COARSE * (1 - share) + _FINE * share).repeat(side, 1).repeat(side, 2)
    lines = np.arange(max(colour.shape[1:3])) % side == 0
    colour[:, lines[: colour.shape[1]]] *= 0.7
    colour[:, :, lines[: colour.shape[2]]] *= 0.7
    return colour.round().astype(np.uint8)


def outline_grains(images: np.ndarray, grain_maps: np.ndarray, num_grains: int = 2) -> np.ndarray:
    """Draws a line around the regions of each grain or finer; the pixels elsewhere stay as they are.

    Lines are yellow around the finest grain and blue around the second-coarsest of more than two, with dark edges, and
    lie inside the regions that they surround. Enlarge small images first (`magnify`), so that lines are thin on them.

    Args:
        images: (N, H, W, 3) uint8.
        grain_maps: (N, h, w) integers, H/h and W/w whole.
        num_grains: k.

    Returns:
        (N, H, W, 3) uint8.
    """
    rows, columns = images.shape[1] // grain_maps.shape[1], images.shape[2] // grain_maps.shape[2]
    width = max(1, min(rows, columns) // 16)
    drawn = images.copy()
    for grain in range(1, num_grains):
        share = (grain - 1) / (num_grains - 2) if num_grains > 2 else 1.0
        inside = (grain_maps >= grain).repeat(rows, 1).repeat(columns, 2)
        dark, line = inside & ~_eroded(inside, width + 2), _eroded(inside, 1) & ~_eroded(inside, width + 1)
        drawn[dark] = _DARK
        drawn[line] = _LINES[0] * (1 - share) + _LINES[1] * share
    return drawn


def _eroded(masks: np.ndarray, pixels: int) -> np.ndarray:
    """The masks (N, H, W), made of rectangles of more than 2 `pixels`, without what is so near to their edges."""
    padded = np.pad(masks, ((0, 0), (pixels, pixels), (pixels, pixels)))
    _, height, width = masks.shape
    places = (0, pixels, 2 * pixels)
    return np.logical_and.reduce([padded[:, y : y + height, x : x + width] for y in places for x in places])


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """-1 ... 1 -> uint8 0 ... 255; values outside are clipped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte()


def to_pictures(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8 on the host; values outside are clipped."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def magnify(images: np.ndarray, columns: int, least: int = 1024) -> np.ndarray:
    """Repeats the pixels of (N, H, W, 3) images until `columns` of them side by side are at least `least` wide."""
    times = -(-least // (columns * images.shape[2]))
    return images.repeat(times, 1).repeat(times, 2)


def sheet(
    images: np.ndarray, *, columns: int | Sequence[str], rows: Sequence[str] = (), captions: Sequence[str] = ()
) -> np.ndarray:
    """Returns images as one picture on white, row by row, with names at the top, at the left, or over each image.

    Names that are too long for an image's width are cut.

    Example:
        >>> import numpy as np
        >>> photos = np.zeros((4, 96, 96, 3), np.uint8)
        >>> sheet(photos, columns=["cat", "coffee"], rows=["photo", "rebuilt"]).ndim
        3

    Args:
        images: (N, H, W, 3) uint8.
        columns: their number, or their names.
        rows: names of the rows.
        captions: N names.
    """
    count, height, width, _ = images.shape
    heads = () if isinstance(columns, int) else columns
    across = columns if isinstance(columns, int) else len(columns)
    down = -(-count // across)
    size, gap = max(11, min(22, width // 9)), 3
    font, line = ImageFont.load_default(size), round(size * 1.5)
    left = gap + max((round(font.getlength(name)) + 3 * gap for name in rows), default=0)
    top = gap + (line if any(heads) else 0)
    step = height + gap + (line if captions else 0)
    canvas = Image.new("RGB", (left + across * (width + gap), top + down * step), "white")
    draw = ImageDraw.Draw(canvas)

    def name(text: str, x: int, y: int) -> None:
        while len(text) > 1 and font.getlength(text) > width:
            text = text.rstrip("\u2026")[:-1] + "\u2026"
        draw.text((x + width / 2, y + line / 2), text, "black", font, anchor="mm")

    for i, text in enumerate(heads):
        name(text, left + i * (width + gap), gap)
    for i, text in enumerate(rows):
        draw.text((left - 2 * gap, top + i * step + step / 2), text, "black", font, anchor="rm")
    for i, image in enumerate(images):
        x, y = left + i % across * (width + gap), top + i // across * step
        if captions:
            name(captions[i], x, y)
        canvas.paste(Image.fromarray(image), (x, y + (line if captions else 0)))
    return np.asarray(canvas)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        Image.fromarray(picture).save(partial, "png")


def save_curves(path: Path, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Writes a picture with one panel a curve.

    Args:
        path: of the PNG file.
        curves: name -> (steps, values).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, (steps, values)) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), i + 1)
        axes.plot(steps, values)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
