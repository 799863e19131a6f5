"""Which entropy separates the grains: percentiles of region entropies, with all that gives them meaning.

A threshold holds for one value range, bin count, sigma, region size, normalisation and image size, and for images like
those it was taken from. So a `Calibration` keeps all of that beside the percentiles, and hands the operator its
arguments (`Calibration.kde`) together with the thresholds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
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
from d2it.files import read_json, write_text
from d2it.ops import kde_entropy

logger = logging.getLogger("d2it.data")

FORMAT = "d2it entropy calibration"
VERSION = 1
# Percentiles are kept at every 0.1 %: between two of them a ratio is off by less than 0.1 %.
QUANTILES = 1001
# Cells of the histogram: 5.3e-6 nats wide for 256 bins, below the rounding of float32 entropies (7e-6).
CELLS = 2**20
# A share that differs from the one asked for by more than this is a warning.
TOLERATED = 0.02
# Nats between a threshold and the tied entropies at the end of the range that it must not fall on.
_MARGIN = 1e-3


def _most(num_bins: int, normalize: bool) -> float:
    """Returns the largest value that an entropy can have; the least is 0.

    It is ln bins, or bins / e for the literal density, which is not normalised (each bin adds -p ln p <= 1 / e).
    """
    return math.log(num_bins) if normalize else num_bins / math.e


def check_ratios(ratios: float | Sequence[float]) -> list[float]:
    """Returns fine ratios as a list, or raises UserError unless they lie in [0, 1] and descend."""
    shares = [float(r) for r in (ratios if isinstance(ratios, Sequence) else [ratios])]
    if not shares or not all(0 <= r <= 1 for r in shares):
        raise UserError(f"fine ratios must lie in [0, 1], got {shares}")
    if any(coarse <= fine for coarse, fine in itertools.pairwise(shares)):
        raise UserError(f"fine ratios are shares of each grain or finer, so they must descend, got {shares}")
    return shares


class EntropySketch:
    """Quantiles of any number of entropies in 8 MiB: a histogram fine enough to be taken for the values.

    Every quantile is exact to one cell, `self.width` nats.

    Args:
        most: the largest entropy that will be counted; the cells cover [0, most].
    """

    def __init__(self, most: float) -> None:
        self.width = most / CELLS
        self.counts = np.zeros(CELLS, np.int64)

    def add(self, entropy: torch.Tensor) -> None:
        """Counts entropies (any shape, nats, on the host)."""
        cells = (entropy.double().flatten() / self.width).long().clamp_(0, CELLS - 1)
        self.counts += torch.bincount(cells, minlength=CELLS).numpy()

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Returns for each share in [0, 1] the entropy that this share of all regions does not exceed."""
        above = np.cumsum(self.counts)
        rank = np.clip(np.ceil(shares * above[-1]), 1, above[-1])
        return (np.searchsorted(above, rank) + 0.5) * self.width


def threshold_of(known: np.ndarray, share: float, resolution: float, most: float) -> float:
    """Returns the threshold that a share of regions nearest to `share` exceeds.

    Args:
        known: quantiles at even steps from 0 to 1, nats, ascending.
        share: 0 gives a threshold above every entropy, 1 one below.
        resolution: nats within which each quantile is exact.
        most: no entropy is larger.
    """
    if share == 0:
        return most + 1
    if share == 1:
        return -1.0
    place = (1 - share) * (len(known) - 1)
    low, high = known[math.floor(place)], known[math.ceil(place)]
    near = 2 * resolution
    # All entries that cannot be distinguished from the one asked for; without any, the place lies between two values.
    first = int(np.searchsorted(known, low - near))
    last = int(np.searchsorted(known, high + near, side="right")) - 1
    if high - low > near or first == last:
        return float(np.interp(place, np.arange(len(known)), known))
    # The tied regions go to one side together: into the middle of the gap at the nearer end.
    if place - first < last - place:
        below = known[first - 1] if first else known[0] - 2 * _MARGIN
        return float((below + known[first]) / 2)
    above = known[last + 1] if last + 1 < len(known) else known[-1] + 2 * _MARGIN
    return float((known[last] + above) / 2)


