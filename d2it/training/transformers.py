"""Stage 2 on cached latents: the Dynamic Grain Transformer (section 3.2.2), the Dynamic Content Transformer (3.2.3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2it import pictures
from d2it.data import LatentCache
from d2it.diffusion import (
    GaussianDiffusion,
    content_loss,
    grain_loss,
    grained_noise,
    grains_to_signal,
    sample_content,
    sample_grain_maps,
)
from d2it.diffusion.solvers import grain_scheduler_for
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import (
    ContentTransformerConfig,
    DiT,
    DynamicContentTransformer,
    DynamicGrainTransformer,
    DynamicVAE,
    DynamicVAEConfig,
)
from d2it.models.flops import FineTokens, count_macs, fine_tokens, kept_values
from d2it.seeds import seed_of
from d2it.training.config import Config, StageConfig
from d2it.training.learner import Batch, Learner
from d2it.training.meters import Meters, Work
from d2it.training.stage import build, loader, spread_over, to_device, uncompiled

Transformer = DynamicGrainTransformer | DynamicContentTransformer | DiT


class GrainLosses(nn.Module):
    """Eq. 5 on a noised grain map: batch -> (loss, logs, batch)."""

    def __init__(self, network: DynamicGrainTransformer, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.network, self.diffusion = network, diffusion

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        grains = batch["grain_map"]
        clean = grains_to_signal(grains, self.network.config.num_grains)
        t = self.diffusion.sample_timesteps(len(grains), device=grains.device)
        noised = self.diffusion.q_sample(clean, torch.randn_like(clean), t)
        logits = self.network(noised, t, batch["label"], force_drop_ids=_dropped(self.network, batch))
        loss = grain_loss(logits, grains).mean()
        right = (logits.argmax(1) == grains).float().mean()
        return loss, {"grain/loss": loss, "grain/accuracy": right}, batch


class ContentLosses(nn.Module):
    """Eq. 11 on latents drawn from the cached posterior: batch -> (loss, logs, batch).

    Posterior draw and noise are one value for each latent code. A plain DiT has no codes: every cell is its own.
    """

    def __init__(self, network: DynamicContentTransformer | DiT, diffusion: GaussianDiffusion, scale: float) -> None:
        super().__init__()
        self.network, self.diffusion, self.scale = network, diffusion, scale

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        config, grains = self.network.config, batch["grain_map"]
        given: dict[str, Any] = {}
        codes: dict[str, Any] = {}
        if isinstance(config, ContentTransformerConfig):
            codes = {"cells_per_region": config.cells_per_region, "code_sizes": config.code_sizes}
            given = {"grain_map": grains, "capacity": batch["capacity"]}

        def draw() -> Tensor:
            return grained_noise(grains, config.in_channels, **codes) if codes else torch.randn_like(batch["mean"])

        latents = (batch["mean"] + batch["std"] * draw()) * self.scale
        noise = draw()
        t = self.diffusion.sample_timesteps(len(grains), device=grains.device)
        noised = self.diffusion.q_sample(latents, noise, t)
        out = self.network(noised, t, batch["label"], force_drop_ids=_dropped(self.network, batch), **given)
        terms = content_loss(
            self.diffusion,
            out,
            x0=latents,
            xt=noised,
            noise=noise,
            t=t,
            grain_map=grains if codes else None,
            **codes,
        )
        loss = terms.loss.mean()
        return loss, {"content/loss": loss, "content/mse": terms.mse.mean(), "content/vlb": terms.vlb.mean()}, batch


def _dropped(network: Transformer, batch: Batch) -> Tensor | None:
    """One label dropout mask a step, from the step's own random numbers."""
    if not network.config.num_classes:
        return None
    return network.label_dropout_mask(len(batch["grain_map"]), device=batch["grain_map"].device)


def count_tokens(batch: Batch, config: ContentTransformerConfig, capacity_step: float) -> Batch:
    """The batch with its packed fine tokens ("fine") and the rows to allocate for them ("capacity").

    The loader's workers run this: the host knows the lengths before the device has the maps, so nobody waits.
    Capacities are whole steps of all cells: shapes repeat, and with them the allocator's blocks.
    """
    fine = fine_tokens(batch["grain_map"], config)
    cells = batch["grain_map"].numel() * config.cells_per_region**2
    step = max(1, round(cells * capacity_step))
    capacity = min(cells, max(1, math.ceil(fine.rows / step)) * step)
    return batch | {"fine": fine, "capacity": capacity}


