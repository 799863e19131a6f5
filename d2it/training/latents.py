"""Stage 2 on cached latents: the data of both transformers' stages, and what the stages share."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2it import pictures
from d2it.data import LatentCache
from d2it.diffusion import Diffusion, make_diffusion
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE, DynamicVAEConfig
from d2it.models.flops import FineTokens, count_macs, kept_values
from d2it.models.repa import token_grid
from d2it.seeds import seed_of
from d2it.training.config import Config, LatentStageConfig
from d2it.training.learner import Batch, Learner, why_fp32
from d2it.training.meters import Meters, Work
from d2it.training.stage import held_out_images, initialize, loader, model_errors, spread_over, to_device, uncompiled

Transformer = DynamicGrainTransformer | DynamicContentTransformer | DiT


@dataclass(frozen=True)
class LatentData:
    """What stage 2 is trained on: a finished cache, or for a dry run what the VAE's configuration will give.

    Args:
        cache: None in a dry run without one.
        vae_sha256: of the weights of the VAE that made the latents; None where it is yet to be trained.
        images: number of images.
        sha256: of the cache's index, and so of its content.
        image_size: (H, W) in pixels.
        latent_shape: (C, Hf, Wf).
        grid: (h, w) of the grain maps.
        downsampling: factors, finest first.
        scale: latents times this have unit variance.
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
        """Number of grains."""
        return len(self.downsampling)

    @classmethod
    def of_cache(cls, cache: LatentCache) -> LatentData:
        """Returns the data of a finished cache."""
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
    def of_vae(
        cls, vae: DynamicVAEConfig, image_size: tuple[int, int], images: int, vae_sha256: str | None = None
    ) -> LatentData:
        """Returns the data that a VAE of this configuration will make of images of this size."""
        height, width = image_size
        fine, coarse = vae.downsampling[0], vae.downsampling[-1]
        return cls(
            cache=None,
            vae_sha256=vae_sha256,
            images=images,
            sha256="",
            image_size=image_size,
            latent_shape=(vae.latent_channels, height // fine, width // fine),
            grid=(height // coarse, width // coarse),
            downsampling=tuple(vae.downsampling),
            scale=vae.scaling_factor,
        )


def unchanged(batch: Batch) -> Batch:
    """Returns the batch: the workers of a stage that adds nothing run this."""
    return batch


def label_dropout(network: Transformer, batch: Batch) -> Tensor | None:
    """Returns the label dropout mask of a batch, from the step's own random numbers, or None without classes."""
    if not network.config.num_classes:
        return None
    return network.label_dropout_mask(len(batch["grain_map"]), device=batch["grain_map"].device)


class LatentStage(ABC):
    """What both transformers share: batches from the latent cache, one learner, maps and pictures to publish.

    Args:
        config: of the run.
        settings: of the stage.
        world: the ranks.
        data: the latents.
        vae: decodes the pictures; None where none are made.
    """

    name: str
    folder: str  # under run.dir, for the weights to share

    def __init__(
        self, config: Config, settings: LatentStageConfig, world: World, data: LatentData, vae: DynamicVAE | None
    ) -> None:
        self.config, self.settings, self.world, self.data, self.vae = config, settings, world, data, vae
        torch.manual_seed(seed_of(config.run.seed, self.name, "weights"))
        self.network: Any = self.make(config, data)
        self.bf16 = why_fp32(settings, world, self.network.config) is None
        self.start = self.initialize(self.network, config, world, data)
        if (reads := self.reads(config, self.network)) and data.cache is not None:
            data.cache.require(**self.needs())
            with torch.device("cpu"):
                self.data = dataclasses.replace(data, cache=data.cache.reading(**reads))
        self.network.vae_sha256 = data.vae_sha256
        self.kind = type(self.network)  # FSDP2 changes the class
        self.networks: dict[str, nn.Module] = {self.name: self.network}
        if self.network.config.attention == "flash_attn" and not self.bf16:
            raise UserError(
                f"{self.name}.overrides.attention=flash_attn takes no float32: leave it at auto, or train in bf16 "
                f"({self.name}.precision)"
            )

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """The noising process, on the device.

        Raises:
            UserError: a learned variance on a path that has none.
        """
        learns_sigma = getattr(self.network.config, "learn_sigma", False)
        with model_errors(f"configuration: {self.name}"):
            return make_diffusion(self.config.diffusion, learn_sigma=learns_sigma, device=self.world.device)

    @functools.cached_property
    def learners(self) -> list[Learner]:
        return [Learner(self.name, self.make_losses(), self.settings, self.world, self.bf16, self.network)]

    @staticmethod
    @abstractmethod
    def make(config: Config, data: LatentData) -> Transformer:
        """Returns the network, untrained.

        Raises:
            UserError: settings that do not fit the latents.
        """

    @classmethod
    def initialize(cls, network: Transformer, config: Config, world: World, data: LatentData) -> tuple[str, ...]:
        """Gives the network the weights of `<stage>.init`, as `d2it.training.stage.initialize` does."""
        settings: LatentStageConfig = getattr(config, cls.name)
        given: dict[str, Any] = {"vae_sha256": data.vae_sha256, "any_vae": settings.any_vae}
        return initialize(network, settings, cls.name, config.run, world, **given)

    @staticmethod
    def reads(config: Config, network: Transformer) -> dict[str, Any]:
        """Returns the arguments of `LatentCache` by which the stage's batches differ from the default.

        Raises:
            UserError: settings that do not fit the network.
        """
        return {}

    def needs(self) -> dict[str, Any]:
        """Return the facts of the cache beside the VAE's without which the stage cannot read it."""
        return {}

    @abstractmethod
    def make_losses(self) -> nn.Module:
        """Returns the network's losses."""

    def identity(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "model": {"kind": self.kind.__name__} | dataclasses.asdict(self.network.config),
            "data": {"images": self.data.images, "latents": self.data.sha256, "seed": self.config.run.seed},
        }

    def active(self, step: int) -> list[Learner]:
        return self.learners

    @property
    def prepare(self) -> Callable[[Batch], Batch]:
        """The function by which the loader's workers add to a batch."""
        return unchanged

    def batches(self, first: int) -> Generator[Batch]:
        assert self.data.cache is not None
        with loader(self.config, self.settings, self.data.cache, self.world, first, self.prepare) as stream:
            for number, batch in enumerate(stream, start=first * self.settings.accumulate):
                yield to_device(self.with_timesteps(batch, number), self.world.device)

    def with_timesteps(self, batch: Batch, number: int) -> Batch:
        """Returns this rank's micro-batch, the `number`th of the run, with its timesteps if the host draws them."""
        return batch

    @functools.cached_property
    def held_out(self) -> Batch | None:
        images = held_out_images(self.config)
        if images is None or self.vae is None:
            return None
        vae, found = self.vae.to(self.world.device), []
        with torch.no_grad():
            for part in images["image"].split(16):
                mean, logvar, grains, _ = vae.encode(pictures.from_uint8(part.to(self.world.device)))
                found.append((mean.cpu(), (0.5 * logvar).exp().cpu(), grains.cpu()))
        mean, std, grains = (torch.cat(each) for each in zip(*found))
        batch = {"mean": mean, "std": std, "grain_map": grains, "label": images["label"]}
        return to_device(self.with_timesteps(self.prepare(batch), 0), self.world.device)

    def synthetic(self, images: int, device: torch.device) -> Batch:
        """Returns a micro-batch of noise."""
        place: Any = {"device": "meta"} if device.type == "meta" else {}
        batch = {
            "mean": torch.randn(images, *self.data.latent_shape, **place),
            "std": torch.rand(images, *self.data.latent_shape, **place),
            "grain_map": self.synthetic_maps(images),
            "label": torch.zeros(images, dtype=torch.int64, device="cpu"),
        }
        for name in self.reads(self.config, self.network).get("extras", ()):
            batch[name] = torch.rand(images, *self.data.grid, device="cpu")
        return to_device(self.with_timesteps(self.prepare(batch), 0), device)

    def synthetic_maps(self, images: int) -> Tensor:
        """Returns grain maps on the host, all grains equally often."""
        return torch.randint(self.data.num_grains, (images, *self.data.grid), device="cpu")

    def notes(self) -> list[str]:
        data = self.data
        cache = data.cache.description if data.cache else "latents yet to be made"
        return [f"data: {cache}, {data.images:,} images", *self.start]

    def work(self, batch: Batch) -> Work:
        images, fine = len(batch["grain_map"]), batch.get("fine", FineTokens(0, 0))
        macs = count_macs(self.network.config, images, fine)
        return Work(images, images * self.dense_tokens + fine.rows, macs.total)

    def activations(self, batch: Batch) -> int:
        images, fine = len(batch["grain_map"]), batch.get("fine")
        hidden = 2 if self.bf16 or self.settings.compile or self.world.device.type != "cpu" else 1
        recompute = self.settings.activation_checkpointing
        values = kept_values(self.network.config, images, fine, recompute=recompute, hidden=hidden)
        return values * (2 if self.bf16 else 4)

    @property
    def dense_tokens(self) -> int:
        """Number of tokens of an image that pass through the dense blocks."""
        return math.prod(token_grid(self.network))

    def publish(self, meters: Meters, step: int) -> None:
        learner = self.learners[0]
        learner.share(Path(self.config.run.dir) / self.folder)
        with learner.averaged(), uncompiled(self.settings):
            picture = self.picture()
        meters.picture(f"{self.name}/samples", picture, step)

    def warning(self, figures: dict[str, float]) -> str | None:
        return None

    @abstractmethod
    def picture(self) -> np.ndarray:
        """Returns samples of the network as it is, for tensorboard."""

    def preview_batch(self) -> tuple[Tensor, Tensor | None, list[int]]:
        """Returns true grain maps spread over the cache, their labels, and seeds."""
        assert self.data.cache is not None
        count = min(self.config.sample.images, len(self.data.cache))
        batch = self.data.cache.fetch(spread_over(len(self.data.cache), count))
        labels = batch["label"] if self.network.config.num_classes else None
        return batch["grain_map"], labels, [seed_of(self.config.run.seed, "preview", i) for i in range(count)]

    @property
    def autocast(self) -> torch.dtype | None:
        """Autocast dtype of the samples, or None."""
        return torch.bfloat16 if self.bf16 else None
