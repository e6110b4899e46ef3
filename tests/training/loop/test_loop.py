# SPDX-License-Identifier: MIT
"""The training loop: a run that was killed, stopped, cut up or spread out computes what the plain run computes."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cmfast
from cmfast.errors import CmfastError
from cmfast.images import grid_image
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.cli.train import main
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.training.trainer import train
from helpers.runs import TINY, arguments, assert_equal_to_the_bit, log_of, losses_of, run_here, weights_of

SEED = ["network=cloneofsimo", "conditional=false"]  # the first public implementation's
KILLED = [*TINY, "dropout=0.2", "phases=edm:160,ect:160", "edm.lr_decay=0.5", "ect.stages=0,3"]


def command(out: Path, settings: list[str]) -> list[str]:
    return [sys.executable, "-m", "cmfast_train.cli.train", *arguments(out, settings)]


def start(out: Path, settings: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command(out, settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_lines(out: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Return when the log has so many lines, or the run has ended."""
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


# Killed and stopped.


def test_a_run_killed_at_any_step_and_begun_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    lines = random.randrange(10, 37)  # of the 45 that a whole run writes; the first checkpoint is the ninth
    victim = start(killed, KILLED)
    wait_for_lines(killed, lines, victim)
    victim.send_signal(signal.SIGKILL)
    assert finish(victim)[0] == -signal.SIGKILL, f"it had ended before line {lines}"
    at_kill = log_of(killed)[:-1]
    again = start(killed, KILLED)
    train(override(PRESETS["digits"], KILLED), plain, None)
    code, _, said = finish(again)
    assert code == 0, f"killed after line {lines}"
    assert re.fullmatch(r"training: continuing at (64|128|192|256) images\n", said), f"killed after line {lines}"

    states = [torch.load(out / "state.pt", weights_only=True) for out in (plain, killed)]
    assert_equal_to_the_bit(*states, f"killed after line {lines}")
    checkpoints = [load_checkpoint(out / "model.pt") for out in (plain, killed)]
    assert checkpoints[0].sha256() == checkpoints[1].sha256(), f"killed after line {lines}"
    for grid in ("000000000128.png", "000000000320.png"):
        assert (plain / "samples" / grid).read_bytes() == (killed / "samples" / grid).read_bytes()

    assert losses_of(killed) == losses_of(plain), f"killed after line {lines}"
    log = [(line["images"], "checkpoint" in line) for line in log_of(killed)]
    assert len(set(log)) == len(log) >= len(at_kill), f"killed after line {lines}"


