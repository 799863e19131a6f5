"""A training run from its configuration: the stages in order, then the whole model and its pictures.

A stage that has reached its last step is passed over, so the same command resumes wherever the run was stopped.

    <run.dir>/config.yaml           the resolved configuration of the latest start
    <run.dir>/checkpoints/<stage>/  for resuming
    <run.dir>/cache/                latents
    <run.dir>/logs/                 tensorboard, and a JSON line a report
    <run.dir>/vae/ grain_transformer/ content_transformer/ d2it.json
                                    the model to share: `D2iT.from_pretrained(<run.dir>)`
    <run.dir>/*.png                 reconstructions, samples, loss curves
    <run.dir>/report.html           all of it on one page
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from d2it import distributed, pictures
from d2it.data import DemoPhotos, ImageSource, LatentCache, build_cache, finish_cache, open_source
from d2it.distributed import World
from d2it.errors import Interrupted, UserError, out_of_memory, reason_of, run_command, user_error
from d2it.files import only_writer, sha256_of, write_text
from d2it.models import DynamicVAE
from d2it.models.repa import TEACHER, open_teacher
from d2it.sampling.pipeline import D2iT, has_parts
from d2it.sampling.sheets import denoising_sheet, sample_sheets
from d2it.training.config import CONFIGS, MISSING, STAGES, Config, describe, load, to_yaml
from d2it.training.content import ContentStage, teacher_facts
from d2it.training.dvae import DvaeStage, budget_range, build_vae, channels_last, reconstructions
from d2it.training.grain import GrainStage
from d2it.training.latents import LatentData
from d2it.training.loop import Stage, train
from d2it.training.meters import read_log
from d2it.training.report import REPORT, write_report
from d2it.training.stage import (
    check_batch,
    check_weights,
    extreme_share,
    held_out_images,
    initialize,
    model_errors,
    workers,
)
from d2it.training.summary import Summary, rehearse


def parser(default: Path | None = None) -> argparse.ArgumentParser:
    """The command's options; `default` is as for `main`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train D2iT: the stages dvae, cache, grain and content, then pictures. The same command resumes.",
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=default, help="a YAML file, or the name of one of configs/ (demo)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print and check every stage, take two steps on noise, write nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, listed below")
    return parser


def main(arguments: Sequence[str] | None = None, *, default: Path | None = None) -> int:
    """Runs the command line of `train.py` and returns the exit code of `run_command`.

    Args:
        arguments: of the command line.
        default: the configuration where `--config` is not given; None is the defaults of the schema.
    """

    def act() -> None:
        options = parser(default).parse_intermixed_args(arguments)
        config = load(options.config, options.overrides)
        with distributed.joined(config.run.device) as world:
            try:
                (rehearse_all if options.dry_run else run)(config, world)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                less = "more micro-batches (<stage>.accumulate) or <stage>.activation_checkpointing=true need less"
                raise UserError(f"out of memory: {reason_of(error)}: {less}") from None
            except Interrupted as stop:
                if stop.message is not None:
                    raise
                # Outside the loop: all that is finished is on the disk.
                line = f"{stop.signal.name}: what is finished is in {config.run.dir}; the same command resumes"
                raise Interrupted(stop.signal, line, shared=True) from None

    return run_command(act)


def command(arguments: Sequence[str] | None = None) -> int:
    """`main` with the demo where no configuration is named: `train.py` and `d2it train`."""
    return main(arguments, default=CONFIGS / "demo.yaml")


def run(config: Config, world: World) -> None:
    """Runs the configured stages.

    Raises:
        UserError: anything that the user can put right; a start that is refused has changed nothing.
        Interrupted: a signal came; everything is saved.
    """
    folder = Path(config.run.dir)
    source = _source(config) if {"dvae", "cache"} & set(config.run.stages) else None
    check_models(config, world)

    @functools.cache
    def begin() -> None:
        world.together(lambda: write_text(folder / "config.yaml", to_yaml(config)) if world.first else None)

    with contextlib.ExitStack() as held:
        world.together(lambda: held.enter_context(only_writer(folder)) if world.first else None)
        for name in STAGES:
            if name not in config.run.stages:
                continue
            if name == "cache":
                assert source is not None
                encode(config, world, source, begin)
                continue
            summarize(name, config, world, source)
            train(_stage(name, config, world, source), getattr(config, name), config.run, world, begin)
        begin()
        world.together(lambda: finish(config, world, source) if world.first else None)


