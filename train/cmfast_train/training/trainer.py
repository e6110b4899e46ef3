# SPDX-License-Identifier: MIT
"""The training loop: phases of steps, with checkpoints that lose nothing.

Everything random in a step is drawn from (seed, step) for the whole batch, and each process takes its share. So a
resumed run computes what an uninterrupted run computes, bit for bit on one CPU. Without dropout, a run on several
processes or in micro-batches computes the same up to rounding.

DIR/model.pt    the EMA weights (`checkpoint`)      DIR/config.json    the configuration
DIR/state.pt    what resuming needs                 DIR/log.jsonl, DIR/tensorboard    the curves
DIR/samples/    samples per checkpoint              DIR/phases/, DIR/ema/    models of finished phases, more averages

A step is in `step`, recorded as a CUDA graph in `step_graph`; what it computes in `methods`; the networks that it
evaluates in `step_networks`; the state of a phase in `state`, what is
saved of it in `saving`; whose the folder is in `folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cmfast.errors import BackendError, CheckFailed, CmfastError, CmfastWarning, one_line
from cmfast.progress import progress_bar
from cmfast_train.config.custom_network import of_denoiser
from cmfast_train.config.train_config import ARRAYS, TrainConfig
from cmfast_train.data.arrays import Given, Samples, X, check_spread, digest, samples_of
from cmfast_train.data.batches import batches
from cmfast_train.data.images import Data, check_batch, load_data
from cmfast_train.first_call import try_own
from cmfast_train.kernels.signals import take_back_signals
from cmfast_train.training.float32 import exact_float32
from cmfast_train.training.folder import begin_folder, check_folder, claimed, disk_errors_in_one_line
from cmfast_train.training.initial_model import Own
from cmfast_train.training.log import TrainLog
from cmfast_train.training.parallel import together
from cmfast_train.training.saving import resume
from cmfast_train.training.state import Run
from cmfast_train.training.step_graph import Steps, check_graph, recorded, trying_algorithms

SAVED = "saved"
_GONE = re.compile("gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)  # errors of a lost process
CHECK_EVERY = 32  # steps between checks that wait for a GPU or another process


class NoBatch(Exception):
    """The next images cannot be read; the run is after its last step. `cause` is raised in the end."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause

    def with_advice(self, saved: bool, out: Path) -> Exception:
        """Return the cause; an error that the user can fix also names the command that continues the run."""
        if not isinstance(self.cause, CmfastError) or not saved:
            return self.cause
        return CmfastError(f"{self.cause}; {out} holds a checkpoint of the last step; the same command continues")


def train(
    config: TrainConfig, out: Path, data_root: Path | None, own: Own | None = None, arrays: Given | None = None
) -> Path:
    """Train, or continue, a run; return the path of its model.pt.

    Args:
        config: of the run.
        out: its folder.
        data_root: folder, archive or file of the data, where the data set needs one.
        own: the denoiser of a run with network=own.
        arrays: of a run with data=arrays: what `cmfast_train.data.arrays.samples_of` takes; None: data_root.

    Raises:
        CmfastError: the configuration, the data, the models or the folder do not fit, or the run cannot go on.
        KeyboardInterrupt: a signal stopped it; with the argument SAVED if a checkpoint of its last step was written.
    """
    if own is not None:
        config = of_denoiser(config, own.denoiser.spec)
    accelerator = accelerator_of(config)
    with disk_errors_in_one_line(out), contextlib.ExitStack() as whole_run:

        def claim() -> None:
            check_folder(config, out, Path(arrays) if isinstance(arrays, (str, os.PathLike)) else data_root)
            whole_run.enter_context(claimed(out))

        main = accelerator.is_main_process
        together(accelerator, claim if main else None)
        if accelerator.mixed_precision == "no":  # the default of cuDNN is TensorFloat-32
            together(accelerator, lambda: whole_run.enter_context(exact_float32(accelerator.device)))
        data = _load_data(config, data_root, accelerator, own, arrays)
        config = _with_names(config, data)
        first = _first(config, data)
        if own is not None:
            try_own(config, own, first, accelerator)
        shown = {name: values for name, values in first.items() if name != X} if config.data == ARRAYS else {}
        run = Run(config, out, accelerator, len(data), data.classes, own, shown, digest(data))
        together(accelerator, (lambda: check_folder(config, out)) if main else None)  # no other run can change it now
        check_graph(run.context)
        resume(run)
        together(accelerator, (lambda: begin_folder(config, out)) if main else None)
        _take_steps(run, data)
    return out / "model.pt"


