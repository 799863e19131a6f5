"""Stage 1: the DynamicVAE (section 3.1) with its discriminator."""

from __future__ import annotations

import copy
import dataclasses
import functools
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
from d2it.models import DynamicVAE, DynamicVAEConfig, VAELoss
from d2it.models.budget import BudgetRange, grain_tokens
from d2it.seeds import seed_of
from d2it.training.config import Config
from d2it.training.learner import Batch, Learner, why_fp32
from d2it.training.meters import Meters, Work
from d2it.training.stage import (
    build,
    extreme_share,
    held_out_images,
    initialize,
    loader,
    model_errors,
    spread_over,
    to_device,
    uncompiled,
)


class VaeLosses(nn.Module):
    """L1, LPIPS, KL and the adversarial term: batch -> (loss, logs, batch with the reconstruction).

    Args:
        network: the VAE.
        criterion: its loss.
    """

    def __init__(self, network: DynamicVAE, criterion: VAELoss) -> None:
        super().__init__()
        self.network = network
        self._criterion = [criterion]  # in a list: the discriminator's parameters are not this module's

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        images = pictures.from_uint8(batch["image"])
        grains = None
        if "thresholds" in batch:  # each image's own, (B, k - 1)
            entropy = self.network.grain_map(images)[1]
            grains = (entropy[..., None] > batch["thresholds"][:, None, None]).sum(dim=-1)
        output = self.network(images, grains)
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


class DiscriminatorLosses(nn.Module):
    """The discriminator's hinge loss on the images and the reconstructions that the VAE left in the batch.

    Args:
        criterion: the VAE's loss, with the discriminator.
    """

    def __init__(self, criterion: VAELoss) -> None:
        super().__init__()
        self.network = criterion.discriminator
        self._criterion = [criterion]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Batch]:
        images = pictures.from_uint8(batch["image"])
        terms = self._criterion[0].discriminate(images, batch["reconstruction"])
        return terms["loss"], {f"discriminator/{name}": value for name, value in terms.items()}, batch


