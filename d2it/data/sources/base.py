"""What every source of images is: a finite, ordered set, cut to one size."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2it.data.decode import TooSmall, Unreadable, center_crop, decode, random_crop
from d2it.errors import UserError
from d2it.seeds import Draws

logger = logging.getLogger("d2it.data")

# More than this share of a source left out or unreadable is a damaged data set: an error.
UNREADABLE_SHARE = 0.01
# Images whose bytes enter a source's fingerprint.
_SAMPLE = 64


def check_classes(
    description: str, found: int, labels: np.ndarray | None, num_classes: int, allow_missing: bool = False
) -> None:
    """Raises UserError unless images of `found` classes are what a model of `num_classes` needs.

    Args:
        description: of the images, for the message.
        found: classes of the images, 0 where they have no labels.
        labels: (N,) int64, or None.
        num_classes: classes of the model.
        allow_missing: accept fewer classes than `num_classes`.
    """
    if not found or labels is None:
        raise UserError(f"{description}: num_classes={num_classes} needs labels")
    if found > num_classes:
        raise UserError(f"{description}: labels reach {found - 1}, num_classes is {num_classes}")
    if found < num_classes and not allow_missing:
        raise UserError(
            f"{description}: num_classes is {num_classes}, but there are {found} classes: set it to {found}, or allow "
            "missing classes on purpose (data.allow_missing_classes=true)"
        )
    missing = np.setdiff1d(np.arange(found), labels)
    if len(missing):
        logger.warning("%s: no image has label %s", description, shown(map(str, missing)))


def shown(names: Iterable[str]) -> str:
    """Returns the first four names as a list for a message, with the number of all where there are more."""
    listed = list(names)
    return ", ".join(listed[:4]) + (f", ... ({len(listed):,} in all)" if len(listed) > 4 else "")


def report_left_out(description: str, left_out: Sequence[str], kept: int) -> None:
    """Warns of pictures that a source cannot use.

    Args:
        description: of the source.
        left_out: one "name: reason" a picture.
        kept: pictures that it uses.

    Raises:
        UserError: they are more than 1 % of all.
    """
    if not left_out:
        return
    line = f"{description}: {len(left_out):,} of {len(left_out) + kept:,} pictures are left out: {shown(left_out)}"
    if len(left_out) > UNREADABLE_SHARE * (len(left_out) + kept):
        raise UserError(f"{line}; more than {UNREADABLE_SHARE:.0%}")
    logger.warning("%s", line)


class Names:
    """Byte strings in two arrays: forked workers copy a list's pages, and a rectangular array pads to the longest.

    Args:
        names: the strings.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes()

    def update(self, digest: Any) -> None:
        """Adds all names to a hash."""
        digest.update(self._ends.tobytes())
        digest.update(self._bytes.tobytes())


