"""The command of sample.py: images and grain maps of a trained D2iT, on one process or many.

An image follows from its own seed, label and grain map: image i has seed + i, whatever the batch size and the number
of ranks (`d2it.models.pipeline` says how exactly). Each rank draws every so-manieth batch and writes its own images.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import d2it
from d2it.data.decode import TooSmall, Unreadable, center_crop, decode
from d2it.diffusion import SCHEDULERS, Guidance, random_grain_map
from d2it.diffusion.guidance import MODES
from d2it.diffusion.sampling import GRAIN_SCHEDULERS
from d2it.errors import UserError
from d2it.evaluation.images import keep_npz
from d2it.files import atomic_write
from d2it.models import D2iT
from d2it.models.base import pair
from d2it.models.pipeline import derived_seed
from d2it.training import pictures
from d2it.training.distributed import World, start, stop

#: The grids show so many images at most.
SHOWN = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws samples; 0, or 2 with one line where the user can mend it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    world = None
    try:
        world = start(options.device)
        run(options, world)
        return 0
    except UserError as error:
        if world is None or world.first:  # every rank has the same arguments, or was told by `World.together`
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    finally:
        stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Sample from a trained D2iT. Image i follows from seed + i, its label and its grain map alone.",
    )
    parser.add_argument("model", type=Path, help="the folder of a training run, or of D2iT.save_pretrained")
    parser.add_argument("--count", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (%(default)s)")

    group = parser.add_argument_group("classes", "balanced unless said otherwise")
    labels = group.add_mutually_exclusive_group()
    labels.add_argument("--labels", nargs="+", metavar="CLASS", help="numbers or names, in turn")
    labels.add_argument("--balanced", action="store_true", help="every class in turn")
    labels.add_argument("--random", action="store_true", help="each image's from its seed")

    group = parser.add_argument_group("grain maps", "sampled by the Dynamic Grain Transformer unless given")
    maps = group.add_mutually_exclusive_group()
    maps.add_argument(
        "--grain-map",
        type=Path,
        metavar="FILE",
        help="one map for all, or several in turn: .npy or .npz of grains (0 = coarsest), or a gray PNG with a pixel "
        "a region, black = coarsest ... white = finest",
    )
    maps.add_argument("--photo", type=Path, metavar="IMAGE", help="the map that the VAE gives this image, for all")
    maps.add_argument("--fine-ratio", type=float, metavar="R", help="random maps with this share of finest regions")

    group = parser.add_argument_group("sampler", "the model's own settings unless given")
    group.add_argument("--scheduler", metavar="NAME", help=f"of diffusers: {', '.join(SCHEDULERS)}")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--grain-scheduler", metavar="NAME", help=f"of the maps: {', '.join(GRAIN_SCHEDULERS)}")
    group.add_argument("--grain-steps", type=int, help="denoising steps of the maps")
    group.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale; 1 is none")
    group.add_argument("--guidance-mode", choices=MODES, help="how it depends on time (constant)")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of T")
    group.add_argument("--guidance-power", type=float, metavar="P", help="of power-cosine")
    group.add_argument("--cfg-channels", type=int, metavar="N", help="guide the first N latent channels; DiT's 3 of 4")
    group.add_argument("--grain-guidance", type=float, metavar="W", help="guidance scale of the maps")

    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=32, help="images at once on a GPU (%(default)s)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bf16"), help="auto: bf16 on a GPU that has it"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    group.add_argument("--cuda-graph", action="store_true", help="a step's model pass as one CUDA graph")

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="where it goes (<model>/samples)")
    group.add_argument("--no-images", action="store_true", help="no PNG of each image, only grids, maps and --npz")
    group.add_argument("--npz", type=Path, metavar="FILE.npz", help="all images in the form of ADM's evaluator")
    return parser


def run(options: argparse.Namespace, world: World) -> None:
    """Draw and write what the options ask for.

    Raises:
        UserError: anything that the user can mend, on every rank.
    """
    for name in ("count", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.npz and options.npz.suffix != ".npz":
        raise UserError(f"--npz: the name must end in .npz, got {str(options.npz)!r}")
    model = _model(options, world)
    labels = choose_labels(options.labels, options.random, options.count, model)
    maps, source = choose_maps(options, model)
    given = _sampler(options, model)
    output = options.output or options.model / "samples"
    world.together(lambda: _prepare(output, options) if world.first else None)

    started = time.perf_counter()
    starts = range(0, options.count, options.batch_size)
    shown: dict[int, np.ndarray] = {}
    drawn_maps: dict[int, np.ndarray] = {}

    def draw() -> Iterator[Tensor]:
        bar = tqdm(total=options.count, unit="img", disable=not (world.first and sys.stderr.isatty()))
        with contextlib.closing(bar):
            for first in itertools.islice(starts, world.rank, None, world.size):
                indices = range(first, min(first + options.batch_size, options.count))
                with _user_error():
                    samples = model(
                        seeds=[options.seed + i for i in indices],
                        labels=None if labels is None else [labels[i] for i in indices],
                        grain_map=None if maps is None else maps(indices),
                        **given,
                    )
                images = samples.uint8()
                for i, image, grains in zip(indices, images, samples.grain_maps.numpy().astype(np.uint8)):
                    drawn_maps[i] = grains
                    if i < SHOWN:
                        shown[i] = image
                    if not options.no_images:
                        pictures.save_png(output / f"{i:06d}.png", image)
                bar.update(min(len(indices) * world.size, options.count - bar.n))
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

    if options.npz:
        numbers = None if labels is None else np.array(labels, np.int64)
        for _ in keep_npz(draw(), options.npz, options.count, options.batch_size, world, numbers):
            pass
    else:
        world.together(lambda: [None for _ in draw()])
    seconds = time.perf_counter() - started
    for more_shown, more_maps in world.gather((shown, drawn_maps)):
        shown |= more_shown
        drawn_maps |= more_maps
    if not world.first:
        return
    images = np.stack([shown[i] for i in sorted(shown)])
    grains = np.stack([drawn_maps[i] for i in range(options.count)])
    with atomic_write(output / "grain_maps.npy") as path, open(path, "wb") as file:
        np.save(file, grains)
    overlaid = pictures.draw_grains(images, grains[: len(images)], model.content_transformer.config.num_grains)
    pictures.save_png(output / "grid.png", pictures.enlarge(pictures.tile(images)))
    pictures.save_png(output / "grid_grain_maps.png", pictures.enlarge(pictures.tile(overlaid)))
    settings = _settings(options, model, labels, source, given, world, seconds)
    settings["fine_ratio"] = float((grains == model.content_transformer.config.num_grains - 1).mean())
    with atomic_write(output / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{options.count} images in {seconds:.1f} s: {output / 'grid.png'}")


def choose_labels(names: Sequence[str] | None, random: bool, count: int, model: D2iT) -> list[int] | None:
    """The class of every image: those named in turn, every class in turn, or (`random`) each from its image's seed.

    Raises:
        UserError: a class that the model does not have.
    """
    classes = model.num_classes
    if names is None:
        return None if random or not classes else [i % classes for i in range(count)]
    if not classes:
        raise UserError("--labels: this model is unconditional")
    numbers = [_class_number(name, model.class_names or [], classes) for name in names]
    return [numbers[i % len(numbers)] for i in range(count)]


def _class_number(name: str, known: Sequence[str], classes: int) -> int:
    if name in known:
        return list(known).index(name)
    if re.fullmatch(r"-?\d+", name):
        if not 0 <= int(name) < classes:
            raise UserError(f"--labels must be in 0 ... {classes - 1}, got {name}")
        return int(name)
    if not known:
        raise UserError(f"--labels: this model knows its classes by number, 0 ... {classes - 1}, got {name!r}")
    near = difflib.get_close_matches(name, known, n=3) or list(known[:8])
    raise UserError(f"--labels: no class {name!r}; there are {', '.join(near)}{', ...' if classes > len(near) else ''}")


MapsOf = Callable[[range], Tensor]


def choose_maps(options: argparse.Namespace, model: D2iT) -> tuple[MapsOf | None, str]:
    """What gives the images of some indices their grain maps, None for the Dynamic Grain Transformer; and its name.

    Raises:
        UserError: a file that is no map for this model, or no photo, or a ratio outside 0 ... 1.
    """
    config = model.content_transformer.config
    if options.grain_map:
        read = read_grain_maps(options.grain_map, config.region_grid, config.num_grains)
        return lambda indices: torch.stack([read[i % len(read)] for i in indices]), str(options.grain_map)
    if options.photo:
        found = photo_grain_map(options.photo, model)
        return lambda indices: found.expand(len(indices), -1, -1), str(options.photo)
    if options.fine_ratio is not None:
        if not 0 <= options.fine_ratio <= 1:
            raise UserError(f"--fine-ratio must be in 0 ... 1, got {options.fine_ratio}")

        def random(indices: range) -> Tensor:
            seeds = [derived_seed(options.seed + i, "random map") for i in indices]
            drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
            return random_grain_map(config.region_grid, options.fine_ratio, config.num_grains, generator=drawn)

        return random, f"random, fine ratio {options.fine_ratio}"
    return None, "Dynamic Grain Transformer"


def read_grain_maps(path: Path, grid: tuple[int, int], num_grains: int) -> Tensor:
    """(N, h, w) int64 from a .npy or .npz of (h, w) or (N, h, w) grains, or from a gray PNG of (h, w).

    A PNG's levels are the grains from black (0, the coarsest) to white (the finest), evenly spaced; a pixel may be off
    by a quarter of a level. One whose values are all below `num_grains` holds the grains themselves.

    Raises:
        UserError: no such file, no map in it, one of another size than `grid`, or with more grains.
    """
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                values = np.asarray(image.convert("L"))
        else:
            values = np.load(path, allow_pickle=False)
            if isinstance(values, np.lib.npyio.NpzFile):
                values = values["grain_maps" if "grain_maps" in values.files else values.files[0]]
    except (OSError, ValueError, IndexError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a grain map (.npy, .npz or .png): {str(error).splitlines()[0]}") from None
    if values.ndim not in (2, 3) or values.dtype.kind not in "iub" or not len(values):
        raise UserError(f"{path}: a grain map is whole numbers (h, w) or (N, h, w), got {values.dtype} {values.shape}")
    if values.shape[-2:] != grid:
        got = f"{values.shape[-2]} x {values.shape[-1]}"
        raise UserError(f"{path}: this model's grain maps have {grid[0]} x {grid[1]} regions, got {got}")
    if path.suffix == ".png" and values.max() >= max(num_grains, 16):  # below 16 nobody sees a level
        step = 255 / (num_grains - 1)
        grains = np.rint(values / step).astype(np.int64)
        off = np.abs(values - grains * step) > step / 4
        if off.any():
            row, column = (int(i[0]) for i in np.nonzero(off))
            levels = ", ".join(f"{i * step:.0f}" for i in range(num_grains))
            raise UserError(
                f"{path}: gray {values[row, column]} in row {row}, column {column} is none of the levels {levels} of "
                f"{num_grains} grains"
            )
    else:
        grains = values.astype(np.int64)
    if grains.min() < 0 or grains.max() >= num_grains:
        raise UserError(f"{path}: grains must be in 0 ... {num_grains - 1}, got {grains.min()} ... {grains.max()}")
    return torch.from_numpy(grains.reshape(-1, *grid))


def photo_grain_map(path: Path, model: D2iT) -> Tensor:
    """(h, w) int64: what Dynamic Grained Coding finds in the centre of an image, cut to the model's size.

    Raises:
        UserError: no image there, or one smaller than the model's.
    """
    size = pair(model.content_transformer.config.image_size)
    try:
        image = center_crop(decode(path.read_bytes()), size)
    except (OSError, Unreadable) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except TooSmall as error:
        width, height = error.args
        raise UserError(f"{path}: {width} x {height} pixels, the model's images have {size[1]} x {size[0]}") from None
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(model.device)
    return model.vae.grain_map(pixels)[0][0].cpu()


def _model(options: argparse.Namespace, world: World) -> D2iT:
    bf16 = options.precision == "bf16" or (
        options.precision == "auto" and world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    with _user_error():
        model = D2iT.from_pretrained(
            options.model, device=world.device, dtype=torch.bfloat16 if bf16 else torch.float32
        )
    if options.cuda_graph and world.device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU, this is {world.device}")
    return model.compile() if options.compile else model


def _sampler(options: argparse.Namespace, model: D2iT) -> dict[str, Any]:
    """Arguments of the model's call: what is given, and the model's own where nothing is."""
    names = ("scheduler", "steps", "grain_scheduler", "grain_steps", "grain_guidance")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    detail = {
        "scale": options.guidance,
        "mode": options.guidance_mode,
        "interval": None if options.guidance_interval is None else tuple(options.guidance_interval),
        "power": options.guidance_power,
        "channels": options.cfg_channels,
    }
    detail = {name: value for name, value in detail.items() if value is not None}
    if "interval" in detail:
        detail.setdefault("mode", "interval")
    with _user_error():
        if detail:
            detail.setdefault("scale", model.sampling.get("guidance", 1.0))
            given["guidance"] = Guidance(**detail)
        # All that does not fit is said here, on every rank, before anything is drawn.
        model(0, grain_map=None, **given)
    return {**given, "cuda_graph": options.cuda_graph}


def _prepare(output: Path, options: argparse.Namespace) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if options.npz:
        options.npz.parent.mkdir(parents=True, exist_ok=True)
    last = -1 if options.no_images else options.count - 1
    for path in sorted(output.glob("[0-9]" * 6 + ".png")):
        if int(path.stem) > last:
            raise UserError(f"{output} holds images of a larger run, {path.name} for one: name another --output")


def _settings(
    options: argparse.Namespace,
    model: D2iT,
    labels: list[int] | None,
    source: str,
    given: dict[str, Any],
    world: World,
    seconds: float,
) -> dict[str, Any]:
    """What the images follow from, and what drew them."""
    used = {"scheduler": "ddpm", "steps": 250, "guidance": 1.0, **model.sampling, **given}
    if isinstance(used["guidance"], Guidance):
        used["guidance"] = dataclasses.asdict(used["guidance"])
    chosen: Any = None
    if model.num_classes:
        chosen = "random" if labels is None else "balanced" if options.labels is None else labels[: len(options.labels)]
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {
        "model": str(options.model),
        "count": options.count,
        "seed": options.seed,
        "labels": chosen,
        "grain_maps": source,
        **used,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compile": options.compile,
        "batch_size": options.batch_size,
        "ranks": world.size,
        "device": device,
        "seconds": round(seconds, 2),
        "d2it": d2it.__version__,
        "torch": torch.__version__,
    }


@contextlib.contextmanager
def _user_error() -> Iterator[None]:
    """A ValueError of the model's, which says which argument does not fit, as a line for the user."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
