"""The options that sample.py and evaluate.py share, and the samples that they ask for.

An image follows from its own seed, label and grain map: image i has seed + i, whatever the batch size and the number
of ranks (`d2it.sampling.pipeline` has the exact conditions). Of n ranks each computes every n-th batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import d2it
from d2it.diffusion import GRAIN_SCHEDULERS, SCHEDULERS, Guidance
from d2it.diffusion.guidance import MODES
from d2it.distributed import World
from d2it.errors import UserError, user_error
from d2it.models.precision import why_float32
from d2it.sampling import D2iT, Samples
from d2it.sampling.grain_maps import choose_maps
from d2it.seeds import derived_seed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of model, classes, maps and sampler; a command has its own count, seed, batch size, device."""
    parser.add_argument(
        "--any-vae", action="store_true", help="accept a VAE other than the one whose latents the model was trained on"
    )
    group = parser.add_argument_group("classes", "balanced by default")
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
    maps.add_argument(
        "--fine-ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="random maps with this share of finest regions, the rest coarsest; or a share for each grain but the "
        "coarsest, of it or finer (0.5 0.25)",
    )

    group.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="share of the tokens to spend, 0.25 ... 1.0: sampled maps on average; a drawing (any gray levels or real "
        "numbers: the lighter the finer) and a photo exactly",
    )

    group = parser.add_argument_group("sampler", "the model's own settings unless given")
    group.add_argument("--scheduler", metavar="NAME", help=", ".join(SCHEDULERS))
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--grain-scheduler", metavar="NAME", help=f"of the maps: {', '.join(GRAIN_SCHEDULERS)}")
    group.add_argument("--grain-steps", type=int, help="denoising steps of the maps")
    group.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is none")
    group.add_argument(
        "--guide",
        type=Path,
        metavar="FOLDER",
        help="folder of a weaker model that guides in place of the null label (autoguidance)",
    )
    group.add_argument("--guidance-mode", choices=MODES, help="how it depends on time (constant)")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of T")
    group.add_argument("--guidance-power", type=float, metavar="P", help="of power-cosine")
    group.add_argument("--cfg-channels", type=int, metavar="N", help="guide the first N latent channels; DiT's 3 of 4")
    group.add_argument("--grain-guidance", type=float, metavar="W", help="classifier-free guidance scale of the maps")

    group = parser.add_argument_group("speed")
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bf16"),
        help="auto: bf16 on a GPU that has it, and on a CPU that multiplies it for transformers 256 wide or more",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    group.add_argument("--cuda-graph", action="store_true", help="a step as one CUDA graph")


def given_options(options: argparse.Namespace) -> list[str]:
    """The options of `add_options` that are not left at their defaults."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(options, name) != value]


MOST_SAMPLES = 10_000_000  # their labels and maps are held in memory


class SampleRequest:
    """The samples that the options ask for; whatever does not fit is an error before the first of them.

    Args:
        options: of `add_options`, with `seed` and `batch_size`.
        path: of the model.
        count: images over all ranks.
        world: the ranks.

    Attributes:
        model: the D2iT.
        labels: one an image, or None without classes.

    Raises:
        UserError: anything that the user can mend, the same on every rank.
    """

    def __init__(self, options: argparse.Namespace, path: Path, count: int, world: World) -> None:
        for name, value, least in (
            ("count", count, 1),
            ("batch-size", options.batch_size, 1),
            ("seed", options.seed, 0),
        ):
            if value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if count > MOST_SAMPLES:
            raise UserError(f"--count must be at most {MOST_SAMPLES:,}, got {count}")
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
            with user_error():
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
        names = ("budget", "scheduler", "steps", "grain_scheduler", "grain_steps", "grain_guidance")
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
        scale = model.sampling.get("guidance", 1.0)
        scale = detail.get("scale", scale.get("scale", 1.0) if isinstance(scale, dict) else scale)
        if options.guide and scale == 1:
            raise UserError(f"--guide {options.guide} has no effect at a guidance of 1: add --guidance W")
        with user_error():
            if detail:
                detail.setdefault("scale", scale)
                given["guidance"] = Guidance(**detail)
            # Raises what does not fit on every rank, before anything is sampled.
            model(0, grain_map=None if self.maps is None else self.maps(range(1))[:0], **given)
        return {**given, "cuda_graph": options.cuda_graph}

    def settings(self) -> dict[str, Any]:
        """All that the images follow from; `weights` are the hashes of the parts, the decoder's among them."""
        options, model, world = self.options, self.model, self.world
        used = {"scheduler": "ddpm", "steps": 250, "guidance": 1.0, **model.sampling, **self.given}
        if isinstance(used["guidance"], Guidance):
            used["guidance"] = dataclasses.asdict(used["guidance"])
        labels: Any = None
        if self.labels is not None:
            labels = "random" if options.random else "balanced"
            labels = labels if options.labels is None else self.labels[: len(options.labels)]
        return {
            "model": str(self.path),
            "weights": {name: part.weights_sha256 for name, part in model.parts.items()}
            | ({} if model.guide is None else {"guide": model.guide.weights_sha256}),
            "guide": None if options.guide is None else str(options.guide),
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
    classes = model.num_classes
    numbers: Sequence[int] = range(classes)
    if options.labels is not None:
        try:
            numbers = model.class_numbers(options.labels)
        except ValueError as error:
            raise UserError(f"--{error}") from None
    if not classes:
        return None
    if options.random:
        return [derived_seed(options.seed + i, "label") % classes for i in range(count)]
    return [numbers[i % len(numbers)] for i in range(count)]


def _model(options: argparse.Namespace, path: Path, world: World) -> D2iT:
    with user_error(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        given: dict[str, Any] = {"any_vae": options.any_vae, "guide": options.guide}
        model = D2iT.from_pretrained(path, device=world.device, **given)
    if caught and world.first:
        print(f"warning: {caught[0].message}", file=sys.stderr)
    if options.cuda_graph and world.device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU, this is {world.device}")
    if options.precision == "bf16" or (options.precision == "auto" and prefers_bf16(model, world)):
        model.to(dtype=torch.bfloat16)
    return model.compile() if options.compile else model


def prefers_bf16(model: D2iT, world: World) -> bool:
    """Returns whether bfloat16 is faster for all transformers, on the devices of all ranks."""
    networks = [model.content_transformer, model.grain_transformer, model.guide]
    mine = all(why_float32(network.config, world.device) is None for network in networks if network is not None)
    return all(world.gather(mine))