class ImageSource(ABC):
    """A finite, ordered set of images, cut to one size.

    `source[i]` is `{"image": uint8 (3, H, W), "label": int64, "index": int64}`, never augmented; the label is -1 where
    the source has none. A loader calls `fetch`, which batches, augments and steps over unreadable images. A format is
    a subclass with `__len__`, `name`, and `encoded` (or `picture`, where images are not files).

    Attributes:
        image_size: (H, W) in pixels.
        labels: (N,) int64, or None.
        classes: names by label, or None where the source has none.
        num_classes: number of classes, 0 where images have no labels.
        description: one line for provenance, without the path's parents.
        augment: whether half of the images that a training loader draws are flipped.
        crop: "center" or "random", in a training loader.
        upsample: whether images smaller than `image_size` are enlarged, as ADM does, or an error.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None
    num_classes: int = 0
    description: str = ""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        augment: bool = False,
        crop: str = "center",
        upsample: bool = False,
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
        if crop not in ("center", "random"):
            raise ValueError(f'crop must be "center" or "random", got {crop!r}')
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.augment = augment
        self.crop = crop
        self.upsample = upsample
        self._fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of image `index` for messages."""

    def encoded(self, index: int) -> bytes | None:
        """Returns the file of image `index`, or None where images are not files.

        Raises:
            Unreadable, OSError: it cannot be read.
        """
        return None

    def picture(self, index: int) -> Image.Image:
        """Returns image `index` decoded, at its own size.

        Raises:
            Unreadable, OSError: it cannot be read.
        """
        return decode(cast(bytes, self.encoded(index)))

    def fingerprint(self) -> str:
        """Returns the identity of the images and labels by content, as a hex string.

        It is the SHA-256 over the number, names, sizes and labels of all images, and the content of 64 of them, evenly
        spread. Where the images lie, and the size that they are cut to, do not enter. The first call of a folder reads
        the sizes of all its files.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([len(self), self.num_classes, self.classes]).encode())
            if self.labels is not None:
                digest.update(self.labels.astype("<i8").tobytes())
            self._identify(digest)
            count = min(len(self), _SAMPLE)
            for index in {i * (len(self) - 1) // max(1, count - 1) for i in range(count)}:
                digest.update(hashlib.sha256(self._content(index)).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _identify(self, digest: Any) -> None:
        """Adds the names of all images, and their sizes where those cost little, to a hash."""
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "surrogateescape") + b"\0")

    def _content(self, index: int) -> bytes:
        try:
            content = self.encoded(index)
            if content is None:
                image = self.picture(index)
                content = json.dumps(image.size).encode() + image.tobytes()
            return content
        except (Unreadable, OSError) as error:
            return str(error).encode()

    def require_classes(self, num_classes: int, *, allow_missing: bool = False) -> None:
        """Raises UserError unless the images have `num_classes` classes.

        Args:
            num_classes: classes of the model.
            allow_missing: accept that there are fewer. Classes without an image are a warning either way.
        """
        check_classes(self.description, self.num_classes, self.labels, num_classes, allow_missing)

    def pixels(self, index: int, draws: Draws | None = None) -> np.ndarray:
        """Returns image `index` as (H, W, 3) uint8, augmented if `draws` are given and the source augments.

        Raises:
            Unreadable: the image cannot be decoded.
            UserError: it is smaller than asked and `upsample` is False.
        """
        try:
            image = self.picture(index)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None
        try:
            if draws is not None and self.crop == "random":
                image = random_crop(image, self.image_size, draws, self.upsample)
            else:
                image = center_crop(image, self.image_size, self.upsample)
        except TooSmall as small:
            width, height = small.args
            raise UserError(
                f"{self.name(index)} is {width} x {height} pixels, smaller than the {self.image_size[1]} x "
                f"{self.image_size[0]} asked for: ask for less, or enlarge it as ADM does (upsample)"
            ) from None
        if draws is not None and self.augment and draws.uniform() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # 95 us; 458 by a NumPy view (256 x 256)
        return np.asarray(image)

    def label(self, index: int) -> int:
        """Returns the label of image `index`, or -1."""
        return -1 if self.labels is None else int(self.labels[index])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            image = _chw(self.pixels(index))
        except Unreadable as error:
            raise UserError(f"{self.name(index)} cannot be read: {error}") from None
        return {"image": image, "label": torch.tensor(self.label(index)), "index": torch.tensor(index)}

    def fetch(
        self, indices: Sequence[int], draws: Sequence[Draws] | None = None, *, replace: bool = False
    ) -> dict[str, Any]:
        """Returns a batch: image (B, 3, H, W) uint8, label and index (B,) int64, and what could not be read.

        An unreadable image is left out, or with `replace` the next one in the source takes its place.
        `batch["unreadable"]` lists (index, name, reason).
        """
        bad: dict[int, tuple[int, str, str]] = {}
        images, kept = [], []
        for slot, index in enumerate(indices):
            for candidate in range(index, index + (len(self) if replace else 1)):
                candidate %= len(self)
                if candidate in bad:
                    continue
                try:
                    images.append(_chw(self.pixels(candidate, draws[slot] if draws else None)))
                    kept.append(candidate)
                    break
                except Unreadable as error:
                    bad[candidate] = (candidate, self.name(candidate), str(error))
                    if len(bad) > UNREADABLE_SHARE * len(self):
                        break  # more than the loader tolerates: it stops the run over this batch
        shape = (0, 3, *self.image_size)
        return {
            "image": torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8),
            "label": torch.tensor([self.label(i) for i in kept], dtype=torch.int64),
            "index": torch.tensor(kept, dtype=torch.int64),
            "unreadable": list(bad.values()),
        }


def _chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
