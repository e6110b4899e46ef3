# SPDX-License-Identifier: MIT
"""Checkpoints of a run: what is written, in which order, and how a run continues from them.

Files: see `trainer`. A model file is written before the state that continues from it, so a kill loses no finished work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CheckFailed, CmfastError, one_line
from cmfast.files import atomic_file
from cmfast_train.checkpoint import Checkpoint, safe_load, save_checkpoint
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.custom import live_buffers
from cmfast_train.training.initial_model import phase_spec
from cmfast_train.training.parallel import fill, fill_optimizer, together, whole
from cmfast_train.training.preview import save_samples
from cmfast_train.training.state import Run, phase_file

STATE_FORMAT = "cmfast-state/2"


def save(run: Run) -> None:
    """Write the model, samples of it and, last, the state that a resumed run continues from.

    Raises:
        CheckFailed: the weights are not finite; nothing is written.
    """
    state, accelerator = run.state, run.context.accelerator
    if not all(bool(weight.isfinite().all()) for weight in (*state.student.parameters(), *state.ema.values())):
        raise CheckFailed(
            f"the weights are not finite after step {run.step} of {run.phase.method} ({run.images:,} images); "
            f"the last checkpoint is untouched; {run.advice()}"
        )
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    values = {  # every process takes part in gathering it
        "format": STATE_FORMAT,
        "made_for": run.context.made_for,
        "phase": state.index,
        "step": run.step,
        "weights": whole(state.weights, main),
        "averages": whole(state.averages.state(), main),
        "target": whole(_parameters(state.target), main),
        "teacher": whole({**_parameters(state.saved_teacher), **_buffers(state.saved_teacher, run)}, main),
        "log_variance": whole(state.log_variance, main),
        **({"fakes": whole(_of_fakes(run), main)} if state.student.fakes else {}),
        **({"buffers": whole(state.buffers, main)} if run.config.own else {}),  # those of ours do not change
        "optimizer": whole(state.optimizer.state_dict(), main),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
    }
    together(accelerator, (lambda: _write(run, values)) if main else None)


def resume(run: Run) -> None:
    """Continue from state.pt in the folder of the run, where there is one.

    Raises:
        ArtifactError: the file is damaged, or is not a state of this run.
        CmfastError: the run began with other data or models, on another device or in another precision.
    """
    file = run.context.out / "state.pt"
    if not file.exists():
        return
    values = safe_load(file)
    if not isinstance(values, dict) or values.get("format") != STATE_FORMAT:
        raise ArtifactError(f"{file}: not a training state of this version; begin in another --out folder")
    _check_made_for(run, values.get("made_for", {}))
    try:
        index, step = _position(run.config, values["phase"], values["step"])
        weights = _whole_weights(run, values["weights"], values.get("buffers", run.state.buffers))
        saved = values["teacher"]
        is_whole = bool(saved) and (not run.config.own or run.state.buffers.keys() <= saved.keys())
        run.enter(index, step, weights, {**weights, **saved} if is_whole else None)
        state = run.state
        for module, name in ((state.target, "target"), (state.saved_teacher, "teacher")):
            if module is not None:
                fill(_parameters(module), values[name])
        fill({name: own for name, own in _buffers(state.saved_teacher, run).items() if name in saved}, saved)
        if state.student.fakes:
            fill(_of_fakes(run), values["fakes"])
        fill(state.log_variance, values["log_variance"])
        for name, average in state.averages.state().items():
            fill(average, values["averages"][name])
        fill_optimizer(state.optimizer, values["optimizer"])
        if scaler := run.context.accelerator.scaler:
            scaler.load_state_dict(values["scaler"])
    except CmfastError:
        raise
    except Exception as err:  # whatever is wrong with it
        raise ArtifactError(f"{file}: not the training state of this run: {one_line(err)}") from None


def next_phase(run: Run) -> None:
    """Write the finished phase's model to DIR/phases and begin the next phase from its averaged weights."""
    finished = _checkpoint(run, whole(run.state.ema))

    def write() -> None:
        file = phase_file(run.context, run.state.index)
        file.parent.mkdir(exist_ok=True)
        save_checkpoint(finished, file)

    together(run.context.accelerator, write if run.context.accelerator.is_main_process else None)
    run.enter(run.state.index + 1, 0, finished.weights)


