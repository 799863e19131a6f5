import dataclasses
import importlib
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import command
import goals
import pytest
import results
import timing
import torch
from bench import (
    TOLERANCE,
    Bench,
    Cost,
    Run,
    Skip,
    cotangents_like,
    distance,
    evaluate,
    floats,
    run_bench,
    widen,
)
from rows import cases, devices, load, ours, speedup, total_speedup

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*_bench.py"))


def square_bench(contenders: dict) -> Bench:
    return Bench(
        case="n1000",
        shape={"n": 1000},
        dtype=torch.float32,
        inputs=lambda seed: {"x": torch.randn(1000, generator=torch.Generator().manual_seed(seed))},
        contenders=contenders,
        forward=Cost(bytes=8000, flops=1000),
        backward=Cost(bytes=12000),
        gradients=("x",),
        expected=lambda given: given["x"] ** 2,
    )


def unavailable() -> Run:
    raise Skip("no such library here")


def test_measures_right_wrong_and_absent_contenders() -> None:
    declared = square_bench(
        {
            "d2it square": lambda: lambda given: given["x"].square(),
            "eager": lambda: lambda given: given["x"] * given["x"],
            "wrong forward": lambda: lambda given: given["x"] * given["x"] + 0.1,
            "wrong backward": lambda: lambda given: given["x"] * given["x"].detach(),
            "of another release": lambda: lambda given: given["x"].no_such_method(),
            "lower bound": lambda: lambda given: torch.ones(1000, requires_grad=True) * 1,
            "absent": unavailable,
        }
    )
    rows = run_bench(declared, seconds=0.01)
    found = {(row["contender"], row.get("direction")): row for row in rows}
    assert found["absent", None]["skipped"] == "no such library here"
    assert found["of another release", None]["skipped"].startswith("failed: AttributeError")
    assert found["d2it square", "forward"]["correct"]
    assert found["d2it square", "backward"]["correct"]
    assert not found["wrong forward", "forward"]["correct"]
    assert found["wrong forward", "backward"]["correct"]
    assert found["wrong backward", "forward"]["correct"]
    assert not found["wrong backward", "backward"]["correct"]
    assert not found["lower bound", "backward"]["correct"]
    row = found["d2it square", "forward"]
    assert row["gbps"] == pytest.approx(8000 / row["ms"] / 1e6)
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert row["ms_q10"] <= row["ms"] <= row["ms_q90"]
    assert "skipped: no such library here" in command.table(rows)
    assert "wrong: relative error" in command.table(rows)


def test_time_of_a_call_is_its_time() -> None:
    timed = timing.time_calls([lambda: time.sleep(0.003)], seconds=0.05)
    assert 3.0 <= timed.ms < 300.0  # the machine may be busy
    assert timed.calls >= 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_of_an_operator_is_right_on_its_first_case(script: str) -> None:
    module = importlib.import_module(script)
    if not hasattr(module, "benches"):  # a benchmark of a model has a main of its own, and its own test
        return
    bench = next(iter(module.benches()))
    assert bench.expected is not None
    names = [name for name in bench.contenders if ours({"contender": name})]
    if not torch.cuda.is_available() and len(names) > 1:  # interpreted it takes half a minute; tests/kernels runs it
        names = [name for name in names if name != "d2it triton"]
    names = names or list(bench.contenders)[:1]  # no C++ operators here
    inputs = bench.inputs(0)
    cotangents: list[torch.Tensor] = []
    wide = {key: torch.utils._pytree.tree_map_only(torch.Tensor, widen, value) for key, value in inputs.items()}
    gradients = bench.gradients if bench.backward else ()
    for name in names:
        run = bench.contenders[name]()
        cotangents = cotangents or cotangents_like(floats(run(inputs)))
        want = evaluate(bench.expected, wide, gradients, cotangents)
        got = evaluate(run, inputs, gradients, cotangents)
        error, right = distance(got.outputs, want.outputs, TOLERANCE[bench.dtype])
        assert right, f"{name}: relative error {error}"
        error, right = distance(got.gradients, want.gradients, 2 * TOLERANCE[bench.dtype])
        assert right, f"{name}: relative error {error} of the gradients"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "machine_rates", lambda: {"copy_gbps": 1.0, "matmul_tflops": {"float32": 1.0}})


