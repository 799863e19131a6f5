"""The tutorials of docs/tutorials: every command and every line of Python runs, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
IN_ORDER = ("photos", "finetune", "evaluate")


def blocks(name: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of every block in one of the languages, in order."""
    text = (TUTORIALS / f"{name}.md").read_text()
    return re.findall(rf"```({'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def test_all_tutorials_are_tried() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {*IN_ORDER, "ops"}


def test_the_python_of_the_operators_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    for _, block in blocks("ops", "python"):
        exec(compile(block, "ops.md", "exec"), names)
    assert names["out"].shape == (32, 49, 96)
    assert "reference" in capsys.readouterr().out


@pytest.mark.long
def test_train_fine_tune_evaluate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("photos", "more"):  # smooth, with noise in a corner
        (tmp_path / name).mkdir()
        for i in range(8):
            ramp = np.linspace(0, 255, 70)[:, None, None] * rng.random(3) + np.zeros((70, 80, 3))
            ramp[:35, :40] = rng.integers(0, 255, (35, 40, 3))
            Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    function = f"set -euo pipefail; d2it() {{ '{sys.executable}' -m d2it \"$@\"; }}\n"
    for name in IN_ORDER:
        for language, block in blocks(name, "sh", "python"):
            if not block.startswith("pip"):
                command = ["bash", "-c", function + block] if language == "sh" else [sys.executable, "-c", block]
                made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert made.returncode == 0, f"{name}: {block}{made.stderr}"
    for file in (
        "photos.json",
        "runs/photos/report.html",
        "runs/photos/samples/grid.png",
        "samples/grid.png",
        "runs/more/samples.png",
        "reconstruction.json",
        "runs/photos/evaluation.json",
    ):
        assert (tmp_path / file).stat().st_size > 0, file


def test_the_pages_of_the_site_are_there() -> None:
    """`make docs` checks links and anchors; this needs no mkdocs."""
    import yaml

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for each in values for file in files(each)]  # type: ignore[union-attr]

    named = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(named) == len(set(named)) > 15
    for file in named:
        assert (ROOT / "docs" / file).is_file(), file
