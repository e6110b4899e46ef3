# SPDX-License-Identifier: MIT
"""Whether a run's networks are trained with fused norms (`networks.fused`): TrainConfig.fused, and what forbids it."""

from __future__ import annotations

import functools

import torch

from cmfast.errors import CmfastError, EngineError, one_line
from cmfast_train.backends.torch_noise import has_triton
from cmfast_train.config.phase import CONTINUOUS, Phase
from cmfast_train.config.train_config import TrainConfig
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
    if phase.method in (*CONTINUOUS, "mf"):
        return f"{phase.method} differentiates in forward mode"
    if not config.channels_last:
        return "channels_last=false"
    if config.compile:
        return "compile=true fuses in its own way"
    if config.shard and processes > 1:
        return "shard=true keeps no channels_last"
    return why_no_kernels(device)


@functools.cache
def why_no_kernels(device: torch.device) -> str:
    """Return why Triton's kernels do not run on a device, "" if they do: a small one is compiled, run and compared."""
    if not has_triton():
        return "triton is not installed"
    try:
        from cmfast_train.kernels.group_norm_training import norm_act

        x = torch.arange(128.0, device=device).view(1, 32, 2, 2).to(memory_format=torch.channels_last)
        one = torch.ones(32, device=device)
        with torch.no_grad():
            off = norm_act(x, 8, one, one, 1e-5) - norm_act(x.cpu(), 8, one.cpu(), one.cpu(), 1e-5).to(device)
        return "" if float(off.abs().max()) < 1e-4 else "its kernels compute something else here"
    except Exception as err:  # no compiler of C for Triton's launchers, no such card, ...
        return f"triton does not work here ({one_line(err, 200)})"
