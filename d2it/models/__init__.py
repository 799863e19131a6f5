"""The networks of D2iT: DynamicVAE, DynamicGrainTransformer, DynamicContentTransformer, the plain DiT, its VAE."""

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
