# SPDX-License-Identifier: MIT
"""Encoders in files of their own: what the two files compute together, and what does not belong together."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import cmfast
from cmfast.cli import info
from cmfast.cli import sample as sample_command
from cmfast.conditions import Condition
from cmfast.errors import ArtifactError, CheckFailed, CmfastError
from cmfast.formats.manifest import Manifest
from cmfast_export import apart, cli, export_onnx
from cmfast_export.apart import EncoderFile
from cmfast_export.pipeline import Exported
from cmfast_export.verify import Parity, Row
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import wrap
from helpers.own_networks import CASES

SIGMAS = (80.0, 5.0, 0.8)


class Encoder(nn.Module):
    """A sequence of any length as five numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 5, 3, padding=1)
        nn.init.normal_(self.layer.weight)

    def forward(self, sequence: Tensor) -> Tensor:
        return torch.tanh(self.layer(sequence)).mean(-1)


def policy() -> Denoiser:
    """Return a model of actions [8, 4] from a sequence [2, any], whose encoder is a module of its own."""
    case = CASES["1-D U-Net of a vector"]
    return wrap(
        case.net(), shape=case.shape, conditions={"state": (2, None)}, encoders={"state": Encoder()},
        scaling="edm", c_noise="ln/4",
    )  # fmt: skip


class Files(NamedTuple):
    exported: Exported
    whole: Path  # one graph
    model: Path
    encoder: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, denoiser = tmp_path_factory.mktemp("policy"), policy()
    model, encoder, whole = (folder / f"{name}.onnx" for name in ("policy", "policy_encoder", "whole"))
    exported = export_onnx(denoiser, model, kind="sampler", sigmas=SIGMAS, encoder=encoder)
    export_onnx(denoiser, whole, kind="sampler", sigmas=SIGMAS)
    assert denoiser.training, "the export looks at a copy"
    return Files(exported, whole, model, encoder)


def test_two_files_draw_what_one_graph_draws(files: Files) -> None:
    whole, two = cmfast.load(files.whole), cmfast.load(files.model, encoder=files.encoder)
    rng = np.random.default_rng(0)
    for n, state in ((3, rng.normal(size=(2, 11))), (3, rng.normal(size=(3, 2, 7))), (70, rng.normal(size=(70, 2, 4)))):
        want = whole.sample(n, conditions={"state": state})
        assert want.std() > 0.1
        got = two.sample(n, conditions={"state": state})
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)  # rounding: the same nodes in two files
        encoded = two.encode({"state": state})
        assert encoded["state_encoded"].shape == ((5,) if state.ndim == 2 else (n, 5))
        np.testing.assert_array_equal(two.sample(n, conditions=encoded), got)
        np.testing.assert_array_equal(cmfast.load(files.model).sample(n, conditions=encoded), got)


def test_both_files_are_verified_and_say_what_they_are(files: Files) -> None:
    exported = files.exported
    (encoder,) = exported.encoders
    assert isinstance(encoder, EncoderFile)
    assert max(exported.manifest.parity["max_abs"], encoder.manifest.parity["max_abs"]) < 1e-5
    assert {row.batch for row in encoder.parity.rows} == {1, 2, 5}
    of_model, of_encoder = cmfast.read_manifest(files.model), cmfast.read_manifest(files.encoder)
    assert of_model.encoders == {"state": of_encoder.graph_sha256}
    assert (of_encoder.kind, of_encoder.encoded) == ("encoder", Condition(name="state_encoded", shape=(5,)))
    assert [each.name for each in of_model.spec.conditions] == ["state_encoded"]
    assert of_model.source == of_encoder.source, "one set of weights"
    for manifest in (of_model, of_encoder):
        assert Manifest.from_json(manifest.to_json(), "again") == manifest
    assert of_model.selftest["values"]


