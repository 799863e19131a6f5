"""The one reader and writer of `.npz` and `.npy` files.

Arrays are checked by their headers before anything is read or allocated, pickled objects are refused, large arrays are
memory-mapped or streamed by rows, and every kind of damage is one line that names the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from d2it.errors import UserError, reason_of
from d2it.files import atomic_write, open_regular

if TYPE_CHECKING:
    from d2it.distributed import World

# numpy writes headers of 128 bytes and reads up to 10,000; those of version 2 may claim up to 4 GiB.
_HEADER = 2**14
# An array that is read into memory may exceed four times its compressed bytes by this much.
_BOMB = 2**28


@dataclass(frozen=True)
class Header:
    """The description of one array.

    Attributes:
        shape: of the array.
        dtype: of its elements; never an object.
        fortran: whether the elements lie in Fortran order.
        offset: bytes of the header, before the first element.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzReader:
    """An open `.npz` file; a context manager.

    Args:
        path: of the file.

    Attributes:
        path: as given.
        names: of the arrays inside, in the order of the file.

    Raises:
        UserError: there is no such file, or it is not an `.npz`; as do all methods over a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with contextlib.ExitStack() as stack, _one_line(self.path):
            self._file = stack.enter_context(open_regular(path))
            self._archive = stack.enter_context(zipfile.ZipFile(self._file))
            members = self._archive.namelist()
            if len(set(members)) < len(members):
                raise ValueError("two arrays have one name")
            self.names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
            self._stack = stack.pop_all()

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def header(self, name: str) -> Header:
        """Returns the description of an array, checked against the size of its member."""
        with _one_line(self.path), self._member(name) as (_, header, _):
            return header

    def array(self, name: str, expansion: int = 1000) -> np.ndarray:
        """Returns an array in memory, in the machine's byte order; `expansion` as for `map`."""
        with _one_line(self.path), self._member(name, expansion, _BOMB) as (member, header, rest):
            data = np.empty(header.nbytes, np.uint8)
            data[: len(rest)] = np.frombuffer(rest, np.uint8)
            _fill(member, data.data[len(rest) :])
            if member.read(1):  # reading to the end is what makes zipfile check the CRC
                raise EOFError("more data than the header describes")
            return _shaped(data, header)

    def map(self, name: str, expansion: int = 1000) -> np.ndarray:
        """Returns an array memory-mapped where its member is stored uncompressed, else in memory.

        An array that unpacks to more than `expansion` times its compressed bytes is refused.
        """
        info = self._archive.getinfo(f"{name}.npy")
        header = self.header(name)
        if info.compress_type != zipfile.ZIP_STORED or not header.nbytes:
            return self.array(name, expansion)
        with _one_line(self.path):
            # The local header's own extra field can differ in length from the central directory's.
            self._file.seek(info.header_offset)
            local = self._file.read(30)
            if local[:4] != b"PK\x03\x04":
                raise zipfile.BadZipFile(f"no entry where {name} should begin")
            start = info.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
            if start + info.file_size > os.fstat(self._file.fileno()).st_size:
                raise UserError(f"{self.path}: {name} is truncated")
            order: Literal["C", "F"] = "F" if header.fortran else "C"
            return np.memmap(self.path, header.dtype, "r", start + header.offset, header.shape, order)

    def rows(self, name: str, size: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """Yields `size` rows of an array at a time, the first `limit` in all (all where None); streamed."""
        with _one_line(self.path), self._member(name) as (member, header, rest):
            if header.fortran and len(header.shape) > 1:
                raise UserError(f"{self.path}: {name} must be in C order")
            count = header.shape[0]
            left = count if limit is None else min(limit, count)
            each = header.nbytes // max(count, 1)
            stream = io.BytesIO(rest)
            while left > 0:
                take = min(size, left)
                data = np.empty(take * each, np.uint8)
                got = stream.readinto(data.data)
                _fill(member, data.data[got:])
                left -= take
                shape = (take, *header.shape[1:])
                yield _shaped(data, Header(shape, header.dtype, False, 0))

    @contextlib.contextmanager
    def _member(
        self, name: str, expansion: int = 1000, most: float = math.inf
    ) -> Iterator[tuple[IO[bytes], Header, bytes]]:
        """Yields an array's member after its header, the header, and what was read of the elements with it."""
        if name not in self.names:
            raise UserError(f"{self.path}: no {name} in it; it holds {', '.join(self.names[:8]) or 'no arrays'}")
        info = self._archive.getinfo(f"{name}.npy")
        # Deflate reaches 1032 to 1 on constant bytes; real arrays of any size stay far below.
        packed = info.compress_size
        if info.file_size > expansion * packed + 2**20 or info.file_size > 4 * packed + most:
            raise UserError(f"{self.path}: {name} claims {info.file_size:,} bytes from {packed:,}: refused")
        with self._archive.open(info) as member:
            start = member.read(_HEADER)
            header = _parse(start, info.file_size, f"{self.path}: {name}")
            yield member, header, start[header.offset :]


def load_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Returns the array of a `.npy` file, or of an `.npz` the one called `name` (else the first).

    Raises:
        UserError: there is none, or it is damaged.
    """
    if os.fspath(path).lower().endswith(".npz"):
        with NpzReader(path) as archive:
            return archive.array(name if name in archive.names or not archive.names else archive.names[0])
    with _one_line(os.fspath(path)), open_regular(path) as file:
        start = file.read(_HEADER)
        header = _parse(start, os.fstat(file.fileno()).st_size, os.fspath(path))
        file.seek(header.offset)
        data = np.empty(header.nbytes, np.uint8)
        _fill(file, data.data)
        return _shaped(data, header)


def save_arrays(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Writes an `.npz`, which appears whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def image_writer(
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


def keep_images(
    batches: Iterator[Tensor],
    path: str | os.PathLike[str],
    count: int,
    batch_size: int,
    world: World,
    labels: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Passes a rank's batches through and writes those of all ranks to ADM's `.npz`, in the order of the images.

    Args:
        batches: every `world.size`-th batch, this rank's first; uint8 (B, 3, H, W).
        path: of the file.
        count: images over all ranks.
        batch_size: images of a batch; the last one may be smaller.
        world: the ranks.
        labels: (count,), stored as `arr_1`.

    Raises:
        UserError: on every rank, once the batches have run out, where one of them raised or could not write.
    """
    path = os.fspath(path)
    sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    parts = [f"{path}.rank{rank}" for rank in range(min(world.size, len(sizes)))]
    failure: OSError | UserError | None = None
    try:
        if world.rank < len(parts):
            with image_writer(parts[world.rank], sum(sizes[world.rank :: world.size])) as add:
                for batch in batches:
                    add(batch)
                    yield batch
    except (OSError, UserError) as error:
        failure = error

    def join() -> None:
        if failure is not None:
            raise failure

    def merge() -> None:
        with contextlib.ExitStack() as stack, image_writer(path, count, labels) as add:
            readers = [stack.enter_context(NpzReader(part)).rows("arr_0", batch_size) for part in parts]
            for i in range(len(sizes)):
                add(torch.from_numpy(next(readers[i % world.size])).permute(0, 3, 1, 2))

    try:
        world.together(join)
        world.together(lambda: merge() if world.first else None)
    finally:
        if world.rank < len(parts):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(parts[world.rank])


def _parse(start: bytes, size: int, where: str) -> Header:
    """Returns the header at the start of a `.npy` of `size` bytes; raises UserError over one that does not fit."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise UserError(f"{where} holds pickled Python objects: refused")
    header = Header(tuple(shape), dtype, fortran, stream.tell())
    if len(shape) > 32:
        raise UserError(f"{where} has {len(shape)} dimensions, more than 32")
    if min(shape, default=0) < 0 or dtype.itemsize == 0 or header.nbytes > size - header.offset:
        raise UserError(f"{where} is truncated: {dtype} {shape} does not fit into its {size:,} bytes")
    return header


def _fill(source: IO[bytes], data: memoryview) -> None:
    done = 0
    while done < len(data):
        got = source.read(min(len(data) - done, 2**24))
        if not got:
            raise EOFError("the data end early")
        data[done : done + len(got)] = got
        done += len(got)


def _shaped(data: np.ndarray, header: Header) -> np.ndarray:
    array = data.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    return array.astype(header.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Raises a UserError of one line over whatever zipfile, zlib and numpy's parser raise for a damaged file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: an array in it does not fit into memory") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        reason = reason_of(error)
        raise UserError(f"{path}: not a readable array file ({reason})") from None
