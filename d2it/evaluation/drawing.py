"""What sample.py and evaluate.py draw from a trained D2iT: their shared options, and the samples these ask for.

An image follows from its own seed, label and grain map: image i has seed + i, whatever the batch size and the number
of ranks (`d2it.models.pipeline` says how exactly). Each rank draws every so-manieth batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import d2it
from d2it.data.decode import EXTENSIONS, TooSmall, Unreadable, center_crop, decode
from d2it.diffusion import GRAIN_SCHEDULERS, SCHEDULERS, Guidance, random_grain_map
from d2it.diffusion.guidance import MODES
from d2it.errors import UserError
from d2it.files import sha256_of
from d2it.models import D2iT, Samples
from d2it.models.base import WEIGHTS_FILE
from d2it.models.pipeline import PARTS, derived_seed
from d2it.training.distributed import World


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is drawn and how; `--count`, `--seed`, `--batch-size`, `--device` are the command's."""
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
    maps.add_argument(
        "--photo",
        type=Path,
        metavar="PATH",
        help="the map that the VAE gives this image, for all; or those of the images in a folder, in turn",
    )
    maps.add_argument("--fine-ratio", type=float, metavar="R", help="random maps with this share of finest regions")

    group = parser.add_argument_group("sampler", "the model's own settings unless given")
    group.add_argument("--scheduler", metavar="NAME", help=", ".join(SCHEDULERS))
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--grain-scheduler", metavar="NAME", help=f"of the maps: {', '.join(GRAIN_SCHEDULERS)}")
    group.add_argument("--grain-steps", type=int, help="denoising steps of the maps")
    group.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale; 1 is none")
    group.add_argument("--guidance-mode", choices=MODES, help="how it depends on time (constant)")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of T")
    group.add_argument("--guidance-power", type=float, metavar="P", help="of power-cosine")
    group.add_argument("--cfg-channels", type=int, metavar="N", help="guide the first N latent channels; DiT's 3 of 4")
    group.add_argument("--grain-guidance", type=float, metavar="W", help="guidance scale of the maps")

    group = parser.add_argument_group("speed")
    group.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bf16"), help="auto: bf16 on a GPU that has it"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    group.add_argument("--cuda-graph", action="store_true", help="a step as one CUDA graph")


def given_options(options: argparse.Namespace) -> list[str]:
    """The options of `add_options` that are not left at their defaults."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(options, name) != value]


class Drawing:
    """The samples that the options ask for; what does not fit is said before any is drawn.

    Args:
        options: of `add_options`, with `seed` and `batch_size`.
        path: of the model.
        count: images over all ranks.

    Attributes:
        labels: one an image, or None without classes.

    Raises:
        UserError: anything that the user can mend, the same on every rank.
    """

    def __init__(self, options: argparse.Namespace, path: Path, count: int, world: World) -> None:
        for name, value in (("count", count), ("batch_size", options.batch_size)):
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        self.options, self.path, self.count, self.world = options, path, count, world
        self.model = _model(options, path, world)
        self.labels = choose_labels(options, count, self.model)
        self.maps, self.source = choose_maps(options, self.model)
        self.given = self._sampler()

    def batches(self) -> Iterator[tuple[range, Samples]]:
        """This rank's samples, batch by batch, with their numbers.

        Raises:
            UserError: a photo that cannot be read.
        """
        starts = range(0, self.count, self.options.batch_size)
        for first in itertools.islice(starts, self.world.rank, None, self.world.size):
            indices = range(first, min(first + self.options.batch_size, self.count))
            with _user_error():
                samples = self.model(
                    seeds=[self.options.seed + i for i in indices],
                    labels=None if self.labels is None else [self.labels[i] for i in indices],
                    grain_map=None if self.maps is None else self.maps(indices),
                    **self.given,
                )
            yield indices, samples

    def _sampler(self) -> dict[str, Any]:
        """Arguments of the model's call: what is given; the model takes its own where nothing is."""
        options, model = self.options, self.model
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
            model(0, grain_map=None if self.maps is None else self.maps(range(1))[:0], **given)
        return {**given, "cuda_graph": options.cuda_graph}

    def settings(self) -> dict[str, Any]:
        """What the images follow from, and what drew them; `weights` are the hashes of the parts, the decoder's too."""
        options, model, world = self.options, self.model, self.world
        used = {"scheduler": "ddpm", "steps": 250, "guidance": 1.0, **model.sampling, **self.given}
        if isinstance(used["guidance"], Guidance):
            used["guidance"] = dataclasses.asdict(used["guidance"])
        labels: Any = None
        if self.labels is not None:
            labels = "random" if options.random else "balanced"
            labels = labels if options.labels is None else self.labels[: len(options.labels)]
        files = {name: self.path / name / WEIGHTS_FILE for name in PARTS}
        return {
            "model": str(self.path),
            "weights": {name: sha256_of(file) for name, file in files.items() if file.is_file()},
            "image_size": list(model.image_size),
            "count": self.count,
            "seed": options.seed,
            "labels": labels,
            "grain_maps": self.source,
            **used,
            "dtype": str(model.dtype).removeprefix("torch."),
            "compile": options.compile,
            "batch_size": options.batch_size,
            "ranks": world.size,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "d2it": d2it.__version__,
            "torch": torch.__version__,
        }


