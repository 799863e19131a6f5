"""The commands of evaluate.py: judge samples, make reference statistics, judge reconstructions."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

import d2it
from d2it.distributed import World, joined
from d2it.errors import UserError, run_command
from d2it.evaluation.generation import METRICS, check_sizes, compare, open_reference, summarize
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import WHERE, Inception
from d2it.files import atomic_write, prepare_file, read_bytes, read_json, sha256_of
from d2it.models.base import WEIGHTS_FILE
from d2it.models.lpips import WHERE as LPIPS_WHERE
from d2it.npz import keep_images
from d2it.sampling.options import SampleRequest, add_options, given_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of evaluate.py; return the exit code of `run_command`."""

    def act() -> None:
        options = _parser().parse_args(arguments)
        with joined(options.device) as world:
            _prepare(options)
            report = options.run(options, world)
        if world.first:
            _show(report)
            if options.output:
                with atomic_write(options.output) as temporary:
                    temporary.write_text(json.dumps(report, indent=2) + "\n")

    return run_command(act)


def _prepare(options: argparse.Namespace) -> None:
    """What is written at the end must be writable, and that is said at the beginning."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    for name, ending in (("save", ".npz"), ("output", ".json")):
        path = getattr(options, name, None)
        if path is None:
            continue
        if not path.endswith(ending):
            raise UserError(f"--{name}: the name must end in {ending}, got {path!r}")
        prepare_file(path, f"--{name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Judge samples and reconstructions.",
        epilog=f"Inception weights: {WHERE}. LPIPS weights: {LPIPS_WHERE}.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    generation = commands.add_parser("generation", help="FID, sFID, IS, precision and recall of samples")
    source = generation.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", metavar="PATH", help="a folder of images, or an .npz of ADM's form")
    source.add_argument("--checkpoint", metavar="PATH", help="a trained D2iT: samples are drawn and judged in a stream")
    generation.add_argument(
        "--reference", required=True, metavar="PATH", help="statistics, an .npz of images, a folder"
    )
    generation.add_argument("--metrics", default=",".join(METRICS), help="some of %(default)s")
    generation.add_argument("--count", type=int, help="samples to judge (50000 of a checkpoint, all of a set)")
    generation.add_argument("--save", metavar="FILE.npz", help="keep a checkpoint's samples for ADM's own evaluator")
    generation.add_argument("--seed", type=int, default=0, help="of the first sample; sample i has seed + i")
    add_options(generation)
    generation.set_defaults(run=_generation)

    statistics = commands.add_parser("statistics", help="reference statistics of a set of images")
    statistics.add_argument("images", help="a folder of images, or an .npz of ADM's form")
    statistics.add_argument("--save", required=True, metavar="FILE.npz", help="where they go")
    statistics.set_defaults(run=_statistics)

    reconstruction = commands.add_parser("reconstruction", help="rFID, PSNR, SSIM, LPIPS of a DynamicVAE by fine ratio")
    reconstruction.add_argument("--checkpoint", required=True, metavar="PATH", help="a trained D2iT or DynamicVAE")
    reconstruction.add_argument("--data", required=True, metavar="PATH", help="images, as train.py reads them")
    reconstruction.add_argument(
        "--image-size", type=int, nargs="+", help="side, or height and width (those that the run was trained at)"
    )
    reconstruction.add_argument("--upsample", action="store_true", help="enlarge smaller images, as ADM does")
    reconstruction.add_argument("--ratios", type=float, nargs="+", default=[0, 0.25, 0.5, 0.7, 1], help="fine ratios")
    reconstruction.add_argument("--count", type=int, help="the first so many images")
    reconstruction.add_argument("--lpips", metavar="PATH", help="LPIPS weights (below); without them it is left out")
    reconstruction.add_argument("--any-lpips", action="store_true", help="take weights of another hash")
    reconstruction.set_defaults(run=_reconstruction)

    for command in (generation, statistics, reconstruction):
        command.add_argument("--inception", metavar="PATH", help="Inception weights (below)")
        command.add_argument("--any-inception", action="store_true", help="take weights of another hash")
        command.add_argument("--batch-size", type=int, default=64, help="images at once (%(default)s)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        command.add_argument("--output", metavar="FILE.json", help="the report with its settings")
        command.epilog = parser.epilog
    return parser


def _generation(options: argparse.Namespace, world: World) -> dict[str, Any]:
    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        named = f"unknown metric {unknown[0]!r}" if unknown else "none named"
        raise UserError(f"--metrics: {named}; known are {', '.join(METRICS)}")
    if options.count is not None and options.count < 2:
        raise UserError(f"--count must be at least 2, got {options.count}")
    drawn = [*(["--save"] if options.save else []), *given_options(options)]
    if options.samples and drawn:
        raise UserError(f"{drawn[0]} goes with a --checkpoint; those of --samples are there already")
    inception, settings = _inception(options, world)
    request, images = None, None
    if options.samples:
        images = open_images(options.samples)
        count = min(options.count or images.count, images.count)
        if options.count and options.count > images.count:
            raise UserError(f"--count {options.count}: {options.samples} has {images.count} images")
        size = images.size
    else:
        count = options.count or 50_000
        request = SampleRequest(options, Path(options.checkpoint), count, world)
        size = request.model.image_size
    # The reference before any sample is drawn or judged: what is wrong with it is said in time.
    common: dict[str, Any] = {"metrics": metrics, "device": world.device, "progress": world.first}
    reference = open_reference(
        options.reference,
        inception,
        batch_size=options.batch_size,
        share=lambda batches: _share(batches, world),
        **common,
    )
    check_sizes(size, reference.size)
    if images is not None:
        batches = _share(images.batches(options.batch_size, count), world)
        settings |= {"samples": options.samples}
    else:
        assert request is not None
        batches = _sampled(request)
        settings = request.settings() | settings
        if options.save:
            batches = keep_images(batches, options.save, count, options.batch_size, world, _labels(request))
    samples = summarize(batches, inception, total=math.ceil(count / world.size), **common)
    found = compare(samples, reference, metrics)
    settings |= {"count": count, "size": list(size), "reference": options.reference}
    if Path(options.reference).is_file():
        settings["reference_sha256"] = sha256_of(options.reference)
    return {"metrics": found, "settings": settings | {"reference_count": reference.count or None}}


def _sampled(request: SampleRequest) -> Iterator[Tensor]:
    for _, samples in request.batches():
        yield torch.from_numpy(samples.uint8()).permute(0, 3, 1, 2)


def _labels(request: SampleRequest) -> np.ndarray | None:
    return None if request.labels is None else np.array(request.labels, np.int64)


def _statistics(options: argparse.Namespace, world: World) -> dict[str, Any]:
    inception, settings = _inception(options, world)
    images = open_images(options.images)
    mine = _share(images.batches(options.batch_size), world)
    told = summarize(
        mine, inception, device=world.device, total=math.ceil(images.count / world.size), progress=world.first
    )
    if world.first:
        told.save(options.save)
    settings |= {"images": options.images, "count": told.count, "size": list(images.size), "saved": options.save}
    return {"settings": settings}


def _reconstruction(options: argparse.Namespace, world: World) -> dict[str, Any]:
    from d2it.data import SinglePass, open_source
    from d2it.evaluation.reconstruction import evaluate_reconstruction
    from d2it.models import LPIPS, DynamicVAE
    from d2it.models.lpips import lpips_files

    if world.size > 1:
        raise UserError("reconstruction runs in one process: start it without torchrun")
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("reconstruction needs torchmetrics, which is not installed: pip install torchmetrics")
    if options.image_size and len(options.image_size) > 2:
        raise UserError(f"--image-size: a side, or height and width, got {options.image_size}")
    if options.count is not None and options.count < 2:
        raise UserError(f"--count must be at least 2, got {options.count}")
    for ratio in options.ratios:
        if not 0 <= ratio <= 1:
            raise UserError(f"--ratios must be in 0 ... 1, got {ratio}")
    folder = Path(options.checkpoint)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    lpips, hashes = None, None
    try:
        vae = DynamicVAE.from_pretrained(folder).to(world.device).eval()
        if options.lpips:
            lpips = LPIPS.from_path(options.lpips, check=not options.any_lpips).to(world.device)
            hashes = {file.name: sha256_of(file) for file in lpips_files(options.lpips)}
    except ValueError as error:
        raise UserError(str(error)) from None
    inception, settings = _inception(options, world) if options.inception else (None, _versions())
    height, width = (options.image_size * 2)[:2] if options.image_size else _image_size(folder)
    region = vae.config.region_size
    if height < 1 or width < 1 or height % region or width % region:
        raise UserError(f"--image-size must be a multiple of the VAE's regions of {region}, got {height} x {width}")
    source = open_source(options.data, (height, width), upsample=options.upsample)
    count = min(options.count or len(source), len(source))
    if options.count and options.count > count:
        raise UserError(f"--count {options.count}: {options.data} has {count} images")

    batches = [range(at, min(at + options.batch_size, count)) for at in range(0, count, options.batch_size)]
    skipped: list[str] = []

    def images() -> Iterator[Tensor]:
        with SinglePass(source, batches) as stream:
            for batch in stream:
                if len(batch["image"]):
                    yield batch["image"]
            skipped[:] = stream.unreadable

    rows = evaluate_reconstruction(vae, images, options.ratios, extractor=inception, lpips=lpips, device=world.device)
    settings |= {"checkpoint": options.checkpoint, "vae_sha256": sha256_of(folder / WEIGHTS_FILE)}
    settings |= {"data": options.data, "source": source.description, "crop": "center, scaled to cover the size"}
    settings |= {"upsample": options.upsample}
    settings |= {"count": count - len(skipped), "skipped": len(skipped), "size": [height, width]}
    settings |= {"lpips_sha256": hashes} if hashes else {}
    return {"rows": rows, "settings": settings}


def _image_size(folder: Path) -> tuple[int, int]:
    """Returns the image size of the run whose VAE lies in a folder.

    Raises:
        UserError: it is a VAE alone, which is of no size, or the run's files are damaged.
    """
    run = folder.parent if folder.name == "vae" else folder
    file, size = run / "content_transformer" / "config.json", None
    try:
        if file.is_file():
            size = read_json(file)["image_size"]
        elif (file := run / "config.yaml").is_file():
            size = OmegaConf.to_container(OmegaConf.create(read_bytes(file, 2**20).decode()))["data"]["image_size"]  # type: ignore[call-overload,index]
        else:
            raise UserError(f"{folder} is a VAE alone, which has no image size: give --image-size")
        height, width = size if isinstance(size, list) else (size, size)
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"image_size is {size!r:.40}")
        return height, width
    except UserError:
        raise
    except Exception as error:  # YAML and OmegaConf have many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is damaged: no image size in it ({reason}); give --image-size") from None


def _inception(options: argparse.Namespace, world: World) -> tuple[Inception, dict[str, Any]]:
    model = (
        Inception.from_file(options.inception, sha256=None)
        if options.any_inception
        else Inception.from_file(options.inception)
    )
    told = {"inception_sha256": sha256_of(options.inception), "resize": "bilinear 299, as TensorFlow 1"}
    return model.to(world.device), told | _versions()


def _versions() -> dict[str, Any]:
    return {"d2it": d2it.__version__, "torch": torch.__version__, "numpy": np.__version__}


def _share(batches: Iterator[Tensor], world: World) -> Iterator[Tensor]:
    return itertools.islice(batches, world.rank, None, world.size)


def _show(report: dict[str, Any]) -> None:
    for name, value in report.get("metrics", {}).items():
        print(f"{name:>10}  {value:.4f}")
    rows = report.get("rows", [])
    if rows:
        print("  ".join(f"{name:>10}" for name in rows[0]))
        for row in rows:
            print("  ".join(f"{value:10.4f}" for value in row.values()))
    print(json.dumps(report["settings"]))
