# SPDX-License-Identifier: MIT
"""The networks that benchmarks measure, every weight random at trained scale: what is measured does not depend on them.

A new U-Net ends in zeros and computes c_skip x, whatever is wrong with the rest.
"""

from __future__ import annotations

import torch

from cmfast.conditions import class_label
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.config.presets import PRESETS
from cmfast_train.importers.openai import HEAD_CHANNELS, NETWORKS
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.training.initial_model import network_config

NAMES = ("digits", "mnist", "cifar10", "imagenet64")  # 0.8M, 7.7M, 43M and OpenAI's 296M
OF_PRESET = {name: PRESETS["mnist-large" if name == "mnist" else name] for name in NAMES}


def random_model(name: str, device: str = "cpu") -> Checkpoint:
    """Return a class-conditional model of a preset's shape, or of OpenAI's ImageNet-64.

    Args:
        device: where the weights are drawn, and stay: a checkpoint's are on the CPU otherwise
    """
    if name == "imagenet64":
        config = AdmConfig(image_size=64, attention=(32, 16, 8), head_channels=HEAD_CHANNELS, **NETWORKS[64])
        spec = ModelSpec(shape=(3, 64, 64), conditions=(class_label(config.classes),))
    else:
        config, spec = network_config(OF_PRESET[name], 10), OF_PRESET[name].spec(10)
    with torch.device("meta"):  # what it would begin with takes seconds, and is not used
        network = AdmUnet(config)
    network.to_empty(device=device)
    randomise(network)
    return Checkpoint(spec=spec, network=config, weights=network.state_dict())


def parameters(model: Checkpoint) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in model.weights.values())
