"""Dynamic Grained Coding (paper 3.1): the entropy of every region, and its grain."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.kernels.common import GRAY_WEIGHTS, RANGE_SLACK
from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator

# How far the gray of a color may leave the range: the weights do not add up to 1, which shows far from 0. Further out
# the density is too small for the fused backends' number formats.
_FARTHEST = 3.0  # sigma

MOST_BINS = 2**16
LEAST_SIGMA = 2.0**-63  # its square is a normal float32

_FAST_DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


def kde_entropy(
    images: Tensor,
    region_size: int = 16,
    *,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Entropy of the Gaussian kernel density of gray levels in every S x S region (paper Eqs. 2-3).

    gray = 0.2989 R + 0.5870 G + 0.1140 B; the kernel mean over a region's pixels is taken at `num_bins` evenly spaced
    levels of `value_range`, both ends included, normalised to sum 1 over them, and H = -sum p ln p with 0 ln 0 = 0.

    Args:
        images: (B, 1 or 3, H, W), H and W multiples of `region_size`. Floating point inside `value_range` (by more than
            1e-5 of its width outside, or not finite, is an error), or uint8, whose 0..255 spans the range.
        region_size: S, pixels.
        num_bins: levels, at most 65536; S * S where None, the paper's P.
        value_range: (low, high) of the pixel values.
        sigma: the kernel's width, in the unit of the values.
        normalize: False gives Eqs. 2-3 to the letter, with the density not normalised over the levels.
        backend: "reference", "cpu", "triton", "cuda", or None to choose: a fused one for S in 4..64 and 16 to 512
            levels (on CPU 4096) at most 24 sigma apart (see `why_not`), else the reference, which is slower by two
            orders of magnitude.

    Returns:
        (B, H/S, W/S) float32 (float64 for float64 images), nats. The gradient of `images` is computed in plain
        PyTorch on every backend.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a value leaves the range. On a GPU an assertion
            inside the kernel checks the values, raised at the next synchronisation (CUDA_LAUNCH_BLOCKING=1: at the
            call).

    Example:
        >>> images = torch.zeros(1, 3, 32, 32)  # black on the left ...
        >>> images[..., 16:] = torch.linspace(-1, 1, 16)  # ... a ramp on the right
        >>> [round(h, 2) for h in ops.kde_entropy(images, region_size=16)[0, 0].tolist()]
        [1.66, 4.38]
    """
    density = _density(images, region_size, num_bins, value_range, sigma, normalize)
    name = choose("kde_entropy", backend, images, region_size, **density)
    if name == "reference":
        check_values(images, *value_range)
        return reference.kde_entropy(images, region_size, **density)
    return _call_kde_entropy(images, region_size, density["num_bins"], *value_range, sigma, normalize, name)


