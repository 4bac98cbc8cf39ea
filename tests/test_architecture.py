"""The house stays as docs/architecture.md draws it: imports go down, none in a circle, and no module grows too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from repository import ROOT

# Each floor's rooms: folders and modules of vlaft/. A room imports from floors below its own only, and from itself.
FLOORS = (
    ("cli",),
    ("demo", "release", "evaluation", "accounting", "inspection", "serving", "__init__"),
    ("training", "policy"),
    ("adapt", "environments"),
    ("model", "data"),
    ("observation", "weights", "pages"),
    ("action", "recipe", "remote"),
    ("checksums",),
    ("files",),
    ("errors", "documents", "machine", "version"),
)
MOST_FLOORS = 10
MOST_LINES = 600

Graph = Mapping[str, frozenset[str]]  # a module's dotted name to those of the modules that it imports


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of the package under `root` by their dotted names."""
    found = {}
    for path in sorted((root / "vlaft").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, name: str, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield what a module imports anywhere in it: inside functions and for type checking as well."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in known else module


def import_graph(root: Path) -> Graph:
    """Return which module of the package imports which, itself left out."""
    known = modules(root)
    return {name: frozenset(imported(path, name, known)) & known.keys() - {name} for name, path in known.items()}


def room(module: str) -> str:
    """Return the folder or module of vlaft/ that a module belongs to; `__main__`, which starts `cli`, is part of it."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "cli" if name == "__main__" else name


def upward(graph: Graph) -> list[str]:
    """Return the imports that do not lead to a lower floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if room(module) != room(target) and floor[room(module)] >= floor[room(target)]
    ]


def circle(graph: Graph) -> list[str]:
    """Return the modules of a circle of imports, in order; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def test_every_room_has_one_floor_and_there_are_few(graph: Graph) -> None:
    listed = [name for names in FLOORS for name in names]
    assert sorted(listed) == sorted({room(module) for module in graph})  # each once, none forgotten, none gone
    assert len(FLOORS) <= MOST_FLOORS


def test_imports_go_down(graph: Graph) -> None:
    assert "\n".join(upward(graph)) == ""


def test_modules_import_each_other_in_no_circle(graph: Graph) -> None:
    assert " -> ".join(circle(graph)) == ""


def test_the_package_imports_nothing_else_of_the_repository() -> None:
    beside = {path.stem for path in ROOT.iterdir() if path.name != "vlaft"} | {"tests"}
    known = modules(ROOT)
    found = [(name, target) for name, path in known.items() for target in imported(path, name, known)]
    assert [(name, target) for name, target in found if target.split(".")[0] in beside] == []


def test_no_module_is_too_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(ROOT).items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    for name in ("vlaft", "vlaft/cli", "vlaft/model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "vlaft/cli/main.py").write_text("def f():\n    from vlaft import model\n    import vlaft.cli.console\n")
    (tmp_path / "vlaft/cli/console.py").write_text("from . import main\n")
    (tmp_path / "vlaft/model/load.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..cli.console import say\n"
    )
    found = import_graph(tmp_path)
    assert found["vlaft.cli.main"] == {"vlaft.model", "vlaft.cli.console"}
    assert found["vlaft.cli.console"] == {"vlaft.cli.main"}
    assert found["vlaft.model.load"] == {"vlaft.cli.console"}
    assert upward(found) == ["vlaft.model.load imports vlaft.cli.console"]
    assert set(circle(found)) == {"vlaft.cli.main", "vlaft.cli.console"}
