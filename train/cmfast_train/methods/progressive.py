# SPDX-License-Identifier: MIT
"""Progressive distillation: one step does what the teacher does in two. Halve, repeat (arXiv:2202.00512)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmfast.schedule import karras_sigmas
from cmfast_train.methods.paths import Conditions, Denoise, expand, grid_tensor, ode_step, values_of
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Pd


def pd(s: Step[Pd]) -> Losses:
    """Take a step of distillation into a student of `steps` steps."""
    t, middle, r = pd_steps(s.hyper.steps, s.uniform[:, 0], *s.sigma_range)
    return progressive_loss(s.networks.student, s.networks.teacher, s.at(t), t, middle, r, s.conditions), t


def progressive_loss(
    denoise: Denoise, teacher: Denoise, x_t: Tensor, t: Tensor, middle: Tensor, r: Tensor, conditions: Conditions
) -> Tensor:
    """Return the squared error of one deterministic step t -> r against the teacher's two, [B]: Algorithm 2.

    The target is the sample that a single step would have to see to arrive where two arrive. Weight: truncated SNR,
    max(1 / t^2, 1). Sum over the values.

    Args:
        denoise: the student, with gradient.
        teacher: the model of twice the steps.
        x_t: samples at noise level t, [B, *shape].
        t: noise levels [B] where the step begins, data units.
        middle: noise levels [B] between the teacher's two steps.
        r: noise levels [B] where the step ends.
        conditions: of both denoisers, by name.
    """
    with torch.no_grad():
        x_r = ode_step(teacher, ode_step(teacher, x_t, t, middle, conditions), middle, r, conditions)
        target = x_t - expand(t, x_t) * (x_r - x_t) / expand(r - t, x_t)
    error = (denoise(x_t, t, conditions) - target).square()
    return (1 / t**2).clamp(min=1) * error.sum(dim=values_of(error))


def pd_steps(n: int, uniform: Tensor, sigma_min: float, sigma_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels (t, middle, r) [B]: a random step of n, and the level between that the teacher of 2 n steps has."""
    grid = grid_tensor(karras_sigmas(2 * n + 1, sigma_min, sigma_max), uniform.dtype, uniform.device)
    i = 2 * (uniform * n).long().clamp(max=n - 1)
    return grid[i], grid[i + 1], grid[i + 2]