def choose_labels(options: argparse.Namespace, count: int, model: D2iT) -> list[int] | None:
    """The class of every image: those named in turn, each from its image's seed, or every class in turn; or None.

    Raises:
        UserError: a class that the model does not have.
    """
    names, classes = options.labels, model.num_classes
    if not classes:
        if names is not None:
            raise UserError("--labels: this model is unconditional")
        return None
    if options.random:
        return [derived_seed(options.seed + i, "label") % classes for i in range(count)]
    numbers: Sequence[int] = range(classes)
    if names is not None:
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
    if options.grain_map:
        read = read_grain_maps(options.grain_map, model.region_grid, model.num_grains)
        return lambda indices: torch.stack([read[i % len(read)] for i in indices]), str(options.grain_map)
    if options.photo and options.photo.is_dir():
        photos = sorted(path for path in options.photo.rglob("*") if path.name.lower().endswith(EXTENSIONS))
        if not photos:
            raise UserError(f"{options.photo}: no images ({', '.join(EXTENSIONS)}) below this folder")
        photo_grain_map(photos[0], model)
        named = f"{options.photo}, {len(photos)} photos in turn"
        return lambda indices: torch.stack([photo_grain_map(photos[i % len(photos)], model) for i in indices]), named
    if options.photo:
        found = photo_grain_map(options.photo, model)
        return lambda indices: found.expand(len(indices), -1, -1), str(options.photo)
    if options.fine_ratio is not None:
        if not 0 <= options.fine_ratio <= 1:
            raise UserError(f"--fine-ratio must be in 0 ... 1, got {options.fine_ratio}")

        def random(indices: range) -> Tensor:
            seeds = [derived_seed(options.seed + i, "random map") for i in indices]
            drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
            return random_grain_map(model.region_grid, options.fine_ratio, model.num_grains, generator=drawn)

        return random, f"random, fine ratio {options.fine_ratio}"
    if model.grain_transformer is None:
        return None, "finest everywhere"
    return None, "Dynamic Grain Transformer"


def read_grain_maps(path: Path, grid: tuple[int, int], num_grains: int) -> Tensor:
    """(N, h, w) int64 from a .npy or .npz of (h, w) or (N, h, w) grains, or from a gray PNG of (h, w).

    A PNG's levels are the grains from black (0, the coarsest) to white (the finest), evenly spaced; a pixel may be off
    by a quarter of a level. One whose values are all below `num_grains` holds the grains themselves.

    Raises:
        UserError: no such file, no map in it, one of another size than `grid`, or with more grains.
    """
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                values = np.asarray(image.convert("L"))
        else:
            values = np.load(path, allow_pickle=False)
            if isinstance(values, np.lib.npyio.NpzFile):
                values = values["grain_maps" if "grain_maps" in values.files else values.files[0]]
    except (OSError, ValueError, IndexError, EOFError, BadZipFile, Image.DecompressionBombError) as error:
        # What numpy and Pillow say of a broken file is about pickles and plugins.
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{path}: not a grain map (.npy, .npz or .png){reason}") from None
    if values.ndim not in (2, 3) or values.dtype.kind not in "iub" or not len(values):
        raise UserError(f"{path}: a grain map is whole numbers (h, w) or (N, h, w), got {values.dtype} {values.shape}")
    if values.shape[-2:] != grid:
        got = f"{values.shape[-2]} x {values.shape[-1]}"
        raise UserError(f"{path}: this model's grain maps have {grid[0]} x {grid[1]} regions, got {got}")
    if path.suffix.lower() == ".png" and values.max() >= max(num_grains, 16):  # below 16 nobody sees a level
        step = 255 / max(1, num_grains - 1)
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
    size = model.image_size
    try:
        image = center_crop(decode(path.read_bytes()), size)
    except (OSError, Unreadable) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except TooSmall as error:
        width, height = error.args
        raise UserError(f"{path}: {width} x {height} pixels, the model's images have {size[1]} x {size[0]}") from None
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(model.device)
    return model.vae.grain_map(pixels)[0][0].cpu()


def _model(options: argparse.Namespace, path: Path, world: World) -> D2iT:
    bf16 = options.precision == "bf16" or (
        options.precision == "auto" and world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    with _user_error():
        model = D2iT.from_pretrained(path, device=world.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    if options.cuda_graph and world.device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU, this is {world.device}")
    return model.compile() if options.compile else model


@contextlib.contextmanager
def _user_error() -> Iterator[None]:
    """A ValueError of the model's, which says which argument does not fit, as a line for the user."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
