"""Parametrises the inherited tests of a KernelSuite by what its subclass declares."""

import os

import pytest

from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, INTERPRETED, LAYOUTS, SEEDS, KernelSuite, fast_backends, shape_id


@pytest.fixture
def run(request, monkeypatch):
    """run(file, mutation): from here on, the "cpu" backend is csrc/<file>, the CUDA kernels thread by thread.

    The files are `SOURCES` of the test's module.
    """

    def use(file, mutation=None):
        request.module.SOURCES[file].replace(monkeypatch, mutation)

    return use


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.cls
    if suite is None or not issubclass(suite, KernelSuite):
        return
    names = metafunc.fixturenames
    backends = list(suite.backends or fast_backends(suite.op))
    if "mutation" in names:
        # In the interpreter alone: on a GPU a mutant that reads astray may end the process and the tests behind it.
        found = suite.mutations if "triton" in backends and INTERPRETED else []
        metafunc.parametrize("mutation", [pytest.param(m, id=m.name.replace(" ", "-")) for m in found])
    elif "cpp_mutation" in names:
        file, found = suite.cpp_mutations
        runs = file and cuda_on_cpu.COMPILER and DEVICE == "cpu" and "cpu" in backends
        metafunc.parametrize("cpp_mutation", [None, *found] if runs else [])
    elif "shape" in names:
        # Layouts take turns over the shapes and start elsewhere for each dtype: all combinations occur.
        shapes = suite.corners + (suite.gpu_corners if DEVICE == "cuda" else [])
        if os.environ.get("D2IT_KERNEL_SHAPES") == "small":  # under a sanitizer, which is slow
            shapes = [suite.small]
        cases = [
            pytest.param(
                backend,
                dtype,
                shape,
                LAYOUTS[(i + j) % 4],
                id=f"{backend}-{str(dtype)[6:]}-{shape_id(shape)}",
            )
            for backend in backends
            for j, dtype in enumerate(suite.dtypes(backend))
            for i, shape in enumerate(shapes)
        ]
        metafunc.parametrize(("backend", "dtype", "shape", "layout"), cases)
    elif "seed" in names:
        cases = [
            pytest.param(backend, dtype, seed, id=f"{backend}-{str(dtype)[6:]}-seed{seed}")
            for backend in backends
            for dtype in suite.dtypes(backend)
            for seed in range(SEEDS)
        ]
        metafunc.parametrize(("backend", "dtype", "seed"), cases)
    elif "backend" in names:
        metafunc.parametrize("backend", backends)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that have nothing to run on, and other shards' tests (D2IT_TEST_SHARD="0/4")."""
    shard, _, shards = os.environ.get("D2IT_TEST_SHARD", "0/1").partition("/")
    kept = [item for item in items if "NOTSET" not in item.name][int(shard) :: int(shards)]
    dropped = set(items) - set(kept)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
