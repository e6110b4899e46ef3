# SPDX-License-Identifier: MIT
"""Every version reads, runs and continues what 0.1.0 wrote, and takes the words that its users typed.

The files are in frozen/v0_1, written once by frozen/make.py. Only the public API, the commands and documented formats
are used here, so that modules can move. A name that a later version changes is entered in a table below; a file is
never written again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmfast
from helpers import ROOT, TESTS

FOLDER = TESTS / "frozen" / "v0_1"
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
IMAGES: dict[str, Any] = dict(np.load(FOLDER / "images.npz"))
Command = Callable[..., "subprocess.CompletedProcess[str]"]

# {word of 0.1.0: what it is called now}. Files and commands of 0.1.0 keep the old words and are still read.
PUBLIC: dict[str, str] = {
    "Model.engine": "backend",
    "Model.levels": "Model.sigmas_for",
    "image": "shape",
    "classes": "conditions",
    "class_names": "conditions",
}  # names and parameters of the API; a method is "Model.NAME"
WORDS: dict[str, str] = {"seed": "cloneofsimo"}  # values of a spec, such as a scaling
SETTINGS: dict[str, str] = {}  # names of --set as config.json has them
# In 0.1.0 every phase had the hyperparameters of all methods. Of those that its method does not use, the values in
# files are still read, but no longer written, and setting one is refused: it had no effect.
OF_ALL = {"method", "images", "lr", "lr_warmup", "lr_decay", "ema", "clip_norm"}
SINCE = {"beta2": 0.999}  # fields that came later, with what 0.1.0 did
USED = {
    "edm": {"p_mean", "p_std"},
    "ct": {"s0", "s1", "loss", "huber", "mu", "mu0"},
    "cd": {"s0", "s1", "loss", "huber", "mu", "mu0", "solver"},
    "ict": {"p_mean", "p_std", "s0", "s1", "loss", "huber"},
    "ect": {"p_mean", "p_std", "q", "k", "b", "stages", "loss", "huber"},
    "sct": {"p_mean", "p_std", "warmup", "tangent_c", "adaptive", "derivative"},
    "scd": {"p_mean", "p_std", "warmup", "tangent_c", "adaptive", "derivative"},
}

# Of the largest value of an image. float32 rounds at 6e-8 and sums in another order on another machine.
FLOAT32 = 1e-5
# c_noise 250ln reaches 1095, where a step of float32 is 1.2e-4: a logarithm rounded otherwise turns the waves by that.
LN250 = 3e-4
# Half precision rounds at 5e-4, and libraries choose which products are summed in it.
HALF = 1e-2
# Of the largest weight at the end of each run, measured: sums in another order (two threads, another memory layout)
# move the weights by 3e-5, 6e-5 and 3e-6. A state without its optimiser ends 6e-4 away or more, cd's without target or
# teacher 1e-3, without averages 2e-4; scd's without teacher 1.3e-5, without weights of noise levels 4e-5.
TRAINED = {"ect": 5e-5, "cd": 1.5e-4, "scd": 1e-5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of 0.1.0; treat it as read-only."""
    folder = tmp_path_factory.mktemp("frozen")
    with zipfile.ZipFile(FOLDER / "files.zip") as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command by its name in pyproject.toml, in this process, which has torch already."""

    def command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        module, function = SCRIPTS[name].split(":")
        argv = [name, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        handler = signal.getsignal(signal.SIGINT)  # a command sets one for the rest of its process
        with pytest.raises(SystemExit) as stopped:
            getattr(import_module(module), function)()
        signal.signal(signal.SIGINT, handler)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(argv, int(stopped.value.code or 0), out, err)

    return command


def assert_near(got: Any, want: Any, relative: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert float(np.abs(got - want).max()) <= relative * float(np.abs(want).max())


def weights_of(file: Path) -> dict[str, Any]:
    """Return the weights of model.pt, a documented format: plain containers and tensors."""
    return dict(torch.load(file, weights_only=True)["weights"])


# Files of models.


@pytest.mark.parametrize("key", [key for key in IMAGES if key != "noise"])
def test_a_model_draws_what_it_drew(key: str, files: Path) -> None:
    name, how = key.rsplit(" ", 1)
    model = cmfast.load(files / name, threads=1)
    if how == "heun":
        got = model.sample_heun_float(2, steps=3, seed=EXPECTED["seed"])
    else:
        got = model.sample_float(2, steps=int(how), seed=EXPECTED["seed"])
    manifest = EXPECTED["manifests"][name]
    relative = HALF if manifest["dtype"] == "float16" else LN250 if manifest["c_noise"] == "250ln" else FLOAT32
    assert_near(got, IMAGES[key], relative)


@pytest.mark.parametrize("name", EXPECTED["labels"])
def test_a_seed_draws_the_labels_that_it_drew(name: str, files: Path) -> None:
    model, want = cmfast.load(files / name, threads=1), EXPECTED["labels"][name]
    if want:
        assert model.labels(len(want), seed=EXPECTED["seed"]).tolist() == want
    else:
        assert model.labels(4, seed=EXPECTED["seed"]) is None


def test_a_seed_draws_the_noise_that_it_drew_to_the_bit() -> None:
    how = EXPECTED["noise"]
    got = cmfast.gaussian(how["seed"], how["samples"], how["step"], how["shape"])
    assert got.tobytes() == IMAGES["noise"].tobytes()


@pytest.mark.parametrize("name", EXPECTED["manifests"])
def test_a_file_says_of_itself_what_it_said(name: str, files: Path, command: Command) -> None:
    result = command("cmfast-info", files / name, "--json")
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["data"] == "image"
    got["image"], labels = got["shape"], [each for each in got["conditions"] if each["name"] == "label"]
    got |= {key: labels[0][key] for key in ("classes", "class_names") if key in labels[0]} if labels else {"classes": 0}
    for key, want in EXPECTED["manifests"][name].items():
        if key != "schema":  # what is printed is of this version
            want = WORDS.get(want, want) if isinstance(want, str) else want
            assert got[key] == want, key


@pytest.mark.parametrize("name", [name for name in EXPECTED["manifests"] if name.endswith((".onnx", ".engine"))])
def test_the_manifest_of_a_graph_or_an_engine_is_read_by_the_api(name: str, files: Path) -> None:
    manifest, want = cmfast.read_manifest(files / name), EXPECTED["manifests"][name]
    assert (manifest.kind, manifest.dtype) == (want["kind"], want["dtype"])
    assert {str(steps): list(sigmas) for steps, sigmas in manifest.spec.sigmas.items()} == want["sigmas"]


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_a_checkpoint_is_written_again_with_the_same_weights(
    name: str, files: Path, tmp_path: Path, command: Command
) -> None:
    result = command("cmfast-export", files / name, "--format", "cmfast", "-o", tmp_path / "again.pt")
    assert result.returncode == 0, result.stderr
    got, want = weights_of(tmp_path / "again.pt"), weights_of((files / name).with_suffix(".pt"))
    assert {key: list(tensor.shape) for key, tensor in got.items()} == EXPECTED["weights"][name]
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_checkpoint_is_exported_as_it_was(files: Path, tmp_path: Path, command: Command) -> None:
    result = command("cmfast-export", files / "checkpoints/song.pt", "-o", tmp_path / "song.onnx")
    assert result.returncode == 0, result.stderr
    got = cmfast.load(tmp_path / "song.onnx", threads=1).sample_float(2, steps=2, seed=EXPECTED["seed"])
    assert_near(got, IMAGES["exports/song.onnx 2"], FLOAT32)


# Runs.


def assert_ended_as(out: Path, end: Path, name: str) -> None:
    """Check what a run left against what the same run of 0.1.0 left."""
    run = EXPECTED["runs"][name]
    for file in sorted(end.rglob("*.pt")):
        got, want = weights_of(out / file.relative_to(end)), weights_of(file)
        assert got.keys() == want.keys()
        largest = max(float(tensor.abs().max()) for tensor in want.values())
        for key in want:
            assert float((got[key] - want[key]).abs().max()) <= TRAINED[name] * largest, (file.name, key)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {key for line in lines for key in line} >= set(run["log"])
    assert [line["images"] for line in lines if "loss" in line] == run["images"]  # none twice


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_stopped_run_is_continued_and_ends_as_it_did(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    shutil.copytree(files / "runs" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    before = weights_of(Path("run/model.pt"))
    result = command("cmfast-train", *EXPECTED["runs"][name]["arguments"])
    assert result.returncode == 0, result.stderr
    assert_ended_as(Path("run"), Path("end"), name)
    there = {path.relative_to("run").as_posix() for path in Path("run").rglob("*") if path.is_file()}
    assert set(EXPECTED["runs"][name]["files"]) <= there
    after = weights_of(Path("run/model.pt"))
    assert any(float((after[key] - before[key]).abs().max()) > 1e-3 for key in after)  # it did go on
    result = command("cmfast-ema", "run", "--std", "0.12", "-o", "wider.pt")
    assert result.returncode == 0, result.stderr
    assert cmfast.load("wider.pt").sample(1, steps=1).shape == (1, 8, 8, 1)


def test_the_same_command_trains_the_same_model_from_the_start(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    shutil.copy(files / "runs/ect/init.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = command("cmfast-train", *EXPECTED["runs"]["ect"]["arguments"])
    assert result.returncode == 0, result.stderr
    assert_ended_as(Path("run"), files / "runs/ect/end", "ect")


# Words.


@pytest.mark.parametrize("name", EXPECTED["public"])
def test_a_public_name_is_there_with_its_parameters(name: str) -> None:
    thing: Any = cmfast
    for part in PUBLIC.get(name, name).split("."):
        assert thing is not cmfast or part in cmfast.__all__
        thing = getattr(thing, part)
    parameters = EXPECTED["public"][name]
    assert not parameters or {PUBLIC.get(f"{name}.{word}", PUBLIC.get(word, word)) for word in parameters} <= set(
        signature(thing).parameters
    )


def test_every_command_is_there() -> None:
    assert set(EXPECTED["commands"]) <= SCRIPTS.keys()


def test_every_setting_is_taken_and_written_as_it_was(command: Command) -> None:
    settings = [text for text in EXPECTED["settings"] if is_used(text.partition("=")[0])]
    assert len(settings) == len(EXPECTED["settings"]) - 12
    words = [word for text in settings for word in ("--set", text)]
    result = command("cmfast-train", "digits", "--out", "never", "--dry-run", *words)
    assert result.returncode == 0, result.stderr
    got, want = json.loads(result.stdout), EXPECTED["config"]
    for name, value in want.items():
        if name != "phases":
            assert got[SETTINGS.get(name, name)] == (WORDS.get(value, value) if isinstance(value, str) else value), name
    for phase, was in zip(got["phases"], want["phases"], strict=True):
        names = OF_ALL | USED[was["method"]]
        assert {SETTINGS.get(name, name): was[name] for name in names} | SINCE == phase


def is_used(name: str) -> bool:
    """Return whether a setting of 0.1.0, such as batch or ect.q, had an effect."""
    method, dot, field = name.partition(".")
    return not dot or field in OF_ALL | USED[method]


def test_a_setting_that_had_no_effect_is_refused_by_name(command: Command) -> None:
    for text in (text for text in EXPECTED["settings"] if not is_used(text.partition("=")[0])):
        result = command(
            "cmfast-train", "digits", "--out", "never", "--dry-run", "--set", "phases=ect:64", "--set", text
        )
        assert result.returncode == 2
        assert f"--set {text}: ect has no such field" in result.stderr


@pytest.mark.parametrize("line", EXPECTED["exit_codes"], ids=lambda line: " ".join(line["command"]))
def test_a_command_ends_with_the_code_that_it_had(
    line: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    result = command(*(word.replace("network=seed", "network=cloneofsimo") for word in line["command"]))
    assert result.returncode == line["code"], result.stderr
    if result.returncode:
        (said,) = result.stderr.splitlines()
        assert said.startswith(f"{line['command'][0]}: ")
    assert sorted(files.rglob("*")) == before


# These tests can fail.


def test_a_spoilt_weight_and_a_renamed_key_are_noticed(files: Path, tmp_path: Path) -> None:
    spoilt = torch.load(files / "checkpoints/song.pt", weights_only=True)
    weight = next(tensor for tensor in spoilt["weights"].values() if tensor.ndim == 4)
    weight[0, 0, 1, 1] *= 1.01
    torch.save(spoilt, tmp_path / "song.pt")
    got = cmfast.load(tmp_path / "song.pt", threads=1).sample_float(2, steps=1, seed=EXPECTED["seed"])
    with pytest.raises(AssertionError):
        assert_near(got, IMAGES["checkpoints/song.pt 1"], FLOAT32)
    whole = (files / "exports/tensorrt.engine").read_bytes()
    (tmp_path / "renamed.engine").write_bytes(whole.replace(b'"c_noise"', b'"c_nolse"'))
    with pytest.raises(cmfast.ArtifactError):
        cmfast.read_manifest(tmp_path / "renamed.engine")
    graph = (files / "exports/denoiser.onnx").read_bytes()
    (tmp_path / "renamed.onnx").write_bytes(graph.replace(b'"c_noise"', b'"c_nolse"'))
    with pytest.raises(cmfast.ArtifactError, match="c_noise"):
        cmfast.read_manifest(tmp_path / "renamed.onnx")