def check_models(config: Config, world: World) -> None:
    """Builds the network of every stage without memory for its weights, so that what does not fit fails now.

    Raises:
        UserError: a preset or setting that does not exist, one that does not fit the others, a batch that cannot be
            split over the ranks, weights that they cannot train, or ones to start from that do not fit.
    """
    held_out_images(config)
    stages, folder, sha256 = set(config.run.stages), Path(config.run.dir) / "vae", None
    for name in config.run.stages:
        if name != "cache":
            check_batch(getattr(config, name), name, world)
    with torch.device("meta"):
        if "dvae" in stages:
            autoencoder = build_vae(config)
            budget_range(config, autoencoder.config)
            initialize(autoencoder, config.dvae, "dvae", config.run, world)
            vae = autoencoder.config
        elif folder.is_dir():
            with model_errors(str(folder)):
                vae, sha256 = DynamicVAE.read_config(folder), DynamicVAE.saved_hashes(folder)[0]
        else:
            return  # the first stage raises
        with model_errors("configuration: data.image_size"):
            data = LatentData.of_vae(vae, config.data.image_size, 0, sha256)
        for kind in (GrainStage, ContentStage):
            if kind.name in stages:
                network = kind.make(config, data)
                check_weights(getattr(config, kind.name), kind.name, world, network.config)
                kind.reads(config, network)
                kind.initialize(network, config, world, data)


def summarize(name: str, config: Config, world: World, source: ImageSource | None, *, dry: bool = False) -> None:
    """Prints the summary of a stage; the arguments are those of `_stage`.

    Raises:
        UserError: it needs more memory than there is.
    """
    summary = Summary(_stage(name, config, world, source, dry=dry, outline=True), getattr(config, name), world)
    world.announce(summary.text)
    summary.require_memory()


def rehearse_all(config: Config, world: World) -> None:
    """Prints the summary of every stage, then what two steps on noise cost; nothing is written.

    Raises:
        UserError: what the configuration or the images' path makes impossible, memory included.
    """
    source = None if config.data.path == MISSING else _source(config)
    check_models(config, world)
    for name in STAGES:
        if name == "cache" or name not in config.run.stages:
            continue
        summarize(name, config, world, source, dry=True)
        world.announce(rehearse(_stage(name, config, world, source, dry=True), getattr(config, name), world))


