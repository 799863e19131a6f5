"""The commands of evaluate.py: compare samples, make reference statistics, compare reconstructions."""

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
from d2it.errors import UserError, reason_of, run_command, user_error
from d2it.evaluation.extractors import EXTRACTORS, open_extractor
from d2it.evaluation.generation import (
    ALL_METRICS,
    METRICS,
    OTHER_METRICS,
    check_metrics,
    check_sizes,
    compare,
    default_metrics,
    open_reference,
    spread,
    summarize,
)
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import WHERE
from d2it.files import check_yaml, prepare_file, read_bytes, read_json, sha256_of, write_text
from d2it.models.base import WEIGHTS_FILE
from d2it.models.lpips import WHERE as LPIPS_WHERE
from d2it.npz import keep_images
from d2it.sampling.options import SampleRequest, add_options, given_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of evaluate.py. Returns the exit code of `run_command`."""

    def act() -> None:
        options = parser().parse_args(arguments)
        with joined(options.device) as world:
            _prepare(options)
            report = options.run(options, world)
        if world.first:
            _show(report)
            if options.output:
                write_text(options.output, json.dumps(report, indent=2) + "\n")

    return run_command(act)


def _prepare(options: argparse.Namespace) -> None:
    """Raises UserError before the work begins where its result could not be written."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    for name, ending in (("save", ".npz"), ("output", ".json")):
        path = getattr(options, name, None)
        if path is None:
            continue
        if not path.endswith(ending):
            raise UserError(f"--{name}: the name must end in {ending}, got {path!r}")
        prepare_file(path, f"--{name}")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Compare samples and reconstructions with real images.",
        epilog=f"Inception weights: {WHERE}. LPIPS weights: {LPIPS_WHERE}.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    generation = commands.add_parser("generation", help="FID, sFID, IS, precision and recall of samples")
    source = generation.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--samples",
        nargs="+",
        metavar="PATH",
        help="a folder of images or an .npz of ADM's form; several give a spread",
    )
    source.add_argument(
        "--checkpoint", metavar="PATH", help="a trained D2iT: samples are drawn and compared in a stream"
    )
    generation.add_argument(
        "--reference", required=True, metavar="PATH", help="statistics, an .npz of images, a folder"
    )
    generation.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"some of {','.join(ALL_METRICS)} ({','.join(METRICS)} of Inception, {','.join(OTHER_METRICS)} of others)",
    )
    generation.add_argument("--count", type=int, help="samples to compare (50000 of a checkpoint, all of a set)")
    generation.add_argument("--save", metavar="FILE.npz", help="keep a checkpoint's samples for ADM's own evaluator")
    generation.add_argument("--seed", type=int, default=0, help="of the first sample; sample i has seed + i")
    generation.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="sets of samples of a checkpoint, for a spread over seeds"
    )
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
    reconstruction.add_argument(
        "--ratios",
        type=_ratio,
        nargs="+",
        default=[0, 0.25, 0.5, 0.7, 1],
        metavar="R",
        help="fine ratios; with three grains or more also as shares of each grain or finer: 0.5,0.25",
    )
    reconstruction.add_argument("--count", type=int, help="the first N images (all)")
    reconstruction.add_argument("--lpips", metavar="PATH", help="LPIPS weights (below); without them it is left out")
    reconstruction.add_argument("--any-lpips", action="store_true", help="take weights of another hash")
    reconstruction.set_defaults(run=_reconstruction)

    for command in (generation, statistics):
        command.add_argument(
            "--extractor",
            default="inception",
            metavar="NAME|PATH",
            help=f"{', '.join(EXTRACTORS)}, or a model's folder",
        )
    for command in (generation, statistics, reconstruction):
        command.add_argument("--inception", metavar="PATH", help="Inception weights (below)")
        command.add_argument("--any-inception", action="store_true", help="take weights of another hash")
        command.add_argument("--batch-size", type=int, default=64, help="images at once (%(default)s)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        command.add_argument("--output", metavar="FILE.json", help="the report with its settings")
        command.epilog = parser.epilog
    return parser


def _ratio(text: str) -> float | list[float]:
    """Returns a fine ratio, or the shares that commas separate."""
    return [float(part) for part in text.split(",")] if "," in text else float(text)


def _generation(options: argparse.Namespace, world: World) -> dict[str, Any]:
    _check_generation(options)
    extractor, settings = _inception(options, world)
    metrics = _metrics(options, extractor)
    size = None
    if options.samples:
        sets = [open_images(path) for path in options.samples]
        for images in sets:
            if options.count and options.count > images.count:
                raise UserError(f"--count {options.count}: {images.path} has {images.count} images")
            check_sizes(images.size, sets[0].size)
        counts, size = [options.count or images.count for images in sets], sets[0].size
    else:
        counts = [options.count or 50_000] * options.repeats
        request = SampleRequest(options, Path(options.checkpoint), counts[0], world)
        size = request.model.image_size
    # The reference comes first: what is wrong with it is reported before any sample is drawn.
    common: dict[str, Any] = {"metrics": metrics, "device": world.device, "progress": world.first}
    reference = open_reference(
        options.reference,
        extractor,
        batch_size=options.batch_size,
        share=lambda batches: _share(batches, world),
        **common,
    )
    check_sizes(size, reference.size)
    reports = []
    for i, count in enumerate(counts):
        if options.samples:
            batches, labels = sets[i].batches(options.batch_size, count), sets[i].labels
            batches = _share(batches, world)
            settings |= {"samples": options.samples if len(options.samples) > 1 else options.samples[0]}
        else:
            if i:
                again = argparse.Namespace(**{**vars(options), "seed": options.seed + i * count})
                request = SampleRequest(again, Path(options.checkpoint), count, world)
            batches, labels = _sampled(request), _labels(request)
            settings = request.settings() | settings | {"seed": options.seed}
            if options.save:
                batches = keep_images(batches, options.save, count, options.batch_size, world, labels)
        numbers = None
        if labels is not None:
            numbers = _share(iter(torch.from_numpy(labels[:count]).split(options.batch_size)), world)
        total = math.ceil(count / world.size)
        samples = summarize(batches, extractor, labels=numbers, total=total, **common)
        reports.append(compare(samples, reference, metrics))
    settings |= {"count": counts[0], "size": list(size), "reference": options.reference}
    if Path(options.reference).is_file():
        settings["reference_sha256"] = sha256_of(options.reference)
    settings |= {"reference_count": reference.count or None}
    if len(reports) == 1:
        return {"metrics": reports[0], "settings": settings}
    mean, deviation = spread(reports)
    settings |= {"repeats": len(reports)}
    return {"metrics": mean, "deviation": deviation, "each": reports, "settings": settings}


def _check_generation(options: argparse.Namespace) -> None:
    for name, value, least in (("count", options.count, 2), ("repeats", options.repeats, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    drawn = [*(["--save"] if options.save else []), *(["--repeats"] if options.repeats > 1 else [])]
    drawn += given_options(options)
    if options.samples and drawn:
        raise UserError(f"{drawn[0]} goes with a --checkpoint; those of --samples are there already")
    if options.save and options.repeats > 1:
        raise UserError("--save keeps one set of samples, --repeats draws several")
    if options.metrics is not None:
        _metrics(options, None)


def _metrics(options: argparse.Namespace, extractor: Any) -> list[str]:
    if options.metrics is None:
        return list(default_metrics(extractor))
    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    with user_error("--metrics", (UserError,)):
        check_metrics(metrics, extractor)
    return metrics


def _sampled(request: SampleRequest) -> Iterator[Tensor]:
    for _, samples in request.batches():
        yield torch.from_numpy(samples.uint8()).permute(0, 3, 1, 2)


def _labels(request: SampleRequest) -> np.ndarray | None:
    return None if request.labels is None else np.array(request.labels, np.int64)


def _statistics(options: argparse.Namespace, world: World) -> dict[str, Any]:
    extractor, settings = _inception(options, world)
    images = open_images(options.images)
    labels = None
    if images.labels is not None:
        labels = _share(iter(torch.from_numpy(images.labels).split(options.batch_size)), world)
    found = summarize(
        _share(images.batches(options.batch_size), world),
        extractor,
        metrics=default_metrics(extractor),
        device=world.device,
        labels=labels,
        total=math.ceil(images.count / world.size),
        progress=world.first,
    )
    if world.first:
        found.save(options.save)
    settings |= {"images": options.images, "count": found.count, "size": list(images.size), "saved": options.save}
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
        for share in ratio if isinstance(ratio, list) else [ratio]:
            if not 0 <= share <= 1:
                raise UserError(f"--ratios must be in 0 ... 1, got {share}")
    folder = Path(options.checkpoint)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    lpips, hashes = None, None
    with user_error():
        vae = DynamicVAE.from_pretrained(folder).to(world.device).eval()
        if options.lpips:
            lpips = LPIPS.from_path(options.lpips, check=not options.any_lpips).to(world.device)
            hashes = {file.name: sha256_of(file) for file in lpips_files(options.lpips)}
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
            size = read_json(file)["config"]["image_size"]
        elif (file := run / "config.yaml").is_file():
            plain: Any = OmegaConf.to_container(OmegaConf.create(check_yaml(read_bytes(file, 2**20).decode())))
            size = plain["data"]["image_size"]
        else:
            raise UserError(f"{folder} is a VAE alone, which has no image size: give --image-size")
        height, width = size if isinstance(size, list) else (size, size)
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"image_size is {size!r:.40}")
        return height, width
    except UserError:
        raise
    except Exception as error:  # YAML and OmegaConf have many kinds
        raise UserError(f"{file} is damaged: no image size in it ({reason_of(error)}); give --image-size") from None


def _inception(options: argparse.Namespace, world: World) -> tuple[Any, dict[str, Any]]:
    """Returns the network that features come from, Inception unless another is asked for, and its settings."""
    name = getattr(options, "extractor", "inception")
    model, settings = open_extractor(name, inception=options.inception, any_inception=options.any_inception)
    return model.to(world.device), settings | _versions()


def _versions() -> dict[str, Any]:
    return {"d2it": d2it.__version__, "torch": torch.__version__, "numpy": np.__version__}


def _share(batches: Iterator[Tensor], world: World) -> Iterator[Tensor]:
    return itertools.islice(batches, world.rank, None, world.size)


def _show(report: dict[str, Any]) -> None:
    for name, value in report.get("metrics", {}).items():
        deviation = f" +- {report['deviation'][name]:.4f}" if "deviation" in report else ""
        print(f"{name:>10}  {value:.4f}{deviation}")
    rows = report.get("rows", [])
    if rows:
        print("  ".join(f"{name:>10}" for name in rows[0]))
        for row in rows:
            cells = [
                ",".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.4f}"
                for value in row.values()
            ]
            print("  ".join(f"{cell:>10}" for cell in cells))
    print(json.dumps(report["settings"]))
