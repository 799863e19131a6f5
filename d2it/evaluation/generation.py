"""Samples against a reference: Frechet and kernel distance, sFID, Inception Score, precision, recall, accuracy."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d2it.distributed import gathered
from d2it.errors import UserError, user_error
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import Features
from d2it.evaluation.metrics import (
    KERNEL_POINTS,
    NEIGHBOURS,
    Gaussian,
    GaussianStatistics,
    inception_score,
    kernel_distance,
    nearest_mean_accuracy,
    precision_recall,
)
from d2it.npz import NpzReader, save_arrays

# Of Inception, and of any other network.
METRICS = ("fid", "sfid", "is", "precision", "recall")
OTHER_METRICS = ("fd", "kd", "precision", "recall")
ALL_METRICS = ("fid", "sfid", "is", "fd", "kd", "precision", "recall", "accuracy", "top1")
_OF_FEATURES = {"kd", "precision", "recall", "accuracy"}
_OF_PROBABILITIES = {"is", "top1"}
_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "labels", "count", "size", "extractor")


class Extractor(Protocol):
    """A network from images (B, 3, H, W) uint8 to `Features`; its `name`, where it has one, keeps networks apart."""

    def __call__(self, images: Tensor) -> Features:
        """Returns the features of one batch."""


def default_metrics(extractor: Extractor) -> tuple[str, ...]:
    """Returns what is computed where nothing is asked for."""
    return METRICS if getattr(extractor, "name", "inception") == "inception" else OTHER_METRICS


def check_metrics(metrics: Sequence[str], extractor: Extractor | None = None) -> None:
    """Raises UserError over metrics that do not exist, or that another network than Inception cannot have."""
    unknown = [name for name in metrics if name not in ALL_METRICS]
    if unknown or not metrics:
        named = f"unknown metric {unknown[0]!r}" if unknown else "none named"
        raise UserError(f"{named}; known are {', '.join(ALL_METRICS)}")
    network = getattr(extractor, "name", "")
    if network and network != "inception":
        for name, other in (("fid", ": its Frechet distance is fd"), ("sfid", ""), ("is", "")):
            if name in metrics:
                raise UserError(f"{name} is a metric of Inception and not of {network}{other}")
    if network == "inception" and "top1" in metrics:
        raise UserError("top1 needs a network with ImageNet's classes in their usual order, which Inception has not")


@dataclasses.dataclass
class Summary:
    """What the metrics need of one set of images.

    Args:
        count: images.
        size: (H, W) in pixels, or None where it is not known.
        pool: mean and covariance of the pooled features.
        spatial: of the spatial features, for sFID, or None.
        probabilities: (N, classes), for the Inception Score and top1, or None.
        features: (N, D), for kernel distance, precision, recall and accuracy, or None.
        labels: (N,) int64 in the order of the features, or None.
        extractor: name of the network, or "".
    """

    count: int
    size: tuple[int, int] | None
    pool: Gaussian
    spatial: Gaussian | None
    probabilities: Tensor | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    extractor: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `mu`, `sigma`, `mu_s`, `sigma_s`, the names of ADM's reference statistics, with all else there is."""
        arrays: dict[str, Any] = {"mu": self.pool.mean.cpu().numpy(), "sigma": self.pool.covariance.cpu().numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.cpu().numpy(), "sigma_s": self.spatial.covariance.cpu().numpy()}
        for name in ("count", "size", "features", "labels", "extractor"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                arrays[name] = value.cpu().numpy()
            elif value:
                arrays[name] = np.array(value)
        save_arrays(path, arrays)


@torch.inference_mode()
def summarize(
    batches: Iterable[Tensor],
    extractor: Extractor,
    *,
    metrics: Sequence[str] = METRICS,
    device: torch.device | str = "cpu",
    labels: Iterable[Tensor] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Summary:
    """Runs the extractor over this rank's batches and joins what the ranks found.

    Args:
        batches: uint8 (B, 3, H, W), one size throughout.
        extractor: gives `Features`; moved to the device by the caller.
        metrics: some of `ALL_METRICS`; what none of them needs is not kept.
        device: where the extractor runs.
        labels: int64 (B,) a batch, or None.
        total: images to come, for the progress bar.
        progress: whether to show it.
    """
    wanted = set(metrics)
    pool = spatial = None
    size: tuple[int, int] | None = None
    probabilities: list[Tensor] = []
    kept: list[Tensor] = []
    numbers: list[Tensor] = []
    numbered = None if labels is None else iter(labels)
    with tqdm(total=total, unit="img", disable=not progress) as bar:
        for images in batches:
            size = (images.shape[2], images.shape[3])
            features = extractor(images.to(device))
            if pool is None:
                pool = GaussianStatistics(features.pool.shape[1], device)
                if "sfid" in wanted and features.spatial is not None:
                    spatial = GaussianStatistics(features.spatial.shape[1], device)
            pool.update(features.pool)
            if spatial is not None and features.spatial is not None:
                spatial.update(features.spatial)
            if wanted & _OF_PROBABILITIES and features.probabilities is not None:
                probabilities.append(features.probabilities.cpu())
            if wanted & _OF_FEATURES:
                kept.append(features.pool.cpu())
            if numbered is not None:
                numbers.append(next(numbered))
            bar.update(images.shape[0])
    widths = (pool.dimensions, spatial.dimensions if spatial else 0) if pool else None
    found = [item for item in gathered((size, widths)) if item[1]]
    if not found:
        raise UserError("no images to evaluate")
    size, widths = found[0]
    if pool is None and widths:  # a rank without images joins the others' sums with zeros
        pool = GaussianStatistics(widths[0], device)
        spatial = GaussianStatistics(widths[1], device) if widths[1] else None
    assert pool is not None
    count = sum(gathered(pool.count))
    if count < 2:
        raise UserError(f"statistics need at least 2 images, got {count}")
    return Summary(
        count,
        size,
        pool.gaussian(),
        spatial.gaussian() if spatial else None,
        probabilities=_rows_of_ranks(probabilities),
        features=_rows_of_ranks(kept),
        labels=_rows_of_ranks(numbers),
        extractor=getattr(extractor, "name", ""),
    )


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
    """Opens a reference: statistics (`mu`, `sigma`, for sFID `mu_s`, `sigma_s`), or a folder or `.npz` of images.

    ADM's reference batches hold both; then the images serve the metrics of features and the statistics the rest.

    Args:
        path: of the reference.
        extractor: as for `summarize`.
        metrics: as for `summarize`.
        device: as for `summarize`.
        batch_size: images at once.
        progress: as for `summarize`.
        share: takes this rank's part of the batches.

    Returns:
        What the metrics need of it.

    Raises:
        UserError: neither is there, it is damaged, or a metric needs what is not in it.
    """

    def measured(wanted: Sequence[str]) -> Summary:
        images = open_images(path)
        labels = None
        if "accuracy" in wanted:
            if images.labels is None:
                raise UserError(f"{path}: accuracy needs labels, class folders or arr_1")
            labels = share(iter(torch.from_numpy(images.labels).split(batch_size)))
        batches, total = share(images.batches(batch_size)), images.count
        return summarize(
            batches, extractor, metrics=wanted, device=device, labels=labels, total=total, progress=progress
        )

    if os.path.isfile(path) and os.fspath(path).endswith(".npz"):
        with NpzReader(path) as archive:
            names = set(archive.names)
            stored = {name: archive.array(name) for name in archive.names if name in _ARRAYS}
        if {"mu", "sigma"} <= names:
            if "extractor" in stored and (name := str(stored["extractor"])) != getattr(extractor, "name", name):
                raise UserError(f"{path}: statistics of {name}, the extractor is {extractor.name}")  # type: ignore[attr-defined]
            return _stored(path, stored, metrics, device, measured if "arr_0" in names else None)
    return measured(metrics)


def _stored(
    path: str | os.PathLike[str],
    stored: dict[str, np.ndarray],
    metrics: Sequence[str],
    device: torch.device | str,
    measured: Callable[[Sequence[str]], Summary] | None,
) -> Summary:
    """Returns the statistics of a file; what they lack comes from its images, which `measured` summarizes."""

    def gaussian(mean: str, covariance: str) -> Gaussian:
        mu, sigma = (torch.from_numpy(_real(path, stored, name)).double() for name in (mean, covariance))
        if mu.ndim != 1 or sigma.shape != (mu.shape[0], mu.shape[0]):
            raise UserError(f"{path}: {mean} {tuple(mu.shape)} and {covariance} {tuple(sigma.shape)} do not fit")
        largest = sigma.abs().max()
        if (sigma - sigma.T).abs().max() > 1e-4 * largest or torch.linalg.eigvalsh(sigma)[0] < -1e-4 * largest:
            raise UserError(f"{path}: {covariance} is no covariance: not symmetric with eigenvalues of at least 0")
        return Gaussian(mu.to(device), sigma.to(device))

    if "sfid" in metrics and not {"mu_s", "sigma_s"} <= stored.keys():
        raise UserError(f"{path}: no mu_s and sigma_s, which sFID needs; leave sfid out of the metrics")
    pool = gaussian("mu", "sigma")
    features = labels = size = None
    wanted = [name for name in metrics if name in _OF_FEATURES]
    if "features" in stored:
        features = torch.from_numpy(_real(path, stored, "features"))
        if features.ndim != 2 or features.shape[1] != pool.mean.shape[0]:
            raise UserError(f"{path}: features {tuple(features.shape)} do not fit mu {tuple(pool.mean.shape)}")
        if "labels" in stored:
            if stored["labels"].dtype.kind not in "iu" or stored["labels"].shape != features.shape[:1]:
                raise UserError(f"{path}: labels must be {len(features)} whole numbers, got {stored['labels'].dtype}")
            labels = torch.from_numpy(stored["labels"].astype(np.int64))
        elif "accuracy" in metrics:
            raise UserError(f"{path}: features without labels, which accuracy needs")
    elif wanted:
        if measured is None:
            needs = ", ".join(wanted)
            raise UserError(f"{path}: statistics alone, and images or features are needed for {needs}")
        found = measured(wanted)
        features, labels, size = found.features, found.labels, found.size
    elif measured is not None:
        size = open_images(path).size
    if "size" in stored:
        height, width = _whole(path, stored, "size", (2,))
        size = (height, width)
    return Summary(
        count=_whole(path, stored, "count", ())[0] if "count" in stored else 0,
        size=size,
        pool=pool,
        spatial=gaussian("mu_s", "sigma_s") if "sfid" in metrics else None,
        features=features,
        labels=labels,
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
    """Raises UserError where both resolutions are known and differ."""
    if samples and reference and tuple(samples) != tuple(reference):
        raise UserError(
            f"samples of {samples[0]} x {samples[1]} pixels cannot be compared with a reference of "
            f"{reference[0]} x {reference[1]}"
        )


def compare(samples: Summary, reference: Summary, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns the metrics of `samples` against `reference`.

    `fid` is the Frechet distance of Inception's features, `fd` that of any network's; `kd` comes with `kd_error`, its
    standard error.

    Raises:
        UserError: an unknown metric, or sets of different resolution, of different features, or too small.
    """
    check_metrics(metrics)
    check_sizes(samples.size, reference.size)
    if samples.pool.mean.shape != reference.pool.mean.shape:
        raise UserError(
            f"the reference has {reference.pool.mean.shape[0]} features, the extractor {samples.pool.mean.shape[0]}"
        )
    for names, least in (({"precision", "recall"}, NEIGHBOURS + 1), ({"kd"}, KERNEL_POINTS)):
        asked = ", ".join(sorted(names & set(metrics)))
        for which, summary in (("samples", samples), ("reference", reference)):
            if asked and summary.features is not None and summary.features.shape[0] < least:
                raise UserError(f"{asked}: the {which} must be more than {least - 1}, got {summary.features.shape[0]}")
    found: dict[str, float] = {}
    for name in ("fid", "fd"):
        if name in metrics:
            found[name] = reference.pool.frechet_distance(samples.pool)
    if "sfid" in metrics and samples.spatial and reference.spatial:
        found["sfid"] = reference.spatial.frechet_distance(samples.spatial)
    if "is" in metrics and samples.probabilities is not None:
        found["is"] = inception_score(samples.probabilities)
    if samples.features is not None and reference.features is not None:
        device = samples.pool.mean.device
        theirs, ours = reference.features.to(device), samples.features.to(device)
        if "kd" in metrics:
            found["kd"], found["kd_error"] = kernel_distance(theirs, ours)
        if {"precision", "recall"} & set(metrics):
            both = dict(zip(("precision", "recall"), precision_recall(theirs, ours)))
            found |= {name: value for name, value in both.items() if name in metrics}
        if "accuracy" in metrics:
            numbers = [_need_labels(summary, "accuracy").to(device) for summary in (reference, samples)]
            with user_error("accuracy"):
                found["accuracy"] = nearest_mean_accuracy(theirs, numbers[0], ours, numbers[1])
    if "top1" in metrics:
        labels = _need_labels(samples, "top1")
        if samples.probabilities is None or samples.probabilities.shape[1] != 1000:
            raise UserError("top1 needs a network with a head of ImageNet's 1000 classes")
        if labels.max() >= 1000:
            raise UserError(f"top1 needs ImageNet's labels, got {int(labels.max())}")
        found["top1"] = float((samples.probabilities.argmax(dim=1) == labels).double().mean())
    return found


def _need_labels(summary: Summary, metric: str) -> Tensor:
    if summary.labels is None:
        raise UserError(f"{metric} needs labels: class folders, arr_1, or a conditional checkpoint")
    return summary.labels


def spread(reports: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the mean and the standard deviation of each metric over at least two sets of samples."""
    values = {name: np.array([report[name] for report in reports]) for name in reports[0]}
    return (
        {name: float(value.mean()) for name, value in values.items()},
        {name: float(value.std(ddof=1)) for name, value in values.items()},
    )


def _rows_of_ranks(parts: list[Tensor]) -> Tensor | None:
    rows = [part for mine in gathered(parts) for part in mine]
    return torch.cat(rows) if rows else None
