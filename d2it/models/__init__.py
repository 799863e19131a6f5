"""The networks of D2iT: DynamicVAE, DynamicGrainTransformer, DynamicContentTransformer, the plain DiT, its VAE."""

import warnings
from typing import Any

from d2it.models.content import ContentTransformerConfig, DynamicContentTransformer
from d2it.models.dit import DiT, DiTConfig
from d2it.models.dvae import DynamicVAE, DynamicVAEConfig, VAEOutput
from d2it.models.grain import DynamicGrainTransformer, GrainTransformerConfig
from d2it.models.klvae import KLVAE, KLVAEConfig
from d2it.models.losses import PatchDiscriminator, VAELoss, VAELossConfig
from d2it.models.lpips import LPIPS

__all__ = [
    "KLVAE",
    "LPIPS",
    "ContentTransformerConfig",
    "DiT",
    "DiTConfig",
    "DynamicContentTransformer",
    "DynamicGrainTransformer",
    "DynamicVAE",
    "DynamicVAEConfig",
    "GrainTransformerConfig",
    "KLVAEConfig",
    "PatchDiscriminator",
    "VAELoss",
    "VAELossConfig",
    "VAEOutput",
]


def __getattr__(name: str) -> Any:
    # `D2iT` and `Samples` lived here before they moved to d2it.sampling, which lies above: the root package finds them.
    if name not in ("D2iT", "Samples"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import d2it

    warnings.warn(f"{name} has moved: from d2it.sampling import {name}", DeprecationWarning, stacklevel=2)
    return getattr(d2it, name)
