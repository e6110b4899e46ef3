# SPDX-License-Identifier: MIT
"""The state of a training run: where it is, the weights, their averages, target, teacher and optimiser; saved, resumed.

Files: see `trainer`. A model file is written before the state that goes on from it, so a kill loses no finished work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cmfast.errors import ArtifactError, CheckFailed, CmfastError, one_line
from cmfast.files import atomic_file
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint, safe_load, save_checkpoint
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.methods.distances import Distance, distance_of
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.edm import DhariwalUnet, SongUnet
from cmfast_train.networks.fused import fuse_norms
from cmfast_train.training.ema import Averages, update_ema
from cmfast_train.training.fused import check_fused, why_not_fused
from cmfast_train.training.initial_model import phase_spec, start_of
from cmfast_train.training.parallel import fill, fill_optimizer, recompute, shard, together, whole
from cmfast_train.training.preview import save_grid
from cmfast_train.training.step_networks import StepNetworks, Student

STATE_FORMAT = "cmfast-state/2"


class Run:
    """A run in folder `out`, on data of so many images and classes, at the beginning until `resume` says otherwise."""

    target: Denoiser | None
    teacher: Denoiser | None
    model: Any  # the student, as Accelerate wrapped it
    student: Any
    denoiser: Any
    networks: Any
    optimizer: Any
    averages: Any
    weights: dict[str, Tensor]  # of the network in training, by name

    def __init__(self, config: TrainConfig, out: Path, accelerator: Accelerator, images: int, classes: int) -> None:
        self.config, self.out, self.accelerator = config, out, accelerator
        torch.manual_seed(config.seed)
        self._start = start = start_of(config, classes)
        self.spec, self.network_config = start.spec, start.network
        check_fused(config, self.network_config, accelerator.device, accelerator.num_processes)
        self._made_for = {
            "data": [images, classes],
            "device": accelerator.device.type,
            "precision": accelerator.mixed_precision,
            "models": list(start.sha256),
        }
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,)) if self.sharded else None
        self._lpips = _load_lpips(config)  # now, for a phase that needs it may be days away
        self.phase_index, self.step = 0, 0  # step of the phase
        self._begin_phase(start.first_weights())

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.config.shard and self.accelerator.num_processes > 1

    @property
    def dropout(self) -> float:
        """The probability of dropout in the network in training."""
        return float(getattr(self.network_config, "dropout", 0.0))

    @property
    def phase(self) -> Phase:
        return self.config.phases[self.phase_index]

    @property
    def images(self) -> int:
        """Images seen so far, in all phases."""
        before = sum(self.config.steps(phase) for phase in self.config.phases[: self.phase_index])
        return (before + self.step) * self.config.batch

    @property
    def ema(self) -> dict[str, Tensor]:
        """The averaged weights that the model is saved with."""
        averaged: dict[str, Tensor] = self.averages[str(self.phase.ema)]
        return averaged

    def where(self) -> dict[str, Any]:
        """Return where the run is, for a line of the log."""
        return {"phase": self.phase.name, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}

    def advice(self) -> str:
        """Return what to try when numbers are not finite."""
        lr = f"--set {self.phase.method}.lr={self.phase.lr / 3:.1g}"
        return f"try a smaller {lr}, --set precision=fp32, or look for damaged images"

    def why_not_fused(self, phase: Phase) -> str:
        """Return why the networks of a phase have no fused norms, "" if they have."""
        accelerator = self.accelerator
        return why_not_fused(self.config, phase, self.network_config, accelerator.device, accelerator.num_processes)

    def next_phase(self) -> None:
        """Leave the finished phase's model in DIR/phases and begin the next from its averaged weights."""
        finished = self._checkpoint(whole(self.ema))

        def write() -> None:
            folder = self.out / "phases"
            folder.mkdir(exist_ok=True)
            name = f"{self.phase_index + 1}_{self.phase.name.replace('/', '')}.pt"
            save_checkpoint(finished, folder / name)

        together(self.accelerator, write if self.accelerator.is_main_process else None)
        self.phase_index, self.step = self.phase_index + 1, 0
        self._begin_phase(finished.weights)

    def set_lr(self) -> None:
        """Set the learning rate of the coming step."""
        phase, part = self.phase, self.step / self.config.steps(self.phase)
        factor = min(1.0, (1 - part) / phase.lr_decay) if phase.lr_decay else 1.0
        if phase.lr_warmup:
            factor *= min(1.0, (part + 1 / self.config.steps(phase)) / phase.lr_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.lr * factor

    def update_averages(self) -> None:
        """Let the averages of the weights follow a step."""
        self.averages.update(self.weights, self.step)
        if self.target is not None:
            decay_at = self.phase.row.target_decay
            assert decay_at is not None
            decay = decay_at(self.phase.hyper, self.step, self.config.steps(self.phase))
            update_ema(self.target.network.parameters(), self.weights.values(), decay)

    def gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch: processes exchange gradients in the last one of a step."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def resume(self) -> None:
        """Continue from state.pt where there is one."""
        file = self.out / "state.pt"
        if not file.exists():
            return
        state = safe_load(file)
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise ArtifactError(f"{file}: not a training state of this version; begin in another --out folder")
        made_for, now = state.get("made_for", {}), self._made_for
        if not isinstance(made_for, dict):
            raise ArtifactError(f"{file}: not the training state of this run: made_for is no dictionary")
        if changed := [name for name in now if made_for.get(name) != now[name]]:
            raise CmfastError(
                f"{self.out} holds a run with another {', '.join(changed)} "
                f"({', '.join(f'{made_for.get(name)}, now {now[name]}' for name in changed)}); "
                "continue it where and with what it began, or start a new run from its model: "
                f"--init {self.out / 'model.pt'} --out NEW"
            )
        try:
            self.phase_index, self.step = self._position(state["phase"], state["step"])
            self._begin_phase(self._buffers | state["weights"])
            for module, name in ((self.target, "target"), (self._own_teacher(), "teacher")):
                if module is not None:
                    fill(dict(module.network.named_parameters()), state[name])
            fill(self._log_variance(), state["log_variance"])
            for name, average in self.averages.state().items():
                fill(average, state["averages"][name])
            fill_optimizer(self.optimizer, state["optimizer"])
            if scaler := self.accelerator.scaler:
                scaler.load_state_dict(state["scaler"])
        except CmfastError:
            raise
        except Exception as err:  # whatever is wrong with it
            raise ArtifactError(f"{file}: not the training state of this run: {one_line(err)}") from None

    def save(self) -> None:
        """Write the model, a sample grid and, last, the state that a resumed run continues from."""
        if not all(bool(weight.isfinite().all()) for weight in (*self.weights.values(), *self.ema.values())):
            raise CheckFailed(
                f"the weights are not finite after step {self.step} of {self.phase.method} ({self.images:,} images); "
                f"the last checkpoint is untouched; {self.advice()}"
            )
        self.accelerator.wait_for_everyone()
        main = self.accelerator.is_main_process
        state = {  # every process takes part in putting it together
            "format": STATE_FORMAT,
            "made_for": self._made_for,
            "phase": self.phase_index,
            "step": self.step,
            "weights": whole(self.weights, main),
            "averages": whole(self.averages.state(), main),
            "target": whole(_parameters(self.target), main),
            "teacher": whole(_parameters(self._own_teacher()), main),
            "log_variance": whole(self._log_variance(), main),
            "optimizer": whole(self.optimizer.state_dict(), main),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }
        together(self.accelerator, (lambda: self._write(state)) if main else None)

    def _position(self, phase: Any, step: Any) -> tuple[int, int]:
        """Return the index of the phase and its step that a state says, if there is such a step."""
        for name, value, end in (("phase", phase, len(self.config.phases) - 1), ("step", step, None)):
            end = self.config.steps(self.config.phases[phase]) if end is None else end
            if type(value) is not int or not 0 <= value <= end:
                raise ValueError(f"{name} is {value!r}, expected 0 to {end}")
        return phase, step

    def _write(self, state: Mapping[str, Any]) -> None:
        checkpoint = self._checkpoint(state["averages"][str(self.phase.ema)])
        save_checkpoint(checkpoint, self.out / "model.pt")
        # A denoiser of its own: the one in training runs in mixed precision and with dropout.
        denoiser = checkpoint.denoiser().to(self.accelerator.device)
        grid = self.out / "samples" / f"{self.images:012d}.png"
        save_grid(denoiser, checkpoint.spec, grid, self.config.grid, self.accelerator.device)
        self._save_averages(state["averages"])
        with atomic_file(self.out / "state.pt") as temporary:
            torch.save(dict(state), temporary)

    def _save_averages(self, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the averages that are not the model: of constant decay the newest, of power functions a snapshot."""
        folder = self.out / "ema"
        if self.config.emas or self.config.ema_stds:
            folder.mkdir(exist_ok=True)
        for rate in map(str, self.config.emas):
            save_checkpoint(self._checkpoint(averages[rate]), folder / f"{rate}.pt")
        for std in self.config.ema_stds:
            source = {"format": "cmfast", "ema_std": std, "ema_step": self.step, "ema_phase": self.phase_index}
            snapshot = replace(self._checkpoint(averages[f"std{std}"]), source=source)
            save_checkpoint(snapshot, folder / f"std{std:.3f}-{self.images:012d}.pt")

    def _checkpoint(self, weights: Mapping[str, Tensor]) -> Checkpoint:
        """Return the model with these whole weights."""
        spec = phase_spec(self.spec, self.phase)
        return Checkpoint(spec=spec, network=self.network_config, weights={**self._buffers, **weights})

    def _own_teacher(self) -> Denoiser | None:
        """Return the teacher that is part of the state: of a phase that distils what it started from."""
        return None if self._teaches_from_file else self.teacher

    @property
    def _teaches_from_file(self) -> bool:
        """Whether --teacher's model is the phase's; a method that distils its own models goes on from those."""
        before = self.config.phases[self.phase_index - 1] if self.phase_index else None
        row = self.phase.row
        own = before is not None and before.row.leaves == row.leaves and row.leaves in row.distils
        return self._start.teacher is not None and not own

    def _log_variance(self) -> dict[str, Tensor]:
        log_variance = self.student.log_variance
        return dict(log_variance.named_parameters()) if log_variance is not None else {}

    def _begin_phase(self, weights: Mapping[str, Tensor]) -> None:
        """Set up what the phase needs, from whole weights of the network."""
        phase, device, config = self.phase, self.accelerator.device, self.config
        self.model = self.optimizer = self.student = self.denoiser = self.networks = None  # their memory is needed now
        self.weights, self.averages, self.target, self.teacher = {}, None, None, None
        self.accelerator.free_memory()
        if phase.row.distils:
            self.teacher = self._teacher_of_phase(weights)
        if phase.row.target_decay is not None:
            self.target = self._new(weights).train()
        for frozen in (self.teacher, self.target):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.denoiser = self._new(weights).train()
        self.weights = _parameters(self.denoiser)
        self._buffers = {name: value for name, value in weights.items() if name not in self.weights}
        self.averages = Averages(
            self.weights, rates=tuple(dict.fromkeys((phase.ema, *config.emas))), stds=config.ema_stds
        )
        self.student = Student(self.denoiser, log_variance=phase.needs.log_variance).to(device)
        if self._mesh is not None and self.student.log_variance is not None:
            shard(self.student.log_variance, self._mesh)
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        optimizer = torch.optim.RAdam(trained, lr=phase.lr, foreach=True)
        self.model = self.student
        if self.sharded:  # which exchanges gradients itself
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        # Without dropout nothing in a step draws from there, and reading a GPU's random state cannot be recorded.
        devices = [device.index or 0] if device.type == "cuda" and self.dropout else []
        finite = phase.needs.finite
        self.networks = StepNetworks(self.model, self.student, self.target, self.teacher, finite, devices)
        self.distance = distance_of(phase.needs, math.prod(self.spec.image), self._lpips)

    def _teacher_of_phase(self, weights: Mapping[str, Tensor]) -> Denoiser:
        """Return the teacher: the file's, or the model that the phase starts from."""
        model, before = self._start.teacher, self.config.phases[: self.phase_index]
        if self._teaches_from_file:
            assert model is not None
            return self._new(model.weights, model.network, model.spec).eval()
        first = self._start.model_spec if not before else None  # what --init was trained as, not what it becomes
        return self._new(weights, spec=first).eval()

    def _new(
        self, weights: Mapping[str, Tensor], config: NetworkConfig | None = None, spec: ModelSpec | None = None
    ) -> Denoiser:
        """Return a denoiser with these weights, laid out and placed as the run has it."""
        with torch.device("meta"):
            network = build_network(config or self.network_config)
        plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
        network.load_state_dict(plain, assign=True)
        if isinstance(network, (SongUnet, DhariwalUnet)) and network.map_augment is not None:
            network.map_augment.requires_grad_(False)  # of EDM's augmentation, which is not done here
        if not self.why_not_fused(self.phase):
            fuse_norms(network)
        if self.config.recompute:
            recompute(network)
        if self.config.compile:
            # A sharded network is a graph a block, of which there are more than PyTorch expects.
            torch._dynamo.config.recompile_limit = 256
            network.compile(dynamic=False)
        denoiser = Denoiser(network, spec or self.spec)
        if self._mesh is not None:
            shard(network, self._mesh)
        elif self.config.channels_last:
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return denoiser.to(self.accelerator.device)


def _load_lpips(config: TrainConfig) -> Distance | None:
    if all(phase.needs.distance != "lpips" for phase in config.phases):
        return None
    from cmfast_train.methods.perceptual import load_lpips

    network, _, file = config.lpips.partition(":")
    return load_lpips(network, Path(file))


def _parameters(denoiser: Denoiser | None) -> dict[str, Tensor]:
    return dict(denoiser.network.named_parameters()) if denoiser is not None else {}
