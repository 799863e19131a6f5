"""Entropy of the Gaussian kernel density of gray levels in every region (D2iT, section 3.1, Eqs. 2-3).

A pixel touches only the bins within REACH sigma of it. Bins are rows of 16: a pixel's window is the few rows from
its first one on, so its kernel values are a short vector, and adding it at the right rows is a product with a
one-hot matrix, which the tensor cores do: density (rows, 16) = one_hot (rows, pixels) @ values (pixels, 16), once
per row of the window. Values are split in two halves of float16, 22 bits together; one-hot entries are exact.

With p the density before normalisation and Z its sum, H = ln Z - (sum p ln p) / Z.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from d2it.kernels.common import (
    ASSERTIONS,
    GRAY_WEIGHTS,
    RANGE_SLACK,
    CompileCase,
    cdiv,
    compile_cases,
    next_power_of_2,
)
from d2it.kernels.launch import Tape, launcher
from d2it.kernels.rows import constant

REACH = 6.0  # sigma; what lies beyond changes no entropy by more than 3e-7


class Images(NamedTuple):
    """`data` (B, CHANNELS, H, W), with its strides in elements: `stride_image`, `stride_channel`, `stride_row`,
    `stride_column`. `CHANNELS` is 1 or 3."""

    data: torch.Tensor
    CHANNELS: tl.constexpr
    stride_image: int
    stride_channel: int
    stride_row: int
    stride_column: int


class Gray(NamedTuple):
    """How pixels become values, which count from the middle of the range.

    value = `scale` * (`weight_r` (R - `middle`) + `weight_g` (G - `middle`) + `weight_b` (B - `middle`) + `offset`):
    far from 0, differences keep the digits that a weighted sum would round away. `middle` is None where it is 0, and
    for bytes, whose weighted sum is exact without it. A channel holds `least` to `most`, which is not `CHECKED` of
    bytes.
    """

    weight_r: float
    weight_g: float
    weight_b: float
    offset: float
    scale: float
    least: float
    most: float
    middle: float | None
    CHECKED: tl.constexpr


class Bins(NamedTuple):
    """The levels at which the density is taken, evenly spaced over the range.

    Attributes:
        per_unit: Levels in a unit of the values.
        middle: Number of levels below the range's middle.
        spacing_high: Distance of two levels, rounded to float32.
        spacing_low: What rounding took from it.
        per_sigma: sqrt(log2(e) / 2) / sigma: a kernel value is exp2(-(distance * per_sigma)^2).
        COUNT: Number of levels.
        REACH: Levels within `REACH` sigma of a pixel, on either side.
        WINDOW: Rows of 16 levels that hold them, wherever the pixel lies.
    """

    per_unit: float
    middle: float
    spacing_high: float
    spacing_low: float
    per_sigma: float
    COUNT: tl.constexpr
    REACH: tl.constexpr
    WINDOW: tl.constexpr


@triton.jit
def _channel(gray, weight, p_pixel, m_pixel):
    """One channel's part of the weighted sum, and whether it is in range."""
    b_level = tl.load(p_pixel, mask=m_pixel, other=0).to(tl.float32)
    b_ok = (b_level >= gray.least) & (b_level <= gray.most)
    if gray.middle is not None:
        b_level -= gray.middle
    return b_level * weight, b_ok


@triton.jit
def _gray(images, gray, p_pixel, m_pixel):
    """Values of pixels, whose channels must be in range."""
    b_gray, b_ok = _channel(gray, gray.weight_r, p_pixel, m_pixel)
    if images.CHANNELS == 3:
        b_green, b_green_ok = _channel(gray, gray.weight_g, p_pixel + images.stride_channel, m_pixel)
        b_blue, b_blue_ok = _channel(gray, gray.weight_b, p_pixel + 2 * images.stride_channel, m_pixel)
        b_ok = b_ok & b_green_ok & b_blue_ok
        b_gray += b_green + b_blue
    if gray.CHECKED:
        tl.device_assert(b_ok | ~m_pixel, "kde_entropy: images must be finite and inside value_range")
    return (b_gray + gray.offset) * gray.scale


@triton.jit
def _add_window(b_density, b_x, b_first, i_window, spacing, ROWS: tl.constexpr, SCALE_BITS: tl.constexpr):
    """Adds the kernel values at one row of every pixel's window. spacing: of the bins, in the unit of b_x."""
    o_row = tl.arange(0, ROWS)
    o_bin = tl.arange(0, 16)
    b_u = b_x[:, None] - (i_window * 16 + o_bin).to(tl.float32)[None, :] * spacing
    b_kernel = tl.exp2(SCALE_BITS - b_u * b_u)
    b_high = b_kernel.to(tl.float16)
    b_low = (b_kernel - b_high.to(tl.float32)).to(tl.float16)
    b_hot = (o_row[:, None] == b_first[None, :] + i_window).to(tl.float16)
    b_density = tl.dot(b_hot, b_high, b_density)
    return tl.dot(b_hot, b_low, b_density)


