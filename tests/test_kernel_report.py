import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import Cost
from kernel_report import record
from kernel_report.budget import Case, Count, excuse, measured, over_tokens, unrolled, verdicts
from kernel_report.compile import nvcc
from kernel_report.flow import executions, natural_loops, outermost
from kernel_report.gpus import PRODUCTS, occupancy
from kernel_report.ptx import Traffic, read_function, split_functions, traffic_by_line, traffic_by_pointer
from kernel_report.sass import read_lines, read_sass
from kernel_report.source import Runs, Statement, find_statement, read_source

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
@pytest.mark.long
@pytest.mark.parametrize(
    ("files", "archs", "heaviest"),
    [("window_*", ["sm_80", "sm_90", "sm_100"], []), ("[!w]*", ["sm_90"], ["sm_80", "sm_100"])],
)
def test_every_triton_kernel_is_lean(files: str, archs: list[str], heaviest: list[str], tmp_path: Path) -> None:
    words = ["--only", files, "--no-cuda", "--arch", *archs]
    words += ["--heaviest", *heaviest] if heaviest else []
    rows = read_rows(tmp_path / "report.json", *words)
    kernels = {name: {row["kernel"] for row in rows if row["arch"] == name} for name in (*archs, *heaviest)}
    assert kernels["sm_90"]
    assert all(kernels[name] == kernels["sm_90"] for name in heaviest)


def test_the_record_has_what_the_compiler_makes(tmp_path: Path) -> None:
    """Of kernels that stand in it unchanged."""
    rows = read_rows(tmp_path / "report.json", "--only", "plan_tokens", "--arch", "sm_90", "--anew")
    assert len({row["key"] for row in rows}) > 4
    known = record.recorded()
    for row in rows:
        figures = known.get(row["key"], {})
        assert {name: row[name] for name in figures} == figures


def test_lines_of_other_code_are_named() -> None:
    line = {"source": "kernels/a.py", "kernel": "a", "config": "C1", "arch": "sm_90", "key": "1"}
    two = line | {"config": "C2", "key": "2"}
    assert record.out_of_date([line, two], [line, two]) == []
    assert record.out_of_date([line], [line, two]) == ["a [C2] sm_90"]
    assert record.out_of_date([line, line | {"key": None}], [line, two]) == []
    assert record.out_of_date([line], [line, two | {"arch": "sm_80"}, two | {"source": "kernels/b.py"}]) == []


def test_a_line_of_the_record_is_of_one_code() -> None:
    class Options:
        def hash(self) -> str:
            return "four warps"

    code = '#loc = loc("k.py":7:0)\n  tt.func @k(%x: !tt.ptr<f32> loc("x"(#loc))) {\n    %c = 3 : i32 loc(#loc)\n  }\n'
    one = record.digest(code, Options(), 90)
    assert record.digest(code.replace("7:0", "8:0").replace("(#loc)", "(#loc1)"), Options(), 90) == one
    assert len({one, record.digest(code.replace("= 3", "= 4"), Options(), 90), record.digest(code, Options(), 80)}) == 3


def test_every_cuda_kernel_is_lean_on_every_architecture(tmp_path: Path) -> None:
    """As the library has them that is shipped."""
    if _native.why_not("neighbor_copy", "cuda"):
        pytest.skip("built without nvcc")
    archs = ["sm_80", "sm_90", "sm_100"]
    rows = read_rows(tmp_path / "report.json", "--only", "*_cuda", "--arch", *archs, "--library", str(LIBRARY))
    assert {row["source"] for row in rows} == {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu")}
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
    # The compiler may assume what the launcher's address and stride allow.
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
    ("arch", "registers", "threads", "shared", "share"),
    [
        ("sm_90", 32, 256, 0, 1.0),  # 8 blocks of 8 warps
        ("sm_90", 128, 128, 0, 0.25),  # 16 warps of 4096 registers
        ("sm_90", 40, 128, 0, 0.75),  # 1280 registers a warp: 51 warps, in blocks of 4
        ("sm_90", 32, 128, 100 * 1024, 0.125),  # 2 blocks by shared memory
        ("sm_90", 16, 32, 0, 0.5),  # 32 blocks of 1 warp
        ("sm_90", 255, 1024, 0, 0.0),  # not a single block
        ("sm_120", 32, 256, 0, 1.0),  # 6 blocks of 8 warps
        ("sm_120", 128, 128, 0, 1 / 3),  # 16 warps of 4096 registers
        ("sm_120", 32, 128, 48 * 1024, 1 / 6),  # 2 blocks by shared memory
        ("sm_120", 16, 32, 0, 0.5),  # 24 blocks of 1 warp
    ],
)
def test_occupancy(arch: str, registers: int, threads: int, shared: int, share: float) -> None:
    assert occupancy(arch, registers, threads, shared) == pytest.approx(share)


