"""README and docs: every shell line is one that its command takes, those that are cheap run, and so does the Python.

docs/tutorials, docs/finetuning.md and docs/adding_a_kernel.md run whole, in tests of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from d2it import D2iT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.__main__ import COMMANDS, main
from d2it.data import Calibration
from d2it.ops import encode_grains
from d2it.training.config import Config, load, setting_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {"train.py": "train", "sample.py": "sample", "evaluate.py": "evaluate"}
SECTIONS = {field.name for field in dataclasses.fields(Config)}
# What "..." stands for in docs/training.md.
TRAINING = ["--config", "configs/imagenet256_xl.yaml", "data.path=/data/imagenet"]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def shell_lines() -> Iterator[tuple[str, str]]:
    """(document, line) of every command in a block, with its continuation lines."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if shlex.split(line, comments=True):
                    yield document.name, line


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The options; an error of the parser becomes one that a test can show."""
    try:
        return parser.parse_intermixed_args(words) if parser.prog == "train.py" else parser.parse_args(words)
    except SystemExit as stop:
        raise ValueError(f"{parser.prog} does not take {words}") from stop


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command of `d2it`, or of a module."""
    module = COMMANDS[command][0].partition(":")[0] if command in COMMANDS else command
    return importlib.import_module(module).parser()


def check_command(command: str, words: list[str]) -> None:
    """Checks the words after a command of `d2it`; of a training also that its settings load."""
    words = [word for word in words if word != "..."]
    options = parse(parser_of(command), words)
    if command == "train" and "--help" not in words:
        load(options.config or "demo", options.overrides)


def check_script(path: str, words: list[str]) -> None:
    """Checks that a script of benchmarks/, tests/, examples/ or showcase/ is there and has the options."""
    file = ROOT / path
    assert file.is_file(), path
    package = file.with_suffix("")
    sources = [file, *(package.glob("*.py") if package.is_dir() else [])]
    text = "".join(source.read_text() for source in sources)
    beside = [file.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    text += "".join(source.read_text() for source in {*beside, file.with_name("command.py")} if source.is_file())
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{path} has no {word}"


def check_pip(words: list[str]) -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    for word in words:
        for extras in re.findall(r"(?:d2it|\)|>)\[([\w,]+)\]", word):
            assert set(extras.split(",")) <= set(known), word


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    for word in words:
        name, equals, value = word.partition("=")
        assert re.search(rf"\b{name}\b", text) if equals else name in targets.split(), f"make {word}"
        if name == "PARTS":
            assert set(value.split()) <= parts(), word


def parts() -> set[str]:
    """The parts of `make gpu`."""
    script = importlib.import_module("run_gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_gpu.py", "--list"])
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert script.main() == 0
    return set(printed[0].split())


def check(line: str) -> None:
    """Raises where a line names a command, option, setting, extra, target or file that is not there."""
    words = shlex.split(re.sub(r"\$[A-Z]+", "1", line), comments=True)
    if "&&" in words:
        place = words.index("&&")
        check(shlex.join(words[:place]))
        return check(shlex.join(words[place + 1 :]))
    while re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):  # of the environment
        words = words[1:]
    name, *rest = words
    if name == "...":
        return check_command("train", [*TRAINING, *rest] if "--config" not in rest else [*rest, TRAINING[-1]])
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        options = parse(get_args_parser(), [word for word in rest if word != "..."])
        module = ["-m"] if options.module else []
        return check(shlex.join(["python", *module, options.training_script, *options.training_script_args]))
    if name == "python":
        if rest[0] == "-m" and rest[1] == "d2it":
            return check_command(rest[2], rest[3:])
        if rest[0] == "-m":
            return check_command(rest[1], rest[2:])
        return check_command(SCRIPTS[rest[0]], rest[1:]) if rest[0] in SCRIPTS else check_script(rest[0], rest[1:])
    if name == "d2it":
        return check_command(rest[0], rest[1:])
    if name not in ("mkdir", "cp"):
        {"pip": check_pip, "make": check_make}[name](rest)


LINES = [(document, line) for document, line in shell_lines() if "softcap" not in line]  # of the kernel yet to be added


@pytest.mark.parametrize(("document", "line"), LINES, ids=[f"{d}-{i}" for i, (d, _) in enumerate(LINES)])
def test_a_shell_line_is_one_that_its_command_takes(
    document: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "d2it trian --config demo",
        "d2it train --config imagenet256 data.path=x",
        "d2it train contant.steps=3",
        "d2it sample runs/demo --lables 3",
        "torchrun --standalone --nproc=gpu --no-such -m d2it train",
        "python evaluate.py generation --checkpoint runs/demo",
        "python -m d2it.data.calibrate faces --ratio half",
        "python benchmarks/attn_bench.py --modell XL",
        "python benchmarks/no_bench.py",
        "pip install 'd2it[studoi]'",
        "make whel",
        'make gpu PARTS="build no_bench"',
        "... content.step=3",
        "mkdir -p a && d2it stduio a",
        "git push",
    ],
)
def test_a_line_with_a_mistake_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception):  # noqa: B017  of whatever kind
        check(line)


