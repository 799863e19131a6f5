"""What a run leaves, in one file that is whole at any moment. Standard library alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from revision import ROOT, commit, source_hash

LOGS = ROOT / "runs" / "gpu"
TOOLS = ("c++", "nvcc", "ninja", "ncu", "compute-sanitizer", "nvidia-smi")


def write_start(parts: Sequence[str], minutes: float) -> None:
    """Writes runs/gpu/start.json: when and where this is, and what is to be run."""
    facts = {
        "parts": list(parts),
        "minutes": minutes,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": sys.version,
        "kernel": " ".join(os.uname()[::2]),
        "cores": os.cpu_count(),
        "tools": {name: shutil.which(name) for name in TOOLS},
    }
    _write("start.json", facts)


def write_versions() -> None:
    """Writes runs/gpu/versions.json: the code, the driver and the packages."""
    import importlib.metadata  # takes as long as all the rest

    driver = Path("/proc/driver/nvidia/version")
    facts = {
        "commit": commit(),
        "source": source_hash(),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
        "packages": {d.name: d.version for d in importlib.metadata.distributions()},
    }
    _write("versions.json", facts)


def _write(name: str, facts: dict[str, Any]) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / name).write_text(json.dumps(facts, indent=1) + "\n")


class Tee:
    """A stream whose lines go to a log, too."""

    def __init__(self, stream: TextIO, log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Writes to both."""
        self._log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        """Flushes both."""
        self._log.flush()
        self._stream.flush()


class Bundle:
    """Within it, $OUT/gpu.tar.gz holds the logs and the results, written anew every `EVERY` seconds, and the logs have
    what is printed; nothing of the former where $OUT names no folder."""

    EVERY = 20.0

    def __init__(self) -> None:
        self._sources = {"logs": LOGS}
        self._target = Path(os.environ["OUT"]) / "gpu.tar.gz" if os.environ.get("OUT") else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def add(self, name: str, folder: Path) -> None:
        """From now on the bundle holds what is in `folder`, under `name`."""
        self._sources = {**self._sources, name: folder}

    def write(self) -> None:
        """Replaces the bundle at once."""
        if self._target is None:
            return
        self._target.parent.mkdir(parents=True, exist_ok=True)
        part = self._target.with_name(f".{self._target.name}.{threading.get_ident()}")
        with tarfile.open(part, "w:gz", compresslevel=6) as bundle:
            for name, source in self._sources.items():
                for path in sorted(source.rglob("*")) if source.is_dir() else ():
                    if not path.is_file():
                        continue
                    try:
                        content = path.read_bytes()  # whole, before its size is written: it may change meanwhile
                        entry = tarfile.TarInfo(f"{name}/{path.relative_to(source)}")
                        entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                    except FileNotFoundError:  # it was replaced
                        continue
                    bundle.addfile(entry, io.BytesIO(content))
        part.replace(self._target)

    def tidy(self) -> None:
        """Removes a bundle that was being written."""
        for part in self._target.parent.glob(f".{self._target.name}.*") if self._target else ():
            part.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._over.wait(self.EVERY):
            try:
                self.write()
            except OSError:  # the next may succeed
                traceback.print_exc()

    def __enter__(self) -> Bundle:
        self.write()
        self._streams = sys.stdout, sys.stderr
        self._printed = (LOGS / "printed.log").open("w", buffering=1)
        sys.stdout, sys.stderr = (Tee(stream, self._printed) for stream in self._streams)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._streams
        self._over.set()
        self._thread.join()
        self._printed.close()
        self.write()
