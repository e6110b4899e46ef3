# SPDX-License-Identifier: MIT
"""What tests of runs share: a finished run, and models to start one from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import SongConfig
from helpers.runs import run_here
from helpers.specs import image_spec

SHAPE: dict[str, Any] = {"image_size": 8, "channels": 1, "model_channels": 32, "res_blocks": 1, "channel_mult": (1,)}
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(**SHAPE, classes=10, attention=(), head_channels=32),
    "adm, two times": AdmConfig(**SHAPE, classes=10, attention=(), head_channels=32, two_times=True),
    "adm, unconditional": AdmConfig(**SHAPE, attention=(), head_channels=32),
    "adm, 3 classes": AdmConfig(**SHAPE, classes=3, attention=(), head_channels=32),
    "adm, 16 px": AdmConfig(**{**SHAPE, "image_size": 16}, classes=10, attention=(), head_channels=32),
    "song": SongConfig(**SHAPE, classes=10, attention=(8,)),
    "cloneofsimo": CloneofsimoConfig(image_size=8, channels=1, width=32),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model of random weights: write(network, name, **conventions)."""

    def write(network: str = "adm", name: str = "start.pt", **conventions: Any) -> Path:
        config = NETWORKS[network]
        built = build_network(config)
        randomise(built)
        side = config.image_size
        spec = image_spec(image=(config.channels, side, side), classes=config.classes, **conventions)
        save_checkpoint(Checkpoint(spec=spec, network=config, weights=built.state_dict()), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here(out, "phases=edm:16")
    return out
