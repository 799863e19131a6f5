"""Configuration: dataclasses are the schema, YAML presets the values, `key.sub=value` the last word.

Example:
    config = load("configs/imagenet256_xl.yaml", ["data.path=/data/imagenet", "content.batch_size=512"])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2it.diffusion import SCHEDULERS, GaussianDiffusion
from d2it.errors import UserError
from d2it.models.losses import VAELossConfig
from d2it.training.float8 import RECIPES

if TYPE_CHECKING:  # OmegaConf is imported where files and overrides are read: the stages run without it
    from omegaconf.errors import ConfigKeyError

MISSING = "???"  # OmegaConf's mark of a value that has to be given
STAGES = ("dvae", "cache", "grain", "content")


@dataclass
class RunConfig:
    """Where a run lives and what all its stages share."""

    dir: str = "runs/d2it"
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    log_every: int = 50  # steps between two readings of the device's meters: the only host synchronisation
    save_every: int = 5_000  # steps between checkpoints
    keep: int = 3  # checkpoints a stage keeps
    async_save: bool = True  # checkpoints are written by a thread, from a copy
    publish_every: int = 10_000  # steps between weights to share and pictures; 0: only at the end
    skip_limit: int = 20  # non-finite steps in a row that stop the run
    wandb: str | None = None  # project name; needs the wandb package


@dataclass
class DataConfig:
    """The images. `path` is whatever `d2it.data.open_source` reads, or "demo"."""

    path: str = MISSING
    crops: int = 2048  # of the demo photos
    image_size: Any = 256  # a side, or [height, width]
    num_classes: int | None = None  # None: unconditional
    class_names: list[str] | None = None  # null: the source's own, such as the names of its folders
    augment: bool = True  # horizontal flips
    crop: str = "center"  # ADM's centre crop, or random
    upsample: bool = False  # enlarge images smaller than image_size instead of refusing them
    workers: int | None = None  # decoding processes a rank; null: this rank's share of the cores, 8 at most


@dataclass
class StageConfig:
    """What every trained stage has."""

    preset: str = "???"
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of the model's own config
    steps: int = 400_000
    batch_size: int = 256  # images of one optimiser step, over all ranks and accumulated micro-batches
    accumulate: int = 1  # micro-batches of a step
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"  # constant, or cosine (to zero at the last step)
    clip: float | None = None  # gradient norm; None: no clipping, as DiT
    ema: float = 0.9999
    precision: str = "auto"  # auto: bf16 autocast on a GPU that has it, else fp32
    parallel: str = "ddp"  # or fsdp: parameters, gradients and optimiser state sharded (FSDP2)
    compile: bool = False  # torch.compile, block by block
    float8: str | None = None  # products of the blocks through torchao: tensorwise, rowwise; emulated on any device
    activation_checkpointing: bool = False


@dataclass
class DvaeConfig(StageConfig):
    """Stage 1, section 3.1."""

    preset: str = "f8f16"
    batch_size: int = 64
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    fine_ratios: list[float] = field(default_factory=lambda: [0.5])  # shares of regions above the k - 1 thresholds
    calibration: str | None = None  # JSON of `python -m d2it.data.calibrate`; null: the one shipped
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    disc_lr: float | None = None  # null: lr


@dataclass
class CacheConfig:
    """Latents (mean and deviation, both flips) and grain maps of every image, encoded once."""

    path: str | None = None  # null: <run.dir>/cache
    batch_size: int = 64  # images a rank encodes at once
    unit_size: int = 1024  # images of a file; at least as many files as ranks keep all ranks busy
    flips: bool = True  # encode the mirror images too


@dataclass
class GrainConfig(StageConfig):
    """Stage 2a, section 3.2.2."""

    preset: str = "DiT-S"


@dataclass
class ContentConfig(StageConfig):
    """Stage 2b, section 3.2.3."""

    preset: str = "D2iT-XL"
    capacity_step: float = 0.0625  # packed lengths are rounded up to this share of all cells: shapes repeat


@dataclass
class SampleConfig:
    """How the run's own previews and final pictures are drawn; `sample.py` starts from the same values."""

    images: int = 16
    steps: int = 50
    grain_steps: int = 50
    scheduler: str = "ddim"
    guidance: float = 1.0
    batch_size: int = 16


@dataclass
class Config:
    """The whole of it. Every key can be set on the command line as `section.key=value`."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    grain: GrainConfig = field(default_factory=GrainConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def load(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The schema's defaults, then the YAML file, then the overrides `section.key=value`.

    A YAML file may start from another one beside it: `extends: imagenet256_xl.yaml`.

    Raises:
        UserError: a file that is not there or not YAML, a key that the schema does not have, a value of
            the wrong type or out of range.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    layers = [] if path is None else _files(Path(path))
    try:
        for item in overrides:
            if "=" not in item:
                raise UserError(f"{item!r} is not an override: write section.key=value")
        merged = OmegaConf.structured(Config)
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(f"no such configuration key: {error.full_key or error.key}{_did_you_mean(error)}") from None
    except MissingMandatoryValue as error:
        raise UserError(f"configuration: {error.full_key or 'data.path'} must be given: add data.path=...") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"configuration: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, as a record of the run; `load` reads it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _files(path: Path) -> list[Any]:
    """The YAML file's chain of `extends`, base first."""
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        raise UserError(f"no such configuration file: {path}")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # OmegaConf passes on whatever the YAML reader raises
        raise UserError(f"{path}: not a YAML configuration: {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: not a YAML configuration: expected section: key: value")
    base = content.pop("extends", None)
    return [*(_files(path.parent / base) if base else []), content]