def _check_made_for(run: Run, made_for: Any) -> None:
    """Raise unless a state was made for the data, the device, the precision and the models of this run."""
    out, now = run.context.out, run.context.made_for
    if not isinstance(made_for, dict):
        raise ArtifactError(f"{out / 'state.pt'}: not the training state of this run: made_for is not a dictionary")
    if changed := [name for name in now if not _same(made_for.get(name), now[name])]:
        raise CmfastError(
            f"{out} holds a run with another {', '.join(changed)} "
            f"({', '.join(f'{made_for.get(name)}, now {now[name]}' for name in changed)}); "
            "continue it where and with what it began, or start a new run from its model: "
            f"--init {out / 'model.pt'} --out NEW"
        )


def _same(there: object, here: object) -> bool:
    """Return whether two facts agree: of the data, as far as both know them; a digest may be in one of them only."""
    if isinstance(there, list) and isinstance(here, list) and {len(there), len(here)} == {2, 3}:
        return there[:2] == here[:2]
    return there == here


def _position(config: TrainConfig, phase: Any, step: Any) -> tuple[int, int]:
    """Return the index of the phase and the step of a state, if there is such a step."""
    for name, value, end in (("phase", phase, len(config.phases) - 1), ("step", step, None)):
        end = config.steps(config.phases[phase]) if end is None else end
        if type(value) is not int or not 0 <= value <= end:
            raise ValueError(f"{name} is {value!r}, expected 0 to {end}")
    return phase, step


def _write(run: Run, values: Mapping[str, Any]) -> None:
    context = run.context
    checkpoint = _checkpoint(run, values["averages"][str(run.phase.ema)])
    save_checkpoint(checkpoint, context.out / "model.pt")
    # A separate denoiser: the one in training runs in mixed precision and with dropout.
    denoiser = checkpoint.denoiser().to(context.device)
    place = context.out / "samples" / f"{run.images:012d}"
    save_samples(denoiser, checkpoint.spec, place, run.config.grid, context.device, context.shown)
    _save_averages(run, values["averages"])
    with atomic_file(context.out / "state.pt") as temporary:
        torch.save(dict(values), temporary)


def _save_averages(run: Run, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the averages that are not the model: of constant decay the newest, of power functions a snapshot."""
    config, folder = run.config, run.context.out / "ema"
    if config.emas or config.ema_stds:
        folder.mkdir(exist_ok=True)
    for rate in map(str, config.emas):
        save_checkpoint(_checkpoint(run, averages[rate]), folder / f"{rate}.pt")
    for std in config.ema_stds:
        source = {"format": "cmfast", "ema_std": std, "ema_step": run.step, "ema_phase": run.state.index}
        snapshot = replace(_checkpoint(run, averages[f"std{std}"]), source=source)
        save_checkpoint(snapshot, folder / f"std{std:.3f}-{run.images:012d}.pt")


def _checkpoint(run: Run, weights: Mapping[str, Tensor]) -> Checkpoint:
    """Return the model with these whole weights."""
    spec = phase_spec(run.context.spec, run.phase)
    weights = _whole_weights(run, weights, run.state.buffers)
    return Checkpoint(spec=spec, network=run.context.network, weights=weights)


def _whole_weights(run: Run, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the network from its parameters, named once each, and its buffers."""
    return {**buffers, **weights, **{other: weights[name] for other, name in run.state.tied.items()}}


def _of_fakes(run: Run) -> dict[str, Tensor]:
    """Return the weights of the fake scores, and the buffers of custom ones, by name."""
    fakes = run.state.student.fakes
    buffers = {f"{i}.{name}": own for i, fake in enumerate(fakes) for name, own in _buffers(fake, run).items()}
    return dict(fakes.named_parameters()) | buffers


def _buffers(denoiser: Any, run: Run) -> Mapping[str, Tensor]:
    """Return what the state dict of a custom network holds beside its weights; that of ours does not change."""
    return live_buffers(denoiser.network) if denoiser is not None and run.config.own else {}


def _parameters(denoiser: Denoiser | None) -> dict[str, Tensor]:
    return dict(denoiser.network.named_parameters()) if denoiser is not None else {}
