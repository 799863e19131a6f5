"""Grain maps from a file, from a photo or at random, and the choice between them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2it.data.decode import EXTENSIONS, TooSmall, Unreadable, center_crop, decode, decode_gray
from d2it.data.sources import find_images, read_image
from d2it.diffusion import random_grain_map
from d2it.errors import UserError
from d2it.npz import load_array
from d2it.sampling.pipeline import D2iT
from d2it.seeds import derived_seed

MapsOf = Callable[[range], Tensor]


def choose_maps(options: argparse.Namespace, model: D2iT) -> tuple[MapsOf | None, str]:
    """The function from image numbers to grain maps, None for the Dynamic Grain Transformer; and the maps' description.

    Raises:
        UserError: a file that is no map for this model, or no photo, or a ratio outside 0 ... 1.
    """
    budget = options.budget is not None
    if options.grain_map:
        path, grid = options.grain_map, model.region_grid
        read = read_weights(path, grid) if budget else read_grain_maps(path, grid, model.num_grains)
        return lambda indices: torch.stack([read[i % len(read)] for i in indices]), str(options.grain_map)
    if options.photo and options.photo.is_dir():
        listed = find_images(options.photo)
        listed.report(str(options.photo))
        photos = [options.photo / file for file in listed.files]
        if not photos:
            raise UserError(f"{options.photo}: no images ({', '.join(EXTENSIONS)}) below this folder")
        photo_coding(photos[0], model)

        def in_turn(indices: range) -> Tensor:
            return torch.stack([photo_coding(photos[i % len(photos)], model)[budget] for i in indices])

        return in_turn, f"{options.photo}, {len(photos)} photos in turn"
    if options.photo:
        found = photo_coding(options.photo, model)[budget]
        return lambda indices: found.expand(len(indices), -1, -1), str(options.photo)
    if options.fine_ratio is not None:
        if budget:
            raise UserError("--budget and --fine-ratio both say how fine the maps are: give one of them")
        ratios = options.fine_ratio
        if len(ratios) not in (1, model.num_grains - 1):
            several = f" or {model.num_grains - 1}" if model.num_grains > 2 else ""
            raise UserError(f"--fine-ratio must be 1{several} shares for {model.num_grains} grains, got {len(ratios)}")
        for ratio in ratios:
            if not 0 <= ratio <= 1:
                raise UserError(f"--fine-ratio must be in 0 ... 1, got {ratio}")
        if ratios != sorted(ratios, reverse=True):
            raise UserError(f"--fine-ratio must descend: shares of each grain or finer, got {ratios}")
        ratio = ratios[0] if len(ratios) == 1 else ratios

        def random(indices: range) -> Tensor:
            seeds = [derived_seed(options.seed + i, "random map") for i in indices]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return random_grain_map(model.region_grid, ratio, model.num_grains, generator=generators)

        return random, f"random, fine ratio {' '.join(map(str, ratios))}"
    if model.grain_transformer is None:
        return None, "finest everywhere"
    return None, "Dynamic Grain Transformer"


def read_grain_maps(path: Path, grid: tuple[int, int], num_grains: int) -> Tensor:
    """(N, h, w) int64 from a .npy or .npz of (h, w) or (N, h, w) grains, or from a gray PNG of (h, w).

    A PNG's levels are the grains from black (0, the coarsest) to white (the finest), evenly spaced; a pixel may be off
    by a quarter of a level. One whose values are all below `num_grains` holds the grains themselves.

    Raises:
        UserError: no such file, no map in it, one of another size than `grid`, or with more grains.
    """
    values, white = _read_values(path, grid, "iub", "whole numbers")
    if path.suffix.lower() == ".png" and values.max() >= max(num_grains, 16):  # levels below 16 all look black
        step = white / max(1, num_grains - 1)
        grains = np.rint(values / step).astype(np.int64)
        off = np.abs(values - grains * step) > step / 4
        if off.any():
            row, column = (int(i[0]) for i in np.nonzero(off))
            levels = ", ".join(f"{i * step:.0f}" for i in range(num_grains))
            raise UserError(
                f"{path}: gray {values[row, column]} in row {row}, column {column} is none of the levels {levels} of "
                f"{num_grains} grains"
            )
    else:
        grains = values.astype(np.int64)
    if grains.min() < 0 or grains.max() >= num_grains:
        raise UserError(f"{path}: grains must be in 0 ... {num_grains - 1}, got {grains.min()} ... {grains.max()}")
    return torch.from_numpy(grains.reshape(-1, *grid))


def read_weights(path: Path, grid: tuple[int, int]) -> Tensor:
    """(N, h, w) float64 from the files of `read_grain_maps`, with any gray levels or real numbers.

    Raises:
        UserError: no such file, no numbers in it, or of another size than `grid`.
    """
    values, _ = _read_values(path, grid, "iubf", "numbers")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: a grain map is finite numbers")
    return torch.from_numpy(values.astype(np.float64).reshape(-1, *grid))


def _read_values(path: Path, grid: tuple[int, int], kinds: str, named: str) -> tuple[np.ndarray, int]:
    """The numbers (h, w) or (N, h, w) in a file, of NumPy's `kinds`, and the level of white in a PNG."""
    white = 255
    try:
        if path.suffix.lower() == ".png":
            values, white = decode_gray(read_image(path))
        else:
            values = load_array(path, "grain_maps")
    except (UserError, Unreadable) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: not a grain map (.npy, .npz or .png): {reason}") from None
    if values.ndim not in (2, 3) or values.dtype.kind not in kinds or not len(values):
        raise UserError(f"{path}: a grain map is {named} (h, w) or (N, h, w), got {values.dtype} {values.shape}")
    if values.shape[-2:] != grid:
        got = f"{values.shape[-2]} x {values.shape[-1]}"
        raise UserError(f"{path}: this model's grain maps have {grid[0]} x {grid[1]} regions, got {got}")
    return values, white


def photo_coding(path: Path, model: D2iT) -> tuple[Tensor, Tensor]:
    """Dynamic Grained Coding of the centre of an image, cut to the model's size: grain map and entropy, both (h, w).

    Raises:
        UserError: no image there, or one smaller than the model's.
    """
    size = model.image_size
    try:
        image = center_crop(decode(read_image(path)), size)
    except (OSError, Unreadable) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except TooSmall as error:
        width, height = error.args
        raise UserError(f"{path}: {width} x {height} pixels, the model's images have {size[1]} x {size[0]}") from None
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(model.device)
    grains, entropy = model.vae.grain_map(pixels)
    return grains[0].cpu(), entropy[0].cpu()
