"""Multiply-accumulates of the tokens that exist, from the configurations.

One multiply-accumulate (MAC) is two floating-point operations; a training step costs three times the forward pass.
DiT's paper calls MACs "Gflops". Counted are the matrix products of a forward pass, not norms, activations or moves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from d2it import ops
from d2it.diffusion.grains import expand_map
from d2it.models.content import ContentTransformerConfig
from d2it.models.dit import TransformerConfig
from d2it.models.layers import TimestepEmbedder


class FineTokens(NamedTuple):
    """What RefineNet works on.

    Args:
        rows: its tokens, one a latent code.
        pairs: the sum over windows of their tokens squared.
    """

    rows: int
    pairs: int


class Macs(NamedTuple):
    """Multiply-accumulates of a forward pass.

    Args:
        dense: of everything but RefineNet.
        refine: of RefineNet, which sampling leaves out where `refine_until` does.
    """

    dense: int
    refine: int

    @property
    def total(self) -> int:
        return self.dense + self.refine


def fine_tokens(grain_map: Tensor, config: ContentTransformerConfig) -> FineTokens:
    """Counts the fine tokens of the maps (B, H/S, W/S), on the host if the maps are there (a GPU synchronises)."""
    side, window = config.cells_per_region, config.window
    if window % side == 0:  # whole regions in a window
        n = window // side
        b, h, w = grain_map.shape
        counts = config.region_tokens(grain_map).reshape(b, h // n, n, w // n, n).sum(dim=(2, 4))
    else:
        sizes = config.code_sizes if config.refines_codes else None
        fine = expand_map(grain_map >= config.min_grain, side) & ops.reference.first_cells(grain_map, side, sizes)
        counts = ops.reference.to_windows(fine, window).sum(dim=1)
    return FineTokens(int(counts.sum()), int(counts.square().sum()))


def all_fine(config: ContentTransformerConfig, batch: int = 1) -> FineTokens:
    """The tokens of `batch` maps that are the finest everywhere; a masked RefineNet always works on these."""
    cells = batch * config.grid[0] * config.grid[1]
    return FineTokens(cells, cells * config.window**2)


def count_macs(config: TransformerConfig, batch: int = 1, fine: FineTokens | None = None) -> Macs:
    """MACs of one forward pass over `batch` images.

    Args:
        config: a transformer's.
        batch: images.
        fine: RefineNet's tokens in the whole batch (`fine_tokens`); None, or a masked model, is `all_fine`.
    """
    dim, tokens = config.dim, config.num_tokens
    block = _block_row(config) + 2 * tokens * dim
    ends = dim * config.patch_size**2 * (config.in_channels + config.out_channels)
    dense = tokens * (config.depth * block + ends) + _per_image(dim, config.depth)
    if not isinstance(config, ContentTransformerConfig):
        return Macs(batch * dense, 0)
    if fine is None or config.masked:
        fine = all_fine(config, batch)
    dense += tokens * config.num_grains * dim
    ends = dim * (2 * config.out_channels + config.in_channels + config.num_grains)
    refine = fine.rows * (config.refine_depth * _block_row(config) + ends)
    refine += fine.pairs * config.refine_depth * 2 * dim + batch * _per_image(dim, config.refine_depth)
    return Macs(batch * dense, refine)


def kept_values(
    config: TransformerConfig,
    batch: int = 1,
    fine: FineTokens | None = None,
    *,
    recompute: bool = False,
    hidden: int = 2,
) -> int:
    """Numbers that the blocks keep from the forward to the backward pass, in the dtype of the residual stream.

    Of every token the residual stream (twice), both modulated inputs, q, k and v, the attention's output, both
    branches, and the MLP's hidden layer before and after its GELU. Compilation saves some of them.

    Args:
        config: as for `count_macs`.
        batch: as for `count_macs`.
        fine: as for `count_macs`.
        recompute: activation checkpointing: every block's input, and once all of the largest block.
        hidden: how often the MLP's hidden layer is kept: before and after its GELU, or 1: before it alone, as in
            float32 on a CPU.
    """
    layers = [(config.depth, batch * config.num_tokens)]
    if isinstance(config, ContentTransformerConfig):
        rows = all_fine(config, batch).rows if fine is None or config.masked else fine.rows
        layers.append((config.refine_depth, rows))
    of_a_token = int(config.dim * (10 + hidden * config.mlp_ratio))
    if recompute:
        return config.dim * sum(depth * rows for depth, rows in layers) + of_a_token * max(rows for _, rows in layers)
    return of_a_token * sum(depth * rows for depth, rows in layers)


def _block_row(config: TransformerConfig) -> int:
    """One token through a block's Linears: qkv, projection, MLP."""
    return 4 * config.dim**2 + 2 * config.dim * int(config.dim * config.mlp_ratio)


def _per_image(dim: int, depth: int) -> int:
    """The conditioning: timestep MLP, and the modulations of the blocks and of the final layer."""
    return TimestepEmbedder.FREQUENCIES * dim + dim**2 + (6 * depth + 2) * dim**2


# torch.utils.flop_counter works on shapes alone: all positions of all windows count, filled or not.


def _count_window_attention(forward_op: Any, backward_op: Any, attending: int) -> None:
    """Registers the products of a window attention of `attending` tensors: two forward, and five backward, where the
    scores are computed again."""

    @register_flop_formula([forward_op])
    def forward(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        slots = args[attending]
        windows, n = slots if slots is not None else x[:2]
        return 4 * windows * n * n * x[-2] * x[-1]

    @register_flop_formula([backward_op])
    def backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return forward(*args) * 5 // 2


_count_window_attention(torch.ops.d2it.window_attention, torch.ops.d2it.window_attention_backward, 3)
_count_window_attention(
    torch.ops.d2it.window_attention_qkvpacked, torch.ops.d2it.window_attention_qkvpacked_backward, 1
)
