# SPDX-License-Identifier: MIT
"""Every method through the whole of it: trained, killed, begun again, exported and sampled by the same commands."""

from __future__ import annotations

import functools
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import cmfast
from cmfast.cli import sample
from cmfast.errors import CheckFailed
from cmfast.formats.table import read_manifest
from cmfast_export import cli as export
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.methods import find, names
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.training.trainer import train
from helpers.runs import TINY, assert_equal_to_the_bit, losses_of, run_here, weights_of


def fast(*methods: str) -> list[str]:
    """Return settings with which 30 steps make images of some contrast."""
    return [f"{method}.{setting}" for method in methods for setting in ("lr=1e-2", "ema=0.5")]


# 30 steps with a line of the log at each, and 4 checkpoints with a line of the log each: after 8, 16, 24 and 30 steps.
RUNS = {
    "edm, ect": ["dropout=0.2", "phases=edm:120,ect:120", *fast("edm", "ect"), "edm.lr_decay=0.5", "ect.stages=0,3"],
    "ct": ["dropout=0.2", "phases=ct:240", *fast("ct"), "ct.s1=20"],
    "edm, cd": ["dropout=0.2", "phases=edm:80,cd:160", *fast("edm", "cd"), "cd.mu0=0.5"],
    "edm, cmt": ["dropout=0.2", "phases=edm:80,cmt:160", *fast("edm", "cmt"), "cmt.steps=5"],
    "edm, ect, sid": [
        "dropout=0.2",
        "phases=edm:40,ect:40,sid:160",
        *fast("edm", "ect"),
        "ect.stages=0,3",
        "sid.lr=1e-3",
        "sid.ema=0.5",
        "sid.fakes=2",
    ],
    "ict": ["dropout=0.2", "phases=ict:240", *fast("ict"), "ict.p_mean=2", "ict.lr_warmup=0.5", "ict.clip_norm=1"],
    "edm, pd": ["phases=edm:80,pd/4:40,pd/2:80,pd/1:40", *fast("edm", "pd")],
    "sct": ["dropout=0.2", "phases=sct:240", *fast("sct"), "emas=0.5,0.9", "ema_stds=0.05,0.1"],
    "edm, scd": ["dropout=0.2", "phases=edm:80,scd:160", *fast("edm", "scd"), "ema_stds=0.1"],
    "mf": ["dropout=0.2", "phases=mf:240", *fast("mf")],
}
LINES = 34

