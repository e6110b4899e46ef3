# SPDX-License-Identifier: MIT
"""Optimiser steps as CUDA graphs: a small network's step is thousands of launches, which cost more than they compute.

A recording covers the losses, the backward pass, the clipping and RAdam's update. What changes from step to step is in
tensors at fixed addresses, filled before each replay: images, conditions, random numbers, RAdam's two factors. Python
numbers of a method (`Method.constants`) are part of the recording; it is made again when they change. Where networks
take turns (`Method.turns`), each turn has its recording. The averages of the weights follow outside, in few launches:
their decays change with every step.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, "Whole-network capture". Plain steps precede a
recording: cuDNN tries its algorithms, and grids of noise levels and the optimiser's state are made. `step` defines a
step; its numbers are the same either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from cmfast.errors import BackendError, CmfastError
from cmfast_train.backends.torch_cuda import WARM_UPS  # plain steps before a recording
from cmfast_train.backends.torch_cuda import record as record_graph
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.methods.paths import Conditions
from cmfast_train.training.context import RunContext
from cmfast_train.training.saving import next_phase, save
from cmfast_train.training.state import Run, set_lr, update_averages
from cmfast_train.training.step import Inputs, draw, gradients, optimise, seed_dropout

WORTH = 20  # steps that a recording must serve: it costs as much as about ten

aten = torch.ops.aten
TakeStep = Callable[[int, Tensor, Conditions, slice], tuple[Tensor, Tensor]]  # as `step.optimise`, of a run
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]  # computation -> its replay


@final
class Steps:
    """Takes the optimiser steps of a run, phase after phase, recorded where possible."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._take: TakeStep | None = None

    def __call__(self, step: int, images: Tensor, conditions: Conditions, share: slice) -> tuple[Tensor, Tensor]:
        if self._take is None:
            self._take = step_of(self._run)
        return self._take(step, images, conditions, share)

    def next_phase(self) -> None:
        """Begin the next phase of the run."""
        self._take = None  # releases a recording's memory
        next_phase(self._run)

    def save(self) -> None:
        """Write a checkpoint. If the GPU's memory does not suffice, release the recorded step and try again.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice either way.
        """
        try:
            save(self._run)
        except torch.OutOfMemoryError:
            # Distributed runs record nothing: one process alone must not start a checkpoint again.
            if not (isinstance(self._take, RecordedSteps) and self._take.release()):
                raise
        else:
            return
        torch.cuda.empty_cache()  # only here: the error held the memory of the first try
        save(self._run)


def step_of(run: Run) -> TakeStep:
    """Return the function that takes the optimiser steps of the run's present phase."""
    if not why_not(run.context, run.phase):
        return RecordedSteps(run, record)
    return functools.partial(optimise, run)


def check_graph(context: RunContext) -> None:
    """Raise if graph=true is set and a phase of the run cannot be recorded."""
    if context.config.graph != "true":
        return
    for phase in context.config.phases:
        if why := why_not(context, phase):
            kind = BackendError if context.device.type != "cuda" else CmfastError
            raise kind(f"graph=true: the steps of {phase.name} cannot be a CUDA graph, {why}; use --set graph=auto")


def why_not(context: RunContext, phase: Phase) -> str:
    """Return why the steps of a phase are not recorded, "" if they are."""
    accelerator = context.accelerator
    if context.config.graph == "false":
        return "graph=false"
    if accelerator.device.type != "cuda":
        return f"the device is {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "the run has more than one process"
    if context.config.own:
        return "a network of your own may read numbers on the CPU"
    if accelerator.mixed_precision == "fp16":
        return "precision=fp16 reads each step's gradients"
    return _why_not(context.config, phase, dropout=context.dropout > 0)


def _why_not(config: TrainConfig, phase: Phase, *, dropout: bool) -> str:
    if config.accumulation > 1:
        return "accumulation is above 1"
    if config.recompute:
        return "recompute=true restores random states"
    if phase.row.differentiates:
        return f"{phase.method} differentiates in forward mode"
    if dropout and not phase.row.one_evaluation:
        return "its evaluations share dropout masks, which restores random states"
    if phase.needs.distance == "lpips":
        return "loss=lpips is a network of another library"
    return ""


def recorded(run: Run, phase: Phase) -> str:
    """Return the log's text about the steps of a phase: "recorded", or why they are not."""
    if why := why_not(run.context, phase):
        return why
    first = run.step if phase is run.phase else 0
    if not _is_worth(phase, first, run.config.steps(phase)):
        return f"too short: a recording needs {WARM_UPS + WORTH} steps that compute the same"
    return "recorded"


