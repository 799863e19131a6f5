"""Calibrate the entropy thresholds of a set of images.

    python -m d2it.data.calibrate SOURCE --ratios 0.5 --output calibration.json

SOURCE is a folder of images, a .npz pack, WebDataset shards or "demo". Prints the thresholds; the file that --output
names holds every tenth of a percent, so that other ratios need no second pass.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from d2it.data.calibration import calibrate, check_ratios
from d2it.data.loader import default_workers
from d2it.data.sources import open_source
from d2it.errors import UserError, run_command
from d2it.files import prepare_file


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m d2it.data.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5], help="share of each finer grain or finer (0.5, or 0.7 0.3)"
    )
    parser.add_argument("--image-size", type=int, nargs="+", default=[256], help="edge, or height and width")
    parser.add_argument("--region-size", type=int, default=16)
    parser.add_argument("--bins", type=int, help="default: region size squared")
    parser.add_argument("--sigma", type=float, default=0.01)
    parser.add_argument("--upsample", action="store_true", help="enlarge smaller images, as ADM does")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--description", help="provenance to store instead of the source's own description")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=default_workers())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if len(options.image_size) > 2 or min(options.image_size) < 1:
        raise UserError(f"--image-size is one or two positive numbers, got {options.image_size}")
    for name, value, low, high in (
        ("region-size", options.region_size, 2, 256),
        ("bins", options.region_size**2 if options.bins is None else options.bins, 2, 65536),
        ("workers", options.workers, 0, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name} must be in {low}..{high}, got {value}")
    if not 0 < options.sigma < math.inf:
        raise UserError(f"--sigma must be positive and finite, got {options.sigma}")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is auto, cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU")
    check_ratios(options.ratios)
    if options.output:
        prepare_file(options.output, "--output")
    gpu = options.device != "cpu" and torch.cuda.is_available()

    height, width = (options.image_size * 2)[:2]
    source = open_source(options.source, (height, width), upsample=options.upsample)
    start = time.perf_counter()
    with tqdm(total=len(source), unit=" images", disable=None) as bar:
        calibration = calibrate(
            source,
            region_size=options.region_size,
            num_bins=options.bins,
            sigma=options.sigma,
            device="cuda" if gpu else "cpu",
            workers=options.workers,
            description=options.description,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    if options.output:
        calibration.save(options.output)
    print(f"{calibration.source}; {calibration.regions:,} regions in {seconds:.1f} s, {calibration.skipped} skipped")
    deciles = " ".join(f"{calibration.entropies[i]:.3f}" for i in range(100, 1000, 100))
    print(f"entropy of the regions, nats, 10 % to 90 %: {deciles}")
    thresholds = calibration.thresholds(options.ratios)
    limits = ", ".join(f"{t:.4f}" for t in thresholds)
    print(f"thresholds for fine ratios {', '.join(f'{r:g}' for r in options.ratios)}: {limits}")
    print(f"shares of regions above them: {', '.join(f'{share:.3f}' for share in calibration.shares(thresholds))}")


if __name__ == "__main__":
    sys.exit(run_command(main))
