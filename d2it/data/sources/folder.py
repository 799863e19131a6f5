"""Folders of images, with or without a folder for each class."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from d2it.data.decode import EXTENSIONS, MAX_BYTES, Unreadable, decode
from d2it.data.sources.base import ImageSource
from d2it.errors import UserError


class ImageFolder(ImageSource):
    """JPEG, PNG, WebP and BMP files below a folder.

    If the images lie in sub-folders, each sub-folder (with all below it) is a class, in sorted order; if they lie in
    the folder itself there are no labels; a folder with both is refused. Hidden files and other suffixes are ignored;
    links to folders are followed once.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.root = os.path.abspath(path)
        try:
            with os.scandir(self.root) as entries:
                top = sorted(entries, key=lambda entry: entry.name)
            flat = [entry.name for entry in top if _is_image(entry.name) and entry.is_file()]
            found: dict[str, list[str]] = {}
            seen = {os.path.realpath(self.root)}
            for entry in top:
                if entry.is_dir() and not entry.name.startswith("."):
                    found[entry.name] = _images_below(self.root, entry.name, seen)
            found = {name: files for name, files in found.items() if files}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if flat and found:
            raise UserError(
                f"{path} holds images ({flat[0]}, ...) beside folders of images ({next(iter(found))}, ...): "
                "give one or the other"
            )
        if not flat and not found:
            raise UserError(f"{path} holds no images ({', '.join(EXTENSIONS)}) and no WebDataset shards (.tar)")
        files = flat
        if found:
            self.classes = list(found)
            self.num_classes = len(found)
            self.labels = np.repeat(np.arange(len(found)), [len(f) for f in found.values()])
            files = [file for group in found.values() for file in group]
        # One array and not a list of strings: forked workers would copy every string they count a reference to.
        self._files = np.array([os.fsencode(file) for file in files])
        classes = f"{self.num_classes} classes" if found else "no classes"
        self.description = f"folder {os.path.basename(self.root)}: {len(self):,} images, {classes}"

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self._files[index])))

    def picture(self, index: int) -> Image.Image:
        with open(self.name(index), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise Unreadable(f"a file above {MAX_BYTES:,} bytes")
        return decode(data, self.max_pixels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(root: str, folder: str, seen: set[str]) -> list[str]:
    """Return the image files below root/folder, relative to root, in sorted order."""
    real = os.path.realpath(os.path.join(root, folder))
    if real in seen:
        return []
    seen.add(real)
    with os.scandir(os.path.join(root, folder)) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    files = []
    for entry in listed:
        if _is_image(entry.name) and entry.is_file():
            files.append(os.path.join(folder, entry.name))
        elif entry.is_dir() and not entry.name.startswith("."):
            files += _images_below(root, os.path.join(folder, entry.name), seen)
    return files
