"""The scripts of examples/ run, and show what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2it import D2iT, DynamicContentTransformer, DynamicVAE

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
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


@pytest.mark.long
def test_exported_programs_are_equal() -> None:
    assert run("export.py").count("equal True") == 2


def test_samples_under_a_map_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    model = D2iT(
        DynamicVAE.from_preset("tiny"),
        None,
        DynamicContentTransformer.from_preset("tiny", image_size=64, **small),
        sampling={"scheduler": "ddim", "steps": 2},
    )
    model.save_pretrained(tmp_path / "run")
    assert run("paint.py", "run", cwd=tmp_path) == "wrote painted.png\n"
    assert (tmp_path / "painted.png").stat().st_size > 0
