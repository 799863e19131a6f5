"""The benchmarks of whole models: packed and masked agree, wrong ones get no speed-up, every line is there."""

from __future__ import annotations

import dataclasses
import functools

import goals
import models
import pytest
import results
import sample_bench
import step_parts
import timing
import torch
import train_bench
from bench import Skip
from rows import load
from torch._inductor import cpp_builder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks run themselves")


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Every call is made once and takes a millisecond."""

    def timed(calls, *args, **kwargs):
        calls[0]()
        return timing.Timing(1.0, 1.0, 1.0, 1, "wall clock")

    monkeypatch.setattr(timing, "time_calls", timed)
    monkeypatch.setattr(timing, "time_in_turns", lambda contenders, *args: [timed(calls) for calls in contenders])
    rates = {"copy_gbps": 1.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 2.0}}
    monkeypatch.setattr(timing, "machine_rates", lambda: rates)


def options(script, *words):
    made = script.arguments() if script is train_bench else models.size_arguments(script.__doc__)
    return made.parse_args(["--batch-size", "1", *words])


@pytest.mark.long
def test_a_training_step(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "S", ("tiny", "DiT-S/2"))
    chosen = options(train_bench, "--image-size", "64", "--budgets", "--out", str(tmp_path))
    assert models.main("train", chosen, train_bench.cases) == 0
    rows = {row["contender"]: row for row in load(tmp_path)["train"]["rows"]}
    measured = {"d2it packed eager", "masked eager", "dit eager", "mlp eager"}
    measured |= {f"part: {name}" for name in ("dense blocks", "RefineNet", "optimiser", "loader")}
    assert {name for name, row in rows.items() if "ms" in row} == measured
    assert rows["d2it packed compiled"]["skipped"].startswith("compiling takes minutes")
    assert rows["d2it packed eager"]["correct"]
    assert 0 < rows["d2it packed eager"]["error"] < 1e-4  # not the same code, the same gradients
    assert rows["d2it packed eager"]["flops"] < rows["masked eager"]["flops"]
    assert "correct" not in rows["dit eager"]
    assert rows["mlp eager"]["correct"]
    parts = [rows[f"part: {name}"] for name in ("dense blocks", "RefineNet", "optimiser")]
    whole = rows["d2it packed eager"]
    for key in ("predicted_ms", "counted_bytes", "counted_floor"):
        assert 0 < sum(row[key] for row in parts) < whole[key]
    for row in (whole, *parts[:2]):
        assert len(row["kernels"]) == models.KERNELS
        assert row["kernels"][0]["ms"] >= row["kernels"][-1]["ms"] > 0
    assert any("window_attention" in kernel["name"] for kernel in whole["kernels"] + parts[1]["kernels"])
    for row in (whole, rows["dit eager"]):
        assert {"attention", "MLP", "modulation", "optimiser", "other"} == row["parts"].keys()
        assert all(part["ms"] > 0 for part in row["parts"].values())
    assert "parts" not in rows["masked eager"]
    for form in ("plain", "sdpa-attention"):
        assert rows[f"d2it packed {form} compiled"]["skipped"].startswith("compiling takes minutes")
    (some,) = models.each_dtype(chosen, "tiny")
    assert train_bench.stage(some, "tiny", attention="sdpa").network.config.attention == "sdpa"
    packed = list(goals.packed_against_masked({"train": {"rows": list(rows.values())}}))
    assert packed == [(1.0, rows["masked eager"]["case"])]


def has_bfloat16(monkeypatch, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": there})


@pytest.mark.parametrize("script", [train_bench, sample_bench])
def test_float32_stands_beside_what_auto_takes(script, monkeypatch):
    """Both dtypes in one run, each against its own rivals and its own rate, where a CPU has both."""
    monkeypatch.setitem(models.SIZES, "S", ("D2iT-S", "DiT-S/2"))
    monkeypatch.setattr(models, "profiled", lambda *_: {})
    chosen = options(script, "--image-size", "128", "--model", "S", "--budgets")
    steps = {}
    for there in (False, True):
        has_bfloat16(monkeypatch, there)
        found = [case for case in script.cases(chosen) if case.direction != "mlp" and not case.shape.get("guided")]
        steps[there] = {case.dtype: case for case in found}
        assert len(steps[there]) == len(found)
    assert [*steps[False]] == [torch.float32]
    assert [*steps[True]] == [torch.bfloat16, torch.float32]  # what auto takes comes first
    assert steps[False][torch.float32].shape == steps[True][torch.bfloat16].shape
    rows = []
    for dtype, case in steps[True].items():
        assert case.name.endswith(str(dtype)[6:])
        assert case.shape.get("precision") == (None if dtype == torch.bfloat16 else "float32")
        contenders = {name: case.contenders[name] for name in ("d2it packed eager", "masked eager")}
        assert "dit eager" in case.contenders
        rows += models.run_case(dataclasses.replace(case, contenders=contenders), None)
    rounded, exact = (row for row in rows if row["contender"] == "d2it packed eager")
    assert (rounded["dtype"], exact["dtype"]) == ("bfloat16", "float32")
    assert rounded["correct"]
    assert exact["correct"]
    assert exact["error"] < 1e-4 < 1e-3 < rounded["error"]  # each computed in what its name says
    assert rounded["floor_ms"] == pytest.approx(exact["floor_ms"] / 2)
    assert models.note(rows, rounded) == models.note(rows, exact) == "1.00x masked eager"
    (line,) = results.headlines({"model": {"operator": "model", "rows": rows}})
    assert line.row is rounded


def test_rates_are_those_of_the_dtypes_that_a_cpu_multiplies(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(timing, "time_calls", lambda calls, **_: [calls[0](), timing.Timing(1.0, 1.0, 1.0, 1, "")][1])
    for there, dtypes in ((False, ["float32"]), (True, ["bfloat16", "float32"])):
        has_bfloat16(monkeypatch, there)
        timing.machine_rates.cache_clear()
        assert [*timing.machine_rates()["matmul_tflops"]] == dtypes
    timing.machine_rates.cache_clear()


def test_parts_of_a_profile():
    """Of a network of width 8, by name or by size; the longest operators come first, and nothing is lost."""
    operators = [
        ("d2it_C::window_attention_backward", [], 4.0, 2),
        ("aten::addmm", [[24], [5, 8], [8, 24]], 3.0, 1),
        ("aten::mm", [[8, 5], [5, 8]], 2.5, 1),
        ("aten::addmm", [[8], [5, 8], [8, 8]], 1.0, 1),
        ("aten::mm", [[5, 32], [32, 8]], 7.0, 1),
        ("aten::mm", [[48, 2], [2, 8]], 0.5, 1),
        ("d2it_C::adamw", [], 2.0, 1),
        ("Torch-Compiled Region: 0/0", [], 0.25, 1),
        ("aten::sum", [[5, 8], [], []], 0.125, 1),
    ]
    found = step_parts.by_part(operators, functools.partial(step_parts.part_of, dim=8, hidden=32))
    assert {part: each["ms"] for part, each in found.items()} == {
        "attention": 10.5,
        "MLP": 7.0,
        "modulation": 0.5,
        "optimiser": 2.0,
        "fused by the compiler": 0.25,
        "other": 0.125,
    }
    longest = found["attention"]["operators"]
    assert [(each["name"], each["ms"], each["calls"]) for each in longest] == [
        ("d2it_C::window_attention_backward", 4.0, 2),
        ("aten::addmm", 4.0, 2),
        ("aten::mm", 2.5, 1),
    ]
    text = step_parts.table([{"case": "c", "contender": "d2it", "parts": found}])
    assert "34.4%" in text
    assert "aten::mm 7.00, 1" in text


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(Skip, match=r"finds no C\+\+ compiler"):
        models.compilable(options(train_bench, "--compiled"))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_a_training_step_of_three_grains():
    chosen = options(train_bench, "--model", "S-3", "--image-size", "128")
    case = next(train_bench.cases(chosen))
    contenders = {name: case.contenders[name] for name in ("d2it packed eager", "masked eager", "part: RefineNet")}
    rows = {row["contender"]: row for row in models.run_case(dataclasses.replace(case, contenders=contenders), None)}
    assert rows["d2it packed eager"]["correct"]
    assert rows["d2it packed eager"]["flops"] < rows["masked eager"]["flops"]
    assert "ms" in rows["part: RefineNet"]


@pytest.mark.long
@pytest.mark.parametrize("size", ["S", "S-3"])
def test_sampling(size):
    chosen = options(sample_bench, "--image-size", "128", "--model", size)
    case = next(sample_bench.cases(chosen))
    rows = {row["contender"]: row for row in models.run_case(case, None)}
    assert {name for name, row in rows.items() if "ms" in row} == {"d2it packed eager", "masked eager", "dit eager"}
    assert rows["d2it packed graph"]["skipped"] == "CUDA graphs need a GPU"
    assert rows["d2it packed eager"]["correct"]
    assert rows["d2it packed eager"]["images_per_s"] == 1000
    assert "1.00x masked eager" in models.table(list(rows.values()))


@pytest.mark.parametrize(("script", "operator"), [(train_bench, "train"), (sample_bench, "sample")])
def test_time_against_tokens(script, operator, tmp_path, monkeypatch):
    """A line for each budget; the page has time and work of each against those of the finest map."""
    if operator == "train":
        monkeypatch.setitem(models.SIZES, "S", ("tiny", "DiT-S/2"))
    only = ["--image-size", "128", "--only", "*budget*", "--budgets", "0.25", "0.5", "1", "--out", str(tmp_path)]
    assert models.main(operator, options(script, *only), script.cases) == 0
    result = load(tmp_path)[operator]
    rows = result["rows"]
    assert [row["shape"]["budget"] for row in rows] == [0.25, 0.5, 1.0]
    assert [row["shape"]["tokens"] for row in rows] == pytest.approx([0.25, 0.5, 1.0], abs=0.007)  # of 64 regions
    assert all(row["correct"] for row in rows)
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    table = results.budget_table(rows[::-1])
    share = rows[0]["flops"] / rows[2]["flops"]
    assert f"| 25% | {share:.0%} | 100% (1.00 ms) | {1 / share:.2f}x of the work |" in table
    assert table[-1] == "| 100% | 100% | 100% (1.00 ms) | 1.00x of the work |"
    assert "\n".join(table) in "\n".join(results.operator_section(result))
    assert results.curves([{**row, "shape": {"fill": 0.5}} for row in rows]) == {}
    pytest.importorskip("matplotlib")
    results.plot_curves(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_a_wrong_contender_is_named_and_gets_no_speed_up():
    def job(error):
        return lambda: models.Job(lambda: None, 1, 2 * 10**9, error, 1e-4)

    contenders = {"d2it packed": ("x", job(1e-2)), "masked": ("x", job(0.0))}
    rows = list(models.run_case(models.Case("c", {}, torch.float32, "step", contenders), None))
    text = models.table(rows)
    assert "wrong: relative error 1.0e-02" in text
    assert "x masked" not in text
