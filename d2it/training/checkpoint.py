"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong resume.

A checkpoint is a folder `step-00001000` with the shards of torch.distributed.checkpoint and `manifest.json`: the step,
what the checkpoint is of, and size and SHA-256 of every file. It is written under another name, every file and then the
folder is flushed to the disk, and one rename makes it appear: a folder of that name is always whole. Nothing is ever
overwritten.

Tensors are stored by their names in the model, not by rank, so any number of ranks can load them, under DDP or FSDP2.
torch.distributed.checkpoint keeps its index and the optimiser's numbers as pickles; both are read here by a reader that
admits the types of an index and nothing else, so a checkpoint from a stranger executes nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from d2it.distributed import World
from d2it.errors import UserError, reason_of
from d2it.files import atomic_write, flush_folder, open_regular, read_json, sha256_of, write_text

MANIFEST = "manifest.json"
INDEX = ".metadata"
_ADVICE = "move the folder away to resume from the one before it"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one stage, in one folder. Every method is called by all ranks.

    Args:
        folder: where they are; made if it is not there.
        world: the ranks.
        identity: what the checkpoints are of, as JSON values; a checkpoint with another identity is refused.
        keep: how many are kept.
        background: write from a copy, in a thread, while training goes on.
        precision: in which the stage computes, "bf16" or "fp32": recorded, and nothing is refused for it.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        identity: dict[str, Any],
        *,
        keep: int = 3,
        background: bool = False,
        precision: str | None = None,
    ) -> None:
        self.folder, self.world, self.keep, self.background = folder, world, keep, background
        self.precision = precision
        self.identity = json.loads(json.dumps(identity))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[Path] | None = None
        if world.size == 1:  # on purpose
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def prepare(self, size: int) -> None:
        """Fails now rather than at the first save, and removes what a killed run left half-written.

        Args:
            size: bytes a checkpoint will take.

        Raises:
            UserError: the folder cannot be made or written, or the disk has no room for two checkpoints.
        """

        def probe() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f".probe-{self.world.rank}"
                with atomic_write(path) as partial:
                    partial.write_bytes(b"x")
                path.unlink()
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write checkpoints here: {error.strerror}") from None
            free = shutil.disk_usage(self.folder).free
            if free < 2 * size and self.latest() is None:
                raise UserError(
                    f"{self.folder}: {free / 2**20:,.1f} MiB free, two checkpoints take {2 * size / 2**20:,.1f}"
                )

        self.world.together(probe)
        if self.world.first:
            for left in self.folder.glob(".writing-*"):
                shutil.rmtree(left, ignore_errors=True)
        self.world.barrier()

    def steps(self) -> list[int]:
        """Returns the steps of which there is a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m[1]) for m in found if m)

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def refuge(self) -> str:
        """Returns in words which checkpoint a run that fails now can go back to."""
        last = self.latest()
        return "there is no earlier checkpoint" if last is None else f"the last good checkpoint is {self.path(last)}"

    def save(self, step: int, tensors: dict[str, Any]) -> Path:
        """Saves the tensors; with `background`, returns once they are copied.

        Args:
            step: steps done; names the checkpoint. One that is there already is left alone.
            tensors: nested dict of tensors (DTensors under FSDP2).

        Raises:
            UserError: this save, or the one before it in the background, could not be written. Earlier
                checkpoints are untouched.
        """
        self.wait()
        final = self.path(step)
        if self.world.together(final.exists):
            return final
        temporary = self.folder / f".writing-{step:08d}"
        if self._thread is None:
            self._write(step, temporary, lambda: _dcp_save(tensors, temporary, self.world))
            return final
        staged = _writer(temporary).stage(tensors)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self._pending = self._thread.submit(
            self._write, step, temporary, lambda: _dcp_save(staged, temporary, self.world)
        )
        return final

    def settle(self) -> None:
        """Takes the result of the save in the background if it has ended on every rank; does not wait for it.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None and all(self.world.gather(self._pending is not None and self._pending.done())):
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint on any rank, or None.

        Raises:
            UserError: it is of something else, or its manifest is damaged.
        """
        steps = [s for s in self.world.gather(self.latest()) if s is not None]
        if not steps:
            return None
        self.world.together(lambda: self._manifest(self.path(max(steps))))
        return max(steps)

    def precision_at(self, step: int) -> str | None:
        """Returns the precision that the checkpoint of `step` records; earlier versions recorded none."""
        found = self._manifest(self.path(step)).get("precision")
        return found if found in ("bf16", "fp32") else None

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Loads the checkpoint of `step` into `tensors`, in place.

        Raises:
            UserError: a file is missing or damaged, or a tensor in it does not fit.
        """
        path = self.path(step)
        files = self.world.together(lambda: self._verify(path))

        def read() -> None:
            try:
                reader = _Reader(path, set(files))
                reader.read_metadata()  # torch would log a failure with its traceback
                dcp.load(
                    tensors,
                    storage_reader=reader,
                    planner=_Planner(),
                    process_group=self.world.control,
                    no_dist=self.world.size == 1,
                )
            # A file from elsewhere can fail in any way, and none of them is a bug of this program.
            except (CheckpointException, Exception) as error:
                raise UserError(f"{path}: does not fit this model: {_reason(error)}") from None

        self.world.together(read)

    def close(self) -> None:
        """Waits for the save in the background and ends its thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, temporary: Path, shards: Callable[[], None]) -> Path:
        world, final = self.world, self.path(step)
        try:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            world.together(lambda: temporary.mkdir() if world.first else None, world.saver)
            world.together(shards, world.saver)
            hashes: dict[str, Any] = {}
            for part in world.gather(world.together(lambda: _hashes(temporary, world), world.saver), world.saver):
                hashes |= part
            manifest = {
                "step": step,
                "world_size": world.size,
                "precision": self.precision,
                "identity": self.identity,
                "files": hashes,
            }

            def commit() -> None:
                write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))  # which flushes the folder too
                os.rename(temporary, final)
                flush_folder(self.folder)
                for old in self.steps()[: -self.keep]:
                    retired = self.folder / f".writing-{old:08d}"
                    os.rename(self.path(old), retired)
                    shutil.rmtree(retired, ignore_errors=True)

            world.together(lambda: commit() if world.first else None, world.saver)
        except UserError as error:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"{final}: could not be saved: {error}; {self.refuge()}", shared=error.shared) from None
        return final

    def _manifest(self, path: Path) -> dict[str, Any]:
        """Reads the manifest of a checkpoint and checks it against the folder's name and this stage's identity."""

        def damaged(what: str) -> UserError:
            return UserError(f"{path}: damaged checkpoint, {what}; {_ADVICE}")

        try:
            manifest = read_json(path / MANIFEST)
        except UserError as error:
            raise damaged(str(error)) from None
        step, files = manifest.get("step"), manifest.get("files")
        if type(step) is not int or self.path(step) != path:
            raise damaged(f"the step in {MANIFEST} is {step!r}")
        if not isinstance(files, dict) or INDEX not in files or not any(name.endswith(".distcp") for name in files):
            raise damaged(f"{MANIFEST} has no hashes of its files")
        for name, entry in files.items():
            sha256 = entry.get("sha256") if isinstance(entry, dict) else None
            if Path(name).name != name or not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise damaged(f"{MANIFEST} has no hash of the file {name!r}")
        difference = _difference(manifest.get("identity"), self.identity)
        if difference:
            raise UserError(
                f"{path}: checkpoint of another model or data set: {difference}; choose another run.dir to start anew"
            )
        return manifest

    def _verify(self, path: Path) -> dict[str, Any]:
        """Checks this rank's share of the files against the manifest; returns the manifest's files."""
        files = self._manifest(path)["files"]
        for name in sorted(files)[self.world.rank :: self.world.size]:
            try:
                same = sha256_of(path / name) == files[name]["sha256"]
            except OSError as error:
                raise UserError(f"{path / name}: damaged checkpoint: {error.strerror}; {_ADVICE}") from None
            if not same:
                raise UserError(f"{path / name}: damaged checkpoint, SHA-256 differs from the manifest; {_ADVICE}")
        return files


# What the index of a checkpoint is made of: types that hold values, and the names of layouts and dtypes.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
_ADMITTED |= {("torch", str(kind)[6:]): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
for _type in (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
):
    _ADMITTED[metadata.__name__, _type.__name__] = _type


class _Unpickler(pickle.Unpickler):
    """Reads the index of a checkpoint; a name outside `_ADMITTED` is an error before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs") from None


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, with an index that is unpickled from the admitted types and stays within the folder.

    Args:
        path: folder of the checkpoint.
        files: names of the files whose hashes were checked; no other file is read.
    """

    def __init__(self, path: Path, files: set[str]) -> None:
        super().__init__(path)
        self.folder, self.files = path, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with open_regular(self.folder / INDEX) as file:
            index = _Unpickler(file).load()
        if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise pickle.UnpicklingError("its index is not one of torch.distributed.checkpoint")
        for place in index.storage_data.values():
            if place.relative_path not in self.files:
                raise pickle.UnpicklingError(f"its index names the file {place.relative_path!r}")
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner, but of values that are no tensors only numbers and tuples are read; others are refused."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        for item in plan.items:
            name = item.dest_index.fqn
            if (item.type == LoadItemType.BYTE_IO) == isinstance(self.state_dict[name], torch.Tensor):
                raise ValueError(f"{name} is a tensor on one side only")
        return plan

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        found = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def _writer(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)


def _dcp_save(tensors: dict[str, Any], path: Path, world: World) -> None:
    try:
        alone = world.size == 1
        dcp.save(tensors, storage_writer=_writer(path), process_group=world.saver, no_dist=alone)
    except (CheckpointException, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        raise UserError(_reason(error)) from None


def _hashes(folder: Path, world: World) -> dict[str, Any]:
    """Returns size and SHA-256 of the files that this rank wrote."""
    mine = sorted(folder.glob(f"__{world.rank}_*"))
    if world.first:
        mine.append(folder / INDEX)
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in mine}


def _reason(error: BaseException) -> str:
    """Returns the line that states what happened, of the first rank's failure where ranks failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)


def _difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    """Returns in words the first place where two identities differ, or None."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *(n for n in theirs if n not in ours)]:
            if name == "fingerprint" and name not in theirs:  # earlier versions did not record it
                continue
            found = _difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if theirs == ours else f"{key} is {theirs!r} there and {ours!r} here"