def test_finds_loops_and_how_often_their_blocks_run() -> None:
    # 1 is a loop around the loop 2-3 and the branch 4 | 5; 7 is reached by nothing; 8 and 9 have two ways in.
    graph = [{1}, {2, 6}, {3}, {2, 4}, {5, 1}, {1}, {8, 9}, {1}, {9}, {8}]
    loops = natural_loops(graph)
    assert [(loop.header, sorted(loop.blocks)) for loop in loops] == [(1, [1, 2, 3, 4, 5]), (2, [2, 3])]
    assert outermost(loops) == loops[:1]
    assert executions(graph, loops, [10.0, 2.5]) == [1, 10, 25, 25, 10, 10, 1, 0, 1, 1]


SASS = """
		Function : k
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000e300000000800 */
        /*0010*/              @!P0 BRA 0x00b0 ;                  /* 0x0 */
        /*0020*/                   LDS.128 R4, [R2] ;            /* 0x0 */
        /*0030*/                   LDSM.16.MT88.4 R8, [R3] ;     /* 0x0 */
        /*0040*/                   BRA.DIV UR4, 0x0e0 ;          /* 0x0 */
        /*0050*/                   STS.U16 [R2], R4 ;            /* 0x0 */
        /*0060*/               @P1 BRA 0x0050 ;                  /* 0x0 */
        /*0070*/              @!P2 BRA 0x00a0 ;                  /* 0x0 */
        /*0080*/                   MOV R20, 0x0 ;                /* 0x0 */
        /*0090*/                   CALL.ABS.NOINC R20 ;          /* 0x0 */
        /*00a0*/                   BRA.U UP0, 0x0020 ;           /* 0x0 */
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R4 ; /* 0x0 */
        /*00c0*/                   EXIT ;                        /* 0x0 */
        /*00d0*/                   NOP ;                         /* 0x0 */
        /*00e0*/                   WARPSYNC.COLLECTIVE R3, 0x0f0 ; /* 0x0 */
        /*00f0*/                   BRA 0x0050 ;                  /* 0x0 */
"""


UNROLLED = """
		Function : k
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0010*/                   LDG.E R5, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E R6, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   LDG.E R7, desc[UR4][R2.64] ;  /* 0x0 */
        /*0040*/               @P1 BRA 0x0000 ;                  /* 0x0 */
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0060*/               @P1 BRA 0x0050 ;                  /* 0x0 */
        /*0070*/                   EXIT ;                        /* 0x0 */
"""


def test_counts_what_machine_code_issues() -> None:
    (code,) = read_sass(SASS).values()
    assert len(code.loops) == 2
    # Outside: LDC, BRA, STG, EXIT. Outer loop: LDS, LDSM, BRA.DIV, BRA at 70, BRA.U. Inner: STS, BRA.
    # Never counted: the call of a failed assertion, lanes that came apart, what follows the end.
    assert code.issued([10.0, 3.0]) == (4 + 10 * (5 + 3 * 2), 10 * (512 + 512 + 3 * 64))
    assert code.issued([0.0, 3.0]) == (4, 0)


def test_a_loop_that_the_assembler_unrolled_is_found() -> None:
    (code,) = read_sass(UNROLLED).values()
    assert code.accesses() == [4, 1]
    assert unrolled("k", [11.0], [1], code) == [2, 3]  # two of four copies, and three that are left
    assert unrolled("k", [2.0, 3.0], [4, 1], code) == [2, 3]
    with pytest.raises(ValueError, match="k: 2 loops of machine code do not match the 1 of its PTX"):
        unrolled("k", [10.0], [3], code)