def _unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class LatentData:
    """What stage 2 is trained on, known from a finished cache, or for a dry run from a VAE that is yet to be trained.

    Args:
        cache: None in a dry run without one.
        vae_sha256: of the weights of the VAE that made the latents; None in a dry run.
        images: how many; sha256: of the cache.
        image_size: (H, W); latent_shape: (C, Hf, Wf); grid: (h, w) of the grain maps.
        downsampling: finest first; scale: latents times this have unit variance.
    """

    cache: LatentCache | None
    vae_sha256: str | None
    images: int
    sha256: str
    image_size: tuple[int, int]
    latent_shape: tuple[int, ...]
    grid: tuple[int, ...]
    downsampling: tuple[int, ...]
    scale: float

    @property
    def num_grains(self) -> int:
        return len(self.downsampling)

    @classmethod
    def of_cache(cls, cache: LatentCache) -> LatentData:
        return cls(
            cache=cache,
            vae_sha256=cache.facts["vae"],
            images=len(cache),
            sha256=cache.sha256,
            image_size=cache.image_size,
            latent_shape=cache.latent_shape,
            grid=cache.grid,
            downsampling=tuple(cache.facts["downsampling"]),
            scale=float(cache.facts["scaling_factor"]),
        )

    @classmethod
    def of_vae(cls, vae: DynamicVAEConfig, image_size: tuple[int, int], images: int) -> LatentData:
        height, width = image_size
        fine, coarse = vae.downsampling[0], vae.downsampling[-1]
        return cls(
            cache=None,
            vae_sha256=None,
            images=images,
            sha256="",
            image_size=image_size,
            latent_shape=(vae.latent_channels, height // fine, width // fine),
            grid=(height // coarse, width // coarse),
            downsampling=tuple(vae.downsampling),
            scale=vae.scaling_factor,
        )


class LatentStage:
    """What both transformers share: batches from the latent cache, one learner, maps and pictures to publish."""

    name: str
    folder: str  # under run.dir, for the weights to share

    def __init__(
        self, config: Config, settings: StageConfig, world: World, data: LatentData, vae: DynamicVAE | None
    ) -> None:
        self.config, self.settings, self.world, self.data, self.vae = config, settings, world, data, vae
        torch.manual_seed(seed_of(config.run.seed, self.name, "weights"))
        self.network: Any = self.make(config, data)
        self.network.vae_sha256 = data.vae_sha256
        learns_sigma = getattr(self.network.config, "learn_sigma", False)
        self.diffusion = GaussianDiffusion(learn_sigma=learns_sigma, device=world.device)
        self.learners = [Learner(self.name, self.make_losses(), settings, world, self.network)]
        if self.network.config.attention == "flash_attn" and not self.learners[0].bf16:
            raise UserError(
                f"{self.name}.overrides.attention=flash_attn takes no float32: leave it at sdpa, or train in bf16 "
                f"({self.name}.precision)"
            )

    @staticmethod
    def make(config: Config, data: LatentData) -> Transformer:
        """The network, untrained.

        Raises:
            UserError: settings that do not fit the latents.
        """
        raise TypeError("a stage must say what it trains")

    def make_losses(self) -> nn.Module:
        """The network's losses."""
        raise TypeError(f"{type(self).__name__} must say how it trains")

    def identity(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "model": {"kind": self.learners[0].kind.__name__} | self.network.config.__dict__,
            "data": {"images": self.data.images, "latents": self.data.sha256, "seed": self.config.run.seed},
        }

    def active(self, step: int) -> list[Learner]:
        return self.learners

    @property
    def prepare(self) -> Callable[[Batch], Batch]:
        """What the loader's workers add to a batch."""
        return _unchanged

    def batches(self, first: int) -> Generator[Batch]:
        assert self.data.cache is not None
        with loader(self.config, self.settings, self.data.cache, self.world, first, self.prepare) as stream:
            for batch in stream:
                yield to_device(batch, self.world.device)

    def synthetic(self) -> Batch:
        """A micro-batch of the right shapes, half of its regions fine: for dry runs and benchmarks."""
        size = self.settings.batch_size // (self.world.size * self.settings.accumulate)
        grains = torch.randint(self.data.num_grains, (size, *self.data.grid))
        batch = {
            "mean": torch.randn(size, *self.data.latent_shape),
            "std": torch.rand(size, *self.data.latent_shape),
            "grain_map": grains,
            "label": torch.zeros(size, dtype=torch.int64),
        }
        return to_device(self.prepare(batch), self.world.device)

    def notes(self) -> list[str]:
        data = self.data
        return [f"data: {data.cache.description if data.cache else 'latents yet to be made'}, {data.images:,} images"]

    def work(self, batch: Batch) -> Work:
        images, fine = len(batch["grain_map"]), batch.get("fine", FineTokens(0, 0))
        macs = count_macs(self.network.config, images, fine)
        return Work(images, images * self.dense_tokens + fine.rows, macs.total)

    def activations(self, batch: Batch) -> int | None:
        images, fine = len(batch["grain_map"]), batch.get("fine")
        values = kept_values(self.network.config, images, fine, recompute=self.settings.activation_checkpointing)
        return values * (2 if self.learners[0].bf16 else 4)

    @property
    def dense_tokens(self) -> int:
        """Tokens of an image that pass through the dense blocks."""
        trunk = self.network.multi_grained if hasattr(self.network, "multi_grained") else self.network.trunk
        return math.prod(side // trunk.patch for side in trunk.grid)

    def publish(self, meters: Meters, step: int) -> None:
        learner = self.learners[0]
        learner.share(Path(self.config.run.dir) / self.folder)
        with learner.ema.applied(), uncompiled(self.settings):
            picture = self.picture()
        meters.picture(f"{self.name}/samples", picture, step)

    def picture(self) -> np.ndarray:
        """Samples of the network as it is, for tensorboard."""
        raise TypeError(f"{type(self).__name__} must say how it samples")

    def preview_batch(self) -> tuple[Tensor, Tensor | None, list[int]]:
        """True grain maps spread over the cache, their labels, and seeds."""
        assert self.data.cache is not None
        count = min(self.config.sample.images, len(self.data.cache))
        batch = self.data.cache.fetch(spread_over(len(self.data.cache), count))
        labels = batch["label"] if self.network.config.num_classes else None
        return batch["grain_map"], labels, [seed_of(self.config.run.seed, "preview", i) for i in range(count)]

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.learners[0].bf16 else None


class GrainStage(LatentStage):
    """Stage 2a."""

    name = "grain"
    folder = "grain_transformer"

    @staticmethod
    def make(config: Config, data: LatentData) -> Transformer:
        classes = config.data.num_classes
        given: dict[str, Any] = {"grid": data.grid, "num_grains": data.num_grains, "num_classes": classes}
        return build(DynamicGrainTransformer, config.grain, "grain", **given)

    def make_losses(self) -> nn.Module:
        return GrainLosses(self.network, self.diffusion)

    def picture(self) -> np.ndarray:
        sample = self.config.sample
        true, labels, seeds = self.preview_batch()
        maps = sample_grain_maps(
            self.network,
            labels,
            seeds=seeds,
            scheduler=grain_scheduler_for(sample.scheduler),
            steps=sample.grain_steps,
            autocast=self.autocast,
        )
        both = torch.cat([true, maps.cpu()]).numpy()
        side = max(1, 96 // both.shape[1])
        gray = np.full((len(both), both.shape[1] * side, both.shape[2] * side, 3), 128, np.uint8)
        return pictures.tile(pictures.draw_grains(gray, both, self.data.num_grains), columns=len(seeds))


class ContentStage(LatentStage):
    """Stage 2b; a preset of the plain DiT trains the baseline on the same latents."""

    name = "content"
    folder = "content_transformer"

    @staticmethod
    def make(config: Config, data: LatentData) -> Transformer:
        given: dict[str, Any] = {
            "image_size": data.image_size,
            "in_channels": data.latent_shape[0],
            "num_classes": config.data.num_classes,
        }
        if config.content.preset in DiT.presets and config.content.preset not in DynamicContentTransformer.presets:
            return build(DiT, config.content, "content", downsampling=data.downsampling[0], **given)
        return build(DynamicContentTransformer, config.content, "content", downsampling=data.downsampling, **given)

    def make_losses(self) -> nn.Module:
        return ContentLosses(self.network, self.diffusion, self.data.scale)

    @property
    def prepare(self) -> Callable[[Batch], Batch]:
        network = self.network.config
        if not isinstance(network, ContentTransformerConfig):
            return _unchanged
        return functools.partial(count_tokens, config=network, capacity_step=self.config.content.capacity_step)

    def picture(self) -> np.ndarray:
        assert self.vae is not None
        grains, labels, seeds = self.preview_batch()
        grained = isinstance(self.network.config, ContentTransformerConfig)
        latents = sample_content(
            self.network,
            grains if grained else None,
            labels,
            seeds=seeds,
            diffusion=self.diffusion,
            scheduler=self.config.sample.scheduler,
            steps=self.config.sample.steps,
            autocast=self.autocast,
        )
        vae = self.vae.to(self.world.device)
        images = pictures.to_pictures(vae.decode(latents / vae.scaling_factor, grains.to(self.world.device)))
        drawn = pictures.draw_grains(images, grains.numpy(), self.data.num_grains)
        return pictures.tile(np.concatenate([images, drawn]), columns=len(seeds))
