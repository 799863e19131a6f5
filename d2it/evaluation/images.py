"""Images to evaluate, streamed: a folder, or an `.npz` of ADM's form."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from d2it.data.decode import EXTENSIONS, Unreadable, decode
from d2it.data.sources import find_images, read_image
from d2it.errors import UserError, user_error
from d2it.npz import NpzReader


class ImageSet(ABC):
    """Images of one size, read in batches.

    Attributes:
        path: where they lie.
        count: how many.
        size: (H, W) in pixels.
        labels: (N,) int64, or None where the images have none.
        classes: names by label, or None.
    """

    path: str
    count: int
    size: tuple[int, int]
    labels: np.ndarray | None = None
    classes: list[str] | None = None

    @abstractmethod
    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Yields the first `limit` images (all where None) in order, as uint8 (B, 3, H, W)."""


class ImageFolder(ImageSet):
    """Every image below a folder, in the order of their names, found as training finds them (`find_images`).

    Where all lie in sub-folders, these are the classes.

    Args:
        path: of the folder.

    Attributes:
        files: absolute paths.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        found = find_images(path)
        found.report(self.path)
        if not found.files:
            raise UserError(f"{self.path}: no images ({', '.join(EXTENSIONS)}) below this folder")
        self.files = [os.path.join(found.root, file) for file in found.files]
        self.count = len(self.files)
        self.classes, self.labels = found.classes()
        self.size = self._read(self.files[0]).shape[:2]

    @staticmethod
    def _read(file: str) -> np.ndarray:
        with user_error(file, (Unreadable,)):
            return np.asarray(decode(read_image(file)))

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        files = self.files[:limit]
        for start in range(0, len(files), batch_size):
            images = [self._read(file) for file in files[start : start + batch_size]]
            for file, image in zip(files[start : start + batch_size], images):
                if image.shape[:2] != self.size:
                    raise UserError(f"{file}: {_by(image.shape[:2])} pixels, but {self.files[0]} has {_by(self.size)}")
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class ImageArchive(ImageSet):
    """ADM's `.npz`: `arr_0`, uint8 (N, H, W, 3), streamed whatever its size; `arr_1` integers (N,) are the labels.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with NpzReader(path) as archive:
            header = archive.header("arr_0")
            labels = archive.array("arr_1") if "arr_1" in archive.names else None
        shape = header.shape
        if len(shape) != 4 or shape[3] != 3 or header.dtype != np.uint8 or header.fortran or 0 in shape:
            raise UserError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3) in C order, got {header.dtype} {shape}")
        self.count = shape[0]
        self.size = (shape[1], shape[2])
        if labels is not None and labels.dtype.kind in "iu" and labels.shape == (self.count,):
            self.labels = labels.astype(np.int64)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        with NpzReader(self.path) as archive:
            for rows in archive.rows("arr_0", batch_size, limit):
                yield torch.from_numpy(rows).permute(0, 3, 1, 2)


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """Opens a folder of images or an `.npz`.

    Raises:
        UserError: it is neither, it is empty, or it holds something else.
    """
    if os.path.isdir(path):
        return ImageFolder(path)
    if os.path.isfile(path) and os.fspath(path).endswith(".npz"):
        return ImageArchive(path)
    raise UserError(f"{path}: no such folder of images or .npz file")


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
