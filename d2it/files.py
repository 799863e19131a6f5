"""Files that are either whole or absent, and the hashes that tell a whole one from a damaged one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from d2it.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it is flushed to disk and renamed to ``path``.

    A crash at any moment leaves the old file or the new one, never a part. On an exception the temporary file
    is removed and ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)  # the rename itself must reach the disk
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; what goes wrong is an OSError, as with any file, and not safetensors' own kind."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def prepare_file(path: str | os.PathLike[str], name: str) -> None:
    """Make the folder of a file that is written when the work is done; for entry points, before they start.

    Raises:
        UserError: there can be no such file; names the argument.
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


def read_json(path: str | os.PathLike[str], limit: int = 2**28) -> dict[str, Any]:
    """Returns the object that a JSON file of at most `limit` bytes holds.

    Raises:
        UserError: the file cannot be read, or it is not one JSON object of finite numbers; names the file.
    """
    try:
        content = json.loads(read_bytes(path, limit), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deeply nested"
        raise UserError(f"{path} is damaged: not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a JSON object with its own SHA-256 as "sha256"; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({**content, "sha256": _seal(content)}, indent=2) + "\n")


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what `write_sealed` wrote. A file without "sha256", as earlier versions wrote it, causes a warning.

    Raises:
        ValueError: the file cannot be read, holds no JSON object, or has changed since.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    seal = content.pop("sha256", None)
    if seal is None:
        warnings.warn(f"{path} has no sha256: damage would go unnoticed; saving it again adds one", stacklevel=2)
    elif seal != _seal(content):
        raise ValueError(
            f'{path} has changed since it was saved: it is damaged, or was edited (remove "sha256" to keep an edit)'
        )
    return content


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush_folder(path: Path) -> None:
    """Make the names in a folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content as a hex string."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