def test_options_and_settings_in_the_text_are_there() -> None:
    """Commands between backquotes, which are often not whole: their options, their targets and their settings."""
    settings = set(setting_names())
    for document in DOCUMENTS:
        if document.name in ("results.md", "evidence.md", "adding_a_kernel.md"):  # generated; followed to the letter
            continue
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            name, *rest = code.split()
            if name == "python" and rest:
                name, *rest = rest[1:] if rest[0] == "-m" else rest
            where = f"{document.name}: {code}"
            if name == "make":
                check_make(shlex.split(" ".join(rest)))
            elif name == "pip":
                check_pip(rest)
            elif re.fullmatch(r"(benchmarks|showcase|tests|examples)/\w+\.py", name) and "X_bench" not in name:
                check_script(name, rest)
            elif name in SCRIPTS or (re.fullmatch(r"d2it(\.\w+)*", name) and rest and rest != ["COMMAND"]):
                command = SCRIPTS.get(name) or (rest.pop(0) if name == "d2it" else name)
                known = option_strings(parser_of(command))  # which also says that there is such a command
                assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, where
            for word in code.split():
                key, equals, _ = word.partition("=")
                if equals and key.partition(".")[0] in SECTIONS and re.fullmatch(r"[a-z0-9_.]+", key):
                    assert key in settings or ".overrides." in key, where


def option_strings(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a command and of its own commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                found |= option_strings(each)
    return found


# ---- what runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/demo` and `runs/imagenet256_xl`: untrained, of the demo's sizes, and with 1000 classes."""
    folder = tmp_path_factory.mktemp("docs")
    names = ["astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "brick", "gravel", "camera"]
    for run, classes in (("demo", names), ("imagenet256_xl", [f"class {i}" for i in range(1000)])):
        torch.manual_seed(0)
        small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": len(classes)}
        model = D2iT(
            DynamicVAE.from_preset(
                "tiny", downsampling=(4, 8), encoder_mult=(1, 1, 2, 2), decoder_mult=(1, 1, 2), thresholds=(1.95,)
            ),
            DynamicGrainTransformer.from_preset("tiny", grid=(8, 8), **small),
            DynamicContentTransformer.from_preset("tiny", image_size=64, downsampling=(4, 8), **small),
            class_names=classes,
            sampling={"scheduler": "ddim", "steps": 1},
        )
        model.save_pretrained(folder / "runs" / run)
    return folder


def test_the_lines_that_sample_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    ran = 0
    for document, line in shell_lines():
        words = shlex.split(line, comments=True)
        words = ["sample", *words[2:]] if words[:2] in (["d2it", "sample"], ["python", "sample.py"]) else []
        if document in ("README.md", "sampling.md", "training.md") and words and Path(words[1]).is_dir():
            assert main([*words, "--batch-size", "4"]) == 0, line
            ran += 1
    assert ran >= 4
    assert (runs / "runs" / "imagenet256_xl" / "samples" / "grid.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_the_python_of_the_guides_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(runs)
    (runs / "showcase").symlink_to(ROOT / "showcase")
    given = {"Calibration": Calibration, "encode_grains": encode_grains}
    given["images"] = torch.randint(256, (1, 3, 256, 256), dtype=torch.uint8)
    ran = []
    try:
        for name in ("data", "gallery", "sampling", "training"):
            names: dict = dict(given)
            for code in blocks(ROOT / "docs" / f"{name}.md", "python"):
                code = code.replace(', device="cuda", dtype=torch.bfloat16).compile()', ")")  # a GPU's
                code = code.replace(', device="cuda"', "").replace(", seed=0)", ", seed=0, steps=1, grain_steps=1)")
                exec(compile(code, f"{name}.md", "exec"), names)
                ran.append(names)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
            del sys.modules[name]
    calibrated, gallery, drawn, _, large = ran
    assert calibrated["grain_map"].shape == (1, 16, 16)
    assert gallery["samples"].images.shape == (2, 3, 64, 64)
    assert drawn["samples"].grain_maps[:, 2:6, 2:6].all()
    assert (runs / "coffee.png").stat().st_size > 0
    assert large["samples"].labels.tolist() == [207, 360]


def test_every_block_of_a_language_that_is_tried_is_of_a_document_that_is() -> None:
    """A new document with Python in it has to be tried somewhere."""
    tried = {"README", "adding_a_kernel", "data", "gallery", "sampling", "training", "ops", "evaluate"}
    assert {document.stem for document in DOCUMENTS if blocks(document, "python")} == tried