def test_addresses_are_followed_to_their_pointers() -> None:
    ptx = """
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u64 k_param_2, .param .u64 k_param_3)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	ld.param.b64 	%rd3, [k_param_2];
	ld.param.b64 	%rd9, [k_param_3];
	mul.lo.s64 	%rd4, %rd9, 4;
	add.s64 	%rd5, %rd1, %rd4;
	selp.b64 	%rd6, %rd2, %rd3, %p1;
$L__BB0_1:
	ld.global.v4.b32 	{%r1, %r2, %r3, %r4}, [%rd5];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r9;
	st.shared.v2.b64 	[%r6], {%rd7, %rd3};
	ld.shared.b64 	%rd8, [%r7];
	@%p2 bra 	$L__BB0_1;
	st.global.b16 	[%rd8], %rs1;
	ret;
}
"""
    ((_, statements),) = split_functions(ptx).items()
    moved = traffic_by_pointer(statements, [5.0], {(0, 0), (1, 0), (2, 0)})
    first, either, third = frozenset({(0, 0)}), frozenset({(1, 0), (2, 0)}), frozenset({(2, 0)})
    assert moved == {first: Traffic(80, 0), either: Traffic(80, 0), third: Traffic(0, 2)}
    with pytest.raises(ValueError, match="comes from no pointer"):
        traffic_by_pointer(statements, [5.0], {(0, 0)})


def test_pointers_in_structures_are_found_through_registers() -> None:
    ptx = """
.visible .entry k(.param .align 8 .b8 k_param_0[64], .param .align 8 .b8 k_param_1[32])
{
	mov.b64 	%rd1, k_param_0;
	mov.u64 	%rd2, %rd1;
	add.s64 	%rd3, %rd2, 40;
	ld.param.u64 	%rd4, [%rd3+-40];
	ld.param.u64 	%rd5, [%rd3+-8];
	ld.param.u64 	%rd6, [k_param_1+8];
	add.s64 	%rd7, %rd4, %rd5;
	ld.global.nc.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd7];
	st.global.u32 	[%rd6], %r1;
	ret;
}
"""
    ((_, statements),) = split_functions(ptx).items()
    image, out = frozenset({(0, 0)}), frozenset({(1, 8)})
    moved = traffic_by_pointer(statements, [], {(0, 0), (1, 8)})
    assert moved == {image: Traffic(16, 0), out: Traffic(0, 4)}


SOURCE = """
__device__ inline int twice(int x) { // a for (comment
  return x + x;
}
__global__ void k(int n) {
#pragma unroll 1
  for (int i = 0; i < n;
       ++i) {
    if (i % 2) {
      a[i] = twice(i);
    } else {
      b[i] = 1;
    }
  }
  c[0] = twice(n);
  if (!n) {
    c[1] = 1;
  } else if (n) {
    c[1] = 2;
    c[2] = 2;
  }
}
"""

