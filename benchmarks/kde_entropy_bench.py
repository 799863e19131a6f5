"""Entropy of every region against the eager formula of DQ-VAE, the same compiled, and the reference.

    python benchmarks/kde_entropy_bench.py [--only '*-bins32-*'] [--seconds 1]

Without a GPU everything runs on one core: that is what a worker of a data loader has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
import torch.nn.functional as F
from bench import Bench, Cost, Run, Skip, own
from torch import Tensor

from d2it import ops

REGION, SIGMA = 16, 0.01
MOST_TEMPORARIES = {"cuda": 100e9, "cpu": 4e9}  # bytes of the eager formula's, beyond which it is left out


def inputs(batch: int, side: int, channels: int, bins: int, low: float, dtype: torch.dtype, seed: int) -> Any:
    """Images (batch, channels, side, side) with smooth regions and textured ones, as photographs have."""
    rng = torch.Generator(machine.device()).manual_seed(seed)

    def noise(size: int) -> Tensor:
        return torch.randn(batch, channels, size, size, generator=rng, device=rng.device)

    smooth = F.interpolate(noise(side // 32), size=(side, side), mode="bilinear")
    texture = F.interpolate(noise(side // 64).abs(), size=(side, side), mode="bilinear") * 0.1
    unit = (0.5 + 0.25 * smooth + texture * noise(side)).clamp(0, 1)
    images = (unit * 255).round().to(dtype) if dtype == torch.uint8 else (low + unit * (1 - low)).to(dtype)
    return {"images": images, "region_size": REGION, "num_bins": bins, "value_range": (low, 1.0), "sigma": SIGMA}


def ours(given: dict[str, Any], backend: str) -> Tensor:
    return ops.kde_entropy(**given, backend=backend)


def gray_regions(images: Tensor, region_size: int, value_range: tuple[float, float]) -> Tensor:
    """The gray levels of every region, (R, S * S) float32."""
    low, high = value_range
    x = images.float()
    if images.dtype == torch.uint8:
        x = x * ((high - low) / 255) + low
    gray = 0.2989 * x[:, 0:1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:3] if images.shape[1] == 3 else x
    return F.unfold(gray, region_size, stride=region_size).transpose(1, 2).flatten(0, 1)


def formula(
    images: Tensor,
    region_size: int,
    num_bins: int,
    value_range: tuple[float, float],
    sigma: float,
    epsilon: float = 1e-40,
) -> Tensor:
    """DQ-VAE's (Huang et al., CVPR 2023): pixels x bins for the whole batch at once, an epsilon against 0 log 0."""
    batch, _, height, width = images.shape
    pixels = gray_regions(images, region_size, value_range)
    bins = torch.linspace(*value_range, num_bins, device=images.device)
    kernel = torch.exp(-0.5 * ((pixels[:, :, None] - bins) / sigma).pow(2))
    density = kernel.mean(dim=1)
    density = density / (density.sum(dim=1, keepdim=True) + epsilon) + epsilon
    entropy = -(density * density.log()).sum(dim=1)
    return entropy.reshape(batch, height // region_size, width // region_size)


def rival(function: Callable[..., Tensor], bytes_of_temporaries: float) -> Run:
    if bytes_of_temporaries > MOST_TEMPORARIES[machine.device()]:
        raise Skip(f"its temporaries take {bytes_of_temporaries / 1e9:.0f} GB")
    return lambda given: function(**given)


def kornia() -> Run:
    """`kornia.enhance.histogram`, which is a kernel density, and the entropy of what it returns."""
    if importlib.util.find_spec("kornia") is None:
        raise Skip("kornia is not installed")
    from kornia.enhance import histogram

    def run(given: dict[str, Any]) -> Tensor:
        images, region = given["images"], given["region_size"]
        pixels = gray_regions(images, region, given["value_range"])
        bins = torch.linspace(*given["value_range"], given["num_bins"], device=images.device)
        density = histogram(pixels, bins, torch.tensor(given["sigma"], device=images.device))
        entropy = torch.special.entr(density).sum(dim=1)
        return entropy.reshape(images.shape[0], images.shape[2] // region, images.shape[3] // region)

    return run


def patch_histogram(images: Tensor, region_size: int, value_range: tuple[float, float], **_: Any) -> Tensor:
    """The patch entropy of Adaptive Patch Transformers (Choudhury et al., 2025), in bits: a histogram of 512 bins made
    of one-hot vectors, and no kernel density."""
    low, high = value_range
    batch, _channels, height, width = images.shape
    pixels = (gray_regions(images, region_size, value_range) - low) * (255 / (high - low))
    levels = (pixels * 2.0).long().clamp(0, 511)
    one_hot = pixels.new_zeros(*pixels.shape, 512).scatter_(2, levels[:, :, None], 1.0)
    share = one_hot.sum(dim=1) / region_size**2
    entropy = -(share * torch.log2(share + 1e-10)).sum(dim=1)
    return entropy.reshape(batch, height // region_size, width // region_size)


def compiled_formula() -> Run:
    function = torch.compile(formula, fullgraph=True)
    # Compiled code may flush 1e-40, which is subnormal, and 0 log 0 is then NaN.
    return lambda given: function(**given, epsilon=1e-37)


def cases() -> Iterator[tuple[int, int, int, int, float, torch.dtype]]:
    """(batch, side, channels, bins, low, dtype)."""
    fp32, bf16, byte = torch.float32, torch.bfloat16, torch.uint8
    if machine.device() == "cpu":
        yield 1, 256, 3, 256, -1.0, fp32
        yield 4, 256, 3, 256, -1.0, fp32
        yield 1, 512, 3, 256, -1.0, fp32
        yield 4, 256, 3, 32, 0.0, fp32
        yield 1, 256, 3, 256, -1.0, byte
        yield 1, 256, 1, 256, 0.0, byte
        yield 1, 256, 3, 256, -1.0, bf16
        return
    for batch in (8, 256, 32, 1):
        yield batch, 256, 3, 256, -1.0, fp32
    for batch in (8, 256, 1):
        yield batch, 512, 3, 256, -1.0, fp32
    for batch in (8, 256):
        yield batch, 256, 3, 32, 0.0, fp32
        yield batch, 256, 3, 256, -1.0, bf16
        yield batch, 256, 3, 256, -1.0, byte
        yield batch, 256, 1, 256, 0.0, byte


def cost(batch: int, side: int, channels: int, dtype: torch.dtype) -> Cost:
    """Reads the pixels, writes an entropy a region."""
    pixels = batch * side**2
    return Cost(pixels * channels * dtype.itemsize + 4 * pixels // REGION**2)


def benches() -> Iterator[Bench]:
    for batch, side, channels, bins, low, dtype in cases():
        pixels = batch * side**2
        temporaries = 3 * 4 * pixels * bins  # difference, power, exponential
        contenders = own("kde_entropy", ours)
        contenders["eager formula"] = partial(rival, formula, temporaries)
        contenders["compiled formula"] = compiled_formula
        contenders["kornia"] = kornia
        contenders["APT's histogram (not a kernel density)"] = partial(rival, patch_histogram, 4 * pixels * 512)
        # The reference takes a few regions at a time: 64 MB, whatever the batch.
        contenders["reference"] = partial(rival, ops.reference.kde_entropy, 0)
        yield Bench(
            case=f"B{batch}-{side}x{side}-C{channels}-bins{bins}-{str(dtype)[6:]}",
            shape={"batch": batch, "side": side, "channels": channels, "region": REGION, "bins": bins, "low": low},
            dtype=torch.float32,  # of the result, whatever the pixels are
            inputs=partial(inputs, batch, side, channels, bins, low, dtype),
            contenders=contenders,
            forward=cost(batch, side, channels, dtype),
            expected=lambda given: ops.reference.kde_entropy(**given),
        )


if __name__ == "__main__":
    if machine.device() == "cpu":
        torch.set_num_threads(1)
    raise SystemExit(command.main(__doc__, "kde_entropy", benches))
