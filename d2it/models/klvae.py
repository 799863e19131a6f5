"""The autoencoder of Stable Diffusion, in whose latents the original DiT works, through diffusers.

One factor, no grains: beside the DynamicVAE it is a VAE with a single grain whose map is zero everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2it.errors import reason_of
from d2it.models.base import Model


@dataclass
class KLVAEConfig:
    """Configuration of a `KLVAE`.

    Args:
        network: the configuration of diffusers' AutoencoderKL.
    """

    network: dict[str, Any] = field(default_factory=dict)

    @property
    def downsampling(self) -> tuple[int, ...]:
        return (2 ** (len(self.network["block_out_channels"]) - 1),)

    @property
    def latent_channels(self) -> int:
        return self.network["latent_channels"]

    @property
    def num_grains(self) -> int:
        return 1

    @property
    def region_size(self) -> int:
        return self.downsampling[0]


class KLVAE(Model):
    """The AutoencoderKL of diffusers with the methods of `DynamicVAE` that sampling needs.

    `KLVAE.from_diffusers("sd-vae-ft-ema")` reads a folder with diffusers' config.json and weights.
    """

    Config = KLVAEConfig
    config: KLVAEConfig

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__(config)
        from diffusers import AutoencoderKL

        self.network = AutoencoderKL.from_config(config.network)

    @classmethod
    def from_diffusers(cls, path: str | Path) -> KLVAE:
        """The model in a local folder of diffusers', in evaluation mode.

        Raises:
            ValueError: no AutoencoderKL there.
        """
        from diffusers import AutoencoderKL

        try:
            network = AutoencoderKL.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # as many kinds as files can be missing or wrong
            line = f"{str(path)!r} is no folder with an AutoencoderKL of diffusers: {reason_of(error)}"
            raise ValueError(line) from error
        model = cls(KLVAEConfig({k: v for k, v in network.config.items() if not k.startswith("_")}))
        model.network.load_state_dict(network.state_dict())
        return model.eval()

    @property
    def downsampling(self) -> tuple[int, ...]:
        return self.config.downsampling

    @property
    def scaling_factor(self) -> float:
        """Latents times this have unit variance."""
        return self.network.config.scaling_factor

    def grain_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(grain map, entropy), both zeros: there is one grain."""
        shape = (images.shape[0], *(side // self.config.region_size for side in images.shape[2:]))
        return torch.zeros(shape, dtype=torch.int64, device=images.device), torch.zeros(shape, device=images.device)

    def decode(self, z: Tensor, grain_map: Tensor) -> Tensor:
        """(B, C, H/8, W/8) latents, unscaled -> (B, 3, H, W) images, about [-1, 1]; the map is not used."""
        return self.network.decode(z).sample
