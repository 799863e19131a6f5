import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_report

ROOT = Path(__file__).resolve().parents[1]

KERNELS = """
import torch, triton, triton.language as tl
from d2it.kernels.common import compile_cases

@triton.jit
def running_sums_kernel(x, y, n, stride, N: tl.constexpr):
    o = tl.arange(0, N)
    total, a, b = tl.zeros((N,), tl.float32), tl.load(x + o), tl.load(x + N + o)
    for i in tl.range(0, n):
        v = tl.load(x + i.to(tl.int64) * stride + o)
        total += v * a
        a, b = b * v, total + a
    tl.store(y + o, total)
    tl.store(y + N + o, a)
    tl.store(y + 2 * N + o, b)

@triton.jit
def forgotten_kernel(x):
    tl.store(x, 1.0)

@compile_cases
def cases():
    x = torch.empty(1 << 20, device="meta")
    yield "spills", lambda: running_sums_kernel[(1,)](x, x, 10, 2048, N=2048, num_warps=4, maxnreg=32)
    yield "misaligned", lambda: running_sums_kernel[(1,)](x[1:], x, 10, 1024, N=512, num_warps=4)
    yield "odd-stride", lambda: running_sums_kernel[(1,)](x, x, 10, 1000 + 1, N=512, num_warps=4)
    yield "lean", lambda: running_sums_kernel[(1,)](x, x, 10, 1024, N=512, num_warps=4)
"""


def run(*arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "benchmarks/kernel_report.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return made.returncode, made.stdout + made.stderr


def test_every_shipped_kernel_is_lean_on_sm_90(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code, output = run("--arch", "sm_90", "--json", str(file))
    assert code == 0, output
    rows = json.loads(file.read_text())
    fields = {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "load_bits", "store_bits"}
    assert rows
    assert all(fields <= row.keys() and row["arch"] == "sm_90" for row in rows)
    assert {row["kernel"] for row in rows} >= {"relative_position_bias_fwd_kernel", "relative_position_bias_bwd_kernel"}


def test_notices_spills_narrow_loads_and_kernels_without_a_case(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text(KERNELS)
    file = tmp_path / "report.json"
    code, output = run("--arch", "sm_90", "--kernels", str(tmp_path), "--json", str(file))
    assert code == 1, output
    rows = {row["config"]: row for row in json.loads(file.read_text())}
    assert rows["spills"]["spill_bytes"] > 0
    assert rows["spills"]["problems"][0].startswith("spill")
    # The launcher's address and stride say what the compiler may assume.
    for config in ("misaligned", "odd-stride"):
        assert rows[config]["load_bits"] == 32
        assert rows[config]["problems"][0].startswith("narrow load")
    assert rows["lean"]["load_bits"] == rows["lean"]["store_bits"] == 128
    assert rows["lean"]["main_loop"]
    assert not rows["lean"]["problems"]
    assert "forgotten_kernel: no compile case launches it" in output


SASS = """
.text.k:
        /*0000*/                   LDG.E.U16 R2, desc[UR4][R6.64] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R6.64] ;
        /*0030*/                   LDG.E R8, desc[UR4][R10.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   STG.E.64 desc[UR4][R6.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   STL.64 [R1], R4 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_reads_machine_code() -> None:
    ((name, lines),) = kernel_report.split_functions(SASS).items()
    read = kernel_report.read_function(lines)
    assert name == "k"
    assert read["main_loop"]
    # The 2 bytes before the loop are not the loop's; the closing self-branch and the block laid out behind are none.
    assert read["load_bytes_by_bits"] == {"32": 4, "128": 16}
    assert (read["load_bits"], read["store_bits"]) == (128, 64)
    assert read["narrow_load_share"] == pytest.approx(0.2)
    assert read["tensor_core"] == {"HMMA": 1}
    assert read["local_accesses"] == 1


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "share"),
    [
        (32, 256, 0, 1.0),  # 8 blocks of 8 warps
        (128, 128, 0, 0.25),  # 16 warps of 4096 registers
        (40, 128, 0, 0.75),  # 1280 registers a warp: 51 warps, in blocks of 4
        (32, 128, 100 * 1024, 0.125),  # 2 blocks by shared memory
        (16, 32, 0, 0.5),  # 32 blocks of 1 warp
        (255, 1024, 0, 0.0),  # not a single block
    ],
)
def test_occupancy_on_sm_90(registers: int, threads: int, shared: int, share: float) -> None:
    assert kernel_report.occupancy("sm_90", registers, threads, shared) == pytest.approx(share)
