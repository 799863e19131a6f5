"""Files that are either whole or absent, and checked when they are read back."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from d2it.errors import UserError, reason_of

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it is flushed to disk and renamed to `path`.

    A crash at any moment leaves the old file or the new one, never a part. On an exception the temporary file is
    removed and `path` stays as it was. The file gets the permissions that the umask gives a new file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # safetensors replaces the file by one that only its owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)  # the rename itself must reach the disk
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text)


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file; a failure is an OSError, as for any other file, and not safetensors' own exception."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def load_saved(path: str | os.PathLike[str]) -> Any:
    """Returns what torch.save wrote to a regular file: tensors on the host, containers, numbers, `argparse.Namespace`.

    The file is a pickle; anything else in it is refused, and nothing in it is executed.

    Raises:
        ValueError: it cannot be read or holds something else; one line that names the file.
    """
    import torch

    try:
        with open_regular(path) as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(reason_of(error)) from None
    except Exception as error:  # as many kinds as a pickle can be wrong; torch's text advises to trust the file
        name = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {name[1]}, which no weights need" if name else "torch.save wrote no such file"
        raise ValueError(f"{path} cannot be read as weights: {why}") from None


def prepare_file(path: str | os.PathLike[str], name: str) -> None:
    """Makes the folder of a file that is written at the end of the work; commands call it before they start.

    Args:
        path: of the file.
        name: of the option, for the message.

    Raises:
        UserError: such a file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{name} {path}: is a folder")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{name} {path}: cannot write there")
    except OSError as error:
        raise UserError(f"{name} {path}: {error.strerror}") from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading, and never waits as `open` does for a FIFO.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is a folder, FIFO, socket or device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file", path)
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return content


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the object that a JSON file of at most 256 MiB holds.

    Raises:
        UserError: the file cannot be read, or it is not one JSON object of finite numbers; names the file.
    """
    try:
        content = json.loads(read_bytes(path, 2**28), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deeply nested"
        raise UserError(f"{path} is damaged: not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


def check_yaml(text: str) -> str:
    """Returns a YAML text unless it is nested so deeply that a reader would overflow the stack, as those in C do.

    Raises:
        ValueError: more than 32 levels, or no YAML.
    """
    import yaml

    level = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > 32:
                raise ValueError("nested more than 32 levels deep")
    except yaml.YAMLError as error:
        raise ValueError(yaml_reason(error)) from None
    return text


def yaml_reason(error: BaseException) -> str:
    """Returns what is wrong with a YAML text, and in which line, as one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"{problem} in line {mark.line + 1}" if problem and mark else reason_of(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a JSON object with its own SHA-256 as "sha256"; the file appears whole or not at all."""
    write_text(path, json.dumps({**content, "sha256": _seal(content)}, indent=2) + "\n")


def read_sealed(path: str | os.PathLike[str], known: set[str]) -> dict[str, Any]:
    """Returns what `write_sealed` wrote. A file without "sha256", as earlier versions wrote it, causes a warning.

    Args:
        path: the file.
        known: the keys that it may have; a damaged "sha256" is none of them.

    Raises:
        ValueError: the file cannot be read, holds no JSON object or one with other keys, or has changed since.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    seal = content.pop("sha256", None)
    if content.keys() - known:
        raise ValueError(f"{path} is damaged, or of a later version: unknown key {min(content.keys() - known)!r}")
    if seal is None:
        warnings.warn(f"{path} has no sha256: damage would go unnoticed; saving it again adds one", stacklevel=2)
    elif seal != _seal(content):
        raise ValueError(
            f'{path} has changed since it was saved: it is damaged, or was edited (remove "sha256" to keep an edit)'
        )
    return content


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that one process may write at a time; the folder is made if it is not there.

    The lock is that of `<folder>/run.lock`, which the operating system gives up when the process ends, however it ends.
    The file itself holds the owner's host, process id and start, and stays.

    Raises:
        UserError: another process holds the lock, which is described, or the folder cannot be written.
    """
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file")
    with open(descriptor, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{path}: cannot be locked: {error.strerror}") from None
            owner = " ".join(file.read(1000).split())
            raise UserError(f"{folder}: another run writes here: {owner or 'its owner is not known'}") from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
        file.flush()
        yield


def flush_folder(path: Path) -> None:
    """Makes the names in a folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a regular file's content as a hex string."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
