"""The shape of the source tree: who may import whom, who prints, which words stay where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "polytask"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = [
    {"types", "errors", "config", "files", "seeding", "progress", "parallel", "allocator", "pickles"},
    {"metrics", "losses", "tasks", "data", "backbones"},
    {"adapters", "necks", "heads"},
    {"model"},
    {"balancers", "optim", "phases", "meta"},
    {"recipe"},
    {
        "engine",
        "cost",
        "runs",
        "predict",
        "convert",
        "comparison",
        "deltam",
        "logs",
        "report",
        "tables",
        "charts",
        "viz",
        "catalog",
        "study",
    },
    {"parser", "cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAX_LINES = 350
HOMES = {
    "mtlora": {
        "adapters/mtlora.py", "adapters/__init__.py", "convert/mtlora.py", "convert/mtlora_settings.py",
        "convert/mtlora_shapes.py", "convert/__init__.py", "__init__.py",
    },
    "mlore": {
        "necks/mlore.py", "necks/merged_experts.py", "necks/__init__.py", "convert/mlore.py",
        "convert/mlore_shapes.py", "convert/__init__.py",
    },
}  # fmt: skip
"""A technique, the lists that register it and its converter, that converter, and the public names."""

files = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))


def relative(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def unit(file: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name."""
    first = file.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Parts of the package a file imports, at any depth of the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "polytask" and len(pieces) > 1 and not pieces[1].startswith("__"):
                yield pieces[1]


@files
def test_imports_point_down(file: Path) -> None:
    own = unit(file)
    if own == "__init__":  # lists the public names of all layers
        return
    assert own in RANK, f"say in LAYERS where {own} belongs"
    upward = {name for name in imported(ast.parse(file.read_text())) if RANK[name] > RANK[own]}
    assert not upward, f"{relative(file)} imports from above: {upward}"


@files
def test_only_the_command_line_prints(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert relative(file) == "cli.py" or not prints, f"print in lines {prints}"


@files
def test_length(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def words(tree: ast.AST) -> Iterator[str]:
    """Identifiers and strings of the code, docstrings left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, name, None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("technique", HOMES)
@files
def test_a_technique_is_named_at_home_only(file: Path, technique: str) -> None:
    if relative(file) in HOMES[technique]:
        return
    # after a slash it is the name of a recipe or a run, as in the examples of the command line
    name = re.compile(rf"(?<!/){technique}", re.IGNORECASE)
    found = [word for word in words(ast.parse(file.read_text())) if name.search(word)]
    assert not found, f"{relative(file)} knows about one technique: {found}"


def test_homes_exist() -> None:
    assert {relative(file) for file in FILES} >= set().union(*HOMES.values())
    assert {unit(file) for file in FILES} - {"__init__"} == set(RANK)
