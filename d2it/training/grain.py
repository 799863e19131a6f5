"""Stage 2a: the Dynamic Grain Transformer on the cache's grain maps or entropies (section 3.2.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2it import pictures
from d2it.diffusion import (
    Diffusion,
    grain_loss,
    grain_scheduler_for,
    grains_to_signal,
    level_grains,
    sample_grain_maps,
)
from d2it.models import DynamicGrainTransformer
from d2it.training.config import Config
from d2it.training.latents import LatentData, LatentStage, Transformer, label_dropout, unchanged
from d2it.training.learner import Batch
from d2it.training.stage import build


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
        logits = self.network(noised, t, batch["label"], force_drop_ids=label_dropout(self.network, batch))
        loss = grain_loss(logits, grains).mean()
        right = (logits.argmax(1) == grains).float().mean()
        return loss, {"grain/loss": loss, "grain/accuracy": right}, batch


def find_levels(batch: Batch, edges: tuple[float, ...]) -> Batch:
    """Returns the batch with its "entropy" (B, h, w) as levels ("level_map", int64); the loader's workers run this.

    Args:
        batch: with "entropy" on the host, nats.
        edges: of the levels, both ends included.
    """
    others = {key: value for key, value in batch.items() if key != "entropy"}
    inner = torch.tensor(edges[1:-1], device="cpu")
    return others | {"level_map": (batch["entropy"][..., None] > inner).sum(dim=-1)}


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
        return functools.partial(find_levels, edges=network.edges) if network.has_levels else unchanged

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
