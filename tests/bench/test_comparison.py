# SPDX-License-Identifier: MIT
"""`cmfast.bench` as a library: a request in, a typed record out, no command line and nothing on the terminal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
from onnx import helper

import cmfast.bench
from cmfast.bench import Record, Request, Row, compare
from cmfast.errors import CheckFailed, CmfastError
from helpers import ROOT

Factory = Callable[..., Path]


@pytest.fixture
def files(handmade_onnx: Factory, tmp_path: Path) -> tuple[Path, Path]:
    """Two files of one model."""
    copies = tmp_path / "one.onnx", tmp_path / "two.onnx"
    for path in copies:
        shutil.copy(handmade_onnx(8), path)
    return copies


def test_two_files_are_compared_from_python(
    files: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    request = Request(models=files, steps=(1, 2), batch=(4,), seconds=0.05)
    record = compare(request, said.append)
    assert isinstance(record, Record)
    assert [(row.steps, row.batch, row.contender) for row in record.rows] == [
        (steps, 4, name) for steps in (1, 2) for name in ("one.onnx", "two.onnx")
    ]
    for row in record.rows:
        assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms <= row.max_ms
        assert row.images_per_s == pytest.approx(4000 / row.median_ms)
        assert (row.reference, row.max_abs_diff, row.backend) == ("one.onnx", 0, "ONNX Runtime cpu")
    assert [(start.contender, start.first_call_ms > 0) for start in record.starts] == [
        ("one.onnx", True), ("two.onnx", True)]  # fmt: skip
    assert (record.request, record.left_out) == (request, ())
    assert said[0] == "comparing the images"
    assert "timing 2 step(s), batch 4: 2 contender(s)" in said
    assert tuple(capfd.readouterr()) == ("", ""), "a library prints nothing"

    record.save(tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [list(row) for row in saved["rows"]] == [[field.name for field in fields(Row)]] * 4
    assert [row["median_ms"] for row in saved["rows"]] == [row.median_ms for row in record.rows]
    assert saved["options"]["models"] == ["one.onnx", "two.onnx"]


def test_the_example_of_the_reference_runs(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files[0].parent
    for path, name in zip(files, ("model.onnx", "model_fp16.onnx"), strict=True):
        path.rename(folder / name)
    monkeypatch.chdir(folder)
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(source.replace("seconds=1", "seconds=0.05"), "api.md", "exec"), {})
    shown = capsys.readouterr().out
    assert re.search(r"^model_fp16\.onnx, 2 step\(s\): \d+\.\d\d ms, \d+\.\d\dx$", shown, re.MULTILINE)
    assert (folder / "bench.json").exists()


def test_a_wrong_answer_raises_and_with_keep_going_is_in_the_record(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[1])
    model.graph.initializer[0].CopyFrom(helper.make_tensor("hundredth", onnx.TensorProto.FLOAT, [], [0.02]))
    onnx.save(model, files[1])
    values = {"models": files, "steps": (1,), "batch": (1,), "seconds": 0.01, "starts": False}
    with pytest.raises(CheckFailed, match=r"two\.onnx at 1 step\(s\), batch 1 differs from one\.onnx"):
        compare(Request(**values))
    record = compare(Request(**values, keep_going=True))
    assert [row.contender for row in record.rows] == ["one.onnx"]
    assert [(left.contender, left.what) for left in record.left_out] == [("two.onnx", "images")]


def test_a_name_that_is_no_path_is_told_what_to_write(files: tuple[Path, Path]) -> None:
    with pytest.raises(CmfastError, match=r"use pathlib\.Path\('model\.onnx'\)"):
        Request(models=("model.onnx",))  # type: ignore[arg-type]
    with pytest.raises(CmfastError, match="nothing to time"):
        Request()


def test_the_library_does_not_import_the_command_line() -> None:
    modules = [f"cmfast.bench.{file.stem}" for file in (ROOT / "cmfast" / "bench").glob("[a-z]*.py")]
    assert len(modules) > 10
    code = f"import sys, {', '.join(modules)}; print('click' in sys.modules, 'cmfast.cli' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    control = subprocess.run(
        [sys.executable, "-c", f"import cmfast.cli.bench; {code}"], capture_output=True, text=True, check=True
    )
    assert control.stdout.split() == ["True", "True"]


def test_the_public_names_are_there_and_no_other() -> None:
    assert all(getattr(cmfast.bench, name) is not None for name in cmfast.bench.__all__)
    assert set(cmfast.bench.__all__) <= set(dir(cmfast.bench))
    with pytest.raises(AttributeError, match="no attribute 'comparee'"):
        cmfast.bench.comparee  # noqa: B018
