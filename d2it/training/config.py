"""The configuration of a run: dataclasses are the schema, YAML files the values, `section.key=value` the last word.

The docstrings of the dataclasses are also what `train.py --help` prints.

Example:
    config = load("configs/imagenet256_xl.yaml", ["data.path=/data/imagenet", "content.batch_size=512"])
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2it.diffusion import DiffusionConfig
from d2it.errors import UserError, reason_of
from d2it.files import check_yaml, read_bytes, yaml_reason
from d2it.models.losses import VAELossConfig
from d2it.models.repa import RepaConfig
from d2it.training.setting_rules import STAGES, at, check, settings_of

MISSING = "???"  # OmegaConf's mark of a value that has to be given


@dataclass
class RunConfig:
    """Where a run is kept, and what all its stages share.

    Args:
        dir: folder of everything the run writes.
        seed: of weights, order of the images, noise and samples.
        device: auto, cpu or cuda; auto is the GPU where there is one.
        stages: which of dvae, cache, grain and content to run; they run in this order.
        log_every: steps between two reports; the only time the host waits for the device.
        save_every: steps between two checkpoints.
        keep: checkpoints that a stage keeps.
        async_save: write checkpoints from a copy, in a thread, while training goes on.
        publish_every: steps between two writes of the averaged weights and pictures; 0 is at the end only.
        skip_limit: steps in a row without a finite gradient that stop the run.
        wandb: project of Weights & Biases; needs the wandb package.
        license: of the published weights, for their model card, such as apache-2.0 or cc-by-nc-4.0.
    """

    dir: str = "runs/d2it"
    seed: int = 0
    device: str = "auto"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    log_every: int = 50
    save_every: int = 5_000
    keep: int = 3
    async_save: bool = True
    publish_every: int = 10_000
    skip_limit: int = 20
    wandb: str | None = None
    license: str | None = None


@dataclass
class DataConfig:
    """The images.

    Args:
        path: a folder of images, an .npz pack or WebDataset shards (see docs/data.md), or demo; grain and content do
            without, given a cache.
        crops: images that the demo cuts from its photos.
        image_size: side of the images in pixels, or [height, width].
        num_classes: number of classes; null trains an unconditional model.
        allow_missing_classes: accept images of fewer classes than num_classes.
        class_names: names of the classes; null takes those of the source, such as the names of its folders.
        augment: flip half of the images.
        crop: center (ADM's) or random.
        upsample: enlarge images smaller than image_size instead of refusing them.
        workers: decoding processes of a rank; null is this rank's share of the cores, 8 at most.
        held_out: images that nothing is trained on, as path; each report has the loss of 64 of them.
    """

    path: str = MISSING
    crops: int = 2048
    image_size: Any = 256  # (height, width) after `load`
    num_classes: int | None = None
    allow_missing_classes: bool = False
    class_names: list[str] | None = None
    augment: bool = True
    crop: str = "center"
    upsample: bool = False
    workers: int | None = None
    held_out: str | None = None


@dataclass
class StageConfig:
    """What every trained stage has.

    Args:
        preset: name of the model's preset.
        overrides: settings of the model itself, as overrides.depth=12; see the Config class of the model.
        init: folder of weights to start from (a model's, a run's, or a converted release's); null starts from nothing.
        steps: optimiser steps of the stage.
        batch_size: images of a step, over all ranks and micro-batches.
        accumulate: micro-batches of a step.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        schedule: constant, or cosine (to zero at the last step).
        clip: norm that gradients are clipped to; null is no clipping, as in DiT.
        ema: decay of the averaged weights.
        precision: auto, bf16 or fp32; auto is bf16 autocast on a GPU that has it, and on a CPU that multiplies it for
            transformers of width 256 or more and VAEs of 64 channels or more.
        weights: of the blocks' Linears: float32, which bf16 autocast rounds in every step, or bfloat16, to which the
            optimiser rounds float32 masters, for bf16 with ddp; auto is bfloat16 there on a GPU.
        parallel: ddp, or fsdp (FSDP2: weights, gradients and optimiser state sharded over the ranks).
        compile: torch.compile, block by block.
        float8: products of the blocks through torchao: tensorwise, rowwise, or emulated on any device; null is off.
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
    """

    preset: str = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    steps: int = 400_000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    clip: float | None = None
    ema: float = 0.9999
    precision: str = "auto"
    weights: str = "auto"
    parallel: str = "ddp"
    compile: bool = False
    float8: str | None = None
    activation_checkpointing: bool = False


@dataclass
class DvaeConfig(StageConfig):
    """Stage 1 (section 3.1 of the paper): the DynamicVAE.

    Args:
        fine_ratios: shares of regions above each of the k - 1 thresholds; the calibration turns them into thresholds.
        calibration: JSON file of `python -m d2it.data.calibrate`; null is one of those shipped, for 256 x 256
            images in regions of 16 or 32 pixels.
        budget: range of the share of tokens that images spend, drawn for each image, such as [0.25,1.0]; null is the
            thresholds of fine_ratios for all.
        loss: weights of the loss terms and the discriminator.
        disc_lr: learning rate of the discriminator; null is lr.
    """

    preset: str = "f8f16"
    batch_size: int = 64
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weights: str = "float32"
    fine_ratios: list[float] = field(default_factory=lambda: [0.5])
    calibration: str | None = None
    budget: list[float] | None = None
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    disc_lr: float | None = None


@dataclass
class CacheConfig:
    """Latents (mean and deviation, both flips) and grain maps of every image, encoded once.

    Args:
        path: folder of the cache, which runs can share; null is <run.dir>/cache.
        batch_size: images that a rank encodes at once.
        unit_size: images of a file; at least as many files as ranks keep all ranks busy.
        flips: encode the mirror images too.
    """

    path: str | None = None
    batch_size: int = 64
    unit_size: int = 1024
    flips: bool = True


@dataclass
class LatentStageConfig(StageConfig):
    """What both stages on latents have.

    Args:
        any_vae: accept weights of init that were trained on the latents of another VAE.
        snapshot_every: steps between two snapshots of two averages, from which python -m d2it.training.ema rebuilds
            averages of any width; 0 keeps none.
        snapshot_sigmas: sigma_rel, the widths of those two averages.
    """

    any_vae: bool = False
    snapshot_every: int = 0
    snapshot_sigmas: list[float] = field(default_factory=lambda: [0.05, 0.10])


@dataclass
class GrainConfig(LatentStageConfig):
    """Stage 2a (section 3.2.2): the Dynamic Grain Transformer."""

    preset: str = "DiT-S"


@dataclass
class ContentConfig(LatentStageConfig):
    """Stage 2b (section 3.2.3): the Dynamic Content Transformer.

    Args:
        capacity_step: packed lengths are rounded up to this share of all cells, so that shapes repeat.
        budget: range of the share of tokens that images spend, drawn for each image and epoch, such as [0.25,1.0]; null
            is the map at the VAE's thresholds.
        dynamic_loss: weigh every latent code alike (Eq. 11); false weighs every cell alike, the ablation of Table 3.
        repa: alignment of a trunk block with the features of another network, which the stage cache computes.
    """

    preset: str = "D2iT-XL"
    capacity_step: float = 0.0625
    budget: list[float] | None = None
    dynamic_loss: bool = True
    repa: RepaConfig = field(default_factory=RepaConfig)


@dataclass
class SampleConfig:
    """How the run's own pictures are sampled; `sample.py` starts from the same values.

    Args:
        images: number of images.
        steps: denoising steps.
        grain_steps: denoising steps of the grain maps.
        scheduler: name of the scheduler; null is ddim, and euler on the linear path.
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: images at once on a GPU.
    """

    images: int = 16
    steps: int = 50
    grain_steps: int = 50
    scheduler: str | None = None
    guidance: float = 1.0
    batch_size: int = 16


@dataclass
class Config:
    """The whole configuration of a run; every key can be set on the command line as `section.key=value`.

    Args:
        run: where the run is kept, and what all its stages share.
        data: the images.
        dvae: stage 1.
        diffusion: how latents and grain maps are noised, and what is predicted; the defaults are the paper's.
        cache: the latents of all images.
        grain: stage 2a.
        content: stage 2b.
        sample: how the run's own pictures are sampled.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    grain: GrainConfig = field(default_factory=GrainConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The configurations that come with the package."""

_PATHS = (
    "run.dir",
    "data.path",
    "dvae.calibration",
    "dvae.loss.lpips_path",
    "cache.path",
    "dvae.init",
    "grain.init",
    "content.init",
    "content.repa.teacher",
)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Returns the schema's defaults, changed by the YAML file and then by the overrides.

    Text settings take the text as it is typed (`run.dir=007`, `data.class_names=[no,yes]`), and `~` at the start of a
    path is the home folder.

    Args:
        path: a YAML file, or the name of one that comes with the package (`imagenet256_xl`); it may start from another
            one: `extends: imagenet256_xl.yaml` beside it, or the name of one of the package.
        overrides: `section.key=value` each.

    Raises:
        UserError: a file that is not there or not YAML, a key that the schema does not have, a value of the wrong type
            or out of range.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    texts: dict[str, Any] = {}
    key = ""
    try:
        merged = OmegaConf.structured(Config)
        for layer, typed in [] if path is None else _files(_found(Path(path)), ()):
            texts |= _take_texts(layer, typed)
            merged = OmegaConf.merge(merged, layer)
        for item in overrides:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise UserError(f"{item!r} is not an override: write section.key=value")
            if key not in _texts():
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{key}={check_yaml(value)}"]))
            else:
                texts[key] = _text(key, value, _typed(key, value))
        key = ""
        merged.data.path = ""  # given below, or reported
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(f"no such configuration key: {error.full_key or error.key}{_did_you_mean(error)}") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        where = getattr(error, "full_key", None) or key or _interpolated(merged)
        raise UserError(f"configuration: {f'{where}: ' if where else ''}{yaml_reason(error)}") from None
    assert isinstance(config, Config)
    for key, text in {"data.path": MISSING, **texts}.items():
        *sections, name = key.split(".")
        setattr(at(config, sections), name, _expanded(key, text) if key in _PATHS and text else text)
    if config.data.path == MISSING and {"dvae", "cache"} & set(config.run.stages):
        raise UserError("configuration: data.path must be given: add data.path=...")
    check(config)
    size = config.data.image_size
    config.data.image_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return config


def _interpolated(merged: Any) -> str:
    """Returns the first whole section that is a `${...}`; "" where none is."""
    from omegaconf import OmegaConf

    for section in sorted({key.rpartition(".")[0] for key in setting_names()}):
        parent, _, name = section.rpartition(".")
        if OmegaConf.is_interpolation(OmegaConf.select(merged, parent) if parent else merged, name):
            return section
    return ""


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML, a record of the run; `load` reads it."""
    import yaml

    plain = dataclasses.asdict(config)
    plain["data"]["image_size"] = list(config.data.image_size)
    return yaml.safe_dump(plain, sort_keys=False)


def describe() -> str:
    """Returns every setting with its default and what it means, for `train.py --help`."""
    lines = ["settings, with their defaults (null is none):"]
    for key, kind, default in settings_of(Config):
        shown = json.dumps(default, separators=(",", ":")).replace('"', "")
        lines.append(f"  {f'{key}={shown}':<42} {_meaning(kind, key.split('.')[-1])}")
    return "\n".join(lines)


def setting_names() -> list[str]:
    """Returns the keys of all settings, as section.key."""
    return [key for key, _, _ in settings_of(Config)]


def _meaning(kind: type, name: str) -> str:
    """Returns the line of a field in its class's docstring, or in that of a base."""
    for each in kind.__mro__:
        found = re.search(rf"^ +(?:\w+, )*{name}(?:, \w+)*: ((?:.|\n {{9,}})+)", each.__doc__ or "", re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    raise KeyError(f"{kind.__name__} does not explain {name}")


@functools.cache
def _texts() -> dict[str, Any]:
    """Returns the settings that are text, or lists of text, with their types."""
    hints = {key: typing.get_type_hints(kind)[key.split(".")[-1]] for key, kind, _ in settings_of(Config)}
    return {key: hint for key, hint in hints.items() if hint in (str, str | None, list[str], list[str] | None)}


def _take_texts(values: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Removes the text settings from the values of a YAML file and returns them as they are typed there."""
    found = {}
    for key in _texts():
        *sections, name = key.split(".")
        try:
            section, raw = at(values, sections), at(typed, sections)
            present = name in section
        except (KeyError, TypeError, AttributeError):
            continue
        if present and isinstance(section, dict):
            empty = section.pop(name) is None
            found[key] = _text(key, "null" if empty else str(raw[name]), None if empty else raw[name])
    return found


def _typed(key: str, value: str) -> Any:
    """Returns the value of an override as text, or as a list of texts where the setting is one."""
    import yaml

    if _texts()[key] in (str, str | None):
        return value
    return yaml.load(check_yaml(value), Loader=yaml.BaseLoader)


def _text(key: str, value: str, typed: Any) -> Any:
    kind = _texts()[key]
    if value == "null" and kind in (str | None, list[str] | None):
        return None
    if kind in (str, str | None):
        if isinstance(typed, str) and typed.strip() and "\0" not in typed and _is_unicode(typed):
            return typed
        raise UserError(f"configuration: {key} must be Unicode text that is not empty, got {typed!r}")
    if isinstance(typed, list) and all(isinstance(each, str) for each in typed):
        return typed
    raise UserError(f"configuration: {key} must be a list of texts, such as [a,b], got {value!r}")


def _is_unicode(text: str) -> bool:
    """Returns whether a text can be written to a file; one from the command line may hold bytes that are none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _expanded(key: str, text: str) -> str:
    """Returns a path with the home folder in place of `~` or `~name` at its start."""
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise UserError(f"configuration: {key}: there is no home folder {text.partition('/')[0]}, got {text!r}")
    return path


def _found(path: Path) -> Path:
    """Returns the file of a path, or of the name of a configuration that comes with the package."""
    named = CONFIGS / f"{path}.yaml"
    return named if len(path.parts) == 1 and not path.exists() and named.is_file() else path


def _files(path: Path, seen: tuple[Path, ...]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns the YAML file's chain of `extends`, base first: values, and the same with every scalar as typed."""
    import yaml
    from omegaconf import OmegaConf

    try:
        text = read_bytes(path, 2**20).decode()
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        why = (error.strerror if isinstance(error, OSError) else None) or reason_of(error)
        line = f"no such configuration file: {path} (by name there are {names})"
        raise UserError(line if missing else f"{path}: {why}") from None
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(check_yaml(text)))
        typed = yaml.load(text, Loader=yaml.BaseLoader)
    except Exception as error:  # OmegaConf passes on whatever the YAML reader raises
        raise UserError(f"{path}: not a YAML configuration: {yaml_reason(error)}") from None
    if not isinstance(values, dict) or not isinstance(typed, dict):
        raise UserError(f"{path}: not a YAML configuration: expected section: key: value")
    base = values.pop("extends", None)
    if base is None:
        return [(values, typed)]
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must be the name of a file, got {base!r}")
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself")
    beside = path.parent / base
    return [*_files(beside if beside.exists() else _found(Path(base)), (*seen, path.resolve())), (values, typed)]


def _did_you_mean(error: Any) -> str:
    from omegaconf import OmegaConf

    section = getattr(error, "parent_node", None)
    known = [str(k) for k in section] if section is not None and OmegaConf.is_dict(section) else []
    close = difflib.get_close_matches(str(error.key), known, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there are: {', '.join(known)})" if known else ""