def encode(config: Config, world: World, source: ImageSource, begin: Callable[[], None]) -> None:
    """Runs the stage cache: latents and entropies of every image, each rank a part. What is there already is kept."""
    vae = channels_last(_vae(config).to(world.device))
    target = _cache_folder(config)
    features = _teacher_facts(config, vae)
    name = config.content.repa.teacher
    teacher = None if name is None else open_teacher(name).to(world.device)
    done = 0

    @torch.inference_mode()
    def moments(images: torch.Tensor) -> dict[str, torch.Tensor]:
        every, entropy = vae.encode_all(pictures.from_uint8(images.to(world.device, non_blocking=True)))
        found = {"entropy": entropy}
        for grain, (mean, logvar) in enumerate(every):
            found |= {f"mean.{grain}": mean, f"std.{grain}": (0.5 * logvar).exp()}
        if teacher is not None and features is not None:
            height, width = features["grid"]
            found[TEACHER] = teacher(images.to(world.device), (height, width)).half()
        return found

    def progress(images: int) -> None:
        nonlocal done
        before, done = done, done + images
        share = -(-len(source) // world.size)
        if before * 10 // share != done * 10 // share:
            world.announce(f"cache: {min(done, share)}/{share} images")

    def build() -> None:
        build_cache(
            target,
            source,
            moments,
            facts={
                "vae": vae.weights_sha256,
                "thresholds": vae.thresholds.tolist(),
                "downsampling": list(vae.downsampling),
                "scaling_factor": float(vae.scaling_factor),
                **({} if features is None else {TEACHER: features}),
            },
            rank=world.rank,
            world_size=world.size,
            batch_size=config.cache.batch_size,
            unit_size=config.cache.unit_size,
            flips=config.cache.flips,
            workers=workers(config, world),
            pin_memory=world.device.type == "cuda",
            progress=progress,
        )

    begin()
    world.together(build)
    world.together(lambda: finish_cache(target) if world.first else None)
    if world.first and vae.config.num_grains > 1:
        share = LatentCache(target, verify=False).shares()[0]
        if warning := extreme_share(share):
            world.announce(f"warning: cache: {warning}")


def finish(config: Config, world: World, source: ImageSource | None) -> None:
    """Writes the description of the whole model, if all its parts are there, and pictures; for rank 0 alone."""
    folder = Path(config.run.dir)
    curves = {}
    for name in ("dvae", "grain", "content"):
        rows = [row for row in read_log(folder / "logs" / f"{name}.jsonl") if f"{name}/loss" in row]
        if rows:
            curves[f"{name}: loss"] = [row["step"] for row in rows], [row[f"{name}/loss"] for row in rows]
    if curves and importlib.util.find_spec("matplotlib"):
        pictures.save_curves(folder / "curves.png", curves)
    elif curves:
        world.announce(f"{folder / 'curves.png'} is left out: matplotlib is not installed")
    if source is not None and (folder / "vae").is_dir():
        vae = _vae(config).to(world.device)
        sheet = reconstructions(vae, source, min(8, config.sample.images), world.device)
        pictures.save_png(folder / "reconstructions.png", sheet)
    if has_parts(folder):
        with user_error():
            draw_samples(config, world)
    if importlib.util.find_spec("matplotlib"):
        write_report(folder, source=source, cache=_cache_folder(config), device=world.device)
    for path in sorted([*folder.glob("*.png"), *folder.glob(REPORT)]):
        world.announce(f"wrote {path}")


def draw_samples(config: Config, world: World) -> None:
    """Assembles the D2iT, samples from it and writes the pictures."""
    folder, sample = Path(config.run.dir), config.sample
    settings = {name: getattr(sample, name) for name in ("scheduler", "steps", "grain_steps", "guidance")}
    d2it = D2iT.from_parts(folder, class_names=_class_names(config), sampling=settings, facts=_facts(config))
    d2it.save_description(folder)
    d2it.to(world.device)
    count, classes, seed = sample.images, d2it.num_classes, config.run.seed
    labels = [i % classes for i in range(count)] if classes else None
    samples = d2it(count, labels=labels, seed=seed, batch_size=sample.batch_size)
    sheets = sample_sheets(d2it, samples.uint8(), samples.grain_maps.numpy(), labels)
    for name, sheet in zip(("samples", "samples_grains"), sheets):
        pictures.save_png(folder / f"{name}.png", sheet)
    pictures.save_png(folder / "denoising.png", denoising_sheet(d2it, labels and labels[:4], seed=seed))


def _facts(config: Config) -> dict[str, Any]:
    """What a model card says of the training."""
    cache, data = _cache_folder(config), config.data
    known = {"images": len(LatentCache(cache, verify=False))} if (cache / "index.json").exists() else {}
    settings: dict[str, Any] = {"seed": config.run.seed}
    for name in config.run.stages:
        if name != "cache":
            stage = getattr(config, name)
            settings[name] = f"{stage.preset}, {stage.steps:,} steps of {stage.batch_size}, learning rate {stage.lr:g}"
    facts = {"data": {"source": data.path, **known, "size": list(data.image_size)}, "settings": settings}
    return facts | ({"license": config.run.license} if config.run.license else {})


def _source(config: Config) -> ImageSource:
    data = config.data
    options: dict[str, Any] = {"augment": data.augment, "crop": data.crop, "upsample": data.upsample}
    with model_errors("configuration: data"):
        if data.path == "demo":
            source: ImageSource = DemoPhotos(data.image_size, crops=data.crops, **options)
        else:
            source = open_source(data.path, data.image_size, **options)
    if data.num_classes is not None:
        source.require_classes(data.num_classes, allow_missing=data.allow_missing_classes)
    return source


def _class_names(config: Config) -> list[str] | None:
    """Returns the names of the classes in the configuration, or else those of the images' source."""
    if config.data.class_names is not None or config.data.num_classes is None:
        return config.data.class_names
    cache = _cache_folder(config)
    known = LatentCache(cache, verify=False).classes if (cache / "index.json").exists() else None
    return known if len(known or ()) == config.data.num_classes else None


def _vae(config: Config) -> DynamicVAE:
    folder = Path(config.run.dir) / "vae"
    if not folder.is_dir():
        raise UserError(f"{folder}: no trained VAE here; run the dvae stage, or copy the vae folder of another run")
    with model_errors(str(folder)):
        return DynamicVAE.from_pretrained(folder)


def _teacher_facts(config: Config, vae: DynamicVAE) -> dict[str, Any] | None:
    """Return what the cache shall hold of REPA's teacher; without REPA, what a finished one holds of it already."""
    if config.content.repa.teacher is None:
        target = _cache_folder(config)
        return LatentCache(target, verify=False).facts.get(TEACHER) if (target / "index.json").exists() else None
    with torch.device("meta"):
        network = ContentStage.make(config, LatentData.of_vae(vae.config, config.data.image_size, 0))
    return teacher_facts(config, network)


def _cache_folder(config: Config) -> Path:
    return Path(config.cache.path) if config.cache.path else Path(config.run.dir) / "cache"


def _stage(
    name: str, config: Config, world: World, source: ImageSource | None, *, dry: bool = False, outline: bool = False
) -> Stage:
    """Returns a stage.

    Args:
        name: of the stage.
        config: of the run.
        world: the ranks.
        source: the images; may be None where the stage reads the cache.
        dry: whether the cache need not be there.
        outline: whether the networks get no memory, for a summary.
    """
    with torch.device("meta") if outline else contextlib.nullcontext():
        if name == "dvae":
            assert source is not None
            return DvaeStage(config, world, source)
        kind = {"grain": GrainStage, "content": ContentStage}[name]
        settings = getattr(config, name)
        cache = _cache_folder(config)
        if dry and source is not None and not (cache / "index.json").exists():
            with torch.device("meta"):
                planned = build_vae(config).config
            return kind(config, settings, world, LatentData.of_vae(planned, source.image_size, len(source)), None)
        with torch.device("cpu"):
            latents = LatentCache(cache, verify=False if outline else None)
            if config.data.num_classes is not None:
                latents.require_classes(config.data.num_classes, allow_missing=config.data.allow_missing_classes)
            vae = None if outline else _vae(config)
            latents.require(vae=sha256_of(Path(config.run.dir) / "vae" / "model.safetensors"))
        return kind(config, settings, world, LatentData.of_cache(latents), vae)
