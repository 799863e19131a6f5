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
    import json, sys
    from typing import NamedTuple
    import torch, triton, triton.language as tl
    import triton.compiler.compiler as compiler
    from triton.runtime import driver
    from kernel_report.compile import AheadOfTimeDriver
    from d2it.kernels import common
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
    common._is_gpu = lambda device: pretended[0] >= 0

    class Rows(NamedTuple):
        data: torch.Tensor
        stride: int
        ALIGN: tl.constexpr

    @triton.jit
    def add_kernel(out, rows, other, scale, n, SIZE: tl.constexpr, DOUBLE: tl.constexpr = False):
        o = tl.arange(0, SIZE)
        value = tl.load(rows.data + o * rows.stride * rows.ALIGN, mask=o < n) * scale
        if other is not None:
            value += tl.load(other + o)
        tl.store(out + o, value * 2 if DOUBLE else value)

    def flat(value):
        return [leaf for each in value for leaf in flat(each)] if isinstance(value, (tuple, list)) else [
            value.data_ptr() if isinstance(value, torch.Tensor) else getattr(value, "value", value)]

    x, y = torch.zeros(64), torch.zeros(64)
    base = dict(out=y, data=x, stride=3, align=1, other=None, scale=0.5, n=16, SIZE=32, DOUBLE=False, programs=7)
    changes = [{}, {"out": y.double()}, {"data": x.bfloat16()}, {"out": y[1:]}, {"data": x[1:]}, {"data": x[4:]},
               {"stride": 1}, {"stride": 16}, {"stride": 2**40}, {"align": 4}, {"other": x}, {"scale": 2.5},
               {"scale": 2}, {"n": 1}, {"n": 17}, {"n": True}, {"SIZE": 64}, {"DOUBLE": True}, {"programs": 9},
               {"num_warps": 8}]
    wrong = []
    for change in changes * 2:  # compiled, then kept
        a = base | change
        options = {k: v for k, v in a.items() if k in ("SIZE", "DOUBLE", "num_warps")}
        args = (a["out"], Rows(a["data"], a["stride"], constant(a["align"])), a["other"], a["scale"], a["n"])
        add_kernel[(a["programs"],)](*args, **options)
        common.launch(add_kernel, a["programs"], *args, **options)
        (kernel, grid, given), (other, other_grid, other_given) = launched[-2:]
        if kernel is not other or grid != other_grid or flat(given) != flat(other_given):
            wrong.append(str(change))
    kept = len(common._KEPT)
    looked_up = []
    add_kernel.run = lambda *a, **k: looked_up.append(a)
    common.launch(add_kernel, 7, y, Rows(x, 3, constant(1)), None, 9.5, 16, SIZE=32, DOUBLE=False)
    again = len(looked_up)
    pretended[0] = -1
    common.launch(add_kernel, 7, y, Rows(x, 3, constant(1)), None, 9.5, 16, SIZE=32, DOUBLE=False)
    print(json.dumps({"wrong": wrong, "kept": kept, "again": again, "on_cpu": len(looked_up) - again,
                      "launched": len(launched)}))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_kept_launch_is_the_one_that_triton_makes(tmp_path):
    """The same compiled kernel, grid and arguments, whatever changes: dtypes, alignment, integers, numbers, options."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    (tmp_path / "launches.py").write_text(textwrap.dedent(SCRIPT))  # Triton reads the source of kernels
    made = subprocess.run(
        [sys.executable, tmp_path / "launches.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["wrong"] == []
    # 20 calls, of which two differ in the value of a number or in the grid alone, and one has the alignment of another.
    assert result["kept"] == 17
    assert result["again"] == 0  # Triton was not asked
    assert result["on_cpu"] == 1  # tensors elsewhere always go through Triton
