"""The cases of every `*_bench.py` under pytest-benchmark.

    pytest --benchmark-only benchmarks [-k 'window and forward'] [--benchmark-max-time 0.2]

For comparisons across commits with pytest-benchmark's own tools and options. The figures in docs/results.md come from
the scripts themselves, which also check results, rotate inputs and set times against the machine's rates.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import bench
import machine
import pytest
from bench import Bench

pytest.importorskip("pytest_benchmark")

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("*_bench.py"))


def measurements() -> list:
    found = []
    for script in SCRIPTS:
        module = importlib.import_module(script)
        for declared in module.benches() if hasattr(module, "benches") else ():
            for contender in declared.contenders:
                for direction in ("forward", "backward") if declared.backward else ("forward",):
                    name = f"{script.removesuffix('_bench')}-{declared.case}-{contender.replace(' ', '_')}-{direction}"
                    found.append(pytest.param(declared, contender, direction, id=name))
    return found


@functools.lru_cache(maxsize=1)
def enter(case: str) -> None:
    """Each case compiles for its own shapes, and for both directions at once."""
    bench.fresh_compiler()


@pytest.mark.parametrize(("declared", "contender", "direction"), measurements())
def test_speed(benchmark, declared: Bench, contender: str, direction: str) -> None:
    enter(declared.case)
    try:
        run = declared.contenders[contender]()
        inputs = declared.inputs(0)
        call = bench.direction_call(direction, run, inputs, declared.gradients if declared.backward else ())
    except bench.Skip as reason:
        pytest.skip(str(reason))

    def synchronized(call: Callable[[], object]) -> None:
        call()
        machine.synchronize()

    benchmark.group = f"{declared.case} {direction}"
    benchmark.extra_info.update(machine.header(), shape=declared.shape)
    synchronized(call)  # compiles
    benchmark(synchronized, call)
