"""Latents and grain maps of a whole source, encoded once and read at many times the training rate.

A cache is a folder of units, each the encoding of ``unit_size`` consecutive images of the source, and an
``index.json`` that is written last::

    unit-00000.safetensors   mean, std   (n, F, C, Hf, Wf)  of the VAE's posterior, not one frozen draw of it
                             grain_map   (n, F, h, w)       uint8
                             label, index   (n,)            int64; label -1 where the source has none
    index.json               what the cache was made from, and every unit's size and SHA-256

F is 2, the image and its mirror image (each encoded: a VAE is not symmetric), or 1. Units are dealt to the ranks by
number, so that names never collide and an interrupted run is taken up by any number of ranks; each is written
atomically, and counted only once its own record, which holds its hash, lies beside it.

``python -m d2it.data.verify_cache FOLDER`` says what is inside and whether every byte is as it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2it.data.loader import SinglePass
from d2it.data.sources import ImageSource, check_classes
from d2it.errors import UserError
from d2it.files import atomic_write, save_tensors, sha256_of
from d2it.seeds import Draws

FORMAT = "d2it latent cache"
VERSION = 1
# Opening a cache up to this size hashes all of it (about a second); above, sizes and headers only.
VERIFY_BYTES = 2 * 2**30

_KEYS = ("mean", "std", "grain_map", "label", "index")

Encode = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def build_cache(
    folder: str | os.PathLike[str],
    source: ImageSource,
    encode: Encode,
    *,
    facts: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    unit_size: int = 1024,
    flips: bool = True,
    dtype: torch.dtype = torch.float16,
    workers: int = 0,
    pin_memory: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Encode this rank's share of ``source`` into ``folder``; units that are already there are kept.

    When all ranks have returned, one of them calls :func:`finish_cache`.

    Args:
        encode: images uint8 (B, 3, H, W) on the host -> mean, std (B, C, Hf, Wf) and grain_map (B, h, w), any device.
        facts: what the latents depend on besides the images, JSON values: VAE weights' hash, thresholds, scaling
            factor, downsampling. A later run with other facts is refused.
        unit_size: images of one file; at least as many units as ranks keep all ranks busy.
        flips: encode the mirror images too.
        dtype: of mean and std in the files: float16, bfloat16 or float32.
        progress: called with the number of images after each batch.

    Raises:
        UserError: the folder holds a cache of other facts or cannot be written, latents are not finite in ``dtype``,
            or more than 1 % of the images cannot be read.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if unit_size < 1:
        raise ValueError(f"unit_size must be positive, got {unit_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    folder = Path(folder)
    plan = _plan(source, facts, unit_size, flips, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "index.json").exists():
            _require_plan(folder, _read_json(folder / "index.json").get("plan"), plan)
            return
        mine = [u for u in range(rank, plan["units"], world_size) if not _is_done(folder, u, plan)]
        _encode_units(
            folder, source, encode, plan, mine, batch_size, dtype, progress, workers=workers, pin_memory=pin_memory
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot write the latent cache: {error.strerror or error}") from None


def finish_cache(folder: str | os.PathLike[str]) -> None:
    """Write the index of a cache whose units are all there; harmless if it has one.

    Raises:
        UserError: units are missing.
    """
    folder = Path(folder)
    if (folder / "index.json").exists():
        return
    records = [_read_json(path) for path in sorted(folder.glob("unit-*.json"))]
    if not records:
        raise UserError(f"{folder}: no latent cache was begun here")
    plan = records[0]["plan"]
    for record in records:
        _require_plan(folder, record["plan"], plan)
    if len(records) != plan["units"]:
        raise UserError(f"{folder}: {len(records)} of {plan['units']} units are there; run the cache stage again")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "images": sum(record["images"] for record in records),
        "plan": plan,
        "skipped": [name for record in records for name in record["skipped"]],
        "units": [{key: record[key] for key in ("file", "images", "bytes", "sha256")} for record in records],
    }
    try:
        with atomic_write(folder / "index.json") as path:
            path.write_text(json.dumps(index, indent=1))
        for path in folder.glob("unit-*.json"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write the latent cache: {error.strerror or error}") from None


def _plan(source: ImageSource, facts: dict[str, Any], unit_size: int, flips: bool, dtype: torch.dtype) -> dict:
    """Return what every unit of a cache must agree on."""
    plan = {
        "source": source.description,
        "source_images": len(source),
        "image_size": list(source.image_size),
        "num_classes": source.num_classes,
        "classes": source.classes,
        "unit_size": unit_size,
        "units": -(-len(source) // unit_size),
        "flips": flips,
        "dtype": str(dtype).removeprefix("torch."),
        "facts": facts,
    }
    return json.loads(json.dumps(plan))  # as it will be read back: tuples become lists


def _require_plan(folder: Path, theirs: Any, ours: dict) -> None:
    if theirs != ours:
        theirs = theirs if isinstance(theirs, dict) else {}
        pairs = [(k, theirs.get(k), v) for k, v in ours.items() if k != "facts"]
        old = theirs.get("facts") or {}
        pairs += [(k, old.get(k), ours["facts"].get(k)) for k in sorted({*old, *ours["facts"]})]
        key, was, now = next((p for p in pairs if p[1] != p[2]), ("version", None, VERSION))
        raise UserError(
            f"{folder} holds a latent cache of other settings ({key}: {_short(was)} there, {_short(now)} asked): "
            "delete it or name another folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _unit_name(unit: int) -> str:
    return f"unit-{unit:05d}.safetensors"


def _is_done(folder: Path, unit: int, plan: dict) -> bool:
    record = (folder / _unit_name(unit)).with_suffix(".json")
    if not record.exists():
        return False
    _require_plan(folder, _read_json(record).get("plan"), plan)
    return True


def _encode_units(
    folder: Path,
    source: ImageSource,
    encode: Encode,
    plan: dict,
    units: list[int],
    batch_size: int,
    dtype: torch.dtype,
    progress: Callable[[int], object] | None,
    **loader: Any,
) -> None:
    size = plan["unit_size"]
    batches = []
    for unit in units:
        stop = min((unit + 1) * size, len(source))
        batches += [range(at, min(at + batch_size, stop)) for at in range(unit * size, stop, batch_size)]
    rows: list[dict[str, Tensor]] = []
    skipped: list[str] = []
    with SinglePass(source, batches, **loader) as stream:
        for batch, indices in zip(stream, batches):
            skipped += [f"{name}: {reason}" for _, name, reason in batch["unreadable"]]
            if len(batch["index"]):
                rows.append(_encode_batch(batch, encode, plan["flips"], dtype))
            if progress is not None:
                progress(len(indices))
            if indices.stop % size == 0 or indices.stop == len(source):
                _write_unit(folder, (indices.stop - 1) // size, rows, skipped, plan)
                rows, skipped = [], []


def _encode_batch(batch: dict[str, Any], encode: Encode, flips: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return rows of a unit: mean, std (B, F, C, Hf, Wf), grain_map (B, F, h, w), label, index, on the host."""
    views = [batch["image"], batch["image"].flip(3)] if flips else [batch["image"]]
    stacked = [torch.stack(parts, dim=1) for parts in zip(*(encode(view) for view in views))]
    mean, std = (value.to("cpu", dtype) for value in stacked[:2])
    for name, value in (("mean", mean), ("std", std)):
        if not value.isfinite().all():
            raise UserError(f"the VAE gives latents that are not finite in {dtype} ({name}); is it trained?")
    grain_map = stacked[2].to("cpu", torch.uint8)
    return {"mean": mean, "std": std, "grain_map": grain_map, "label": batch["label"], "index": batch["index"]}


