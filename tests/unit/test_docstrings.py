"""Docstrings tell of arguments that there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def arguments(node: ast.AST) -> set[str]:
    """Of a function; of a class those of its constructor, or its fields."""
    if isinstance(node, FUNCTIONS):
        given = node.args
        extra = [each for each in (given.vararg, given.kwarg) if each is not None]
        return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *extra)}
    assert isinstance(node, ast.ClassDef)
    names = {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return names.union(
        *(arguments(part) for part in node.body if isinstance(part, FUNCTIONS) and part.name == "__init__")
    )


def described(docstring: str) -> Iterator[str]:
    """The names in the section of arguments."""
    section = re.search(r"^Args:\n((?: +\S.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    for names in re.findall(
        r"^ {4}(\*{0,2}\w+(?:, \w+)*)(?: \([^)]*\))?:", section[1] if section else "", re.MULTILINE
    ):
        yield from (name.lstrip("*") for name in names.split(", "))


def test_arguments_of_docstrings_exist():
    wrong, seen = [], 0
    for path in (path for folder in ("jaxllm", "pallas_kernels") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and "Args:" in (docstring := ast.get_docstring(node) or ""):
                there = arguments(node)
                # a protocol, or a class whose constructor another one has
                names = list(described(docstring)) if there or isinstance(node, FUNCTIONS) else []
                seen += len(names)
                wrong += [
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {name}" for name in names if name not in there
                ]
    assert seen > 500 and not wrong, "\n".join(wrong)
