"""Processes that end with the one that started them, however that ends.

A command runs in a session of its own below a keeper, this file as a script. The kernel signals the keeper when its
parent ends, and the keeper then kills everything in its session: compilers, workers, grandchildren.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def run(command: list[str], log: Path, limit: float, environment: dict[str, str], folder: Path) -> int | None:
    """Runs a command with its output in `log`; None where it was ended at its limit, in seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, str(os.getpid()), *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end(process)
    return None


def end(process: subprocess.Popen) -> None:
    """Ends a keeper and all that runs below it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(timeout=GRACE + 2)
            except subprocess.TimeoutExpired:
                continue
    # A command that is over may have left others behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def keep(parent: int, command: list[str]) -> int:
    """Runs the command until it or the parent ends."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        until = time.monotonic() + GRACE
        # Not child.poll(): this interrupts child.wait(), which holds its lock.
        while time.monotonic() < until and not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.05)
        os.killpg(0, signal.SIGKILL)

    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, stop)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        stop()
    code = child.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    raise SystemExit(keep(int(sys.argv[1]), sys.argv[2:]))