def test_the_encoder_is_in_its_own_file_only_and_evaluated_once(files: Files) -> None:
    inside, outside = (Counter(node.op_type for node in onnx.load(file).graph.node) for file in files[2:])
    assert (inside["Tanh"], outside["Tanh"]) == (0, 1)
    assert inside["ConvTranspose"] == len(SIGMAS)
    model = cmfast.load(files.model, encoder=files.encoder)
    backend = model._encoders._backends["state"]
    with mock.patch.object(backend, "run", wraps=backend.run) as run:
        model.sample(130, conditions={"state": np.ones((2, 4))}, batch=50)
    assert [call.args[0]["state"].shape for call in run.call_args_list] == [(1, 2, 4)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r"needs the condition state: float32 \[B, 2, state_1\]"),
        ({"state": np.zeros((3, 4))}, r"condition state must be \[2, state_1\]"),
        ({"state": np.full((2, 4), np.nan)}, "condition state has values that are not finite"),
        ({"state": np.zeros((3, 2, 4))}, "condition state_encoded must be"),
        ({"state": "a"}, "condition state must be an array of numbers"),
        ({"state": np.zeros((2, 4)), "state_encoded": np.zeros(5)}, "state was passed twice, encoded and not"),
        ({"state": np.zeros((2, 4)), "other": 1}, "no condition 'other'"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(given: dict[str, Any], words: str, files: Files) -> None:
    with pytest.raises(CmfastError, match=words):
        cmfast.load(files.model, encoder=files.encoder).sample(2, conditions=given)


def test_files_that_do_not_belong_together_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=r"this model takes state_encoded, .* cmfast.load\(model, encoder=FILE\)"):
        cmfast.load(files.model).sample(1, conditions={"state": np.zeros((2, 4))})
    with pytest.raises(CmfastError, match="is the encoder of the condition state of another one"):
        cmfast.load(files.encoder)
    with pytest.raises(CmfastError, match="a sampler, and encoder must name the file of an encoder"):
        cmfast.load(files.model, encoder=files.whole)
    with pytest.raises(CmfastError, match="encodes state, and this model has encoders of no condition"):
        cmfast.load(files.whole, encoder=files.encoder)
    other = onnx.load(files.encoder)
    values = json.loads(other.metadata_props[0].value)
    other.metadata_props[0].value = json.dumps({**values, "graph_sha256": 64 * "0"})
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(CmfastError, match="not the encoder of state that this model was exported with"):
        cmfast.load(files.model, encoder=tmp_path / "other.onnx")
    other.metadata_props[0].value = json.dumps({name: v for name, v in values.items() if name != "encoded"})
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match="an encoder has one condition and says what it makes of it"):
        cmfast.read_manifest(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder": "m.onnx"}, "the encoder and the other file need names of their own"),
        ({"encoder": {"image": "e.onnx"}}, "has encoders of state, and each needs a file: state=FILE"),
        ({"encoder": "e.txt"}, r"must end in \.onnx"),
        ({"encoder": 3}, "encoder must be a path, or paths by the names of conditions, got 3"),
        (
            {"encoder": "e.onnx", "model": wrap(nn.Linear(3, 3), shape=(3,), scaling="edm", c_noise="ln/4")},
            "no encoder",
        ),
    ],
    ids=["same", "name", "suffix", "kind", "none"],
)
def test_what_cannot_be_written_apart_is_one_line_and_no_file(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CmfastError, match=words):
        export_onnx(options.pop("model", None) or policy(), "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_neither_file_is_written_where_one_differs(tmp_path: Path) -> None:
    with (
        mock.patch.object(
            apart, "_compare", return_value=Parity(rows=(Row(where="", batch=1, max_abs=0, mse=0),), boundary=None)
        ),
        pytest.raises(CheckFailed, match=r"the denoiser graph differs .*no file was written"),
    ):
        export_onnx(policy(), tmp_path / "m.onnx", encoder=tmp_path / "e.onnx", tolerance=1e-12)
    assert not list(tmp_path.iterdir()), "the encoder passed, and went with the other"


def test_the_commands_write_show_and_run_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made.py").write_text("import sys\nmake = sys.modules['made_for_test'].policy\n")
    monkeypatch.setitem(sys.modules, "made_for_test", sys.modules[__name__])
    result = call(cli.main, "--network", "made:make", "--kind", "sampler", "-o", "p.onnx", "--encoder", "e.onnx")
    assert result.returncode == 0, result.stderr
    assert "e.onnx: encoder of state to float32 [B, 5], float32, at most" in result.stdout
    assert "cmfast-sample p.onnx -n 16 --encoder e.onnx --condition state=state.npy -o samples.npz" in result.stdout
    np.save("state.npy", np.ones((2, 6)))
    given = ("-n", 2, "--condition", "state=state.npy", "-o", "a.npy")
    assert call(sample_command.main, "p.onnx", "--encoder", "e.onnx", *given).returncode == 0
    want = cmfast.load("p.onnx", encoder="e.onnx").sample(2, conditions={"state": np.ones((2, 6))})
    np.testing.assert_array_equal(np.load("a.npy"), want)
    assert "of state, in a file of its own" in call(info.main, "p.onnx").stdout
    assert "state_encoded float32 [B, 5]" in call(info.main, "e.onnx").stdout
    refused(call(cli.main, "p.onnx", "--encoder", "e.onnx", "--format", "engine"), "--encoder is for --format onnx")
    pytest.importorskip("tensorrt_rtx")
    refused(call(cli.main, "e.onnx", "--format", "engine"), "e.onnx: an encoder runs on the CPU from this file")
