# SPDX-License-Identifier: MIT
"""The training loop: phases of steps, with checkpoints that lose nothing.

Everything random in a step is drawn from (seed, step) for the whole batch, and each process takes its share. So
a run that was killed and resumed computes what the plain run computes, on one CPU to the bit; and, where there is
no dropout, so does a run spread over processes or cut into micro-batches, up to rounding.

DIR/model.pt    the EMA weights (`checkpoint`)      DIR/config.json    what was asked
DIR/state.pt    what resuming needs                 DIR/log.jsonl, DIR/tensorboard    the curves
DIR/samples/    a grid per checkpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cmfast.errors import ArtifactError, CheckFailed, CmfastError, EngineError
from cmfast.files import atomic_file, write_text
from cmfast.progress import progress_bar
from cmfast_train.checkpoint import Checkpoint, safe_load, save_checkpoint
from cmfast_train.config import FREE_FIELDS, Phase, TrainConfig, from_dict, to_dict
from cmfast_train.data import FolderImages, Images, batches, load_data, to_unit_range
from cmfast_train.denoiser import Denoiser
from cmfast_train.ema import update_ema, warm_decay
from cmfast_train.grid import save_grid
from cmfast_train.log import TrainLog
from cmfast_train.losses import ct_loss, ect_loss, edm_loss, same_dropout
from cmfast_train.networks.build import NetworkConfig, build_network, network_from_dict
from cmfast_train.schedules import ct_ema, ct_pair, ct_scales, ect_r, lognormal, pseudo_huber_c

STATE_FORMAT = "cmfast-state/1"


def train(config: TrainConfig, out: Path, data_root: Path | None) -> Path:
    """Train, or continue, the run in folder `out`; return the path of model.pt."""
    accelerator = _accelerator(config)
    with accelerator.local_main_process_first():  # one process may have to download
        data = load_data(config, data_root)
    run = _Run(config, out, accelerator, data)
    if accelerator.is_main_process:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        _check_same_run(config, out)
        write_text(out / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
        for leftover in (*out.glob(".*.tmp*"), *(out / "samples").glob(".*.tmp*")):  # of a run killed while it wrote
            leftover.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    run.resume()
    with _stop_signals() as stopped, TrainLog(out, run.images, config, accelerator.is_main_process) as log:
        bar = progress_bar("training", config.images, "images", run.images, accelerator.is_main_process)
        with bar as advance:
            for loss_per_image in run.steps():
                log.add(float(loss_per_image.mean()), run.images, run.where())
                advance(config.batch, f"{run.phase.method} loss {log.recent:.4g}")
                stop = _any(accelerator, bool(stopped))
                due = run.images // config.checkpoint_images > (run.images - config.batch) // config.checkpoint_images
                if due or stop or run.images == config.images:
                    run.save()
                    log.checkpoint(run.images, run.where())
                if stop:
                    raise KeyboardInterrupt
    return out / "model.pt"


class _Run:
    """The state of a run: where it is, the weights, their average, the target, the optimiser."""

    def __init__(self, config: TrainConfig, out: Path, accelerator: Accelerator, data: Images | FolderImages) -> None:
        self.config, self.out, self.accelerator, self.data = config, out, accelerator, data
        self.spec = config.spec(data.classes)
        torch.manual_seed(config.seed)
        self.network_config = network_config(config, self.spec.classes)
        self.denoiser = Denoiser(build_network(self.network_config), self.spec).to(accelerator.device)
        if config.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)
        self.weights = dict(self.denoiser.network.named_parameters())
        self.ema = {name: weight.detach().clone().float() for name, weight in self.weights.items()}
        self.target: dict[str, Tensor] = {}
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

    def where(self) -> dict[str, Any]:
        """Return where the run is, for a line of the log."""
        return {"phase": self.phase.method, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}

    def steps(self) -> Iterator[Tensor]:
        """Run the remaining optimiser steps; yield the loss of each image, [B], after each step."""
        config, accelerator = self.config, self.accelerator
        share = _share(config.batch, accelerator.process_index, accelerator.num_processes)
        done, total = self.images // config.batch, config.images // config.batch
        pin = accelerator.device.type == "cuda"
        stream = batches(self.data, config.batch, config.seed, done, total, share, config.workers, pin)
        for step, (images, label) in enumerate(stream, start=done):
            if self.step == config.steps(self.phase):
                self.phase_index, self.step = self.phase_index + 1, 0
                with torch.no_grad():
                    for name, weight in self.weights.items():
                        weight.copy_(self.ema[name])
                self._begin_phase()
            try:
                loss = self._optimise(step, images, label, share)
            except torch.OutOfMemoryError:
                raise EngineError(
                    f"the GPU has too little memory for batch={config.batch}; smaller pieces compute the same: "
                    f"--set accumulation={2 * config.accumulation} (begin in another --out folder)"
                ) from None
            self.step += 1
            yield loss

    def resume(self) -> None:
        """Continue from state.pt where there is one."""
        file = self.out / "state.pt"
        if not file.exists():
            return
        state = safe_load(file)
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise ArtifactError(f"{file}: not a training state of this version; begin in another --out folder")
        made_for, now = state.get("made_for", {}), self._made_for()
        if changed := [name for name in now if made_for.get(name) != now[name]]:
            raise CmfastError(
                f"{self.out} holds a run with another {', '.join(changed)} "
                f"({', '.join(f'{made_for.get(name)}, now {now[name]}' for name in changed)}); "
                "continue it where and with what it began, or name another --out"
            )
        try:
            self.phase_index, self.step = state["phase"], state["step"]
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(state["weights"][name])
                    self.ema[name].copy_(state["ema"][name])
            self._begin_phase()
            for name, weight in self.target.items():
                weight.copy_(state["target"][name])
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
                f"the last checkpoint is untouched; {self._advice()}"
            )
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        checkpoint = Checkpoint(spec=self.spec, network=self.network_config, weights=self.ema)
        save_checkpoint(checkpoint, self.out / "model.pt")
        # A denoiser of its own: the one in training runs in mixed precision and with dropout.
        denoiser = checkpoint.denoiser().to(self.accelerator.device)
        grid = self.out / "samples" / f"{self.images:012d}.png"
        save_grid(denoiser, self.spec, grid, self.config.grid, self.accelerator.device)
        state = {
            "format": STATE_FORMAT,
            "made_for": self._made_for(),
            "phase": self.phase_index,
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "ema": self.ema,
            "target": self.target,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }
        with atomic_file(self.out / "state.pt") as temporary:
            torch.save(state, temporary)

    def _made_for(self) -> dict[str, Any]:
        """Return what decides the numbers besides the configuration: a continuation must find it unchanged."""
        device, precision = self.accelerator.device.type, self.accelerator.mixed_precision
        return {"data": [len(self.data), self.data.classes], "device": device, "precision": precision}

    def _begin_phase(self) -> None:
        self.model: Any
        model = self.denoiser.train()
        optimizer = torch.optim.RAdam(model.parameters(), lr=self.phase.lr, foreach=True)
        self.accelerator.free_memory()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.phase.method == "ct":
            self.target = {name: weight.detach().clone() for name, weight in self.weights.items()}
        else:
            self.target = {}

    def _optimise(self, step: int, images: Tensor, label: Tensor, share: slice) -> Tensor:
        """One optimiser step on this process's images [b, C, H, W]; return the loss of each, [b]."""
        config, device = self.config, self.accelerator.device
        generator = torch.Generator(device).manual_seed(_step_seed(config.seed, step))
        noise = torch.randn(config.batch, *self.spec.image, generator=generator, device=device)[share]
        level = torch.rand(config.batch, generator=generator, device=device)[share]
        mirror = (torch.rand(config.batch, generator=generator, device=device) < 0.5)[share]
        x0 = to_unit_range(images.to(device, non_blocking=True))
        if config.flip:
            x0 = torch.where(mirror[:, None, None, None], x0.flip(3), x0)
        label = label.to(device, non_blocking=True)
        self._set_lr()
        losses = []
        torch.manual_seed(_step_seed(config.seed, step) + 1 + self.accelerator.process_index)  # dropout
        for i, part in enumerate(torch.arange(len(x0), device=device).chunk(config.accumulation)):
            last = i == config.accumulation - 1
            with (
                contextlib.nullcontext() if last else self.accelerator.no_sync(self.model),
                self.accelerator.autocast(),
            ):
                some = (x0[part], level[part], noise[part], label[part] if self.spec.classes else None)
                loss, sigma = self._loss(*some)
                self._check_finite(loss, sigma)
                self.accelerator.backward(loss.sum() / len(x0))
            losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_averages()
        return torch.cat(losses)

    def _loss(self, x0: Tensor, level: Tensor, noise: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of each image and its (larger) noise level, both [B]. level: uniform in [0, 1)."""
        phase, spec = self.phase, self.spec
        if phase.method == "ct":
            n = ct_scales(self.step, self.config.steps(phase), phase.s0, phase.s1)
            t, r = ct_pair(n, level, spec.sigma_min, spec.sigma_max)
            return ct_loss(
                self._student, same_dropout(self._with(self.target), self._cuda()), x0, t, r, noise, label
            ), t
        normal = math.sqrt(2) * torch.erfinv(2 * level.clamp(1e-6, 1 - 1e-6) - 1)
        t = lognormal(normal, phase.p_mean, phase.p_std, spec.sigma_min, spec.sigma_max)
        if phase.method == "edm":
            return edm_loss(self._student, x0, t, noise, label, spec.sigma_data), t
        first, last = phase.stages
        stage = first + self.step * (last - first + 1) // self.config.steps(phase)
        r = ect_r(t, stage, phase.q, phase.k, phase.b)
        c = pseudo_huber_c(math.prod(spec.image), phase.huber)
        teach = same_dropout(self.accelerator.unwrap_model(self.model), self._cuda())
        return ect_loss(self._student, teach, x0, t, r, noise, label, c, spec.sigma_min), t

    def _student(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return self.model(x, sigma, label)

    def _with(self, weights: dict[str, Tensor]) -> Any:
        """Return the denoiser with other weights, as a function."""
        named = {f"network.{name}": weight for name, weight in weights.items()}
        model = self.denoiser
        return lambda x, sigma, label: torch.func.functional_call(model, named, (x, sigma, label))

    def _cuda(self) -> list[int]:
        device = self.accelerator.device
        return [device.index or 0] if device.type == "cuda" else []

    def _set_lr(self) -> None:
        left = 1 - self.step / self.config.steps(self.phase)
        factor = min(1.0, left / self.phase.lr_decay) if self.phase.lr_decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.lr * factor

    def _update_averages(self) -> None:
        decay = warm_decay(self.phase.ema, self.step)
        update_ema(self.ema.values(), self.weights.values(), decay)
        if self.phase.method == "ct":
            mu = ct_ema(self.step, self.config.steps(self.phase), self.phase.s0, self.phase.s1, self.phase.mu0)
            update_ema(self.target.values(), self.weights.values(), mu)

    def _check_finite(self, loss: Tensor, sigma: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        levels = ", ".join(f"{s:.4g}" for s in sigma[~torch.isfinite(loss)][:8].tolist())
        raise CheckFailed(
            f"the loss is not finite at step {self.step} of {self.phase.method} ({self.images:,} images), "
            f"noise levels {levels}; the last checkpoint is untouched; {self._advice()}"
        )

    def _advice(self) -> str:
        lr = f"--set {self.phase.method}.lr={self.phase.lr / 3:.1g}"
        return f"try a smaller {lr}, --set precision=fp32, or look for damaged images"


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        raise EngineError(f"device=cuda was asked for, but {why}; use --set device=cpu or install a CUDA build")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = {"auto": "no" if cpu else "bf16", "fp32": "no"}.get(config.precision, config.precision)
    if precision == "fp16" and cpu:
        raise EngineError("precision=fp16 needs CUDA; on a CPU use fp32 or bf16")
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if config.batch % (accelerator.num_processes * config.accumulation):
        raise CmfastError(
            f"batch={config.batch} does not divide among {accelerator.num_processes} processes "
            f"and {config.accumulation} micro-batches"
        )
    return accelerator


def network_config(config: TrainConfig, classes: int) -> NetworkConfig:
    """Return the shape of the network that a run trains, on data of that many classes."""
    return network_from_dict({"type": config.network, "classes": classes, **config.network_fields()})


def _check_same_run(config: TrainConfig, out: Path) -> None:
    file = out / "config.json"
    if not file.exists() or not (out / "state.pt").exists():
        return
    try:
        # A field that is newer than the run gets its default, which is what the run did.
        before = to_dict(from_dict(json.loads(file.read_text())))
    except (ValueError, TypeError, KeyError, AttributeError, CmfastError):
        raise ArtifactError(f"{file} is damaged or of another version; begin in another --out folder") from None
    now = to_dict(config)
    changed = sorted(name for name in now if name not in FREE_FIELDS and now[name] != before[name])
    if changed:
        raise CmfastError(
            f"{out} holds a run with another {', '.join(changed)}; "
            "repeat the command that began it to continue, or name another --out"
        )


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set in any process: they must stop after the same step, or they wait for ever."""
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total > 0)


def _share(batch: int, index: int, processes: int) -> slice:
    each = batch // processes
    return slice(index * each, (index + 1) * each)


def _step_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=6).digest(), "little")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them: the loop saves and stops after its step.

    The second signal kills as usual, should the first not get through.
    """
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
