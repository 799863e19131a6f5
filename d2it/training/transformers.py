"""Stage 2 on cached latents: the Dynamic Grain Transformer (section 3.2.2), the Dynamic Content Transformer (3.2.3)."""

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
from d2it.diffusion import (
    Diffusion,
    content_loss,
    grain_loss,
    grain_scheduler_for,
    grained_noise,
    grains_to_signal,
    level_grains,
    make_diffusion,
    random_grain_map,
    sample_content,
    sample_grain_maps,
)
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
from d2it.models.budget import BudgetRange, grain_tokens
from d2it.models.flops import FineTokens, count_macs, fine_tokens, kept_values
from d2it.models.repa import TEACHER, Alignment, check_block, known_facts, token_grid, trunk_of
from d2it.seeds import seed_of
from d2it.training.config import Config, LatentStageConfig
from d2it.training.learner import Batch, Learner, bf16
from d2it.training.meters import Meters, Work
from d2it.training.stage import (
    build,
    held_out_images,
    initialize,
    loader,
    model_errors,
    spread_over,
    to_device,
    uncompiled,
)

Transformer = DynamicGrainTransformer | DynamicContentTransformer | DiT


class GrainLosses(nn.Module):
    """Eq. 5 on a noised grain map, or one of levels of the entropy: batch -> (loss, logs, batch).

    Args:
        network: predicts the clean map.
        diffusion: the schedule.
    """

    def __init__(self, network: DynamicGrainTransformer, diffusion: Diffusion) -> None:
        super().__init__()
        self.network, self.diffusion = network, diffusion

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        config = self.network.config
        grains = batch["level_map" if config.has_levels else "grain_map"]
        clean = grains_to_signal(grains, config.levels)
        t = self.diffusion.sample_timesteps(len(grains), device=grains.device)
        noised = self.diffusion.q_sample(clean, torch.randn_like(clean), t)
        logits = self.network(noised, t, batch["label"], force_drop_ids=_dropped(self.network, batch))
        loss = grain_loss(logits, grains).mean()
        right = (logits.argmax(1) == grains).float().mean()
        return loss, {"grain/loss": loss, "grain/accuracy": right}, batch


class ContentLosses(nn.Module):
    """Eq. 11 on latents drawn from the cached posterior: batch -> (loss, logs, batch).

    The posterior's draw and the noise have one value for each latent code. A plain DiT has no codes: every cell has its
    own.

    Args:
        network: predicts the noise.
        diffusion: the schedule.
        scale: latents times this have unit variance.
        dynamic: whether every code weighs alike; otherwise every cell does.
        alignment: with a teacher's features, which are a part of the batch; None is none.
        weight: of the alignment.
    """

    def __init__(
        self,
        network: DynamicContentTransformer | DiT,
        diffusion: Diffusion,
        scale: float,
        dynamic: bool = True,
        alignment: Alignment | None = None,
        weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.diffusion, self.scale, self.dynamic = network, diffusion, scale, dynamic
        self.alignment, self.weight = alignment, weight

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        config, grains = self.network.config, batch["grain_map"]
        given: dict[str, Any] = {}
        codes: dict[str, Any] = {}
        if isinstance(config, ContentTransformerConfig):
            codes = {"code_sizes": config.code_sizes}
            given = {"grain_map": grains, "capacity": batch["capacity"]}

        def draw() -> Tensor:
            return grained_noise(grains, config.in_channels, **codes) if codes else torch.randn_like(batch["mean"])

        latents = (batch["mean"] + batch["std"] * draw()) * self.scale
        noise = draw()
        t = batch.get("timesteps")
        if t is None:
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
            grain_map=grains if codes and self.dynamic else None,
            **codes,
        )
        loss = terms.loss.mean()
        logs = {"content/loss": loss, "content/mse": terms.mse.mean(), "content/vlb": terms.vlb.mean()}
        if self.alignment is not None and TEACHER in batch:  # held-out images have no features
            logs["content/repa"] = self.alignment(batch[TEACHER]).mean()
            loss = loss + self.weight * logs["content/repa"]
        return loss, logs, batch


def _dropped(network: Transformer, batch: Batch) -> Tensor | None:
    """Returns the label dropout mask of a batch, from the step's own random numbers, or None without classes."""
    if not network.config.num_classes:
        return None
    return network.label_dropout_mask(len(batch["grain_map"]), device=batch["grain_map"].device)


def count_tokens(batch: Batch, config: ContentTransformerConfig, capacity_step: float) -> Batch:
    """Returns the batch with its packed fine tokens ("fine") and the rows to allocate for them ("capacity").

    The loader's workers run this: the host has the lengths before the device has the maps, so it waits for nothing.
    Capacities are whole steps of all cells: shapes repeat, and with them the allocator's blocks.

    Args:
        batch: with "grain_map" on the host, and "timesteps" where they decide what is refined.
        config: of the network.
        capacity_step: share of all cells to which the capacity is rounded up.
    """
    grains = batch["grain_map"]
    if "timesteps" in batch:
        grains = config.refined_maps(grains, batch["timesteps"])
    fine = fine_tokens(grains, config)
    cells = batch["grain_map"].numel() * config.cells_per_region**2
    step = max(1, round(cells * capacity_step))
    capacity = min(cells, max(1, math.ceil(fine.rows / step)) * step)
    return batch | {"fine": fine, "capacity": capacity}


