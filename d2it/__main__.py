"""The command `d2it`: every command of the package under one name.

d2it train --config imagenet256_xl data.path=/data/imagenet
d2it sample runs/imagenet256_xl --labels 207 360 --guidance 1.5
torchrun --standalone --nproc-per-node=gpu -m d2it train --config imagenet256_xl data.path=/data/imagenet
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence

import d2it
from d2it.errors import UserError, run_command

# command -> (its function, the extra that installs what it imports, what it does)
COMMANDS = {
    "train": ("d2it.training.run:command", "train", "train D2iT: the demo, or a configuration by name or file"),
    "sample": ("d2it.sampling.cli:main", "sample", "sample images and grain maps from a trained D2iT"),
    "evaluate": ("d2it.evaluation.cli:main", "eval", "compare samples and reconstructions with real images"),
    "calibrate": ("d2it.data.calibrate:main", "train", "find the entropy thresholds of your images"),
    "verify-cache": ("d2it.data.verify_cache:main", "train", "check every byte of a latent cache"),
    "convert": (
        "d2it.sampling.convert:main",
        "sample",
        "turn weights of the original DiT into a model",
    ),
    "completion": ("d2it.completion:main", "sample", "print completion for bash, zsh or tcsh"),
    "studio": ("d2it.studio.cli:main", "studio", "a page to paint grain maps, sample and rebuild photos"),
}


def usage() -> str:
    """The text of `d2it --help`; nothing heavy is imported for it."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: d2it [-h] [--version] COMMAND ...",
            "",
            "Train, sample and evaluate D2iT, the Dynamic Diffusion Transformer.",
            "",
            *lines,
            "",
            "`d2it COMMAND --help` explains a command. On every GPU of a machine:",
            "torchrun --standalone --nproc-per-node=gpu -m d2it COMMAND ...",
        ]
    )


@contextlib.contextmanager
def needing(command: str) -> Iterator[None]:
    """Turns the lack of a package that a command imports, at any time, into a UserError that names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "d2it":
            raise
        extra = COMMANDS[command][1]
        raise UserError(f"d2it {command} needs the package {error.name}: pip install 'd2it[{extra}]'") from None


def load(command: str) -> Callable[[Sequence[str]], int | None]:
    """Imports a command.

    Raises:
        UserError: no such command, or a package of its extra is not installed.
    """
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}; there are {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[command][0].partition(":")
    with needing(command):
        return getattr(importlib.import_module(module), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 with one line where the user can put it right."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int | None:
        if not words or words[0] in ("-h", "--help"):
            print(usage(), flush=True)
            return 0 if words else 2
        if words[0] in ("-V", "--version"):
            print(d2it.__version__)
            return 0
        act = load(words[0])
        with needing(words[0]):
            return act(words[1:])

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
