"""Opening a source of images by what its path is."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from d2it.data.sources.base import ImageSource
from d2it.data.sources.demo import DemoPhotos
from d2it.data.sources.folder import ImageFolder, find_images
from d2it.data.sources.pack import NpzPack
from d2it.data.sources.shards import WebDatasetShards
from d2it.errors import UserError


def open_source(path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> ImageSource:
    """Opens a source of images by what `path` is.

    Args:
        path: "demo" (`DemoPhotos`), a `.npz` (`NpzPack`), one or more `.tar` shards as a file, a folder of them, a glob
            or a numeric range "shard-{000..127}.tar" (`WebDatasetShards`), or a folder of images (`ImageFolder`).
        image_size: edge, or (height, width), in pixels. Images are scaled until they just cover it and cut.
        options: `augment`, `crop` and `upsample`, as for `ImageSource`.

    Returns:
        The source.

    Raises:
        UserError: nothing there, nothing inside, kinds mixed, or damaged beyond opening.
    """
    text = os.fspath(path)
    if text == "demo":
        return DemoPhotos(image_size, **options)
    if os.path.isdir(text):
        shards = [s for s in sorted(glob.glob(os.path.join(glob.escape(text), "*.tar"))) if not os.path.isdir(s)]
        if not shards:
            return ImageFolder(text, image_size, **options)
        images = find_images(text).files
        if images:
            raise UserError(
                f"{text} holds shards ({os.path.basename(shards[0])}, ...) beside images ({images[0]}, ...): "
                "give one or the other"
            )
        return WebDatasetShards(shards, image_size, **options)
    if text.endswith(".tar"):
        return WebDatasetShards(_expand(text), image_size, **options)
    if not os.path.exists(text):
        raise UserError(f"{text}: no such file or folder")
    if text.endswith(".npz"):
        return NpzPack(text, image_size, **options)
    raise UserError(f"{text} is neither a folder, a .npz pack nor a .tar shard")


def _expand(pattern: str) -> list[str]:
    """Returns the shards that a path, a glob or a range {000..127} names, in order."""
    if os.path.exists(pattern):
        return [pattern]
    if match := re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern):
        first, last = match.groups()
        if int(last) - int(first) > 10**6:
            raise UserError(f"{pattern} names more than a million shards")
        head, tail = pattern[: match.start()], pattern[match.end() :]
        shards = [f"{head}{n:0{len(first)}d}{tail}" for n in range(int(first), int(last) + 1)]
        for shard in shards:
            if not os.path.exists(shard):
                raise UserError(f"{shard}: no such file or folder")
    else:
        shards = sorted(glob.glob(pattern))
    if not shards:
        raise UserError(f"{pattern}: no such file or folder")
    return shards
