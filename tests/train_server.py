"""Runs of tests/train_worker.py that start in a fraction of a second."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKER = Path(__file__).with_name("train_worker.py")
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    "PYTHONPATH": str(WORKER.parents[1]),
    "OMP_NUM_THREADS": "1",
}


class Server:
    """`train_worker.py serve`: forked ranks for every run, one run at a time."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the server
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env=ENVIRONMENT,
        )

    def start(self, folder: Path, **settings: object) -> list[int]:
        """Starts a run; returns the pids of its ranks."""
        line = " ".join(f"{k}={v}" for k, v in {"dir": folder, **settings}.items())
        assert self.process.stdin is not None
        self.log.seek(0)
        self.log.truncate()
        self.process.stdin.write(line + "\n")
        return [int(pid) for pid in self.line().split()]

    def finish(self) -> tuple[int, str, str]:
        """Waits for the run: the worst exit code (a kill: minus the signal), the printed hash, stderr."""
        found = ""
        while not (line := self.line()).startswith("exit "):
            found = line.removeprefix("hash ") if line.startswith("hash ") else found
        self.log.seek(0)
        return max((int(code) for code in line.split()[1:]), key=abs), found, self.log.read()

    def run(self, folder: Path, **settings: object) -> tuple[int, str, str]:
        self.start(folder, **settings)
        return self.finish()

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        return line.strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@functools.cache
def shared_server() -> Server:
    """One server for all tests of this process."""
    server = Server()
    atexit.register(server.close)
    return server


def wait_for(path: Path, seconds: float = 120) -> None:
    """Until the file is there and not empty."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)
