"""Multiply-accumulates of a forward pass, counted from the shapes of the layers and the tokens that exist.

Counted are the matrix products: linear layers and attention, as in DiT's "Gflops" (a training step costs six
operations for each). Norms, activations, biases and lookups are not.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.models.content import RefineNet
from d2it.models.dit import Trunk
from d2it.models.layers import Attention, Modulation, TimestepEmbedder, WindowAttention


def transformer_macs(
    network: DiT | DynamicGrainTransformer | DynamicContentTransformer, images: int, tokens: int = 0, pairs: int = 0
) -> int:
    """Of one forward pass.

    Args:
        images: the batch size.
        tokens: packed fine tokens in all.
        pairs: ordered pairs of fine tokens that share a window (`token_pairs`).
    """
    if isinstance(network, DynamicContentTransformer):
        return _trunk(network.multi_grained, images) + _refine(network.refine, images, tokens, pairs)
    return _trunk(network.trunk, images)


def token_pairs(grain_map: Tensor, cells_per_region: int, window: int, min_grain: int = 1) -> tuple[int, int]:
    """Fine tokens of these maps (B, h, w) and ordered pairs of them within windows, on the host."""
    fine = (grain_map >= min_grain).repeat_interleave(cells_per_region, 1).repeat_interleave(cells_per_region, 2)
    batch, height, width = fine.shape
    counts = fine.reshape(batch, height // window, window, width // window, window).sum((2, 4))
    return int(counts.sum()), int(counts.square().sum())


def vae_macs(vae: DynamicVAE, image_size: tuple[int, int]) -> int:
    """Of encoding and decoding one image, by torch's counter on tensors without data."""
    shadow = copy.deepcopy(vae).to("meta")
    rows, columns = (side // vae.config.region_size for side in image_size)
    cells = vae.config.code_sizes[0]
    latents = torch.empty(1, vae.config.latent_channels, rows * cells, columns * cells, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow.encoder(torch.empty(1, 3, *image_size, device="meta"))
        shadow.decoder(latents, torch.empty(1, rows, columns, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() // 2


def _linear(module: nn.Module) -> int:
    """Multiply-accumulates of a row through every linear layer in `module`."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _per_image(module: nn.Module) -> int:
    """What is computed once an image: timestep embedders and modulations."""
    return sum(_linear(m) for m in module.modules() if isinstance(m, (Modulation, TimestepEmbedder)))


def _attention_width(module: nn.Module) -> int:
    """The widths of all attention layers in `module`, summed: a pair of tokens costs twice that."""
    return sum(m.proj.in_features for m in module.modules() if isinstance(m, (Attention, WindowAttention)))


def _trunk(trunk: Trunk, images: int) -> int:
    length = trunk.grid[0] // trunk.patch * (trunk.grid[1] // trunk.patch)
    once = _per_image(trunk)
    attention = 2 * length * length * _attention_width(trunk)
    return images * (length * (_linear(trunk) - once) + attention + once)


def _refine(refine: RefineNet, images: int, tokens: int, pairs: int) -> int:
    once = _per_image(refine)
    attention = 2 * pairs * _attention_width(refine)
    return tokens * (_linear(refine) - once) + attention + images * once
