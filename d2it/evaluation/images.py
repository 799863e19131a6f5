"""Images to judge, streamed: a folder, an `.npz` of ADM's form; and the writer of that form."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from d2it.data.decode import EXTENSIONS, Unreadable, decode
from d2it.errors import UserError
from d2it.files import atomic_write

if TYPE_CHECKING:
    from d2it.distributed import World


class ImageSet:
    """`count` images of one `size` = (H, W), read in batches of uint8 (B, 3, H, W)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.count = 0
        self.size = (0, 0)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The first `limit` images (all where None), in order."""
        raise TypeError(f"{type(self).__name__} must say how it is read")


class ImageFolder(ImageSet):
    """Every image below a folder, in the order of their names."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.files = sorted(
            os.path.join(root, name)
            for root, _, names in os.walk(self.path)
            for name in names
            if name.lower().endswith(EXTENSIONS)
        )
        if not self.files:
            raise UserError(f"{self.path}: no images ({', '.join(EXTENSIONS)}) below this folder")
        self.count = len(self.files)
        self.size = self._read(self.files[0]).shape[:2]

    @staticmethod
    def _read(file: str) -> np.ndarray:
        try:
            with open(file, "rb") as handle:
                return np.asarray(decode(handle.read()))
        except (Unreadable, OSError) as error:
            raise UserError(f"{file}: {error}") from None

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        files = self.files[:limit]
        for start in range(0, len(files), batch_size):
            images = [self._read(file) for file in files[start : start + batch_size]]
            for file, image in zip(files[start : start + batch_size], images):
                if image.shape[:2] != self.size:
                    raise UserError(f"{file}: {_by(image.shape[:2])} pixels, but {self.files[0]} has {_by(self.size)}")
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class ImageArchive(ImageSet):
    """ADM's `.npz`: `arr_0`, uint8 (N, H, W, 3), read in chunks whatever its size."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        with _archive(self.path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _header(file, self.path)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or shape[0] == 0:
            raise UserError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3) in C order, got {dtype} {shape}")
        self.count = shape[0]
        self.size = shape[1:3]

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        left = self.count if limit is None else min(limit, self.count)
        each = self.size[0] * self.size[1] * 3
        with _archive(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file, self.path)
            while left > 0:
                take = min(batch_size, left)
                data = file.read(take * each)
                if len(data) < take * each:
                    raise UserError(f"{self.path}: cut off, {left} images are missing")
                left -= take
                array = np.frombuffer(data, np.uint8).reshape(take, *self.size, 3)
                yield torch.from_numpy(array.copy()).permute(0, 3, 1, 2)


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """A folder or an `.npz` as an `ImageSet`.

    Raises:
        UserError: it is neither, it is empty, or it holds something else.
    """
    if os.path.isdir(path):
        return ImageFolder(path)
    if os.path.isfile(path) and os.fspath(path).endswith(".npz"):
        return ImageArchive(path)
    raise UserError(f"{path}: no such folder of images or .npz file")


@contextlib.contextmanager
def npz_writer(
    path: str | os.PathLike[str], count: int, labels: np.ndarray | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """Yields a function that adds a batch to ADM's `.npz`; nothing is held in memory; the file appears whole or not.

    Args:
        path: of the file.
        count: images that will be added in all; the function takes uint8 (B, 3, H, W).
        labels: (count,) integers, stored as `arr_1`.

    Raises:
        ValueError: fewer or more than `count` images were added.
    """
    written = 0
    with atomic_write(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:

                def add(batch: Tensor) -> None:
                    nonlocal written
                    images = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                    if written == 0:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    written += len(images)
                    file.write(images.tobytes())

                yield add
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels), allow_pickle=False)
        if written != count:
            raise ValueError(f"count must be the number of images, got {count} for {written}")


def keep_npz(
    batches: Iterator[Tensor],
    path: str | os.PathLike[str],
    count: int,
    batch_size: int,
    world: World,
    labels: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Passes a rank's batches through and leaves those of all ranks in ADM's `.npz`, in the order of the images.

    Args:
        batches: every `world.size`-th batch, this rank's first; uint8 (B, 3, H, W).
        count, batch_size: images over all ranks, and of a batch; the last one may be smaller.
        labels: (count,), stored as `arr_1`.

    Raises:
        UserError: on every rank, once the batches have run out, where one of them raised or could not write.
    """
    path = os.fspath(path)
    starts = range(0, count, batch_size)
    sizes = [min(batch_size, count - first) for first in starts]
    parts = [f"{path}.rank{rank}" for rank in range(min(world.size, len(sizes)))]
    failure: OSError | UserError | None = None
    try:
        if world.rank < len(parts):
            with npz_writer(parts[world.rank], sum(sizes[world.rank :: world.size])) as add:
                for batch in batches:
                    add(batch)
                    yield batch
    except (OSError, UserError) as error:
        failure = error

    def join() -> None:
        if failure is not None:
            raise failure

    def merge() -> None:
        readers = [ImageArchive(part).batches(batch_size) for part in parts]
        with npz_writer(path, count, labels) as add:
            for i in range(len(sizes)):
                add(next(readers[i % world.size]))

    try:
        world.together(join)
        world.together(lambda: merge() if world.first else None)
    finally:
        if world.rank < len(parts):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(parts[world.rank])


def _archive(path: str) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None
    if "arr_0.npy" not in archive.namelist():
        archive.close()
        raise UserError(f"{path}: no arr_0 in it; it holds {', '.join(archive.namelist()) or 'nothing'}")
    return archive


def _header(file: Any, path: str) -> tuple[Any, bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: arr_0 is not an array ({error})") from None


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
