"""Test setup that must come before anything imports Triton, and the check that no test leaves anything behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

# Every 700 new objects, as Python has it, a search through those of torch is an eighth of the suite's time.
gc.set_threshold(50_000, 10, 10)

# From numpy 2.4 on, the interpreter's tl.range fails on bounds known at run time.
CAN_INTERPRET = tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)

if not torch.cuda.is_available() and CAN_INTERPRET:
    # Triton reads it when a kernel is defined: from here on its kernels run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Set once in a process by pytest, PyTorch or a library at its first use, and harmless to later tests.
SET_BY_LIBRARIES = {
    *("PYTEST_CURRENT_TEST", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR"),
    *("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"),  # by Inductor, on a GPU
}


def pytest_terminal_summary(terminalreporter) -> None:
    if not torch.cuda.is_available() and not CAN_INTERPRET:
        reason = f"its interpreter needs numpy < 2.4, this is {numpy.__version__}"
        terminalreporter.write_line(f"Triton kernels were NOT tested: {reason}", yellow=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the long tests, so that no process of the suite ends with one while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _registries() -> dict[str, Any]:
    """The registries that d2it fills on import, by name; those of modules that are not imported yet are left out."""
    found: dict[str, Any] = {}
    for module, names in (
        ("d2it.ops._dispatch", ("_BACKENDS", "_MACHINE", "_RUNS", "PREFERENCE")),
        ("d2it.ops._register", ("_IMPLEMENTATIONS", "_TARGETS", "_SELF_CHECKING")),
        ("d2it.kernels.common", ("COMPILE_CASES",)),
    ):
        for name in names:
            if hasattr(sys.modules.get(module), name):
                found[f"{module}.{name}"] = getattr(sys.modules[module], name)
    return found


def _stand_ins() -> set[str]:
    """Modules that a test put into `sys.modules`: made by hand, or from a file of a test's temporary folder."""
    kept = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if module is None or f"{os.sep}pytest-of-" in str(file) or name.startswith("mutated_"):
            kept.add(name)
    return kept


STATE: dict[str, Callable[[], Any]] = {
    "environment variables": lambda: {k: v for k, v in os.environ.items() if k not in SET_BY_LIBRARIES},
    "the working directory": os.getcwd,
    "sys.path": lambda: list(sys.path),
    "modules that stand in for others": _stand_ins,
    "torch's default dtype": torch.get_default_dtype,
    "torch's number of threads": torch.get_num_threads,
    "gradient mode": torch.is_grad_enabled,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "the precision of float32 products": torch.get_float32_matmul_precision,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "the process group": torch.distributed.is_initialized,
    "signal handlers": lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
}


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds every test by its own name, and fails the test that leaves the process other than it found it.

    Without it a test can pass or fail by what ran before it.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - the generator of libraries under test
    random.seed(seed)
    if "d2it.ops._register" in sys.modules:  # what was judged before a test swaps what judges
        sys.modules["d2it.ops._register"]._KNOWN.clear()
    before = {name: read() for name, read in STATE.items()}
    # Imports add to the registries; what is there stays as it is.
    registries = {name: dict.fromkeys(r) if isinstance(r, set) else dict(r) for name, r in _registries().items()}
    optimize_ddp = torch._dynamo.config.optimize_ddp
    yield
    torch._dynamo.config.optimize_ddp = optimize_ddp  # a compiled learner turns it off for its process
    left = [f"{name}: {before[name]} -> {now}" for name, read in STATE.items() if (now := read()) != before[name]]
    for name, registry in _registries().items():
        known = registries.get(name, {})
        now = dict.fromkeys(registry) if isinstance(registry, set) else dict(registry)
        changed = [key for key in known if key not in now or now[key] is not known[key]]
        changed += [key for key in now if key not in known and "mutated" in str(key)]
        left += [f"{name}: {changed}"] if changed else []
    assert not left, f"the test leaves behind {'; '.join(left)}"
