"""Trains what a variant needs with d2it's own stages, each of which goes on where it was stopped.

<work>/tier.json                        the tier that all of it is of
<work>/data/train.npz held_out.npz      the classes of the tier, cut out of the packs
<work>/vaes/<vae>/                      a run of the stages dvae, cache and grain
<work>/vaes/<vae>/held_out/             latents of the held-out images
<work>/vaes/<vae>/maps-<seed>.npz       grain maps of the samples, the same for all variants on the VAE
<work>/variants/<variant>/              a run of the stage content
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine  # noqa: F401, makes d2it importable
import numpy as np
import torch

from d2it import ops
from d2it.data import LatentCache, SinglePass, open_source
from d2it.distributed import World
from d2it.errors import UserError
from d2it.files import atomic_write, read_json
from d2it.models import ContentTransformerConfig, DynamicVAE
from d2it.models.flops import count_macs, fine_tokens
from d2it.models.repa import TEACHER, Alignment
from d2it.npz import save_arrays
from d2it.training.config import Config, load
from d2it.training.content import ContentStage
from d2it.training.latents import LatentData
from d2it.training.meters import read_log
from d2it.training.run import run
from quality.tiers import Tier, Variant

SIGMA = 0.10  # width of the average of the weights that is scored, at every point of a curve


@dataclass(frozen=True)
class Bench:
    """A tier in the folder of its work.

    Args:
        tier: what is trained.
        work: where everything is kept.
        world: one process.
        packs: the pack of the training and of the held-out images.
    """

    tier: Tier
    work: Path
    world: World
    packs: tuple[Path, Path]

    @property
    def data(self) -> tuple[Path, Path]:
        """The packs of the tier's classes, for training and held out."""
        return self.work / "data" / "train.npz", self.work / "data" / "held_out.npz"

    def vae(self, variant: Variant) -> str:
        """The name of the variant's VAE, which says its share of fine regions where that is not the VAE's own."""
        return variant.vae if variant.share is None else f"{variant.vae}-{round(100 * variant.share)}"

    def vae_folder(self, variant: Variant) -> Path:
        return self.work / "vaes" / self.vae(variant)

    def cache(self, variant: Variant) -> Path:
        """The latents of the training images; for REPA others, with the teacher's features."""
        return self.vae_folder(variant) / ("cache_repa" if "repa" in variant.content else "cache")

    def folder(self, name: str) -> Path:
        return self.work / "variants" / name

    def average(self, name: str, step: int) -> Path:
        """The folder of the weights that are scored after `step` steps."""
        return self.folder(name) / "averages" / "content" / f"step-{step:08d}" / f"{SIGMA:.3f}"


def digest(tier: Tier) -> str:
    """The first digits of a hash of all settings of a tier: results of two of them are not comparable."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(tier), sort_keys=True).encode()).hexdigest()[:12]


def prepare(bench: Bench) -> None:
    """Cut the tier's classes out of both packs.

    Raises:
        UserError: a pack that is not there, or without one of the classes; work of a tier with other settings.
    """
    kept = bench.work / "tier.json"
    if not kept.exists():
        write_json(kept, dataclasses.asdict(bench.tier) | {"digest": digest(bench.tier)})
    elif read_json(kept).get("digest") != digest(bench.tier):
        raise UserError(
            f"{kept}: the work of a tier with other settings; move {bench.work} away, or name another --work"
        )
    for source, target in zip(bench.packs, bench.data):
        if target.exists():
            continue
        if not source.is_file():
            raise UserError(f"{source}: no such pack of images; --train and --held-out name them")
        with np.load(source, allow_pickle=False) as pack:
            known = [str(name) for name in pack["classes"]]
            wanted = bench.tier.classes or tuple(known)
            if missing := [name for name in wanted if name not in known]:
                raise UserError(f"{source}: no class {missing[0]!r} among {', '.join(known)}")
            numbers = [known.index(name) for name in wanted]
            jpeg, offsets, labels = pack["jpeg"], pack["offsets"], pack["labels"]
        rows = [i for i in range(len(labels)) if labels[i] in numbers]
        if target == bench.data[1]:
            rows = evenly(rows, labels)[: bench.tier.held_out]
        files = [jpeg[offsets[i] : offsets[i + 1]] for i in rows]
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "jpeg": np.concatenate(files),
            "offsets": np.cumsum([0, *map(len, files)]),
            "labels": np.array([numbers.index(labels[i]) for i in rows]),
            "classes": np.array(wanted),
        }
        save_arrays(target, arrays)


def evenly(rows: Sequence[int], labels: np.ndarray) -> list[int]:
    """The rows, taken from each class in turn."""
    turns: dict[int, int] = {}
    order = []
    for row in rows:
        turn = turns[labels[row]] = turns.get(labels[row], -1) + 1
        order.append((turn, row))
    return [row for _, row in sorted(order)]


def configure(bench: Bench, folder: Path, stages: Sequence[str], settings: dict[str, Any]) -> Config:
    """The configuration of a run in `folder`; `settings` by key are the last word."""
    tier = bench.tier
    values = {
        "run.dir": folder,
        "run.device": bench.world.device.type,
        "run.stages": list(stages),
        "run.log_every": 20,
        "run.save_every": 100,
        "run.keep": 1,
        "run.publish_every": 0,
        "data.path": bench.data[0],
        "data.image_size": tier.image_size,
        "data.num_classes": classes(bench),
        "data.workers": 0 if bench.world.device.type == "cpu" else None,
        "cache.unit_size": 512,
        "sample.images": 1,  # the run's own pictures; the scores are made of others
        "sample.steps": 1,
        "sample.grain_steps": 1,
        **settings,
    }
    return load(None, [f"{key}={_yaml(value)}" for key, value in values.items()])


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_yaml, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def section(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a section by their keys; only overrides stay a dictionary."""
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "overrides"
        found |= section(f"{name}.{key}", value) if nested else {f"{name}.{key}": value}
    return found


