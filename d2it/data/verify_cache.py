"""`python -m d2it.data.verify_cache FOLDER`: what a cache holds, and whether every byte is as it was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from d2it.data.cache import LatentCache
from d2it.errors import run_command


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m d2it.data.verify_cache", description=__doc__)
    parser.add_argument("folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    cache = LatentCache(parser().parse_args(arguments).folder, verify=True)
    channels, height, width = cache.latent_shape
    print(f"{cache.description}; {len(cache):,} images cached, {len(cache.skipped)} unreadable")
    print(
        f"latents {channels} x {height} x {width}, grain maps {cache.grid[0]} x {cache.grid[1]}, flips: {cache.flips}"
    )
    for key, value in cache.facts.items():
        print(f"{key}: {value}")
    print("SHA-256 of every file: as written")


if __name__ == "__main__":
    sys.exit(run_command(main))