def constants_of(phase: Phase, step: int, total: int) -> tuple[Any, ...]:
    """Return the Python numbers that a recording of this step contains."""
    return phase.constants(step, total)


def _is_worth(phase: Phase, first: int, total: int) -> bool:
    """Return whether one of the steps [first, total) will be recorded."""
    taken: dict[tuple[Any, ...], int] = {}
    for step in range(first, total):
        now = constants_of(phase, step, total)
        if _is_due(phase, step, total, taken.get(now, 0)):
            return True
        taken[now] = taken.get(now, 0) + 1
    return False


def _is_due(phase: Phase, step: int, total: int, taken: int) -> bool:
    """Return whether to record a step, after `taken` steps with the same constants."""
    if taken < WARM_UPS:
        return False
    now = constants_of(phase, step, total)
    coming = range(step, min(step + phase.turns, total))
    alike = [other for other in coming if constants_of(phase, other, total) == now]
    rounds, rest = divmod(WORTH - 1, len(alike))
    last = alike[rest] + rounds * phase.turns
    return last < total and constants_of(phase, last, total) == now


@contextmanager
def trying_algorithms(device: torch.device) -> Iterator[None]:
    """On CUDA, let cuDNN benchmark its algorithms in this context: the shapes of a run's steps are fixed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass
class _Turn:
    """Steps with the same constants.

    Args:
        weights: those that a plain step of them changed.
        taken: plain steps so far.
        radam: updates these weights, in a recording.
        replay: of the recording.
    """

    weights: list[Tensor] = field(default_factory=list)
    taken: int = 0
    radam: _Radam | None = None
    replay: Callable[[], Tensor] | None = None


@final
class RecordedSteps:
    """The steps of a phase: a few plain ones, then replays of a recorded one.

    All run on a separate CUDA stream: the default stream cannot be recorded, and a backward pass must not depend on
    another stream that used the weights. The caller's stream waits for each step, and each step for it.
    """

    def __init__(self, run: Run, record: Record) -> None:
        self._run, self._record = run, record
        device = run.context.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.recordings = 0
        self._turns: dict[tuple[Any, ...], _Turn] = {}  # by constants
        self._inputs: Inputs | None = None

    def __call__(self, step: int, images: Tensor, conditions: Conditions, share: slice) -> tuple[Tensor, Tensor]:
        if self._stream is None:
            return self._take(step, images, conditions, share)
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            losses = self._take(step, images, conditions, share)
        outside.wait_stream(self._stream)
        return losses

    def release(self) -> bool:
        """Release the recorded steps, which later steps record again; return whether there was one."""
        released = [turn for turn in self._turns.values() if turn.replay is not None]
        for turn in released:
            turn.replay = None
        return bool(released)

    def _take(self, step: int, images: Tensor, conditions: Conditions, share: slice) -> tuple[Tensor, Tensor]:
        run, total = self._run, self._run.state.total
        turn = self._turn()
        if turn.replay is None and not _is_due(run.phase, run.step, total, turn.taken):
            return self._plain(turn, step, images, conditions, share)
        if self._inputs is None:
            self._inputs = _buffers(run, images, conditions)
        inputs = self._inputs
        draw(run, step, inputs.noises, inputs.uniform)
        inputs.images.copy_(images, non_blocking=True)
        for name, values in conditions.items():
            inputs.conditions[name].copy_(values, non_blocking=True)
        if turn.replay is None:
            turn.radam = _Radam(run.state.optimizer, turn.weights)
            turn.replay = self._record(functools.partial(_body, run, inputs, turn.radam))
            self.recordings += 1
        set_lr(run)
        assert turn.radam is not None
        turn.radam.begin_step()
        seed_dropout(run, step)
        loss, sigma = turn.replay().clone()  # the next step overwrites it
        update_averages(run)
        return loss, sigma

    def _turn(self) -> _Turn:
        """Return the turn of the coming step; those whose constants do not recur are forgotten."""
        phase, first, total = self._run.phase, self._run.step, self._run.state.total
        coming = [constants_of(phase, step, total) for step in range(first, min(first + phase.turns, total))]
        self._turns = {constants: self._turns.get(constants, _Turn()) for constants in coming}
        return self._turns[coming[0]]

    def _plain(
        self, turn: _Turn, step: int, images: Tensor, conditions: Conditions, share: slice
    ) -> tuple[Tensor, Tensor]:
        """Take a plain step, and note which weights it changed."""
        before = _steps_of(self._run.state.optimizer)
        losses = optimise(self._run, step, images, conditions, share)
        after = _steps_of(self._run.state.optimizer)
        turn.weights = [weight for weight, taken in after.items() if taken > before.get(weight, 0.0)]
        turn.taken += 1
        return losses


def _body(run: Run, inputs: Inputs, radam: _Radam) -> Tensor:
    """Compute losses, gradients and new weights from the buffers; return loss and noise levels, [2, B]."""
    loss, sigma = gradients(run, inputs)
    radam.update()
    run.state.optimizer.zero_grad(set_to_none=True)  # the rest of the recording reuses their memory
    return torch.stack([loss, sigma])


def _steps_of(optimizer: Any) -> dict[Tensor, float]:
    """Return how many steps of the optimiser each weight has taken, those that have taken one."""
    return {weight: float(state["step"]) for weight, state in optimizer.state.items()}


def record(body: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a training step on the current stream; other threads may pin memory for batches meanwhile."""
    return record_graph(
        body,
        "PyTorch could not record the training step as a CUDA graph ({reason}); train without: --set graph=false",
        stream=torch.cuda.current_stream(),
        errors_of="thread_local",
    )


