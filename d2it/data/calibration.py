"""Which entropy separates the grains: percentiles of region entropies, with all that gives them meaning.

A threshold holds for one value range, bin count, sigma, region size, normalisation and image size, and for images like
those it was taken from. So a :class:`Calibration` keeps all of that beside the percentiles, and hands the operator its
arguments (:attr:`Calibration.kde`) together with the thresholds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import d2it
from d2it.data.loader import Batch, SinglePass
from d2it.data.sources import ImageSource
from d2it.errors import UserError
from d2it.files import atomic_write
from d2it.ops import kde_entropy

FORMAT = "d2it entropy calibration"
VERSION = 1
# Percentiles are kept at every 0.1 %: between two of them a ratio is off by less than 0.1 %.
QUANTILES = 1001
# Cells of the histogram: 5.3e-6 nats wide for 256 bins, below the rounding of float32 entropies (7e-6).
CELLS = 2**20


def _most(num_bins: int, normalize: bool) -> float:
    """Return the most that an entropy can be: the least is 0."""
    return math.log(num_bins) if normalize else num_bins / math.e


def check_ratios(ratios: float | Sequence[float]) -> list[float]:
    """Return fine ratios as a list, or raise UserError unless they lie in [0, 1] and descend."""
    shares = [float(r) for r in (ratios if isinstance(ratios, Sequence) else [ratios])]
    if not shares or not all(0 <= r <= 1 for r in shares):
        raise UserError(f"fine ratios must lie in [0, 1], got {shares}")
    if any(coarse <= fine for coarse, fine in itertools.pairwise(shares)):
        raise UserError(f"fine ratios are shares of each grain or finer, so they must descend, got {shares}")
    return shares


class EntropySketch:
    """Quantiles of any number of entropies in 8 MiB: a histogram fine enough to be taken for the values.

    Every quantile is exact to one cell, ``self.width`` nats. The cells cover all that an entropy can be: [0, ln bins],
    or [0, bins / e] for the literal density, which is not normalised (each bin adds -p ln p <= 1 / e).
    """

    def __init__(self, num_bins: int, normalize: bool = True) -> None:
        self.width = _most(num_bins, normalize) / CELLS
        self.counts = np.zeros(CELLS, np.int64)

    def add(self, entropy: torch.Tensor) -> None:
        """Count entropies (any shape, nats, on the host)."""
        cells = (entropy.double().flatten() / self.width).long().clamp_(0, CELLS - 1)
        self.counts += torch.bincount(cells, minlength=CELLS).numpy()

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Return for each share in [0, 1] the entropy that this share of all regions does not exceed."""
        above = np.cumsum(self.counts)
        rank = np.clip(np.ceil(shares * above[-1]), 1, above[-1])
        return (np.searchsorted(above, rank) + 0.5) * self.width


