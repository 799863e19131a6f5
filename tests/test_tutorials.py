"""The tutorials of docs/tutorials: every command and every line of Python runs, in order, in one folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2it.__main__ import main

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


def words_of(block: str) -> list[list[str]]:
    """Runs a block of shell commands and returns the arguments of its calls of `d2it`, as bash gives them."""
    script = "set -euo pipefail; d2it() { printf '%s\\0' \"$@\" $'\\n'; }\n" + block
    made = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert made.returncode == 0, f"{block}{made.stderr}"
    return [call.split("\0") for call in made.stdout.split("\0\n\0")[:-1]]


@pytest.mark.long
def test_train_fine_tune_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a command of its own for each would import PyTorch nine times."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("photos", "more"):  # smooth, with noise in a corner
        Path(name).mkdir()
        for i in range(8):
            ramp = np.linspace(0, 255, 70)[:, None, None] * rng.random(3) + np.zeros((70, 80, 3))
            ramp[:35, :40] = rng.integers(0, 255, (35, 40, 3))
            Image.fromarray(ramp.astype(np.uint8)).save(f"{name}/{i}.png")
    for name in IN_ORDER:
        for language, block in blocks(name, "sh", "python"):
            if language == "python":
                exec(compile(block, f"{name}.md", "exec"), {})
            elif not block.startswith("pip"):
                calls = words_of(block)
                assert len(calls) == len(re.findall(r"^d2it ", block, re.MULTILINE)) > 0, block
                for words in calls:
                    assert main(words) == 0, f"{name}: {words}: {capsys.readouterr().err}"
    for file in (
        "photos.json",
        "runs/photos/report.html",
        "runs/photos/samples/grid.png",
        "samples/grid.png",
        "runs/more/samples.png",
        "reconstruction.json",
        "runs/photos/evaluation.json",
    ):
        assert Path(file).stat().st_size > 0, file


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