def _write_unit(folder: Path, unit: int, rows: list[dict[str, Tensor]], skipped: list[str], plan: dict) -> None:
    name = _unit_name(unit)
    tensors = {key: torch.cat([row[key] for row in rows]) for key in _KEYS} if rows else {}
    with atomic_write(folder / name) as path:
        save_tensors(path, tensors, {"format": f"{FORMAT} {VERSION}"})  # one key: their order is not fixed
        record = {
            "file": name,
            "images": len(tensors["index"]) if rows else 0,
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
            "skipped": skipped,
            "plan": plan,
        }
    with atomic_write((folder / name).with_suffix(".json")) as path:
        path.write_text(json.dumps(record))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


class LatentCache:
    """A finished cache, memory-mapped: what :class:`d2it.data.Loader` serves to the two transformers.

    Args:
        folder: where :func:`finish_cache` wrote the index.
        verify: hash every file and refuse the cache over one changed bit; None does so up to 2 GiB. Sizes and headers
            are held against the index in any case.

    Attributes:
        facts: as given to :func:`build_cache`.
        image_size: (H, W) of the encoded images, pixels.
        latent_shape: (C, Hf, Wf).
        grid: (h, w) of the grain maps.
        flips: whether mirror images were encoded.
        num_classes, classes, labels, description: as an ImageSource's.
        sha256: of the index, hence of the whole content.

    Raises:
        UserError: no cache there, an unfinished one, or one that is damaged; names the file.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.exists():
            begun = any(self.folder.glob("unit-*.json"))
            why = "the latent cache is not finished; run the cache stage again" if begun else "no latent cache here"
            raise UserError(f"{self.folder}: {why}")
        index = _read_json(path)
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(f"{path} is not the index of a {FORMAT} of version {VERSION}")
        try:
            plan = index["plan"]
            self.facts: dict[str, Any] = plan["facts"]
            self.image_size = (int(plan["image_size"][0]), int(plan["image_size"][1]))
            self.num_classes = int(plan["num_classes"])
            self.classes: list[str] | None = plan["classes"]
            self.flips = bool(plan["flips"])
            self.description = f"latents of {plan['source']}"
            self.skipped: list[str] = index["skipped"]
            self._units = [
                (str(unit["file"]), int(unit["images"]), int(unit["bytes"]), str(unit["sha256"]))
                for unit in index["units"]
                if int(unit["images"])
            ]
            dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[plan["dtype"]]
            images = int(index["images"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} at {error}") from None
        for name, *_ in self._units:
            if not re.fullmatch(r"unit-\d{5,}\.safetensors", name):
                raise UserError(f"{path} is damaged: it names the file {name!r}")
        if not self._units or images != sum(unit[1] for unit in self._units):
            raise UserError(f"{path} is damaged: the units do not add up to {images} images")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._check_files(verify)
        self._map_units(dtype)
        self._starts = np.cumsum([0, *(unit[1] for unit in self._units)])
        self.labels = np.concatenate([unit["label"].numpy() for unit in self._tensors])

    def _check_files(self, verify: bool | None) -> None:
        for name, _, size, _ in self._units:
            try:
                actual = os.path.getsize(self.folder / name)
            except OSError as error:
                raise UserError(f"{self.folder / name}: {error.strerror}") from None
            if actual != size:
                raise UserError(f"{self.folder / name} is damaged: {actual:,} bytes, {size:,} were written")
        if verify is None:
            verify = sum(unit[2] for unit in self._units) <= VERIFY_BYTES
        if verify:
            for name, _, _, sha256 in self._units:
                if sha256_of(self.folder / name) != sha256:
                    raise UserError(f"{self.folder / name} is damaged: its SHA-256 is not the one in index.json")

    def _map_units(self, dtype: torch.dtype | None = None) -> None:
        """Map every unit's tensors; with ``dtype``, hold their shapes and types against each other."""
        self._tensors: list[dict[str, Tensor]] = []
        for name, images, _, _ in self._units:
            try:
                with safe_open(self.folder / name, "pt") as file:
                    self._tensors.append({key: file.get_tensor(key) for key in _KEYS})
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name} is damaged: {str(error).splitlines()[0]}") from None
            if dtype is None:
                continue
            unit, first = self._tensors[-1], self._tensors[0]
            views = 2 if self.flips else 1
            expected = {
                "mean": (dtype, (images, views, *first["mean"].shape[2:])),
                "std": (dtype, (images, views, *first["mean"].shape[2:])),
                "grain_map": (torch.uint8, (images, views, *first["grain_map"].shape[2:])),
                "label": (torch.int64, (images,)),
                "index": (torch.int64, (images,)),
            }
            if first["mean"].ndim != 5 or first["grain_map"].ndim != 4:
                raise UserError(f"{self.folder / name} is damaged: mean or grain_map has the wrong rank")
            for key, (kind, shape) in expected.items():
                if unit[key].dtype != kind or tuple(unit[key].shape) != shape:
                    raise UserError(
                        f"{self.folder / name} is damaged: {key} is {unit[key].dtype} {tuple(unit[key].shape)}, "
                        f"index.json says {kind} {shape}"
                    )
        self.latent_shape = tuple(self._tensors[0]["mean"].shape[2:])
        self.grid = tuple(self._tensors[0]["grain_map"].shape[2:])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_tensors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_units()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def require(self, **facts: Any) -> None:
        """Raise UserError unless the cache was made with these facts."""
        for key, value in facts.items():
            if self.facts.get(key) != json.loads(json.dumps(value)):
                raise UserError(
                    f"{self.folder} was made with {key} = {_short(self.facts.get(key))}, not {_short(value)}: "
                    "delete it or name another folder"
                )

    def require_classes(self, num_classes: int) -> None:
        """Raise UserError unless every image has a label below ``num_classes``."""
        check_classes(f"{self.folder} ({self.description})", self.num_classes, num_classes)

    def fetch(self, indices: Sequence[int], draws: Sequence[Draws] | None = None, *, replace: bool = False) -> dict:
        """Return a batch; with ``draws``, half of the images as their mirror images where those were encoded.

        mean, std (B, C, Hf, Wf) float32; grain_map (B, h, w) int64, on the host, so that a packed capacity needs no
        look at the device; label, index (B,) int64, the index being the source's. ``replace`` has no effect: a cache
        holds no unreadable image.
        """
        wanted = np.asarray(indices, np.int64)
        view = np.zeros(len(wanted), np.int64)
        if draws is not None and self.flips:
            view = np.array([draw.uniform() < 0.5 for draw in draws], np.int64)
        unit = np.searchsorted(self._starts, wanted, side="right") - 1
        row = wanted - self._starts[unit]
        size = len(wanted)
        batch = {
            "mean": torch.empty(size, *self.latent_shape),
            "std": torch.empty(size, *self.latent_shape),
            "grain_map": torch.empty(size, *self.grid, dtype=torch.int64),
            "label": torch.empty(size, dtype=torch.int64),
            "index": torch.empty(size, dtype=torch.int64),
        }
        for number in np.unique(unit):
            slots = torch.from_numpy(np.flatnonzero(unit == number))
            rows, views = torch.from_numpy(row)[slots], torch.from_numpy(view)[slots]
            tensors = self._tensors[number]
            for key, value in batch.items():
                picked = tensors[key][rows] if value.ndim == 1 else tensors[key][rows, views]
                value[slots] = picked.to(value.dtype)
        return batch
