"""Imports point one way. Read from the syntax tree, so that imports inside functions count too."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import ftkit

PACKAGE = Path(ftkit.__path__[0])
LAYERS = (
    "errors",
    "github",
    "console",
    "containers",
    "distributed",
    "recipe",
    "launch",
    "slurm",
    "data",
    "models",
    "methods",
    "lock",
    "runs",
    "figures",
    "run_diff",
    "evaluation",
    "training",
    "estimate",
    "fit",
    "calibration",
    "draft",
    "machine",
    "artifacts",
    "verification",
    "smoke",
    "failures",
    "commands",
    "options",
    "verbs",
    "cli",
    "__main__",
)
"""From the bottom to the top; a module imports from below only."""
ONLY_IN = {"accelerate": "ftkit.distributed", "peft": "no module", "trl": "no module"}
LIGHT = ("errors", "github", "console", "recipe", "launch", "slurm", "commands", "failures", "options", "verbs", "cli")
"""Layers that load none of HEAVY before they need it: `--help` and a wrong recipe answer at once."""
MAX_FILE, MAX_FUNCTION, MAX_UNDESCRIBED = 350, 80, 12
"""Lines of a module, of a function, and of a public function without a docstring, at most."""
HEAVY = {"torch", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "pandas", "pyarrow"}


def sources() -> dict[str, str]:
    """Module name -> source text."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    return {_module_name(path): path.read_text(encoding="utf-8") for path in files}


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, known: set[str], *, top_only: bool = False) -> set[str]:
    """Every module that `source` imports; `from package import module` is the module."""
    found: set[str] = set()
    for node in _top_level(ast.parse(source)) if top_only else ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in known} or {str(node.module)}
    return found


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """What runs at import: everything outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _top_level(child)


def layer(module: str) -> str:
    """ftkit.data.chat -> data."""
    return module.split(".")[1]


def upward_imports(modules: Mapping[str, str]) -> list[str]:
    """One line for each import that points up, or to a module beside it on the same layer's file."""
    lines = []
    for module, source in modules.items():
        for target in sorted(imports(source, set(modules))):
            if module == "ftkit" or not target.startswith("ftkit."):
                continue
            low, high = LAYERS.index(layer(module)), LAYERS.index(layer(target))
            if high > low:
                lines.append(f"{module} may not import {target}: L{low} -> L{high}")
    return lines


def cycles(modules: Mapping[str, str]) -> list[str]:
    """One line for each cycle of modules that import each other."""
    graph = {name: sorted(imports(source, set(modules)) & set(modules)) for name, source in modules.items()}
    found: set[frozenset[str]] = set()
    lines = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycle = path[path.index(name) :]
            if frozenset(cycle) not in found:
                found.add(frozenset(cycle))
                lines.append(" -> ".join([*cycle, name]))
            return
        if name in done:
            return
        for target in graph[name]:
            visit(target, [*path, name])
        done.add(name)

    done: set[str] = set()
    for name in graph:
        visit(name, [])
    return lines


