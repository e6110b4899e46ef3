# SPDX-License-Identifier: MIT
"""Consistency mid-training: any point of a teacher's trajectory is mapped to where that trajectory ends.

"CMT: Mid-Training for Efficient Learning of Consistency, Mean Flow, and Flow Map Models" (Hu et al. 2025,
arXiv:2509.24526). It stands between a diffusion model and ect: the target is fixed, so it is reached fast, and its
error is the solver's. Training samples are not used, only their conditions.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cmfast.schedule import karras_sigmas
from cmfast_train.methods.paths import Conditions, Denoise, grid_tensor, ode_step
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Cmt


def cmt(s: Step[Cmt]) -> Losses:
    """Take a step of mid-training: Section 3 of the paper, the loss of CMT for consistency models.

    The trajectories are those of the micro-batch: all points of one are a part of it.
    """
    steps, batch = s.hyper.steps, len(s.noise)
    starts = -(-batch // steps)  # trajectories: all of their points are about a batch
    grid = grid_tensor(karras_sigmas(steps + 1, *s.sigma_range), s.noise.dtype, s.noise.device)
    conditions = {name: value[:starts] for name, value in s.conditions.items()}
    points, end = trajectory(s.networks.teacher, grid[0] * s.noise[:starts], grid, conditions, s.hyper.solver == "heun")
    # As many neighbours of all points as the batch has, from any place on: each point has the same chance.
    first = (s.uniform[:1, 0] * starts * steps).long()
    place = (first + torch.arange(batch, device=s.noise.device)) % (starts * steps)
    level, start = place // starts, place % starts
    here = {name: value[start] for name, value in conditions.items()}
    t = grid[level]
    return s.distance(s.networks.student(points[level, start], t, here), end[start]), t


def trajectory(
    denoise: Denoise, x: Tensor, grid: Tensor, conditions: Conditions, second_order: bool
) -> tuple[Tensor, Tensor]:
    """Follow the probability-flow ODE of a model down a grid of noise levels, without gradient.

    Args:
        denoise: the model.
        x: samples at the first level, [B, *shape].
        grid: noise levels [N + 1] of N steps, falling, data units.
        conditions: of the model, by name.
        second_order: Heun's steps, else Euler's.

    Returns:
        The points where steps begin, [N, B, *shape], and the end, [B, *shape].
    """
    points = []
    with torch.no_grad():
        for t, r in itertools.pairwise(grid):
            points.append(x)
            x = ode_step(denoise, x, t.expand(len(x)), r.expand(len(x)), conditions, second_order)
    return torch.stack(points), x