def _take_steps(run: Run, data: Data | Samples) -> None:
    """Take the remaining steps, with checkpoints, log and progress bar; stop at a signal."""
    config, accelerator, saved = run.config, run.context.accelerator, run.images
    take = Steps(run)

    def save() -> None:
        nonlocal saved
        with _memory_in_one_line(config):
            take.save()
        saved = run.images
        log.checkpoint(run.images, run.where())

    with (
        _stop_signals() as stopped,
        TrainLog(run.context.out, run.images, config, accelerator) as log,
        trying_algorithms(accelerator.device),
        progress_bar("training", config.images, _unit(config), run.images, accelerator.is_main_process) as advance,
    ):
        try:
            if accelerator.device.type == "cuda":
                graph = {phase.name: recorded(run, phase) for phase in config.phases}
                fused = {phase.name: run.context.why_not_fused(phase) or "fused" for phase in config.phases}
                log.note(run.images, run.where(), graph=graph, fused=fused)
            for loss_per_image in steps(run, data, take):
                take_back_signals()  # of a step that compiled a kernel
                log.add(loss_per_image.mean(), run.images, run.where())
                advance(config.batch, f"{run.phase.name} loss {log.recent:.4g}")
                stop = _any(accelerator, bool(stopped), run)
                due = run.images // config.checkpoint_images > (run.images - config.batch) // config.checkpoint_images
                if due or stop or run.images == config.images:
                    save()
                if stop:
                    raise KeyboardInterrupt(SAVED)
        except NoBatch as err:
            if run.images > saved and accelerator.num_processes == 1:  # others cannot take part now
                save()
            is_saved = run.images == saved > 0
            if stopped:  # the signal may have ended the readers of images as well
                raise KeyboardInterrupt(*([SAVED] if is_saved else [])) from None
            raise err.with_advice(is_saved, run.context.out) from None


def steps(run: Run, data: Data | Samples, take: Steps | None = None) -> Iterator[Tensor]:
    """Run the remaining optimiser steps; yield the loss of each image, [B], after each step."""
    take = take or Steps(run)
    config, accelerator = run.config, run.context.accelerator
    share = _share(config.batch, accelerator.process_index, accelerator.num_processes)
    done, total = run.images // config.batch, config.images // config.batch
    pin = accelerator.device.type == "cuda"
    keep = accelerator.device if pin else None
    unchecked: list[tuple[int, int, Tensor, Tensor]] = []
    with contextlib.closing(
        batches(data, config.batch, config.seed, done, total, share, config.workers, pin, keep)
    ) as stream:
        for step in range(done, total):
            try:
                images, *values = next(stream)
            except Exception as err:  # between two steps: the run can be saved
                if unchecked:
                    _check_finite(run, unchecked)
                raise NoBatch(err) from err
            if run.step == run.state.total:
                take.next_phase()
            try:
                with _memory_in_one_line(config):
                    given = dict(zip(data.names, values, strict=True))
                    conditions = {each.name: given[each.name] for each in run.context.spec.conditions}
                    loss, sigma = take(step, images, conditions, share)
            except RuntimeError as err:
                if accelerator.num_processes > 1 and _GONE.search(str(err)):
                    raise CmfastError(
                        f"another process of the run has ended or cannot be reached ({one_line(err, 120)}); the last "
                        "checkpoint is untouched; the same command continues from it"
                    ) from None
                raise
            unchecked.append((run.step, run.images, loss, sigma))
            if not pin or len(unchecked) == CHECK_EVERY or run.step + 1 == run.state.total:
                _check_finite(run, unchecked)  # on a GPU this waits for it
                unchecked.clear()
            run.step += 1
            yield loss


