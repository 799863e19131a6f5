"""Samples against a reference: FID, sFID, Inception Score, precision and recall."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from d2it.errors import UserError
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import Features
from d2it.evaluation.metrics import NEIGHBOURS, Gaussian, GaussianStatistics, inception_score, precision_recall
from d2it.npz import NpzReader, save_arrays

METRICS = ("fid", "sfid", "is", "precision", "recall")
_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "count", "size")


class Extractor(Protocol):
    """Images (B, 3, H, W) uint8 -> `Features`."""

    def __call__(self, images: Tensor) -> Features:
        """The features of one batch."""


@dataclasses.dataclass
class Summary:
    """What the metrics need of one set of images.

    Args:
        count: N images.
        size: (height, width) in pixels.
        pool: of the pooled features (FID).
        spatial: of the spatial features (sFID).
        probabilities: (N, classes), for the Inception Score.
        features: (N, 2048), for precision and recall.
    """

    count: int
    size: tuple[int, int] | None
    pool: Gaussian
    spatial: Gaussian | None
    probabilities: Tensor | None = None
    features: Tensor | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `mu`, `sigma`, `mu_s`, `sigma_s`, the names of ADM's reference statistics, with count and size."""
        arrays: dict[str, Any] = {"mu": self.pool.mean.cpu().numpy(), "sigma": self.pool.covariance.cpu().numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.cpu().numpy(), "sigma_s": self.spatial.covariance.cpu().numpy()}
        arrays["count"] = np.array(self.count)
        if self.size is not None:
            arrays["size"] = np.array(self.size)
        if self.features is not None:
            arrays["features"] = self.features.cpu().numpy()
        save_arrays(path, arrays)


@torch.inference_mode()
def summarize(
    batches: Iterable[Tensor],
    extractor: Extractor,
    *,
    metrics: Sequence[str] = METRICS,
    device: torch.device | str = "cpu",
    total: int | None = None,
    progress: bool = False,
) -> Summary:
    """Runs the extractor over this rank's batches and joins what the ranks found.

    Args:
        batches: uint8 (B, 3, H, W), one size throughout.
        extractor: gives `Features`; moved to the device by the caller.
        metrics: some of `METRICS`; what none of them needs is not kept.
        device: where the extractor runs.
        total: images to come, for the progress bar.
        progress: whether to show it.
    """
    pool = spatial = None
    size: tuple[int, int] | None = None
    probabilities: list[Tensor] = []
    kept: list[Tensor] = []
    with tqdm(total=total, unit="img", disable=not progress) as bar:
        for images in batches:
            size = (images.shape[2], images.shape[3])
            features = extractor(images.to(device))
            if pool is None:
                pool = GaussianStatistics(features.pool.shape[1], device)
                spatial = GaussianStatistics(features.spatial.shape[1], device) if "sfid" in metrics else None
            pool.update(features.pool)
            if spatial is not None:
                spatial.update(features.spatial)
            if "is" in metrics:
                probabilities.append(features.probabilities.cpu())
            if "precision" in metrics or "recall" in metrics:
                kept.append(features.pool.cpu())
            bar.update(images.shape[0])
    widths = (pool.dimensions, spatial.dimensions if spatial else 0) if pool else None
    told = [w for w in _of_ranks((size, widths)) if w[1]]
    if not told:
        raise UserError("no images to judge")
    size, widths = told[0]
    if pool is None and widths:  # a rank without images joins the others' sums with zeros
        pool = GaussianStatistics(widths[0], device)
        spatial = GaussianStatistics(widths[1], device) if widths[1] else None
    assert pool is not None
    joined = _rows_of_ranks(probabilities) if "is" in metrics else None
    features_all = _rows_of_ranks(kept) if "precision" in metrics or "recall" in metrics else None
    count = sum(_of_ranks(pool.count))
    if count < 2:
        raise UserError(f"statistics need at least 2 images, got {count}")
    return Summary(count, size, pool.gaussian(), spatial.gaussian() if spatial else None, joined, features_all)


def open_reference(
    path: str | os.PathLike[str],
    extractor: Extractor,
    *,
    metrics: Sequence[str] = METRICS,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: bool = False,
    share: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter,
) -> Summary:
    """Reference statistics (`mu`, `sigma`, and for sFID `mu_s`, `sigma_s`), or a folder or `.npz` of images.

    ADM's reference batches hold both; then the images serve precision and recall and the statistics the rest.

    Args:
        path: of the reference.
        extractor, metrics, device, progress: as for `summarize`.
        batch_size: images at once.
        share: takes this rank's part of the batches.

    Raises:
        UserError: neither is there, or a metric needs what is not in it.
    """
    if os.path.isfile(path) and os.fspath(path).endswith(".npz"):
        with NpzReader(path) as archive:
            names = set(archive.names)
            wanted = [name for name in archive.names if name in _ARRAYS]
            stored = {name: archive.array(name) for name in wanted}
        if {"mu", "sigma"} <= names:
            return _stored(path, stored, "arr_0" in names, extractor, metrics, device, batch_size, progress, share)
    images = open_images(path)
    batches = share(images.batches(batch_size))
    return summarize(batches, extractor, metrics=metrics, device=device, total=images.count, progress=progress)


