"""A pytest plugin for a suite that goes on after a test has taken the process or the device with it.

    D2IT_SUITE_LOG=FILE pytest -p resume_plugin ...

The log gets a line as each test starts and ends. The same command again leaves out the tests in the log, those that
ended and the one that did not. A failed test after which the device answers no more ends the process with exit status
`FAULT`: what would follow in it could only fail. A test that imports a package that is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

FAULT = 77
RANK = {"start": 0, "end": 1, "failed": 2, "fault": 3}
LOG = Path(os.environ.get("D2IT_SUITE_LOG", os.devnull))


def read_log(log: Path) -> dict[str, str]:
    """Test -> "end", "failed", "start" where it did not end, or "fault" where it failed and the device was lost."""
    states: dict[str, str] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        what, _, test = line.partition(" ")
        if RANK[what] >= RANK[states.get(test, "start")]:
            states[test] = what
    return states


def _note(what: str, test: str) -> None:
    with LOG.open("a") as file:
        file.write(f"{what} {test}\n")


def _device_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(trylast=True)  # after the shards are taken
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that an earlier process started."""
    over = read_log(LOG)
    dropped = [item for item in items if item.nodeid in over]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.nodeid not in over]


def _skip_where_absent() -> Generator[None, object, object]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package):  # a module of a package that is there
            raise
        pytest.skip(f"needs {package}, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """Skips a test whose fixtures import a package that is not installed."""
    return (yield from _skip_where_absent())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skips a test that imports a package that is not installed."""
    return (yield from _skip_where_absent())


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes that a test starts."""
    _note("start", nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Notes that a test has ended."""
    _note("end", nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes a failure, and ends the process where it has lost the device."""
    if report.failed:
        _note("failed", report.nodeid)
    if report.failed and _device_lost():
        _note("fault", report.nodeid)
        pytest.exit(f"the device is lost after {report.nodeid}", returncode=FAULT)
