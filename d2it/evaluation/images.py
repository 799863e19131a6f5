"""Images to evaluate, streamed: a folder, or an `.npz` of ADM's form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2it.data.decode import EXTENSIONS, Unreadable, decode
from d2it.data.sources import find_images, read_image
from d2it.errors import UserError, user_error
from d2it.npz import NpzReader


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read in batches.

    Attributes:
        path: where they lie.
        count: how many.
        size: (H, W) in pixels.
        labels: (count,) int64, or None where the images have none.
        batches: a function of the batch size and a limit (None is all) that yields the first `limit` images in order,
            as uint8 (B, 3, H, W).
    """

    path: str
    count: int
    size: tuple[int, int]
    labels: np.ndarray | None
    batches: Callable[..., Iterator[Tensor]]


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """Opens a folder of images or an `.npz`.

    Of a folder, every image below it, in the order of their names, found as training finds them (`find_images`); where
    all lie in sub-folders, these are the classes. Of an `.npz` in ADM's form, `arr_0`, uint8 (N, H, W, 3), streamed
    whatever its size; `arr_1`, integers (N,), are the labels.

    Raises:
        UserError: it is neither, it is empty, or it holds something else.
    """
    if os.path.isdir(path):
        return _folder(os.fspath(path))
    if os.path.isfile(path) and os.fspath(path).endswith(".npz"):
        return _archive(os.fspath(path))
    raise UserError(f"{path}: no such folder of images or .npz file")


def _folder(path: str) -> ImageSet:
    found = find_images(path)
    found.report(path)
    if not found.files:
        raise UserError(f"{path}: no images ({', '.join(EXTENSIONS)}) below this folder")
    files = [os.path.join(found.root, file) for file in found.files]
    size = _read(files[0]).shape[:2]

    def batches(batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        chosen = files[:limit]
        for start in range(0, len(chosen), batch_size):
            images = []
            for file in chosen[start : start + batch_size]:
                images.append(_read(file))
                if images[-1].shape[:2] != size:
                    raise UserError(f"{file}: {_by(images[-1].shape)} pixels, but {files[0]} has {_by(size)}")
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return ImageSet(path, len(files), size, found.classes()[1], batches)


def _archive(path: str) -> ImageSet:
    with NpzReader(path) as archive:
        header = archive.header("arr_0")
        labels = archive.array("arr_1") if "arr_1" in archive.names else None
    shape = header.shape
    if len(shape) != 4 or shape[3] != 3 or header.dtype != np.uint8 or header.fortran or 0 in shape:
        raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3) in C order, got {header.dtype} {shape}")
    if labels is not None:
        labels = labels.astype(np.int64) if labels.dtype.kind in "iu" and labels.shape == shape[:1] else None

    def batches(batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        with NpzReader(path) as archive:
            for rows in archive.rows("arr_0", batch_size, limit):
                yield torch.from_numpy(rows).permute(0, 3, 1, 2)

    return ImageSet(path, shape[0], (shape[1], shape[2]), labels, batches)


def _read(file: str) -> np.ndarray:
    with user_error(file, (Unreadable,)):
        return np.asarray(decode(read_image(file)))


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
