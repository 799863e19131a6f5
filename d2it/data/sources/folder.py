"""Folders of images: the one way in which training, calibration, evaluation and sampling find their pictures."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2it.data.decode import EXTENSIONS, MAX_BYTES, Unreadable
from d2it.data.sources.base import ImageSource, Names, logger, report_left_out, shown
from d2it.errors import UserError
from d2it.files import read_bytes

# Pictures that are not read; they are counted, so that a class of them cannot vanish.
_OTHER_PICTURES: tuple[str, ...] = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".jfif", ".jpe")
_OTHER_PICTURES += (".tga", ".ppm", ".pgm", ".pnm", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".nef")
# What sample.py writes beside its numbered images.
_GRIDS = ("grid.png", "grid_grain_maps.png")
_SAMPLES = ("000000.png", "grain_maps.npy")


@dataclass
class FoundImages:
    """The pictures below a folder.

    Attributes:
        root: the folder, absolute.
        files: paths of the images relative to `root`, sorted within each folder.
        left_out: one "path: reason" for every picture that cannot be used.
        hidden: files of images whose own name or folder begins with a dot, grids of samples among them.
        repeated: linked folders that are there already, or lead back.
        empty: folders directly below `root` without an image.
    """

    root: str
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def classes(self) -> tuple[list[str] | None, np.ndarray | None]:
        """Returns the names and the labels (N,) int64 of the folders directly below the root; None where not all images
        lie in one."""
        if not all(os.sep in file for file in self.files):
            return None, None
        tops = [file.split(os.sep, 1)[0] for file in self.files]
        names = sorted(set(tops))
        number = {name: i for i, name in enumerate(names)}
        return names, np.array([number[top] for top in tops], np.int64)

    def report(self, name: str) -> None:
        """Warns of everything that was passed over.

        Raises:
            UserError: more than 1 % of the pictures cannot be used.
        """
        for what, listed in (
            ("hidden files and grids of samples are not read", self.hidden),
            ("linked folders that are there already are not read again", self.repeated),
            ("folders without an image", self.empty),
        ):
            if listed:
                logger.warning("%s: %s: %s", name, what, shown(listed))
        report_left_out(name, self.left_out, len(self.files))


def find_images(path: str | os.PathLike[str]) -> FoundImages:
    """Lists the images below a folder; nothing is opened.

    Hidden files and folders (names that begin with a dot, "._" ones of macOS too) and the grids that sample.py writes
    beside its images are set aside. Links to folders are followed, each folder once, what lies there itself before
    what is linked. FIFOs, sockets, devices, dangling links and pictures of other formats are left out by name.

    Raises:
        UserError: the folder cannot be read.
    """
    found = FoundImages(os.path.abspath(path))
    real = os.path.realpath(found.root)
    seen = {real}
    links: list[tuple[str, str]] = []
    folders = [("", real)]  # relative to the root, and where it truly lies
    tops: set[str] = set()
    try:
        while folders or links:
            if folders:
                folder, real = folders.pop()
            else:
                folder, real = links.pop(0)
                if real in seen:
                    found.repeated.append(folder)
                    continue
                seen.add(real)
            with os.scandir(os.path.join(found.root, folder)) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            samples = any(entry.name in _SAMPLES for entry in listed)
            for entry in listed:
                name = os.path.join(folder, entry.name)
                image = entry.name.lower().endswith(EXTENSIONS)
                try:
                    is_folder = entry.is_dir()
                    is_file = entry.is_file()
                except OSError:  # a link to itself
                    is_folder = is_file = False
                if entry.name.startswith("."):
                    if image or is_folder:
                        found.hidden.append(name)
                elif is_folder:
                    if not folder:
                        tops.add(name)
                    inside = os.path.join(real, entry.name)
                    if entry.is_symlink():
                        links.append((name, os.path.realpath(inside)))
                    elif inside in seen:
                        found.repeated.append(name)
                    else:
                        seen.add(inside)
                        folders.append((name, inside))
                elif image and is_file:
                    (found.hidden if samples and entry.name in _GRIDS else found.files).append(name)
                elif image:
                    found.left_out.append(f"{name}: {'a dead link' if entry.is_symlink() else 'not a regular file'}")
                elif entry.name.lower().endswith(_OTHER_PICTURES):
                    found.left_out.append(f"{name}: not {', '.join(EXTENSIONS)}")
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    for names in (found.files, found.left_out, found.hidden):
        names.sort(key=lambda name: name.split(os.sep))  # as a walk in the order of names would come to them
    used = {name.split(os.sep, 1)[0] for name in found.files} | set(found.repeated)
    found.empty = sorted(tops - used)
    return found


class ImageFolder(ImageSource):
    """JPEG, PNG, WebP and BMP files below a folder, found by `find_images`.

    If the images lie in sub-folders, each sub-folder (with all below it) is a class, in sorted order; if they lie in
    the folder itself there are no labels; a folder with both is refused. What is passed over is a warning, and an error
    where it is more than 1 % of the pictures.

    Args:
        path: of the folder.
        image_size: edge, or (height, width), in pixels.
        options: as for `ImageSource`.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        found = find_images(path)
        self.root = found.root
        flat = next((file for file in found.files if os.sep not in file), None)
        top = next((file.split(os.sep, 1)[0] for file in found.files if os.sep in file), None)
        if flat and top:
            raise UserError(
                f"{path} holds images ({flat}, ...) beside folders of images ({top}, ...): give one or the other"
            )
        found.report(os.fspath(path))
        if not found.files:
            raise UserError(f"{path} holds no images ({', '.join(EXTENSIONS)}) and no WebDataset shards (.tar)")
        self.classes, self.labels = found.classes()
        if self.classes:
            self.num_classes = len(self.classes)
            if bad := [name for name in self.classes if os.fsencode(name) != name.encode("utf-8", "replace")]:
                raise UserError(f"{path}: the folder {bad[0]!r} would be a class, and its name is not UTF-8: rename it")
            _check_numbers(os.fspath(path), self.classes)
        self._files = Names([os.fsencode(file) for file in found.files])
        classes = f"{self.num_classes} classes" if self.classes else "no classes"
        left_out = f", {len(found.left_out)} left out" if found.left_out else ""
        self.description = f"folder {os.path.basename(self.root)}: {len(self):,} images, {classes}{left_out}"

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._files[index]))

    def encoded(self, index: int) -> bytes:
        return read_image(self.name(index))

    def _identify(self, digest: Any) -> None:
        self._files.update(digest)
        sizes = np.zeros(len(self), "<i8")
        for index in range(len(self)):
            try:
                sizes[index] = os.stat(self.name(index)).st_size
            except OSError:
                sizes[index] = -1
        digest.update(sizes.tobytes())


def read_image(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of an image file.

    Raises:
        Unreadable: it is not a regular file, too large, or cannot be read.
    """
    try:
        return read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def _check_numbers(path: str, classes: list[str]) -> None:
    """Warns where a folder that is named by a number is a class of another number."""
    if all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        off = [f"{name} is class {i}" for i, name in enumerate(classes) if int(name) != i]
        if off:
            logger.warning(
                "%s: folders named by numbers are classes in the order of their names, not of the numbers: %s; pad "
                "them with zeros from 0 on to have both agree",
                path,
                shown(off),
            )
