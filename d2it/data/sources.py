"""Where images come from: folders, npz packs, WebDataset shards, and scikit-image's bundled photos.

Every source is map-style: ``source[i]`` depends on ``i`` alone, which is what makes shuffling, sharding and resuming
exact (see :mod:`d2it.data.loader`). Images stay uint8 until they reach the device. Nothing is fetched, nothing is
extracted, nothing is unpickled, and no name inside a file is ever used as a path.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import math
import os
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2it.errors import UserError

from .decode import EXTENSIONS, MAX_BYTES, MAX_PIXELS, TooSmall, Unreadable, center_crop, decode, random_crop
from .order import Draws

# What a loader may skip before it stops: more than this share of the source is a damaged data set.
UNREADABLE_SHARE = 0.01


def check_classes(description: str, found: int, num_classes: int) -> None:
    """Raise UserError unless images of ``found`` classes (0: without labels) have labels below ``num_classes``."""
    if not found:
        raise UserError(f"{description}: num_classes={num_classes} needs labels")
    if found > num_classes:
        raise UserError(f"{description}: labels reach {found - 1}, num_classes is {num_classes}")


class ImageSource(ABC):
    """A finite, ordered set of images, cut to one size.

    ``source[i]`` is ``{"image": uint8 (3, H, W), "label": int64, "index": int64}``, never augmented; the label is -1
    where the source has none. A loader calls :meth:`fetch`, which batches, augments and steps over unreadable images.

    Attributes:
        image_size: (H, W) in pixels.
        labels: (N,) int64, or None.
        classes: names by label, or None where the source names none.
        num_classes: number of classes, 0 where images have no labels.
        description: one line for provenance, without the path's parents.
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
        if crop not in ("center", "random"):
            raise ValueError(f'crop must be "center" or "random", got {crop!r}')
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be positive, got {max_pixels}")
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.augment = augment
        self.crop = crop
        self.upsample = upsample
        self.max_pixels = max_pixels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what an error calls image ``index``."""

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Return image ``index`` decoded, at its own size.

        Raises:
            Unreadable, OSError: it cannot be.
        """

    def require_classes(self, num_classes: int) -> None:
        """Raise UserError unless every image has a label below ``num_classes``."""
        check_classes(self.description, self.num_classes, num_classes)

    def pixels(self, index: int, draws: Draws | None = None) -> np.ndarray:
        """Return image ``index`` as (H, W, 3) uint8, augmented if ``draws`` are given and the source augments.

        Raises:
            Unreadable: the image cannot be decoded.
            UserError: it is smaller than asked and ``upsample`` is False.
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
                f"{self.image_size[0]} asked for: ask for less, or set upsample=true to enlarge as ADM does"
            ) from None
        if draws is not None and self.augment and draws.uniform() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # 95 us; 458 by a NumPy view (256 x 256)
        return np.asarray(image)

    def label(self, index: int) -> int:
        """Return the label of image ``index``, or -1."""
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
        """Return a batch: image (B, 3, H, W) uint8, label and index (B,) int64, and what could not be read.

        An unreadable image is left out, or with ``replace`` stands aside for the next one in the source.
        ``batch["unreadable"]`` lists (index, name, reason).
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


