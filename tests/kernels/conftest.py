"""Parametrises the inherited tests of a KernelSuite by what its subclass declares."""

import os

import pytest

from tests.kernels.harness import DEVICE, LAYOUTS, SEEDS, KernelSuite, dtypes, fast_backends, shape_id


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.cls
    if suite is None or not issubclass(suite, KernelSuite):
        return
    names = metafunc.fixturenames
    backends = fast_backends(suite.op)
    if "mutation" in names:
        found = suite.mutations if "triton" in backends else []
        metafunc.parametrize("mutation", [pytest.param(m, id=m.name.replace(" ", "-")) for m in found])
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
            for j, dtype in enumerate(dtypes(backend))
            for i, shape in enumerate(shapes)
        ]
        metafunc.parametrize(("backend", "dtype", "shape", "layout"), cases)
    elif "seed" in names:
        cases = [
            pytest.param(backend, dtype, seed, id=f"{backend}-{str(dtype)[6:]}-seed{seed}")
            for backend in backends
            for dtype in dtypes(backend)
            for seed in range(SEEDS)
        ]
        metafunc.parametrize(("backend", "dtype", "seed"), cases)
    elif "backend" in names:
        metafunc.parametrize("backend", backends)