def functions(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Dotted name, definition and whether it is public, of every function, methods and closures included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from functions(child, path)
            continue
        name = f"{path}.{child.name}"
        if isinstance(child, ast.FunctionDef):
            public = not isinstance(node, ast.FunctionDef) and not any(p.startswith("_") for p in name.split("."))
            yield name, child, public
        yield from functions(child, name)


def too_long(modules: Mapping[str, str]) -> list[str]:
    """One line for each module and function with more lines than they may have."""
    lines = []
    for module, source in modules.items():
        if (length := len(source.splitlines())) > MAX_FILE:
            lines.append(f"{module}: {length} lines, at most {MAX_FILE}")
        for name, function, _ in functions(ast.parse(source), module):
            if (length := _length(function)) > MAX_FUNCTION:
                lines.append(f"{name}: {length} lines, at most {MAX_FUNCTION}")
    return lines


def undescribed(modules: Mapping[str, str]) -> list[str]:
    """Public functions that are too long for their name and types alone to say what they do."""
    return [
        name
        for module, source in modules.items()
        for name, function, public in functions(ast.parse(source), module)
        if public and _length(function) > MAX_UNDESCRIBED and ast.get_docstring(function) is None
    ]


def _length(function: ast.FunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_imports_point_one_way() -> None:
    assert upward_imports(sources()) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycles(sources()) == []


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in sources() if name != "ftkit"} <= set(LAYERS)


def test_some_libraries_have_one_place() -> None:
    offenders = [
        f"{module} may not import {library}: only {ONLY_IN[library]} may"
        for module, source in sources().items()
        for library in {name.split(".")[0] for name in imports(source, set())} & ONLY_IN.keys()
        if module != ONLY_IN[library]
    ]
    assert offenders == []


def test_heavy_libraries_are_imported_where_they_are_needed() -> None:
    offenders = [
        f"{module} may not import {library} at its top"
        for module, source in sources().items()
        if module != "ftkit" and layer(module) in LIGHT
        for library in {name.split(".")[0] for name in imports(source, set(), top_only=True)} & HEAVY
    ]
    assert offenders == []


def test_package_files_are_empty() -> None:
    files = sorted(PACKAGE.rglob("__init__.py"))
    assert len(files) > 8
    assert [str(path) for path in files if path.stat().st_size] == []


def test_modules_and_functions_are_short() -> None:
    assert too_long(sources()) == []


def test_public_functions_are_described() -> None:
    assert undescribed(sources()) == []


def test_the_checks_find_offenders() -> None:
    """Each check, on modules that break its rule."""
    data = "def f():\n    from ftkit.models.load import x\n"
    places = f"L{LAYERS.index('data')} -> L{LAYERS.index('models')}"
    assert upward_imports({"ftkit.data.a": data, "ftkit.models.load": ""}) == [
        f"ftkit.data.a may not import ftkit.models.load: {places}"
    ]
    assert upward_imports({"ftkit.data.a": "from ftkit.recipe import load", "ftkit.recipe.load": ""}) == []
    ring = {"ftkit.data.a": "import ftkit.data.b", "ftkit.data.b": "from ftkit.data import c", "ftkit.data.c": ""}
    assert cycles(ring) == []
    ring["ftkit.data.c"] = "def f():\n    from ftkit.data.a import g\n"
    assert cycles(ring) == ["ftkit.data.a -> ftkit.data.b -> ftkit.data.c -> ftkit.data.a"]
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
    assert "torch" not in imports(lazy, set(), top_only=True)
    assert "torch" in imports("try:\n    import torch\nfinally:\n    pass\n", set(), top_only=True)
    body = "    x = 1\n"
    assert too_long({"ftkit.a": "x = 1\n" * 351}) == ["ftkit.a: 351 lines, at most 350"]
    assert too_long({"ftkit.a": "class A:\n  def f():\n" + body * 80}) == ["ftkit.a.A.f: 81 lines, at most 80"]
    assert too_long({"ftkit.a": "def f():\n" + body * 79}) == []
    assert undescribed({"ftkit.a": "def f():\n" + body * 12}) == ["ftkit.a.f"]
    assert undescribed({"ftkit.a": "class A:\n  def f():\n" + body * 12}) == ["ftkit.a.A.f"]
    assert undescribed({"ftkit.a": "def f():\n" + body * 11}) == []
    assert undescribed({"ftkit.a": "def _f():\n" + body * 12}) == []
    assert undescribed({"ftkit.a": 'def f():\n    "What."\n' + body * 12}) == []


MODULES = sorted(module.name for module in pkgutil.walk_packages(ftkit.__path__, "ftkit."))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_light_modules_load_no_heavy_library() -> None:
    """The syntax tree does not see what an import brings along: ask a fresh interpreter."""
    light = [name for name in MODULES if layer(name) in LIGHT]
    assert "ftkit.cli" in light
    script = f"import sys\nfor name in {light}: __import__(name)\nprint(*sorted({HEAVY} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
