"""The cases of every ``*_bench.py`` under pytest-benchmark.

    pytest --benchmark-only benchmarks [-k 'window and forward'] [--benchmark-max-time 0.2]

For comparisons across commits with pytest-benchmark's own tools and options. The figures in docs/results.md come from
the scripts themselves, which also check results, rotate inputs and set times against the machine's rates.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import common
import pytest

pytest.importorskip("pytest_benchmark")

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("*_bench.py"))


def measurements() -> list:
    found = []
    for script in SCRIPTS:
        module = importlib.import_module(script)
        for bench in module.benches() if hasattr(module, "benches") else ():
            for contender in bench.contenders:
                for direction in ("forward", "backward") if bench.backward else ("forward",):
                    name = f"{script.removesuffix('_bench')}-{bench.case}-{contender.replace(' ', '_')}-{direction}"
                    found.append(pytest.param(bench, contender, direction, id=name))
    return found


@functools.lru_cache(maxsize=1)
def enter(case: str) -> None:
    """Each case compiles for its own shapes, and for both directions at once."""
    common.fresh_compiler()


@pytest.mark.parametrize(("bench", "contender", "direction"), measurements())
def test_speed(benchmark, bench: common.Bench, contender: str, direction: str) -> None:
    enter(bench.case)
    try:
        run = bench.contenders[contender]()
        inputs = bench.inputs(0)
        call = common.direction_call(direction, run, inputs, bench.gradients if bench.backward else ())
    except common.Skip as reason:
        pytest.skip(str(reason))

    def synchronized(call: Callable[[], object]) -> None:
        call()
        common.synchronize()

    benchmark.group = f"{bench.case} {direction}"
    benchmark.extra_info.update(common.header(), shape=bench.shape)
    synchronized(call)  # compiles
    benchmark(synchronized, call)
