"""Launches that skip Triton's look-up reach the kernel that Triton would take, without a GPU: a stub stands for its
driver, kernels are compiled, and what would be launched is recorded."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from d2it.ops._dispatch import HAS_TRITON
from tests.kernels.harness import ROOT

SCRIPT = """
    import json, threading
    from typing import NamedTuple
    import torch, triton, triton.language as tl
    import triton.compiler.compiler as compiler
    from triton.runtime import driver
    from kernel_report.compile import AheadOfTimeDriver
    from d2it.kernels import launch
    from d2it.kernels.rows import constant

    driver.set_active(AheadOfTimeDriver((9, 0)))
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel
        def __call__(self, *args):
            launched.append((self.kernel, args[:4], args[9:]))

    def handles(kernel):
        kernel.module = kernel.function = 1
        kernel._run = Recorder(kernel)

    compiler.CompiledKernel._init_handles = handles
    compiler.CompiledKernel.run = property(lambda kernel: kernel._run or handles(kernel) or kernel._run)
    pretended = [0]  # the GPU that tensors lie on
    launch._is_gpu = lambda device: pretended[0] >= 0

    class Rows(NamedTuple):
        data: torch.Tensor
        stride: int
        ALIGN: tl.constexpr

    class Pair(NamedTuple):
        first: torch.Tensor
        second: torch.Tensor

    @triton.jit
    def add_kernel(pair, rows, other, scale, n, SIZE: tl.constexpr, DOUBLE: tl.constexpr = False):
        o = tl.arange(0, SIZE)
        value = tl.load(rows.data + o * rows.stride * rows.ALIGN, mask=o < n) * scale
        if other is not None:
            value += tl.load(other + o)
        tl.store(pair.first + o, value * 2 if DOUBLE else value)
        tl.store(pair.second + o, value)

    calls = []

    @launch.launcher
    def add(tape, x, other, scale, n, align, size, double, programs, warps):
        calls.append(n)
        out, sums = tape.empty(x.shape, x.dtype), tape.full((2, 64), 1, torch.float32)
        rows = Rows(x.unbind(0)[1] if x.ndim == 2 else x, x.stride(-1), constant(align))
        for i in range(2):
            tape.launch(add_kernel, programs, Pair(out, sums[i]), rows, other, scale, n, SIZE=size, num_warps=warps,
                        **({"DOUBLE": True} if double else {}))
        return out, (sums, None)

    def flat(value, named):
        if isinstance(value, (tuple, list)):
            return [leaf for each in value for leaf in flat(each, named)]
        value = value.data_ptr() if isinstance(value, torch.Tensor) else getattr(value, "value", value)
        for name, tensor in named.items():  # what was allocated lies elsewhere at every call
            if type(value) is int and 0 <= value - tensor.data_ptr() < tensor.nbytes:
                return [(name, value - tensor.data_ptr())]
        return [value]

    def made(args):
        launched.clear()
        out, (sums, nothing) = add(*args)
        assert nothing is None and (sums == 1).all()
        named = {"out": out, "sums": sums}
        results = [(t.dtype, t.shape, t.stride()) for t in named.values()]
        return results, [(kernel, grid, flat(given, named)) for kernel, grid, given in launched]

    x, y = torch.zeros(64), torch.zeros(64)
    wide, long = torch.zeros(2, 80)[:, ::2], torch.zeros(128)
    base = dict(x=x, other=None, scale=0.5, n=16, align=1, size=32, double=False, programs=7, warps=4)
    changes = [{}, {"x": x.double()}, {"x": x.bfloat16()}, {"x": x[1:]}, {"x": x[4:]}, {"x": wide}, {"x": wide[:, 1:]},
               {"x": x[::2]}, {"align": 4}, {"other": x}, {"other": y}, {"other": long[4:68]},
               {"other": long[1:65]}, {"scale": 2.5}, {"scale": 2}, {"n": 1},
               {"n": 17}, {"n": 2**40}, {"n": True}, {"size": 64}, {"double": True}, {"programs": 9}, {"warps": 8},
               {"x": y}, {"x": y, "other": x}]
    first = [made((base | change).values()) for change in changes]
    kept, times = len(launch._KEPT), len(calls)
    second = [made((base | change).values()) for change in changes]
    by_triton = []
    for change in changes:
        launch._KEPT.clear()
        by_triton.append(made((base | change).values()))
    wrong = [str(c) for c, a, b, t in zip(changes, first, second, by_triton) if not a == b == t]
    times_triton = len(calls) - times

    shared = torch.zeros(3, 64)
    rows, other = shared[:2], shared[2]  # a view of rows may be one of other
    ambiguous = [made((base | {"x": rows, "other": other}).values()) for _ in range(2)]
    kept_ambiguous = sum(key[2] == (2, 64) for key in launch._KEPT)

    launch._KEPT.clear()
    results = []
    threads = [threading.Thread(target=lambda: [results.append(add(*base.values())) for _ in range(50)])
               for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]

    pretended[0], before = -1, len(calls)
    add(*base.values())
    add(*base.values())
    print(json.dumps({"wrong": wrong, "kept": kept, "changes": len(changes), "times": times,
                      "times_triton": times_triton, "ambiguous": ambiguous[0] == ambiguous[1],
                      "kept_ambiguous": kept_ambiguous,
                      "results": len({r[0].data_ptr() for r in results}), "in_threads": len(launch._KEPT),
                      "on_cpu": len(calls) - before}))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_kept_launch_is_the_one_that_triton_makes(tmp_path):
    """The same compiled kernels, grids and arguments, whatever changes: dtypes, shapes, strides, alignment, numbers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    (tmp_path / "launches.py").write_text(textwrap.dedent(SCRIPT))  # Triton reads the source of kernels
    made = subprocess.run(
        [sys.executable, tmp_path / "launches.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["wrong"] == []
    # Another tensor of the same kind is no kind of its own: y as x, and three as the other.
    assert result["kept"] == result["times"] == result["changes"] - 4
    assert result["times_triton"] == result["changes"]  # the second round called no launcher
    assert result["ambiguous"]
    assert result["kept_ambiguous"] == 0
    assert result["results"] == 200  # every call has results of its own
    assert result["in_threads"] == 1
    assert result["on_cpu"] == 2  # tensors elsewhere always go through Triton
