# SPDX-License-Identifier: MIT
"""Consistency training and distillation between two noise levels of one path: ct, cd, ict, ect.

"Consistency Models" (Song et al. 2023, arXiv:2303.01469), "Improved Techniques for Training Consistency Models" (iCT,
arXiv:2310.14189), "Consistency Models Made Easy" (ECT, arXiv:2406.14548).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast.schedule import karras_sigmas
from cmfast_train.methods.distances import Distance
from cmfast_train.methods.paths import Conditions, Denoise, expand, grid_tensor, ode_step
from cmfast_train.methods.schedules import ict_law
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Cd, Ct, Ect, Ict


def ct(s: Step[Ct]) -> Losses:
    """Take a step of consistency training: arXiv:2303.01469, Algorithm 3; the target is an average of weights."""
    (n,) = s.constants
    t, r = ct_pair(n, s.uniform[:, 0], *s.sigma_range)
    return _pair(s, s.networks.target, t, s.at(r), r), t


def cd(s: Step[Cd]) -> Losses:
    """Take a step of consistency distillation: arXiv:2303.01469, Algorithm 2; one ODE step of the teacher."""
    (n,) = s.constants
    t, r = ct_pair(n, s.uniform[:, 0], *s.sigma_range)
    with torch.no_grad():
        x_r = ode_step(s.networks.teacher, s.at(t), t, r, s.conditions, s.hyper.solver == "heun")
    return _pair(s, s.networks.target, t, x_r, r), t


def ict(s: Step[Ict]) -> Losses:
    """Take a step of improved consistency training: discretised log-normal levels, doubling grid, no average."""
    (n,) = s.constants
    t, r = ict_pair(n, s.uniform[:, 0], s.hyper.p_mean, s.hyper.p_std, *s.sigma_range)
    return _pair(s, s.networks.stopgrad, t, s.at(r), r) / (t - r), t


def ect(s: Step[Ect]) -> Losses:
    """Take a step of consistency tuning, in which r approaches t in stages."""
    (stage,) = s.constants
    t = s.lognormal(s.hyper.p_mean, s.hyper.p_std)
    r = ect_r(t, stage, s.hyper.q, s.hyper.k, s.hyper.b)
    below = torch.where(r > s.spec.sigma_min, r, 0)  # where the target is the sample itself
    return _pair(s, s.networks.stopgrad, t, s.at(below), below) / (t - r), t


def consistency_loss(
    denoise: Denoise,
    target: Denoise,
    distance: Distance,
    x_t: Tensor,
    t: Tensor,
    x_r: Tensor,
    r: Tensor,
    conditions: Conditions,
    sigma_min: float,
) -> Tensor:
    """Return the distance of the outputs at two points of one path, noise levels t > r, [B]: eq. 7 and 10.

    Up to sigma_min the model is the identity by definition, so there the target is x_r itself.

    Args:
        denoise: the model, with gradient.
        target: what it is to agree with, without gradient: an average of the weights, or the same weights and dropout
            masks.
        distance: between two batches.
        x_t: samples at noise level t, [B, *shape].
        t: noise levels [B], data units.
        x_r: samples at noise level r: the same data and noise, or an `ode_step` of a teacher from x_t.
        r: noise levels [B], data units.
        conditions: of the denoiser, by name.
        sigma_min: noise level where the model is the identity.
    """
    with torch.no_grad():
        goal = torch.where(expand(r > sigma_min, x_r), target(x_r, r.clamp(min=sigma_min), conditions), x_r)
    return distance(denoise(x_t, t, conditions), goal)


def ct_pair(n: int, uniform: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[Tensor, Tensor]:
    """Return adjacent levels (t_{i+1}, t_i) of the n-level Karras grid, i uniform; uniform [B] in [0, 1)."""
    ascending = grid_tensor(karras_sigmas(n, sigma_min, sigma_max, rho)[::-1], uniform.dtype, uniform.device)
    i = (uniform * (n - 1)).long().clamp(max=n - 2)
    return ascending[i + 1], ascending[i]


def ict_pair(
    n: int, uniform: Tensor, p_mean: float, p_std: float, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> tuple[Tensor, Tensor]:
    """Return adjacent levels (t_{i+1}, t_i) of the n-level Karras grid, i by iCT's discretised log-normal law.

    uniform [B] in [0, 1); p(i) is proportional to the normal law's mass between ln t_i and ln t_{i+1}: Section 3.5.

    Raises:
        CmfastError: the law has no mass between the two ends.
    """
    if wrong := ict_law(p_mean, p_std, sigma_min, sigma_max):
        raise CmfastError(wrong)
    ascending = karras_sigmas(n, sigma_min, sigma_max, rho)[::-1]
    law = NormalDist(p_mean, p_std)
    below = [law.cdf(math.log(level)) for level in ascending]
    edges = tuple((mass - below[0]) / (below[-1] - below[0]) for mass in below[1:])
    i = torch.searchsorted(grid_tensor(edges, uniform.dtype, uniform.device), uniform.contiguous(), right=True)
    sigmas = grid_tensor(ascending, uniform.dtype, uniform.device)
    i = i.clamp(max=n - 2)
    return sigmas[i + 1], sigmas[i]


def ect_r(t: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return r(t) < t [B] of stage s = 0, 1, ..: r = t (1 - (1 + k sigmoid(-b t)) / q^(s+1)), at least 0.

    The sigmoid mapping of ECT (arXiv:2406.14548), Section 4.
    """
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


def _pair(s: Step[Ct] | Step[Cd] | Step[Ict] | Step[Ect], target: Denoise, t: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    return consistency_loss(s.networks.student, target, s.distance, s.at(t), t, x_r, r, s.conditions, s.spec.sigma_min)
