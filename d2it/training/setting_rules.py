"""What the values of a configuration must be: the range of every setting, and which settings go together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from d2it.diffusion import FLOW_SCHEDULERS, SCHEDULERS, GaussianDiffusion
from d2it.errors import UserError
from d2it.models.efficientnet import LITE
from d2it.training.float8 import RECIPES

STAGES = ("dvae", "cache", "grain", "content")


def settings_of(kind: type, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Yields (key, dataclass that has it, default) of every setting."""
    for each in dataclasses.fields(kind):
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if dataclasses.is_dataclass(default):
            yield from settings_of(type(default), f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, kind, default


def at(tree: Any, sections: Sequence[str]) -> Any:
    """Returns what lies at `section.key` in dictionaries and dataclasses."""
    for name in sections:
        tree = tree[name] if isinstance(tree, dict) else getattr(tree, name)
    return tree


Rule = tuple[Callable[[Any], bool], str]


def _between(low: float, high: float, expected: str, null: bool = False) -> Rule:
    return lambda value: (null and value is None) or (value is not None and low <= value <= high), expected


def _one_of(*values: Any) -> Rule:
    return lambda value: value in values, " or ".join("null" if v is None else str(v) for v in values)


_MOST = 2**31 - 1
_COUNT = _between(1, _MOST, "at least 1")
_NOT_NEGATIVE = _between(0, math.inf, "0 or more")
_POSITIVE = (lambda value: value is None or value > 0, "positive")
_SIDE = 16_384  # pixels; an image of that side is 805 MB

_STAGE_RULES: dict[str, Rule] = {
    "steps batch_size accumulate": _COUNT,
    "lr clip": _POSITIVE,
    "betas": (lambda b: len(b) == 2 and all(0 <= each < 1 for each in b), "two values in [0, 1)"),
    "weight_decay": _NOT_NEGATIVE,
    "warmup": _between(0, _MOST, "0 or more"),
    "schedule": _one_of("constant", "cosine"),
    "ema": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "precision": _one_of("auto", "bf16", "fp32"),
    "weights": _one_of("auto", "float32", "bfloat16"),
    "parallel": _one_of("ddp", "fsdp"),
    "float8": _one_of(None, *RECIPES),
}
_RULES: dict[str, Rule] = {
    "run.seed": _between(0, 2**63 - 1, "in 0 ... 2^63 - 1"),
    "run.device": _one_of("auto", "cpu", "cuda"),
    "run.stages": (lambda value: set(value) <= set(STAGES), f"among {', '.join(STAGES)}"),
    "run.log_every run.save_every run.keep run.skip_limit": _COUNT,
    "run.publish_every": _between(0, _MOST, "0 or more"),
    "data.crops": _COUNT,
    "data.image_size": (
        lambda value: (
            len(sides := value if isinstance(value, (list, tuple)) else [value, value]) == 2
            and all(type(side) is int and 1 <= side <= _SIDE for side in sides)
        ),
        f"a side or [height, width] in pixels, {_SIDE:,} at most",
    ),
    "data.num_classes": _between(1, _MOST, "null or at least 1", null=True),
    "data.workers": _between(0, 1024, "null or in 0 ... 1024", null=True),
    "data.crop": _one_of("center", "random"),
    "dvae.disc_lr": _POSITIVE,
    "dvae.float8": (lambda value: value is None, "null (its convolutions have no float8)"),
    "dvae.weights": (lambda value: value == "float32", "float32 (most of them are of convolutions)"),
    "dvae.parallel": (lambda value: value == "ddp", "ddp (the discriminator's weight needs whole gradients)"),
    "dvae.fine_ratios": (lambda value: all(0 <= r <= 1 for r in value), "shares in [0, 1]"),
    "dvae.loss.perceptual_weight dvae.loss.features_weight dvae.loss.kl_weight dvae.loss.disc_weight": _NOT_NEGATIVE,
    "dvae.loss.features": _one_of(None, *LITE),
    "dvae.loss.disc_start": _between(0, _MOST, "at least 0", null=True),
    "dvae.loss.disc_channels dvae.loss.disc_layers": _between(1, 4096, "at least 1"),
    "grain.snapshot_every content.snapshot_every": _between(0, _MOST, "0 or more"),
    "grain.snapshot_sigmas content.snapshot_sigmas": (
        # Their folders carry them with three decimals.
        lambda value: len(set(value)) == len(value) == 2 and all(0.01 <= s <= 0.28 and round(s, 3) == s for s in value),
        "two different widths in 0.01 ... 0.28, of three decimals at most",
    ),
    "dvae.budget content.budget": (
        lambda value: (
            value is None
            or (len(value) == 2 and all(isinstance(v, (int, float)) for v in value) and 0 < value[0] <= value[1] <= 1)
        ),
        "null or [least, most], shares of the tokens in (0, 1]",
    ),
    "content.repa.block content.repa.hidden": _between(1, _MOST, "at least 1"),
    "content.repa.weight": _NOT_NEGATIVE,
    "content.capacity_step": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "cache.batch_size cache.unit_size": _COUNT,
    "sample.images sample.batch_size": _COUNT,
    # Checked now: samples are first drawn when a stage publishes, days later.
    "sample.steps sample.grain_steps": _between(1, GaussianDiffusion().num_timesteps, "in 1 ... 1000"),
    "sample.guidance": _NOT_NEGATIVE,
}


def check(config: Any) -> None:
    """Checks a `d2it.training.config.Config`, and names the scheduler where none is.

    Raises:
        UserError: a value is out of range; it names the first such setting.
    """

    def fail(key: str, expected: str) -> None:
        raise UserError(f"configuration: {key} must be {expected}, got {at(config, key.split('.'))!r}")

    for key, _, default in settings_of(type(config)):
        value = at(config, key.split("."))
        if not _finite(value):
            fail(key, "finite and below 2^63")
        if isinstance(default, list) and not all(isinstance(each, (int, float, str)) for each in value or ()):
            fail(key, "a list without lists in it")  # OmegaConf lets [[1]] through as a list of numbers
    rules = {f"{stage}.{key}": rule for stage in ("dvae", "grain", "content") for key, rule in _each(_STAGE_RULES)}
    for key, (allowed, expected) in [*rules.items(), *_each(_RULES)]:
        if not allowed(at(config, key.split("."))):
            fail(key, expected)
    for stage in ("grain", "content"):
        settings = getattr(config, stage)
        if settings.weights == "bfloat16":
            if settings.precision == "fp32":
                fail(f"{stage}.weights", f"auto or float32 where {stage}.precision is fp32")
            if settings.parallel == "fsdp":  # a gathered copy is rounded already
                fail(f"{stage}.weights", f"auto or float32 where {stage}.parallel is fsdp, which rounds its shards")
            if settings.float8 is not None:
                fail(f"{stage}.weights", f"auto or float32 where {stage}.float8 rounds them itself")
    linear = config.diffusion.path == "linear"
    known = FLOW_SCHEDULERS if linear else SCHEDULERS
    if config.sample.scheduler is None:
        config.sample.scheduler = "euler" if linear else "ddim"
    if config.sample.scheduler not in known:
        fail("sample.scheduler", f"one of {', '.join(known)}")
    classes, names = config.data.num_classes, config.data.class_names
    if classes is None and config.sample.guidance != 1:
        fail("sample.guidance", "1 where data.num_classes is null")
    if names is not None and len(names) != classes:
        fail("data.class_names", f"null or {classes or 0} names (data.num_classes)")


def _each(rules: dict[str, Rule]) -> list[tuple[str, Rule]]:
    return [(key, rule) for keys, rule in rules.items() for key in keys.split()]


def _finite(value: Any) -> bool:
    """Returns whether all numbers in a value are finite, and its whole numbers of 64 bits."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, (int, float)) or (math.isfinite(value) and abs(value) < 2**63)
