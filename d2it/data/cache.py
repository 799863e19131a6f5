"""Latents of every grain of a whole source, encoded once and read at many times the training rate.

A cache is a folder of units, each the encoding of `unit_size` consecutive images of the source, and an
`index.json` that is written last:

    unit-00000.safetensors   mean.g, std.g  (n, F, C, hg, wg)  float16; the posterior of grain g (0 = coarsest) on its
                                                               own grid, not one frozen draw of it
                             entropy        (n, F, h, w)       float32, of the regions
                             label, index   (n,)               int64; label -1 where the source has none
                             ...            (n, F, ...)        whatever else the encoder returned, by name
    index.json               what the cache was made from, every unit's size and SHA-256, quantiles of the entropies,
                             and its own SHA-256

F is 2, the image and its mirror image (each encoded: a VAE is not symmetric), or 1. The grain map is not stored: it is
the number of thresholds that an entropy exceeds, and the thresholds are chosen when a batch is read. Units are dealt to
the ranks by number, so that names never collide and an interrupted run is taken up by any number of ranks; each is
written atomically, and counted only once its own record, which holds its hash, lies beside it.

A cache of version 1 holds mean, std (n, F, C, Hf, Wf) and grain_map (n, F, h, w) uint8 of one choice of thresholds. It
is read, with that map.

`python -m d2it.data.verify_cache FOLDER` prints what is inside and checks every byte against its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2it.data.calibration import QUANTILES, EntropySketch, shares_above, threshold_of
from d2it.data.loader import SinglePass
from d2it.data.sources import ImageSource, check_classes
from d2it.errors import UserError, reason_of, user_error
from d2it.files import atomic_write, read_json, read_sealed, save_tensors, sha256_of, write_sealed, write_text
from d2it.ops import neighbor_copy
from d2it.seeds import Draws

FORMAT = "d2it latent cache"
VERSION = 2
# Opening a cache up to this size hashes all of it (about a second); above, sizes and headers only.
VERIFY_BYTES = 2 * 2**30

_KEYS = {"format", "version", "images", "plan", "entropies", "resolution", "skipped", "units"}  # of the index

# Of the means and deviations in the files.
_DTYPE = torch.float16

Encode = Callable[[Tensor], Mapping[str, Tensor]]


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
    workers: int = 0,
    pin_memory: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Encodes this rank's share of `source` into `folder`; units that are already there are kept.

    When all ranks have returned, one of them calls `finish_cache`.

    Args:
        encode: images uint8 (B, 3, H, W) on the host -> tensors by name, on any device: for every grain g, coarsest
            first, "mean.g" and "std.g" (B, C, hg, wg), stored as float16; "entropy" (B, h, w), stored as float32; and
            any others (B, ...), stored as they are.
        facts: what the latents depend on besides the images, JSON values: VAE weights' hash, scaling factor,
            downsampling; and under "thresholds" the k - 1 of the map that is read where no other is chosen. A later run
            with other facts is refused.
        unit_size: images of one file; at least as many units as ranks keep all ranks busy.
        flips: encode the mirror images too.
        progress: called with the number of images after each batch.

    Raises:
        UserError: the folder holds a cache of other facts or cannot be written, latents are not finite in float16,
            or more than 1 % of the images cannot be read.
    """
    if unit_size < 1:
        raise ValueError(f"unit_size must be positive, got {unit_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if "thresholds" not in facts:
        raise ValueError(f"facts must have thresholds, got {', '.join(facts)}")
    try:
        limits = _ascending(list(facts["thresholds"]))
    except (TypeError, ValueError):
        raise ValueError(f"facts: thresholds must be ascending numbers, got {facts['thresholds']!r}") from None
    names = ["entropy", *(f"{name}.{g}" for name in ("mean", "std") for g in range(len(limits) + 1))]
    folder = Path(folder)
    plan = _plan(source, facts, unit_size, flips)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "index.json").exists():
            index = read_json(folder / "index.json")
            made = index.get("plan")
            if index.get("version") == 1 and isinstance(made, dict):  # finished: nothing is added to it
                made = {**made, "version": VERSION}
            _require_plan(folder, made, plan)
            return
        mine = [u for u in range(rank, plan["units"], world_size) if not _is_done(folder, u, plan)]
        _encode_units(
            folder, source, encode, names, plan, mine, batch_size, progress, workers=workers, pin_memory=pin_memory
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot write the latent cache: {error.strerror or error}") from None


def finish_cache(folder: str | os.PathLike[str]) -> None:
    """Writes the index of a cache whose units are all there; harmless if it has one.

    Raises:
        UserError: units are missing.
    """
    folder = Path(folder)
    if (folder / "index.json").exists():
        return
    records = [read_json(path) for path in sorted(folder.glob("unit-*.json"))]
    if not records:
        raise UserError(f"{folder}: no latent cache was begun here")
    try:
        plan = records[0]["plan"]
        for record in records:
            _require_plan(folder, record["plan"], plan)
        units, count = [dataclasses.asdict(_Unit.read(record)) for record in records], plan["units"]
        skipped = [name for record in records for name in _texts(record["skipped"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: a record of the cache (unit-*.json) is damaged: {error}") from None
    if len(records) != count:
        raise UserError(f"{folder}: {len(records)} of {count} units are there; run the cache stage again")
    entropies, resolution = _quantiles(folder, [_Unit.read(unit) for unit in units])
    index = {
        "format": FORMAT,
        "version": VERSION,
        "images": sum(unit["images"] for unit in units),
        "plan": plan,
        "entropies": entropies,
        "resolution": resolution,
        "skipped": skipped,
        "units": units,
    }
    try:
        write_sealed(folder / "index.json", index)
        for path in folder.glob("unit-*.json"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write the latent cache: {error.strerror or error}") from None


def _quantiles(folder: Path, units: list[_Unit]) -> tuple[list[float], float]:
    """Returns QUANTILES quantiles of all entropies, nats, and the nats within which each is exact."""

    def entropies() -> Iterator[Tensor]:
        for unit in units:
            if unit.images:
                with safe_open(folder / unit.file, "pt") as file:
                    yield file.get_tensor("entropy")

    try:
        most = max((values.max().item() for values in entropies()), default=0.0)
        sketch = EntropySketch(max(most, 1.0))
        for values in entropies():
            sketch.add(values)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot read the latent cache: {reason_of(error)}") from None
    if not sketch.total:
        raise UserError(f"{folder}: no image could be read")
    return sketch.quantiles(np.linspace(0, 1, QUANTILES)).tolist(), sketch.width


def _plan(source: ImageSource, facts: dict[str, Any], unit_size: int, flips: bool) -> dict:
    """Returns what every unit of a cache must agree on."""
    plan = {
        "version": VERSION,
        "source": source.description,
        "source_images": len(source),
        "fingerprint": source.fingerprint(),
        "image_size": list(source.image_size),
        "num_classes": source.num_classes,
        "classes": source.classes,
        "unit_size": unit_size,
        "units": -(-len(source) // unit_size),
        "flips": flips,
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


def _texts(value: Any) -> list[str]:
    """Returns a JSON value that must be a list of texts."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{value!r:.40} is not a list of texts")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _unit_name(unit: int) -> str:
    return f"unit-{unit:05d}.safetensors"


def _is_done(folder: Path, unit: int, plan: dict) -> bool:
    record = (folder / _unit_name(unit)).with_suffix(".json")
    if not record.exists():
        return False
    content = read_json(record)
    _require_plan(folder, content.get("plan"), plan)
    file = folder / _unit_name(unit)
    return file.is_file() and file.stat().st_size == content.get("bytes")


def _encode_units(
    folder: Path,
    source: ImageSource,
    encode: Encode,
    names: Sequence[str],
    plan: dict,
    units: list[int],
    batch_size: int,
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
                rows.append(_encode_batch(batch, encode, names, plan["flips"]))
            if progress is not None:
                progress(len(indices))
            if indices.stop % size == 0 or indices.stop == len(source):
                _write_unit(folder, (indices.stop - 1) // size, rows, skipped, plan)
                rows, skipped = [], []


def _encode_batch(batch: dict[str, Any], encode: Encode, names: Sequence[str], flips: bool) -> dict[str, Tensor]:
    """Returns rows of a unit on the host: what the encoder returned of all views (B, F, ...), label and index (B,).

    Raises:
        ValueError: the encoder did not return all of `names`.
        UserError: values that are not finite.
    """
    views = [batch["image"], batch["image"].flip(3)] if flips else [batch["image"]]
    encoded = [encode(view) for view in views]
    if missing := [name for name in names if name not in encoded[0]]:
        raise ValueError(f"encode must return {', '.join(names)}; {missing[0]} is missing")
    rows = {}
    for name in encoded[0]:
        value = torch.stack([each[name] for each in encoded], dim=1)
        dtype = _DTYPE if name.startswith(("mean.", "std.")) else torch.float32 if name == "entropy" else value.dtype
        rows[name] = value.to("cpu", dtype)
        if dtype.is_floating_point and not rows[name].isfinite().all():
            raise UserError(f"the VAE gives latents that are not finite in {dtype} ({name}); is it trained?")
    return {**rows, "label": batch["label"], "index": batch["index"]}


def _write_unit(folder: Path, unit: int, rows: list[dict[str, Tensor]], skipped: list[str], plan: dict) -> None:
    name = _unit_name(unit)
    tensors = {key: torch.cat([row[key] for row in rows]) for key in rows[0]} if rows else {}
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
    write_text((folder / name).with_suffix(".json"), json.dumps(record))


def _ascending(value: Any, count: int | None = None) -> list[float]:
    """Returns a JSON value that must be a list of (`count`) finite numbers in ascending order."""
    numbers = isinstance(value, list) and all(type(each) in (int, float) and abs(each) < 1e30 for each in value)
    if not numbers or value != sorted(value) or count not in (None, len(value)):
        raise ValueError(f"{value!r:.40} is not a list of ascending numbers")
    return [float(each) for each in value]


def _whole(value: Any, least: int = 0) -> int:
    """Returns a JSON value that must be a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a whole number of at least {least}")
    return value


@dataclass(frozen=True)
class _Unit:
    """One file of a cache, as its index describes it.

    Attributes:
        file: its name.
        images: in it.
        bytes: of the file.
        sha256: of the file, hexadecimal.
    """

    file: str
    images: int
    bytes: int
    sha256: str

    @classmethod
    def read(cls, fields: dict[str, Any]) -> _Unit:
        """Returns the unit of a record; raises ValueError or KeyError over one that is damaged."""
        if not re.fullmatch(r"unit-\d{5,}\.safetensors", str(fields["file"])):
            raise ValueError(f"it names the file {fields['file']!r:.60}")
        if not re.fullmatch("[0-9a-f]{64}", str(fields["sha256"])):
            raise ValueError(f"{fields['file']} has no SHA-256")
        return cls(fields["file"], _whole(fields["images"]), _whole(fields["bytes"]), fields["sha256"])


class LatentCache:
    """A finished cache, memory-mapped: what `d2it.data.Loader` serves to the two transformers.

    Args:
        folder: where `finish_cache` wrote the index.
        verify: hash every file and refuse the cache over one changed bit; None does so up to 2 GiB. Sizes and headers
            are checked against the index in any case.
        shares: of the regions, chosen anew for every image of a training stream: a number that is uniform in [0, 1)
            -> k - 1 shares, those of grain i + 1 or finer (they descend). An image's thresholds are the quantiles of
            the whole cache at its shares. It must be picklable. None is the map at the facts' thresholds.
        extras: names of further arrays, such as "entropy", that batches shall have.

    Attributes:
        facts: as given to `build_cache`.
        fixed: whether the grain maps are part of the cache (version 1): then there are neither shares nor extras.
        num_grains: k.
        thresholds: k - 1 of the default map, nats.
        image_size: (H, W) of the encoded images, pixels.
        latent_shape: (C, Hf, Wf).
        grid: (h, w) of the grain maps.
        flips: whether mirror images were encoded.
        num_classes, classes, labels, description: as an ImageSource's.
        sha256: of the index, hence of the whole content.

    Raises:
        UserError: no cache there, an unfinished one, or one that is damaged; names the file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        verify: bool | None = None,
        shares: Callable[[float], Sequence[float]] | None = None,
        extras: Sequence[str] = (),
    ) -> None:
        self.folder, self._shares, self._extras = Path(folder), shares, tuple(extras)
        path = self.folder / "index.json"
        if not path.exists():
            begun = any(self.folder.glob("unit-*.json"))
            why = "the latent cache is not finished; run the cache stage again" if begun else "no latent cache here"
            raise UserError(f"{self.folder}: {why}")
        index = read_json(path)
        if index.get("version") == VERSION:
            with user_error():
                index = read_sealed(path, _KEYS)
        if index.get("format") != FORMAT or index.get("version") not in (1, VERSION):
            raise UserError(f"{path} is not the index of a {FORMAT} of version {VERSION}")
        self.fixed = index["version"] == 1
        if shares or extras:
            self._require_entropies()
        try:
            plan = index["plan"]
            self.facts: dict[str, Any] = dict(plan["facts"])
            height, width = plan["image_size"]
            self.image_size = (_whole(height, 1), _whole(width, 1))
            self.num_classes = _whole(plan["num_classes"])
            self.classes: list[str] | None = plan["classes"]
            if self.classes is not None and len(_texts(self.classes)) != self.num_classes:
                raise ValueError(f"{len(self.classes)} class names for {self.num_classes} classes")
            if not isinstance(plan["flips"], bool):
                raise ValueError(f"flips is {plan['flips']!r:.40}")
            self.flips: bool = plan["flips"]
            self.description = f"latents of {plan['source']}"
            self.skipped: list[str] = _texts(index["skipped"])
            self._units = [unit for unit in map(_Unit.read, index["units"]) if unit.images]
            images = _whole(index["images"])
            limits = self.facts.get("thresholds", []) if self.fixed else self.facts["thresholds"]
            self.thresholds = tuple(_ascending(limits))
            self.num_grains = len(self.thresholds) + 1
            if not self.fixed:
                self._entropies = np.array(_ascending(index["entropies"], QUANTILES))
                (self._resolution,) = _ascending([index["resolution"]])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} at {error}") from None
        if not self._units or images != sum(unit.images for unit in self._units):
            raise UserError(f"{path} is damaged: the units do not add up to {images} images")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        verified = self._check_files(verify)
        self._map_units(check=True, values=verified)
        self._starts = np.cumsum([0, *(unit.images for unit in self._units)])
        self.labels = np.concatenate([unit["label"].numpy() for unit in self._tensors])

    def _check_files(self, verify: bool | None) -> bool:
        """Checks the files against the index; returns whether by their hashes too."""
        for unit in self._units:
            try:
                actual = os.path.getsize(self.folder / unit.file)
            except OSError as error:
                raise UserError(f"{self.folder / unit.file}: {error.strerror}") from None
            if actual != unit.bytes:
                raise UserError(f"{self.folder / unit.file} is damaged: {actual:,} bytes, {unit.bytes:,} were written")
        if verify is None:
            verify = sum(unit.bytes for unit in self._units) <= VERIFY_BYTES
        if verify:
            for unit in self._units:
                if sha256_of(self.folder / unit.file) != unit.sha256:
                    raise UserError(f"{self.folder / unit.file} is damaged: its SHA-256 is not the one in index.json")
        return verify

    def _map_units(self, check: bool = False, values: bool = False) -> None:
        """Maps every unit's tensors; `check`: their shapes and types too, `values`: that all are finite."""
        self._tensors: list[dict[str, Tensor]] = []
        for unit in self._units:
            path = self.folder / unit.file
            try:
                with safe_open(path, "pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged: {reason_of(error)}") from None
            if check:
                try:
                    self._check_tensors(unit, tensors)
                    for name, tensor in tensors.items() if values else ():
                        if not tensor.isfinite().all():
                            raise ValueError(f"{name} has values that are not finite")
                except (KeyError, ValueError) as error:
                    raise UserError(f"{path} is damaged: {error.args[0]}") from None
            self._tensors.append(tensors)
        first = self._tensors[0]
        self.latent_shape = tuple(first["mean" if self.fixed else f"mean.{self.num_grains - 1}"].shape[2:])
        self.grid = tuple(first["grain_map" if self.fixed else "entropy"].shape[2:])

    def _check_tensors(self, unit: _Unit, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError or KeyError unless the tensors of a unit have the types and shapes of their names."""
        known: dict[str, tuple[torch.dtype, int]] = {"label": (torch.int64, 1), "index": (torch.int64, 1)}
        if self.fixed:
            known |= {"mean": (_DTYPE, 5), "std": (_DTYPE, 5), "grain_map": (torch.uint8, 4)}
        else:
            known |= {"entropy": (torch.float32, 4)}
            known |= {f"{name}.{g}": (_DTYPE, 5) for name in ("mean", "std") for g in range(self.num_grains)}
        for name in (*known, *self._extras):
            if name not in tensors:
                raise ValueError(f"it has no {name}")
        like = self._tensors[0] if self._tensors else tensors
        if tensors.keys() != like.keys():
            raise ValueError(f"it has {', '.join(sorted(tensors))}, not {', '.join(sorted(like))}")
        for name, tensor in tensors.items():
            dtype, rank = known.get(name, (like[name].dtype, like[name].ndim))
            lead = (unit.images,) if name in ("label", "index") else (unit.images, 2 if self.flips else 1)
            wanted = (*lead, *like[name].shape[len(lead) :])
            got = tuple(tensor.shape)
            if (tensor.dtype, got, len(got)) != (dtype, wanted, rank):
                raise ValueError(f"{name} is {tensor.dtype} {got}, not {dtype} {wanted} of rank {rank}")
        label = tensors["label"]
        if label.min() < -1 or label.max() >= max(self.num_classes, 0):
            raise ValueError(f"labels {label.min()} ... {label.max()} of {self.num_classes} classes")
        if not self.fixed:
            if f"mean.{self.num_grains}" in tensors:
                raise ValueError(f"it has mean.{self.num_grains}, for {self.num_grains} grains")
            height, width = tensors["entropy"].shape[2:]
            channels = tensors["mean.0"].shape[2]
            for g in range(self.num_grains):
                got = tuple(tensors[f"mean.{g}"].shape[2:])
                side = got[1] // height
                if got != (channels, side * height, side * width) or tuple(tensors[f"std.{g}"].shape[2:]) != got:
                    raise ValueError(f"mean.{g} and std.{g} do not fit regions {height} x {width}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_tensors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_units()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def reading(
        self, *, shares: Callable[[float], Sequence[float]] | None = None, extras: Sequence[str] = ()
    ) -> LatentCache:
        """Returns this cache with other shares and extras, without hashing its files again."""
        return LatentCache(self.folder, verify=False, shares=shares, extras=extras)

    def shares(self) -> list[float]:
        """Returns the k - 1 shares of all regions that are of grain i + 1 or finer in the default map."""
        regions = math.prod(self.grid) * (2 if self.flips else 1) * len(self)
        if self.fixed:
            limits, name = [torch.tensor(g) for g in range(self.num_grains - 1)], "grain_map"
        else:
            limits, name = list(torch.tensor(self.thresholds)), "entropy"
        return [sum(int((unit[name] > limit).sum()) for unit in self._tensors) / regions for limit in limits]

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Returns for each share the entropy, nats, that this share of all regions exceeds.

        Where many regions have one entropy, the threshold lies beside it, on the side of the nearer share.
        """
        most = float(self._entropies[-1])
        return [threshold_of(self._entropies, share, self._resolution, most) for share in shares]

    def level_edges(self, levels: int) -> list[float]:
        """Returns levels + 1 ascending entropies, nats, between which lie equal shares of all regions.

        Raises:
            UserError: a cache of version 1, which has no entropies.
        """
        self._require_entropies()
        inner = self.quantiles([1 - i / levels for i in range(1, levels)])
        ends = [float(self._entropies[i]) for i in (0, -1)]
        return [min(ends[0], inner[0]), *inner, max(ends[1], inner[-1])]

    def _require_entropies(self) -> None:
        if self.fixed:
            raise UserError(
                f"{self.folder} is a latent cache of an earlier version, whose grain maps are fixed: to train with "
                "other shares or with levels of entropy, delete it and run the cache stage again"
            )

    def shares_above(self, thresholds: Sequence[float]) -> list[float]:
        """Returns the share of all regions that exceeds each threshold, to 0.1 %."""
        return shares_above(self._entropies, thresholds)

    def require(self, **facts: Any) -> None:
        """Raises UserError unless the cache was made with these facts."""
        for key, value in facts.items():
            if self.facts.get(key) != json.loads(json.dumps(value)):
                raise UserError(
                    f"{self.folder} was made with {key} = {_short(self.facts.get(key))}, not {_short(value)}: "
                    "delete it or name another folder"
                )

    def fingerprint(self) -> str:
        """Returns the identity of the cache by content, as a hex string: the index, which holds every file's hash."""
        return self.sha256

    def require_classes(self, num_classes: int, *, allow_missing: bool = False) -> None:
        """Raises UserError unless the images have `num_classes` classes; see `ImageSource.require_classes`."""
        labels = self.labels if self.num_classes else None
        check_classes(f"{self.folder} ({self.description})", self.num_classes, labels, num_classes, allow_missing)

    def fetch(self, indices: Sequence[int], draws: Sequence[Draws] | None = None, *, replace: bool = False) -> dict:
        """Returns a batch; with `draws`, half of the images as their mirror images where those were encoded.

        mean, std (B, C, Hf, Wf) float32, neighbour-copied by grain_map (B, h, w) int64, on the host, so that a packed
        capacity needs no look at the device; label, index (B,) int64, the index being the source's; and the extras.
        With `draws` the map follows from shares that are drawn for each image, if the cache was opened with
        `shares`. `replace` has no effect: a cache holds no unreadable image.
        """
        wanted = np.asarray(indices, np.int64)
        view = np.zeros(len(wanted), np.int64)
        if draws is not None and self.flips:
            view = np.array([draw.uniform() < 0.5 for draw in draws], np.int64)
        first = self._tensors[0]
        latents = ["mean", "std"] if self.fixed else [name for name in first if name.startswith(("mean.", "std."))]
        dtypes = {name: first[name].dtype for name in ("label", "index", *self._extras)}
        dtypes |= {"grain_map": torch.int64} if self.fixed else {"entropy": torch.float32}
        dtypes |= dict.fromkeys(latents, torch.float32)
        batch = self._read(wanted, view, dtypes)
        if self.fixed:
            return batch
        entropy = batch["entropy"] if "entropy" in self._extras else batch.pop("entropy")
        limits = torch.tensor(self.thresholds).expand(len(wanted), self.num_grains - 1)
        if self._shares is not None and draws is not None:
            limits = torch.tensor([self.quantiles(self._shares(draw.uniform())) for draw in draws])
        limits = limits.reshape(len(wanted), 1, 1, self.num_grains - 1)
        batch["grain_map"] = (entropy[..., None] > limits).sum(dim=-1)
        for name in ("mean", "std"):
            grains = [batch.pop(f"{name}.{g}") for g in range(self.num_grains)]
            batch[name] = neighbor_copy(grains, batch["grain_map"])
        return batch

    def _read(self, wanted: np.ndarray, view: np.ndarray, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Returns arrays of the images `wanted` in these dtypes, of every image the view `view`."""
        unit = np.searchsorted(self._starts, wanted, side="right") - 1
        row = wanted - self._starts[unit]
        flat = ("label", "index")
        batch = {
            name: torch.empty(len(wanted), *self._tensors[0][name].shape[1 if name in flat else 2 :], dtype=dtype)
            for name, dtype in dtypes.items()
        }
        for number in np.unique(unit):
            slots = torch.from_numpy(np.flatnonzero(unit == number))
            rows, views = torch.from_numpy(row)[slots], torch.from_numpy(view)[slots]
            for name, value in batch.items():
                tensor = self._tensors[number][name]
                value[slots] = (tensor[rows] if name in flat else tensor[rows, views]).to(value.dtype)
        return batch
