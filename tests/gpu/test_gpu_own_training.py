# SPDX-License-Identifier: MIT
"""Custom networks train on CUDA: in each precision, with data on the card, stopped and continued.

pytest -m gpu        on a machine with an NVIDIA GPU and cmfast[gpu]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmfast_train
from cmfast.errors import CmfastError
from cmfast_train import TrainConfig, phase
from helpers.own_networks import UNet1d
from helpers.runs import log_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("any_precision"),
]
QUICK: dict[str, Any] = {"batch": 32, "log_images": 320, "grid": 4, "tensorboard": False, "device": "cuda"}


def denoiser() -> cmfast_train.Denoiser:
    torch.manual_seed(0)
    return cmfast_train.wrap(
        UNet1d(), shape=(8, 4), conditions={"state": (5,)}, null={"state": 0.0}, scaling="edm", c_noise="ln/4"
    )


def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(400, 5, generator=generator)
    return {"x": 0.45 * state[:, :1, None] + 0.2 * torch.randn(400, 8, 4, generator=generator), "state": state}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_network_of_ones_own_learns_on_cuda(precision: str, tmp_path: Path) -> None:
    second = "ect" if precision == "fp16" else "scd"  # whose derivatives in fp16 could overflow
    phases = (phase("edm", 32_000, lr=2e-3, ema=0.99), phase(second, 3_200))
    config = TrainConfig(phases=phases, precision=precision, label_dropout=0.1, **QUICK)
    trained = cmfast_train.train(config, denoiser=denoiser(), data=data(), out=tmp_path / "run")
    assert {weight.device.type for weight in trained.denoiser.network.parameters()} == {"cpu"}
    losses = [line["loss"] for line in log_of(tmp_path / "run") if line.get("phase") == "edm" and "loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    (note,) = [line for line in log_of(tmp_path / "run") if "graph" in line]
    assert set(note["graph"].values()) == {"a network of your own may read numbers on the CPU"}


def test_a_run_on_cuda_continues_where_it_stopped_and_nowhere_else(tmp_path: Path) -> None:
    whole = TrainConfig(phases=(phase("edm", 3200), phase("cd", 3200)), precision="fp32", **QUICK)
    given, out = denoiser(), tmp_path / "run"
    first = cmfast_train.train(whole, denoiser=given, data=data(), out=out)
    again = cmfast_train.train(whole, denoiser=given, data=data(), out=out)
    for name, weight in first.denoiser.network.named_parameters():
        assert torch.equal(weight, again.denoiser.network.get_parameter(name)), name
    with pytest.raises(CmfastError, match="another data"):
        cmfast_train.train(whole, denoiser=given, data={k: v[:99] for k, v in data().items()}, out=out)
