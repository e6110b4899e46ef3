# SPDX-License-Identifier: MIT
"""The layout of the tests: folders that stay small, and no test module that imports another."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from helpers import ROOT, TESTS

MODULES = sorted(path for path in TESTS.rglob("*.py") if "frozen" not in path.parts)  # frozen: old versions' own code
MOST = 14  # modules of a folder


def imported_tests(source: str) -> list[str]:
    """Return the test modules and conftest files that a module imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        found += [name for name in names if any(is_test(part) for part in name.split("."))]
    return found


def is_test(module: str) -> bool:
    return module.startswith("test_") or module in ("conftest", "tests")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_a_test_module_imports_no_other(path: Path) -> None:
    assert imported_tests(path.read_text()) == [], "move what is shared to tests/helpers, fixtures to conftest.py"


@pytest.mark.parametrize(
    "source",
    [
        "from test_loop import TINY",
        "import test_loop",
        "def f():\n    from tests.training.loop.test_loop import TINY",
        "from tests.training import loop",
        "from conftest import OPTIONAL",
        "from .test_loop import TINY",
        "from . import test_loop",
    ],
)
def test_such_an_import_is_seen(source: str) -> None:
    assert imported_tests(source)


def test_no_folder_of_tests_has_more_than_14_modules() -> None:
    counts = Counter(path.parent.relative_to(TESTS).as_posix() for path in MODULES)
    assert {folder: count for folder, count in counts.items() if count > MOST} == {}
    assert counts["."] == 1, "a test stands in the folder of what it tests, promises across packages in promises"


def test_names_of_test_modules_are_unique() -> None:
    """Lists name a test file by its last part alone, in conftest.py and on the command line."""
    counts = Counter(path.name for path in MODULES if path.name.startswith("test_"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_c_or_cpp_file_has_more_than_400_lines() -> None:
    folders = ("cmfast/include", "cmfast/src", "tests/cpp", "examples")
    files = [
        path for folder in folders for kind in ("*.h", "*.hpp", "*.c", "*.cpp") for path in (ROOT / folder).rglob(kind)
    ]
    assert len(files) > 15
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_quick_runs_tests_that_exist() -> None:
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    told = subprocess.run(["make", "-n", "quick"], capture_output=True, text=True, check=True, cwd=ROOT, env=alone)
    words = shlex.split(told.stdout.splitlines()[-1])
    chosen = [word for word in words if word.startswith("tests/")]
    assert len(chosen) > 10
    for word in chosen:
        path, _, test = word.partition("::")
        assert (ROOT / path).exists(), word
        assert not test or f"def {test.partition('[')[0]}(" in (ROOT / path).read_text(), word