def run_main(benches: list[Bench], *words: str) -> int:
    args = command.arguments("Squares.").parse_args(["--seconds", "0.01", *words])
    return command.main("Squares.", "square", lambda: iter(benches), args)


def test_a_benchmark_keeps_each_case_and_stops_in_time(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    right = {"d2it square": lambda: lambda given: given["x"].square()}
    benches = [square_bench(right), dataclasses.replace(square_bench(right), case="n1000-again")]
    assert run_main(benches, "--out", str(tmp_path)) == 0
    (written,) = load(tmp_path).values()
    assert written["complete"]
    assert cases(written["rows"]) == ["n1000", "n1000-again"]
    for key in ("device", "torch", "python", "commit", "source", "date", "rates", "small"):
        assert key in written
    assert "do not carry over to a GPU" in capsys.readouterr().out

    assert run_main(benches, "--out", str(tmp_path), "--minutes", "0") == 0
    assert "out of time: 1 of 2 cases left out" in capsys.readouterr().out
    (written,) = load(tmp_path).values()
    assert not written["complete"]
    assert cases(written["rows"]) == ["n1000"]

    rival = {"eager": lambda: lambda given: given["x"] * given["x"], **right}
    assert run_main([square_bench(rival)], "--out", str(tmp_path), "--minutes", "0") == 0
    (written,) = load(tmp_path).values()
    assert not written["complete"]
    assert {row["contender"]: row.get("skipped") for row in written["rows"]} == {
        "eager": "out of time",
        "d2it square": None,
    }


def test_a_wrong_result_of_ours_fails_the_benchmark(quick: None) -> None:
    wrong = {"d2it square": lambda: lambda given: given["x"].square() + 1}
    assert run_main([square_bench(wrong)], "--no-save") == 1


def test_warming_runs_its_share_and_times_nothing(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ran: list[str] = []

    def contender(case: str) -> Run:
        return lambda given: (ran.append(case), given["x"].square())[1]

    benches = [
        dataclasses.replace(square_bench({"d2it": lambda i=i: contender(str(i)), "absent": unavailable}), case=str(i))
        for i in range(3)
    ]
    assert run_main(benches, "--out", str(tmp_path), "--warm", "1/2") == 0
    assert ran == ["1"]
    assert not list(tmp_path.iterdir())


def row(case: str, contender: str, ms: float, direction: str = "forward", **more: object) -> dict:
    return {
        "case": case, "contender": contender, "direction": direction, "dtype": "bfloat16", "shape": {}, "ms": ms,
        "ms_q10": ms, "ms_q90": ms, "correct": True, "bytes": 1, "gbps": 1.0, "copy_share": 0.5, "floor_ms": 1.0,
        "floor_share": 0.5, **more,
    }  # fmt: skip


def result(operator: str, rows: list[dict], small: bool = False) -> dict:
    rates = {"copy_gbps": 4000.0, "matmul_tflops": {"bfloat16": 700.0}}
    return {
        "operator": operator, "complete": True, "device": "NVIDIA H200", "small": small, "torch": "2.11",
        "python": "3.12", "commit": "abc1234", "date": "2026-01-01", "rates": rates, "rows": rows,
    }  # fmt: skip


def test_speed_ups_are_against_the_best_right_rival() -> None:
    rows = [
        row("a", "d2it triton", 1.0),
        row("a", "wrong and fast", 0.1, correct=False, error=0.5),
        row("a", "unchecked and fast", 0.1, correct=None),
        row("a", "eager", 5.0),
        row("a", "compiled", 3.0),
        row("b", "d2it triton", 1.0, correct=False, error=0.5),
        row("b", "eager", 5.0),
        {"case": "a", "contender": "absent", "skipped": "not installed", "shape": {}},
    ]
    assert speedup(rows, rows[0]) == (3.0, "compiled")
    assert speedup(rows, rows[5]) is None
    assert speedup(rows, rows[3]) is None
    assert total_speedup(rows, "a") is None  # no backward was measured
    rows += [row("a", "d2it triton", 1.0, "backward"), row("a", "eager", 7.0, "backward")]
    assert total_speedup(rows, "a") == (6.0, "eager")
    section = "\n".join(results.operator_section(result("kde_entropy", rows)))
    assert "3.00x compiled" in section
    assert "wrong: relative error 5.0e-01" in section
    assert "absent (not installed)" in section


def test_goals_count_what_was_measured_and_nothing_else() -> None:
    every = {line[:2]: line[2:] for line in goals.goal_table({"kde_entropy": result("kde_entropy", [])})}
    assert len(every) == sum(not goal.cpu for goal in goals.GOALS)
    assert set(every.values()) == {("not measured", "")}

    def attention(n: int, fill: float, ms: float, share: float, contender: str = "d2it triton") -> list[dict]:
        shape = {"n": n, "D": 64, "fill": fill}
        case = f"n{n}-fill{fill}"
        return [row(case, contender, ms, d, shape=shape, copy_share=share) for d in ("forward", "backward")]

    rows = attention(64, 0.5, 1.0, 0.8) + attention(64, 1.0, 2.0, 0.6) + attention(64, 0.5, 3.5, 0.1, "sdpa")
    table = {line[0] + line[1]: line[2:] for line in goals.goal_table({"window_attention": result("w", rows)})}
    assert table["window attention, 16 and 64 cells>= 70 % of copy bandwidth"] == (
        "60% .. 80% (worst: n64-fill1.0 backward)", "missed",
    )  # fmt: skip
    assert table["window attention, fill 0.5>= 3x the best rival, forward + backward"][1] == "met"
    assert table["window attention, time by tokensfill 0.5 at most 1.15x half of fill 1"][1] == "met"
    assert table["window attention, fill 1>= 1.5x the best rival, forward + backward"] == ("not measured", "")


def test_what_is_faster_than_a_copy_from_memory_is_in_a_cache() -> None:
    assert [results.share(value) for value in (0.5, 1.0, 1.78)] == ["50%", "100%", "in cache"]
    rows = [{**row("a", "d2it cpu", 1.0), "copy_share": 1.3, "bytes": 8, "gbps": 5.0}]
    assert "5 GB/s (in cache)" in "\n".join(results.operator_section(result("pack_tokens", rows)))


def test_the_chart_and_the_readme_have_the_figures_of_the_first_device(tmp_path: Path) -> None:
    rows = [row("a", "d2it triton", 0.02), row("a", "eager", 0.06)]
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "pack_tokens.json").write_text(json.dumps(result("pack_tokens", rows)))
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "pack_tokens.json").write_text(json.dumps(result("pack_tokens", rows, small=True)))
    folders = devices(tmp_path)
    assert [f.name for f in folders] == ["nvidia-h200", "cpu-x"]
    text = results.with_table("a\n<!-- results -->\nold\n<!-- /results -->\nb\n", results.in_readme(folders))
    assert text.startswith("a\n<!-- results -->\n![Times")
    assert text.endswith("<!-- /results -->\nb\n")
    assert "On NVIDIA H200, torch 2.11:" in text
    assert "old" not in text
    document = results.document(folders)
    assert "| `pack_tokens` forward | a | 20.0 µs | 50% | 3.0x eager |" in document
    assert "## NVIDIA H200" in document
    drawn = ElementTree.fromstring(results.chart(folders))
    texts = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["as fast as the best rival", "pack_tokens forward", "3.0x eager"]


def test_plots_say_where_and_with_what_they_were_measured(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot.Figure, "suptitle", lambda self, text, **kwargs: seen.append(text))
        measured = result("pack_tokens", [row("a", "d2it triton", 0.02), row("a", "eager", 0.06)])
        results.plot({**measured, "driver": "580.1"}, tmp_path / "pack_tokens.png")
    assert (tmp_path / "pack_tokens.png").stat().st_size > 1000
    for word in ("pack_tokens", "NVIDIA H200", "driver 580.1", "torch 2.11", "commit abc1234"):
        assert word in seen[0]


def test_documents_hold_what_the_result_files_give() -> None:
    """`make results` after a benchmark: no figure without a file, no file without its figures."""
    folders = devices()
    assert (ROOT / "docs" / "results.md").read_text() == results.document(folders)
    readme = (ROOT / "README.md").read_text()
    assert readme == results.with_table(readme, results.in_readme(folders))
    assert results.CHART.read_text() == results.chart(folders)