def test_the_comparison_above_can_fail(tmp_path: Path) -> None:
    for seed in (0, 1):
        run_here(tmp_path / str(seed), "phases=edm:8", f"seed={seed}")
    states = [torch.load(tmp_path / str(seed) / "state.pt", weights_only=True) for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_equal_to_the_bit(*states)


def test_an_interrupted_run_saves_its_last_step_and_says_how_to_continue(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [*TINY, "phases=edm:80000", "checkpoint_images=80000"]
    process = start(out, settings)
    wait_for_lines(out, 5, process)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (130, "")
    (line,) = stderr.splitlines()
    assert line == f"cmfast-train: stopped; {out} holds a checkpoint of the last step; the same command continues"
    last, note = log_of(out)[-2:]
    assert note["checkpoint"] == "model.pt"
    assert torch.load(out / "state.pt", weights_only=True)["step"] == last["step"] == last["images"] / 8 >= 5
    assert load_checkpoint(out / "model.pt").spec.image == (1, 8, 8)
    assert sorted(os.listdir(out)) == ["config.json", "log.jsonl", "model.pt", "samples", "state.pt"]


# Begun again with something else.


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("batch=16", "batch"),
        ("edm.lr=0.5", "phases"),
        ("seed=1", "seed"),
        ("sigma_data=1", "sigma_data"),
        ("c_noise=ln/4", "c_noise"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_the_name_of_what_differs(
    setting: str, name: str, finished: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = call(main, *arguments(finished, [*TINY, "phases=edm:16", setting]))
    refused(
        result,
        f"{finished} holds a run with another {name}; repeat the command that began it to continue, or name another",
    )
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_finished_run_begun_again_is_finished(finished: Path, call: Callable[..., Any]) -> None:
    sha256, log = load_checkpoint(finished / "model.pt").sha256(), log_of(finished)
    result = call(main, *arguments(finished, [*TINY, "phases=edm:16", "log_images=100"]))  # how often it logs is free
    assert (result.returncode, result.stderr) == (0, "")
    assert f"next: cmfast-export {finished}/model.pt" in result.stdout
    assert load_checkpoint(finished / "model.pt").sha256() == sha256
    assert log_of(finished) == log


def test_a_run_begun_before_there_was_a_choice_of_network_continues(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text())
    del config["network"], config["emas"]
    (out / "config.json").write_text(json.dumps(config))
    model = run_here(out, "phases=edm:16")
    assert load_checkpoint(model).sha256() == load_checkpoint(finished / "model.pt").sha256()

    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CmfastError, match="holds a run with another conditional, network; repeat the command"):
        run_here(out, "phases=edm:16", *SEED)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": "digits", "phases": []}', '{"phases": [{"lr": 1}]}'])
def test_a_damaged_configuration_is_refused(text: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "config.json").write_text(text)
    with pytest.raises(CmfastError, match=r"config\.json is damaged or of another version; begin in another --out"):
        run_here(out, "phases=edm:16")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "log.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    with (out / "log.jsonl").open("a") as log:
        log.write('{"images": 24, "lo')  # cut in the middle of a line
    model = run_here(out, "phases=edm:16")
    assert losses_of(out) == losses_of(finished)
    assert load_checkpoint(model).sha256() == load_checkpoint(finished / "model.pt").sha256()


@pytest.mark.parametrize("damage", ["cut", "another file", "empty", "incomplete", "code"])
def test_a_state_that_cannot_be_read_is_refused_and_not_begun_over(damage: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((finished / "config.json").read_bytes())
    state = (finished / "state.pt").read_bytes()
    if damage == "code":
        torch.save({"format": functools.partial(print)}, out / "state.pt")
    elif damage == "incomplete":
        torch.save({"format": torch.load(finished / "state.pt", weights_only=True)["format"]}, out / "state.pt")
    else:
        model = (finished / "model.pt").read_bytes()
        (out / "state.pt").write_bytes({"cut": state[: len(state) // 2], "another file": model, "empty": b""}[damage])
    with pytest.raises(CmfastError, match=str(out)):
        run_here(out, "phases=edm:16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "cmfast-state/1"}, "not a training state of this version; begin in another --out folder"),
        ({"weights": {}}, "not the training state of this run: "),
        ({"averages": {}}, "not the training state of this run: '0.999'"),
        ({"phase": 3}, "not the training state of this run: "),
        ({"made_for": {}}, r"holds a run with another data, device, precision, models \(.*continue it where and with"),
    ],
    ids=str,
)
def test_a_state_of_another_run_or_version_is_refused_in_one_line(
    change: dict[str, Any], words: str, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    torch.save(torch.load(finished / "state.pt", weights_only=True) | change, out / "state.pt")
    with pytest.raises(CmfastError, match=words) as raised:
        run_here(out, "phases=edm:16")
    assert "\n" not in str(raised.value)


# Cut into micro-batches. Five steps a phase: RAdam does not divide by the gradient's size before its sixth, so rounding
# stays rounding.

FEW_STEPS = ["phases=edm:40,ect:40", "edm.lr=1e-2", "ect.lr=1e-3", "edm.ema=0.5", "ect.ema=0.5"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return weights_of(run_here(tmp_path_factory.mktemp("plain") / "run", *FEW_STEPS))


def assert_equal_up_to_rounding(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for name, weight in one.items():
        # Gradients summed in another order differ by some 1e-7 of their size, which here is a few units at most.
        np.testing.assert_allclose(weight, two[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_micro_batches_give_the_same_weights(accumulation: int, plain: dict[str, Tensor], tmp_path: Path) -> None:
    model = run_here(tmp_path / "run", *FEW_STEPS, f"accumulation={accumulation}")
    assert_equal_up_to_rounding(weights_of(model), plain)


def test_the_runs_above_have_learned_something(plain: dict[str, Tensor], tmp_path: Path) -> None:
    other = weights_of(run_here(tmp_path / "run", *FEW_STEPS, "seed=1"))
    assert (plain["out.2.weight"] - other["out.2.weight"]).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        assert_equal_up_to_rounding(plain, other)


# The first public implementation's network.


@pytest.mark.parametrize(
    "conventions",
    [["scaling=boundary", "phases=edm:800,ct:80"], ["scaling=cloneofsimo", "c_noise=raw", "phases=edm:800,ect:80"]],
    ids=["as the paper says", "as it was"],
)
def test_the_first_implementations_network_learns_and_exports(conventions: list[str], tmp_path: Path) -> None:
    settings = [*SEED, *conventions, "checkpoint_images=400"]
    model = run_here(tmp_path / "run", *settings)
    checkpoint = load_checkpoint(model)
    assert checkpoint.network == CloneofsimoConfig(image_size=8, channels=1, width=32)
    assert checkpoint.spec.classes == 0
    assert f"scaling={checkpoint.spec.scaling}" == conventions[0]
    losses = [line["loss"] for line in losses_of(tmp_path / "run") if line["phase"] == "edm"]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 3
    assert run_here(tmp_path / "run", *settings) == model  # it is finished

    exported = export_onnx(model, tmp_path / "model.onnx")
    assert exported.denoiser.parity.worst.max_abs <= 1e-4
    assert exported.denoiser.parity.boundary == 0


# What it writes, and when it stops by itself.


def test_the_grid_of_a_checkpoint_is_what_its_model_draws(tmp_path: Path) -> None:
    model = run_here(tmp_path / "run", "phases=edm:80", "edm.lr=1e-2", "dropout=0.5", "grid=5")
    with Image.open(tmp_path / "run" / "samples" / "000000000080.png") as grid:
        drawn = np.asarray(grid).astype(int)
    want = np.asarray(grid_image(cmfast.load(model).sample(5, steps=2))).astype(int)
    assert np.abs(drawn - want).max() <= 1  # another memory layout may round a pixel the other way
    assert want[2:50, 2:50].std() > 10


def test_a_network_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for setting in ("head_channels=48", "model_channels=40", "channel_mult=1,2,2,2,2"):
        with pytest.raises(CmfastError):
            run_here(tmp_path / "run", "phases=edm:8", setting)
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_not_there_is_an_error_and_not_a_cpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    for setting in ("device=cuda", "precision=fp16"):
        with pytest.raises(CmfastError, match=r"device=cuda is not available: |needs CUDA"):
            run_here(tmp_path / "run", "phases=edm:8", setting)


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path: Path, call: Callable[..., Any]) -> None:
    result = call(main, *arguments(tmp_path / "run", ["batch=32"]), "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["batch"] == 32
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["imagenet", "--out", "x"], "'imagenet' is not one of 'arrays', 'cifar10', "),
        (["digits"], "Missing option '--out'"),
        (["digits", "--out", "x", "--set", "bacth=3"], "no such field"),
        (["digits", "--out", "x", "--fast"], "No such option"),
        (["mnist-large", "--out", "x"], "--data DIR, or CMFAST_DATA=DIR"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_writes_nothing(
    words: list[str], said: str, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMFAST_DATA", raising=False)
    refused(call(main, *words), said)
    assert os.listdir(tmp_path) == []
