# SPDX-License-Identifier: MIT
"""The variant "auto": candidates are compared, timed and remembered, and the fastest runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.backends import Backend, open_backend
from cmfast.bench import fastest
from cmfast.bench.fastest import Choice, FastestBackend, Tried, remembered
from cmfast.checks import psnr_db
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, BackendError, CmfastError
from cmfast.formats.shipped import find
from cmfast.formats.table import model_sha256
from cmfast_export import cli as export
from helpers.graphs import write_denoiser

DIGITS = find("digits")


@pytest.fixture
def both() -> None:
    pytest.importorskip("openvino", reason="there is one backend only")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "SECONDS", 0.02)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CMFAST_CACHE", str(folder))
    return folder


def test_the_chosen_backend_is_the_fastest_and_draws_what_it_draws_alone(both: None) -> None:
    model = cmfast.load("digits", threads=1, variant="auto")
    images = model.sample(4, seed=3, steps=2)
    backend = model.backend
    assert isinstance(backend, FastestBackend)
    (choice,) = backend.choices.values()
    timed = [each.ms for each in choice.tried if each.ms is not None]
    assert [each.variant for each in choice.tried] == ["", "openvino", "openvino throughput"]
    assert len(timed) == 3
    best = choice.tried[choice.best]
    assert best.ms == min(timed)
    assert best.name in backend.name
    alone = cmfast.load("digits", threads=1, variant=best.variant)
    np.testing.assert_array_equal(images, alone.sample(4, seed=3, steps=2))


def test_a_lower_precision_is_tried_only_within_a_tolerance(both: None) -> None:
    strict = cmfast.load("digits", threads=1, variant="auto", tolerance_db=150)
    strict.sample(1)
    assert isinstance(strict.backend, FastestBackend)
    (choice,) = strict.backend.choices.values()
    lower = [each for each in choice.tried if each.precision]
    assert [each.precision for each in lower] == ["bf16", "fp16", "bf16", "fp16"]
    assert all(each.ms is None for each in lower)
    alone = [each for each in choice.tried if each.variant == "openvino throughput"]
    assert {each.why for each in alone} == {"for more than one image"}
    tried = [each for each in lower if each not in alone]
    assert all("dB from ONNX Runtime cpu, need 150" in each.why or "lacks on this CPU" in each.why for each in tried)
    assert strict.manifest.dtype == "float32"


class Half:
    """Another backend: a little off from the first, and too fast to lose."""

    name, batch = "Half cpu bfloat16", None

    def __init__(self, exact: Backend, off: float) -> None:
        self.manifest, self._exact, self._off = replace(exact.manifest, dtype="bfloat16"), exact, off
        self._seen: dict[bytes, Any] = {}

    def run(self, inputs: Any) -> Any:
        key = inputs["x"].tobytes()
        if key not in self._seen:
            self._seen[key] = self._exact.run(inputs) + np.float32(self._off)
        return self._seen[key]


@pytest.mark.parametrize(("off", "wins"), [(2e-3, True), (2e-2, False)])  # of a range of 2: 60 dB and 40 dB
def test_a_lower_precision_within_the_tolerance_wins_where_it_is_faster(
    off: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, *, variant: str, precision: str, **options: Any) -> Backend:
        if variant and precision != "bf16":
            raise BackendError("not on this machine")
        exact = open_backend(path, **options)
        return Half(exact, off) if precision else exact

    monkeypatch.setattr(fastest, "open_backend", opened)
    model = cmfast.load("digits", threads=1, variant="auto", tolerance_db=50)
    model.sample(1)
    assert isinstance(model.backend, FastestBackend)
    (choice,) = model.backend.choices.values()
    assert choice.tried[choice.best].precision == ("bf16" if wins else "")
    assert model.backend.name == ("Half cpu bfloat16 (auto)" if wins else "ONNX Runtime cpu (auto)")
    lower = choice.tried[[each.precision for each in choice.tried].index("bf16")]
    assert lower.psnr_db == pytest.approx(60 if wins else 40, abs=0.1)


def test_a_choice_holds_up_to_the_next_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    real = FastestBackend._measure

    def counted(self: FastestBackend, batch: int, inputs: Any) -> Choice:
        measured.append(batch)
        return real(self, batch, inputs)

    monkeypatch.setattr(FastestBackend, "_measure", counted)
    model = cmfast.load("digits", threads=1, variant="auto")
    for n in (5, 8, 6, 4, 3):
        model.sample(n)
    assert measured == [5, 4]


def test_what_was_measured_is_remembered_by_content_and_shown(
    both: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    file = tmp_path / "model.onnx"
    shutil.copyfile(DIGITS, file)
    cmfast.load(file, threads=1, variant="auto").sample(2)
    (entry,) = cache.glob("*.auto")
    (choice,) = remembered(file)
    said = call(info.main, file)
    assert f"auto         {choice}, as remembered in $CMFAST_CACHE" in said.stdout

    def never(*_: Any) -> Choice:
        raise AssertionError("it was measured again")

    # A slower one is remembered now: what runs is what is remembered.
    other = int(choice.best == 0)
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"best": other}))
    copy = tmp_path / "copy.onnx"
    shutil.copyfile(file, copy)
    with monkeypatch.context() as patched:
        patched.setattr(FastestBackend, "_measure", never)
        model = cmfast.load(copy, threads=1, variant="auto")
        model.sample(2)
        assert choice.tried[other].name in model.backend.name
        with pytest.raises(AssertionError, match="measured again"):
            cmfast.load(copy, threads=2, variant="auto").sample(2)
    entry.write_text("{")
    cmfast.load(copy, threads=1, variant="auto").sample(2)
    assert json.loads(entry.read_text())["schema"] == fastest.SCHEMA, "what is not whole is measured and written again"


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '{"schema": "cmfast-auto/2"}', '{"schema": "cmfast-auto/1", "batch": 1, "tried": [], "best": 0}',
     '{"schema": "cmfast-auto/1", "batch": 1, "tried": [{"variant": "", "precision": "", "ms": "x"}], "best": 0}',
     '{"schema": "cmfast-auto/1", "batch": 1, "tried": [{"variant": "", "precision": ""}], "best": 0}', "\x00"],
)  # fmt: skip
def test_a_damaged_entry_is_not_believed(content: str, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    name = f"{model_sha256(DIGITS)[:32]}-0{fastest.SUFFIX}"
    (cache / name).write_text(content)
    (cache / name).chmod(0o600)
    assert remembered(DIGITS) == []


def test_arrays_and_conditions_are_compared_too(both: None, tmp_path: Path) -> None:
    state_of_4 = [{"name": "state", "kind": "tensor", "shape": [4]}]
    file = write_denoiser(tmp_path / "policy.onnx", {"shape": [5, 3], "data": "array", "conditions": state_of_4})
    model = cmfast.load(file, threads=1, variant="auto")
    state = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    drawn = model.sample(3, conditions={"state": state})
    np.testing.assert_allclose(drawn, cmfast.load(file).sample(3, conditions={"state": state}), atol=1e-5)


def test_a_copy_in_another_process_chooses_for_itself() -> None:
    model = cmfast.load("digits", threads=1, variant="auto", tolerance_db=60)
    copy = pickle.loads(pickle.dumps(model))
    assert isinstance(copy.backend, FastestBackend)
    assert copy.backend._tolerance == 60


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    shutil.copyfile(DIGITS, file)
    model = cmfast.load(file, threads=1, variant="auto")
    file.write_bytes(file.read_bytes() + b"\x00")
    with pytest.raises(ArtifactError, match="changed since it was opened"):
        model.sample(1)


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("digits", {"variant": "auto", "precision": "bf16"}, "chooses the precision by tolerance_db; leave bf16 out"),
        ("digits", {"variant": "openvino", "tolerance_db": 50}, "tolerance_db is for the variant \"auto\""),
        ("digits", {"tolerance_db": 50}, "tolerance_db is for the variant \"auto\""),
        ("digits", {"variant": "auto", "tolerance_db": -1}, "must be a number above 0"),
        ("digits", {"variant": "auto", "tolerance_db": float("nan")}, "must be a number above 0"),
        ("digits", {"variant": "auto", "tolerance_db": "50"}, "must be a number above 0, such as 50, got '50'"),
        ("digits", {"variant": "auto", "device": "cuda"}, "chooses among backends on a CPU, not on cuda"),
        ("digits", {"variant": "auto openvino"}, "variant must be one of"),
        ("none.onnx", {"variant": "auto"}, "no such file"),
        (7, {"variant": "auto"}, "opened by its path"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(path: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError) as raised:
        cmfast.load(path, **options)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_shards_name_their_backend(call: Any, tmp_path: Path) -> None:
    said = call(sample.main, "digits", "--variant", "auto", "--shard", 8, "-o", tmp_path / "folder")
    assert said.returncode == 2
    assert "name the backend instead of auto" in said.stderr


def test_a_checkpoint_has_nothing_to_choose_from(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(BackendError, match=r"for \.onnx and \.xml files"):
        cmfast.load(tmp_path / "model.pt", variant="auto")


@pytest.mark.parametrize("levels", [[[1, 2], [3, 3]], [[1, 2, 3, 1, 2, 3, 1, 2]]])
def test_the_noise_level_that_is_worst_counts_however_many_share_a_batch(levels: list[list[float]]) -> None:
    probes = [{"sigma": np.array(each, np.float32)} for each in levels]
    expected = [np.zeros((len(each), 1, 4, 4), np.float32) for each in levels]
    got = [np.where(np.array(each) == 3, 0.02, 0.0002)[:, None, None, None] + np.zeros((1, 4, 4)) for each in levels]
    assert fastest._worst_db(got, expected, probes, image=True) == pytest.approx(40, abs=0.01)  # 2 / 0.02
    assert fastest._worst_db(got[:1], expected[:1], [{}], image=True) > 40


def test_psnr_has_the_range_of_images_or_of_the_data() -> None:
    want = [np.zeros((2, 3), np.float32), np.full((2, 3), 4, np.float32)]
    got = [each + np.float32(0.02) for each in want]
    assert psnr_db(got, want, image=True) == pytest.approx(40, abs=1e-3)  # 2 / 0.02
    assert psnr_db(got, want, image=False) == pytest.approx(20 * np.log10(200), abs=1e-3)  # 4 / 0.02
    assert psnr_db(want, want, image=True) == 200
    assert psnr_db([want[0] * np.nan], want[:1], image=True) == -np.inf


def test_a_candidate_that_fails_is_left_out_with_its_reason(both: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmfast.backends.openvino.backend import OpenVinoBackend

    def failing(*_: Any) -> Any:
        raise BackendError("it does not run")

    monkeypatch.setattr(OpenVinoBackend, "run", failing)
    model = cmfast.load("digits", threads=1, variant="auto")
    model.sample(1)
    assert isinstance(model.backend, FastestBackend)
    (choice,) = model.backend.choices.values()
    assert choice.best == 0
    assert choice.tried[1] == replace(Tried("openvino", ""), name="OpenVINO cpu", why="it does not run")
    assert "it does not run" in str(choice)


@pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="needs ncnn and pnnx")
def test_the_folder_for_ncnn_beside_the_file_is_tried(
    tiny_checkpoint: Any, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(10, levels=1)
    for out in ("model.onnx", "model_ncnn"):
        done = call(export.main, model, "-o", tmp_path / out, *(("--format", "ncnn") if out == "model_ncnn" else ()))
        assert done.returncode == 0, done.stderr
    file = tmp_path / "model.onnx"

    def tried() -> Tried:
        opened = cmfast.load(file, threads=1, variant="auto")
        opened.sample(1, label=1)
        assert isinstance(opened.backend, FastestBackend)
        (choice,) = opened.backend.choices.values()
        assert choice.tried[-1].variant == "ncnn"
        return choice.tried[-1]

    found = tried()
    assert found.name == "ncnn cpu"
    assert found.ms is not None
    assert found.psnr_db is not None
    assert found.psnr_db > 100
    # Weights of another training of the same network: whole files, and not what the .onnx file computes.
    folder = tmp_path / "model_ncnn"
    weights = np.fromfile(folder / "model.bin", np.uint8)
    values = weights[: len(weights) // 4 * 4].view(np.float32)
    values[-1] += 0.5
    weights.tofile(folder / "model.bin")
    sha256 = hashlib.sha256((folder / "model.param").read_bytes() + weights.tobytes()).hexdigest()
    about = json.loads((folder / "manifest.json").read_text()) | {"graph_sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(about))
    assert "dB from ONNX Runtime cpu, need 80" in tried().why
    (folder / "model.bin").write_bytes(b"")
    assert "one of the files is of another export, or damaged" in tried().why
    monkeypatch.setenv("CMFAST_CACHE", str(tmp_path / "cache"))
    (folder / "model.bin").unlink()
    assert "'model.bin', which is not beside it" in tried().why
    weights.tofile(folder / "model.bin")
    for other in ({"source": {"sha256": "0" * 64}}, {"sigma_max": 70.0, "sigmas": {"1": [70.0]}}):
        (folder / "manifest.json").write_text(json.dumps(about | other))
        assert "another model than model.onnx, by its manifest" in tried().why
