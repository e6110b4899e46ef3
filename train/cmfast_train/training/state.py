# SPDX-License-Identifier: MIT
"""Where a run is: its phase, the step in it, and what the phase trains with: networks, averages, optimiser.

`begin_phase` makes the state of a phase, all at once; `saving` writes and reads it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer, RAdam

from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import ARRAYS, TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.methods.distances import Distance, distance_of
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.custom import OwnConfig, live_buffers, tied
from cmfast_train.networks.edm import DhariwalUnet, SongUnet
from cmfast_train.networks.fused import fuse_norms
from cmfast_train.training.context import RunContext, context_of
from cmfast_train.training.ema import Averages, update_ema
from cmfast_train.training.initial_model import Own, phase_spec
from cmfast_train.training.parallel import of_the_first, recompute, shard, together
from cmfast_train.training.step_networks import StepNetworks, Student


@final
@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """What one phase trains with. The tensors change with each step, the objects stay.

    Attributes:
        index: of the phase in the run.
        phase: its method and hyperparameters.
        total: its length in optimiser steps.
        model: the student as Accelerate wrapped it.
        student: the denoiser in training, the log-variance of its loss and the fake scores where they are trained.
        weights: parameters of the network in training, by name.
        buffers: what else its state dict holds, as it is now.
        tied: further names of parameters that have several -> the name in `weights`.
        averages: of the weights, including the model's EMA.
        target: the average that the method compares with, if its row has one.
        teacher: the model that is distilled, if the method distils.
        teacher_is_saved: the teacher is part of the saved state; one of --teacher is read from its file again.
        optimizer: of the student's weights.
        networks: that the method evaluates.
        distance: that the method measures with.
    """

    index: int
    phase: Phase
    total: int
    model: nn.Module
    student: Student
    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    tied: Mapping[str, str]
    averages: Averages
    target: Denoiser | None
    teacher: Denoiser | None
    teacher_is_saved: bool
    optimizer: Optimizer
    networks: StepNetworks
    distance: Distance

    @property
    def ema(self) -> dict[str, Tensor]:
        """The averaged weights that the model is saved with."""
        return self.averages[str(self.phase.ema)]

    @property
    def saved_teacher(self) -> Denoiser | None:
        """The teacher, where it is part of the state."""
        return self.teacher if self.teacher_is_saved else None

    @property
    def log_variance(self) -> dict[str, Tensor]:
        """Parameters of the learned log-variance, by name; {} where none is learned."""
        module = self.student.log_variance
        return dict(module.named_parameters()) if module is not None else {}


@final
class Run:
    """A run: its context, the state of its phase, and the steps of the phase that are done.

    Args:
        config: of the run.
        out: its folder.
        accelerator: its processes, device and precision.
        images: number of images of the data.
        classes: number of classes of the data.
        own: custom denoisers, where network=own.
        shown: conditions of the samples that a checkpoint draws.
        contents: digest of the data.

    Raises:
        CmfastError: the models or the data do not fit the configuration.
        BackendError: something that the configuration demands is not available on the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Accelerator,
        images: int,
        classes: int,
        own: Own | None = None,
        shown: Mapping[str, Tensor] | None = None,
        contents: str = "",
    ) -> None:
        self.context = context_of(config, out, accelerator, images, classes, own, shown, contents)
        self.state = begin_phase(self.context, 0, self.context.start.first_weights())
        self.step = 0  # optimiser steps of the phase that are done

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run."""
        return self.context.config

    @property
    def phase(self) -> Phase:
        """The phase in training."""
        return self.state.phase

    @property
    def images(self) -> int:
        """Images seen so far, in all phases."""
        before = sum(self.config.steps(phase) for phase in self.config.phases[: self.state.index])
        return (before + self.step) * self.config.batch

    def enter(
        self, index: int, step: int, weights: Mapping[str, Tensor], teacher_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Leave the present phase and set up another, from whole weights of the network (`begin_phase`)."""
        del self.state  # releases its memory before the next state is made
        self.context.accelerator.free_memory()
        self.state, self.step = begin_phase(self.context, index, weights, teacher_weights), step

    def where(self) -> dict[str, Any]:
        """Return where the run is, for a line of the log."""
        return {"phase": self.phase.name, "step": self.step, "lr": self.state.optimizer.param_groups[0]["lr"]}

    def advice(self) -> str:
        """Return what to try when numbers are not finite."""
        method, lr = self.phase.method, f"{self.phase.lr / 3:.1g}"
        python = isinstance(self.context.network, OwnConfig) and not self.context.network.factory
        smaller = (
            f'phase("{method}", .., lr={lr}), precision="fp32"'
            if python
            else (f"--set {method}.lr={lr}, --set precision=fp32")
        )
        if self.config.data != ARRAYS:
            return f"try a smaller {smaller}, or look for damaged images"
        return (
            f"try a smaller {smaller}, or check x and its scale: its standard deviation should be near "
            f"sigma_data={self.context.spec.sigma_data:g}"
        )


