"""What is installed: with and without the C++ operators."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_report.compile import cuobjdump

import d2it
from d2it.__main__ import COMMANDS, main
from d2it.ops import _native

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "d2it" / "_C.abi3.so"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built without operators, as on a machine without a compiler."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("d2it", "kernels", "configs", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", *(["kernels", "configs"] if name == "d2it" else []))
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target, source],
        env={**os.environ, "D2IT_BUILD": "none"},
        check=True,
    )
    return next(target.glob("*.whl"))


def test_a_wheel_has_the_kernels_and_the_data(wheel):
    assert wheel.name == f"d2it-{d2it.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = [
        *ROOT.glob("d2it/**/*.py"),
        *ROOT.glob("d2it/**/*.json"),
        *ROOT.glob("d2it/**/*.js"),
        ROOT / "d2it" / "py.typed",
    ]
    expected = {str(path.relative_to(ROOT)) for path in expected}
    expected |= {
        f"d2it/{path.relative_to(ROOT)}"
        for pattern in ("kernels/*.py", "configs/*.yaml")
        for path in ROOT.glob(pattern)
    }
    assert names >= expected
    assert all(name.startswith(("d2it/", "d2it-")) for name in names), "something would shadow other packages"


def test_a_build_replaces_the_library_at_once(tmp_path):
    """A process that starts during `make build` finds the old library or the new one, never a part or none."""
    code = """
import os, runpy, sys, threading, setuptools
found = {}
setuptools.setup = lambda **given: found.update(given)
runpy.run_path("setup.py")
command = found["cmdclass"]["build_ext"](setuptools.Distribution())
new, target = sys.argv[1:]
seen, done = set(), threading.Event()
def look():
    while not done.is_set():
        try:
            seen.add(os.stat(target).st_size)
        except FileNotFoundError:
            seen.add(None)
watch = threading.Thread(target=look)
watch.start()
for i in range(20):
    os.utime(new, (2e9 + i, 2e9 + i))  # what is not newer is not copied
    command.copy_file(new, target)
done.set()
watch.join()
print(seen, os.listdir(os.path.dirname(target)))
"""
    new, target = tmp_path / "new.so", tmp_path / "package" / "_C.so"
    target.parent.mkdir()
    for path in (new, target):
        path.write_bytes(bytes(2**22))
    environment = {**os.environ, "D2IT_BUILD": "cpu"}
    command = [sys.executable, "-c", code, new, target]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.stdout == f"{{{2**22}}} ['_C.so']\n", made.stderr


def test_without_operators_the_package_runs_in_python_and_says_why(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import torch
from d2it import ops
latents = [torch.randn(1, 2, 2, 2), torch.randn(1, 2, 4, 4)]
grains = torch.tensor([[[0, 1], [1, 0]]])
assert torch.equal(ops.neighbor_copy(latents, grains), ops.reference.neighbor_copy(latents, grains))
print(ops.available_backends("neighbor_copy"), *ops.why_not("neighbor_copy", "cpu", latents, grains))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("['reference']")
    assert "D2IT_BUILD=cpu" in made.stdout


def test_the_operators_bring_in_nothing_else_of_the_package():
    code = """
import sys, d2it
assert "torch" not in sys.modules
d2it.ops.grain_map
print(sorted(m for m in sys.modules if m.startswith("d2it.") and not m.startswith(("d2it.ops", "d2it.kernels"))))
print("diffusers" in sys.modules, d2it.D2iT.__module__, "ops" in dir(d2it), hasattr(d2it, "nothing"))
"""
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.stdout.splitlines() == ["[]", "False d2it.sampling.pipeline True False"], made.stderr


def command(*words, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_commands_help_imports_nothing_heavy():
    code = """
