# SPDX-License-Identifier: MIT
"""Runs of two processes, plain (DDP) and sharded (FSDP): one process with the whole batch computes the same.

Run as a program by torch.distributed.run, this file is one process of each of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import cmfast_train
from cmfast.errors import CmfastError
from cmfast_train import TrainConfig, phase
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.cli.train import command
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import load_data
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.training.folder import begin_folder
from cmfast_train.training.parallel import leave
from cmfast_train.training.saving import save
from cmfast_train.training.state import Run
from cmfast_train.training.trainer import steps
from helpers import helpers_on_path
from helpers.own_networks import UNet1d
from helpers.runs import QUICK, losses_of, run_here
from helpers.specs import image_spec

# Five steps a phase: RAdam does not divide by the gradient's size before its sixth, so rounding stays rounding. And all
# from random weights: in a new network, where many are zero, few have a gradient.
SHARDED = [
    "init=trigflow.pt", "phases=ct:40,edm:8,scd:40", "ct.lr=1e-3", "scd.lr=1e-2", "ct.ema=0.5", "scd.ema=0.5",
    "ct.s1=20", "ct.mu0=0.5", "scd.clip_norm=0.5", "emas=0.2", "ema_stds=0.1",
]  # fmt: skip
RUNS = {
    "spread": [
        "init=trigflow.pt", "phases=edm:40,ect:40,sid:40,sct:40", "edm.lr=1e-2", "ect.lr=1e-3", "sid.lr=1e-3",
        "sct.lr=1e-3", "edm.ema=0.5", "ect.ema=0.5", "sid.ema=0.5", "sct.ema=0.5", "sid.fakes=1", "sid.share=1",
        "accumulation=2",
    ],
    "meanflow": ["init=flow.pt", "phases=mf:40", "mf.lr=1e-2", "mf.ema=0.5"],
    "sharded": [*SHARDED, "shard=true"],
    "plain, then sharded": [*SHARDED, "shard=true"],
}  # fmt: skip
MIDDLE = {"ct": 3, "scd": 8}  # steps: in the middle of a phase


def write_random(folder: Path, scaling: str, c_noise: str) -> None:
    """Write a model of random weights, two channels in a group at least: the only one in a group has no bias."""
    network = AdmConfig(
        image_size=8, channels=1, classes=10, model_channels=64, res_blocks=1, channel_mult=(1,), attention=(),
        head_channels=32, two_times=scaling == "flow",
    )  # fmt: skip
    built = AdmUnet(network)
    randomise(built)
    spec = image_spec(image=(1, 8, 8), classes=10, scaling=scaling, c_noise=c_noise)
    save_checkpoint(Checkpoint(spec=spec, network=network, weights=built.state_dict()), folder / f"{scaling}.pt")


def begin(out: Path, settings: list[str], until: int) -> None:
    """Run the first steps of a run, and save."""
    config = override(PRESETS["digits"], [*QUICK, *settings])
    data = load_data(config, None)
    config = dataclasses.replace(config, class_names=data.class_names)
    run = Run(config, out, Accelerator(cpu=True), len(data), data.classes)
    out.mkdir(exist_ok=True)
    if run.context.accelerator.is_main_process:
        begin_folder(config, out)
    with contextlib.closing(steps(run, data)) as stream:
        for _ in range(until):
            next(stream)
    save(run)


def train_own(out: Path, **settings: Any) -> None:
    """Train a custom network. Each process draws other weights: those of the first count."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    denoiser = cmfast_train.wrap(
        UNet1d(), shape=(8, 4), conditions={"state": (5,)}, null={"state": 0.0}, scaling="edm", c_noise="ln/4"
    )
    generator = torch.Generator().manual_seed(0)
    data = {name: torch.randn(40, *shape, generator=generator) for name, shape in (("x", (8, 4)), ("state", (5,)))}
    data["x"] *= 0.5
    phases = (
        phase("ct", 40, lr=1e-3, ema=0.5, s1=20, mu0=0.5), phase("edm", 8), phase("scd", 40, lr=1e-2, ema=0.5),
    )  # fmt: skip
    config = TrainConfig(
        phases=phases, batch=8, log_images=8, grid=4, tensorboard=False, device="cpu", label_dropout=0.3, **settings
    )
    cmfast_train.train(config, denoiser=denoiser, data=data, out=out)


