"""Tar shards in the layout of WebDataset."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from d2it.data.decode import EXTENSIONS, MAX_BYTES, Unreadable, decode
from d2it.data.sources.base import ImageSource
from d2it.errors import UserError


class WebDatasetShards(ImageSource):
    """Tar shards in WebDataset's layout: members that share a name up to the first dot are one sample.

    One pass over the tar headers notes where each image lies; after that an image is one positioned read, so order
    and resume are as exact as a folder's and nothing is extracted. A sample needs a member ``.jpg``, ``.jpeg``,
    ``.png``, ``.webp`` or ``.bmp``; its label comes from ``.cls`` (an integer) or from the integer ``label`` in
    ``.json``. Every other member, pickles included, is ignored unread, and so are links, devices and folders.
    Compressed archives cannot be read at a position and are refused.
    """

    def __init__(self, shards: Sequence[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.shards = [os.path.abspath(shard) for shard in shards]
        scans = [_scan_shard(shard) for shard in self.shards]
        labels = [label for scan in scans for _, _, label in scan]
        if not labels:
            raise UserError(f"{self.shards[0]}{' and the other shards' * (len(self.shards) > 1)}: no images inside")
        self._keys = np.array([key for scan in scans for key, _, _ in scan])
        places = [np.array([place for _, place, _ in scan], np.int64).reshape(-1, 2) for scan in scans]
        numbers = np.repeat(np.arange(len(scans)), [len(scan) for scan in scans])
        self._places = np.column_stack((numbers, np.concatenate(places)))  # (N, 3): shard, offset, size
        labelled = sum(label is not None for label in labels)
        if labelled == len(labels):
            self.labels = np.array(labels, np.int64)
            if self.labels.min() < 0:
                worst = int(self.labels.argmin())
                raise UserError(f"{self.name(worst)}: the label must not be negative, got {self.labels[worst]}")
            self.num_classes = int(self.labels.max()) + 1
        elif labelled:
            missing = self.name(next(i for i, label in enumerate(labels) if label is None))
            raise UserError(f"{missing} has no label (.cls or .json), while {labelled:,} other images have one")
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        self.description = f"{len(self.shards)} WebDataset shards: {len(self):,} images, {classes}"

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        key = bytes(self._keys[index]).decode("utf-8", "backslashreplace")
        return f"{self.shards[self._places[index, 0]]}::{key}"

    def picture(self, index: int) -> Image.Image:
        shard, offset, size = (int(v) for v in self._places[index])
        if size > MAX_BYTES:
            raise Unreadable(f"a member above {MAX_BYTES:,} bytes")
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        return decode(data, self.max_pixels)


def _scan_shard(path: str) -> list[tuple[bytes, tuple[int, int], int | None]]:
    """Return (key, (offset, size), label) of every image in a tar file, from its headers."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # a shard can hold a hundred thousand members; tarfile keeps them all
                if tar.offset <= member.offset:
                    raise UserError(f"{path}: a member with a negative size at byte {member.offset:,}")
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, "." + suffix.lower()
                if not stem:
                    continue
                if suffix in EXTENSIONS:
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix in (".cls", ".json") and member.size < 2**20:
                    file.seek(member.offset_data)
                    label = _shard_label(file.read(member.size), suffix, f"{path}::{key}{suffix}")
                    if label is not None:
                        labels[key] = label
            # tarfile takes a damaged header after the first one for the end; the true end is zeros or nothing.
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise UserError(f"{path}: damaged tar header at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar shard (compressed ones are not supported): {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return [(key.encode("utf-8", "surrogateescape"), place, labels.get(key)) for key, place in images.items()]


def _shard_label(content: bytes, suffix: str, name: str) -> int | None:
    try:
        fields = {"label": int(content.decode("ascii"))} if suffix == ".cls" else json.loads(content)
        label = fields.get("label") if isinstance(fields, dict) else None
        if label is None:
            return None
        if isinstance(label, bool) or not isinstance(label, int) or abs(label) >= 2**31:
            raise ValueError(label)
        return label
    except (ValueError, RecursionError):
        raise UserError(f"{name} does not hold an integer label") from None