import sys
from d2it.__main__ import main
main(["--help"])
print(sorted({"torch", "numpy"} & set(sys.modules)))
"""
    made = command("-c", code)
    assert made.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in made.stdout for name in COMMANDS)
    assert command("-m", "d2it", "--version").stdout.strip() == d2it.__version__
    assert command("-m", "d2it").returncode == 2
    # A reader that has gone, as `| head` may, is no error to show.
    script = f"'{sys.executable}' -m d2it --help | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    gone = subprocess.run(["bash", "-c", f"sleep 0; {script}"], env=environment, capture_output=True, text=True)
    assert "Traceback" not in gone.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name):
    made = command("-m", "d2it", name, "--help")
    assert made.returncode == 0, made.stderr
    assert "usage:" in made.stdout


def test_a_command_that_is_not_there_or_not_installed(monkeypatch, capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'; there are train, sample" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "d2it.training.run", None)

    def missing(package):
        raise ModuleNotFoundError(name=package)

    monkeypatch.setattr("importlib.import_module", lambda module: missing("omegaconf"))
    assert main(["train"]) == 2
    assert "d2it train needs the package omegaconf: pip install 'd2it[train]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("d2it.studio.cli.main", lambda words: missing("gradio"))  # imported when the page is made
    assert main(["studio", "run"]) == 2
    assert "d2it studio needs the package gradio: pip install 'd2it[studio]'" in capsys.readouterr().err


def completed(script: str, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_d2it; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    made = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    return set(made.stdout.split())


def test_bash_completes_commands_options_and_settings():
    made = command("-m", "d2it", "completion", "bash")
    assert made.returncode == 0, made.stderr
    assert completed(made.stdout, "d2it", "sa") == {"sample"}
    assert completed(made.stdout, "d2it", "sample", "--gui") >= {"--guidance", "--guide", "--guidance-mode"}
    assert completed(made.stdout, "d2it", "train", "content.ste") == {"content.steps="}
    assert "imagenet256_xl" in completed(made.stdout, "d2it", "train", "--config", "image")
    assert completed(made.stdout, "d2it", "evaluate", "rec") == {"reconstruction"}
    assert command("-m", "d2it", "completion", "fish").returncode == 2


def test_configurations_by_name(tmp_path):
    made = command("-m", "d2it", "train", "--config", "imagenet256_b", "--dry-run", cwd=tmp_path)
    assert "data.path must be given" in made.stderr
    made = command("-m", "d2it", "train", "--config", "imagenet256", cwd=tmp_path)
    assert made.returncode == 2
    assert "no such configuration file: imagenet256 (by name there are demo, ffhq256_l" in made.stderr


@pytest.mark.skipif(not LIBRARY.exists(), reason="installed without C++ operators")
class TestLibrary:
    def test_loads(self):
        assert _native.why_not("neighbor_copy", "cpu") == []

    @pytest.mark.parametrize(("op", "arguments"), [("window_attention_saved", 99), ("not_yet_built", 1)])
    def test_one_of_other_sources_is_one_line(self, op, arguments, monkeypatch):
        """As after an update without `make build`: its operators are left alone, and their callers are told."""
        said = rf"_C.abi3.so was built from other sources than these \({op} differs\): build it again \(make build\)"
        monkeypatch.setitem(_native.ARGUMENTS, op, arguments)
        _native._load.cache_clear()
        try:
            with pytest.warns(UserWarning, match=said):
                (reason,) = _native.why_not("neighbor_copy", "cpu")
            assert re.search(said, reason)
        finally:
            _native._load.cache_clear()

    def test_the_table_of_its_operators_is_that_of_the_sources(self):
        text = re.sub(r'" *"', "", re.sub(r"\s+", " ", (ROOT / "csrc" / "registration.cpp").read_text()))
        found = {name: rest.count(",") + 1 for name, rest in re.findall(r'm\.def\( ?"(\w+)\((.*?)\) ->', text)}
        assert found == _native.ARGUMENTS

    def test_needs_nothing_of_torch_but_its_stable_interface(self):
        undefined = subprocess.run(
            ["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
        )
        for symbol in undefined.stdout.splitlines():
            assert "at::" not in symbol, symbol
            assert "c10::" not in symbol, symbol

    def test_has_code_for_every_gpu_generation(self):
        if _native.why_not("neighbor_copy", "cuda"):
            pytest.skip("built without nvcc")
        listing = subprocess.run([cuobjdump(), "-lelf", "-lptx", LIBRARY], capture_output=True, text=True, check=True)
        for wanted in ("sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_100.ptx"):
            assert wanted in listing.stdout


def test_the_version_is_the_same_everywhere():
    """What docs/releasing.md asks for: the package, the citation and the newest released section of the changelog."""
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released[0] == cited == d2it.__version__