@final
class _Radam:
    """The update of torch.optim.RAdam on its own state, with the numbers that change in tensors.

    PyTorch's `capturable` form keeps them for each weight, in a thousand tiny kernels; here all weights of a turn have
    taken the same number of steps. Otherwise the order of operations is that of its `foreach` form: the same bits.
    """

    def __init__(self, optimizer: Any, weights: list[Tensor]) -> None:
        (self._group,) = optimizer.param_groups
        self._weights = weights
        states = [optimizer.state[weight] for weight in self._weights]
        self._steps = [state["step"] for state in states]  # on the CPU
        if len(set(map(float, self._steps))) > 1:
            raise BackendError(
                "weights of several turns cannot be recorded as CUDA graphs; train with --set graph=false"
            )
        self._means = [state["exp_avg"] for state in states]
        self._squares = [state["exp_avg_sq"] for state in states]
        self._one = torch.tensor(1.0)
        self._divisor, self._summand = torch.zeros(2, device=self._weights[0].device)

    def begin_step(self) -> None:
        """Count a step and set the factors of its update."""
        torch._foreach_add_(self._steps, self._one, alpha=1.0)
        divisor, summand = radam_factors(float(self._steps[0]), self._group["lr"], *self._group["betas"])
        self._divisor.fill_(divisor)  # a number is part of the launch; a copy would wait, or need memory of its own
        self._summand.fill_(summand)

    @torch.no_grad()
    def update(self) -> None:
        """Update the weights from their gradients."""
        beta1, beta2 = self._group["betas"]
        slopes = [weight.grad for weight in self._weights if weight.grad is not None]
        torch._foreach_lerp_(self._means, slopes, 1 - beta1)
        torch._foreach_mul_(self._squares, beta2)
        torch._foreach_addcmul_(self._squares, slopes, slopes, 1 - beta2)
        sizes = torch._foreach_sqrt(self._squares)
        torch._foreach_add_(sizes, self._group["eps"])
        aten._foreach_div_.Tensor(sizes, self._divisor)  # by name: otherwise a tensor may be read as a Python number
        torch._foreach_reciprocal_(sizes)
        aten._foreach_add_.Tensor(sizes, self._summand)
        torch._foreach_addcmul_(self._weights, self._means, sizes)


def radam_factors(step: float, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """Return (d, s) of RAdam's update (arXiv:1908.03265, Algorithm 2), weight += m (1 / ((sqrt(v) + eps) / d) + s).

    While the variance cannot be rectified, d is -0 and s the step's size; afterwards s is -0.

    Args:
        step: counted from 1.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (beta2**step) / (1 - beta2**step)
    rectified = 0.0
    if length > 5:
        rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    plain = 0.0 if rectified > 0 else 1.0
    correction = 1 - beta1**step
    return ((1 - beta2**step) ** 0.5) * (lr * rectified / correction) * -1, (lr * plain / correction) * -1


def _buffers(run: Run, images: Tensor, conditions: Conditions) -> Inputs:
    device = run.context.device
    return Inputs(
        images=torch.empty_like(images, device=device),
        conditions={name: torch.empty_like(values, device=device) for name, values in conditions.items()},
        noises=torch.empty(run.phase.needs.noises, len(images), *run.context.spec.shape, device=device),
        uniform=torch.empty(len(images), 4, device=device),
    )