def _did_you_mean(error: ConfigKeyError) -> str:
    import difflib

    from omegaconf import OmegaConf

    section = getattr(error, "parent_node", None)
    known = [str(k) for k in section] if section is not None and OmegaConf.is_dict(section) else []
    close = difflib.get_close_matches(str(error.key), known, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there are: {', '.join(known)})" if known else ""


def _check(config: Config) -> None:
    def need(ok: bool, key: str, wish: str) -> None:
        if not ok:
            section, name = key.split(".")
            raise UserError(f"configuration: {key} must be {wish}, got {getattr(getattr(config, section), name)!r}")

    need(set(config.run.stages) <= set(STAGES), "run.stages", f"among {', '.join(STAGES)}")
    need(config.run.device in ("auto", "cpu", "cuda"), "run.device", "auto, cpu or cuda")
    for key in ("log_every", "save_every", "keep", "skip_limit"):
        need(getattr(config.run, key) >= 1, f"run.{key}", "at least 1")
    need(config.run.publish_every >= 0, "run.publish_every", "0 or more")
    need(config.data.crops >= 1, "data.crops", "at least 1")
    size = config.data.image_size
    sides = size if isinstance(size, list) else [size, size]
    whole = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sides)
    need(whole, "data.image_size", "a side or [height, width] in pixels")
    need(
        config.data.num_classes is None or config.data.num_classes >= 1,
        "data.num_classes",
        "null or at least 1",
    )
    need(config.data.workers is None or config.data.workers >= 0, "data.workers", "null, 0 or more")
    need(config.data.crop in ("center", "random"), "data.crop", "center or random")
    for name in ("dvae", "grain", "content"):
        stage = getattr(config, name)
        for key in ("steps", "batch_size", "accumulate"):
            need(getattr(stage, key) >= 1, f"{name}.{key}", "at least 1")
        need(stage.lr > 0, f"{name}.lr", "positive")
        need(
            len(stage.betas) == 2 and all(0 <= b < 1 for b in stage.betas),
            f"{name}.betas",
            "two values in [0, 1)",
        )
        need(stage.warmup >= 0, f"{name}.warmup", "0 or more")
        need(stage.clip is None or stage.clip > 0, f"{name}.clip", "null or positive")
        need(0 <= stage.ema < 1, f"{name}.ema", "in [0, 1)")
        need(stage.schedule in ("constant", "cosine"), f"{name}.schedule", "constant or cosine")
        need(stage.precision in ("auto", "bf16", "fp32"), f"{name}.precision", "auto, bf16 or fp32")
        need(stage.parallel in ("ddp", "fsdp"), f"{name}.parallel", "ddp or fsdp")
        need(stage.float8 in (None, *RECIPES), f"{name}.float8", f"null, {' or '.join(RECIPES)}")
    need(config.dvae.float8 is None, "dvae.float8", "null (its convolutions have no float8)")
    loss = config.dvae.loss
    for key, least in (("disc_start", 0), ("disc_channels", 1), ("disc_layers", 1)):
        value = getattr(loss, key)
        if value is not None and value < least:
            raise UserError(f"configuration: dvae.loss.{key} must be at least {least}, got {value}")
    need(config.dvae.parallel == "ddp", "dvae.parallel", "ddp (the critic's weight needs whole gradients)")
    need(all(0 <= r <= 1 for r in config.dvae.fine_ratios), "dvae.fine_ratios", "shares in [0, 1]")
    need(0 < config.content.capacity_step <= 1, "content.capacity_step", "in (0, 1]")
    need(config.cache.batch_size >= 1, "cache.batch_size", "at least 1")
    need(config.cache.unit_size >= 1, "cache.unit_size", "at least 1")
    for key in ("images", "batch_size"):
        need(getattr(config.sample, key) >= 1, f"sample.{key}", "at least 1")
    # Known now: samples are first drawn when a stage publishes, days later.
    most = GaussianDiffusion().num_timesteps
    for key in ("steps", "grain_steps"):
        need(1 <= getattr(config.sample, key) <= most, f"sample.{key}", f"in 1 ... {most}")
    need(config.sample.scheduler in SCHEDULERS, "sample.scheduler", f"one of {', '.join(SCHEDULERS)}")
    need(0 <= config.sample.guidance < math.inf, "sample.guidance", "finite and not negative")
    classes, names = config.data.num_classes, config.data.class_names
    need(classes is not None or config.sample.guidance == 1, "sample.guidance", "1 where data.num_classes is null")
    need(names is None or len(names) == classes, "data.class_names", f"null or {classes or 0} names (data.num_classes)")
