"""Presets by name: dictionaries of overrides of each model's configuration.

The paper's sizes (Sec. 4.1): D2iT-B / L / XL have DiT's widths and 10 + 2, 20 + 4 and 23 + 5 blocks, windows of 16 x 16
cells and one learnable bias matrix per head, 136 / 467 / 687 M parameters; the Dynamic Grain Transformer is a DiT-S of
33 M. D2iT-S and "tiny" are ours, and so are the presets of three grains ("-3"): the same blocks, a trunk of one token a
region of 32 pixels, and RefineNet on the codes of 16 and of 8 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Any]

_SMALL = {"dim": 384, "heads": 6}
_BASE = {"dim": 768, "heads": 12}
_LARGE = {"dim": 1024, "heads": 16}
_XLARGE = {"dim": 1152, "heads": 16}
_TINY = {"dim": 128, "heads": 4}

_SIZES: dict[str, dict[str, int]] = {
    "S": {**_SMALL, "depth": 12},
    "B": {**_BASE, "depth": 12},
    "L": {**_LARGE, "depth": 24},
    "XL": {**_XLARGE, "depth": 28},
}

DIT_PRESETS: dict[str, Preset] = {
    **{f"DiT-{size}/{patch}": {**v, "patch_size": patch} for size, v in _SIZES.items() for patch in (2, 4, 8)},
    "tiny": {**_TINY, "depth": 6, "patch_size": 2},
}

GRAIN_PRESETS: dict[str, Preset] = {
    **{f"DiT-{size}": v for size, v in _SIZES.items()},
    "tiny": {**_TINY, "depth": 4},
}

CONTENT_PRESETS: dict[str, Preset] = {
    "D2iT-S": {**_SMALL, "depth": 10, "refine_depth": 2},
    "D2iT-B": {**_BASE, "depth": 10, "refine_depth": 2},
    "D2iT-L": {**_LARGE, "depth": 20, "refine_depth": 4},
    "D2iT-XL": {**_XLARGE, "depth": 23, "refine_depth": 5},
    "tiny": {**_TINY, "depth": 5, "refine_depth": 1, "window": 4, "relative_bias": "table"},
}
CONTENT_PRESETS |= {
    f"{name}-3": {**preset, "downsampling": (8, 16, 32)} for name, preset in CONTENT_PRESETS.items() if name != "tiny"
}

#: "f8f16" is the paper's pair of factors with DQ-VAE's widths; "f8" and "f16" are its fixed-rate baselines (Fig. 5).
#: "f8f16f32" has three grains. Over 1,000 ImageNet photos (one per class) half of its regions of 32 pixels are at 16 or
#: finer and a quarter at 8. Its entropy has 256 bins, the levels of a pixel: no fast kernel takes more than 512.
VAE_PRESETS: dict[str, Preset] = {
    "f8f16": {},
    "f8f16f32": {
        "downsampling": (8, 16, 32),
        "encoder_mult": (1, 1, 2, 2, 4, 4),
        "num_bins": 256,
        "thresholds": (4.37, 4.80),
    },
    "f8": {"downsampling": (8,), "encoder_mult": (1, 1, 2, 2)},
    "f16": {"downsampling": (16,), "decoder_mult": (1, 1, 2, 2, 4)},
    "tiny": {
        "channels": 16,
        "encoder_mult": (1, 1, 2, 2, 4),
        "decoder_mult": (1, 1, 2, 2),
        "residual_blocks": 1,
        "attention_from": 16,
    },
}