def shares_above(known: np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Returns the share of regions that exceeds each threshold, from quantiles at even steps."""
    found = []
    for threshold in thresholds:
        count = int(np.searchsorted(known, threshold, side="right"))
        if count in (0, len(known)):
            found.append(1.0 if count == 0 else 0.0)
            continue
        low, high = known[count - 1], known[count]
        found.append(float(1 - (count - 1 + (threshold - low) / (high - low)) / (len(known) - 1)))
    return found


@dataclass(frozen=True)
class Calibration:
    """Percentiles of region entropies and what they were computed from; a JSON file.

    Attributes:
        entropies: QUANTILES values, nats: entry i is what i / (QUANTILES - 1) of the regions do not exceed.
        region_size: pixels, and like the next four an argument of `d2it.ops.kde_entropy`.
        num_bins: at which the density is taken.
        value_range: of the pixels.
        sigma: of the kernel, in units of the range.
        normalize: whether the density sums to 1.
        image_size: (H, W) in pixels to which the images were cut.
        images: that were counted.
        regions: that were counted.
        skipped: images that could not be read.
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
        """Returns the k-1 ascending thresholds at which regions fall into k grains.

        Entropies that many regions share (those of white margins, say) fall on one side of a threshold together: on
        the side that gives the nearer share. A share that ends more than 2 % from its ratio is a warning.

        Args:
            ratios: k-1 shares of regions, coarse to fine: entry i is the share of grain i + 1 *or finer*, so they
                descend. 0.5 or [0.5] makes half of all regions fine; [0.7, 0.3] makes 30 % of three grains coarse,
                40 % medium and 30 % fine. 0 puts the threshold above every entropy there can be, 1 below.

        Raises:
            UserError: a ratio outside [0, 1], ratios that do not descend, or two whose thresholds coincide.
        """
        asked = check_ratios(ratios)
        limits = self.quantiles(asked)
        if any(low >= high for low, high in itertools.pairwise(limits)):
            raise UserError(
                f"fine ratios {asked}: their thresholds coincide, {limits}; the entropies of these images are too alike"
            )
        for share, got in zip(asked, self.shares(limits)):
            if abs(got - share) > TOLERATED:
                logger.warning(
                    "calibration of %s: a fine ratio of %.1f %% was asked for, %.1f %% is the nearest there is: many "
                    "regions have one entropy",
                    self.source,
                    100 * share,
                    100 * got,
                )
        return limits

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Returns for each share the entropy, nats, that this share of the calibrated regions exceeds."""
        known, most = np.array(self.entropies), _most(self.num_bins, self.normalize)
        return [threshold_of(known, share, self.resolution, most) for share in shares]

    def shares(self, thresholds: Sequence[float]) -> list[float]:
        """Returns the share of the calibrated regions that exceeds each threshold, to 0.1 %."""
        return shares_above(np.array(self.entropies), thresholds)

    def require(self, **facts: Any) -> None:
        """Raises UserError unless the calibration was made with these facts (`region_size`, `image_size`, ...)."""
        for key, value in facts.items():
            ours = getattr(self, key)
            if ours != (tuple(value) if isinstance(value, list) else value):
                raise UserError(
                    f"the calibration of {self.source} was made with {key}={ours}, asked for is {value}: make one with "
                    "python -m d2it.data.calibrate"
                )

    @property
    def kde(self) -> dict[str, Any]:
        """The keyword arguments that `d2it.ops.encode_grains` needs for these thresholds to mean anything."""
        return {
            "region_size": self.region_size,
            "num_bins": self.num_bins,
            "value_range": self.value_range,
            "sigma": self.sigma,
            "normalize": self.normalize,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, whole or not at all."""
        fields = dataclasses.asdict(self)
        entropies = fields.pop("entropies")
        lines = [", ".join(f"{e:.6f}" for e in entropies[i : i + 10]) for i in range(0, len(entropies), 10)]
        head = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1)
        text = head[:-2] + ',\n "entropies": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        try:
            write_text(path, text)
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, *, region_size: int = 16) -> Calibration:
        """Reads a calibration; without a path, one of those shipped (1,000 ImageNet photos at 256 x 256).

        Args:
            path: of the file.
            region_size: which of those shipped: that of regions of 32 pixels, or for any other size that of 16.

        Raises:
            UserError: not there, or not a calibration.
        """
        shipped = "calibration_256_32.json" if region_size == 32 else "calibration_256.json"
        path = Path(__file__).with_name(shipped) if path is None else Path(path)
        fields = read_json(path)
        if fields.pop("format", None) != FORMAT or fields.pop("version", None) != VERSION:
            raise UserError(f"{path} is not a {FORMAT} of version {VERSION}")
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        if fields.keys() != kinds.keys():
            named = ", ".join(sorted(fields.keys() ^ kinds.keys()))
            raise UserError(f"{path} is not a readable calibration: missing or unknown: {named}")
        for key, kind in kinds.items():
            try:
                fields[key] = _typed(fields[key], str(kind))
            except ValueError as error:
                raise UserError(f"{path} is not a readable calibration: {key} {error}") from None
        loaded = cls(**fields)
        if len(loaded.entropies) != QUANTILES or any(a > b for a, b in itertools.pairwise(loaded.entropies)):
            raise UserError(f"{path} is not a readable calibration: entropies must be {QUANTILES} ascending numbers")
        for key in ("region_size", "num_bins", "sigma", "images", "regions", "resolution"):
            if getattr(loaded, key) <= 0:
                raise UserError(f"{path} is not a readable calibration: {key} must be positive")
        return loaded