@dataclass(frozen=True)
class Calibration:
    """Percentiles of region entropies and what they were computed from; a JSON file.

    Attributes:
        entropies: QUANTILES values, nats: entry i is what i / (QUANTILES - 1) of the regions do not exceed.
        region_size, num_bins, value_range, sigma, normalize: the arguments of :func:`d2it.ops.kde_entropy`.
        image_size: (H, W) in pixels to which the images were cut.
        images, regions, skipped: how many were counted, and how many images could not be read.
        source: the images, in words.
        resolution: nats within which each entry is exact.
        made_with: d2it's version.
    """

    entropies: tuple[float, ...]
    region_size: int
    num_bins: int
    value_range: tuple[float, float]
    sigma: float
    normalize: bool
    image_size: tuple[int, int]
    images: int
    regions: int
    skipped: int
    source: str
    resolution: float
    made_with: str

    def thresholds(self, ratios: float | Sequence[float]) -> list[float]:
        """Return the k-1 ascending thresholds at which regions fall into k grains.

        Args:
            ratios: k-1 shares of regions, coarse to fine: entry i is the share of grain i + 1 *or finer*, so they
                descend. 0.5 or [0.5] makes half of all regions fine; [0.7, 0.3] makes 30 % of three grains coarse,
                40 % medium and 30 % fine. 0 puts the threshold above every entropy there can be, 1 below.

        Raises:
            UserError: a ratio outside [0, 1], ratios that do not descend, or two whose thresholds coincide.
        """
        shares = check_ratios(ratios)
        known = np.linspace(0, 1, len(self.entropies))
        limits: list[float] = []
        for share in shares:
            if share == 0:
                limits.append(_most(self.num_bins, self.normalize) + 1)
            elif share == 1:
                limits.append(-1.0)
            else:
                limits.append(float(np.interp(1 - share, known, self.entropies)))
        if any(low >= high for low, high in itertools.pairwise(limits)):
            raise UserError(
                f"fine ratios {shares}: their thresholds coincide, {limits}; these images cannot tell them apart"
            )
        return limits

    @property
    def kde(self) -> dict[str, Any]:
        """The keyword arguments that :func:`d2it.ops.encode_grains` needs for these thresholds to mean anything."""
        return {
            "region_size": self.region_size,
            "num_bins": self.num_bins,
            "value_range": self.value_range,
            "sigma": self.sigma,
            "normalize": self.normalize,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, whole or not at all."""
        fields = dataclasses.asdict(self)
        entropies = fields.pop("entropies")
        lines = [", ".join(f"{e:.6f}" for e in entropies[i : i + 10]) for i in range(0, len(entropies), 10)]
        head = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1)
        text = head[:-2] + ',\n "entropies": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(text)
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Calibration:
        """Read a calibration; without a path, the one that is shipped (1,000 ImageNet photos at 256 x 256).

        Raises:
            UserError: not there, or not a calibration.
        """
        path = Path(__file__).with_name("calibration_256.json") if path is None else Path(path)
        try:
            fields = json.loads(path.read_bytes())
            if fields.pop("format") != FORMAT or fields.pop("version") != VERSION:
                raise UserError(f"{path} is not a {FORMAT} of version {VERSION}")
            for key in ("value_range", "image_size", "entropies"):
                fields[key] = tuple(fields[key])
            loaded = cls(**fields)
            values = np.array(loaded.entropies, np.float64)
            if values.shape != (QUANTILES,) or not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise ValueError("entropies do not ascend")
            return loaded
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a readable calibration: {error}") from None


def calibrate(
    source: ImageSource,
    *,
    region_size: int = 16,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    description: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Compute the entropy of every region of every image, once, in memory that does not grow with the source.

    On the CPU the loader's workers do it beside the decoding; a GPU is given the pixels.

    Args:
        source: images whose size ``region_size`` divides.
        region_size, num_bins, value_range, sigma, normalize: as for :func:`d2it.ops.kde_entropy`.
        description: provenance to store instead of the source's own.
        progress: called with the number of images after each batch.

    Raises:
        UserError: the region size does not divide the image size, or the source cannot be read.
    """
    height, width = source.image_size
    if height % region_size or width % region_size:
        raise UserError(f"region_size={region_size} does not divide the image size {height} x {width}")
    bins = region_size**2 if num_bins is None else num_bins
    kde = {"num_bins": bins, "value_range": value_range, "sigma": sigma, "normalize": normalize}
    measure = _Entropies(region_size, kde, torch.device(device))
    in_worker = measure.device.type == "cpu"
    sketch = EntropySketch(bins, normalize)
    images = skipped = 0
    with SinglePass(
        source, batch_size, workers=workers, process=measure if in_worker else None, pin_memory=not in_worker
    ) as stream:
        for batch in stream:
            found = batch if in_worker else measure(batch)
            sketch.add(found["entropy"])
            images += len(found["entropy"])
            skipped += len(batch["unreadable"])
            if progress is not None:
                progress(len(found["entropy"]))
    if not images:
        raise UserError(f"{source.description}: no image could be read")
    return Calibration(
        entropies=tuple(float(q) for q in sketch.quantiles(np.linspace(0, 1, QUANTILES))),
        region_size=region_size,
        num_bins=bins,
        value_range=(float(value_range[0]), float(value_range[1])),
        sigma=float(sigma),
        normalize=normalize,
        image_size=source.image_size,
        images=images,
        regions=sketch.total,
        skipped=skipped,
        source=description or source.description,
        resolution=float(f"{sketch.width:.2g}"),
        made_with=d2it.__version__,
    )


class _Entropies:
    """A batch of images in, its entropies out: {"entropy": float32 (B, h, w) on the host, "unreadable"}."""

    def __init__(self, region_size: int, kde: dict[str, Any], device: torch.device) -> None:
        self.region_size, self.kde, self.device = region_size, kde, device

    def __call__(self, batch: Batch) -> Batch:
        images = batch["image"].to(self.device, non_blocking=True)
        entropy = kde_entropy(images, self.region_size, **self.kde)
        return {"entropy": entropy.cpu(), "unreadable": batch["unreadable"]}
