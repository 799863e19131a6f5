"""What docs/architecture.md, the README and the docstrings state about the code, compared with the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from d2it import ops
from d2it.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))

# What a module may import of d2it, by the longest prefix of its own name.
SHARED = {"d2it.devices", "d2it.errors", "d2it.files", "d2it.seeds", "d2it.npz", "d2it.distributed", "d2it.pictures"}
OPS = {"d2it.ops", "d2it.kernels"}
MODELS = {*OPS, *SHARED, "d2it.nn", "d2it.models", "d2it.diffusion"}
DATA = {*OPS, *SHARED, "d2it.data"}
SAMPLING = {*MODELS, *DATA, "d2it.sampling"}
ALLOWED = {
    "d2it.kernels": {"d2it.kernels"},
    "d2it.ops": OPS,
    "d2it.nn": {*OPS, "d2it.nn"},
    "d2it.diffusion": {*OPS, *SHARED, "d2it.diffusion"},
    "d2it.models": MODELS,
    "d2it.data": DATA,
    "d2it.sampling": SAMPLING,
    "d2it.evaluation": {*SAMPLING, "d2it.evaluation"},
    "d2it.studio": {*SAMPLING, "d2it.studio"},
    "d2it.training": {*SAMPLING, "d2it.training"},
    **dict.fromkeys(SHARED, SHARED),
}


def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for path in sorted((ROOT / "d2it").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "kernels":  # a link
            found[".".join(parts).removesuffix(".__init__")] = path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        found[f"d2it.kernels.{path.stem}"] = path
    return found


MODULES = modules()


def imports(name: str, *, at_import: bool) -> set[str]:
    """The modules of d2it that module `name` imports anywhere, or (`at_import`) while it is imported itself."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                inner = [f"{child.module}.{alias.name}" for alias in child.names]
                found.update(i if i in MODULES else child.module for i in inner)
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return {i for i in found if i.split(".")[0] == "d2it"}


def layer(name: str) -> str | None:
    """The entry of ALLOWED that module `name` belongs to."""
    return next((key for key in ALLOWED if name == key or name.startswith(f"{key}.")), None)


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name)])
def test_imports_run_one_way(name: str) -> None:
    allowed = ALLOWED[str(layer(name))]
    up = {
        i
        for i in imports(name, at_import=False)
        if i != "d2it" and not any(f"{i}.".startswith(f"{a}.") for a in allowed)
    }
    assert not up, f"{name} imports {up}"


def test_no_circle_of_imports() -> None:
    graph = {name: imports(name, at_import=False) & MODULES.keys() - {name} for name in MODULES}
    # The package itself and the lists of names in __init__.py are entered by every import below them.
    graph = {
        name: {i for i in found if not name.startswith(f"{i}.")} for name, found in graph.items() if name != "d2it"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_a_circle_would_be_found() -> None:
    assert "d2it.ops" in imports("d2it.models.content", at_import=False)
    assert "d2it.sampling.pipeline" in imports("d2it.sampling", at_import=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_that_documents_name_exist(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:d2it|kernels|csrc|benchmarks|tests|docs|configs)/[\w./*<>-]+)`", text):
        if "<" not in path and "softcap" not in path:  # the example of adding_a_kernel.md
            assert list(ROOT.glob(path)), f"{document.name} names {path}"
    for path in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (document.parent / path).exists(), f"{document.name} links to {path}"
    for dotted in re.findall(r"(?<![/\w])d2it(?:\.\w+)+", text):
        if "softcap" in dotted or re.search(r"\.(json|yaml|png)$", dotted):
            continue
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if module in MODULES:
                found = importlib.import_module(module)
                for attribute in parts[cut:]:
                    found = getattr(found, attribute)
                break
        else:
            pytest.fail(f"{document.name} names {dotted}")


def test_every_equation_has_its_place() -> None:
    table = ARCHITECTURE.split("## Where an equation is")[1].split("##")[0]
    named: set[int] = set()
    for cell in re.findall(r"^\| (Eqs?\. [^|]*)\|", table, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", cell.split("3.")[0]):
            named.update(range(int(first), int(last or first) + 1))
    assert named == set(range(1, 12))


def test_an_operators_files_carry_its_name() -> None:
    listed = ARCHITECTURE.split("## Where an operator is")[1].split("\n\n")[2]
    names = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", listed))
    for name in names:
        assert (ROOT / "d2it" / "ops" / f"{name}.py").exists(), name
        benchmark = "attn" if name == "window_attention" else name
        assert (ROOT / "benchmarks" / f"{benchmark}_bench.py").exists(), name
        assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists(), name
    sources = {
        path.stem
        for folder, kinds in (("kernels", ("*.py",)), ("csrc", ("*.cpp", "*.cu")))
        for kind in kinds
        for path in (ROOT / folder).glob(kind)
    }
    # The last two are the optimiser's and a layer's, which are no operators.
    shared = {"common", "launch", "rows", "registration", "adamw", "linear"}
    assert not {s for s in sources if not s.startswith(tuple(names))} - shared
    public = {name for name in ops.__all__ if name in _dispatch._BACKENDS}
    for name in public:
        assert f"`{name.removesuffix('_qkvpacked')}`" in ARCHITECTURE, name


BACKEND_NAMES = {"Triton": "triton", "CUDA": "cuda", "C++": "cpu"}


def test_the_table_of_operators_is_the_registry() -> None:
    rows = re.findall(
        r"^\| (`\w+`[^|]*) \| [^|]* \| ([^|]*)\|$", (ROOT / "docs" / "reference" / "ops.md").read_text(), re.MULTILINE
    )
    listed = {}
    for names, backends in rows:
        for part in re.findall(r"`(\w+)`", names):
            listed[part] = {BACKEND_NAMES[b.strip()] for b in backends.split(",") if b.strip()}
    assert listed == {op: set(backends) - {"reference"} for op, backends in _dispatch._BACKENDS.items()}


@pytest.mark.parametrize("op", sorted(_dispatch._BACKENDS))
def test_a_docstring_lists_the_backends_of_its_operator(op: str) -> None:
    function = getattr(ops, op)
    if "backend" not in inspect.signature(function).parameters:
        return
    line = re.search(r"backend[^:]*: ((?:.|\n)*?)(?:\n\n|\n +\w+: )", inspect.getdoc(function) or "")
    assert line, f"{op} documents no backend"
    named = set(re.findall(r'"(\w+)"', line.group(1)))
    same_as = re.search(r"as for `(\w+)`", line.group(1))
    if same_as:
        assert set(_dispatch._BACKENDS[same_as.group(1)]) == set(_dispatch._BACKENDS[op])
    else:
        assert named == set(_dispatch._BACKENDS[op])


def test_the_reference_has_every_public_operator() -> None:
    page = (ROOT / "docs" / "reference" / "ops.md").read_text()
    listed = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert listed == set(ops.__all__) - {"reference"}
    for dotted in re.findall(r"^::: d2it\.ops\.(\S+)$", page, re.MULTILINE):
        module, _, name = dotted.rpartition(".")
        found = importlib.import_module(f"d2it.ops.{module}") if module else ops
        assert hasattr(found, name), dotted
