# SPDX-License-Identifier: MIT
"""Encoders in files of their own: what the two files compute together, and what does not belong together."""

from __future__ import annotations

import json
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
from cmfast_export import cli, export_onnx, pipeline, report
from cmfast_export._options import parse_files
from cmfast_export.encoder_files import EncoderFile
from cmfast_export.pipeline import Exported
from cmfast_export.precision_search import Choice
from cmfast_export.request import make_request
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import wrap
from helpers.own_networks import CASES, Mlp

SIGMAS = (80.0, 5.0, 0.8)


class Tokens(nn.Module):
    """A sequence [any, 3] as one half as long, [any, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(3, 8, 4, stride=2, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(tokens.transpose(1, 2))).transpose(1, 2)


class Net(nn.Module):
    """Three conditions: a sequence and a class that are encoded first, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.state, self.query = Mlp(6), nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 8)
        self.leave = nn.Linear(8, 6)

    def forward(self, x: Tensor, c_noise: Tensor, tokens: Tensor, label: Tensor, state: Tensor) -> Tensor:
        h = self.body(x, c_noise) + self.label(label) + self.state(state)
        weights = (tokens @ self.query(h)[:, :, None]).softmax(1)
        result: Tensor = self.leave((weights * tokens).sum(1)) + h
        return result


def policy() -> Denoiser:
    """Return a model two of whose conditions have encoders; every weight is random."""
    encoders = {"tokens": Tokens(), "label": nn.Embedding(5, 4)}
    denoiser = wrap(
        Net(), shape=(6,), conditions={"tokens": (None, 3), "label": 5, "state": (2,)}, encoders=encoders,
        scaling="edm", c_noise="ln/4",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in denoiser.parameters():
            nn.init.normal_(weight, std=0.3)
    return denoiser


def of_one_encoder() -> Denoiser:
    case = CASES["1-D U-Net of a vector"]
    return wrap(
        case.net(), shape=case.shape, conditions={"state": (2,)}, encoders={"state": nn.Linear(2, 5)}, scaling="edm",
        c_noise="ln/4",
    )  # fmt: skip


class Files(NamedTuple):
    exported: Exported
    whole: Path  # one graph
    model: Path
    tokens: Path
    label: Path

    @property
    def encoders(self) -> list[Path]:
        return [self.label, self.tokens]  # in any order


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, denoiser = tmp_path_factory.mktemp("policy"), policy()
    whole, model, tokens, label = (folder / f"{name}.onnx" for name in ("whole", "policy", "tokens", "label"))
    encoders = {"tokens": tokens, "label": label}
    exported = export_onnx(denoiser, model, kind="sampler", sigmas=SIGMAS, encoder=encoders)
    export_onnx(denoiser, whole, kind="sampler", sigmas=SIGMAS)
    assert denoiser.training, "the export looks at a copy"
    return Files(exported, whole, model, tokens, label)


RNG = np.random.default_rng(0)
GIVEN: dict[str, Any] = {"tokens": RNG.normal(size=(10, 3)), "label": 3, "state": np.ones(2)}


@pytest.mark.parametrize(
    ("n", "given", "lengths"),
    [
        (3, {}, ((5, 8), (4,))),
        (3, {"tokens": RNG.normal(size=(3, 6, 3)), "label": [1, 2, 3]}, ((3, 3, 8), (3, 4))),
        (70, {"tokens": RNG.normal(size=(70, 4, 3)), "label": np.arange(70) % 5}, ((70, 2, 8), (70, 4))),
    ],
    ids=["one for all", "one each", "more than are encoded at a time"],
)
def test_files_apart_draw_what_one_graph_draws(n: int, given: dict[str, Any], lengths: Any, files: Files) -> None:
    whole, two = cmfast.load(files.whole), cmfast.load(files.model, encoder=files.encoders)
    conditions = {**GIVEN, **given}
    want = whole.sample(n, conditions=conditions)
    assert want.std() > 0.1
    got = two.sample(n, conditions=conditions)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)  # rounding: the same nodes in several files
    encoded = two.encode(conditions)
    assert (encoded["tokens_encoded"].shape, encoded["label_encoded"].shape) == lengths
    np.testing.assert_array_equal(two.sample(n, conditions=encoded), got)
    np.testing.assert_array_equal(cmfast.load(files.model).sample(n, conditions=encoded), got)


