"""`make gpu`: its parts, processes that end with it, and the bundle that it leaves whenever it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import resume_plugin
import torch
from gpu_run import bundle, parts, plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("print('fine')", "passed"),
        ("raise SystemExit(3)", "failed"),
        ("import no_such_module_anywhere", "skipped: needs no_such_module_anywhere, which is not installed"),
        ("import time; time.sleep(60)", "stopped at its limit"),
    ],
)
def test_a_part_of_make_gpu_is_told_by_how_it_ended(
    code: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LOGS", tmp_path / "logs")
    outcome = parts.run("part", [sys.executable, "-S", "-c", code], 30 if state != "stopped at its limit" else 1)
    assert outcome.state == state
    assert outcome.bad == (state in ("failed", "stopped at its limit"))
    assert (tmp_path / "logs" / "part.log").exists()


def test_the_build_needs_neither_a_new_setuptools_nor_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LOGS", tmp_path)
    monkeypatch.setattr(parts, "LOGS", tmp_path)
    monkeypatch.setattr(parts, "GPU", True)
    monkeypatch.setattr(parts, "tool", lambda name: None)
    found = []

    def run(command: list[str], log: Path, limit: float, environment: dict[str, str], folder: Path) -> int:
        assert (folder / "csrc" / "registration.cpp").is_file()
        assert not (folder / "pyproject.toml").exists()
        found.append((environment["D2IT_BUILD"], "--force" in command))
        log.touch()
        return 0

    monkeypatch.setattr(parts.children, "run", run)
    for why_not in ([], ["d2it was built without CPU operators"]):
        monkeypatch.setattr(parts._native, "why_not", lambda op, device, why_not=why_not: why_not)
        assert parts.build(60.0).state == "passed"
    assert found == [("cpu", False), ("cpu", True)]
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    assert parts.build(60.0).state == "skipped: no C++ compiler here"


def test_make_gpu_runs_every_test_of_the_suite_and_every_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *_: object) -> int:
        ran.append(command)
        (tmp_path / "part.log").touch()
        return 0

    monkeypatch.setattr(parts.children, "run", run)
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *args, real=Path.read_text, **kwargs: real(path, *args, **kwargs) if path.exists() else "",
    )
    monkeypatch.setattr(parts, "LOGS", tmp_path)
    for task in parts.suite_tasks(lambda: 100.0):
        assert task().state == "passed"
    words = [word for command in ran for word in command]
    for path in (ROOT / "tests" / "kernels").glob("test_*.py"):
        assert words.count(str(path)) == parts.SHARDS
    assert str(ROOT / "tests" / "test_no_sync.py") in words
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*_bench.py")} - {"quality_bench"}
    assert set(plan.benchmarks()) == scripts
    assert {f"{name}_bench" for name in plan.SHARES} <= scripts
    assert len(parts.suites()) == len({name for _, name in parts.suites()}) >= 11
    assert {"gather_rows_kernel", "kde_entropy_kernel", "merge_rows"} <= set(parts.kernel_names())


DEADLY = """
import os, signal

