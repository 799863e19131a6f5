"""One operator on every fast backend, forward and backward, at its smallest shape and at one that people run.

    python benchmarks/smoke.py test_pack_tokens TestPackTokens

The operator is named by its suite in tests/kernels, whose reference in float64 and whose tolerances are used. Prints a
line of JSON for each backend and shape: "op", "backend", "shape", "state", "seconds". Exit status 1 where one is wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

import machine
import pytest
import torch

from tests.kernels.harness import INTERPRETED, KernelSuite, fast_backends, shape_id


def check(suite: KernelSuite, shape: dict, backend: str) -> str:
    """ "right", "skipped: ..." or what is wrong."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    try:
        suite.check(shape, backend, dtype, "plain", repeats=1)
        machine.synchronize()
    except pytest.skip.Exception as reason:
        return f"skipped: {reason}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def main(file: str, name: str) -> int:
    """Checks one suite."""
    suite = getattr(importlib.import_module(f"tests.kernels.{file}"), name)()
    wrong = False
    for backend in suite.backends or fast_backends(suite.op):
        for shape in (suite.small, (suite.gpu_corners or suite.corners)[0] if not INTERPRETED else suite.corners[-1]):
            start = time.monotonic()
            state = check(suite, shape, backend)
            wrong |= not state.startswith(("right", "skipped"))
            row = {"op": suite.op, "backend": backend, "shape": shape_id(shape), "state": state}
            print(json.dumps(row | {"seconds": round(time.monotonic() - start, 1)}), flush=True)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
