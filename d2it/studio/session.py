"""What the studio computes: samples under a painted map, and photos rebuilt at any share of fine regions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2it import pictures
from d2it.data.decode import center_crop
from d2it.diffusion import ranked_grains
from d2it.errors import UserError, user_error
from d2it.models import DiT, DynamicVAE
from d2it.models.budget import grain_tokens, spendable
from d2it.sampling.pipeline import D2iT, Label

#: States of the denoising that are shown, the image itself included.
STATES = 8


@dataclass(frozen=True)
class Result:
    """What the page shows.

    Args:
        image: (H, W, 3) uint8.
        grain_map: (h, w) int64, the map that it was made with.
        states: (n, H, W, 3) uint8, from noise to the image; empty for a photo.
        cost: one line.
    """

    image: np.ndarray
    grain_map: Tensor
    states: np.ndarray
    cost: str


class Session:
    """A model, and what is asked of it.

    Args:
        model: sampled from and, where its VAE is a `DynamicVAE`, used to rebuild photos.
    """

    def __init__(self, model: D2iT) -> None:
        self.model = model

    @property
    def least_budget(self) -> float | None:
        """The share of the tokens that the coarsest map spends, to two decimals, rounded up: less cannot be spent.

        None for a plain DiT, which always spends all.
        """
        content = self.model.content_transformer
        return None if isinstance(content, DiT) else spendable(grain_tokens(content.config), 2)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, their numbers where they have none; empty without classes."""
        return self.model.class_names or [str(i) for i in range(self.model.num_classes)]

    def new_map(self, grain: int) -> Tensor:
        """(h, w) int64, the same grain everywhere."""
        return torch.full(self.model.region_grid, grain)

    def crop(self, photo: np.ndarray) -> np.ndarray:
        """The centre of a photo (rows, columns, 3) uint8 at the model's size (H, W, 3); small ones are enlarged.

        Raises:
            UserError: no photo.
        """
        if not isinstance(photo, np.ndarray) or photo.ndim != 3 or photo.shape[2] < 3 or not photo.size:
            raise UserError("choose a photo first")
        return np.asarray(center_crop(Image.fromarray(photo[..., :3]), self.model.image_size, upsample=True))

    def photo_map(self, photo: np.ndarray) -> Tensor:
        """(h, w) int64, the map that Dynamic Grained Coding gives the centre of a photo.

        Raises:
            UserError: no photo, or a VAE that has no grains.
        """
        return self._dynamic_vae().grain_map(self._images(self.crop(photo)))[0][0].cpu()

    def sample(
        self,
        grain_map: Tensor | None,
        label: Label | None,
        *,
        seed: int,
        steps: int,
        guidance: float,
        budget: float | None = None,
    ) -> Result:
        """Samples one image.

        Args:
            grain_map: (h, w) int64; None lets the model sample one.
            label: None draws a class.
            seed, steps, guidance: as for `D2iT.__call__`.
            budget: share of the tokens to spend: a given map then ranks the regions, finest first. None is the map as
                it is.

        Raises:
            UserError: a value that the model cannot take.
        """
        states: list[Tensor] = []
        started = time.perf_counter()
        with user_error():
            samples = self.model(
                labels=label if self.model.num_classes else None,
                grain_map=grain_map,
                seed=seed,
                steps=steps,
                guidance=guidance,
                budget=budget,
                callback=lambda number, timestep, latents: states.append(latents.clone()),
            )
        seconds = time.perf_counter() - started
        used = samples.grain_maps[0]
        count = min(STATES, len(states))
        before = [states[round((i + 1) * len(states) / count) - 1] for i in range(count - 1)]
        shown = samples.uint8()  # the last state; the others decoded together may round differently from it alone
        if before:
            with torch.no_grad():
                maps = used.to(self.model.device).expand(len(before), -1, -1)
                decoded = self.model.vae.decode(torch.cat(before) / self.model.vae.scaling_factor, maps)
            shown = np.concatenate([pictures.to_pictures(decoded), shown])
        tokens, most = self.tokens(used), self.tokens(self.new_map(self.model.num_grains - 1))
        cost = f"{tokens:,} tokens of at most {most:,} a step, {len(states)} steps, {1000 * seconds:,.0f} ms"
        return Result(shown[-1], used, shown, cost)

    def tokens(self, grain_map: Tensor) -> int:
        """Tokens of one step: those of the regions and, where the map is finer, RefineNet's."""
        content = self.model.content_transformer
        if isinstance(content, DiT):
            height, width = content.config.image_size
            return height * width // (content.config.downsampling * content.config.patch_size) ** 2
        return grain_map.numel() + int(content.config.region_tokens(grain_map[None]).sum())

    @torch.no_grad()
    def rebuild(self, photo: np.ndarray, share: float) -> Result:
        """Encodes and decodes the centre of a photo, its regions of highest entropy fine.

        Args:
            photo: (rows, columns, 3) uint8.
            share: of the regions that are of the finest grain; the others are of the coarsest.

        Raises:
            UserError: no photo, a share outside 0 ... 1, or a VAE that has no grains.
        """
        if not 0 <= share <= 1:
            raise UserError(f"the fine share must be in 0 ... 1, got {share}")
        vae, picture = self._dynamic_vae(), self.crop(photo)
        images = self._images(picture)
        shares = [share] * (vae.config.num_grains - 1)
        grain_map = ranked_grains(vae.grain_map(images)[1].cpu(), shares, generator=[torch.Generator()])
        grain_map = grain_map.to(self.model.device)
        started = time.perf_counter()
        scaled = pictures.from_uint8(images)
        rebuilt = pictures.to_pictures(vae.decode(vae.encode(scaled, grain_map)[0], grain_map))[0]
        seconds = time.perf_counter() - started
        sides = torch.tensor(vae.config.code_sizes, device=grain_map.device)  # in cells, coarsest first
        codes = int(((sides[0] // sides) ** 2)[grain_map].sum())
        error = np.square(rebuilt.astype(np.float64) - picture).mean()
        psnr = 10 * math.log10(255**2 / error) if error else math.inf
        cost = f"PSNR {psnr:.1f} dB, {codes:,} latent codes, {1000 * seconds:,.0f} ms"
        return Result(rebuilt, grain_map[0].cpu(), np.empty((0, *picture.shape), np.uint8), cost)

    def _dynamic_vae(self) -> DynamicVAE:
        if not isinstance(self.model.vae, DynamicVAE):
            raise UserError(f"this model's {type(self.model.vae).__name__} has no grains")
        return self.model.vae

    def _images(self, picture: np.ndarray) -> Tensor:
        return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(self.model.device)
