"""Pictures of samples: the images under their names, their grain maps as outlines, the way from noise to an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2it import pictures
from d2it.sampling.pipeline import D2iT, Label


def sample_sheets(
    d2it: D2iT, images: np.ndarray, grain_maps: np.ndarray, labels: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The samples under the names of their classes, and the same with their grain maps as outlines.

    Args:
        d2it: the model that they are of.
        images: (N, H, W, 3) uint8.
        grain_maps: (N, H/S, W/S) integers.
        labels: N numbers of classes, or None without classes.

    Returns:
        Two pictures (rows, columns, 3) uint8 of one size.
    """
    across = min(8, max(1, round(len(images) ** 0.5))) if len(images) < 16 else 8
    names = [] if labels is None else [class_name(d2it, label) for label in labels]
    large = pictures.magnify(images, across)
    drawn = pictures.outline_grains(large, grain_maps, d2it.num_grains)
    plain, outlined = (pictures.sheet(tiles, columns=across, captions=names) for tiles in (large, drawn))
    return plain, outlined


def denoising_sheet(d2it: D2iT, labels: Sequence[Label] | None, *, seed: int = 0, columns: int = 8) -> np.ndarray:
    """A row for each image, from noise to the end: the state decoded after some steps, evenly spread.

    Args:
        d2it: the model; its own sampler is used.
        labels: one a row, or None without classes: one row.
        seed: of the first row; row i has seed + i.
        columns: states of a row.

    Returns:
        A picture (rows, columns, 3) uint8.
    """
    rows, names, steps = [], [], 0
    for i, label in enumerate(labels or [None]):
        states: list[Tensor] = []

        def keep(number: int, timestep: float, state: Tensor, states: list[Tensor] = states) -> None:
            states.append(state.clone())

        samples = d2it(labels=None if label is None else [label], seed=seed + i, callback=keep)
        steps = len(states)
        chosen = [round((j + 1) * steps / columns) - 1 for j in range(columns)] if steps > columns else range(steps)
        latents = torch.cat([states[j] for j in chosen]) / d2it.vae.scaling_factor
        with torch.no_grad():
            grains = samples.grain_maps.to(d2it.device).expand(len(latents), -1, -1)
            rows.append(pictures.to_pictures(d2it.vae.decode(latents, grains)))
        names.append("" if label is None else class_name(d2it, d2it.class_numbers([label])[0]))
    heads = [f"step {j + 1}" for j in chosen[:-1]] + [f"step {steps}, the end"]
    return pictures.sheet(pictures.magnify(np.concatenate(rows), len(heads)), columns=heads, rows=names)


def class_name(d2it: D2iT, label: int) -> str:
    """The name of a class, its number where it has none."""
    return d2it.class_names[label] if d2it.class_names else f"class {label}"
