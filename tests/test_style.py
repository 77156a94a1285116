"""House numbers, held: file and function sizes, docstrings, and words that must not appear."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CODE = sorted(
    path
    for folder in ("src", "tests", "tools", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__).resolve()  # this file has to name what it bans
)

MAX_FILE = 400
MAX_FUNCTION = 50

BANNED = {
    "pickle": r"\bimport (c?pickle|dill|cloudpickle)\b|\bfrom (pickle|dill|cloudpickle)\b",
    "torch.load": r"\btorch\.load\(",
    "unfinished work": r"\b(TODO|FIXME|XXX|NotImplementedError)\b",
    "a developer's path": r"(?<![\w.])/(work|opt|root|home)/\w",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def definitions(
    node: ast.AST, prefix: str = "", *, public: bool = True
) -> Iterator[tuple[str, Definition, bool]]:
    """Yield (name, node, public) for classes, functions and methods; a closure is never public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            shown = public and not child.name.startswith("_")
            yield prefix + child.name, child, shown
            inner = shown and isinstance(child, ast.ClassDef)
            yield from definitions(child, f"{prefix}{child.name}.", public=inner)
        else:
            yield from definitions(child, prefix, public=public)


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{name}: {length} lines"
        for name, node, _ in definitions(tree)
        if not isinstance(node, ast.ClassDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION
    ]


def missing_docstrings(tree: ast.Module) -> list[str]:
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for name, node, public in definitions(tree):
        overrides = any(
            getattr(decorator, "id", getattr(decorator, "attr", "")) in {"override", "overload"}
            for decorator in node.decorator_list
        )
        if public and not overrides and not ast.get_docstring(node):
            missing.append(name)
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE
    assert long_functions(ast.parse(text)) == []


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_public_names_have_docstrings(path: Path) -> None:
    assert missing_docstrings(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CODE, ids=label)
def test_banned_words(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = {why: hit[0] for why, rule in BANNED.items() if (hit := re.search(rule, text))}
    assert found == {}


def test_the_checks_can_fail() -> None:
    tree = ast.parse("class A:\n def f(self):\n" + "  x = 1\n" * MAX_FUNCTION)
    assert long_functions(tree) == [f"A.f: {MAX_FUNCTION + 1} lines"]
    assert missing_docstrings(tree) == ["the module", "A", "A.f"]
    banned = ["import pickle", "torch.load('x')", "raise NotImplementedError", "open('/home/me')"]
    for rule, line in zip(BANNED.values(), banned, strict=True):
        assert re.search(rule, line)
