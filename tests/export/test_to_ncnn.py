# SPDX-License-Identifier: MIT
"""The target ncnn: what ncnn computes from the folder is what PyTorch computes, or there is no folder."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import CheckFailed, CmfastError
from cmfast.formats.manifest import Input, Manifest
from cmfast.formats.ncnn_folder import NcnnFiles
from cmfast_export.cli import main
from cmfast_export.request import Request
from cmfast_export.targets.ncnn import folder as target
from cmfast_export.targets.table import find_target
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.wrapping import wrap
from helpers import ROOT
from helpers.own_networks import CASES
from helpers.specs import image_spec

needs_ncnn = pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="needs ncnn and pnnx")
Make = Callable[..., Path]


@needs_ncnn
def test_the_loop_of_the_page_draws_what_python_draws(
    tiny_checkpoint: Make, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
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
    by_cmfast = cmfast.load("model_ncnn", threads=2)
    assert by_cmfast.backend.name == "ncnn cpu"
    of_three = by_cmfast.sample_float(3, steps=2, seed=0, label=3)
    np.testing.assert_array_equal(of_three[:1], by_cmfast.sample_float(1, steps=2, seed=0, label=3))
    names: dict[str, Any] = {}
    _, text = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "edge.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(text, "edge.md", "exec"), names)
    wanted = cmfast.load(model).sample_float(1, steps=2, seed=0, label=3)
    np.testing.assert_allclose(names["image"], wanted, atol=1e-4, rtol=0)  # sums in another order
    np.testing.assert_allclose(of_three[:1], wanted, atol=1e-4, rtol=0)
    again = pickle.loads(pickle.dumps(by_cmfast))
    np.testing.assert_array_equal(again.sample_float(3, steps=2, seed=0, label=3), of_three)
    said = call(sample.main, "model_ncnn", "-n", "2", "--threads", "1", "-o", "grid.png")
    assert said.returncode == 0, said.stderr
    assert "ncnn cpu" in said.stdout
    checked = call(info.main, "model_ncnn", "--selftest")
    assert "self-test passed: ncnn cpu" in checked.stdout
    wrong(folder, call, refused, monkeypatch)


def wrong(
    folder: Path, call: Callable[..., Any], refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are not those of one export, and options that ncnn lacks, get one line."""

    def drawn(*options: str) -> Any:
        return call(sample.main, folder, "-n", "1", "-o", folder.parent / "none.png", *options)

    refused(drawn("--variant", "openvino"), "ncnn's files run on the CPU and have no variants; leave --variant")
    refused(drawn("--device", "cuda"), "leave --device cuda out")
    refused(drawn("--sha256", "0" * 64), "a SHA-256 is of one file, and this model has three")
    files = {name: (folder / name).read_bytes() for name in ("model.param", "model.bin", "manifest.json")}
    for name, content, words in (
        ("model.bin", files["model.bin"][:-4], "one of the files is of another export, or damaged"),
        ("model.param", files["model.param"].replace(b"Swish", b"Whisp"), "one of the files is of another export"),
        ("model.param", b"\xff" + files["model.param"], "no text of a model for ncnn"),
        ("manifest.json", b"{", "manifest.json"),
        ("manifest.json", None, "'manifest.json', which is not beside it"),
    ):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        refused(drawn(), words)
        (folder / name).write_bytes(files[name])
    manifest = Manifest.from_json(files["manifest.json"].decode(), "x")
    graph, (_, *sides) = files["model.param"], manifest.spec.shape
    layers = graph.split()[1]
    for content, about, words in (  # the digest is right: what ncnn would crash on, or run as something else
        (graph.replace(b"Swish", b"Whisp"), manifest, "has no layer for Whisp of this network"),
        (graph.replace(b"\n" + layers, b"\n3", 1), manifest, "and its second line says '3 "),
        (graph.replace(b" denoised", b" other"), manifest, "the graph has no output denoised"),
        (b"7767517\n", manifest, "a graph of 0 layers"),
        (graph, replace(manifest, spec=replace(manifest.spec, shape=(7, *sides))), "the graph's inputs are x 0="),
        (graph, replace(manifest, dtype="float16"), "ncnn's files are float32, and its manifest says float16"),
    ):
        sha256 = hashlib.sha256(content + files["model.bin"]).hexdigest()
        (folder / "model.param").write_bytes(content)
        (folder / "manifest.json").write_text(replace(about, graph_sha256=sha256, selftest={}).to_json())
        refused(drawn(), words)
    (folder / "model.param").write_bytes(graph)
    (folder / "manifest.json").write_bytes(files["manifest.json"])
    with monkeypatch.context() as during:  # as if another program wrote while it was opened
        during.setattr(NcnnFiles, "changed", True)
        refused(drawn(), "its weights were written to since they were opened")


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
    lines = target.named(
        text, [Input("x", "float32", ("batch", 3, 4, 5)), Input("sigma", "float32", ("batch",))]
    ).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["Input", "in0", "0", "1", "x", "0=5", "1=4", "2=3"],
        ["Input", "in1", "0", "1", "sigma", "0=1"],
        ["BinaryOp", "add_0", "2", "1", "x", "sigma", "denoised", "0=0"],
    ]


@needs_ncnn
def test_sizes_are_numbers_and_few_pixels_do_without_winograd(tmp_path: Path) -> None:
    config = AdmConfig(
        image_size=12, channels=1, classes=0, model_channels=32, res_blocks=1, channel_mult=(1, 1), attention=(6,),
        head_channels=16,
    )  # fmt: skip
    network = AdmUnet(config)
    randomise(network)
    spec = image_spec(image=(1, 12, 12), classes=0)
    made = target.write(Checkpoint(spec=spec, network=config, weights=network.state_dict()), request(tmp_path / "out"))
    assert made.parity.worst.max_abs < 1e-4
    rows = [line.split() for line in (tmp_path / "out" / "model.param").read_text().splitlines()[2:]]
    convolutions = [row[-1] == "31=64" for row in rows if row[0] == "Convolution"]
    assert convolutions[0] is False, "of 12x12 pixels"
    assert convolutions.count(True) > 5, "of 6x6 pixels"
    shapes = [row for row in rows if row[0] == "Reshape" and "reshape" in row[1] and "unbind" in row[1]]
    assert len(shapes) >= 3
    assert not any(word.startswith("6=") for row in shapes for word in row)
