# SPDX-License-Identifier: MIT
"""One optimiser step: random numbers, losses and gradients, the update of weights and averages.

`trainer` takes one step after the other; `step_graph` records one on a GPU and replays it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cmfast_train.data.images import in_data_units
from cmfast_train.methods.paths import Conditions, expand
from cmfast_train.methods.step import Step
from cmfast_train.training.state import Run, exchanging_gradients, set_lr, update_averages


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a step: this process's share of the batch, on the device."""

    images: Tensor  # uint8 [b, C, H, W]; of other samples float32 [b, *shape], data units
    conditions: Conditions  # by name, [b, ..]
    noises: Tensor  # unit Gaussian [N, b, *shape], N = `Needs.noises` of the method
    uniform: Tensor  # [b, 4] in [0, 1)


def optimise(run: Run, step: int, images: Tensor, conditions: Conditions, share: slice) -> tuple[Tensor, Tensor]:
    """Take one optimiser step on this process's share of a batch; return the loss and noise level of each image, [b].

    Args:
        run: whose weights are trained.
        step: of the whole run, from 0.
        images: uint8 [b, C, H, W]; other samples float32 [b, *shape], data units.
        conditions: those of the model, by name, [b, ..].
        share: which of the batch this process takes.
    """
    config, device = run.config, run.context.device
    noises = torch.empty(run.phase.needs.noises, config.batch, *run.context.spec.shape, device=device)
    uniform = torch.empty(config.batch, 4, device=device)
    draw(run, step, noises, uniform)
    inputs = Inputs(
        images=images.to(device, non_blocking=True),
        conditions={name: values.to(device, non_blocking=True) for name, values in conditions.items()},
        noises=noises[:, share],
        uniform=uniform[share],
    )
    set_lr(run)
    seed_dropout(run, step)
    losses = gradients(run, inputs)
    run.state.optimizer.step()
    run.state.optimizer.zero_grad(set_to_none=True)
    update_averages(run)
    return losses


def draw(run: Run, step: int, noises: Tensor, uniform: Tensor) -> None:
    """Fill noises [N, B, *shape] and uniform [B, 4] with the numbers of this step, for the whole batch."""
    generator = torch.Generator(noises.device).manual_seed(_step_seed(run.config.seed, step))
    noises.normal_(generator=generator)
    uniform.uniform_(generator=generator)


def seed_dropout(run: Run, step: int) -> None:
    """Set the random state from which this step draws dropout masks."""
    torch.manual_seed(_step_seed(run.config.seed, step) + 1 + run.context.accelerator.process_index)


def gradients(run: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the mean loss, clipped, in the student's weights; return loss and noise levels, [b]."""
    config, state, accelerator = run.config, run.state, run.context.accelerator
    x0 = in_data_units(inputs.images)
    if config.flip:
        x0 = torch.where(expand(inputs.uniform[:, 3] < 0.5, x0), x0.flip(-1), x0)
    conditions = drop_conditions(run, inputs)
    losses, sigmas = [], []
    method, constants = state.phase.row.function(), state.phase.constants(run.step, state.total)
    size = len(x0) // config.accumulation
    for i in range(config.accumulation):
        part = slice(i * size, (i + 1) * size)
        with exchanging_gradients(run, last=i == config.accumulation - 1), accelerator.autocast():
            loss, sigma = method(
                Step(
                    hyper=state.phase.hyper,
                    spec=run.context.spec,
                    networks=state.networks,
                    distance=state.distance,
                    constants=constants,
                    x0=x0[part],
                    noise=inputs.noises[0, part],
                    more_noise=inputs.noises[1:, part],
                    uniform=inputs.uniform[part],
                    conditions={name: values[part] for name, values in conditions.items()},
                )
            )
            accelerator.backward(loss.sum() / len(x0))
        losses.append(loss.detach())
        sigmas.append(sigma)
    if state.phase.clip_norm:
        accelerator.clip_grad_norm_(state.student.parameters(), state.phase.clip_norm)
    return torch.cat(losses), torch.cat(sigmas)


def drop_conditions(run: Run, inputs: Inputs) -> Conditions:
    """Return the conditions, those that have a null replaced by it with probability `label_dropout`, all at once.

    Classifier-free guidance (arXiv:2207.12598), Algorithm 1. Column 3 of `uniform` decides about flips by its first
    binary digit, and here by the rest, which is independent of it.
    """
    if not run.config.label_dropout:
        return inputs.conditions
    without = (2 * inputs.uniform[:, 3]) % 1 < run.config.label_dropout
    values = dict(inputs.conditions)
    for each in run.context.spec.conditions:
        if each.null is not None:
            values[each.name] = values[each.name].masked_fill(expand(without, values[each.name]), each.null)
    return values


def _step_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=6).digest(), "little")
