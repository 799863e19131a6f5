"""The command that turns weights of the original DiT into a folder for `sample.py`.

python -m d2it.sampling.convert DiT-XL-2-256x256.pt runs/dit_xl --vae sd-vae-ft-ema
python sample.py runs/dit_xl --labels 207 360 --guidance 4 --cfg-channels 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2it.errors import run_command, user_error
from d2it.models.convert import load_dit
from d2it.models.klvae import KLVAE
from d2it.sampling.pipeline import D2iT


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m d2it.sampling.convert", description="Weights of the original DiT for this package."
    )
    parser.add_argument("checkpoint", help="a released .pt file, or one of its training")
    parser.add_argument("folder", help="where the model goes")
    parser.add_argument(
        "--vae",
        metavar="FOLDER",
        help="the VAE of its latents in diffusers' form (sd-vae-ft-ema or sd-vae-ft-mse): the folder is then one for "
        "sample.py and evaluate.py",
    )
    parser.add_argument("--heads", type=int, help="attention heads, for widths that DiT does not have")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes; needed where the label table has no row for the null label (trained with class_dropout_prob=0)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the file, writes a folder for `DiT.from_pretrained`, or with a VAE for `D2iT.from_pretrained`."""
    options = parser().parse_args(arguments)
    with user_error():
        model = load_dit(options.checkpoint, heads=options.heads, num_classes=options.num_classes)
        if options.vae:
            D2iT(KLVAE.from_diffusers(options.vae), None, model).save_pretrained(options.folder)
        else:
            model.save_pretrained(options.folder)
    config = model.config
    null = "no null label" if config.class_dropout_prob == 0 else "the null label"
    print(f"{options.folder}: DiT, width {config.dim}, {config.depth} blocks, {config.num_classes} classes, {null}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
