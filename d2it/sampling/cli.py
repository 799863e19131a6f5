"""The command of sample.py: images and grain maps of a trained D2iT, on one process or many.

Each rank writes its own images; `d2it.sampling.options` has what they follow from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d2it import pictures
from d2it.distributed import World, joined
from d2it.errors import UserError, run_command
from d2it.files import atomic_write, write_text
from d2it.npz import keep_images
from d2it.sampling.options import SampleRequest, add_options
from d2it.sampling.sheets import sample_sheets

#: Most images in a grid.
SHOWN = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws samples; returns the exit code of `run_command`."""

    def act() -> None:
        options = parser().parse_args(arguments)
        with joined(options.device) as world:
            run(options, world)

    return run_command(act)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Sample from a trained D2iT. Image i follows from seed + i, its label and its grain map alone.",
    )
    parser.add_argument("model", type=Path, help="the folder of a training run, or of D2iT.save_pretrained")
    parser.add_argument("--count", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once on a GPU (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_options(parser)

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="where it goes (<model>/samples)")
    group.add_argument("--no-images", action="store_true", help="no PNG of each image, only grids, maps and --npz")
    group.add_argument("--npz", type=Path, metavar="FILE.npz", help="all images in the form of ADM's evaluator")
    return parser


def run(options: argparse.Namespace, world: World) -> None:
    """Samples and writes what the options ask for.

    Raises:
        UserError: anything that the user can mend, on every rank.
    """
    if options.npz and options.npz.suffix != ".npz":
        raise UserError(f"--npz: the name must end in .npz, got {str(options.npz)!r}")
    request = SampleRequest(options, options.model, options.count, world)
    output = options.output or options.model / "samples"
    world.together(lambda: _prepare(output, options) if world.first else None)

    started = time.perf_counter()
    shown: dict[int, np.ndarray] = {}
    maps: dict[int, np.ndarray] = {}

    def sampled() -> Iterator[Tensor]:
        bar = tqdm(total=options.count, unit="img", disable=not (world.first and sys.stderr.isatty()))
        with contextlib.closing(bar):
            for indices, samples in request.batches():
                images = samples.uint8()
                for i, image, grains in zip(indices, images, samples.grain_maps.numpy().astype(np.uint8)):
                    maps[i] = grains
                    if i < SHOWN:
                        shown[i] = image
                    if not options.no_images:
                        pictures.save_png(output / f"{i:06d}.png", image)
                bar.update(min(len(indices) * world.size, options.count - bar.n))
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

    if options.npz:
        numbers = None if request.labels is None else np.array(request.labels, np.int64)
        for _ in keep_images(sampled(), options.npz, options.count, options.batch_size, world, numbers):
            pass
    else:
        world.together(lambda: [None for _ in sampled()])
    seconds = time.perf_counter() - started
    for more_shown, more_maps in world.gather((shown, maps)):
        shown |= more_shown
        maps |= more_maps
    if not world.first:
        return
    images = np.stack([shown[i] for i in sorted(shown)])
    grains = np.stack([maps[i] for i in range(options.count)])
    with atomic_write(output / "grain_maps.npy") as path, open(path, "wb") as file:
        np.save(file, grains)
    labels = None if request.labels is None else request.labels[: len(images)]
    plain, outlined = sample_sheets(request.model, images, grains[: len(images)], labels)
    pictures.save_png(output / "grid.png", plain)
    pictures.save_png(output / "grid_grain_maps.png", outlined)
    ratio = float((grains == request.model.num_grains - 1).mean())
    spent = float(request.model.token_shares(torch.from_numpy(grains).long()).mean())
    settings = {**request.settings(), "fine_ratio": ratio, "tokens": round(spent, 4), "seconds": round(seconds, 2)}
    write_text(output / "settings.json", json.dumps(settings, indent=2) + "\n")
    print(f"{options.count} images in {seconds:.1f} s, {spent:.0%} of the tokens: {output / 'grid.png'}")


def _prepare(output: Path, options: argparse.Namespace) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if options.npz:
        options.npz.parent.mkdir(parents=True, exist_ok=True)
    last = -1 if options.no_images else options.count - 1
    for path in sorted(output.glob("[0-9]" * 6 + ".png")):
        if int(path.stem) > last:
            raise UserError(f"{output} holds images of a larger run, {path.name} for one: name another --output")
