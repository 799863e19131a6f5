"""Every fast backend goes through the suite."""

import importlib
from pathlib import Path

from d2it.ops import _dispatch
from tests.kernels.harness import KernelSuite


def suites(cls: type = KernelSuite) -> list[type]:
    return [cls, *(deeper for child in cls.__subclasses__() for deeper in suites(child))]


def test_every_operator_with_a_fast_backend_has_a_suite() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"{__package__}.{path.stem}")
    tested = {suite.op for suite in suites() if "op" in vars(suite)}
    fast = {op for op, backends in _dispatch._BACKENDS.items() if set(backends) != {"reference"}}
    assert fast <= tested
