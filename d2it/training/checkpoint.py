"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong resume.

A checkpoint is a directory `step-00001000` with the shards of torch.distributed.checkpoint and
`manifest.json`: the step, what the checkpoint is of, and size and SHA-256 of every file. It is written
under another name, every file and then the directory is flushed to the disk, and one rename makes it
appear: a directory of that name is always whole. Nothing is ever overwritten.

The tensors are stored by their names in the model, not by rank, so any number of ranks can load them,
under DDP or FSDP2. Shards are for the run's own resume; weights to share are safetensors
(`save_pretrained`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from d2it.distributed import World
from d2it.errors import UserError
from d2it.files import flush_folder, sha256_of

MANIFEST = "manifest.json"
_ADVICE = "move the directory away to resume from the one before it"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one stage, in one folder.

    Args:
        folder: where they lie; made if it is not there.
        world: the ranks; every method is called by all of them.
        identity: what the checkpoints are of, as JSON values; a checkpoint with another identity is refused.
        keep: how many are kept.
        background: write from a copy, in a thread, while training goes on.
    """

    def __init__(
        self, folder: Path, world: World, identity: dict[str, Any], *, keep: int = 3, background: bool = False
    ) -> None:
        self.folder, self.world, self.keep, self.background = folder, world, keep, background
        self.identity = json.loads(json.dumps(identity))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[Path] | None = None
        if world.size == 1:  # on purpose
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def prepare(self, size: int) -> None:
        """Fail now rather than at the first save.

        Args:
            size: bytes a checkpoint will take.

        Raises:
            UserError: the folder cannot be made or written, or the disk has no room for two checkpoints.
        """

        def probe() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f".probe-{self.world.rank}"
                _write(path, b"x")
                path.unlink()
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write checkpoints here: {error.strerror}") from None
            free = shutil.disk_usage(self.folder).free
            if free < 2 * size and self.latest() is None:
                raise UserError(
                    f"{self.folder}: {free / 2**30:.1f} GiB free, two checkpoints take {2 * size / 2**30:.1f}"
                )

        self.world.together(probe)
        if self.world.first:
            for left in self.folder.glob(".writing-*"):  # of a run that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
        self.world.barrier()

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m[1]) for m in found if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any] | None = None) -> Path:
        """Save; with `background`, return once the tensors are copied.

        Args:
            step: steps done; names the checkpoint. One that is there already is left alone.
            tensors: nested dict of tensors (DTensors under FSDP2).
            facts: JSON values to find again in `load`.

        Raises:
            UserError: this save, or the one before it in the background, could not be written. Earlier
                checkpoints are untouched.
        """
        self.wait()
        final = self.path(step)
        if self.world.together(final.exists):
            return final
        temporary = self.folder / f".writing-{step:08d}"
        manifest = {
            "step": step,
            "world_size": self.world.size,
            "identity": self.identity,
            "facts": facts or {},
        }
        if self._thread is None:
            self._write(step, temporary, manifest, lambda: _dcp_save(tensors, temporary, self.world))
            return final
        writer = _writer(temporary)
        staged = writer.stage(tensors)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self._pending = self._thread.submit(
            self._write, step, temporary, manifest, lambda: _dcp_save(staged, temporary, self.world)
        )
        return final

    def settle(self) -> None:
        """Take the result of the save in the background if it has ended on every rank; does not wait for it.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None and all(self.world.gather(self._pending is not None and self._pending.done())):
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> dict[str, Any] | None:
        """The manifest of the newest checkpoint ("step", "facts", "world_size"), None if there is none.

        Raises:
            UserError: the checkpoint is of something else, or its manifest is damaged.
        """
        steps = [s for s in self.world.gather(self.latest()) if s is not None]
        return self.world.together(lambda: self._manifest(self.path(max(steps)))) if steps else None

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Load the checkpoint of `step` into `tensors`, in place.

        Raises:
            UserError: a file is missing or damaged, or a tensor in it does not fit.
        """
        path = self.path(step)
        self.world.together(lambda: self._verify(path))

        def read() -> None:
            try:
                alone = self.world.size == 1
                dcp.load(tensors, checkpoint_id=path, process_group=self.world.control, no_dist=alone)
            except (CheckpointException, RuntimeError, ValueError) as error:
                raise UserError(f"{path}: does not fit this model: {_reason(error)}") from None

        self.world.together(read)

    def close(self) -> None:
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, temporary: Path, manifest: dict[str, Any], shards: Callable[[], None]) -> Path:
        world, final = self.world, self.path(step)
        try:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            world.together(lambda: temporary.mkdir() if world.first else None, world.saver)
            world.together(shards, world.saver)
            hashes: dict[str, Any] = {}
            for part in world.gather(world.together(lambda: _hashes(temporary, world), world.saver), world.saver):
                hashes |= part

            def commit() -> None:
                _write(temporary / MANIFEST, json.dumps({**manifest, "files": hashes}, indent=1).encode())
                flush_folder(temporary)
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
            last = self.latest()
            kept = f"the last good checkpoint is {self.path(last)}" if last is not None else "there is no earlier one"
            raise UserError(f"{final}: could not be saved: {error}; {kept}") from None
        return final

    def _manifest(self, path: Path) -> dict[str, Any]:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            step = manifest["step"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged checkpoint, {MANIFEST} is missing or unreadable; {_ADVICE}") from None
        if self.path(step) != path:
            raise UserError(f"{path}: damaged checkpoint, the manifest says step {step}; {_ADVICE}")
        difference = _difference(manifest.get("identity"), self.identity)
        if difference:
            raise UserError(
                f"{path}: checkpoint of another model or data set: {difference}; choose another run.dir to start anew"
            )
        return manifest

    def _verify(self, path: Path) -> None:
        """Hold this rank's share of the files against the manifest."""
        files = self._manifest(path).get("files") or {}
        for name in sorted(files)[self.world.rank :: self.world.size]:
            try:
                same = sha256_of(path / name) == files[name]["sha256"]
            except OSError as error:
                raise UserError(f"{path / name}: damaged checkpoint: {error.strerror}; {_ADVICE}") from None
            if not same:
                raise UserError(f"{path / name}: damaged checkpoint, SHA-256 differs from the manifest; {_ADVICE}")


def _writer(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)


def _dcp_save(tensors: dict[str, Any], path: Path, world: World) -> None:
    try:
        alone = world.size == 1
        dcp.save(tensors, storage_writer=_writer(path), process_group=world.saver, no_dist=alone)
    except (
        CheckpointException,
        RuntimeError,
    ) as error:  # torch's zip writer reports a full disk as the latter
        raise UserError(_reason(error)) from None


def _hashes(folder: Path, world: World) -> dict[str, Any]:
    """Size and SHA-256 of the files that this rank wrote."""
    mine = sorted(folder.glob(f"__{world.rank}_*"))
    if world.first:
        mine.append(folder / ".metadata")
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in mine}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    """The line of an error that says what happened."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    """The first place where two identities differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *(n for n in theirs if n not in ours)]:
            found = _difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if theirs == ours else f"{key} is {theirs!r} there and {ours!r} here"