def begin_phase(
    context: RunContext,
    index: int,
    weights: Mapping[str, Tensor],
    teacher_weights: Mapping[str, Tensor] | None = None,
) -> PhaseState:
    """Return the state of a phase before its first step.

    Args:
        context: of the run.
        index: of the phase.
        weights: whole weights of the network that the phase starts from.
        teacher_weights: of a teacher of the same network; None: those of the model that the phase distils.
    """
    config, accelerator, device = context.config, context.accelerator, context.device
    phase, total = config.phases[index], config.steps(config.phases[index])
    is_saved = not _teacher_is_a_file(context, index)
    teacher = _teacher(context, index, weights, teacher_weights) if phase.row.distils else None
    target = _new(context, phase, weights).train() if phase.row.target_decay is not None else None
    for frozen in (teacher, target):
        if frozen is not None:
            frozen.requires_grad_(False)
    denoiser = _new(context, phase, weights).train()
    trained_weights = dict(denoiser.network.named_parameters())
    averages = Averages(trained_weights, rates=tuple(dict.fromkeys((phase.ema, *config.emas))), stds=config.ema_stds)
    fakes = [_trainable(_teacher(context, index, weights, teacher_weights)) for _ in range(phase.needs.fake_scores)]
    student = Student(denoiser, log_variance=phase.needs.log_variance, fakes=fakes).to(device)
    if context.mesh is not None and student.log_variance is not None:
        shard(student.log_variance, context.mesh)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer: Optimizer = RAdam(trained, lr=phase.lr, betas=(0.9, phase.beta2), foreach=True)
    model: nn.Module = student
    if context.mesh is not None:  # sharded weights exchange gradients themselves
        optimizer = accelerator.prepare(optimizer)
    else:
        # Where networks take turns, a step has no gradients of the others.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=phase.needs.fake_scores > 0)
        model, optimizer = accelerator.prepare(student, optimizer)
    # Without dropout a step does not use the GPU's random state, and reading it cannot be recorded.
    devices = [device.index or 0] if device.type == "cuda" and context.dropout else []
    return PhaseState(
        index=index,
        phase=phase,
        total=total,
        model=model,
        student=student,
        weights=trained_weights,
        buffers=live_buffers(denoiser.network),
        tied=tied(denoiser.network),
        averages=averages,
        target=target,
        teacher=teacher,
        teacher_is_saved=is_saved,
        optimizer=optimizer,
        networks=StepNetworks(model, student, target, teacher, phase.needs.finite, devices),
        distance=distance_of(phase.needs, math.prod(context.spec.shape), context.lpips),
    )


def set_lr(run: Run) -> None:
    """Set the learning rate of the coming step."""
    phase, total = run.phase, run.state.total
    part = run.step / total
    factor = min(1.0, (1 - part) / phase.lr_decay) if phase.lr_decay else 1.0
    if phase.lr_warmup:
        factor *= min(1.0, (part + 1 / total) / phase.lr_warmup)
    for group in run.state.optimizer.param_groups:
        group["lr"] = phase.lr * factor