@contextlib.contextmanager
def _memory_in_one_line(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        less = "" if config.recompute else "--set recompute=true continues this run with less memory, more slowly; "
        same = "draw others of the same kind" if any(row.joint for row in config.methods) else "compute the same"
        raise BackendError(
            f"the GPU has too little memory for batch={config.batch}; {less}smaller micro-batches {same}: "
            f"--set accumulation={2 * config.accumulation} (begin in another --out folder)"
        ) from None


def _check_finite(run: Run, losses: list[tuple[int, int, Tensor, Tensor]]) -> None:
    """Raise unless the losses of some steps are finite: (step of the phase, images before, losses, noise levels).

    The bad step is already taken, but not saved: `saving.save` refuses weights that are not finite.
    """
    if bool(torch.stack([loss.isfinite().all() for _, _, loss, _ in losses]).all()):
        return
    step, images, loss, sigma = next(entry for entry in losses if not bool(entry[2].isfinite().all()))
    sigmas = ", ".join(f"{s:.4g}" for s in sigma[~torch.isfinite(loss)][:8].tolist())
    raise CheckFailed(
        f"the loss is not finite at step {step} of {run.phase.method} ({images:,} images), "
        f"noise levels {sigmas}; the last checkpoint is untouched; {run.advice()}"
    )


def accelerator_of(config: TrainConfig) -> Accelerator:
    """Return the processes, the device and the precision of a run.

    Raises:
        BackendError: the device or the precision is not available.
        CmfastError: the configuration cannot be trained by these processes.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        raise BackendError(f"device=cuda is not available: {why}; use --set device=cpu or install a CUDA build")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise CmfastError("the launcher requests Accelerate's FSDP; remove that and use --set shard=true")
    if torch.get_default_dtype() != torch.float32:
        raise CmfastError(
            f"training needs PyTorch's default dtype, float32, not {torch.get_default_dtype()}: "
            "torch.set_default_dtype(torch.float32)"
        )
    if config.shard and config.precision == "fp16":
        raise CmfastError("shard=true needs precision bf16 or fp32, not fp16")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = {"auto": "no" if cpu else "bf16", "fp32": "no"}.get(config.precision, config.precision)
    if precision == "fp16" and cpu:
        raise BackendError("precision=fp16 needs CUDA; on a CPU use fp32 or bf16")
    accelerator = _new_accelerator(precision, cpu)
    if config.batch % (accelerator.num_processes * config.accumulation):
        raise CmfastError(
            f"batch={config.batch} does not divide among {accelerator.num_processes} processes "
            f"and {config.accumulation} micro-batches"
        )
    _check_fake_scores(config, precision, config.batch // (accelerator.num_processes * config.accumulation))
    return accelerator


def _check_fake_scores(config: TrainConfig, precision: str, samples: int) -> None:
    """Raise CmfastError for what networks that learn in turn cannot have. samples: of a micro-batch."""
    for phase in config.phases:
        if not phase.needs.fake_scores:
            continue
        if config.shard:
            raise CmfastError(f"shard=true cannot train the networks of {phase.name}; use shard=false")
        if precision == "fp16":
            raise CmfastError(f"{phase.name} differentiates without a loss scale; use precision=bf16 or fp32")
        if samples < phase.needs.fake_scores:
            raise CmfastError(f"{phase.name} needs {phase.needs.fake_scores} samples a micro-batch; set a larger batch")


def _new_accelerator(precision: str, cpu: bool) -> Accelerator:
    try:
        return Accelerator(mixed_precision=precision, cpu=cpu)
    except ValueError as err:
        if "already been initialized" not in str(err):
            raise
        raise CmfastError(
            f"Accelerate keeps precision and device of the first run in a process: train with precision={precision} "
            f"on the {'CPU' if cpu else 'GPU'} in another process"
        ) from None


def _load_data(
    config: TrainConfig, root: Path | None, accelerator: Accelerator, own: Own | None, arrays: Given | None
) -> Data | Samples:
    """Return the data set. One process of each machine loads it before the others, because it may have to download."""
    if config.data == ARRAYS:
        given = root if arrays is None else arrays
        if own is None or given is None:
            raise CmfastError("data=arrays needs --network MODULE:FACTORY, --spec FILE and --data FILE")
        samples = together(accelerator, lambda: samples_of(given, own.denoiser.spec))
        assert samples is not None
        if accelerator.is_main_process and (far := check_spread(samples, own.denoiser.spec)):
            warnings.warn(far, CmfastWarning, stacklevel=4)
        return samples
    first = accelerator.is_local_main_process
    data = together(accelerator, (lambda: load_data(config, root)) if first else None)
    return data if data is not None else load_data(config, root)


def _first(config: TrainConfig, data: Data | Samples) -> dict[str, Tensor]:
    """Return the first training samples of a run with a custom network, as "x", and their conditions."""
    if not config.own:
        return {}
    batch = check_batch(data.__getitems__(list(range(min(config.grid, len(data))))))
    return dict(zip((X, *data.names), batch, strict=True))


def _unit(config: TrainConfig) -> str:
    return "samples" if config.data == ARRAYS else "images"


def _with_names(config: TrainConfig, data: Data | Samples) -> TrainConfig:
    """Return the configuration with the names of the data's classes, if the model is conditional."""
    names = tuple(data.class_names)
    return dataclasses.replace(config, class_names=names) if config.conditional else config


def _any(accelerator: Accelerator, flag: bool, run: Run) -> bool:
    """Return whether the flag is set in any process: all must stop after the same step, or they wait for ever.

    The processes exchange it after every CHECK_EVERY steps and before the last.
    """
    if accelerator.num_processes == 1:
        return flag
    if run.images // run.config.batch % CHECK_EVERY and run.images != run.config.images:
        return False
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total > 0)


def _share(batch: int, index: int, processes: int) -> slice:
    each = batch // processes
    return slice(index * each, (index + 1) * each)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the loop saves and stops after its step.

    A second signal acts as usual. Only the main thread receives signals, so a run in another thread changes no handler.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else before[signal.Signals(number)])

    # None: a handler that is not Python's and cannot be restored.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