def test_before(): pass
def test_deadly(): os.kill(os.getpid(), signal.SIGKILL)
def test_between(): assert False
def test_aborts(): os.abort()
def test_after(): pass
def test_absent(): import no_such_package_anywhere.part
"""


@pytest.mark.long
def test_a_shard_goes_on_after_a_test_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOGS", tmp_path / "logs")
    (tmp_path / "test_deadly.py").write_text(DEADLY)
    words = [*parts.PYTEST, "-p", "resume_plugin", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    outcome = parts.run_shard("tests.deadly", words, 600.0, {})
    assert outcome.state == "failed"
    states = resume_plugin.read_log(tmp_path / "logs" / "tests.deadly.tests")
    tests = ("before", "deadly", "between", "aborts", "after", "absent")
    expected = dict(zip(tests, ("end", "start", "failed", "start", "end", "end")))
    assert states == {f"test_deadly.py::test_{name}": state for name, state in expected.items()}
    for name in ("deadly", "aborts"):
        assert f"took its process or the device with it: test_deadly.py::test_{name}" in outcome.tail
    assert "failed: test_deadly.py::test_between" in outcome.tail


def test_a_lost_device_ends_the_process_and_names_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(resume_plugin, "LOG", tmp_path / "log")
    report = pytest.TestReport("test_x.py::test_y", ("test_x.py", 1, "test_y"), {}, "failed", None, "call")
    resume_plugin.pytest_runtest_logstart(report.nodeid)
    resume_plugin.pytest_runtest_logreport(report)  # a failure that leaves the device alone
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(pytest.exit.Exception, match=r"the device is lost after test_x\.py::test_y"):
        resume_plugin.pytest_runtest_logreport(report)
    resume_plugin.pytest_runtest_logfinish(report.nodeid)
    assert resume_plugin.read_log(tmp_path / "log") == {report.nodeid: "fault"}


ANCESTOR = """
import os, sys, threading
from pathlib import Path
import children
code = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]])"
sleeper = "import time, os; open(%r, 'w').write(str(os.getpid())); time.sleep(600)"
children.run([sys.executable, "-S", "-c", code, sleeper], Path(%r), 600, dict(os.environ), Path("/"))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_children_and_theirs_end_with_the_one_that_started_them(how: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "ancestor.py").write_text(ANCESTOR % (str(pid), str(tmp_path / "log")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    ancestor = subprocess.Popen([sys.executable, "-S", str(tmp_path / "ancestor.py")], env=environment)
    try:
        wait_for(lambda: pid.exists() and pid.read_text() != "")
        sleeper = int(pid.read_text())
        assert Path(f"/proc/{sleeper}").exists()
    finally:
        ancestor.send_signal(how)
        ancestor.wait()
    wait_for(lambda: not Path(f"/proc/{sleeper}").exists())


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def names(file: Path) -> set[str]:
    """Of what a bundle holds, all of which is read."""
    with tarfile.open(file) as whole:
        return {member.name for member in whole.getmembers()}


def test_the_bundle_is_whole_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bundle, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(bundle.Bundle, "EVERY", 0.01)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "logs").mkdir()
    with bundle.Bundle() as whole:
        whole.add("results", tmp_path / "results")
        for i in range(20):
            (tmp_path / "logs" / "part.log").write_text(f"{i}\n" * 1000)
            names(tmp_path / "out" / "gpu.tar.gz")
            time.sleep(0.01)
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "op.json").write_text("{}")
        print("a table")
    assert capsys.readouterr().out == "a table\n"
    assert names(tmp_path / "out" / "gpu.tar.gz") == {"logs/part.log", "logs/printed.log", "results/op.json"}
    assert (tmp_path / "logs" / "printed.log").read_text() == "a table\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.tar.gz"]


# A PyTorch that takes for ever to import, and one that cannot be.
TORCHES = {
    "endless": "import time; print('importing', flush=True); time.sleep(600)",
    "broken": "raise OSError('no GPU')",
}
START = """
import sys
from pathlib import Path
from gpu_run import bundle
bundle.LOGS = Path(sys.argv.pop(1))
import run_gpu
raise SystemExit(run_gpu.main())
"""


def start(torch_of_it: str, folder: Path) -> subprocess.Popen:
    """run_gpu.py with its logs in `folder`/logs and its bundle in `folder`/out."""
    (folder / "torch.py").write_text(TORCHES[torch_of_it])
    path = os.pathsep.join([str(folder), str(ROOT / "benchmarks")])
    words = [sys.executable, "-c", START, str(folder / "logs"), "smoke", "--minutes", "3"]
    environment = {**os.environ, "PYTHONPATH": path, "OUT": str(folder / "out")}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_before_pytorch_is_imported_leaves_a_bundle(how: int, tmp_path: Path) -> None:
    run = start("endless", tmp_path)
    assert run.stdout is not None
    assert run.stdout.readline() == "importing\n"
    run.send_signal(how)
    run.communicate()
    assert run.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert names(tmp_path / "out" / "gpu.tar.gz") >= {"logs/start.json", "logs/versions.json"}
    started = json.loads((tmp_path / "logs" / "start.json").read_text())
    assert (started["parts"], started["minutes"]) == (["smoke"], 3.0)
    versions = json.loads((tmp_path / "logs" / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["commit"]


def test_a_pytorch_that_cannot_be_imported_is_in_the_bundle(tmp_path: Path) -> None:
    run = start("broken", tmp_path)
    printed = run.communicate()[1]
    assert run.returncode == 1
    assert "OSError: no GPU" in printed
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as whole:
        log = whole.extractfile("logs/printed.log")
        assert log is not None
        assert "OSError: no GPU" in log.read().decode()
