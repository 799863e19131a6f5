"""Files that are either whole or absent, and the hashes that tell a whole one from a damaged one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