def one_process(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    for name, settings in RUNS.items():
        last = {setting.partition("=")[0]: setting for setting in (*QUICK, *settings)}  # the command takes each once
        words = [word for setting in last.values() for word in ("--set", setting)]
        command.main(["digits", "--out", name, *words], standalone_mode=False)
    Path("others").mkdir(exist_ok=True)
    Path("others/model.pt").write_text("x")
    with pytest.raises(
        CmfastError, match=r"(^|another process has stopped: )others holds model.pt, but no config.json"
    ):
        command.main(["digits", "--out", "others"], standalone_mode=False)
    for method, until in MIDDLE.items():
        begin(Path(f"sharded, then plain, {method}"), [*SHARDED, "shard=true"], until)
    train_own(Path("own"))
    train_own(Path("own sharded"), shard=True)
    leave(SystemExit(0))


@pytest.fixture(scope="module")
def folders(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of finished runs, by name."""
    here, there = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder in (here, there):
        write_random(folder, "trigflow", "trig")
        write_random(folder, "flow", "flow")
    with contextlib.chdir(there):
        begin(there / "plain, then sharded", SHARDED, MIDDLE["scd"])
        result = run(
            "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, there, **helpers_on_path()
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("next: cmfast-export") == len(RUNS)
        for method in MIDDLE:
            run_here(there / f"sharded, then plain, {method}", *SHARDED)
    with contextlib.chdir(here):
        for name in ("spread", "meanflow"):
            run_here(here / name, *RUNS[name])
        run_here(here / "sharded", *SHARDED)
        train_own(here / "own")
        train_own(here / "own sharded")
    return {f"{path.name}, {folder.name[:3]}": path for folder in (here, there) for path in folder.iterdir()}


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return flat(dict(enumerate(tree)), name)
    return {name: tree}


def assert_equal_up_to_rounding(one: Path, two: Path) -> None:
    """Check that two runs ended with the same models, averages, targets, teachers and optimisers."""
    files = [path.relative_to(one) for path in one.rglob("*.pt") if not path.name.endswith("64.pt")]
    for file in files:
        contents = [flat(torch.load(out / file, weights_only=True)) for out in (one, two)]
        assert contents[0].keys() == contents[1].keys()
        for key, value in contents[0].items():
            if isinstance(value, Tensor):
                # Gradients summed in another order differ by some 1e-7 of their size, here a few units at most.
                np.testing.assert_allclose(contents[1][key], value, rtol=1e-5, atol=2e-6, err_msg=f"{file}{key}")
            else:
                assert contents[1][key] == value, f"{file}{key}"


@pytest.mark.parametrize("name", ["spread", "meanflow", "sharded", "own", "own sharded"])
def test_two_processes_leave_the_models_and_states_of_one(name: str, folders: dict[str, Path]) -> None:
    assert_equal_up_to_rounding(folders[f"{name}, one"], folders[f"{name}, two"])


@pytest.mark.parametrize("name", ["spread", "meanflow", "sharded", "own", "own sharded"])
def test_two_processes_have_the_loss_curve_of_one(name: str, folders: dict[str, Path]) -> None:
    one, two = (losses_of(folders[f"{name}, {processes}"]) for processes in ("one", "two"))
    assert len(one) == len(two) == {"spread": 20, "meanflow": 5}.get(name, 11)
    for a, b in zip(one, two, strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-4, abs=1e-6), a  # sums in another order
        assert a == b


@pytest.mark.parametrize("name", ["plain, then sharded", *(f"sharded, then plain, {method}" for method in MIDDLE)])
def test_a_run_goes_on_in_another_number_of_processes(name: str, folders: dict[str, Path]) -> None:
    assert_equal_up_to_rounding(folders["sharded, one"], folders[f"{name}, two"])


def test_the_runs_above_move_every_weight_by_more_than_rounding(folders: dict[str, Path]) -> None:
    for name in ("spread", "meanflow", "sharded"):
        model = load_checkpoint(folders[f"{name}, one"] / "model.pt")
        begun = load_checkpoint(folders[f"{name}, one"].parent / f"{model.spec.scaling}.pt").weights
        assert all((weight - begun[n]).abs().max() > 5e-5 for n, weight in model.weights.items())
    state = torch.load(folders["sharded, one"] / "state.pt", weights_only=True)
    assert all(tensor.abs().max() > 5e-5 for tensor in state["log_variance"].values())


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