@triton.jit
def _add_pixels(
    b_density,
    b_x,
    b_first,
    spacing,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds pixels to the density, a PARTS-th at a time: what was loaded widely would not fit the registers at once."""
    if PARTS > 1:
        HALF: tl.constexpr = b_x.shape[0] // 2
        b_x0, b_x1 = tl.split(tl.reshape(b_x, (HALF, 2)))
        b_first0, b_first1 = tl.split(tl.reshape(b_first, (HALF, 2)))
        b_density = _add_pixels(b_density, b_x0, b_first0, spacing, ROWS, WINDOW, SCALE_BITS, PARTS // 2)
        b_density = _add_pixels(b_density, b_x1, b_first1, spacing, ROWS, WINDOW, SCALE_BITS, PARTS // 2)
    elif WINDOW <= 4:
        for i_window in tl.static_range(WINDOW):
            b_density = _add_window(b_density, b_x, b_first, i_window, spacing, ROWS, SCALE_BITS)
    else:
        for i_window in tl.range(0, WINDOW):
            b_density = _add_window(b_density, b_x, b_first, i_window, spacing, ROWS, SCALE_BITS)
    return b_density


@triton.jit
def kde_entropy_kernel(
    images,
    gray,
    bins,
    thresholds,
    entropy,
    grains,
    num_thresholds,
    map_height,
    map_width,
    REGION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One program: one region. images is `Images`, gray `Gray`, bins `Bins`; entropy, grains (B, H/S, W/S) contiguous;
    thresholds (num_thresholds,), or None like grains."""
    PIXELS: tl.constexpr = REGION * REGION
    USED_ROWS: tl.constexpr = (bins.COUNT + 15) // 16
    SCALE_BITS: tl.constexpr = 14  # kernel values as float16: 2^14 at most, subnormal only below 2^-28
    i_region = tl.program_id(0)
    i_x = i_region % map_width
    i_y = i_region // map_width % map_height
    i_image = i_region // map_width // map_height
    p_region = images.data + i_image.to(tl.int64) * images.stride_image
    p_region += (i_y * REGION).to(tl.int64) * images.stride_row + (i_x * REGION).to(tl.int64) * images.stride_column
    b_density = tl.zeros((ROWS, 16), tl.float32)
    for start in tl.range(0, PIXELS, BLOCK):
        o_pixel = start + tl.arange(0, BLOCK)
        m_pixel = o_pixel < PIXELS
        o_y = o_pixel // REGION
        o_x = o_pixel % REGION
        p_pixel = p_region + o_y.to(tl.int64) * images.stride_row + o_x.to(tl.int64) * images.stride_column
        b_value = _gray(images, gray, p_pixel, m_pixel)
        # The first row of the window, and where the pixel lies from its first bin, in units of 1 / per_sigma.
        b_first = tl.floor((b_value * bins.per_unit + bins.middle - bins.REACH) * 0.0625)
        b_first = tl.minimum(tl.maximum(b_first, 0.0), USED_ROWS - bins.WINDOW)
        b_bin = b_first * 16.0 - bins.middle
        b_x = ((b_value - b_bin * bins.spacing_high) - b_bin * bins.spacing_low) * bins.per_sigma
        b_first = tl.where(m_pixel, b_first.to(tl.int32), -ROWS)
        spacing = bins.spacing_high * bins.per_sigma
        b_density = _add_pixels(b_density, b_x, b_first, spacing, ROWS, bins.WINDOW, SCALE_BITS, BLOCK // PART)
    o_all = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_p = tl.where(o_all < bins.COUNT, b_density, 0.0) * (1.0 / (1 << SCALE_BITS) / PIXELS)
    b_plogp = tl.where(b_p > 0, b_p * tl.log2(tl.where(b_p > 0, b_p, 1.0)), 0.0)
    b_z = tl.sum(b_p)
    b_sum = tl.sum(b_plogp)
    LN_2: tl.constexpr = 0.6931471805599453
    if NORMALIZE:
        b_entropy = tl.where(b_z > 0, tl.maximum(tl.log2(b_z) - b_sum / b_z, 0.0) * LN_2, 0.0)
    else:
        b_entropy = -b_sum * LN_2
    tl.store(entropy + i_region, b_entropy)
    if grains is not None:
        b_grain = tl.zeros((), tl.int64)
        for i in tl.range(0, num_thresholds):
            b_grain += (b_entropy > tl.load(thresholds + i)).to(tl.int64)
        tl.store(grains + i_region, b_grain)


@launcher
def _launch(
    tape: Tape,
    images: torch.Tensor,
    thresholds: torch.Tensor | None,
    region_size: int,
    num_bins: int,
    low: float,
    high: float,
    sigma: float,
    normalize: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """images (B, 1|3, H, W), any strides; thresholds (k-1,) float32 -> (grains or None, entropy), (B, H/S, W/S)."""
    batch, channels, height, width = images.shape
    shape = (batch, height // region_size, width // region_size)
    entropy = tape.empty(shape, torch.float32)
    grains = None if thresholds is None else tape.empty(shape, torch.int64)
    if not entropy.numel():
        return grains, entropy
    center = (low + high) / 2
    weights = (1.0, 0.0, 0.0) if channels == 1 else GRAY_WEIGHTS
    byte, middle = images.dtype == torch.uint8, float(round(center))
    if byte:  # weights in 1 / 10,000: the weighted sum is exact in float32
        scale = (high - low) / 255 / 10000
        offset = (low * sum(weights) - center) / scale
        weights = tuple(float(round(10000 * w)) for w in weights)
    else:
        offset, scale = middle * sum(weights) - center, 1.0
    slack = RANGE_SLACK * (high - low)
    spacing = (high - low) / (num_bins - 1)
    spacing_high = ctypes.c_float(spacing).value
    reach = min(math.ceil(REACH * sigma / spacing), num_bins)
    rows = cdiv(num_bins, 16)
    # 256 pixels to a warp: 16 bytes a lane in bfloat16 and float32. Pixels apart come one by one: fewer at a time.
    block = min(256 if images.stride(3) == 1 else 64, next_power_of_2(region_size**2))
    tape.launch(
        kde_entropy_kernel,
        entropy.numel(),
        Images(images, constant(channels), *images.stride()),
        Gray(
            *weights,
            offset,
            scale,
            least=low - slack,
            most=high + slack,
            middle=None if byte or not middle else middle,
            CHECKED=constant(int(not byte)),
        ),
        Bins(
            per_unit=1 / spacing,
            middle=(num_bins - 1) / 2,
            spacing_high=spacing_high,
            spacing_low=spacing - spacing_high,
            per_sigma=math.sqrt(0.5 * math.log2(math.e)) / sigma,
            COUNT=constant(num_bins),
            REACH=constant(reach),
            WINDOW=constant(min(cdiv(2 * reach, 16) + 1, rows)),
        ),
        thresholds,
        entropy,
        grains,
        0 if thresholds is None else thresholds.numel(),
        shape[1],
        shape[2],
        REGION=region_size,
        ROWS=max(16, next_power_of_2(rows)),
        BLOCK=block,
        PART=min(block, 32),
        NORMALIZE=normalize,
        num_warps=1,
        **ASSERTIONS,
    )
    return grains, entropy


def kde_entropy(images: torch.Tensor, *args: Any) -> torch.Tensor:
    """Returns the entropy, of `_launch`'s arguments without thresholds."""
    return _launch(images, None, *args)[1]


def encode_grains(images: torch.Tensor, thresholds: torch.Tensor, *args: Any) -> tuple:
    """Returns the grains and the entropy, of `_launch`'s arguments."""
    return _launch(images, thresholds.contiguous(), *args)


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    halves, full, byte = torch.bfloat16, torch.float32, torch.uint8
    for size, channels, bins, low, dtype in (
        *((16, 3, bins, -1.0, dtype) for bins in (256, 32) for dtype in (full, halves, byte)),
        (16, 3, 256, 0.0, full),
        (16, 3, 256, -3.0, full),  # its middle is not 0
        (16, 1, 256, 0.0, byte),
        (16, 3, 512, 0.0, full),
        (8, 3, 64, -1.0, full),
        (32, 3, 512, -1.0, halves),
        (64, 1, 256, -1.0, full),
    ):
        images = torch.empty((8, channels, 256, 256), dtype=dtype, device="meta")
        name = f"S{size}-C{channels}-bins{bins}-from{low:g}-{str(dtype)[6:]}"
        yield name, partial(encode_grains, images, images.new_empty(1, dtype=full), size, bins, low, 1.0, 0.01, True)
    nhwc = torch.empty((8, 3, 256, 256), device="meta").contiguous(memory_format=torch.channels_last)
    yield "S16-C3-bins256-channels_last-float32", partial(kde_entropy, nhwc, 16, 256, -1.0, 1.0, 0.01, True)
