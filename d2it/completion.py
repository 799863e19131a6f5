"""`d2it completion bash`: what a shell needs to complete the commands, their options and the settings of a training.

eval "$(d2it completion bash)"      # in ~/.bashrc; zsh alike
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import shtab

import d2it
from d2it.__main__ import COMMANDS
from d2it.errors import run_command

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="d2it completion", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the script of a shell."""

    def act() -> None:
        shell = parser().parse_args(arguments).shell
        functions: Any = _functions()
        print(shtab.complete(every_command(), shell, preamble=functions))

    return run_command(act)


def every_command() -> argparse.ArgumentParser:
    """One parser with all commands that can be imported here, without the help of each."""
    whole = argparse.ArgumentParser(prog="d2it", description="Train, sample and evaluate D2iT.")
    whole.add_argument("-V", "--version", action="version", version=d2it.__version__)
    commands = whole.add_subparsers(metavar="COMMAND")
    for name, (target, _, what) in COMMANDS.items():
        try:
            own = importlib.import_module(target.partition(":")[0]).parser()
        except ModuleNotFoundError:  # of an extra that is not installed
            own = argparse.ArgumentParser()
        for action in own._actions:
            if action.dest == "overrides":
                action.complete = {"bash": "_d2it_settings", "zsh": "_d2it_settings"}
            elif action.dest == "config":
                action.complete = {"bash": "_d2it_configurations", "zsh": "_d2it_configurations"}
            elif action.type is not None and getattr(action.type, "__name__", "") == "Path":
                action.complete = shtab.FILE
        commands.add_parser(name, help=what, parents=[own], add_help=False)
    return whole


def _functions() -> dict[str, str]:
    """Shell functions that complete the settings and configurations of `d2it train`, where it is installed."""
    try:
        from d2it.training.config import CONFIGS, setting_names
    except ModuleNotFoundError:
        return {}
    settings = " ".join(f"{name}=" for name in setting_names())
    configurations = " ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    return {
        "bash": f'_d2it_settings() {{ compgen -W "{settings}" -- "$1"; }}\n'
        f'_d2it_configurations() {{ compgen -W "{configurations}" -- "$1"; compgen -f -- "$1"; }}\n',
        "zsh": f"_d2it_settings() {{ compadd -S '' -- {settings}; }}\n"
        f"_d2it_configurations() {{ compadd -- {configurations}; _files; }}\n",
    }
