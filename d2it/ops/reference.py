"""The specification: every operator of `d2it.ops` in plain PyTorch, differentiable, float64-capable.

No validation, no tricks; where a fast backend and this file disagree, this file is right. Computation runs in the
dtype of the inputs, as eager PyTorch does, except where float32 is part of the contract (entropy, softmax, LayerNorm).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2it.kernels.common import GRAY_WEIGHTS
from d2it.ops.plan import TokenPlan


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- 3.1 Dynamic Grained Coding -------------------------------------------------------------------------------------


def to_gray(images: Tensor, value_range: tuple[float, float] = (-1.0, 1.0), *, center: float = 0.0) -> Tensor:
    """(B, 1|3, H, W) -> (B, H, W) in `value_range` less `center`; uint8 0..255 spans the range.

    float32, or float64 as given. The center is subtracted first: far from 0 the difference keeps digits that the
    weighted sum would round away.
    """
    low, high = value_range
    x = images.to(_accumulate(images.dtype))
    x = x * ((high - low) / 255) + (low - center) if images.dtype == torch.uint8 else x - center
    if images.shape[1] == 1:
        return x[:, 0]
    r, g, b = GRAY_WEIGHTS
    return r * x[:, 0] + g * x[:, 1] + b * x[:, 2] + (r + g + b - 1) * center


def kde_entropy(
    images: Tensor,
    region_size: int = 16,
    *,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
) -> Tensor:
    """Eqs. 2-3: Shannon entropy (nats) of the Gaussian kernel density of every region's gray levels."""
    low, high = value_range
    center = float(round((low + high) / 2))  # a whole number, which float32 has exactly
    gray = to_gray(images, value_range, center=center)
    batch, height, width = gray.shape
    s = region_size
    bins_count = s * s if num_bins is None else num_bins
    regions = gray.reshape(batch, height // s, s, width // s, s).permute(0, 1, 3, 2, 4).reshape(-1, s * s)
    bins = torch.linspace(low - center, high - center, bins_count, dtype=gray.dtype, device=gray.device)
    # Pixels x bins for a few regions at a time: 64 MiB in float32, however large the batch.
    chunk = max(1, 2**24 // (s * s * bins_count))
    entropies = [_density_entropy(part, bins, sigma, normalize) for part in regions.split(chunk) if part.shape[0]]
    entropy = torch.cat(entropies) if entropies else regions.new_zeros(0)
    return entropy.reshape(batch, height // s, width // s)


def _density_entropy(pixels: Tensor, bins: Tensor, sigma: float, normalize: bool) -> Tensor:
    distance = (pixels[:, :, None] - bins) / sigma
    density = torch.exp(-0.5 * distance.square()).mean(dim=1)  # (R, bins), Eq. 2
    if normalize:
        total = density.sum(dim=1, keepdim=True)
        density = density / torch.where(total > 0, total, torch.ones_like(total))
    # 0 log 0 = 0 by selection, never by an epsilon: 1e-40 is subnormal and may be flushed.
    positive = density > 0
    log = torch.where(positive, density, torch.ones_like(density)).log()
    return 0.0 - (density * log).sum(dim=1)  # Eq. 3; 0 - 0 and not -0 where one level has it all


def grain_map(entropy: Tensor, thresholds: Tensor | Sequence[float]) -> Tensor:
    """Number of thresholds exceeded: 0 = coarsest."""
    limits = torch.as_tensor(thresholds, dtype=entropy.dtype, device=entropy.device)
    return (entropy[..., None] > limits).sum(dim=-1)


def encode_grains(
    images: Tensor,
    thresholds: Tensor | Sequence[float],
    region_size: int = 16,
    *,
    num_bins: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    sigma: float = 0.01,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """(grain map, entropy)."""
    entropy = kde_entropy(
        images,
        region_size,
        num_bins=num_bins,
        value_range=value_range,
        sigma=sigma,
        normalize=normalize,
    )
    return grain_map(entropy, thresholds), entropy


def neighbor_copy(latents: Sequence[Tensor], grain_map: Tensor) -> Tensor:
    """Section 3.1: every region takes the code of its own grain, repeated onto the finest grid."""
    height, width = latents[-1].shape[-2:]
    grains = _expand(grain_map, height // max(grain_map.shape[-2], 1))[:, None]
    merged = torch.zeros_like(latents[-1])
    for grain, latent in enumerate(latents):
        merged = torch.where(grains == grain, _expand(latent, height // max(latent.shape[-2], 1)), merged)
    return merged


def _expand(x: Tensor, ratio: int) -> Tensor:
    return x.repeat_interleave(ratio, dim=-2).repeat_interleave(ratio, dim=-1)


# ---- 3.2.3 Planning, packing, merging -------------------------------------------------------------------------------


def plan_tokens(
    grain_map: Tensor,
    *,
    cells_per_region: int = 2,
    window: int = 4,
    min_grain: int = 1,
    capacity: int | None = None,
    code_sizes: Sequence[int] | None = None,
) -> TokenPlan:
    """Rows of the packed tokens: images in order, windows row-major in the image, cells row-major in the window."""
    batch = grain_map.shape[0]
    fine = _expand(grain_map >= min_grain, cells_per_region) & first_cells(grain_map, cells_per_region, code_sizes)
    height, width = fine.shape[1:]
    cells = batch * height * width
    rows_available = cells if capacity is None else capacity

    flags = to_windows(fine, window)  # (B * windows, w * w)
    number = flags.flatten().cumsum(0, dtype=torch.int64).reshape(flags.shape)
    count = number.flatten()[-1] if cells else flags.new_zeros((), dtype=torch.int64)
    slots = torch.where(flags & (number <= rows_available), number - 1, -1)

    where = to_windows(torch.arange(cells, device=fine.device).reshape(batch, height, width), window)
    target = torch.where(slots >= 0, slots, rows_available).flatten()
    index = torch.full((rows_available + 1,), -1, dtype=torch.int64, device=fine.device)
    index = index.index_copy(0, target, where.flatten())[:rows_available]
    sample = torch.where(index >= 0, index // max(height * width, 1), max(batch - 1, 0))
    inverse = from_windows(slots, window, (batch, height, width)).flatten()
    i32 = torch.int32
    return TokenPlan(
        index=index.to(i32),
        inverse=inverse.to(i32),
        slots=slots.to(i32),
        sample=sample.to(i32),
        count=count.to(i32),
        capacity=rows_available,
        window=window,
        grid=(batch, height, width),
    )


def first_cells(grain_map: Tensor, cells_per_region: int, code_sizes: Sequence[int] | None) -> Tensor:
    """(B, h, w) -> (B, Hf, Wf) bool: True at the first cell of every latent code, or everywhere without code sizes."""
    grains = _expand(grain_map, cells_per_region)
    if not code_sizes:
        return torch.ones_like(grains, dtype=torch.bool)
    size = torch.zeros_like(grains)
    for grain, cells in enumerate(code_sizes):
        size = torch.where(grains == grain, cells, size)
    y, x = (torch.arange(n, device=grains.device) for n in grains.shape[1:])
    return (y[:, None] % size == 0) & (x % size == 0)


def plan_from_mask(mask: Tensor, *, window: int, capacity: int | None = None) -> TokenPlan:
    """`plan_tokens` of the cells where `mask` is True."""
    return plan_tokens(mask.to(torch.int64), cells_per_region=1, window=window, capacity=capacity)


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, Hf, Wf, ...) -> (B * windows, w * w, ...), windows row-major in the image, cells row-major in the window."""
    b, h, w, *rest = x.shape
    x = x.reshape(b, h // window, window, w // window, window, *rest).transpose(2, 3)
    return x.reshape(b * (h // window) * (w // window), window * window, *rest)


def from_windows(x: Tensor, window: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_windows`: (B * windows, w * w, ...) -> (B, Hf, Wf, ...) with `shape` = (B, Hf, Wf)."""
    b, h, w = shape
    rest = x.shape[2:]
    x = x.reshape(b, h // window, w // window, window, window, *rest).transpose(2, 3)
    return x.reshape(b, h, w, *rest)


def pack_tokens(x: Tensor, plan: TokenPlan) -> Tensor:
    """(B, Hf*Wf, C) -> (capacity, C); rows past the count are zero."""
    return _gather(x.flatten(0, 1), plan.index)


def unpack_tokens(packed: Tensor, plan: TokenPlan, base: Tensor | None = None) -> Tensor:
    """(capacity, C) -> (B, Hf*Wf, C): Eq. 9's merge where `base` is given."""
    merged = _gather(packed, plan.inverse)
    if base is not None:
        merged = torch.where(plan.inverse[:, None] >= 0, merged, base.flatten(0, 1))
    return merged.reshape(plan.batch, plan.cells_per_image, packed.shape[1])


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], and zero where the index is -1: what other rows hold (NaN, say) does not get in."""
    padded = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
    return padded.index_select(0, torch.where(index >= 0, index, rows.shape[0]))


# ---- 3.2.3 Attention inside windows, Eq. 10 -------------------------------------------------------------------------


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale + bias) v inside every window, over the tokens that exist.

    Scores and softmax are float32 (float64 for float64). A query whose scores are all -inf, by slots, segments or the
    bias, has a zero result and zero gradients.
    """
    if slots is None:
        return _dense_attention(q, k, v, bias, None, segment_ids, scale)
    exists = slots >= 0  # (W, N)

    def gather(x: Tensor) -> Tensor:
        return _gather(x, slots.flatten()).reshape(*slots.shape, *x.shape[1:])

    out = _dense_attention(gather(q), gather(k), gather(v), bias, exists, segment_ids, scale)
    tokens = q.shape[0]
    target = torch.where(exists, slots, tokens).flatten().long()
    flat = out.reshape(-1, *q.shape[1:])
    return q.new_zeros(tokens + 1, *q.shape[1:]).index_copy(0, target, flat)[:tokens]


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which products keep the dtype of their factors: autocast would take float32 scores to float16."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    exists: Tensor | None,
    segment_ids: Tensor | None,
    scale: float | None,
) -> Tensor:
    windows, _, _, width = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (W, H, N, D)
    # In float32 at least: a score beyond the range of float16 is no mask.
    wide = _accumulate(q.dtype)
    with _without_autocast(q.device):
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * (max(width, 1) ** -0.5 if scale is None else scale)
    which = torch.arange(windows, device=q.device)
    if bias is not None:
        scores = scores + bias.index_select(0, which % bias.shape[0]).to(wide)
    mask = None if exists is None else exists[:, None, None, :]
    if segment_ids is not None:
        ids = segment_ids.index_select(0, which % segment_ids.shape[0])
        equal = (ids[:, :, None] == ids[:, None, :])[:, None]
        mask = equal if mask is None else mask & equal
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    sees_none = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = torch.where(sees_none, 0, torch.where(sees_none, 0, scores).softmax(dim=-1))
    with _without_autocast(q.device):
        out = (weights.to(v.dtype) @ v).transpose(1, 2)
    return out if exists is None else torch.where(exists[:, :, None, None], out, 0)


def slots_from_cu_seqlens(cu_seqlens: Tensor, size: int) -> Tensor:
    """(W + 1,) offsets -> (W, size): the rows of every window, then -1."""
    rows = cu_seqlens[:-1, None] + torch.arange(size, dtype=torch.int32, device=cu_seqlens.device)
    return torch.where(rows < cu_seqlens[1:, None], rows, -1)


def window_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`window_attention` of the three slices of one projection: (W, N, 3, H, D) or (T, 3, H, D) with `slots`."""
    q, k, v = qkv.unbind(dim=-3)
    return window_attention(q, k, v, bias, slots=slots, segment_ids=segment_ids, scale=scale)


def relative_position_index(window: int, device: torch.device | None = None) -> Tensor:
    """(w*w, w*w) int64: the row of Swin's table for query i (row) and key j (column)."""
    axis = torch.arange(window, device=device)
    y, x = (g.flatten() for g in torch.meshgrid(axis, axis, indexing="ij"))
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """((2w-1)^2, H) -> (1, H, w*w, w*w): Swin Transformer, Sec. 3.2."""
    n = window * window
    index = relative_position_index(window, table.device)
    return table.index_select(0, index.flatten()).reshape(n, n, -1).permute(2, 0, 1)[None]


# ---- adaLN ----------------------------------------------------------------------------------------------------------


def _rows(parameter: Tensor, sample: Tensor | None) -> Tensor:
    return parameter[:, None] if sample is None else parameter.index_select(0, sample)


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, sample: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32 (float64 for float64), rounded once to the dtype of x."""
    wide = _accumulate(x.dtype)
    # Not F.layer_norm: the reverse-mode derivative of its forward-mode derivative is wrong in PyTorch 2.13.
    centred = x.to(wide) - x.to(wide).mean(dim=-1, keepdim=True)
    normed = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (normed * (1 + _rows(scale, sample).to(wide)) + _rows(shift, sample).to(wide)).to(x.dtype)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, bias: Tensor | None = None, sample: Tensor | None = None
) -> Tensor:
    """x + gate * branch in float32 (float64 for float64), rounded once to the dtype of x. A bias is in the branch
    already, as for `gelu`."""
    wide = _accumulate(x.dtype)
    return (x.to(wide) + _rows(gate, sample).to(wide) * _with_bias(branch.to(wide), bias)).to(x.dtype)


def gated_residual_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    sample: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(total, adaln_modulate(total, shift, scale)) with total = gated_residual(x, branch, gate, bias=bias)."""
    total = gated_residual(x, branch, gate, bias=bias, sample=sample)
    return total, adaln_modulate(total, shift, scale, sample=sample, eps=eps)


def _with_bias(wide: Tensor, bias: Tensor | None) -> Tensor:
    """A tensor that has the bias in it: nothing is added but the bias's gradient."""
    return wide if bias is None else wide + (bias - bias.detach()).to(wide.dtype)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by tanh in float32 (float64 for float64), rounded once to the dtype of x. A bias is in x already: it adds
    nothing but its gradient."""
    wide = _with_bias(x.to(_accumulate(x.dtype)), bias)
    return torch.nn.functional.gelu(wide, approximate="tanh").to(x.dtype)
