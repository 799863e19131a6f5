"""FID, sFID, Inception Score, precision and recall as ADM's evaluator defines them; kernel distance and accuracy."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist
from torch import Tensor


class GaussianStatistics:
    """Mean and covariance of features, streamed in float64.

    Sums are kept relative to the first batch's mean, so that the covariance loses no digits to a large mean.

    Args:
        dimensions: of the features.
        device: where the sums are.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.dimensions = dimensions
        self.count = 0
        self._origin: Tensor | None = None
        self._sum = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self._outer = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Adds a batch (B, dimensions)."""
        x = features.to(self._sum)
        if self._origin is None:
            self._origin = x.mean(dim=0)
        x = x - self._origin
        self.count += x.shape[0]
        self._sum += x.sum(dim=0)
        self._outer += x.T @ x

    def gaussian(self) -> Gaussian:
        """The mean and the unbiased covariance of what was added, on every rank where ranks share the work.

        Raises:
            ValueError: fewer than two samples.
        """
        origin = torch.zeros_like(self._sum) if self._origin is None else self._origin
        shift = self._sum / max(self.count, 1)
        count, mean = _over_ranks(torch.tensor(self.count, device=shift.device)), self.count * (origin + shift)
        if count < 2:
            raise ValueError(f"statistics need at least 2 samples, got {int(count)}")
        mean = _over_ranks(mean) / count
        # What this rank's scatter is about its own mean, and its mean about the common one (Chan et al. 1979).
        apart = origin + shift - mean
        scatter = self._outer + self.count * (torch.outer(apart, apart) - torch.outer(shift, shift))
        return Gaussian(mean, _over_ranks(scatter) / (count - 1))


def _over_ranks(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The normal distribution that the Frechet distance compares.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
    """

    mean: Tensor
    covariance: Tensor

    def frechet_distance(self, other: Gaussian) -> float:
        """|mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al. 2017, Eq. 6).

        The trace of the root is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), a symmetric
        matrix: real, and never negative but for rounding. C^(1/2) is kept for the next distance from this one.
        """
        product = self._root @ other.covariance @ self._root
        overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        distance = (self.mean - other.mean).square().sum()
        return float(distance + self.covariance.trace() + other.covariance.trace() - 2 * overlap)

    @functools.cached_property
    def _root(self) -> Tensor:
        """C^(1/2), symmetric."""
        try:
            values, vectors = torch.linalg.eigh(self.covariance)
        except torch.linalg.LinAlgError:
            # LAPACK's divide and conquer may not converge where most eigenvalues are zero, as with fewer samples than
            # features; of such a matrix the singular value decomposition is the same.
            vectors, values, _ = torch.linalg.svd(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def inception_score(probabilities: Tensor, split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))), the mean over splits (Salimans et al. 2016; ADM's splits of 5,000).

    Args:
        probabilities: (N, classes), rows that sum to 1.
        split_size: samples to a split.
    """
    scores = []
    for part in probabilities.double().split(split_size):
        marginal = part.mean(dim=0, keepdim=True)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


#: The k of precision and recall, as in ADM.
NEIGHBOURS = 3


def precision_recall(
    reference: Tensor, samples: Tensor, *, k: int = NEIGHBOURS, block: int = 2048
) -> tuple[float, float]:
    """The share of samples inside the reference's manifold, and of the reference inside the samples'.

    A manifold is the union of balls around its points that reach to the k-th nearest other point (Kynkaanniemi et al.
    2019, Eqs. 1-3).

    Args:
        reference, samples: (N, D), (M, D); both more than `k` points.
        block: rows of the distance matrix held at a time.

    Returns:
        (precision, recall), each in [0, 1].
    """
    for name, points in (("reference", reference), ("samples", samples)):
        if points.shape[0] <= k:
            raise ValueError(f"{name} must have more than k={k} points, got {points.shape[0]}")
    reference_radii = _radii(reference, k, block)
    sample_radii = _radii(samples, k, block)
    covered_samples = _inside(samples, reference, reference_radii, block)
    covered_reference = _inside(reference, samples, sample_radii, block)
    return float(covered_samples.double().mean()), float(covered_reference.double().mean())


#: Fewer points of either set give no kernel distance: it takes ten subsets of two.
KERNEL_POINTS = 20


def kernel_distance(
    reference: Tensor, samples: Tensor, *, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, times 1,000.

    Of Inception's features it is KID (Binkowski et al. 2018). Both sets are shuffled and cut into disjoint subsets, so
    the estimates are independent and their standard error is that of the mean. Each is unbiased: it can be negative.

    Args:
        reference: (N, D).
        samples: (M, D); both at least `KERNEL_POINTS` points.
        subset_size: points of a subset at most; there are at least ten subsets.
        seed: of the order.

    Returns:
        (mean, standard error) over the subsets.
    """
    for name, points in (("reference", reference), ("samples", samples)):
        if points.shape[0] < KERNEL_POINTS:
            raise ValueError(f"{name} must have at least {KERNEL_POINTS} points, got {points.shape[0]}")
    smaller = min(reference.shape[0], samples.shape[0])
    size = min(subset_size, smaller // 10)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for points in (reference, samples):
        order = torch.randperm(points.shape[0], generator=generator)[: smaller // size * size]
        parts.append(points[order.to(points.device)].double().split(size))
    found = torch.stack([_discrepancy(x, y) for x, y in zip(*parts)]) * 1000
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = x.shape[0]
    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return within - 2 * kernel(x, y).mean()


def nearest_mean_accuracy(reference: Tensor, reference_labels: Tensor, samples: Tensor, labels: Tensor) -> float:
    """The share of samples whose nearest class mean of the reference is that of their own class.

    Args:
        reference: (N, D).
        reference_labels: (N,) integers.
        samples: (M, D).
        labels: (M,) integers, each of them a class of the reference.
    """
    classes, number = reference_labels.unique(return_inverse=True)
    if not torch.isin(labels, classes).all():
        absent = int(labels[~torch.isin(labels, classes)][0])
        raise ValueError(f"the reference has no images of class {absent}")
    sums = torch.zeros(len(classes), reference.shape[1], dtype=torch.float64, device=reference.device)
    means = sums.index_add_(0, number, reference.double()) / number.bincount(minlength=len(classes))[:, None]
    nearest = torch.cat([_distances(rows, means).argmin(dim=1) for rows in samples.split(2048)])
    return float((classes[nearest] == labels).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.float(), b.float(), compute_mode="use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int, block: int) -> Tensor:
    # The point itself, at distance 0, is the first of the k + 1 nearest.
    return torch.cat([_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)])


def _inside(points: Tensor, centers: Tensor, radii: Tensor, block: int) -> Tensor:
    return torch.cat([(_distances(rows, centers) <= radii).any(dim=1) for rows in points.split(block)])
