# SPDX-License-Identifier: MIT
"""What is known of one training method stands in its row: the configuration and the trainer name none."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmfast.errors import CmfastError
from cmfast_train.config.phase import Phase, phase
from cmfast_train.methods import Method, find, method, names, register, setting
from helpers import ROOT

TRAIN = ROOT / "train" / "cmfast_train"
MAY = {TRAIN / "config" / "presets.py"}  # runs, which are lists of phases


def methods_in(source: str) -> list[str]:
    """Return the names of methods among the texts of a module, "ect" or "ect.q"."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and text.partition(".")[0] in names()]


@pytest.mark.parametrize("folder", ["config", "training"])
def test_no_module_but_the_presets_names_a_method(folder: str) -> None:
    files = sorted({*(TRAIN / folder).glob("*.py")} - MAY)
    assert len(files) > 5
    assert {file.name: found for file in files if (found := methods_in(file.read_text()))} == {}


def test_a_name_is_seen() -> None:
    assert methods_in('if phase.method in ("mf", *others): set("ect.q", "ectoplasm")') == ["mf", "ect.q"]
    assert methods_in((TRAIN / "config" / "presets.py").read_text())


def test_the_table_needs_no_torch() -> None:
    code = "import sys, cmfast_train.methods; cmfast_train.methods.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyper:
    speed: float = setting(1.0, "how fast", above=0)


def row(**values: Any) -> Method[Any]:
    return Method(**{"name": "mine", "paper": "none", "step": f"{__name__}:step", "hyper": Hyper, **values})


@pytest.fixture(autouse=True)
def table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "ROWS", dict(method.ROWS))


def test_a_registered_row_makes_phases() -> None:
    register(row())
    register(find("mine"))
    assert "mine" in names()
    assert phase("mine", 8, speed=2.0, lr=0.5) == Phase(method="mine", images=8, lr=0.5, hyper=Hyper(speed=2.0))


def test_the_command_lists_every_method_also_registered_ones(call: Callable[..., Any]) -> None:
    from cmfast_train.cli import train

    register(row(distils=("diffusion",)))
    listed = call(train.command, "--methods").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(names())
    assert [line.split()[0] for line in listed if "needs a teacher" in line] == [
        "cd",
        "cmt",
        "sid",
        "pd",
        "scd",
        "mine",
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    speed: Path = Path()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    lr: float = 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "ect"}, "a method ect exists already"),
        ({"name": "my method"}, "must be a Python identifier, got 'my method'"),
        ({"hyper": Unreadable}, r"mine.speed: a hyperparameter must be of int, float, str, bool, .*, got Path"),
        ({"hyper": Taken}, "every phase has a field lr"),
        ({"hyper": dict}, "mine: hyper must be a frozen dataclass"),
    ],
)
def test_a_row_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        register(row(**values))


def test_a_step_function_that_is_not_there_is_named() -> None:
    for place in ("no_such_module:step", "json:no_such_function"):
        with pytest.raises(CmfastError, match=f"mine names {place} as its step function"):
            row(step=place).function()
    assert row(step="json:dumps").function() is not None