LINES = """
	//## File "/src/k.cu", line 7
        /*0000*/                   ISETP.GE.AND P0, PT, R1, c[0x0][0x210], PT ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
	//## File "/src/k.cu", line 3 inlined at "/src/k.cu", line 10
	//## File "/src/k.cu", line 10
        /*0020*/                   IMAD.SHL.U32 R2, R2, 0x2, RZ ;
        /*0030*/                   STS.64 [R3], R2 ;
	//## File "/src/k.cu", line 12
        /*0040*/                   STS [R3], R2 ;
	//## File "/src/k.cu", line 7
        /*0050*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
	//## File "/src/k.cu", line 3 inlined at "/src/k.cu", line 15
	//## File "/src/k.cu", line 15
        /*0060*/                   IMAD.SHL.U32 R2, R2, 0x2, RZ ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_instructions_run_as_often_as_their_lines(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(SOURCE)
    files = read_source(tmp_path / "k.cu")
    assert find_statement(files, "for (int i = 0; i < n; ++i) {") == Statement("k.cu", 7, 13, loop=True)
    assert find_statement(files, "if (i % 2) {") == Statement("k.cu", 9, 10, loop=False)
    assert find_statement(files, "} else {") == Statement("k.cu", 11, 12, loop=False)
    assert find_statement(files, "} else if (n) {") == Statement("k.cu", 18, 20, loop=False)
    assert find_statement(files, "c[0] =") == Statement("k.cu", 15, 15, loop=False)
    for text in ("for (comment", "= twice("):
        with pytest.raises(ValueError, match="times in k"):
            find_statement(files, text)
    code = read_lines(LINES)
    stated = {"for (int i = 0; i < n;": 8.0, "if (i % 2) {": 0.25}
    # Line 7 runs 8 times and twice before the loop, lines 3 and 10 twice, line 12 8 times; behind the loop line 3 comes
    # from another call.
    assert code.issued_by_line(Runs(files, stated)) == (8 + 2 + 2 * 2 + 8 + 2, 2 * 256 + 8 * 128)
    # What comes from line 3 by line 15 half as often.
    assert code.issued_by_line(Runs(files, stated | {"c[0] = => int twice(": 0.5}))[0] == 8 + 2 + 2 * 2 + 8 + 1
    with pytest.raises(ValueError, match="has no trips"):
        code.issued_by_line(Runs(files, {"if (i % 2) {": 0.25}))


def test_traffic_follows_lines_and_indexed_structures(tmp_path: Path) -> None:
    ptx = """
.entry k(.param .align 8 .b8 k_param_0[96], .param .u64 k_param_1)
{
	.loc	1 7 3
	mov.b64 	%rd1, k_param_0;
	ld.param.b64 	%rd2, [k_param_1];
	mov.b64 	%rd3, %rd1;
$L__BB0_1:
	.loc	1 10 5
	ld.param.b64 	%rd4, [%rd3];
	.loc	1 3 3, function_name $L__info_string0, inlined_at 1 10 5
	ld.global.v4.b32 	{%r1, %r2, %r3, %r4}, [%rd4];
	.loc	1 0 3
	add.s64 	%rd3, %rd3, 48;
	.loc	1 7 3
	@%p1 bra 	$L__BB0_1;
	.loc	1 15 3
	st.global.b32 	[%rd2], %r1;
	ret;
}
	.file	1 "/src/k.cu"
"""
    (tmp_path / "k.cu").write_text(SOURCE)
    runs = Runs(read_source(tmp_path / "k.cu"), {"for (int i = 0; i < n;": 8.0, "if (i % 2) {": 0.25})
    either, out = frozenset({(0, 0), (0, 48)}), frozenset({(1, 0)})
    assert traffic_by_line(ptx, runs.of, {(0, 0), (0, 48), (1, 0)}) == {either: Traffic(2 * 16, 0), out: Traffic(0, 4)}


COPY = """
import json
import torch, triton, triton.language as tl
from kernel_report.budget import count
from kernel_report.compile import AheadOfTimeDriver, compile_instead_of_launching

