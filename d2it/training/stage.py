"""What the stages share: models from the configuration, loaders, and errors of one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from d2it.data import Loader, default_workers, open_source
from d2it.distributed import World
from d2it.errors import UserError, user_error
from d2it.models.base import Model
from d2it.models.dit import TransformerConfig
from d2it.models.finetune import start_from
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import Config, RunConfig, StageConfig
from d2it.training.learner import Batch, why_fp32

M = TypeVar("M", bound=Model)


def model_errors(where: str) -> contextlib.AbstractContextManager[None]:
    """Turns what a configuration value or a file makes a model raise into a UserError of one line."""
    return user_error(where, (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError))


def build(kind: type[M], settings: StageConfig, key: str, **given: Any) -> M:
    """Returns a new model.

    Args:
        kind: class of the model.
        settings: of the stage, with the preset and its overrides.
        key: name of the stage, for messages.
        given: settings of the model that follow from the data and the VAE.

    Raises:
        UserError: an unknown preset, a setting that does not fit, or an override of what is given.
    """
    clash = sorted(set(given) & set(settings.overrides))
    if clash:
        raise UserError(f"configuration: {key}.overrides.{clash[0]} follows from the data and the VAE: leave it out")
    with model_errors(f"configuration: {key}"):
        return kind.from_preset(settings.preset, **given, **settings.overrides)


def initialize(
    network: Model,
    settings: StageConfig,
    key: str,
    run: RunConfig,
    world: World,
    *,
    vae_sha256: str | None = None,
    any_vae: bool = False,
) -> tuple[str, ...]:
    """Gives a new network the weights of `<stage>.init`; a stage that has a checkpoint resumes from that instead.

    Args:
        network: new; on the meta device the configurations alone are compared.
        settings: of the stage.
        key: name of the stage.
        run: where its checkpoints are.
        world: the ranks.
        vae_sha256: of the VAE whose latents the network is trained on.
        any_vae: accept weights trained on the latents of another one.

    Returns:
        Lines for the start-up summary; none where the stage does not start from weights.

    Raises:
        UserError: no such folder, damaged weights, or ones of a model that does not fit.
    """
    if settings.init is None:
        return ()
    saved = Checkpoints(Path(run.dir) / "checkpoints" / key, world, {}).latest()
    if any(step is not None for step in world.gather(saved)):
        return ()
    with model_errors(f"configuration: {key}.init"):
        return start_from(network, settings.init, vae_sha256=vae_sha256, any_vae=any_vae)


def loader(
    config: Config,
    settings: StageConfig,
    source: Any,
    world: World,
    first: int,
    process: Callable[[Batch], Batch] | None = None,
) -> Loader:
    """Returns a loader of this rank's micro-batches from step `first` on."""
    return Loader(
        source,
        settings.batch_size // (world.size * settings.accumulate),
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        start=first * settings.batch_size,
        workers=workers(config, world),
        pin_memory=world.device.type == "cuda",
        process=process,
    )


def workers(config: Config, world: World) -> int:
    """Returns the number of decoding processes of a rank."""
    return default_workers(world.local_size) if config.data.workers is None else config.data.workers


HELD_OUT = 64  # images of data.held_out whose loss is measured


def held_out_images(config: Config) -> Batch | None:
    """Returns up to `HELD_OUT` images of `data.held_out`, spread over it, and their labels; None where it is not set.

    Raises:
        UserError: no images there, or more classes than the run has.
    """
    data = config.data
    if data.held_out is None:
        return None
    with model_errors("configuration: data.held_out"):
        source = open_source(data.held_out, data.image_size, upsample=data.upsample)
    if data.num_classes is not None:
        source.require_classes(data.num_classes, allow_missing=True)
    return source.fetch(spread_over(len(source), HELD_OUT), replace=True)


def check_batch(settings: StageConfig, key: str, world: World) -> None:
    """Raises UserError unless the batch can be split over ranks and micro-batches."""
    parts = world.size * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(
            f"configuration: {key}.batch_size={settings.batch_size} must be a multiple of {world.size} ranks x "
            f"{settings.accumulate} micro-batches"
        )


def check_weights(settings: StageConfig, key: str, world: World, config: TransformerConfig) -> None:
    """Raises UserError where the network's weights are to be bfloat16 and these ranks cannot train them."""
    if settings.weights != "bfloat16":
        return
    asked = f"configuration: {key}.weights=bfloat16"
    if why := why_fp32(settings, world, config):
        raise UserError(f"{asked} needs bf16: set {key}.precision=bf16, for auto is fp32 here: {why}")


def uncompiled(settings: StageConfig) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without compilation, for what is rare and has shapes of its own, such as pictures."""
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies the tensors without waiting (the loader's are page-locked); everything else stays as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def spread_over(total: int, count: int) -> list[int]:
    """Returns `count` of `total` places, evenly spread, not at equal distances: some sources repeat their classes."""
    count = min(count, total)
    return [(i * total // count + i) % total for i in range(count)]


def extreme_share(share: float) -> str | None:
    """Returns a warning if almost no region, or almost every one, is finer than the coarsest grain."""
    if 0.02 <= share <= 0.98:
        return None
    return (
        f"{share:.1%} of the regions are fine, so the grains make no difference: make thresholds for these images with "
        "python -m d2it.data.calibrate, and set dvae.calibration"
    )