def _typed(value: Any, kind: str) -> Any:
    """Returns a JSON value as the field type that `kind` names; raises ValueError where it is another."""
    if kind.startswith("tuple["):
        inner = kind[len("tuple[") : -1].split(", ")
        if not isinstance(value, list) or (inner[-1] != "..." and len(value) != len(inner)):
            raise ValueError(f"must be a list, got {value!r:.60}")
        return tuple(_typed(item, inner[0]) for item in value)
    types: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"must be of type {kind}, got {value!r:.60}")
    if kind == "float":
        if not -1e30 < value < 1e30:
            raise ValueError(f"must be finite, got {value!r:.60}")
        return float(value)
    return value


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
    """Computes the entropy of every region of every image, once, in memory that does not grow with the source.

    On the CPU the loader's workers do it beside the decoding; a GPU is given the pixels.

    Args:
        source: images whose size `region_size` divides.
        region_size: pixels, and like the next four an argument of `d2it.ops.kde_entropy`.
        num_bins: at which the density is taken; None: region_size squared.
        value_range: of the pixels.
        sigma: of the kernel.
        normalize: whether the density sums to 1.
        device: where the entropies are computed.
        batch_size: images at once.
        workers: decoding processes.
        description: provenance to store instead of the source's own.
        progress: called with the number of images after each batch.

    Raises:
        UserError: the region size does not divide the image size, or the source cannot be read.
    """
    height, width = source.image_size
    if height % region_size or width % region_size:
        raise UserError(f"region_size={region_size} does not divide the image size {height} x {width}")
    bins = region_size**2 if num_bins is None else num_bins
    density = {"num_bins": bins, "value_range": value_range, "sigma": sigma, "normalize": normalize}
    measure = functools.partial(_entropies, device=device, kde={"region_size": region_size, **density})
    in_worker = torch.device(device).type == "cpu"
    sketch = EntropySketch(_most(bins, normalize))
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


def _entropies(batch: Batch, device: torch.device | str, kde: dict[str, Any]) -> Batch:
    """A batch of images in, its entropies out: {"entropy": float32 (B, h, w) on the host, "unreadable"}."""
    entropy = kde_entropy(batch["image"].to(device, non_blocking=True), **kde)
    return {"entropy": entropy.cpu(), "unreadable": batch["unreadable"]}
