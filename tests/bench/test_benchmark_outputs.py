# SPDX-License-Identifier: MIT
"""benchmarks/*.py: where a script writes is checked before it works for hours; what it reads is not replaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cmfast.errors import CmfastError
from helpers import BENCHMARKS

SCRIPTS: dict[str, list[str]] = {  # what each needs besides --json; DIR is a folder of the test
    "browser": ["--onnxruntime-web", "DIR"],
    "cpp_timing": [],
    "cpu_backends": [],
    "export_time": [],
    "foreign": [],
    "fuzz": ["--inputs", "13"],
    "fuzz_cpp": ["--inputs", "13"],
    "int8": ["digits", "DIR/model.pt"],
    "methods": ["--out", "DIR/runs"],
    "parity": [],
    "phases_mnist": ["--data", "DIR", "--out", "DIR/runs"],
    "policy": ["DIR/runs"],
    "precision": ["digits"],
    "ray_sampling": [],
    "restore": ["digits", "--work", "DIR/work"],
    "startup": [],
    "train_classifier": ["mnist", "--data", "DIR"],
    "trials": ["--data", "DIR", "--out", "DIR/runs"],
    "training": ["--reference", "DIR", "--data", "DIR"],
}


@pytest.fixture(autouse=True)
def scripts_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def refusal(script: str, folder: Path, *options: object) -> str:
    """Return the error of a script as its command would print it."""
    arguments = [word.replace("DIR", str(folder)) for word in SCRIPTS[script]]
    done = CliRunner().invoke(import_module(script).command, [*arguments, *map(str, options)], standalone_mode=False)
    assert isinstance(done.exception, CmfastError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_every_script_that_writes_a_record_is_here() -> None:
    writing = {file.stem for file in BENCHMARKS.glob("*.py") if '"--json"' in file.read_text()}
    assert writing - {"gpu"} == set(SCRIPTS)  # gpu.py has tests of its own


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nowhere", "read-only"])
def test_a_record_that_cannot_be_written_is_refused_before_the_work(script: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    words = {"fifo": "is a FIFO", "device": "is a device", "folder": "is a folder", "nowhere": "does not exist"}
    if kind == "fifo":
        os.mkfifo(out)
    elif kind == "device":
        out.symlink_to("/dev/null")
    elif kind == "folder":
        out.mkdir()
    elif kind == "nowhere":
        out = tmp_path / "nowhere" / "record.json"
    else:
        out = Path("/proc/record.json")
    before = sorted(tmp_path.iterdir())
    assert words.get(kind, "is not a place for files") in refusal(script, tmp_path, "--json", out)
    assert sorted(tmp_path.iterdir()) == before  # nothing was begun, either


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("startup", ["--checkpoint", "FILE", "--json", "FILE"]),
        ("startup", ["--checkpoint", "other.pt", "--onnx", "FILE", "--json", "LINK"]),
        ("precision", ["FILE", "--json", "LINK"]),
        ("training", ["--json", "FILE"]),
    ],
)
def test_what_a_script_reads_is_not_replaced_by_its_record(
    script: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "main.py" if script == "training" else tmp_path / "model.pt"
    file.write_text("precious")
    (tmp_path / "link.json").symlink_to(file)
    monkeypatch.setitem(SCRIPTS, "precision", [])
    given = [{"FILE": str(file), "LINK": str(tmp_path / "link.json")}.get(word, word) for word in options]
    assert "is read by this command, so it is not overwritten" in refusal(script, tmp_path, *given)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("script", "one", "other"), [("methods", "--json", "--plot"), ("train_classifier", "-o", "--json")]
)
def test_two_outputs_of_a_script_are_two_files(script: str, one: str, other: str, tmp_path: Path) -> None:
    name = tmp_path / "out.png"
    assert f"{one} and {other} name the same file" in refusal(script, tmp_path, one, name, other, name)


def test_a_chart_that_cannot_be_drawn_is_refused_before_the_runs(tmp_path: Path) -> None:
    assert "--plot: " in refusal("methods", tmp_path, "--plot", tmp_path / "chart.xyz")
    assert not (tmp_path / "runs").exists()


def test_the_records_of_scripts_are_written_whole(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("old")
    done: Any = CliRunner().invoke(
        import_module("fuzz").command,
        ["--reader", "plan", "--inputs", "3", "--json", str(tmp_path / "record.json")], standalone_mode=False,
    )  # fmt: skip
    assert done.exception is None
    assert '"inputs": 3' in (tmp_path / "record.json").read_text()
    assert os.listdir(tmp_path) == ["record.json"]
    assert str(BENCHMARKS) in sys.path
