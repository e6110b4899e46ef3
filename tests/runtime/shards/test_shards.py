# SPDX-License-Identifier: MIT
"""A folder of shards: the samples of one draw, continued by what is there, refused where it is of other settings."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cmfast
from cmfast import shards
from cmfast.backends import Inputs
from cmfast.cli.sample import command, main
from cmfast.encoding import Encoders
from cmfast.errors import ArtifactError, BackendError, CmfastError, MissingDependency
from cmfast.files.locks import exclusive, lock_beside
from cmfast.formats.manifest import Manifest, file_sha256
from cmfast.formats.table import model_sha256
from cmfast.shards.drawing import SHARD, Here, ShardRequest, draw_shards, draw_together, missing
from cmfast.shards.files import FORMAT, read_shards, shard_path, write_shard
from cmfast.shards.on_ray import Worker, workers_on
from cmfast.shards.sent import How, described, files_sha256, open_model, read_model
from helpers import ROOT
from helpers.graphs import MANIFEST, write_denoiser

Call = Callable[..., Any]
LABEL = {"name": "label", "kind": "class", "classes": 10}
STATE = {"name": "state", "kind": "tensor", "shape": [3]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_denoiser(tmp_path_factory.mktemp("model") / "model.onnx", {"conditions": [LABEL]})


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def states(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


# What is drawn.


def test_shards_hold_the_samples_and_labels_of_one_draw(model: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    result = call(main, model, "-n", 10, "--steps", 2, "--seed", 7, "--batch", 2, "--shard", 4, "-o", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{out}: 3 shard(s) drawn, 0 there before: 2 step(s) at 80, 0.8, ONNX Runtime cpu\n"
    assert names(out) == [
        "samples_00000000_00000004.npz", "samples_00000004_00000008.npz", "samples_00000008_00000010.npz",
    ]  # fmt: skip
    loaded = cmfast.load(model)
    samples, labels = read_shards(out)
    np.testing.assert_array_equal(samples, loaded.sample(10, steps=2, seed=7, batch=2))
    np.testing.assert_array_equal(labels, loaded.labels(10, seed=7))
    with np.load(out / "samples_00000004_00000008.npz") as arrays:  # as evaluators of FID read it
        np.testing.assert_array_equal(arrays["arr_0"], samples[4:8])
        np.testing.assert_array_equal(arrays["arr_1"], labels[4:8])
    assert samples.std() > 10
    np.testing.assert_array_equal(read_shards(out, 5)[0], samples[:5])
    assert names(tmp_path) == ["samples"]


def test_heun_steps_and_a_later_first_sample_draw_what_the_library_draws(
    model: Path, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    options = ["--heun", 3, "--churn", 2, "--first", 6, "--label", "1,2,3,4,5"]
    assert call(main, model, "-n", 5, *options, "--shard", 4, "-o", out).returncode == 0
    assert names(out) == ["samples_00000006_00000008.npz", "samples_00000008_00000011.npz"]
    drawn = cmfast.load(model).sample_heun(5, steps=3, churn=2, first=6, label=[1, 2, 3, 4, 5])
    samples, labels = read_shards(out)
    np.testing.assert_array_equal(samples, drawn)
    assert labels is not None
    assert labels.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("rows", [1, 6])
def test_samples_that_are_no_images_have_shards_with_their_own_conditions(
    rows: int, call: Call, tmp_path: Path
) -> None:
    model = write_denoiser(tmp_path / "m.onnx", {"shape": [5], "data": "array", "conditions": [STATE]})
    state = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    state = state[0] if rows == 1 else state
    np.save(tmp_path / "state.npy", state)
    command = (
        main,
        model,
        "-n",
        6,
        "--condition",
        f"state={tmp_path / 'state.npy'}",
        "--shard",
        4,
        "-o",
        tmp_path / "s",
    )
    assert call(*command).returncode == 0
    samples, labels = read_shards(tmp_path / "s")
    assert labels is None
    np.testing.assert_array_equal(samples, cmfast.load(model).sample(6, conditions={"state": state}))
    before = states(tmp_path / "s")
    assert call(*command).returncode == 0
    np.save(tmp_path / "state.npy", state + 1)
    assert "conditions" in call(*command).stderr
    assert states(tmp_path / "s") == before


@pytest.mark.parametrize("how", [{"sigmas": (80.0, 0.8)}, {"heun": 3}])
def test_shards_can_be_drawn_into_one_array(how: dict[str, Any], model: Path) -> None:
    loaded = cmfast.load(model)
    request = ShardRequest(n=10, first=3, shard=4, seed=5, conditions={"label": 2}, **how)
    drawn = draw_together(described(read_model(model), model), request, Here(loaded))
    draw = loaded.sample_heun if "heun" in how else loaded.sample
    options = {"steps": 3} if "heun" in how else how
    np.testing.assert_array_equal(drawn, draw(10, first=3, seed=5, label=2, **options))


def test_the_shards_of_the_examples_are_whole_batches() -> None:
    """Only then do their batches begin where those of one draw do, as the quickstart says."""
    batch = next(option.default for option in command.params if option.name == "batch")
    texts = [command.epilog or "", *((ROOT / page).read_text() for page in ("docs/quickstart.md", "CHANGELOG.md"))]
    sizes = [[int(size) for size in re.findall(r"--shard ([0-9]+)", text)] for text in texts]
    assert all(sizes)
    assert [size for each in sizes for size in each if size % batch] == []
    assert SHARD % batch == 0


# What is there.


def test_the_same_command_draws_what_is_missing_and_touches_nothing_else(
    model: Path, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    command = (main, model, "-n", 10, "--shard", 4, "-o", out)
    assert call(*command).returncode == 0
    whole, before = read_shards(out)[0], states(out)
    assert call(*command).stdout == f"{out}: 0 shard(s) drawn, 3 there before: 1 step(s) at 80\n"
    assert states(out) == before
    (out / "samples_00000004_00000008.npz").unlink()
    result = call(*command)
    assert result.stdout.startswith(f"{out}: 1 shard(s) drawn, 2 there before")
    assert result.stderr == "sampling: continuing at 6 images\n"
    after = states(out)
    assert {name for name in after if after[name] != before[name]} == {"samples_00000004_00000008.npz"}
    np.testing.assert_array_equal(read_shards(out)[0], whole)


def test_more_samples_continue_a_folder_of_fewer(model: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    for number, shard in ((6, 4), (13, 4), (15, 8)):
        assert call(main, model, "-n", number, "--shard", shard, "-o", out).returncode == 0
    ends = [0, 4, 6, 8, 12, 13, 15]
    assert names(out) == [shard_path(out, range(a, b)).name for a, b in pairwise(ends)]
    np.testing.assert_array_equal(read_shards(out)[0], cmfast.load(model).sample(15))


@given(
    wanted=st.tuples(st.integers(0, 40), st.integers(1, 40)),
    have=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5),
    shard=st.integers(1, 15),
)
def test_what_is_missing_is_every_sample_that_is_not_there_once(
    wanted: tuple[int, int], have: list[tuple[int, int]], shard: int
) -> None:
    target = range(wanted[0], sum(wanted))
    there = [range(start, start + count) for start, count in have]
    parts = missing(target, there, shard)
    found = [sample for part in parts for sample in part]
    assert found == sorted(set(target) - {sample for each in there for sample in each})
    assert all(part.start // shard == (part.stop - 1) // shard for part in parts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 1], "drawn with seed 0, and this command draws with seed 1; name another folder"),
        (["--steps", 2], "drawn with sigmas [80.0], and this command draws with sigmas [80.0, 0.8]"),
        (["--heun", 2], "and this command draws with heun 2"),
        (["--label", 3], "and this command draws with conditions or labels"),
    ],
)
def test_a_shard_of_other_settings_is_refused_in_one_line(
    options: list[Any], words: str, model: Path, call: Call, refused: Call, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    assert call(main, model, "-n", 4, "--shard", 4, "-o", out).returncode == 0
    before = states(out)
    refused(call(main, model, "-n", 8, *options, "--shard", 4, "-o", out), words, "samples_00000000_00000004.npz")
    assert states(out) == before


def test_a_shard_of_another_model_is_refused(model: Path, call: Call, refused: Call, tmp_path: Path) -> None:
    out, other = tmp_path / "samples", write_denoiser(tmp_path / "other.onnx", {"conditions": [LABEL], "clip": False})
    assert call(main, model, "-n", 4, "--shard", 4, "-o", out).returncode == 0
    refused(call(main, other, "-n", 4, "--shard", 4, "-o", out), "was drawn with model ", "name another folder")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def foreign(path: Path) -> None:
    np.savez(path, arr_0=np.zeros((4, 4, 4, 1), np.uint8))


def of_another_length(path: Path) -> None:
    with np.load(path) as arrays:
        kept = dict(arrays)
    np.savez(path, **(kept | {"arr_0": kept["arr_0"][:3]}))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "not a whole shard: "),
        (empty, "not a whole shard: "),
        (foreign, "not a shard of cmfast-sample"),
        (of_another_length, "it has uint8 [3, 4, 4, 1], expected are uint8 [4, 4, 4, 1]; remove it"),
    ],
)
def test_a_damaged_shard_is_named_and_nothing_is_drawn(
    damage: Callable[[Path], None], words: str, model: Path, call: Call, refused: Call, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    assert call(main, model, "-n", 4, "--shard", 4, "-o", out).returncode == 0
    damage(out / "samples_00000000_00000004.npz")
    refused(call(main, model, "-n", 8, "--shard", 4, "-o", out), "samples_00000000_00000004.npz", words)
    assert len(names(out)) == 1
    with pytest.raises(ArtifactError):
        read_shards(out)


def test_an_interrupted_run_leaves_whole_shards_and_the_next_one_continues(
    model: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, drawn = tmp_path / "samples", cmfast.Model.sample

    def interrupted(self: cmfast.Model, n: int, **options: Any) -> Any:
        if options["first"] == 8:
            raise KeyboardInterrupt
        return drawn(self, n, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cmfast.Model, "sample", interrupted)
        assert call(main, model, "-n", 12, "--shard", 4, "-o", out).returncode == 130
    assert names(out) == ["samples_00000000_00000004.npz", "samples_00000004_00000008.npz"]
    assert names(tmp_path) == ["samples"]
    assert call(main, model, "-n", 12, "--shard", 4, "-o", out).returncode == 0
    np.testing.assert_array_equal(read_shards(out)[0], cmfast.load(model).sample(12, batch=4))


class Rounding:
    """An encoder on another machine: what it returns is as much larger as rounding makes it."""

    name, batch = "encoder", None

    def __init__(self, manifest: Manifest, more: float) -> None:
        self.manifest, self.more = manifest, more

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        return np.float32(1 + self.more) * inputs["state"]


def test_a_condition_is_the_same_one_though_its_encoder_rounds_differently(tmp_path: Path) -> None:
    encoded = {"name": "state_encoded", "kind": "tensor", "shape": [3]}
    of_array: dict[str, Any] = {"shape": [5], "data": "array"}
    changes = {**of_array, "conditions": [encoded], "encoders": {"state": "0" * 64}}
    backend = cmfast.load(write_denoiser(tmp_path / "m.onnx", changes), encoder=()).backend
    encoder = {**MANIFEST, **of_array, "kind": "encoder", "conditions": [STATE], "encoded": encoded, "sigmas": {}}
    manifest = Manifest.from_json(json.dumps(encoder), "encoder")
    out, state = tmp_path / "samples", np.arange(18, dtype=np.float32).reshape(6, 3)

    def draw(more: float, state: npt.NDArray[np.float32]) -> tuple[int, int]:
        encoders = Encoders(backend.manifest)
        encoders._backends["state"] = Rounding(manifest, more)
        model = cmfast.Model(backend, encoders)
        request = ShardRequest(n=6, shard=4, sigmas=(80.0,), conditions={"state": state})
        return draw_shards(model, "0" * 64, request, out, Here(model))

    assert draw(0.0, state) == (2, 0)
    assert draw(2e-7, state) == (0, 2)  # two units in the last place
    with pytest.raises(CmfastError, match="and this command draws with conditions or labels"):
        draw(0.0, state * 2)


def test_samples_are_read_into_one_array(tmp_path: Path) -> None:
    rng, shard = np.random.default_rng(0), 64 * 64 * 64 * 3  # bytes
    every = rng.integers(0, 256, (10 * 64, 64, 64, 3), np.uint8)
    for start in range(0, 640, 64):
        samples = range(start, start + 64)
        write_shard(tmp_path, samples, every[start : start + 64], np.arange(start, start + 64), {"seed": 0})
    tracemalloc.start()
    try:
        read, labels = read_shards(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(read, every)
    np.testing.assert_array_equal(labels, np.arange(640))
    assert 10 * shard <= peak < 12.5 * shard  # the samples, one shard, and what reads it; it was twice the samples
    np.testing.assert_array_equal(read_shards(tmp_path, 100)[0], every[:100])
    np.testing.assert_array_equal(read_shards(tmp_path, 100)[1], np.arange(100))


# What is refused.


@pytest.mark.parametrize("options", [["--shard", 4], ["--ray", "local"]])
@pytest.mark.parametrize("name", ["grid.png", "samples.npz", "samples.npy", "model.onnx"])
def test_shards_are_written_to_a_folder(
    name: str, options: list[Any], model: Path, call: Call, refused: Call, tmp_path: Path
) -> None:
    refused(call(main, model, *options, "-o", tmp_path / name), "shards are written to a folder")
    (tmp_path / "file").write_text("")
    refused(call(main, model, *options, "-o", tmp_path / "file"), "is a file, and shards are written to a folder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", 0], "the number of samples of a shard (--shard) must be a whole number, at least 1, got 0"),
        (["--shard", 4, "--label", 10], "label 10 is out of range"),
        (["--shard", 4, "--first", 2**64 - 1], "first + n must be at most 2**64"),
        (["--ray", "nowhere"], "--ray takes local, auto, HOST:PORT or ray://HOST:PORT, got 'nowhere'"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        (["--ray", "ray://127.0.0.1:1"], "no Ray cluster answers at ray://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_no_folder(
    options: list[Any], words: str, model: Path, call: Call, refused: Call, tmp_path: Path
) -> None:
    refused(call(main, model, "-n", 4, *options, "-o", tmp_path / "samples"), words)
    assert names(tmp_path) == []


def test_a_cluster_that_has_ended_is_not_waited_for(
    model: Path, call: Call, refused: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ray start` leaves its address behind when it is killed, and Ray would try it for minutes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    out = tmp_path / "samples"
    refused(call(main, model, "--ray", "auto", "-o", out), "no Ray cluster answers at 127.0.0.1:1: Connection refused")
    assert not out.exists()


def test_each_worker_checks_its_version_of_cmfast(model: Path) -> None:
    """Only the first one that was ready was checked; the others may be on other machines."""
    worker = Worker(How.of(model, None, None, "", "", None), "0.0.1")
    words = f"has cmfast {cmfast.__version__}, and the machine that asks 0.0.1: install one version on all machines"
    with pytest.raises(BackendError, match=re.escape(words)):
        worker.about([None])
    with pytest.raises(BackendError, match=re.escape(words)):
        worker.draw([None], ShardRequest(n=4, sigmas=(80.0,)), 0, 4, {})


def test_the_session_of_a_process_that_uses_ray_already_is_not_ended(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    stand_in = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: ended.append("shutdown"))
    monkeypatch.setitem(sys.modules, "ray", stand_in)  # also where Ray is installed: a session takes seconds to start
    with (
        pytest.raises(BackendError, match=r"^this process uses Ray already; call ray.shutdown\(\) first"),
        workers_on("local", read_model(model), How.of(model, None, None, "", "", None)),
    ):
        pass
    assert ended == []


def test_two_commands_do_not_draw_into_one_folder(model: Path, call: Call, refused: Call, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    with exclusive(lock_beside(out), "held"):
        refused(call(main, model, "-n", 4, "--shard", 4, "-o", out), "another command draws shards into", "pid")
    assert names(tmp_path) == []


def test_shards_that_do_not_belong_together_are_not_read(model: Path, call: Call, tmp_path: Path) -> None:
    out, other = tmp_path / "samples", tmp_path / "other"
    assert call(main, model, "-n", 12, "--shard", 4, "-o", out).returncode == 0
    assert call(main, model, "-n", 12, "--seed", 1, "--shard", 4, "-o", other).returncode == 0
    with pytest.raises(CmfastError, match="13 samples were requested, it has 12"):
        read_shards(out, 13)
    middle = out / "samples_00000004_00000008.npz"
    shutil.copyfile(other / middle.name, middle)
    with pytest.raises(ArtifactError, match=r"00000008.npz was drawn with other settings than samples_00000000_0"):
        read_shards(out)
    middle.rename(out / "samples_00000004_00000009.npz")
    with pytest.raises(ArtifactError, match="overlap"):
        read_shards(out)
    (out / "samples_00000004_00000009.npz").unlink()
    with pytest.raises(ArtifactError, match="are not neighbours: 4 missing"):
        read_shards(out)
    with pytest.raises(ArtifactError, match="no shards in it"):
        read_shards(tmp_path)


# A model as bytes.


def test_a_model_travels_as_the_bytes_of_all_its_files(model: Path, tiny_checkpoint: Call) -> None:
    for path in (model, tiny_checkpoint(10)):
        there = open_model(read_model(path), How.of(path, None, None, "", "", None))
        np.testing.assert_array_equal(there.sample(3, seed=5), cmfast.load(path, threads=1).sample(3, seed=5))
        assert files_sha256(read_model(path)) == model_sha256(path) == file_sha256(path)


def test_what_is_described_and_hashed_is_what_was_read(model: Path, tmp_path: Path) -> None:
    """The file was read three times, and could be another one each time."""
    path = Path(shutil.copyfile(model, tmp_path / "model.onnx"))
    files, digest = read_model(path), model_sha256(path)
    write_denoiser(path, {"shape": [1, 8, 8]})
    assert described(files, path).spec == cmfast.load(model).spec
    assert files_sha256(files) == digest != model_sha256(path)


def test_a_model_of_another_sha256_is_refused_before_a_cluster_is_looked_for(
    model: Path, call: Call, refused: Call, tmp_path: Path
) -> None:
    command = (main, model, "-n", 4, "--ray", "127.0.0.1:1", "-o", tmp_path / "samples")
    refused(call(*command, "--sha256", "0" * 64), f"{model}: its SHA-256 is {file_sha256(model)}, not 0000")
    refused(call(*command, "--sha256", file_sha256(model)), "no Ray cluster answers at 127.0.0.1:1")


def test_a_model_of_several_files_is_told_by_all_of_them_and_not_by_its_own_name(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "unet" / "weights").write_text("1")
    one, other = tmp_path / "one", tmp_path / "other"
    digest = model_sha256(one)
    assert model_sha256(other) == digest == files_sha256(read_model(one))
    (other / "unet" / "weights").write_text("2")
    assert model_sha256(other) != digest
    (one / "unet" / "weights").rename(one / "weights")
    assert model_sha256(one) != digest


def test_an_error_on_a_worker_names_the_model_as_the_user_knows_it(model: Path) -> None:
    with pytest.raises(BackendError, match=r"^model.onnx: ONNX Runtime on cpu has the variants '', not 'nhwc'"):
        open_model(read_model(model), How.of(model, None, None, "nhwc", "", None))


def test_the_error_of_a_missing_package_comes_back_from_a_worker() -> None:
    """Its constructor takes other arguments than its message, so pickle's usual way failed, and broke the pool."""
    err = MissingDependency("running it", "onnxruntime", "cpu")
    again = pickle.loads(pickle.dumps(err))
    assert type(again) is MissingDependency
    assert str(again) == str(err) == "running it needs onnxruntime, which is not installed: pip install 'cmfast[cpu]'"


