# SPDX-License-Identifier: MIT
"""What tests of training share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmfast_train.methods.perceptual import NETS
from cmfast_train.torchvision_cpu import torchvision_datasets


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a factory of torchvision's files with random weights: all convolutions, a classifier in name only."""
    torchvision_datasets()
    import torchvision  # importable from here on

    folder, made = tmp_path_factory.mktemp("torchvision"), {}

    def make(net: str) -> Path:
        if net not in made:
            with torch.device("meta"):
                shapes = getattr(torchvision.models, NETS[net][0])(weights=None).features.state_dict()
            generator = torch.Generator().manual_seed(0)
            state = {
                f"features.{name}": torch.randn(like.shape, generator=generator) * math.sqrt(2 / like[0].numel())
                for name, like in shapes.items()
            }
            made[net] = folder / NETS[net][1]
            torch.save(state | {"classifier.1.bias": torch.zeros(3)}, made[net])
        return made[net]

    return make