def encode_grains(
    images: Tensor,
    thresholds: Tensor | Sequence[float],
    region_size: int = 16,
    *,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`kde_entropy` and `grain_map` in one pass over the pixels.

    Args:
        images, region_size, num_bins, value_range, sigma, normalize, backend: as for `kde_entropy`.
        thresholds: k-1 ascending entropies in nats, a sequence or a 1-d tensor (on the device of `images`: no copy).

    Returns:
        (grain map (B, H/S, W/S) int64, entropy (B, H/S, W/S) float32).

    Raises:
        TypeError, ValueError: as `kde_entropy` and `grain_map`.

    Example:
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> images[..., 16:] = torch.linspace(-1, 1, 16)
        >>> grains, entropy = ops.encode_grains(images, thresholds=[2.0])
        >>> grains.tolist()
        [[[0, 1], [0, 1]]]
    """
    density = _density(images, region_size, num_bins, value_range, sigma, normalize)
    limits = _thresholds(thresholds, images.device, torch.float64 if images.dtype == torch.float64 else torch.float32)
    name = choose("encode_grains", backend, images, limits, region_size, **density)
    if name == "reference":
        check_values(images, *value_range)
        return reference.encode_grains(images, limits, region_size, **density)
    return _call_encode_grains(images, limits, region_size, density["num_bins"], *value_range, sigma, normalize, name)


def grain_map(entropy: Tensor, thresholds: Tensor | Sequence[float], *, backend: str | None = None) -> Tensor:
    """The grain of every region: the number of thresholds that its entropy exceeds (paper 3.1).

    Args:
        entropy: floating point, any shape, nats.
        thresholds: k-1 ascending entropies, a sequence or a 1-d tensor.
        backend: "reference" or None; a comparison has no faster form than PyTorch's own.

    Returns:
        int64, the shape of `entropy`, 0 = coarsest.

    Raises:
        TypeError: `entropy` is not a floating-point tensor.
        ValueError: `thresholds` is not 1-d, or not strictly ascending (a CUDA tensor of thresholds is not checked: to
            read it would synchronise).

    Example:
        >>> ops.grain_map(torch.tensor([0.5, 2.0, 3.5]), thresholds=[2.0, 3.0])
        tensor([0, 0, 2])
    """
    _check.tensor("entropy", entropy, ndim=None, dtypes=_check.FLOATS)
    limits = _thresholds(thresholds, entropy.device, entropy.dtype)
    choose("grain_map", backend, entropy, limits)
    return reference.grain_map(entropy, limits)


def _thresholds(thresholds: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(thresholds, Tensor):
        _check.tensor("thresholds", thresholds, ndim=1, dtypes=_REALS)
        if "meta" in (thresholds.device.type, device.type) and thresholds.device != device:
            raise ValueError(f"thresholds must be on {device}, got {thresholds.device}")
        on_host = thresholds.device.type == "cpu" and not torch.compiler.is_compiling()
        listed = thresholds.tolist() if on_host and getattr(thresholds, "fake_mode", None) is None else []
    else:
        if not isinstance(thresholds, (list, tuple)):
            raise TypeError(f"thresholds must be a sequence of numbers or a 1-d tensor, got {_check.shown(thresholds)}")
        listed = list(thresholds)
        for threshold in listed:
            if isinstance(threshold, bool) or not isinstance(threshold, (float, int, torch.SymFloat, torch.SymInt)):
                raise TypeError(f"thresholds must be numbers, got {_check.shown(threshold)}")
            if isinstance(threshold, int) and abs(threshold) > _check.MOST_NUMBER:
                raise ValueError(f"thresholds must be numbers of float32, got {_check.shown(threshold)}")
    for threshold in listed:
        _check.require(threshold == threshold, "thresholds", "be numbers", threshold)  # NaN equals nothing
    for a, b in itertools.pairwise(listed):
        _check.require(a < b, "thresholds", "ascend", listed)
    return torch.as_tensor(thresholds, dtype=dtype, device=device)


_REALS = _check.FLOATS | _check.INTEGERS


def _density(
    images: Tensor,
    region_size: int,
    num_bins: int | None,
    value_range: tuple[float, float],
    sigma: float,
    normalize: bool,
) -> dict[str, Any]:
    """The arguments that describe the density, by name; raises unless all fit each other."""
    _check.tensor("images", images, ndim=4)
    if images.dtype not in (*_FAST_DTYPES, torch.float64):
        raise TypeError(f"images must be floating point or uint8, got {images.dtype}")
    _check.integer("region_size", region_size, low=1)
    _check.require(images.shape[1] in (1, 3), "images", "have 1 or 3 channels", f"shape {tuple(images.shape)}")
    _check.require(
        images.shape[2] % region_size == 0 and images.shape[3] % region_size == 0,
        "images",
        lambda: f"have a height and width that region_size={region_size} divides",
        f"shape {tuple(images.shape)}",
    )
    bins = region_size * region_size if num_bins is None else num_bins
    _check.integer("num_bins", bins, low=2)
    _check.require(bins <= MOST_BINS, "num_bins", f"be at most {MOST_BINS}", bins)
    if not isinstance(value_range, (tuple, list)) or len(value_range) != 2:
        raise TypeError(f"value_range must be (low, high), got {_check.shown(value_range)}")
    for value in value_range:
        _check.number("value_range", value, rule="be finite and ascend")
    _check.require(value_range[0] < value_range[1], "value_range", "be finite and ascend", value_range)
    _check.number(
        "sigma",
        sigma,
        low=LEAST_SIGMA,
        rule="be positive and finite",
        instead="divide the images and value_range by it, and pass sigma=1.0",
    )
    _check.flag("normalize", normalize)
    return {"num_bins": bins, "value_range": tuple(value_range), "sigma": sigma, "normalize": normalize}


def check_values(images: Tensor, low: float, high: float) -> None:
    """Raises unless every value is finite and inside the range, rounding aside."""
    if images.dtype == torch.uint8 or images.numel() == 0:
        return
    least, most = torch.aminmax(images.detach())  # NaN comes through
    slack = RANGE_SLACK * (high - low)
    ok = (least.double() >= low - slack) & (most.double() <= high + slack)
    _check.values(
        ok,
        "images must be finite and inside value_range",
        lambda: f"values from {float(least):g} to {float(most):g}",
        limits=lambda: f"=({low:g}, {high:g})",
    )


def fits_fast(
    images: Tensor,
    region_size: int = 16,
    *,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
    widest: float = 24.0,
    most_bins: int = 512,
) -> list[str]:
    """What the fused backends ask of a call. `widest`: how many sigma apart the bins may lie; `most_bins`: how many
    there may be."""
    bins = region_size * region_size if num_bins is None else num_bins
    reasons = []
    if images.dtype not in _FAST_DTYPES:
        reasons.append(f"images must be uint8, float32, float16 or bfloat16, not {images.dtype}")
    if not 4 <= region_size <= 64:
        reasons.append(f"region_size must be in 4..64, not {region_size}")
    if not 16 <= bins <= most_bins:
        reasons.append(f"num_bins must be in 16..{most_bins}, not {bins}")
    elif value_range[1] - value_range[0] > widest * sigma * (bins - 1):
        reasons.append(
            f"num_bins={bins} over value_range={value_range} lie more than {widest:g} sigma apart: between two of "
            "them the density is too small for its number format"
        )
    low, high = value_range
    outside = (1 - sum(GRAY_WEIGHTS)) * max(low, -high)
    if images.shape[1] == 3 and outside > _FARTHEST * sigma:
        reasons.append(
            f"value_range={value_range} lies so far from 0 that the gray of a color leaves it by {outside / sigma:.3g} "
            f"sigma, more than {_FARTHEST:g}"
        )
    return reasons


def _without_thresholds(fits: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda images, thresholds, *args, **kwargs: fits(images, *args, **kwargs)


# What differs: the CPU has the S * S bins of the largest regions, Triton halves of float16 in the place of float32.
_LIMITS: dict[str, dict[str, Any]] = {"cpu": {"most_bins": 4096}, "cuda": {}, "triton": {"widest": 10.0}}


def _native(images: Tensor, limits: Tensor | None, region_size: int, *density: Any) -> tuple[Tensor | None, Tensor]:
    """(grain map or None, entropy) from csrc, on the device of `images`; `density` as the schemas have it."""
    entropy = _empty(images, region_size)
    grains = None if limits is None else _empty(images, region_size, torch.int64)
    limits = None if limits is None else limits.contiguous()
    _, low, high, *_ = density
    slack = RANGE_SLACK * (high - low)
    if not torch.ops.d2it_C.kde_entropy(images, limits, region_size, *density, slack, entropy, grains):
        check_values(images, low, high)  # raises: the operator only reports that a value is outside
    return grains, entropy


def _native_entropy(images: Tensor, *args: Any) -> Tensor:
    return _native(images, None, *args)[1]


def _empty(images: Tensor, region_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unwritten (B, H/S, W/S)."""
    batch, _, height, width = images.shape
    return images.new_empty((batch, height // region_size, width // region_size), dtype=dtype)


def _composite(
    images: Tensor, region_size: int, num_bins: int, low: float, high: float, sigma: float, normalize: bool
) -> Tensor:
    return reference.kde_entropy(
        images, region_size, num_bins=num_bins, value_range=(low, high), sigma=sigma, normalize=normalize
    )


_DENSITY = "SymInt region_size, SymInt num_bins, float low, float high, float sigma, bool normalize, str backend"
_call_kde_entropy = operator(
    f"kde_entropy(Tensor images, {_DENSITY}) -> Tensor",
    fake=lambda images, region_size, *rest: _empty(images, region_size),
    check=lambda images, s, bins, low, high, *rest: check_values(images, low, high),
    composite=_composite,
)
_call_encode_grains = operator(
    f"encode_grains(Tensor images, Tensor thresholds, {_DENSITY}) -> (Tensor, Tensor)",
    fake=lambda images, limits, size, *rest: (_empty(images, size, torch.int64), _empty(images, size)),
    check=lambda images, limits, s, bins, low, high, *rest: check_values(images, low, high),
    composite=lambda images, limits, *rest: (None, _composite(images, *rest)),
)
for _op in ("kde_entropy", "encode_grains", "grain_map"):
    register_backend(_op, "reference")
for _backend, _limits in _LIMITS.items():
    _fits = functools.partial(fits_fast, **_limits)
    _csrc = None if _backend == "triton" else "kde_entropy"
    register_backend("kde_entropy", _backend, _fits, native=_csrc)
    register_backend("encode_grains", _backend, _without_thresholds(_fits), native=_csrc)
for _backend in ("cpu", "cuda"):
    implement("kde_entropy", _backend, _native_entropy, checks_values=_backend == "cpu")
    implement("encode_grains", _backend, _native, checks_values=_backend == "cpu")
for _op in ("kde_entropy", "encode_grains"):
    implement(_op, "triton", f"d2it.kernels.kde_entropy:{_op}")
