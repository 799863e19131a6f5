"""The scripts of examples/ run, and show what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ragged_windows() -> None:
    assert run("ragged.py").endswith("the others: True\n")


def test_swin_agrees_with_the_usual_way_to_write_it() -> None:
    differences = [float(found) for found in re.findall(r"difference (\S+)", run("swin.py"))]
    assert len(differences) == 2
    assert max(differences) < 1e-4


def test_a_swin_transformer_of_timm_computes_the_same_after_the_swap() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    shown = run("swap_swin.py")
    (difference,) = re.findall(r"outputs (\S+)", shown)
    assert float(difference) < 1e-5
    assert "d2it" in shown
