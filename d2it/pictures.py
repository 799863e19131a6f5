"""Conversion of images, and pictures of a run as (H, W, 3) uint8: tiles, grain maps laid over them, loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from d2it.files import atomic_write

_COARSE, _FINE = np.array([40, 90, 255]), np.array([255, 50, 40])  # blue and red, as in the paper's Figure 3


def overlay_grains(images: np.ndarray, grain_maps: np.ndarray, num_grains: int = 2) -> np.ndarray:
    """Tint every region by its grain, from blue (coarsest) to red (finest), with a border.

    Args:
        images: (N, H, W, 3) uint8.
        grain_maps: (N, h, w) integers, H/h and W/w whole.

    Returns:
        (N, H, W, 3) uint8.
    """
    rows, columns = images.shape[1] // grain_maps.shape[1], images.shape[2] // grain_maps.shape[2]
    share = grain_maps[..., None] / max(1, num_grains - 1)
    colour = (_COARSE * (1 - share) + _FINE * share).repeat(rows, 1).repeat(columns, 2)
    tinted = images * 0.72 + colour * 0.28
    border = np.zeros(images.shape[1:3], bool)
    border[::rows] = True
    border[:, ::columns] = True
    tinted[:, border] = 0.45 * images[:, border] + 0.55 * colour[:, border]
    return tinted.round().astype(np.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """-1 ... 1 -> uint8 0 ... 255; values outside are clipped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte()


def to_pictures(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8 on the host; values outside are clipped."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def tile(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Return (N, H, W, 3) images as one picture on white, row by row; nearly square unless `columns` is given."""
    count, height, width, _ = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def enlarge(picture: np.ndarray, least: int = 640) -> np.ndarray:
    """Repeat pixels until the picture is at least `least` wide, so that small pictures stay sharp on a screen."""
    times = -(-least // picture.shape[1])
    return picture.repeat(times, 0).repeat(times, 1)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        Image.fromarray(picture).save(partial, "png")


def save_curves(path: Path, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Write a picture with one panel a curve.

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