def update_averages(run: Run) -> None:
    """Let the averages of the weights follow a step."""
    state = run.state
    state.averages.update(state.weights, run.step)
    decay = state.phase.row.target_decay
    if state.target is not None and decay is not None:
        rate = decay(state.phase.hyper, run.step, state.total)
        update_ema(state.target.network.parameters(), state.weights.values(), rate)


def exchanging_gradients(run: Run, last: bool) -> AbstractContextManager[Any]:
    """Return the context of a micro-batch: processes exchange gradients in the last one of a step."""
    return contextlib.nullcontext() if last else run.context.accelerator.no_sync(run.state.model)


def _teacher_is_a_file(context: RunContext, index: int) -> bool:
    """Return whether --teacher's model is the phase's; a method that distils its own models goes on from those."""
    row, distilled = context.config.phases[index].row, context.config.distilled(index)
    own = distilled is not None and context.config.phases[distilled].row.leaves == row.leaves
    return context.start.teacher is not None and not own


def _teacher(
    context: RunContext, index: int, weights: Mapping[str, Tensor], own_weights: Mapping[str, Tensor] | None
) -> Denoiser:
    """Return the teacher: the file's, or the newest model before the phase that its method can distil."""
    phase, model = context.config.phases[index], context.start.teacher
    if model is not None and _teacher_is_a_file(context, index):
        return _new(context, phase, model.weights, model.network, model.spec).eval()
    distilled = context.config.distilled(index)
    if distilled is None:  # --init, as it was trained and not what it becomes
        first = weights if index == 0 else context.start.first_weights()
        return _new(context, phase, first, spec=context.start.model_spec).eval()
    if distilled < index - 1:
        weights = own_weights or _weights_of(context, distilled)
    return _new(context, phase, weights, spec=phase_spec(context.spec, context.config.phases[distilled])).eval()


def _weights_of(context: RunContext, index: int) -> Mapping[str, Tensor]:
    """Return the weights of a finished phase's model, which the first process reads for all."""

    def read() -> Mapping[str, Tensor]:
        return load_checkpoint(phase_file(context, index)).weights

    found = together(context.accelerator, read if context.accelerator.is_main_process else None)
    return of_the_first(context.accelerator, found or {})


def _trainable(denoiser: Denoiser) -> Denoiser:
    """Let the weights be trained: a custom teacher may be frozen. What is frozen beside others stays so."""
    weights = list(denoiser.train().parameters())
    if not any(weight.requires_grad for weight in weights):
        for weight in weights:
            weight.requires_grad_(weight.is_floating_point())
    return denoiser


def phase_file(context: RunContext, index: int) -> Path:
    """Return where the model of a finished phase is."""
    name = context.config.phases[index].name.replace("/", "")
    return context.out / "phases" / f"{index + 1}_{name}.pt"


def _new(
    context: RunContext,
    phase: Phase,
    weights: Mapping[str, Tensor],
    network_config: NetworkConfig | None = None,
    spec: ModelSpec | None = None,
) -> Denoiser:
    """Return a denoiser with these weights, laid out and placed as the run has it."""
    config = context.config
    shape = network_config or context.network
    own = isinstance(shape, OwnConfig)
    with torch.device("cpu" if own else "meta"):
        network = build_network(shape)
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    network.load_state_dict(plain, assign=not own)  # in place where weights may be tied
    if isinstance(network, (SongUnet, DhariwalUnet)) and network.map_augment is not None:
        network.map_augment.requires_grad_(False)  # EDM's augmentation is not part of this training
    if not context.why_not_fused(phase):
        fuse_norms(network)
    if config.recompute:
        recompute(network)
    if config.compile:
        # A sharded network is one graph per block, more than PyTorch expects.
        torch._dynamo.config.recompile_limit = 256
        network.compile(dynamic=False)
    denoiser = Denoiser(network, spec or context.spec)
    if context.mesh is not None:
        shard(network, context.mesh)
    elif config.channels_last and not own:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser.to(context.device)