def classes(bench: Bench) -> int:
    with np.load(bench.data[0], allow_pickle=False) as pack:
        return len(pack["classes"])


def thresholds(bench: Bench, region_size: int, bins: int, shares: Sequence[float]) -> list[float]:
    """The entropies that these shares of the training images' regions exceed, nats."""
    source = open_source(bench.data[0], bench.tier.image_size)
    found = []
    with SinglePass(source, 64) as batches:
        for batch in batches:
            found.append(ops.kde_entropy(batch["image"], region_size, num_bins=bins).flatten())
    entropies = torch.cat(found).double()
    return [float(entropies.quantile(1 - share)) for share in shares]


def train_vae(bench: Bench, name: str) -> None:
    """Train a VAE of the tier, encode both sets of images, and train its Grain Transformer."""
    tier, folder = bench.tier, bench.work / "vaes" / name
    sizes = {**tier.vae["overrides"], **tier.vaes[name]}
    settings = {**tier.vae, "overrides": sizes}
    if tier.shares[name]:
        region = sizes["downsampling"][-1]
        sizes["thresholds"] = thresholds(bench, region, sizes["num_bins"], tier.shares[name])
    run(configure(bench, folder, ["dvae", "cache"], section("dvae", settings)), bench.world)
    finish_vae(bench, folder)


def finish_vae(bench: Bench, folder: Path) -> None:
    """Encode the held-out images, and train the Grain Transformer where the VAE has more grains than one."""
    held_out = folder / "held_out"
    if not (held_out / "index.json").exists():
        given = {"data.path": bench.data[1], "cache.path": held_out, "cache.flips": False}
        run(configure(bench, folder, ["cache"], given), bench.world)
    if LatentCache(held_out).num_grains > 1 and not (folder / "grain_transformer").is_dir():
        run(configure(bench, folder, ["grain"], section("grain", bench.tier.grain)), bench.world)


def share_vae(bench: Bench, variant: Variant) -> None:
    """Give a trained VAE the thresholds of another share of fine regions, and encode the images anew."""
    assert variant.share is not None
    folder = bench.vae_folder(variant)
    if not (folder / "vae").is_dir():
        trained = bench.work / "vaes" / variant.vae
        vae = DynamicVAE.from_pretrained(trained / "vae")
        vae.set_thresholds(LatentCache(trained / "cache").quantiles([variant.share]))
        vae.save_pretrained(folder / "vae.part")
        (folder / "vae.part").rename(folder / "vae")
    run(configure(bench, folder, ["cache"], {}), bench.world)
    finish_vae(bench, folder)