def find_levels(batch: Batch, edges: tuple[float, ...]) -> Batch:
    """Returns the batch with its "entropy" (B, h, w) as levels ("level_map", int64); the loader's workers run this.

    Args:
        batch: with "entropy" on the host, nats.
        edges: of the levels, both ends included.
    """
    others = {key: value for key, value in batch.items() if key != "entropy"}
    inner = torch.tensor(edges[1:-1], device="cpu")
    return others | {"level_map": (batch["entropy"][..., None] > inner).sum(dim=-1)}


def budget_range(budget: list[float] | None, network: Transformer) -> BudgetRange | None:
    """Returns what `content.budget` draws the shares of each image from; None where the thresholds decide.

    Raises:
        UserError: a budget that no map of this network spends, or a network that takes no maps.
    """
    if budget is None:
        return None
    if not isinstance(network, DynamicContentTransformer):
        raise UserError("configuration: content.budget has no effect on a plain DiT: leave it out")
    with model_errors("configuration: content"):
        return BudgetRange(budget[0], budget[1], grain_tokens(network.config))


def _unchanged(batch: Batch) -> Batch:
    return batch


def teacher_facts(config: Config, network: Transformer) -> dict[str, Any] | None:
    """Return what identifies the teacher's features in a cache, `content.repa`'s for this network; None without.

    Raises:
        UserError: no such teacher, or a block that the trunk has not.
    """
    repa = config.content.repa
    if repa.teacher is None:
        return None
    with model_errors("configuration: content.repa"):
        check_block(repa, len(trunk_of(network).blocks))
        facts = known_facts(repa.teacher)
    return facts | {"grid": list(token_grid(network))}


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
        self.bf16 = bf16(settings, world.device)
        torch.manual_seed(seed_of(config.run.seed, self.name, "weights"))
        self.network: Any = self.make(config, data)
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
                f"{self.name}.overrides.attention=flash_attn takes no float32: leave it at sdpa, or train in bf16 "
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
        return [Learner(self.name, self.make_losses(), self.settings, self.world, self.network)]

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
        return _unchanged

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
        trunk = self.network.multi_grained if hasattr(self.network, "multi_grained") else self.network.trunk
        return math.prod(side // trunk.patch for side in trunk.grid)

    def publish(self, meters: Meters, step: int) -> None:
        learner = self.learners[0]
        learner.share(Path(self.config.run.dir) / self.folder)
        with learner.ema.applied(), uncompiled(self.settings):
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


class GrainStage(LatentStage):
    """Stage 2a: the Dynamic Grain Transformer."""

    name = "grain"
    folder = "grain_transformer"

    @staticmethod
    def make(config: Config, data: LatentData) -> Transformer:
        given: dict[str, Any] = {"num_classes": config.data.num_classes, "diffusion": config.diffusion}
        given |= {"grid": data.grid, "num_grains": data.num_grains}
        with torch.device("meta"):  # it draws no weights: those below are the seed's first numbers
            plan = build(DynamicGrainTransformer, config.grain, "grain", **given).config
        if data.cache is not None and plan.has_levels:
            given["edges"] = tuple(data.cache.level_edges(plan.levels))
        return build(DynamicGrainTransformer, config.grain, "grain", **given)

    @staticmethod
    def reads(config: Config, network: Transformer) -> dict[str, Any]:
        return {"extras": ("entropy",)} if getattr(network.config, "has_levels", False) else {}

    @property
    def prepare(self) -> Callable[[Batch], Batch]:
        network = self.network.config
        return functools.partial(find_levels, edges=network.edges) if network.has_levels else _unchanged

    def make_losses(self) -> nn.Module:
        return GrainLosses(self.network, self.diffusion)

    def picture(self) -> np.ndarray:
        sample = self.config.sample
        true, labels, seeds = self.preview_batch()
        maps = sample_grain_maps(
            self.network,
            labels,
            seeds=seeds,
            scheduler=grain_scheduler_for(str(sample.scheduler), self.config.diffusion),
            steps=sample.grain_steps,
            autocast=self.autocast,
        ).cpu()
        if (network := self.network.config).has_levels:
            assert self.data.cache is not None
            shares = self.data.cache.shares_above(self.data.cache.thresholds)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            maps = level_grains(maps, network.levels, shares, generator=generators)
        both = torch.cat([true, maps]).numpy()
        side = max(1, 96 // both.shape[1])
        drawn = pictures.colour_grains(both, self.data.num_grains, side)
        return pictures.sheet(drawn, columns=len(seeds), rows=["of photos", "sampled"])


class ContentStage(LatentStage):
    """Stage 2b: the Dynamic Content Transformer. A preset of the plain DiT trains the baseline on the same latents."""

    name = "content"
    folder = "content_transformer"

    def __init__(
        self, config: Config, settings: LatentStageConfig, world: World, data: LatentData, vae: DynamicVAE | None
    ) -> None:
        super().__init__(config, settings, world, data, vae)
        #: What the cache must hold of REPA's teacher, and the projector onto it; both None without.
        self.teacher = teacher_facts(config, self.network)
        self.alignment: Alignment | None = None
        if self.teacher is not None:
            self.alignment = Alignment(self.network, config.content.repa, self.teacher["channels"])
            self.networks["repa"] = self.alignment

    @staticmethod
    def make(config: Config, data: LatentData) -> Transformer:
        given: dict[str, Any] = {
            "image_size": data.image_size,
            "in_channels": data.latent_shape[0],
            "num_classes": config.data.num_classes,
            "diffusion": config.diffusion,
        }
        if config.content.preset in DiT.presets and config.content.preset not in DynamicContentTransformer.presets:
            return build(DiT, config.content, "content", downsampling=data.downsampling[0], **given)
        return build(DynamicContentTransformer, config.content, "content", downsampling=data.downsampling, **given)

    @staticmethod
    def reads(config: Config, network: Transformer) -> dict[str, Any]:
        drawn = budget_range(config.content.budget, network)
        reads: dict[str, Any] = {} if drawn is None else {"shares": drawn}
        if teacher_facts(config, network) is not None:
            reads["extras"] = (TEACHER,)
        return reads

    def needs(self) -> dict[str, Any]:
        teacher = teacher_facts(self.config, self.network)
        return {} if teacher is None else {TEACHER: teacher}

    def make_losses(self) -> nn.Module:
        settings = self.config.content
        return ContentLosses(
            self.network, self.diffusion, self.data.scale, settings.dynamic_loss, self.alignment, settings.repa.weight
        )

    def identity(self) -> dict[str, Any]:
        repa = self.config.content.repa
        return super().identity() | ({} if repa.teacher is None else {"repa": dataclasses.asdict(repa)})

    def synthetic(self, images: int, device: torch.device) -> Batch:
        batch = super().synthetic(images, device)
        if self.teacher is not None:
            batch[TEACHER] = torch.randn(images, self.teacher["channels"], *self.teacher["grid"], device=device)
        return batch

    def notes(self) -> list[str]:
        repa = self.config.content.repa
        more = (
            [f"REPA: trunk block {repa.block} follows {repa.teacher}, weight {repa.weight:g}"] if self.teacher else []
        )
        return [*super().notes(), *more]

    def work(self, batch: Batch) -> Work:
        work = super().work(batch)
        if self.alignment is None:
            return work
        return dataclasses.replace(work, macs=work.macs + work.images * self.dense_tokens * self.alignment.macs)

    def activations(self, batch: Batch) -> int:
        kept = super().activations(batch)
        if self.alignment is None:
            return kept
        values = len(batch["grain_map"]) * self.dense_tokens * self.alignment.kept
        return kept + values * (2 if self.bf16 else 4)

    @property
    def prepare(self) -> Callable[[Batch], Batch]:
        network = self.network.config
        if not isinstance(network, ContentTransformerConfig) or network.refine_until < 1:
            return _unchanged
        return functools.partial(count_tokens, config=network, capacity_step=self.config.content.capacity_step)

    def with_timesteps(self, batch: Batch, number: int) -> Batch:
        """Draws the timesteps on the host where the packed length follows from them, and counts the tokens."""
        network = self.network.config
        if not isinstance(network, ContentTransformerConfig) or network.refine_until == 1:
            return batch
        step, micro = divmod(number, self.settings.accumulate)
        seed = seed_of(self.config.run.seed, self.name, "timesteps", step, self.world.rank, micro)
        t = self.diffusion.sample_timesteps(len(batch["grain_map"]), generator=torch.Generator().manual_seed(seed))
        if self.world.device.type == "cuda":
            t = t.pin_memory()  # as the loader's tensors: the copy waits for nothing
        return count_tokens(batch | {"timesteps": t}, network, self.config.content.capacity_step)

    def synthetic_maps(self, images: int) -> Tensor:
        drawn = budget_range(self.config.content.budget, self.network)
        if drawn is None:
            return super().synthetic_maps(images)
        generators = [torch.Generator().manual_seed(i) for i in range(images)]
        return random_grain_map(self.data.grid, drawn(1.0), self.data.num_grains, generator=generators)

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
        images = pictures.magnify(images, len(seeds))
        drawn = pictures.outline_grains(images, grains.numpy(), self.data.num_grains)
        return pictures.sheet(np.concatenate([images, drawn]), columns=len(seeds), rows=["sample", "its grains"])
