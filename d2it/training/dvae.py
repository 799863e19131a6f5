"""Stage 1: the DynamicVAE (section 3.1) with its critic."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2it import pictures
from d2it.data import Calibration, ImageSource, SinglePass
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DynamicVAE, VAELoss
from d2it.models.base import pair
from d2it.seeds import seed_of
from d2it.training.config import Config
from d2it.training.learner import Batch, Learner
from d2it.training.meters import Meters, Work
from d2it.training.stage import build, loader, spread_over, to_device, uncompiled, user_error


class VaeLosses(nn.Module):
    """L1, LPIPS, KL and the adversarial term: batch -> (loss, logs, batch with the reconstruction)."""

    def __init__(self, network: DynamicVAE, criterion: VAELoss) -> None:
        super().__init__()
        self.network = network
        self._criterion = [criterion]  # in a list: the critic's parameters are not this module's

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        images = pictures.from_uint8(batch["image"])
        output = self.network(images)
        terms = self._criterion[0].generator(
            images,
            output,
            step=batch["step"],
            last_layer=self.network.last_layer,
            code_sizes=self.network.config.code_sizes,
        )
        logs = {f"dvae/{name}": value for name, value in terms.items()}
        logs["dvae/fine_ratio"] = (output.grain_map > 0).float().mean()
        return terms["loss"], logs, batch | {"reconstruction": output.reconstruction.detach()}


class CriticLosses(nn.Module):
    """The critic's hinge loss on the images and the reconstructions that the VAE left in the batch."""

    def __init__(self, criterion: VAELoss) -> None:
        super().__init__()
        self.network = criterion.discriminator
        self._criterion = [criterion]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        images = pictures.from_uint8(batch["image"])
        terms = self._criterion[0].discriminate(images, batch["reconstruction"], discriminator=self.network)
        return terms["loss"], {f"critic/{name}": value for name, value in terms.items()}, batch


