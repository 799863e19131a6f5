"""Packs: encoded images laid end to end in one `.npz`."""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from d2it.data.decode import decode
from d2it.data.sources.base import ImageSource
from d2it.errors import UserError


class NpzPack(ImageSource):
    """Encoded images laid end to end in one ``.npz``.

    Arrays: ``jpeg`` uint8 (the files, of any format that :func:`d2it.data.decode.decode` reads), ``offsets`` integers
    (N + 1), and optionally ``labels`` integers (N) and ``classes`` strings. The bytes are memory-mapped where the
    archive stores them uncompressed (``numpy.savez``), else read into memory. Object arrays are refused.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.path = os.path.abspath(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                arrays = {
                    key: _pack_array(archive, self.path, key)
                    for key in ("jpeg", "offsets", "labels", "classes")
                    if f"{key}.npy" in archive.namelist()
                }
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except Exception as error:  # zipfile and the npy parser raise many kinds over a damaged file
            raise UserError(f"{path} is not a readable .npz pack: {error}") from None
        for key in ("jpeg", "offsets"):
            if key not in arrays:
                raise UserError(
                    f"{path} has no array {key!r}: a pack holds jpeg, offsets and optionally labels, classes"
                )
        self._bytes, offsets = arrays["jpeg"], arrays["offsets"]
        if self._bytes.dtype != np.uint8 or self._bytes.ndim != 1:
            raise UserError(f"{path}: jpeg must be a flat uint8 array, got {self._bytes.dtype} {self._bytes.shape}")
        if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 1:
            raise UserError(f"{path}: offsets must be a flat integer array, got {offsets.dtype} {offsets.shape}")
        if len(offsets) < 2:
            raise UserError(f"{path} holds no images")
        self._offsets = offsets.astype(np.int64)
        if self._offsets[0] < 0 or self._offsets[-1] > len(self._bytes) or (np.diff(self._offsets) < 0).any():
            raise UserError(f"{path}: offsets must ascend from 0 to at most the {len(self._bytes):,} bytes of jpeg")
        if "labels" in arrays:
            self._read_labels(arrays["labels"], arrays.get("classes"))
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        self.description = f"pack {os.path.basename(self.path)}: {len(self):,} images, {classes}"

    def _read_labels(self, labels: np.ndarray, classes: np.ndarray | None) -> None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(self),):
            raise UserError(f"{self.path}: labels must be {len(self):,} integers, got {labels.dtype} {labels.shape}")
        self.labels = labels.astype(np.int64)
        count = int(self.labels.max()) + 1
        if classes is not None:
            if classes.dtype.kind not in "US" or classes.ndim != 1:
                raise UserError(f"{self.path}: classes must be a flat array of strings, got {classes.dtype}")
            self.classes = [str(c) for c in classes.astype(str)]
            if count > len(self.classes):
                raise UserError(f"{self.path}: label {count - 1} has no name, classes has {len(self.classes)}")
            count = len(self.classes)
        if self.labels.min() < 0:
            raise UserError(f"{self.path}: labels must not be negative, got {int(self.labels.min())}")
        self.num_classes = count

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def picture(self, index: int) -> Image.Image:
        data = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        return decode(data.tobytes(), self.max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as a copy of its data; a spawned worker maps the file again instead.
        state = self.__dict__.copy()
        if isinstance(self._bytes, np.memmap):
            state["_bytes"] = (self._bytes.offset, self._bytes.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._bytes, tuple):
            offset, shape = self._bytes
            self._bytes = np.memmap(self.path, np.uint8, "r", offset, shape)


def _pack_array(archive: zipfile.ZipFile, path: str, key: str) -> np.ndarray:
    """Return one array of an npz archive, memory-mapped if it is stored uncompressed.

    Raises:
        UserError: an object array, or a member that claims to unpack to much more than it holds.
    """
    info = archive.getinfo(f"{key}.npy")
    # Encoded images do not compress, and the small arrays not a thousandfold: more than that is a zip bomb.
    if info.file_size > 1000 * info.compress_size + 2**20 or (
        key == "jpeg" and info.file_size > 4 * info.compress_size + 2**20
    ):
        raise UserError(f"{path}: {key} claims {info.file_size:,} bytes from {info.compress_size:,}: refused")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        if dtype.hasobject:
            raise UserError(f"{path}: {key} holds pickled Python objects: refused")
        header = member.tell()
        if math.prod(shape) * dtype.itemsize != info.file_size - header:
            raise UserError(f"{path}: {key} is truncated")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(member.read(), dtype).reshape(shape, order="F" if fortran else "C")
    with open(path, "rb") as file:  # the local header's own extra field can differ from the central directory's
        file.seek(info.header_offset)
        local = file.read(30)
        if local[:4] != b"PK\x03\x04":
            raise UserError(f"{path}: damaged zip entry {key}")
        start = (
            info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )
    if start + info.file_size > os.path.getsize(path):
        raise UserError(f"{path}: {key} is truncated")
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")
