"""What no other test reads: the workflows and issue forms of .github, and the Dockerfile."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_docs import check

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text())["jobs"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_is_there(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(workflow.read_text())
    assert content[True], "on: is YAML's true"
    checked = 0
    for name, job in content["jobs"].items():
        assert job.get("needs", name) in content["jobs"], name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
                file = step.get("with", {}).get("cache-dependency-path")
                assert file is None or (ROOT / file).is_file()
                continue
            line = re.sub(r"\$\{\{.*?\}\}", "1", step["run"])
            words = shlex.split(line, comments=True)
            if words[:3] == ["python", "-m", "pip"]:
                words = words[2:]
            if words[0] in ("make", "pip", "python"):
                check(shlex.join(words))
                checked += 1
    assert checked


def test_what_one_job_leaves_for_another_is_what_it_makes() -> None:
    """make wheel writes dist/, make docs site/, and every artifact that is fetched was left by a job before."""
    left: dict[str, str] = {}
    for job in jobs(ROOT / ".github" / "workflows" / "ci.yml").values():
        made = {"make wheel": "dist", "make docs": "site"}.get(" ".join(s["run"] for s in job["steps"] if "run" in s))
        for step in job["steps"]:
            given = step.get("with", {})
            if step.get("uses", "").startswith("actions/upload-artifact"):
                assert given["path"] == made
                left[given["name"]] = given["path"]
            elif step.get("uses", "").startswith("actions/download-artifact"):
                assert left[given["name"]] == given["path"]
    assert left == {"dist": "dist", "site": "site"}


def test_the_pythons_of_the_matrix_are_those_of_the_package() -> None:
    (oldest,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', PYPROJECT, re.MULTILINE)
    for name in ("test", "install"):
        pythons = jobs(ROOT / ".github" / "workflows" / "ci.yml")[name]["strategy"]["matrix"]["python"]
        assert all(isinstance(each, str) for each in pythons), "3.10 without quotes is 3.1"
        minors = [int(each.removeprefix("3.")) for each in pythons]
        assert minors == list(range(int(oldest), minors[-1] + 1))
    assert f'target-version = "py3{oldest}"' in PYPROJECT
    assert f'python_version = "3.{oldest}"' in PYPROJECT


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert set(content) == {"name", "description", "labels", "body"}
    identities = [field["id"] for field in content["body"]]
    assert len(identities) == len(set(identities))
    for field in content["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of every line of the Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]  # type: ignore[misc]


def test_the_dockerfile_copies_installs_and_makes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages: list[str] = []
    for name, rest in instructions():
        assert name in ("FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "CMD"), name
        if name == "FROM":
            assert re.fullmatch(r"[\w/]+:[\w.-]+( AS \w+)?", rest), "an image without a version"
            stages += rest.split(" AS ")[1:]
        elif name == "COPY":
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages
                assert sources[1].startswith("/src/dist/"), "where make wheel leaves it"
            else:
                assert all((ROOT / source).exists() for source in sources), rest
        elif name == "RUN":
            for command in rest.split(" && "):
                if command.startswith(("make ", "pip ")):
                    check(command)
    assert dict(instructions())["CMD"] == '["d2it", "--help"]'
    # Its own example, which stands in its head.
    head = "".join(re.findall(r"^#(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)).replace("\\", " ")
    check(re.findall(r"torchrun .*?run\.dir=\S+", head)[0])


def test_nothing_that_the_image_is_built_from_is_ignored() -> None:
    """The patterns of .dockerignore leave out nothing that is in the repository."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone: an sdist or an archive")
    for path in listed.stdout.split():
        parts = path.split("/")
        heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        for pattern in patterns:
            simple = pattern.removeprefix("**/")
            tried = parts if simple != pattern else heads
            assert not any(fnmatch(each, simple) for each in tried), (path, pattern)
