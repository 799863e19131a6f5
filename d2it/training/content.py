"""Stage 2b: the Dynamic Content Transformer on cached latents (section 3.2.3), with REPA where it is asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2it import pictures
from d2it.diffusion import Diffusion, content_loss, grained_noise, random_grain_map, sample_content
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import ContentTransformerConfig, DiT, DynamicContentTransformer, DynamicVAE
from d2it.models.budget import BudgetRange, grain_tokens
from d2it.models.flops import fine_tokens
from d2it.models.repa import TEACHER, Alignment, check_block, known_facts, token_grid, trunk_of
from d2it.seeds import seed_of
from d2it.training.config import Config, LatentStageConfig
from d2it.training.latents import LatentData, LatentStage, Transformer, label_dropout, unchanged
from d2it.training.learner import Batch
from d2it.training.meters import Work
from d2it.training.stage import build, model_errors


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
        out = self.network(noised, t, batch["label"], force_drop_ids=label_dropout(self.network, batch), **given)
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
            return unchanged
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
