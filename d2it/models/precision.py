"""Where `precision=auto` is bfloat16: the one rule of training, sampling and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from d2it.models.dit import TransformerConfig
from d2it.models.dvae import DynamicVAEConfig

#: Width of a transformer, and channels of a VAE's first level, from which on bfloat16 was faster on a CPU at all shapes
#: measured (docs/training.md); in narrower networks the casts around a product can take longer than it gains.
LEAST_WIDTH, LEAST_CHANNELS = 256, 64


def multiplies_bfloat16() -> bool:
    """Returns whether this CPU has instructions for products of bfloat16."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch from 2.11 on
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def why_float32(config: TransformerConfig | DynamicVAEConfig, device: torch.device) -> str | None:
    """Returns why `precision=auto` is float32 for a network on a device, in words, or None where it is bfloat16.

    Args:
        config: of the network.
        device: where it computes.
    """
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported() else "this GPU has no bfloat16"
    if not multiplies_bfloat16():
        return "this CPU does not multiply bfloat16"
    if isinstance(config, TransformerConfig):
        narrow = f"a width of {config.dim}, not {LEAST_WIDTH}" if config.dim < LEAST_WIDTH else None
    else:
        narrow = f"{config.channels} channels, not {LEAST_CHANNELS}" if config.channels < LEAST_CHANNELS else None
    return narrow and f"it has {narrow} or more, from which on bf16 is faster on a CPU"