def content_settings(bench: Bench, variant: Variant) -> dict[str, Any]:
    """The settings of the sections content and diffusion that train a variant, but for its steps."""
    tier = bench.tier
    overrides, depth = {**tier.content["overrides"], **variant.overrides}, tier.depth + variant.added
    settings = {**tier.content, **variant.content, "overrides": overrides}
    if variant.refine is None:
        settings["preset"] = "DiT-S/2"
        for key in ("window", "relative_bias"):
            overrides.pop(key, None)
        overrides["depth"] = depth
        overrides["patch_size"] = 2 if variant.vae == "fine" else 1
    elif variant.refine:
        overrides |= {"depth": depth - variant.refine, "refine_depth": variant.refine}
    else:  # RefineNet is there, and corrects nothing at any timestep
        overrides |= {"depth": depth, "refine_depth": 1, "refine_until": 0.0}
    return section("content", settings) | section("diffusion", variant.diffusion)


@dataclass(frozen=True)
class Plan:
    """How long a variant is trained.

    Args:
        macs: multiply-accumulates of a forward pass over an image, the mean over the cache.
        steps: of the training, a multiple of the tier's checkpoints.
        batch_size: images of a step.
        config: of the run.
    """

    macs: float
    steps: int
    batch_size: int
    config: Config


def plan(bench: Bench, name: str, variant: Variant) -> Plan:
    """Count what an image costs, and how many steps the tier's budget pays for."""
    tier = bench.tier
    given = content_settings(bench, variant) | {
        "run.seed": variant.seed,
        "cache.path": bench.cache(variant),
    }
    config = configure(bench, bench.folder(name), ["content"], given)
    cache = LatentCache(bench.cache(variant))
    with torch.device("meta"):
        whole = ContentStage.make(config, LatentData.of_cache(cache))
    images, network = len(cache), whole.config
    if isinstance(network, ContentTransformerConfig):
        fine = fine_tokens(cache.fetch(range(images))["grain_map"], network)
        counted = count_macs(network, images, fine)
        macs = (counted.dense + network.refine_until * counted.refine) / images
    else:
        macs = float(count_macs(network).total)
    if "repa" in variant.content:
        macs += network.num_tokens * Alignment(whole, config.content.repa, cache.facts[TEACHER]["channels"]).macs
    batch = config.content.batch_size
    steps = max(1, round(tier.budget / (3 * macs * batch * tier.checkpoints))) * tier.checkpoints
    given |= {
        "content.steps": steps,
        "run.save_every": min(100, steps // tier.checkpoints),
        "content.snapshot_every": steps // tier.checkpoints,
        "content.snapshot_sigmas": [SIGMA / 2, SIGMA],
    }
    return Plan(macs, steps, batch, configure(bench, bench.folder(name), ["content"], given))


def train_variant(bench: Bench, name: str, variant: Variant) -> Plan:
    """Train what the variant needs and is not there yet, then the variant."""
    prepare(bench)
    if not done(bench.work / "vaes" / variant.vae):
        train_vae(bench, variant.vae)
        mark(bench.work / "vaes" / variant.vae)
    if variant.share is not None and not done(bench.vae_folder(variant)):
        share_vae(bench, variant)
        mark(bench.vae_folder(variant))
    if not (bench.cache(variant) / "index.json").exists():
        given = content_settings(bench, variant) | {"cache.path": bench.cache(variant)}
        run(configure(bench, bench.vae_folder(variant), ["cache"], given), bench.world)
    made = plan(bench, name, variant)
    folder = bench.folder(name)
    if not done(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(bench.vae_folder(variant) / "vae", folder / "vae", dirs_exist_ok=True)
        run(made.config, bench.world)
        mark(folder)
    return made


def done(folder: Path) -> bool:
    return (folder / "done").exists()


def mark(folder: Path) -> None:
    with atomic_write(folder / "done") as path:
        path.write_text("")


def seconds_at(bench: Bench, name: str, step: int) -> float | None:
    """Seconds of training up to a step, from the run's log; loading included, start and pictures not.

    On a CPU they are those that the process computed, whatever else the machine did (None where an older d2it, which
    did not log them, wrote the log); on a GPU those that passed.
    """
    key = "cpu_seconds" if bench.world.device.type == "cpu" else "step_seconds"
    total, before = 0.0, 0
    for row in read_log(bench.folder(name) / "logs" / "content.jsonl"):
        if row["step"] <= step:
            if key not in row:
                return None
            total += row[key] * (row["step"] - before)
            before = row["step"]
    return total


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