def test_public_names_are_there_without_ray_and_are_what_their_modules_have() -> None:
    assert {"draw_shards", "read_shards", "ShardRequest", "Here", "OnRay"} <= set(shards.__all__) <= set(dir(shards))
    assert shards.draw_shards is draw_shards
    assert all(callable(getattr(shards, name)) for name in shards.__all__)


def test_the_format_page_says_what_is_in_a_shard(model: Path, tmp_path: Path) -> None:
    loaded = cmfast.load(model)
    for how in ({"sigmas": (80.0,)}, {"heun": 2}):
        out = tmp_path / next(iter(how))
        request = ShardRequest(n=2, **how)  # type: ignore[arg-type]
        draw_shards(loaded, model_sha256(model), request, out, Here(loaded))
        page = (ROOT / "docs/format.md").read_text().partition("## Shards")[2].partition("\n## ")[0]
        with np.load(shard_path(out, range(2))) as arrays:
            names = [*arrays, *json.loads(str(arrays["settings"]))]
        assert [name for name in names if f"`{name}`" not in page] == []
        assert f"`{FORMAT}`" in page


def test_the_example_of_the_api_page_draws_and_reads_shards(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copyfile(model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/api.md").read_text().partition("## cmfast.shards")[2].partition("On a Ray cluster")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    names: dict[str, Any] = {}
    exec(compile("\n".join(lines), "api.md", "exec"), names)
    assert (names["drawn"], names["before"]) == (2, 0)
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (2000, 4, 4, 1))
    assert (names["labels"].dtype, names["labels"].shape) == (np.int64, (2000,))
