"""Tar shards in the layout of WebDataset."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from d2it.data.decode import EXTENSIONS, MAX_BYTES, Unreadable
from d2it.data.sources.base import ImageSource, Names, report_left_out
from d2it.errors import UserError, reason_of
from d2it.files import open_regular

# The most that one header (a long name, a list of sparse parts) may hold.
_HEADER = 2**20
_LABELS = (".cls", ".json")


@dataclass
class _Sample:
    """One sample of a shard.

    Attributes:
        place: (offset, size) of the image's bytes in the file.
        label: of the image, or None.
    """

    place: tuple[int, int]
    label: int | None = None


class WebDatasetShards(ImageSource):
    """Tar shards in WebDataset's layout: members that share a name up to the first dot are one sample.

    One pass over the tar headers notes where each image lies; after that an image is one positioned read, so order
    and resume are as exact as a folder's and nothing is extracted. The key of a member is its path up to the first dot
    of the base name, and what follows is its suffix. A sample needs one member `.jpg`, `.jpeg`, `.png`, `.webp` or
    `.bmp`; its label comes from `.cls` (an integer) or from the integer `label` in `.json`. A name that occurs twice in
    a shard, or two images of one key, are an error. An image whose name has another dot, "photo 2.0.png", belongs to a
    key without an image of its own ("photo 2"); it is left out by name, an error above 1 %. Every other member, pickles
    included, is ignored unread, and so are hidden files, links, devices and folders. Compressed archives cannot be read
    at a position and are refused.

    Args:
        shards: paths, in order.
        image_size: edge, or (height, width), in pixels.
        options: as for `ImageSource`.
    """

    def __init__(self, shards: Sequence[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.shards = [os.path.abspath(shard) for shard in shards]
        scans, left_out = [], []
        for shard in self.shards:
            samples, strays = _scan_shard(shard)
            scans.append(samples)
            left_out += strays
        labels = [sample.label for scan in scans for sample in scan.values()]
        first = f"{self.shards[0]}{' and the other shards' * (len(self.shards) > 1)}"
        report_left_out(first, left_out, len(labels))
        if not labels:
            raise UserError(f"{first}: no images inside")
        self._keys = Names([key.encode("utf-8", "surrogateescape") for scan in scans for key in scan])
        places = [np.array([sample.place for sample in scan.values()], np.int64).reshape(-1, 2) for scan in scans]
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
        key = self._keys[index].decode("utf-8", "backslashreplace")
        return f"{self.shards[self._places[index, 0]]}::{key}"

    def encoded(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self._places[index])
        if size > MAX_BYTES:
            raise Unreadable(f"a member above {MAX_BYTES:,} bytes")
        with open_regular(self.shards[shard]) as file:
            file.seek(offset)
            return file.read(size)

    def _identify(self, digest: Any) -> None:
        self._keys.update(digest)
        digest.update(self._places[:, 2].astype("<i8").tobytes())


class _Headers:
    """A file of which tarfile may read headers and nothing large.

    Args:
        file: the shard.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        """Returns the next `size` bytes.

        Raises:
            tarfile.ReadError: more than a header can hold.
        """
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _scan_shard(path: str) -> tuple[dict[str, _Sample], list[str]]:
    """Returns the samples of a tar file by key, from its headers, and the images that belong to none by name."""
    images: dict[str, _Sample] = {}
    labels: dict[str, int] = {}
    strays: dict[str, str] = {}
    names: set[str] = set()
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                # A shard can hold a hundred thousand members, and tarfile keeps them all.
                tar.members = []
                if tar.offset <= member.offset:
                    raise UserError(f"{path}: a member with a negative size at byte {member.offset:,}")
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, "." + suffix.lower()
                if not stem or not suffix.endswith(EXTENSIONS + _LABELS):
                    continue
                if member.name in names:
                    raise UserError(f"{path}: {member.name} is in it twice")
                names.add(member.name)
                if suffix in EXTENSIONS:
                    if key in images:
                        raise UserError(f"{path}: sample {key} has two images, one of them {member.name}")
                    images[key] = _Sample((member.offset_data, member.size))
                elif suffix.endswith(EXTENSIONS):
                    strays[member.name] = key
                elif suffix in _LABELS and member.size < _HEADER:
                    file.seek(member.offset_data)
                    label = _read_label(file.read(member.size), suffix, f"{path}::{key}{suffix}")
                    if label is not None and labels.setdefault(key, label) != label:
                        raise UserError(f"{path}: sample {key} has the labels {labels[key]} and {label}")
            # tarfile takes a damaged header after the first one for the end; the true end is zeros or nothing.
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise UserError(f"{path}: damaged tar header at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar shard (compressed ones are not supported): {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (RecursionError, MemoryError, ArithmeticError, ValueError) as error:
        raise UserError(f"{path} is not a readable tar shard: {reason_of(error)}") from None
    for key, sample in images.items():
        sample.label = labels.get(key)
    # A second picture of a sample that has one ("0.seg.png" beside "0.png") is a companion, and no image of the set.
    lost = [f"{name}: its key ends at the first dot ({key!r})" for name, key in strays.items() if key not in images]
    return images, [f"{os.path.basename(path)}::{line}" for line in lost]


def _read_label(content: bytes, suffix: str, name: str) -> int | None:
    try:
        if suffix == ".cls":
            if not re.fullmatch(rb"\s*-?[0-9]+\s*", content):  # int() takes 1_000 too
                raise ValueError(content)
            return _checked(int(content))
        fields = json.loads(content)
        label = fields.get("label") if isinstance(fields, dict) else None
        return None if label is None else _checked(label)
    except (ValueError, RecursionError):
        raise UserError(f"{name} does not hold an integer label") from None


def _checked(label: object) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or abs(label) >= 2**31:
        raise ValueError(label)
    return label