def channels_last(vae: DynamicVAE) -> DynamicVAE:
    """Convolutions run fastest on channels-last tensors, on GPUs and CPUs alike."""
    return cast(DynamicVAE, vae.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def build_vae(config: Config) -> DynamicVAE:
    """An untrained VAE with the thresholds of its calibration.

    Raises:
        UserError: settings that do not fit each other, or a calibration for another entropy.
    """
    settings = config.dvae
    with user_error("configuration: dvae"):
        plan = DynamicVAE.preset_config(settings.preset, **settings.overrides)
    if any(side % plan.region_size for side in pair("data.image_size", config.data.image_size)):
        raise UserError(
            f"configuration: data.image_size must be a multiple of the VAE's region of {plan.region_size} pixels, "
            f"got {config.data.image_size}"
        )
    grains = plan.num_grains
    if "thresholds" in settings.overrides or grains == 1:
        return build(DynamicVAE, settings, "dvae")
    if len(settings.fine_ratios) != grains - 1:
        raise UserError(f"configuration: dvae.fine_ratios must have {grains - 1} values for {grains} grains")
    calibration = Calibration.load(settings.calibration)
    ours = {name: getattr(plan, name) for name in ("region_size", "num_bins", "value_range", "sigma", "normalize")}
    for key, value in ours.items():
        if calibration.kde[key] != value:
            raise UserError(
                f"configuration: dvae.calibration was made with {key}={calibration.kde[key]}, this VAE has {value}: "
                "make one with python -m d2it.data.calibrate"
            )
    return build(DynamicVAE, settings, "dvae", thresholds=tuple(calibration.thresholds(settings.fine_ratios)))


def vae_macs(vae: DynamicVAE, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of encoding and decoding one image, by torch's counter on tensors without data."""
    shadow = copy.deepcopy(vae).to("meta")
    rows, columns = (side // vae.config.region_size for side in image_size)
    cells = vae.config.code_sizes[0]
    latents = torch.empty(1, vae.config.latent_channels, rows * cells, columns * cells, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow.encoder(torch.empty(1, 3, *image_size, device="meta"))
        shadow.decoder(latents, torch.empty(1, rows, columns, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() // 2


class DvaeStage:
    """The VAE, and from `dvae.loss.disc_start` on its critic."""

    name = "dvae"

    def __init__(self, config: Config, world: World, source: ImageSource) -> None:
        self.config, self.settings, self.world, self.source = config, config.dvae, world, source
        torch.manual_seed(seed_of(config.run.seed, self.name, "weights"))
        self.vae = build_vae(config)
        with user_error("configuration: dvae.loss"):
            self.criterion = VAELoss(self.settings.loss).to(world.device)
        channels_last(self.vae)
        self.learners = [Learner("dvae", VaeLosses(self.vae, self.criterion), self.settings, world, self.vae)]
        if self.criterion.discriminator is not None:
            critic = CriticLosses(self.criterion)
            self.learners.append(Learner("critic", critic, self.settings, world, peak=self.settings.disc_lr))
        self.macs = vae_macs(self.vae, source.image_size)

    def identity(self) -> dict[str, Any]:
        loss = self.settings.loss
        return {
            "stage": self.name,
            "model": self.vae.config.__dict__ | {"scaling_factor": None},  # a result, not a setting
            "critic": None if loss.disc_start is None else [loss.disc_channels, loss.disc_layers],
            "data": {"images": len(self.source), "seed": self.config.run.seed},
        }

    def active(self, step: int) -> list[Learner]:
        return self.learners if self.criterion.adversarial(step) else self.learners[:1]

    def batches(self, first: int) -> Generator[Batch]:
        with loader(self.config, self.settings, self.source, self.world, first) as stream:
            for i, batch in enumerate(stream):
                step = first + i // self.settings.accumulate
                yield to_device(batch, self.world.device) | {"step": step}

    def notes(self) -> list[str]:
        loss, vae = self.settings.loss, self.vae.config
        thresholds = ", ".join(f"{t:.3f}" for t in vae.thresholds or ())
        lpips = (
            f"LPIPS {loss.perceptual_weight:g}" if self.criterion.lpips is not None else "no LPIPS (no weights given)"
        )
        critic = "no critic" if loss.disc_start is None else f"critic from step {loss.disc_start:,}"
        return [f"data: {self.source.description}", f"fine above {thresholds} nats; L1, {lpips}, KL, {critic}"]

    def work(self, batch: Batch) -> Work:
        images = len(batch["image"])
        return Work(images, 0, images * self.macs)

    def activations(self, batch: Batch) -> int | None:
        return None

    def synthetic(self) -> Batch:
        """A micro-batch of noise of the right shape: for dry runs and benchmarks."""
        size = self.settings.batch_size // (self.world.size * self.settings.accumulate)
        images = torch.randint(256, (size, 3, *self.source.image_size), dtype=torch.uint8)
        return to_device({"image": images, "step": self.settings.loss.disc_start or 0}, self.world.device)

    def publish(self, meters: Meters, step: int) -> None:
        learner = self.learners[0]
        with learner.ema.applied(), uncompiled(self.settings):
            self.vae.set_scaling_factor(1 / latent_deviation(self.vae, self.source, self.world))
            picture = reconstructions(self.vae, self.source, self.config.sample.images, self.world.device)
        learner.share(Path(self.config.run.dir) / "vae")
        meters.picture("dvae/reconstructions", picture, step)


@torch.no_grad()
def latent_deviation(vae: DynamicVAE, source: ImageSource, world: World, count: int = 512) -> float:
    """Standard deviation of posterior draws over all cells of `count` images spread over the source; of all ranks."""
    places = spread_over(len(source), count)
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    mine = places[world.rank :: world.size]
    with SinglePass(source, [mine[i : i + 16] for i in range(0, len(mine), 16)]) as batches:
        for batch in batches:
            mean, logvar, _, _ = vae.encode(pictures.from_uint8(batch["image"].to(world.device)))
            mean = mean.double()
            square = mean.square() + logvar.double().exp()
            total += torch.stack([mean.sum(), square.sum(), torch.tensor(float(mean.numel())).to(total)])
    first, second, cells = world.mean(total).tolist()
    return math.sqrt(second / cells - (first / cells) ** 2)


@torch.no_grad()
def reconstructions(vae: DynamicVAE, source: ImageSource, count: int, device: torch.device) -> np.ndarray:
    """Images evenly spread over the source, their reconstructions, and those with the grain map: three rows."""
    images = source.fetch(spread_over(len(source), count), replace=True)["image"]
    mean, _, grains, _ = vae.encode(pictures.from_uint8(images.to(device)))
    decoded = pictures.to_pictures(vae.decode(mean, grains))
    drawn = pictures.draw_grains(decoded, grains.cpu().numpy(), vae.config.num_grains)
    originals = images.permute(0, 2, 3, 1).numpy()
    return pictures.tile(np.concatenate([originals, decoded, drawn]), columns=len(images))
