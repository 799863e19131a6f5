"""Noise and loss weights per latent code: what "multi-grained" means on the finest grid.

A code of grain g fills a square of `code_sizes[g]` x `code_sizes[g]` cells, coarsest grain first: (2, 1) for the
paper's factors {8, 16}. The first is a whole region.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2it import ops

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int], generator: Generators = None, *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Standard normal (B, ...) from one generator, or from one for each sample: then a sample's draw does not depend on
    the batch it is in. Generators live on `device` or on the CPU (the draw is copied)."""
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator must be one for each of the {shape[0]} samples, got {len(generator)}")
    if not shape[0]:
        return torch.empty(tuple(shape), device=device, dtype=dtype)
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(rows).to(device)


def copy_codes(x: Tensor, grain_map: Tensor, code_sizes: Sequence[int]) -> Tensor:
    """Every cell takes the value of the first cell of its code: (B, C, Hf, Wf), independent noise becomes grained."""
    return ops.neighbor_copy([x[:, :, ::size, ::size] for size in code_sizes], grain_map)


def grained_noise(
    grain_map: Tensor,
    channels: int,
    *,
    code_sizes: Sequence[int] = (2, 1),
    generator: Generators = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One standard normal draw for each latent code, neighbour-copied onto the finest grid.

    Args:
        grain_map: (B, H/S, W/S) int64.
        generator: one, or one for each sample.

    Returns:
        (B, channels, Hf, Wf) on the device of `grain_map`.
    """
    batch, height, width = grain_map.shape
    shape = (batch, channels, height * code_sizes[0], width * code_sizes[0])
    return copy_codes(randn(shape, generator, device=grain_map.device, dtype=dtype), grain_map, code_sizes)


def project_to_grains(x: Tensor, grain_map: Tensor, *, code_sizes: Sequence[int] = (2, 1)) -> Tensor:
    """(B, C, Hf, Wf) -> the same shape: every cell takes the mean over its code, one value a code."""
    return ops.neighbor_copy([x if size == 1 else F.avg_pool2d(x, size) for size in code_sizes], grain_map)


def grain_weights(grain_map: Tensor, *, code_sizes: Sequence[int] = (2, 1)) -> Tensor:
    """alpha of every cell's grain, (B, 1, Hf, Wf) float32: 1 / (cells of a code), so that every code counts once.

    Eq. 11's 1 / (2^(k-i))^2 where the factors double from grain to grain.
    """
    # Not a lookup: a table would be copied from the host in every step, which waits for the device.
    alphas = torch.full_like(grain_map, 1 / code_sizes[0] ** 2, dtype=torch.float32)
    for grain, size in enumerate(code_sizes[1:], start=1):
        alphas = torch.where(grain_map == grain, 1 / size**2, alphas)
    return expand_map(alphas, code_sizes[0])[:, None]


def expand_map(grain_map: Tensor, cells_per_region: int) -> Tensor:
    """(B, h, w, ...) -> (B, Hf, Wf, ...), every region's values on each of its cells."""
    b, h, w, *rest = grain_map.shape
    n = cells_per_region
    return grain_map[:, :, None, :, None].expand(b, h, n, w, n, *rest).reshape(b, h * n, w * n, *rest)


def random_grain_map(
    region_grid: Sequence[int],
    fine_ratio: float | Sequence[float],
    num_grains: int = 2,
    *,
    generator: Sequence[torch.Generator],
) -> Tensor:
    """(B, h, w) int64: maps with given shares of every grain, at random places.

    Args:
        fine_ratio: k - 1 shares of the regions, rounded to whole ones: entry i is the share of grain i + 1 or finer, so
            they descend. One number is the share of the finest grain, beside which all is coarsest.
        generator: one for each map, on the CPU.

    Raises:
        ValueError: shares outside 0 ... 1, that ascend, or of another number.
    """
    height, width = region_grid
    shares = list(fine_ratio) if isinstance(fine_ratio, Sequence) else [fine_ratio] * (num_grains - 1)
    descend = all(0 <= share <= 1 for share in shares) and shares == sorted(shares, reverse=True)
    if len(shares) != num_grains - 1 or not descend:
        raise ValueError(f"fine_ratio must be {num_grains - 1} descending shares in 0 ... 1, got {fine_ratio}")
    ranks = torch.stack([torch.randperm(height * width, generator=g) for g in generator])
    grains = torch.zeros_like(ranks)
    for share in shares:
        grains += ranks < round(share * height * width)
    return grains.unflatten(1, (height, width))


def ranked_grains(values: Tensor, shares: Sequence[float], *, generator: Sequence[torch.Generator]) -> Tensor:
    """(B, h, w) int64: the regions of the highest values are the finest, exactly in given shares of each map.

    Args:
        values: (B, h, w), of any real dtype, on the CPU: an entropy, or the gray levels of a drawing.
        shares: k - 1 shares of the regions, rounded to whole ones: entry i is the share of grain i + 1 or finer.
        generator: one for each map, on the CPU: it orders the regions of equal value.

    Example:
        >>> values = torch.tensor([[[0.1, 0.9], [0.4, 0.6]]])
        >>> ranked_grains(values, [0.75, 0.25], generator=[torch.Generator()])
        tensor([[[0, 2],
                 [1, 1]]])
    """
    grains = torch.zeros_like(values, dtype=torch.int64).flatten(1)
    for one, value, g in zip(grains, values.flatten(1), generator):
        order = torch.randperm(len(one), generator=g)
        order = order[value[order].argsort(stable=True, descending=True)]
        for share in shares:
            one[order[: round(share * len(one))]] += 1
    return grains.view(values.shape)


def level_grains(
    levels: Tensor, num_levels: int, shares: Sequence[float], *, generator: Sequence[torch.Generator]
) -> Tensor:
    """(B, h, w) int64: grain maps at given shares of all regions, from quantile levels of their entropy.

    A region of level l is anywhere in the quantiles l / L ... (l + 1) / L of all entropies: its own is drawn there, and
    the shares are thresholds of it. So they hold on average over maps whose levels are as frequent as each other, a map
    of much detail is finer than another, and with one generator a larger share makes no region coarser.

    Args:
        levels: (B, h, w) int64 in 0 ... L - 1, on the CPU.
        num_levels: L.
        shares: k - 1 shares of all regions: entry i is the share of grain i + 1 or finer, so they descend.
        generator: one for each map, on the CPU.

    Example:
        >>> levels = torch.tensor([[[0, 1], [2, 3]]])
        >>> level_grains(levels, 4, [0.75, 0.5], generator=[torch.Generator()])
        tensor([[[0, 1],
                 [2, 2]]])
    """
    within = [torch.rand(levels.shape[1:], generator=g, dtype=torch.float64) for g in generator]
    quantiles = (levels + torch.stack(within)) / num_levels if within else levels.double()
    grains = torch.zeros_like(levels)
    for share in shares:
        grains += quantiles >= 1 - share
    return grains


def grains_to_signal(grain_map: Tensor, num_grains: int) -> Tensor:
    """(B, h, w) int64 -> (B, 1, h, w) float32: k grains, or levels of entropy, evenly spaced over [-1, 1]."""
    return grain_map[:, None].float() * (2 / (num_grains - 1)) - 1


def expected_signal(logits: Tensor) -> Tensor:
    """(B, k, h, w) grain logits -> (B, 1, h, w): the mean of the clean signal under them, float32."""
    levels = torch.linspace(-1, 1, logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    return (logits.float().softmax(dim=1) * levels).sum(dim=1, keepdim=True)
