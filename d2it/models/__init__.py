"""The networks of D2iT: DynamicVAE, DynamicGrainTransformer, DynamicContentTransformer, and the plain DiT."""

from d2it.models.content import ContentTransformerConfig, DynamicContentTransformer
from d2it.models.dit import DiT, DiTConfig
from d2it.models.dvae import DynamicVAE, DynamicVAEConfig, VAEOutput
from d2it.models.grain import DynamicGrainTransformer, GrainTransformerConfig
from d2it.models.losses import PatchDiscriminator, VAELoss, VAELossConfig
from d2it.models.lpips import LPIPS
from d2it.models.pipeline import D2iT, Samples

__all__ = [
    "LPIPS",
    "ContentTransformerConfig",
    "D2iT",
    "DiT",
    "DiTConfig",
    "DynamicContentTransformer",
    "DynamicGrainTransformer",
    "DynamicVAE",
    "DynamicVAEConfig",
    "GrainTransformerConfig",
    "PatchDiscriminator",
    "Samples",
    "VAELoss",
    "VAELossConfig",
    "VAEOutput",
]
