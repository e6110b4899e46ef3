# SPDX-License-Identifier: MIT
"""Docstrings in Google style: no aligned columns anywhere, and complete sections for every name on docs/api.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import getsourcefile
from pathlib import Path

import pytest

import cmfast.errors
from helpers import ROOT

PACKAGES = ("cmfast", "train/cmfast_train", "export/cmfast_export", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ERRORS = {
    name for name, thing in vars(cmfast.errors).items() if isinstance(thing, type) and issubclass(thing, Exception)
}
COLUMN = re.compile(r"(\w+)(, \w+)* {2,}\S")
Documented = ast.FunctionDef | ast.ClassDef


def documented(tree: ast.AST) -> Iterator[Documented]:
    """Yield all functions and classes, methods too."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Documented))


def parameters(node: ast.FunctionDef) -> list[str]:
    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    every += [each for each in (node.args.vararg, node.args.kwarg) if each]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def columns(node: Documented) -> list[str]:
    """Return the lines of a docstring that describe a parameter or a field in an aligned column."""
    if isinstance(node, ast.ClassDef):
        names = {
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        }
        names.update(parameters(start) if (start := methods(node).get("__init__")) else [])
    else:
        names = set(parameters(node))
    lines = (ast.get_docstring(node) or "").splitlines()
    return [line for line in lines if (found := COLUMN.match(line)) and found[1] in names]


def lacking(node: ast.FunctionDef, text: str) -> list[str]:
    """Return the sections that a function needs and its docstring has not; one line that begins with Return is one."""
    own = list(ast.walk(node))
    raised = {
        ast.unparse(each.exc.func) for each in own if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call)
    }
    returns = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    is_property = any(ast.unparse(each) in ("property", "cached_property") for each in node.decorator_list)
    need = {
        "Args": bool(parameters(node)),
        "Returns|Yields": returns and not is_property and not (text.startswith("Return ") and not parameters(node)),
        "Raises": bool(raised & ERRORS),
    }
    return [section for section, needed in need.items() if needed and not re.search(rf"^\s*({section}):$", text, re.M)]


def on_the_page() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yield name, definition and docstring of each function, constructor and public method on docs/api.md."""
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M):
        package, _, last = name.rpartition(".")
        thing = getattr(import_module(package), last)
        tree = ast.parse(Path(getsourcefile(thing) or "").read_text(encoding="utf-8"))
        node = next(each for each in documented(tree) if each.name == thing.__name__)
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef):
            yield name, node, text
            continue
        for method, definition in methods(node).items():
            if method == "__init__":
                yield name, definition, f"{text}\n{ast.get_docstring(definition) or ''}"
            elif not method.startswith("_"):
                yield f"{name}.{method}", definition, ast.get_docstring(definition) or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_docstring_describes_its_arguments_in_aligned_columns(path: Path) -> None:
    found = {node.name: columns(node) for node in documented(ast.parse(path.read_text(encoding="utf-8")))}
    assert {name: lines for name, lines in found.items() if lines} == {}, 'write them under "Args:"'


def test_every_name_on_the_page_of_the_api_has_the_sections_that_it_needs() -> None:
    found = {name: lacking(node, text) for name, node, text in on_the_page()}
    assert len(found) > 60
    assert {name: sections for name, sections in found.items() if sections} == {}


def test_the_checks_above_can_fail() -> None:
    aligned = '"""Draw.\n\n    x      array\n    sigma  noise level\n    """'
    (node,) = ast.parse(f"def draw(x: int, sigma: float) -> int:\n    {aligned}\n    raise CmfastError('no')").body
    assert isinstance(node, ast.FunctionDef)
    assert columns(node) == ["x      array", "sigma  noise level"]
    assert lacking(node, ast.get_docstring(node) or "") == ["Args", "Returns|Yields", "Raises"]
    assert lacking(node, "Draw.\n\nArgs:\n    x: array\n\nReturns:\n    x.\n\nRaises:\n    CmfastError: always.") == []