@triton.jit
def copy_kernel(y, x, n, N: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * n * N + tl.arange(0, N)
    for i in tl.range(0, n):
        tl.store(y + i * N + o, tl.load(x + i * N + o) * 2.0)

launches = compile_instead_of_launching()
triton.runtime.driver.set_active(AheadOfTimeDriver((9, 0)))
x, y = (torch.empty(7 * 10 * 1024, device="meta") for _ in range(2))
copy_kernel[(7,)](y, x, 10, N=1024, num_warps=4)
found = [count(launches[0], lambda launch: [trips], "sm_90").__dict__ for trips in (10.0, 11.0, 20.0)]
found.append(count(launches[0], lambda launch: [10.0], "sm_90", ("copy_kernel.x",)).__dict__)
try:
    count(launches[0], lambda launch: [10.0, 1.0], "sm_90")
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_counts_a_known_kernel(tmp_path: Path) -> None:
    """7 programs of 4 warps double 10 x 1,024 numbers each."""
    (tmp_path / "copying.py").write_text(COPY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    environment.pop("TRITON_INTERPRET", None)
    made = subprocess.run(
        [sys.executable, str(tmp_path / "copying.py")], env=environment, capture_output=True, text=True, check=True
    )
    ten, eleven, twenty, without_x, error = json.loads(made.stdout)
    size = 7 * 10 * 1024 * 4
    assert ten["bytes"] == ten["l2_bytes"] == 2 * size
    assert twenty["l2_bytes"] == 4 * size
    assert twenty["bytes"] == 2 * size  # no more than the tensors have
    assert without_x["bytes"] == size
    # 8 numbers a lane are two loads, eight products and two stores; the rest steps and ends the loop, of which the
    # assembler makes one of four copies and one for the rest: 11 trips are 2 of the one and 3 of the other.
    assert 13 <= (eleven["instructions"] - ten["instructions"]) / (7 * 4) <= 30
    assert 8 * 13 <= (twenty["instructions"] - ten["instructions"]) / (7 * 4) <= 10 * 30
    assert ten["warps"] == pytest.approx(7 * 4 / 132)
    assert error == "copy_kernel has 1 loops, but trips are stated for 2"


def budget_row(size: float, instructions: float, warps: float) -> dict:
    """The verdict on a launch whose floor is 1 GB and whose goal is half of that speed."""
    case = Case("op", "case", "forward", Cost(10**9), lambda: None, {}, share=0.5)
    rows = verdicts(case, [Count("k", size, size, instructions, 0.0, warps)], PRODUCTS["H200"])
    assert [row["kernel"] for row in rows] == ["k", "all"]
    return rows[1]


def test_a_budget_is_bytes_and_instructions_at_what_the_warps_can_issue() -> None:
    goal_ms = 2 * 10**9 / 4.3e12 * 1e3
    slots = 132 * 1.755e6 * goal_ms
    row = budget_row(1.9e9, 2.4 * slots, 32)
    assert row["ok"]
    assert row["goal_ms"] == pytest.approx(goal_ms)
    assert row["ipc_needed"] == pytest.approx(2.4)
    assert not budget_row(2.1e9, 2.4 * slots, 32)["ok"]
    assert not budget_row(1.9e9, 2.6 * slots, 32)["ok"]
    assert not budget_row(1.9e9, 2.4 * slots, 11)["ok"]
    assert budget_row(1.9e9, 1.4 * slots, 11)["ok"]
    assert excuse("no such operator") is None


def test_time_that_does_not_follow_tokens_is_found() -> None:
    def row(case: str, ms: float, kernel: str = "all") -> dict:
        return {"case": case, "kernel": kernel, "predicted_ms": ms}

    rows = [row("op n16-fill1-x", 8.0), row("op n16-fill0.25-x", 3.0), row("op n16-fill0.25-x", 1.0, "k")]
    assert list(over_tokens(rows)) == [("op n16-fill0.25-x", 1.5)]
    assert not list(over_tokens([row("op n16-fill0.5-x", 3.0)]))


def test_a_budget_finds_what_was_measured() -> None:
    case = Case("op", "case", "forward", Cost(1), lambda: None, {}, share=0.5)
    row = {"case": "case", "direction": "forward", "contender": "d2it triton", "ms": 2.0, "correct": True}
    assert measured(case, {"op": {"rows": [row, {**row, "ms": 1.0, "correct": False}]}}) == 2.0
    assert measured(case, {}) is None


@pytest.mark.long
def test_every_kernel_meets_its_budget_or_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    code, output = run("--budget", "--json", str(file))
    assert code == 0, output
    rows = json.loads(file.read_text())
    fields = {"kernel", "case", "arch", "bytes", "floor_bytes", "instructions", "ipc_needed", "goal_ms", "ok"}
    assert all(fields <= row.keys() for row in rows)
    assert {row["case"].split()[0] for row in rows} >= {"window_attention", "adaln_modulate", "plan_tokens"}
    if nvcc():
        assert any(row["case"].endswith("CUDA") for row in rows)
    for row in rows:
        # A kernel that reads and writes less than its operator's tensors leaves something out, or the count does.
        assert row["kernel"] != "all" or row["bytes"] >= 0.99 * row["floor_bytes"], row