Processes = Callable[[str, Path], Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a run by its name; treat it as read-only."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def make(name: str) -> Path:
        run_here(folder / name.replace(", ", "_"), *RUNS[name])
        return folder / name.replace(", ", "_")

    return make


@pytest.fixture(scope="module")
def begin() -> Processes:
    """Return a function that begins a run in a process of its own, one that has not to import torch first."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["cmfast_train.training.trainer", "sklearn.datasets"])

    def begin(name: str, out: Path) -> Any:
        process = processes.Process(target=train, args=(override(PRESETS["digits"], [*TINY, *RUNS[name]]), out, None))
        process.start()
        return process

    return begin


def lines_of(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def assert_equal_folders(one: Path, two: Path, why: str) -> None:
    """Check that two runs left the same models, averages, states, images and curves, to the bit."""
    files = [{file.relative_to(out) for file in out.rglob("*") if file.is_file()} for out in (one, two)]
    assert files[0] == files[1], why
    for file in files[0]:
        if file.suffix == ".pt":
            contents = [torch.load(out / file, weights_only=True) for out in (one, two)]
            assert_equal_to_the_bit(*contents, f"{file}, {why}")
        elif file.name != "log.jsonl":
            assert (one / file).read_bytes() == (two / file).read_bytes(), f"{file}, {why}"
    assert losses_of(one) == losses_of(two), why


def test_every_method_is_in_a_run_below() -> None:
    configs = [override(PRESETS["digits"], settings) for settings in RUNS.values()]
    assert {phase.method for config in configs for phase in config.phases} == set(names())


@pytest.mark.parametrize("name", [name for name in RUNS if name != "edm, ect"])  # test_loop has it, by the command
def test_a_run_killed_at_any_step_and_begun_again_leaves_the_same_bits(
    name: str, begin: Processes, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    out, lines = tmp_path / "killed", random.randrange(2, 25)
    victim = begin(name, out)
    while victim.is_alive() and lines_of(out) < lines:
        time.sleep(0.001)
    victim.kill()
    victim.join()
    assert victim.exitcode == -9, f"it had ended before line {lines}"
    assert lines <= lines_of(out) < LINES
    again = begin(name, out)
    expected = plain(name)
    again.join()
    assert again.exitcode == 0, f"killed after line {lines}"
    assert_equal_folders(out, expected, f"killed after line {lines}")
    assert lines_of(out) == LINES


@pytest.mark.parametrize("name", ["edm, scd", "edm, ect, sid", "mf"])
def test_recomputation_changes_no_bit_of_a_run(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    run_here(tmp_path / "run", *RUNS[name], "recompute=true")
    expected = torch.load(plain(name) / "state.pt", weights_only=True)
    assert_equal_to_the_bit(torch.load(tmp_path / "run" / "state.pt", weights_only=True), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, as it compiles
def test_a_compiled_run_has_the_losses_of_a_plain_one_up_to_rounding(tmp_path: Path) -> None:
    phases = "phases=edm:40,sct:40"
    for name in ("false", "true"):
        run_here(tmp_path / name, phases, f"compile={name}")
    for one, two in zip(losses_of(tmp_path / "false"), losses_of(tmp_path / "true"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)  # fused sums are rounded otherwise


# What it leaves goes through the same commands.


# The others' networks and conventions are those of ect and of sct.
@pytest.mark.parametrize(
    "name",
    [
        "edm, ect", "edm, pd", "sct", "mf",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ct", "edm, cd", "edm, cmt", "edm, ect, sid", "ict", "edm, scd")
        ),
    ],
)  # fmt: skip
def test_it_exports_and_samples(
    name: str, plain: Callable[[str], Path], tmp_path: Path, call: Callable[..., Any]
) -> None:
    model, exported = plain(name) / "model.pt", tmp_path / "model.onnx"
    result = call(export.main, model, "-o", exported)
    assert (result.returncode, result.stderr) == (0, "")
    manifest = read_manifest(exported)
    assert manifest.spec == load_checkpoint(model).spec
    assert manifest.parity["max_abs"] <= 1e-4
    inputs = [value.name for value in onnx.load(exported).graph.input]
    assert inputs == ["x", "sigma", *(["sigma_next"] if name == "mf" else []), "label"]

    for steps in sorted({1, 2} & set(manifest.spec.sigmas)):
        out = tmp_path / f"{steps}.npz"
        assert call(sample.main, exported, "--steps", steps, "-n", 4, "-o", out).returncode == 0
        want = cmfast.load(model).sample(4, steps=steps)
        assert np.abs(np.load(out)["arr_0"].astype(int) - want).max() <= 1  # a pixel may be rounded the other way
        assert want.std() > 10


def test_a_network_of_two_times_samples_with_the_second_at_zero(plain: Callable[[str], Path]) -> None:
    checkpoint = load_checkpoint(plain("mf") / "model.pt")
    assert isinstance(checkpoint.network, AdmConfig)
    assert checkpoint.network.two_times
    denoiser, sigma = checkpoint.denoiser(), torch.tensor([0.3, 3.0])
    x, conditions = torch.randn(2, 1, 8, 8), {"label": torch.tensor([1, 2])}
    zero = denoiser.output(x, sigma, conditions, torch.zeros(2))
    assert torch.equal(denoiser.output(x, sigma, conditions), zero)
    assert not torch.equal(denoiser.output(x, sigma, conditions, sigma), zero)


def test_a_network_of_two_times_does_not_go_to_diffusers(
    plain: Callable[[str], Path], tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    result = call(export.main, plain("mf") / "model.pt", "--format", "diffusers", "-o", tmp_path / "folder")
    refused(result, "diffusers", "export it as ONNX")
    assert not any(tmp_path.iterdir())


# When it stops by itself.


@pytest.mark.parametrize("method", names())
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_noise_levels(method: str, tmp_path: Path) -> None:
    teacher = "edm:8," if find(method).distils else ""
    phases = f"phases={teacher}{'pd/2' if method == 'pd' else method}:800"
    with pytest.raises(CheckFailed) as raised:
        run_here(tmp_path / "run", phases, f"{method}.lr=1e30", "checkpoint_images=800")
    message = str(raised.value)
    assert f"the loss is not finite at step 1 of {method} ({16 if teacher else 8} images), " in message
    levels = message.split("noise levels ")[1].split(";")[0].split(", ")
    assert all(0.002 <= float(level) <= 80 for level in levels)
    assert f"--set {method}.lr=3e+29" in message
    assert not (tmp_path / "run" / "model.pt").exists()


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="the last checkpoint is untouched"):
        run_here(tmp_path / "run", "phases=edm:80", "edm.lr=1e38", "checkpoint_images=8")
    if (tmp_path / "run" / "model.pt").exists():
        assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run" / "model.pt").values())