def _stored(
    path: str | os.PathLike[str],
    stored: dict[str, np.ndarray],
    has_images: bool,
    extractor: Extractor,
    metrics: Sequence[str],
    device: torch.device | str,
    batch_size: int,
    progress: bool,
    share: Callable[[Iterator[Tensor]], Iterator[Tensor]],
) -> Summary:
    def gaussian(mean: str, covariance: str) -> Gaussian:
        mu, sigma = (torch.from_numpy(_real(path, stored, name)).double() for name in (mean, covariance))
        if mu.ndim != 1 or sigma.shape != (mu.shape[0], mu.shape[0]):
            raise UserError(f"{path}: {mean} {tuple(mu.shape)} and {covariance} {tuple(sigma.shape)} do not fit")
        largest = sigma.abs().max() if len(mu) else torch.tensor(0.0)
        if (sigma - sigma.T).abs().max() > 1e-4 * largest or torch.linalg.eigvalsh(sigma)[0] < -1e-4 * largest:
            raise UserError(f"{path}: {covariance} is no covariance: not symmetric with eigenvalues of at least 0")
        return Gaussian(mu.to(device), sigma.to(device))

    if "sfid" in metrics and not {"mu_s", "sigma_s"} <= stored.keys():
        raise UserError(f"{path}: no mu_s and sigma_s, which sFID needs; leave sfid out of the metrics")
    features, size = None, open_images(path).size if has_images else None
    if "features" in stored:
        features = torch.from_numpy(_real(path, stored, "features"))
        if features.ndim != 2 or features.shape[1] != stored["mu"].shape[0]:
            raise UserError(f"{path}: features {tuple(features.shape)} do not fit mu {stored['mu'].shape}")
    elif "precision" in metrics or "recall" in metrics:
        if not has_images:
            raise UserError(f"{path}: statistics alone, but precision and recall need images or features")
        images = open_images(path)
        batches = share(images.batches(batch_size))
        wanted = ("precision", "recall")
        told = summarize(batches, extractor, metrics=wanted, device=device, total=images.count, progress=progress)
        features = told.features
    if "size" in stored:
        height, width = _whole(path, stored, "size", (2,))
        size = (height, width)
    return Summary(
        count=_whole(path, stored, "count", ())[0] if "count" in stored else 0,
        size=size,
        pool=gaussian("mu", "sigma"),
        spatial=gaussian("mu_s", "sigma_s") if "sfid" in metrics else None,
        features=features,
    )


def _real(path: str | os.PathLike[str], stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = stored[name]
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: {name} must be numbers, got {array.dtype}")
    if not array.size or not np.isfinite(array).all():
        raise UserError(f"{path}: {name} must be finite numbers, got {array.dtype} {array.shape} with others or none")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _whole(path: str | os.PathLike[str], stored: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> list[int]:
    array = stored[name]
    if array.dtype.kind not in "iu" or array.shape != shape or array.min() < 1:
        raise UserError(f"{path}: {name} must be positive whole numbers of shape {shape}, got {array!r:.60}")
    return [int(value) for value in array.ravel()]


def check_sizes(samples: tuple[int, int] | None, reference: tuple[int, int] | None) -> None:
    """UserError where both resolutions are known and differ."""
    if samples and reference and tuple(samples) != tuple(reference):
        raise UserError(
            f"samples of {samples[0]} x {samples[1]} pixels cannot be held against a reference of "
            f"{reference[0]} x {reference[1]}"
        )


def compare(samples: Summary, reference: Summary, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The metrics of `samples` against `reference`.

    Raises:
        UserError: an unknown metric, or sets of different resolution or features.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    check_sizes(samples.size, reference.size)
    if samples.pool.mean.shape != reference.pool.mean.shape:
        raise UserError(
            f"the reference has {reference.pool.mean.shape[0]} features, the extractor {samples.pool.mean.shape[0]}"
        )
    asked = {"precision", "recall"} & set(metrics)
    if asked:
        for name, features in (("samples", samples.features), ("reference", reference.features)):
            if features is not None and features.shape[0] <= NEIGHBOURS:
                raise UserError(
                    f"{', '.join(sorted(asked))}: the {name} must be more than {NEIGHBOURS}, got {features.shape[0]}"
                )
    found: dict[str, float] = {}
    if "fid" in metrics:
        found["fid"] = samples.pool.frechet_distance(reference.pool)
    if "sfid" in metrics and samples.spatial and reference.spatial:
        found["sfid"] = samples.spatial.frechet_distance(reference.spatial)
    if "is" in metrics and samples.probabilities is not None:
        found["is"] = inception_score(samples.probabilities)
    if samples.features is not None and reference.features is not None and asked:
        device = samples.pool.mean.device
        precision, recall = precision_recall(reference.features.to(device), samples.features.to(device))
        found |= {k: v for k, v in (("precision", precision), ("recall", recall)) if k in metrics}
    return found


def _of_ranks(item: Any) -> list[Any]:
    """`item` of every rank, in their order."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def _rows_of_ranks(parts: list[Tensor]) -> Tensor:
    return torch.cat([rows for mine in _of_ranks(parts) for rows in mine])