def channels_last(vae: DynamicVAE) -> DynamicVAE:
    """Gives a VAE the memory format in which convolutions run fastest, on GPUs and CPUs alike."""
    return cast(DynamicVAE, vae.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def build_vae(config: Config) -> DynamicVAE:
    """Returns an untrained VAE with its own thresholds, or those of its calibration.

    Raises:
        UserError: settings that do not fit each other, or a calibration of other images or another entropy.
    """
    settings = config.dvae
    overrides = {k: v for k, v in settings.overrides.items() if k != "thresholds" or v not in (None, [], ())}
    with model_errors("configuration: dvae"):
        known = {**DynamicVAE.presets.get(settings.preset, {}), **overrides}
        grains = len(known.get("downsampling", DynamicVAEConfig.downsampling))
        # Three grains have no thresholds of their own; the calibration's come below.
        plan = DynamicVAE.preset_config(settings.preset, **{"thresholds": tuple(range(1, grains)), **overrides})
    height, width = config.data.image_size
    if height % plan.region_size or width % plan.region_size:
        raise UserError(
            f"configuration: data.image_size must be a multiple of the VAE's region of {plan.region_size} pixels, "
            f"got {height} x {width}"
        )
    if plan.num_grains == 1 or "thresholds" in overrides:
        if settings.calibration is not None:
            why = "beside dvae.overrides.thresholds: set dvae.overrides.thresholds=null to use the calibration"
            if plan.num_grains == 1:
                why = "on a VAE of one grain: leave it out"
            raise UserError(f"configuration: dvae.calibration={settings.calibration} has no effect {why}")
        return build(DynamicVAE, settings, "dvae")
    if len(settings.fine_ratios) != plan.num_grains - 1:
        raise UserError(
            f"configuration: dvae.fine_ratios must have {plan.num_grains - 1} values for {plan.num_grains} grains"
        )
    calibration = Calibration.load(settings.calibration, region_size=plan.region_size)
    try:
        calibration.require(image_size=(height, width), **plan.entropy)
    except UserError as error:
        raise UserError(
            f"configuration: dvae.calibration={settings.calibration or 'null (the one shipped)'}: {error} "
            f"--image-size {height} {width} --region-size {plan.region_size}, or set dvae.overrides.thresholds"
        ) from None
    thresholds = tuple(calibration.thresholds(settings.fine_ratios))
    return build(DynamicVAE, dataclasses.replace(settings, overrides=overrides), "dvae", thresholds=thresholds)


def budget_range(config: Config, vae: DynamicVAEConfig) -> tuple[BudgetRange, Calibration] | None:
    """Returns what `dvae.budget` draws each image's shares from, and the calibration that makes them thresholds.

    Raises:
        UserError: a budget that no map of this VAE spends, or thresholds that no calibration made.
    """
    budget = config.dvae.budget
    if budget is None:
        return None
    if vae.num_grains == 1:
        raise UserError("configuration: dvae.budget has no effect on a VAE of one grain: leave it out")
    if config.dvae.overrides.get("thresholds"):
        raise UserError(
            "configuration: dvae.budget takes thresholds from a calibration: set dvae.overrides.thresholds=null, and "
            "dvae.calibration to a file of python -m d2it.data.calibrate"
        )
    with model_errors("configuration: dvae"):
        drawn = BudgetRange(budget[0], budget[1], grain_tokens(vae))
    return drawn, Calibration.load(config.dvae.calibration, region_size=vae.region_size)


def vae_costs(vae: DynamicVAE, criterion: VAELoss, image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the costs of one image, counted on tensors without data.

    Returns:
        Multiply-accumulates of encoding and decoding; bytes that a training step with VAE, discriminator and LPIPS
        keeps for the backward pass in float32.
    """
    shadow = copy.deepcopy(vae).to("meta").requires_grad_()
    parts = [part for part in (criterion.discriminator, criterion.lpips, criterion.features) if part is not None]
    networks = [copy.deepcopy(part).to("meta") for part in parts]
    weights = {p.untyped_storage()._cdata for part in (shadow, *networks) for p in part.parameters()}
    rows, columns = (side // vae.config.region_size for side in image_size)
    cells = vae.config.code_sizes[0]
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter:
            shadow.encoder(torch.empty(1, 3, *image_size, device="meta"))
            latents = torch.empty(1, vae.config.latent_channels, rows * cells, columns * cells, device="meta")
            image = shadow.decoder(latents, torch.empty(1, rows, columns, dtype=torch.int64, device="meta"))
        for part, network in zip(parts, networks):
            network(*(image,) if part is criterion.discriminator else (image, image))
    return counter.get_total_flops() // 2, sum(storage.nbytes() for storage in kept.values())


class DvaeStage:
    """Stage 1: the VAE, and from `dvae.loss.disc_start` on its discriminator.

    Args:
        config: of the run.
        world: the ranks.
        source: the images.
    """

    name = "dvae"

    def __init__(self, config: Config, world: World, source: ImageSource) -> None:
        self.config, self.settings, self.world, self.source = config, config.dvae, world, source
        torch.manual_seed(seed_of(config.run.seed, self.name, "weights"))
        vae = build_vae(config)
        self.start = initialize(vae, self.settings, self.name, config.run, world)
        self.vae = channels_last(vae)
        self.bf16 = why_fp32(self.settings, world, vae.config) is None
        with model_errors("configuration: dvae.loss"):
            self.criterion = VAELoss(self.settings.loss)
        self.networks: dict[str, nn.Module] = {"dvae": self.vae}
        if self.criterion.discriminator is not None:
            self.networks["discriminator"] = self.criterion.discriminator
        self.macs, self.kept = vae_costs(self.vae, self.criterion, source.image_size)
        self.drawn = budget_range(config, vae.config)

    @functools.cached_property
    def learners(self) -> list[Learner]:
        self.criterion.to(self.world.device)
        given: dict[str, Any] = {"settings": self.settings, "world": self.world, "bf16": self.bf16}
        made = [Learner("dvae", VaeLosses(self.vae, self.criterion), network=self.vae, **given)]
        if self.criterion.discriminator is not None:
            discriminator = DiscriminatorLosses(self.criterion)
            made.append(Learner("discriminator", discriminator, peak=self.settings.disc_lr, **given))
        return made

    def identity(self) -> dict[str, Any]:
        loss, world = self.settings.loss, self.world
        # One rank reads the sizes of all files.
        mine = world.together(lambda: self.source.fingerprint() if world.first else None)
        fingerprint = world.gather(mine)[0]
        return {
            "stage": self.name,
            "model": self.vae.config.__dict__ | {"scaling_factor": None},  # a result, not a setting
            "discriminator": None if loss.disc_start is None else [loss.disc_channels, loss.disc_layers],
            "data": {"images": len(self.source), "fingerprint": fingerprint, "seed": self.config.run.seed},
        }

    def active(self, step: int) -> list[Learner]:
        return self.learners if self.criterion.adversarial(step) else self.learners[:1]

    def batches(self, first: int) -> Generator[Batch]:
        with loader(self.config, self.settings, self.source, self.world, first) as stream:
            for number, batch in enumerate(stream, start=first * self.settings.accumulate):
                step, micro = divmod(number, self.settings.accumulate)
                batch |= self.thresholds(len(batch["image"]), step, micro)
                yield to_device(batch, self.world.device) | {"step": step}

    def thresholds(self, images: int, step: int, micro: int) -> Batch:
        """Returns each image's own thresholds where `dvae.budget` draws them: {"thresholds": (B, k - 1) nats}."""
        if self.drawn is None:
            return {}
        drawn, calibration = self.drawn
        seed = seed_of(self.config.run.seed, self.name, "budget", step, self.world.rank, micro)
        uniform = torch.rand(images, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64)
        limits = torch.tensor([calibration.quantiles(drawn(each)) for each in uniform.tolist()], device="cpu")
        return {"thresholds": limits.pin_memory() if self.world.device.type == "cuda" else limits}

    @functools.cached_property
    def held_out(self) -> Batch | None:
        batch = held_out_images(self.config)
        return batch and to_device({"image": batch["image"], "step": -1}, self.world.device)  # without discriminator

    def notes(self) -> list[str]:
        loss, vae = self.settings.loss, self.vae.config
        thresholds = ", ".join(f"{t:.3f}" for t in vae.thresholds or ())
        budget = self.settings.budget
        drawn = "" if budget is None else f", in training at budgets of {budget[0]:g} ... {budget[1]:g}"
        lpips = (
            f"LPIPS {loss.perceptual_weight:g}" if self.criterion.lpips is not None else "no LPIPS (no weights given)"
        )
        features = "" if loss.features is None else f", {loss.features} {loss.features_weight:g}"
        start = "no discriminator" if loss.disc_start is None else f"discriminator from step {loss.disc_start:,}"
        return [
            f"data: {self.source.description}",
            f"fine above {thresholds} nats{drawn}; L1, {lpips}{features}, KL, {start}",
            *self.start,
        ]

    def work(self, batch: Batch) -> Work:
        images = len(batch["image"])
        return Work(images, 0, images * self.macs)

    def activations(self, batch: Batch) -> int:
        kept = self.kept // 2 if self.bf16 else self.kept
        return len(batch["image"]) * (kept // 4 if self.settings.activation_checkpointing else kept)

    def synthetic(self, images: int, device: torch.device) -> Batch:
        pixels = torch.randint(256, (images, 3, *self.source.image_size), dtype=torch.uint8, device=device)
        batch = to_device(self.thresholds(images, 0, 0), device)
        return {"image": pixels, "step": self.settings.loss.disc_start or 0} | batch

    def warning(self, figures: dict[str, float]) -> str | None:
        share = figures["dvae/fine_ratio"]
        return extreme_share(share) if self.vae.config.num_grains > 1 else None

    def publish(self, meters: Meters, step: int) -> None:
        learner = self.learners[0]
        with learner.averaged(), uncompiled(self.settings):
            self.vae.set_scaling_factor(1 / latent_deviation(self.vae, self.source, self.world))
            picture = reconstructions(self.vae, self.source, self.config.sample.images, self.world.device)
        learner.share(Path(self.config.run.dir) / "vae")
        meters.picture("dvae/reconstructions", picture, step)


@torch.no_grad()
def latent_deviation(vae: DynamicVAE, source: ImageSource, world: World, count: int = 512) -> float:
    """Returns the standard deviation of posterior draws over all cells of `count` images spread over the source.

    Raises:
        UserError: it is zero or not finite; on all ranks.
    """
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
    variance = second / cells - (first / cells) ** 2
    if not 0 < variance < math.inf:
        raise UserError(
            f"dvae: the latents have a variance of {variance}, so the VAE is not published: train it in another "
            "run.dir with a lower dvae.lr or dvae.clip",
            shared=True,
        )
    return math.sqrt(variance)


@torch.no_grad()
def reconstructions(vae: DynamicVAE, source: ImageSource, count: int, device: torch.device) -> np.ndarray:
    """Returns a picture of three rows: images of the source, their reconstructions, and those with the grain map."""
    batch = source.fetch(spread_over(len(source), count), replace=True)
    mean, _, grains, _ = vae.encode(pictures.from_uint8(batch["image"].to(device)))
    originals = batch["image"].permute(0, 2, 3, 1).numpy()
    decoded = pictures.to_pictures(vae.decode(mean, grains))
    originals, decoded = (pictures.magnify(images, len(images)) for images in (originals, decoded))
    drawn = pictures.outline_grains(decoded, grains.cpu().numpy(), vae.config.num_grains)
    names = source.classes
    return pictures.sheet(
        np.concatenate([originals, decoded, drawn]),
        columns=[names[label] for label in batch["label"]] if names else len(originals),
        rows=["photo", "rebuilt", "its grains"],
    )
