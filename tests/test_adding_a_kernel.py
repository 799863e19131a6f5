"""docs/adding_a_kernel.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "adding_a_kernel.md").read_text()


STEP = re.compile(r"^(New file|At the end of|Before `[^`]+` in) `([^`]+)`[^\n]*:\n\n```python\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """The repository after steps 1 to 5; not below pytest's own folder, whose modules the suite takes for stand-ins."""
    with tempfile.TemporaryDirectory(prefix="d2it-") as name:
        folder = Path(name)
        for part in ("d2it", "kernels", "csrc", "tests", "benchmarks"):
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        steps = STEP.findall(DOCUMENT)
        assert len(steps) == 6
        for where, file, code in steps:
            follow(where, folder / file, code)
        yield folder


def follow(where: str, path: Path, code: str) -> None:
    """Follows the document's line above one block of code."""
    if where == "New file":
        assert not path.exists()
        path.write_text(code)
        return
    text = path.read_text()
    if where == "At the end of":
        path.write_text(f"{text}\n\n{code}")
        return
    before = where.split("`")[1]
    assert before in text
    listed = '    "unpack_tokens",\n'
    text = text.replace(before, f"{code}{before}", 1)
    path.write_text(text.replace(listed, f'    "{code.split()[-1]}",\n{listed}', 1))


def run(folder: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(folder)}
    environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # takes longer than the two programs themselves
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_suite_of_the_new_operator_passes(copy: Path) -> None:
    out = run(copy, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-x", "tests/kernels/test_softcap.py")
    assert "test_mutation_is_noticed" in out
    assert " passed" in out


def test_the_report_compiles_the_new_kernel(copy: Path) -> None:
    out = run(copy, "benchmarks/kernel_report.py", "--only", "softcap*", "--arch", "sm_90", "--jobs", "1")
    assert "softcap_bwd_kernel" in out


def test_the_benchmark_runs(copy: Path) -> None:
    out = run(copy, "benchmarks/softcap_bench.py", "--only", "N1024-*", "--seconds", "0.02")
    assert "eager" in out


def test_the_example_in_the_docstring_is_right(copy: Path) -> None:
    program = """
import doctest, sys, torch
from d2it import ops
module = sys.modules["d2it.ops.softcap"]
found = doctest.testmod(module, extraglobs={"ops": ops})
assert found.attempted and not found.failed
"""
    run(copy, "-c", program)
