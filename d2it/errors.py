"""The errors a user can act on, and the one place where a command turns them into a line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

#: A second SIGTERM counts from this many seconds after the first: a batch system and torchrun's agent each send one.
SECOND_SIGNAL = 2.0


class UserError(Exception):
    """Something the user can put right: a path, a setting, a damaged file. The message is one line and complete.

    Args:
        message: what is wrong, with the name and value of what is to be changed.
        shared: every rank raises the same error at the same place, so that rank 0 alone prints it.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: the signal; the exit code is 128 + it.
        message: one line about what was kept; None is "stopped by" and the signal.
        shared: as for `UserError`.
    """

    def __init__(self, number: int, message: str | None = None, *, shared: bool = False) -> None:
        self.signal, self.message = signal.Signals(number), message
        self.shared = shared
        super().__init__(message or f"stopped by {self.signal.name}")


def run_command(main: Callable[[], int | None]) -> int:
    """Runs the body of a command and returns its exit code; every entry point goes through here.

    Args:
        main: returns the exit code, None for 0.

    Returns:
        What `main` returned; 2 after a `UserError`, an `OSError` or memory that ran out, and 128 + signal after SIGINT
        (Ctrl-C) or SIGTERM, each with one line on stderr. Any other exception is a bug and passes through.
    """
    try:
        with interruptible():
            return main() or 0
    except KeyboardInterrupt as stop:
        return _end(str(stop) or "interrupted", 128 + getattr(stop, "signal", signal.SIGINT), stop)
    except UserError as error:
        return _end(f"error{_rank()}: {error}", 2, error)
    except BrokenPipeError:  # `... | head`: whoever read the output has gone
        sys.stderr.close()
        return 1
    except OSError as error:
        return _end(f"error{_rank()}: {reason_of(error)}", 2, error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _end(f"error{_rank()}: out of memory: {reason_of(error)}; a smaller batch needs less", 2, error)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise `Interrupted`, and a second request end the process at once, with one line.

    For work that leaves its files whole wherever it stops. In another thread than the main one, which alone can take
    signals, they stay as they are.
    """
    first: list[tuple[signal.Signals, float]] = []

    def interrupt(number: int, frame: object) -> None:
        caught = signal.Signals(number)
        if not first:
            first.append((caught, time.monotonic()))
            raise Interrupted(number)
        if second_request(caught, *first[0]):
            os.write(2, f"{caught.name} again: ended at once\n".encode())  # print could find its own lock held
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def second_request(number: signal.Signals, first: signal.Signals, since: float) -> bool:
    """Returns whether a signal asks a second time to stop, and is not the first request sent twice.

    Args:
        number: the signal.
        first: the one before it.
        since: when that came, by `time.monotonic`.
    """
    return number == first == signal.SIGINT or time.monotonic() - since >= SECOND_SIGNAL


@contextlib.contextmanager
def user_error(where: str = "", kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turns exceptions into a UserError of one line, for the place where they mean something that the user can mend.

    Args:
        where: what the line begins with, a name or a path.
        kinds: of the exceptions; others pass through.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{where}: {reason_of(error)}" if where else reason_of(error)) from None


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "Cannot allocate memory" in text)


def reason_of(error: BaseException) -> str:
    """Returns the line of an exception that states what happened."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (rank {rank})"


def _end(line: str, code: int, error: BaseException) -> int:
    if not getattr(error, "shared", False) or not _rank():
        print(line, file=sys.stderr, flush=True)
    return code
