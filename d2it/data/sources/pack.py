"""Packs: encoded images laid end to end in one `.npz`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from d2it.data.sources.base import ImageSource
from d2it.errors import UserError
from d2it.npz import NpzReader


class NpzPack(ImageSource):
    """Encoded images laid end to end in one `.npz`.

    Arrays: `jpeg` uint8 (the files, of any format that `decode` reads), `offsets` integers (N + 1), and optionally
    `labels` integers (N) and `classes` strings. The bytes are memory-mapped where the archive stores them
    uncompressed (`numpy.savez`), else read into memory. Object arrays are refused.

    Args:
        path: of the file.
        image_size: edge, or (height, width), in pixels.
        options: as for `ImageSource`.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.path = os.path.abspath(path)
        with NpzReader(path) as archive:
            for key in ("jpeg", "offsets"):
                if key not in archive.names:
                    raise UserError(
                        f"{path} has no array {key!r}: a pack holds jpeg, offsets and optionally labels, classes"
                    )
            self._bytes = archive.map("jpeg", expansion=4)  # encoded images do not compress
            offsets = archive.array("offsets")
            labels, classes = (archive.array(key) if key in archive.names else None for key in ("labels", "classes"))
        if self._bytes.dtype != np.uint8 or self._bytes.ndim != 1:
            raise UserError(f"{path}: jpeg must be a flat uint8 array, got {self._bytes.dtype} {self._bytes.shape}")
        if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 1:
            raise UserError(f"{path}: offsets must be a flat integer array, got {offsets.dtype} {offsets.shape}")
        if len(offsets) < 2:
            raise UserError(f"{path} holds no images")
        self._offsets = offsets.astype(np.int64)
        if self._offsets[0] < 0 or self._offsets[-1] > len(self._bytes) or (np.diff(self._offsets) < 0).any():
            raise UserError(f"{path}: offsets must ascend from 0 to at most the {len(self._bytes):,} bytes of jpeg")
        if labels is not None:
            self._read_labels(labels, classes)
        count = f"{self.num_classes} classes" if self.num_classes else "no classes"
        self.description = f"pack {os.path.basename(self.path)}: {len(self):,} images, {count}"

    def _read_labels(self, labels: np.ndarray, classes: np.ndarray | None) -> None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(self),):
            raise UserError(f"{self.path}: labels must be {len(self):,} integers, got {labels.dtype} {labels.shape}")
        if labels.min() < 0:
            raise UserError(f"{self.path}: labels must not be negative, got {int(labels.min())}")
        if labels.max() >= 2**31:
            raise UserError(f"{self.path}: labels must be below 2^31, got {int(labels.max())}")
        self.labels = labels.astype(np.int64)
        self.num_classes = int(labels.max()) + 1
        if classes is not None:
            if classes.dtype.kind not in "US" or classes.ndim != 1:
                raise UserError(f"{self.path}: classes must be a flat array of strings, got {classes.dtype}")
            if self.num_classes > len(classes):
                raise UserError(f"{self.path}: label {self.num_classes - 1} has no name, classes has {len(classes)}")
            try:
                self.classes = [str(c) for c in classes.astype(str)]
            except ValueError:
                raise UserError(f"{self.path}: classes must be text") from None
            self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def encoded(self, index: int) -> bytes:
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes()

    def _identify(self, digest: Any) -> None:
        digest.update(np.diff(self._offsets).astype("<i8").tobytes())

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
