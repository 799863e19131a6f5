import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_report.gpus import occupancy
from kernel_report.ptx import read_function, split_functions

from d2it.ops import _native

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


LIBRARY = ROOT / "d2it" / "_C.abi3.so"
FIELDS = {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "load_bits", "store_bits"}


def read_rows(file: Path, *words: str) -> list[dict]:
    """The rows of a report that finds no problem."""
    code, output = run(*words, "--json", str(file))
    assert code == 0, output
    rows = json.loads(file.read_text())
    assert all(row.keys() >= FIELDS for row in rows)
    return rows


# Window attention chooses its kernels by the architecture, so every case is compiled for each. Of the others, which
# take minutes more, on sm_80 and sm_100 the case of each kernel that is nearest to spilling.
@pytest.mark.parametrize(
    ("files", "arch", "heaviest"),
    [
        ("window_*", "sm_80", []),
        ("window_*", "sm_90", []),
        ("window_*", "sm_100", []),
        ("[!w]*", "sm_90", ["sm_80", "sm_100"]),
    ],
)
def test_every_shipped_kernel_is_lean(files: str, arch: str, heaviest: list[str], tmp_path: Path) -> None:
    words = ["--only", files, "--arch", arch]
    words += ["--heaviest", *heaviest] if heaviest else []
    words += [] if _native.why_not("neighbor_copy", "cuda") else ["--library", str(LIBRARY)]
    rows = read_rows(tmp_path / "report.json", *words)
    of_triton = [row for row in rows if row["source"].startswith("kernels/")]
    kernels = {name: {row["kernel"] for row in of_triton if row["arch"] == name} for name in (arch, *heaviest)}
    assert kernels[arch]
    assert all(kernels[name] == kernels[arch] for name in heaviest)


def test_every_cuda_kernel_is_lean_on_every_architecture(tmp_path: Path) -> None:
    """As the library has them that is shipped."""
    if _native.why_not("neighbor_copy", "cuda"):
        pytest.skip("built without nvcc")
    archs = ["sm_80", "sm_90", "sm_100"]
    rows = read_rows(tmp_path / "report.json", "--only", "*_cuda", "--arch", *archs, "--library", str(LIBRARY))
    kernels = {arch: {(row["kernel"], row["config"]) for row in rows if row["arch"] == arch} for arch in archs}
    assert len(kernels["sm_90"]) > 50
    assert kernels["sm_80"] == kernels["sm_90"] == kernels["sm_100"]


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


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid 128
{
	.reg .pred 	%p<5>;
	ld.param.b64 	%rd1, [k_param_0];
	// begin inline asm
	mov.u16 %rs1, 0x0;
	@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
	// end inline asm
	@%p2 bra 	$L__BB0_2;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	// begin inline asm
	@%p3 ld.global.L1::evict_first.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	// end inline asm
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
	ld.global.f32 %f1, [%rd1+4];
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1, %r2 }, { %r3 }, { %r4 }, { %r5 };
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
	}
	@%p4 bra 	$L__BB0_3;
	@%p2 bra 	$L__BB0_1;
$L__BB0_2:
	.loc	1 20 5                          // sums.py:20:5
	@%p1 st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
	red.global.add.f32 [%rd1], %f1;
	ret;
$L__BB0_3:
	st.local.b32 [%rd2], %r1;
	bra.uni 	$L__BB0_2;
}
"""


def test_reads_what_a_kernel_does() -> None:
    ((name, statements),) = split_functions(PTX).items()
    read = read_function(statements)
    assert name == "k"
    assert read["main_loop"]
    # The 2 bytes before the loop are not the loop's; what waits, and what is laid out behind, is no loop that loads.
    assert read["load_bytes_by_bits"] == {"32": 4, "128": 32}
    assert (read["load_bits"], read["store_bits"]) == (128, 64)
    assert read["narrow_load_share"] == pytest.approx(0.111)
    assert read["tensor_core"] == {"mma.sync": 1}
    assert read["atomics"] == 1


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
    assert occupancy("sm_90", registers, threads, shared) == pytest.approx(share)