class ImageFolder(ImageSource):
    """JPEG, PNG, WebP and BMP files below a folder.

    If the images lie in sub-folders, each sub-folder (with all below it) is a class, in sorted order; if they lie in
    the folder itself there are no labels; a folder with both is refused. Hidden files and other suffixes are ignored;
    links to folders are followed once.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, **options)
        self.root = os.path.abspath(path)
        try:
            with os.scandir(self.root) as entries:
                top = sorted(entries, key=lambda entry: entry.name)
            flat = [entry.name for entry in top if _is_image(entry.name) and entry.is_file()]
            found: dict[str, list[str]] = {}
            seen = {os.path.realpath(self.root)}
            for entry in top:
                if entry.is_dir() and not entry.name.startswith("."):
                    found[entry.name] = _images_below(self.root, entry.name, seen)
            found = {name: files for name, files in found.items() if files}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if flat and found:
            raise UserError(
                f"{path} holds images ({flat[0]}, ...) beside folders of images ({next(iter(found))}, ...): "
                "give one or the other"
            )
        if not flat and not found:
            raise UserError(f"{path} holds no images ({', '.join(EXTENSIONS)}) and no WebDataset shards (.tar)")
        files = flat
        if found:
            self.classes = list(found)
            self.num_classes = len(found)
            self.labels = np.repeat(np.arange(len(found)), [len(f) for f in found.values()])
            files = [file for group in found.values() for file in group]
        # One array and not a list of strings: forked workers would copy every string they count a reference to.
        self._files = np.array([os.fsencode(file) for file in files])
        classes = f"{self.num_classes} classes" if found else "no classes"
        self.description = f"folder {os.path.basename(self.root)}: {len(self):,} images, {classes}"

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self._files[index])))

    def picture(self, index: int) -> Image.Image:
        with open(self.name(index), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise Unreadable(f"a file above {MAX_BYTES:,} bytes")
        return decode(data, self.max_pixels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(root: str, folder: str, seen: set[str]) -> list[str]:
    """Return the image files below root/folder, relative to root, in sorted order."""
    real = os.path.realpath(os.path.join(root, folder))
    if real in seen:
        return []
    seen.add(real)
    with os.scandir(os.path.join(root, folder)) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    files = []
    for entry in listed:
        if _is_image(entry.name) and entry.is_file():
            files.append(os.path.join(folder, entry.name))
        elif entry.is_dir() and not entry.name.startswith("."):
            files += _images_below(root, os.path.join(folder, entry.name), seen)
    return files


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


class DemoPhotos(ImageSource):
    """Square-ish crops of eight photos that scikit-image bundles, so that a demo needs no data.

    Crop i is photo ``i % 8``, a window of three quarters to all of what fits, at a place drawn from i: the same set
    every time. The label is the photo. Astronaut, chelsea (a cat), coffee, rocket, Hubble deep field; gray: brick,
    gravel, camera.
    """

    PHOTOS = (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "hubble_deep_field.jpg",
        "brick.png",
        "gravel.png",
        "camera.png",
    )

    def __init__(self, image_size: int | tuple[int, int], *, crops: int = 2048, **options: Any) -> None:
        super().__init__(image_size, **options)
        if crops < 1:
            raise ValueError(f"crops must be positive, got {crops}")
        package = importlib.util.find_spec("skimage")
        if package is None or not package.submodule_search_locations:
            raise UserError("the demo's photos come with scikit-image: pip install scikit-image")
        folder = Path(package.submodule_search_locations[0]) / "data"
        self._paths = [folder / name for name in self.PHOTOS]
        for path in self._paths:
            if not path.is_file():
                raise UserError(f"this scikit-image does not bundle {path.name}: install scikit-image 0.26")
        self._photos: dict[int, Image.Image] = {}
        self._crops = crops
        self.labels = np.arange(crops) % len(self.PHOTOS)
        self.classes = [path.stem for path in self._paths]
        self.num_classes = len(self.classes)
        self.description = f"{crops:,} crops of {len(self.PHOTOS)} photos bundled with scikit-image"

    def __len__(self) -> int:
        return self._crops

    def name(self, index: int) -> str:
        return f"{self._paths[self.label(index)]}, crop {index}"

    def picture(self, index: int) -> Image.Image:
        number = self.label(index)
        if number not in self._photos:
            self._photos[number] = decode(self._paths[number].read_bytes(), self.max_pixels)
        photo = self._photos[number]
        height, width = self.image_size
        fit = min(photo.width / width, photo.height / height)  # the largest window, in units of the image size
        draws = Draws(0, index)
        # Large windows show the subject whole, which minutes suffice to learn; below 1 the crop would be too small.
        scale = fit if fit <= 1 else max(1.0, fit * (0.75 + 0.25 * draws.uniform()))
        crop_width, crop_height = round(width * scale), round(height * scale)
        left = draws.below(photo.width - crop_width + 1)
        top = draws.below(photo.height - crop_height + 1)
        return photo.crop((left, top, left + crop_width, top + crop_height))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_photos": {}}


def open_source(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int],
    *,
    augment: bool = False,
    crop: str = "center",
    upsample: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """Open a source of images by what ``path`` is.

    Args:
        path: ``"demo"`` (:class:`DemoPhotos`), a ``.npz`` (:class:`NpzPack`), one or more ``.tar`` shards as a file, a
            folder of them, a glob or a numeric range ``shard-{000..127}.tar`` (:class:`WebDatasetShards`), or a folder
            of images (:class:`ImageFolder`).
        image_size: edge, or (height, width), in pixels. Images are scaled until they just cover it and cut.
        augment: flip half of the images that a training loader draws.
        crop: "center", or "random" for ADM's random crop in a training loader.
        upsample: enlarge images smaller than ``image_size``, as ADM does, instead of raising over the first one.
        max_pixels: images whose header claims more are not decoded but counted as unreadable.

    Raises:
        UserError: nothing there, nothing inside, or damaged beyond opening; one line that says which.
    """
    options: dict[str, Any] = {"augment": augment, "crop": crop, "upsample": upsample}
    options["max_pixels"] = max_pixels
    text = os.fspath(path)
    if text == "demo":
        return DemoPhotos(image_size, **options)
    if os.path.isdir(text):
        shards = sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
        return WebDatasetShards(shards, image_size, **options) if shards else ImageFolder(text, image_size, **options)
    if text.endswith(".tar"):
        return WebDatasetShards(_expand(text), image_size, **options)
    if not os.path.exists(text):
        raise UserError(f"{text}: no such file or folder")
    if text.endswith(".npz"):
        return NpzPack(text, image_size, **options)
    raise UserError(f"{text} is neither a folder, a .npz pack nor a .tar shard")


def _expand(pattern: str) -> list[str]:
    """Return the shards that a path, a glob or a range {000..127} names, in order."""
    if os.path.exists(pattern):
        return [pattern]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = match.groups()
        if int(last) - int(first) > 10**6:
            raise UserError(f"{pattern} names more than a million shards")
        head, tail = pattern[: match.start()], pattern[match.end() :]
        shards = [f"{head}{n:0{len(first)}d}{tail}" for n in range(int(first), int(last) + 1)]
        for shard in shards:
            if not os.path.exists(shard):
                raise UserError(f"{shard}: no such file or folder")
    else:
        shards = sorted(glob.glob(pattern))
    if not shards:
        raise UserError(f"{pattern}: no such file or folder")
    return shards
