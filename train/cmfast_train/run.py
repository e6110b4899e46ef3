# SPDX-License-Identifier: MIT
"""The state of a training run: where it is, the weights, their averages, target, teacher and optimiser; saved, resumed.

Files: see `loop`. A model file is written before the state that goes on from it, so a kill loses no finished work.
"""

from __future__ import annotations

import contextlib
import copy
import math
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cmfast.errors import ArtifactError, CheckFailed, CmfastError
from cmfast.files import atomic_file
from cmfast_train.checkpoint import Checkpoint, safe_load, save_checkpoint
from cmfast_train.config import CONTINUOUS, DISTILL, Phase, TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.ema import Averages, update_ema
from cmfast_train.grid import save_grid
from cmfast_train.methods import distance_of, target_decay
from cmfast_train.start import phase_spec, start_of
from cmfast_train.student import Asked, Student

STATE_FORMAT = "cmfast-state/2"


class Run:
    """A run in folder `out`, on data of so many images and classes, at the beginning until `resume` says otherwise."""

    def __init__(self, config: TrainConfig, out: Path, accelerator: Accelerator, images: int, classes: int) -> None:
        self.config, self.out, self.accelerator = config, out, accelerator
        torch.manual_seed(config.seed)
        start = start_of(config, classes)
        self.spec, self.network_config, self._teacher_file = start.spec, start.network, start.teacher
        self._made_for = {
            "data": [images, classes],
            "device": accelerator.device.type,
            "precision": accelerator.mixed_precision,
            "models": list(start.sha256),
        }
        self.denoiser = Denoiser(start.build(), self.spec).to(accelerator.device)
        if config.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)
        self.weights = dict(self.denoiser.network.named_parameters())
        self.target: Denoiser | None = None
        self.teacher: Denoiser | None = None
        self.phase_index, self.step = 0, 0  # step of the phase
        self._begin_phase()

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
        return self.averages[str(self.phase.ema)]

    def where(self) -> dict[str, Any]:
        """Return where the run is, for a line of the log."""
        return {"phase": self.phase.name, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}

    def advice(self) -> str:
        """Return what to try when numbers are not finite."""
        lr = f"--set {self.phase.method}.lr={self.phase.lr / 3:.1g}"
        return f"try a smaller {lr}, --set precision=fp32, or look for damaged images"

    def next_phase(self) -> None:
        """Leave the finished phase's model in DIR/phases and begin the next from its averaged weights."""
        if self.accelerator.is_main_process:
            folder = self.out / "phases"
            folder.mkdir(exist_ok=True)
            name = f"{self.phase_index + 1}_{self.phase.name.replace('/', '')}.pt"
            save_checkpoint(self._checkpoint(self.ema), folder / name)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.ema[name])
        self.phase_index, self.step = self.phase_index + 1, 0
        self._begin_phase()

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
            decay = target_decay(self.phase, self.step, self.config.steps(self.phase))
            assert decay is not None
            update_ema(self.target.parameters(), self.denoiser.parameters(), decay)

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
        if changed := [name for name in now if made_for.get(name) != now[name]]:
            raise CmfastError(
                f"{self.out} holds a run with another {', '.join(changed)} "
                f"({', '.join(f'{made_for.get(name)}, now {now[name]}' for name in changed)}); "
                "continue it where and with what it began, or name another --out"
            )
        try:
            self.phase_index, self.step = state["phase"], state["step"]
            self._begin_phase()
            self.student.load_state_dict(state["student"])
            for module, name in ((self.target, "target"), (self._own_teacher(), "teacher")):
                if module is not None:
                    module.load_state_dict(state[name])
            self.averages.load(state["averages"])
            self.optimizer.load_state_dict(state["optimizer"])
            if scaler := self.accelerator.scaler:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as err:
            raise ArtifactError(f"{file}: not the training state of this run: {err}") from None

    def save(self) -> None:
        """Write the model, a sample grid and, last, the state that a resumed run continues from."""
        if not all(bool(weight.isfinite().all()) for weight in (*self.weights.values(), *self.ema.values())):
            raise CheckFailed(
                f"the weights are not finite after step {self.step} of {self.phase.method} ({self.images:,} images); "
                f"the last checkpoint is untouched; {self.advice()}"
            )
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        checkpoint = self._checkpoint(self.ema)
        save_checkpoint(checkpoint, self.out / "model.pt")
        # A denoiser of its own: the one in training runs in mixed precision and with dropout.
        denoiser = checkpoint.denoiser().to(self.accelerator.device)
        grid = self.out / "samples" / f"{self.images:012d}.png"
        save_grid(denoiser, checkpoint.spec, grid, self.config.grid, self.accelerator.device)
        self._save_averages()
        teacher = self._own_teacher()
        state = {
            "format": STATE_FORMAT,
            "made_for": self._made_for,
            "phase": self.phase_index,
            "step": self.step,
            "student": self.student.state_dict(),
            "averages": self.averages.state(),
            "target": self.target.state_dict() if self.target else {},
            "teacher": teacher.state_dict() if teacher else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }
        with atomic_file(self.out / "state.pt") as temporary:
            torch.save(state, temporary)

    def _save_averages(self) -> None:
        """Write the averages that are not the model: of constant decay the newest, of power functions a snapshot."""
        folder = self.out / "ema"
        for rate in map(str, self.config.emas):
            folder.mkdir(exist_ok=True)
            save_checkpoint(self._checkpoint(self.averages[rate]), folder / f"{rate}.pt")
        for std in self.config.ema_stds:
            folder.mkdir(exist_ok=True)
            source = {"format": "cmfast", "ema_std": std, "ema_step": self.step, "ema_phase": self.phase_index}
            snapshot = replace(self._checkpoint(self.averages[f"std{std}"]), source=source)
            save_checkpoint(snapshot, folder / f"std{std:.3f}-{self.images:012d}.pt")

    def _checkpoint(self, weights: dict[str, Tensor]) -> Checkpoint:
        return Checkpoint(spec=phase_spec(self.spec, self.phase), network=self.network_config, weights=weights)

    def _own_teacher(self) -> Denoiser | None:
        """Return the teacher that is part of the state: of a phase that distils what it started from."""
        return self.teacher if self.teacher is not self._teacher_file else None

    def _begin_phase(self) -> None:
        """Set up what the phase needs; weights are there already."""
        phase, device = self.phase, self.accelerator.device
        self.target = self.teacher = None
        rates = tuple(dict.fromkeys((phase.ema, *self.config.emas)))
        self.averages = Averages(self.weights, rates=rates, stds=self.config.ema_stds)
        if phase.method in DISTILL:
            self.teacher = self._teacher_file.to(device) if self._teacher_file else self._frozen().eval()
        if target_decay(phase, 0, self.config.steps(phase)) is not None:
            self.target = self._frozen().train()
        self.model: Any
        self.student = Student(self.denoiser.train(), adaptive=phase.adaptive and phase.method in CONTINUOUS).to(device)
        optimizer = torch.optim.RAdam(self.student.parameters(), lr=phase.lr, foreach=True)
        self.accelerator.free_memory()
        self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        devices = [device.index or 0] if device.type == "cuda" else []
        finite = phase.derivative == "finite"
        self.networks = Asked(self.model, self.student, self.target, self.teacher, finite, devices)
        self.distance = distance_of(phase, math.prod(self.spec.image), self._lpips())

    def _frozen(self) -> Denoiser:
        return copy.deepcopy(self.denoiser).requires_grad_(False)

    def _lpips(self) -> Any:
        if self.phase.loss != "lpips" or not self.config.lpips:
            return None
        from cmfast_train.perceptual import load_lpips

        network, _, file = self.config.lpips.partition(":")
        return load_lpips(network, Path(file))
