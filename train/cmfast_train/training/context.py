# SPDX-License-Identifier: MIT
"""What stands for the whole of a run: its configuration, its processes, what it starts from and must find again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cmfast.errors import BackendError, CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.kernels.fuse import why_no_kernels
from cmfast_train.methods.distances import Distance
from cmfast_train.networks.build import NetworkConfig
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.consistency_decoder import ConsistencyDecoderConfig
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.networks.unet1d import Unet1dConfig
from cmfast_train.networks.unet2d import Unet2dConfig
from cmfast_train.training.initial_model import Own, Start, start_of
from cmfast_train.training.parallel import of_the_first


@final
@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The facts of a run, which no step changes.

    Attributes:
        config: of the run.
        out: its folder.
        accelerator: its processes, device and precision.
        start: conventions, network and first weights of the model; the teacher of --teacher.
        made_for: what a continuation must find unchanged: data, device, precision, models.
        mesh: of the processes that share the weights; None where each holds them all.
        lpips: LPIPS with its weights, where a phase needs it.
        shown: conditions of the samples that a checkpoint draws, by name; {}: by the seed.
    """

    config: TrainConfig
    out: Path
    accelerator: Accelerator
    start: Start
    made_for: Mapping[str, object]
    mesh: DeviceMesh | None
    lpips: Distance | None
    shown: Mapping[str, Tensor]

    @property
    def spec(self) -> ModelSpec:
        """The conventions of the model in training."""
        return self.start.spec

    @property
    def network(self) -> NetworkConfig:
        """The shape of the network in training."""
        return self.start.network

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def dropout(self) -> float:
        """The probability of dropout in the network in training."""
        return float(getattr(self.network, "dropout", 0.0))

    def why_not_fused(self, phase: Phase) -> str:
        """Return why the networks of a phase have no fused norms, "" if they have."""
        return why_not_fused(self.config, phase, self.network, self.device, self.accelerator.num_processes)


def context_of(
    config: TrainConfig,
    out: Path,
    accelerator: Accelerator,
    images: int,
    classes: int,
    own: Own | None = None,
    shown: Mapping[str, Tensor] | None = None,
    contents: str = "",
) -> RunContext:
    """Return the context of a run, and seed the random state that its new weights are drawn from.

    Args:
        config: of the run.
        out: its folder.
        accelerator: its processes, device and precision.
        images: number of images of the data.
        classes: number of classes of the data.
        own: custom denoisers, where network=own.
        shown: conditions of the samples that a checkpoint draws.
        contents: digest of the data; "": they are known by their number only.

    Raises:
        CmfastError: the models or the data do not fit the configuration.
        BackendError: something that the configuration demands is not available on the device.
    """
    torch.manual_seed(config.seed)
    start = start_of(config, classes, own)
    if own is not None:  # whose code may have drawn other weights in each process
        start = dataclasses.replace(start, weights=of_the_first(accelerator, start.first_weights()))
    device, processes = accelerator.device, accelerator.num_processes
    check_fused(config, start.network, device, processes)
    return RunContext(
        config=config,
        out=out,
        accelerator=accelerator,
        start=start,
        made_for={
            "data": [images, classes, *([contents] if contents else [])],
            "device": device.type,
            "precision": accelerator.mixed_precision,
            "models": list(start.sha256),
            **({"network": start.shape} if start.shape else {}),
        },
        mesh=init_device_mesh(device.type, (processes,)) if config.shard and processes > 1 else None,
        lpips=_load_lpips(config),  # now, for a phase that needs it may be days away
        shown=shown or {},
    )


def check_fused(config: TrainConfig, network: NetworkConfig, device: torch.device, processes: int) -> None:
    """Raise if fused=true is set and a phase of the run cannot have fused norms."""
    if config.fused != "true":
        return
    for phase in config.phases:
        if why := why_not_fused(config, phase, network, device, processes):
            kind = BackendError if device.type != "cuda" else CmfastError
            raise kind(f"fused=true: {phase.name} cannot be trained with fused norms, {why}; use --set fused=auto")


def why_not_fused(
    config: TrainConfig, phase: Phase, network: NetworkConfig, device: torch.device, processes: int
) -> str:
    """Return why the networks of a phase are trained without fused norms (`networks.fused`), "" if they have them."""
    if config.fused == "false":
        return "fused=false"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if isinstance(network, CloneofsimoConfig):
        return "network=cloneofsimo has other layers"
    if isinstance(network, OwnConfig):
        return "the network is your own"
    if isinstance(network, (Unet2dConfig, ConsistencyDecoderConfig)):
        return "diffusers' UNet2DModel has other layers"
    if isinstance(network, Unet1dConfig):
        return "the 1-D U-Net has other layers"
    if phase.row.differentiates:
        return f"{phase.method} differentiates in forward mode"
    if not config.channels_last:
        return "channels_last=false"
    if config.compile:
        return "compile=true fuses in its own way"
    if config.shard and processes > 1:
        return "shard=true keeps no channels_last"
    return why_no_kernels(device)


def _load_lpips(config: TrainConfig) -> Distance | None:
    if all(phase.needs.distance != "lpips" for phase in config.phases):
        return None
    from cmfast_train.methods.perceptual import load_lpips

    network, _, file = config.lpips.partition(":")
    return load_lpips(network, Path(file))