def test_every_file_is_verified_and_says_what_it_is(files: Files) -> None:
    exported = files.exported
    for encoder in exported.encoders:
        assert isinstance(encoder, EncoderFile)
        assert max(exported.manifest.parity["max_abs"], encoder.manifest.parity["max_abs"]) < 1e-5
        assert {row.batch for row in encoder.parity.rows} == {1, 2, 5}
    model, tokens, label = (cmfast.read_manifest(file) for file in files[2:])
    assert model.encoders == {"tokens": tokens.graph_sha256, "label": label.graph_sha256}
    assert (tokens.kind, tokens.encoded) == ("encoder", Condition(name="tokens_encoded", shape=("tokens_encoded_1", 8)))
    assert label.encoded == Condition(name="label_encoded", shape=(4,))
    assert [each.name for each in model.spec.conditions] == ["tokens_encoded", "label_encoded", "state"]
    assert model.source == tokens.source == label.source, "one set of weights"
    for manifest in (model, tokens, label):
        assert Manifest.from_json(manifest.to_json(), "again") == manifest
    assert model.selftest["values"]


def test_an_encoder_is_in_its_own_file_only_and_evaluated_once(files: Files) -> None:
    inside, outside = (
        Counter(node.op_type for node in onnx.load(file).graph.node) for file in (files.model, files.tokens)
    )
    assert (inside["Conv"], outside["Conv"], inside["Softmax"]) == (0, 1, len(SIGMAS))
    model = cmfast.load(files.model, encoder=files.encoders)
    backend = model._encoders._backends["tokens"]
    with mock.patch.object(backend, "run", wraps=backend.run) as run:
        model.sample(130, conditions=GIVEN, batch=50)
    assert [call.args[0]["tokens"].shape for call in run.call_args_list] == [(1, 10, 3)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": None}, "this model needs the condition tokens"),
        ({"label": 7}, "label 7 is out of range"),
        ({"tokens": np.zeros((3, 4))}, r"condition tokens must be \[tokens_0, 3\]"),
        ({"tokens": np.full((2, 3), np.nan)}, "condition tokens has values that are not finite"),
        ({"tokens": np.zeros((3, 2, 3))}, "condition tokens_encoded must be"),
        ({"tokens": "a"}, "condition tokens must be an array of numbers"),
        ({"label_encoded": np.zeros(4)}, "label was passed twice, encoded and not"),
        ({"other": 1}, "no condition 'other'"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(given: dict[str, Any], words: str, files: Files) -> None:
    with pytest.raises(CmfastError, match=words):
        cmfast.load(files.model, encoder=files.encoders).sample(2, conditions={**GIVEN, **given})


def test_encoders_are_named_by_their_conditions_as_an_export_names_them(files: Files) -> None:
    by_name = cmfast.load(files.model, encoder={"label": files.label, "tokens": files.tokens})
    want = cmfast.load(files.model, encoder=files.encoders).sample(2, conditions=GIVEN)
    np.testing.assert_array_equal(by_name.sample(2, conditions=GIVEN), want)
    for encoder, words in (({"label": files.tokens}, "the encoder of tokens, not of label"), (3, "encoder must be a")):
        with pytest.raises(CmfastError, match=words):
            cmfast.load(files.model, encoder=encoder)  # type: ignore[arg-type]


def test_files_that_do_not_belong_together_are_refused(files: Files, tmp_path: Path) -> None:
    without = {name: value for name, value in GIVEN.items() if name != "tokens"}
    with pytest.raises(CmfastError, match=r"needs the condition tokens: float32 \[B, tokens_0, 3\]"):
        cmfast.load(files.model, encoder=files.encoders).sample(1, conditions=without)
    with pytest.raises(CmfastError, match=r"this model takes label_encoded, .* cmfast.load\(model, encoder=FILE\)"):
        cmfast.load(files.model, encoder=files.tokens).sample(1, conditions=GIVEN)
    with pytest.raises(CmfastError, match="is the encoder of the condition label of another one"):
        cmfast.load(files.label)
    with pytest.raises(CmfastError, match="a sampler, and encoder must name the file of an encoder"):
        cmfast.load(files.model, encoder=files.whole)
    with pytest.raises(CmfastError, match="encodes label, and this model has encoders of no condition"):
        cmfast.load(files.whole, encoder=files.label)
    other = onnx.load(files.label)
    values = json.loads(other.metadata_props[0].value)
    other.metadata_props[0].value = json.dumps({**values, "graph_sha256": 64 * "0"})
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(CmfastError, match="not the encoder of label that this model was exported with"):
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
        ({"encoder": "e.onnx", "model": policy()}, "has encoders of tokens, label, and each needs a file"),
        (
            {"encoder": "e.onnx", "model": wrap(nn.Linear(3, 3), shape=(3,), scaling="edm", c_noise="ln/4")},
            "no encoder",
        ),
    ],
    ids=["same", "name", "suffix", "kind", "two", "none"],
)
def test_what_cannot_be_written_apart_is_one_line_and_no_file(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CmfastError, match=words):
        export_onnx(options.pop("model", None) or of_one_encoder(), "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_guidance_without_an_encoded_condition_is_refused_because_nothing_has_to_be_encoded(tmp_path: Path) -> None:
    model = of_one_encoder()
    for null in ({"state": 0.0}, {"state_encoded": 0.0}):
        with pytest.raises(CmfastError, match=r"guidance without the condition state.* export one graph"):
            export_onnx(
                model, tmp_path / "m.onnx", kind="sampler", steps=1, guidance=2.0, null=null,
                encoder=tmp_path / "e.onnx",
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_class_that_is_encoded_is_sampled_by_the_command(
    files: Files, tmp_path: Path, call: Callable[..., Any]
) -> None:
    for name in ("tokens", "state"):
        np.save(tmp_path / f"{name}.npy", GIVEN[name])
    given = [f"--condition={name}={tmp_path / name}.npy" for name in ("tokens", "state")]
    encoders = [f"--encoder={file}" for file in files.encoders]
    out = tmp_path / "a.npz"
    made = call(sample_command.main, files.model, *encoders, *given, "--label", 3, "-n", 2, "-o", out)
    assert (made.returncode, made.stderr) == (0, "")
    with np.load(out) as drawn:
        assert drawn["arr_0"].shape == (2, 6)


def test_an_encoder_is_not_written_where_the_other_file_fails(tmp_path: Path) -> None:
    with (
        mock.patch.object(pipeline, "_denoiser_graph", side_effect=CheckFailed("another")),
        pytest.raises(CheckFailed, match="another"),
    ):
        export_onnx(of_one_encoder(), tmp_path / "m.onnx", encoder=tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_asks_for_encoders_apart_and_says_what_to_type_next(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    request = make_request(
        model=None, network="made:make", kind="sampler", sigmas=SIGMAS, encoder=("tokens=t.onnx", "label=l.onnx")
    )
    assert request.graph
    assert request.graph.encoders == {"tokens": Path("t.onnx"), "label": Path("l.onnx")}
    assert parse_files("--encoder", ["a=b/c.onnx", "./x=y.onnx"]) == {"a": Path("b/c.onnx"), "": Path("./x=y.onnx")}
    report.onnx(Choice(exported=files.exported, precision="fp32", tried=(), timed=""), request)
    printed = capsys.readouterr().out
    assert f"{files.tokens}: encoder of tokens to float32 [B, tokens_encoded_1, 8], float32, at most" in printed
    assert f"--encoder {files.tokens} --encoder {files.label} --condition tokens=tokens.npy" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--network", "made:make", "--encoder", "e.onnx", "--format", "engine"), "--encoder is for --format onnx"),
        (("model.onnx", "--encoder", "e.onnx"), "--encoder is for --format onnx and --network"),
        (
            ("--network", "made:make", "--encoder", "a=b", "--encoder", "a=c"),
            "--encoder a=c: expected FILE, or NAME",
        ),
        (("--network", "made:make", "--encoder", ""), "--encoder : expected FILE"),
    ],
    ids=["engine", "exported", "twice", "empty"],
)
def test_a_wrong_option_is_one_line(
    arguments: tuple[str, ...], words: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Any], refused: Callable[..., None],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(files.model.read_bytes())
    refused(call(cli.main, *arguments), words)


def test_the_commands_run_and_show_files_apart(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Any],
    refused: Callable[..., None],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", GIVEN["tokens"])
    given = ("--condition", "tokens=tokens.npy", "--condition", "state=1,1", "--label", 3, "-n", 2, "-o", "a.npy")
    encoders = [text for file in files.encoders for text in ("--encoder", file)]
    result = call(sample_command.main, files.model, *encoders, *given)
    assert result.returncode == 0, result.stderr
    want = cmfast.load(files.model, encoder=files.encoders).sample(2, conditions=GIVEN)
    np.testing.assert_array_equal(np.load("a.npy"), want)
    refused(
        call(sample_command.main, files.model, *given),
        "--condition tokens: the model takes it encoded; add --encoder FILE",
    )
    assert "of label, in a file of its own" in call(info.main, files.model).stdout
    assert "tokens_encoded float32 [B, tokens_encoded_1, 8]" in call(info.main, files.tokens).stdout
    pytest.importorskip("tensorrt_rtx")
    refused(call(cli.main, files.label, "--format", "engine", "-o", "l.engine"), "an encoder runs on the CPU from")
