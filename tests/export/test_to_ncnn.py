# SPDX-License-Identifier: MIT
"""The target ncnn: what ncnn computes from the folder is what PyTorch computes, or there is no folder."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.errors import CheckFailed, CmfastError
from cmfast.formats.manifest import Manifest
from cmfast_export.cli import main
from cmfast_export.request import Request
from cmfast_export.targets.ncnn import folder as target
from cmfast_export.targets.table import find_target
from cmfast_train.wrapping import wrap
from helpers import ROOT
from helpers.own_networks import CASES

needs_ncnn = pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="needs ncnn and pnnx")
Make = Callable[..., Path]


@needs_ncnn
def test_the_loop_of_the_page_draws_what_python_draws(
    tiny_checkpoint: Make, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint(10, levels=1)
    done = call(main, model, "--format", "ncnn", "-o", "model_ncnn")
    assert done.returncode == 0, done.stderr
    assert "from PyTorch, at " in done.stdout
    folder = tmp_path / "model_ncnn"
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "model.bin", "model.param"]
    manifest = Manifest.from_json((folder / "manifest.json").read_text(), "x")
    content = (folder / "model.param").read_bytes() + (folder / "model.bin").read_bytes()
    assert manifest.graph_sha256 == hashlib.sha256(content).hexdigest()
    assert 0 < manifest.parity["max_abs"] < 1e-4
    names: dict[str, Any] = {}
    _, text = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "edge.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(text, "edge.md", "exec"), names)
    wanted = cmfast.load(model).sample_float(1, steps=2, seed=0, label=3)
    np.testing.assert_allclose(names["image"], wanted, atol=1e-4, rtol=0)  # sums in another order


def request(out: Path) -> Request:
    """Return the request of a network that is at hand, not in a file."""
    return Request(model=Path("any.pt"), out=out, target=find_target("ncnn"))


def denoiser(name: str) -> Any:
    case = CASES[name]
    return wrap(
        case.net(), shape=case.shape, conditions=case.conditions, **{"scaling": "edm", "c_noise": "ln/4", **case.more}
    )


@needs_ncnn
@pytest.mark.parametrize("name", ["1-D U-Net of a vector", "flow map"])
def test_networks_of_other_shapes_are_converted(name: str, tmp_path: Path) -> None:
    made = target.write(denoiser(name), request(tmp_path / "out"))
    assert made.parity.worst.max_abs < 1e-5
    assert [row.batch for row in made.parity.rows[-2:]] == [2, 5]


@needs_ncnn
def test_what_ncnn_has_no_layer_for_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=r"ncnn [\d.]+ has no layer for .*torch\.ge of this network"):
        target.write(denoiser("discrete times"), request(tmp_path / "out"))
    with pytest.raises(CmfastError, match="the condition tokens has sizes that vary"):
        target.write(denoiser("DiT of a sequence and a class"), request(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@needs_ncnn
def test_a_conversion_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = target._converted

    def other(*arguments: Any) -> tuple[str, bytes]:
        param, weights = real(*arguments)
        values = np.frombuffer(weights, np.float32).copy()
        values[-1] += 0.5  # the bias of the last layer
        return param, values.tobytes()

    monkeypatch.setattr(target, "_converted", other)
    with pytest.raises(CheckFailed, match=r"ncnn differs from PyTorch by .* no folder was written"):
        target.write(denoiser("mlp"), request(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_ncnn_has_no_use_for_is_refused_before_the_work(
    tiny_checkpoint: Make, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def asked(*options: str) -> Any:
        return call(main, tiny_checkpoint(), "--format", "ncnn", "-o", tmp_path / "out", *options)

    refused(asked("--precision", "fp16"), "ncnn's files are written in float32; leave --precision and --weights out")
    refused(asked("--batch", "4"), "ncnn runs one sample at a time, got --batch 4")
    refused(asked("--kind", "sampler"), "leave --kind out")
    monkeypatch.setitem(sys.modules, "ncnn", None)  # as where it is not installed
    refused(asked(), "writing ncnn's files needs ncnn, which is not installed: pip install 'cmfast[ncnn]'")


def test_blobs_get_the_names_of_inputs_and_output() -> None:
    text = (
        "7767517\n3 3\n"
        "Input                    in0                      0 1 in0\n"
        "Input                    in1                      0 1 in1\n"
        "BinaryOp                 add_0                    2 1 in0 in1 out0 0=0\n"
    )
    lines = target.named(text, ["x", "sigma"]).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["Input", "in0", "0", "1", "x"],
        ["Input", "in1", "0", "1", "sigma"],
        ["BinaryOp", "add_0", "2", "1", "x", "sigma", "denoised", "0=0"],
    ]
