# SPDX-License-Identifier: MIT
"""Whether a run's networks are trained with fused norms (`networks.fused`): TrainConfig.fused, and what forbids it."""

from __future__ import annotations

import torch

from cmfast.errors import CmfastError, EngineError
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.kernels.fuse import why_no_kernels
from cmfast_train.networks.build import NetworkConfig
from cmfast_train.networks.seed import SeedConfig


def check_fused(config: TrainConfig, network: NetworkConfig, device: torch.device, processes: int) -> None:
    """Raise if fused=true was asked for and a phase of the run cannot have it."""
    if config.fused != "true":
        return
    for phase in config.phases:
        if why := why_not_fused(config, phase, network, device, processes):
            kind = EngineError if device.type != "cuda" else CmfastError
            raise kind(f"fused=true: {phase.name} cannot be trained with fused norms, {why}; use --set fused=auto")


def why_not_fused(
    config: TrainConfig, phase: Phase, network: NetworkConfig, device: torch.device, processes: int
) -> str:
    """Return why the networks of a phase are trained without fused norms, "" if they have them."""
    if config.fused == "false":
        return "fused=false"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if isinstance(network, SeedConfig):
        return "network=seed has other layers"
    if phase.row.differentiates:
        return f"{phase.method} differentiates in forward mode"
    if not config.channels_last:
        return "channels_last=false"
    if config.compile:
        return "compile=true fuses in its own way"
    if config.shard and processes > 1:
        return "shard=true keeps no channels_last"
    return why_no_kernels(device)
