"""What the stages share: models from the configuration, loaders, errors of one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from d2it.data import Loader, default_workers
from d2it.distributed import World
from d2it.errors import UserError
from d2it.models.base import Model
from d2it.training.config import Config, StageConfig
from d2it.training.learner import Batch

M = TypeVar("M", bound=Model)


@contextlib.contextmanager
def user_error(where: str) -> Iterator[None]:
    """Let a ValueError or TypeError that a configuration value caused end as a UserError of one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def build(kind: type[M], settings: StageConfig, key: str, **given: Any) -> M:
    """A new model by its preset, the run's own facts and the configuration's overrides.

    Raises:
        UserError: what the model says of a preset or setting that does not fit; an override of what follows from
            the data or the VAE.
    """
    clash = sorted(set(given) & set(settings.overrides))
    if clash:
        raise UserError(f"configuration: {key}.overrides.{clash[0]} follows from the data and the VAE: leave it out")
    with user_error(f"configuration: {key}"):
        return kind.from_preset(settings.preset, **given, **settings.overrides)


def loader(
    config: Config,
    settings: StageConfig,
    source: Any,
    world: World,
    first: int,
    process: Callable[[Batch], Batch] | None = None,
) -> Loader:
    """This rank's micro-batches from step `first` on. The position is the number of images seen by all ranks."""
    parts = world.size * settings.accumulate
    workers = config.data.workers
    return Loader(
        source,
        settings.batch_size // parts,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        start=first * settings.batch_size,
        workers=default_workers(world.local_size) if workers is None else workers,
        pin_memory=world.device.type == "cuda",
        process=process,
    )


def check_batch(settings: StageConfig, key: str, world: World) -> None:
    """Raise UserError unless the batch can be split over ranks and micro-batches."""
    parts = world.size * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(
            f"configuration: {key}.batch_size={settings.batch_size} must be a multiple of {world.size} ranks x "
            f"{settings.accumulate} micro-batches"
        )


def uncompiled(settings: StageConfig) -> contextlib.AbstractContextManager[Any]:
    """Around what has shapes of its own and is rare: a picture is not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors copied without waiting (the loader's are page-locked); everything else as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def spread_over(total: int, count: int) -> list[int]:
    """`count` places of `total`, evenly spread, and off the beat of sources that repeat classes in turn."""
    count = min(count, total)
    return [(i * total // count + i) % total for i in range(count)]
