# SPDX-License-Identifier: MIT
"""Score identity distillation: the student's samples get the distribution of the teacher's.

"Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step Generation"
(Zhou et al. 2024, arXiv:2404.04057). A second denoiser, the fake score, learns what the student draws, and the student
follows the difference between it and the teacher. The two take turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmfast_train.methods.diffusion import edm_loss
from cmfast_train.methods.paths import Conditions, expand, lognormal, noised, values_of
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Sid

RHO = 7.0  # of the Karras levels that the scores are compared at
LEAST = 1e-3  # mean absolute error of the teacher, data units, that the loss is divided by at least


def sid(s: Step[Sid]) -> Losses:
    """Take a step of Algorithm 1: of the fake scores, or of the student where it is its turn.

    The paper's generator knows one noise level. A consistency model is called at several, so a share of the samples is
    drawn from noise at sigma_max, the others from training samples with less noise. Each kind has its own fake score:
    with a shared one, errors of the two kinds could cancel.
    """
    (is_turn_of_student,) = s.constants
    batch = len(s.x0)
    alone = batch if s.hyper.share == 1 else min(max(round(batch * s.hyper.share), 1), batch - 1)
    parts = (alone, batch - alone) if alone < batch else (batch,)
    start = log_uniform(s.uniform[:, 0], *s.hyper.levels)
    first = torch.arange(batch, device=start.device) < alone
    start = start.masked_fill(first, s.spec.sigma_max)
    x = noised(s.x0.masked_fill(expand(first, s.x0), 0), start, s.noise)
    with torch.set_grad_enabled(is_turn_of_student):
        drawn = s.networks.student(x, start, s.conditions)

    def fake(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return s.networks.fake(x, sigma, conditions, parts)

    if not is_turn_of_student:
        t = lognormal(s.normal(1), s.hyper.p_mean, s.hyper.p_std, *s.sigma_range)
        return edm_loss(fake, drawn, t, s.more_noise[0], s.conditions, s.spec.sigma_data), t
    t = karras_levels(s.uniform[:, 1], s.spec.sigma_min, s.hyper.sigma_high)
    own = drawn.detach().requires_grad_()
    teacher, fakes = s.networks.scores(noised(own, t, s.more_noise[0]), t, s.conditions, parts)
    loss = score_identity_loss(own, teacher, fakes, s.hyper.alpha)
    (slope,) = torch.autograd.grad(loss.sum(), own)  # of the samples alone: the scores do not learn from it
    return loss.detach() + (slope * (drawn - own.detach())).sum(dim=values_of(drawn)), t


def score_identity_loss(x0: Tensor, teacher: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """Return the generator's loss of each sample, [B]: arXiv:2404.04057, eq. 23 and 24. Sum over the values.

    With d = teacher - fake, it is d (fake - x0) + (1 - alpha) d^2, over the teacher's mean absolute error.

    Args:
        x0: what the student has drawn, [B, *shape], data units.
        teacher: what the teacher makes of it with noise, likewise.
        fake: what the fake score makes of it with the same noise, likewise.
        alpha: 1 and 1.2 in the paper.
    """
    gap = teacher - fake
    with torch.no_grad():
        size = (x0 - teacher).abs().mean(dim=values_of(x0), keepdim=True).clamp(min=LEAST)
    return (gap * (teacher - x0 - alpha * gap) / size).sum(dim=values_of(x0))


def log_uniform(uniform: Tensor, low: float, high: float) -> Tensor:
    """Return noise levels [B], log-uniform between two, for uniform [B] in [0, 1)."""
    return (math.log(low) + uniform * math.log(high / low)).exp()


def karras_levels(uniform: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Return noise levels [B] spread as Karras' grid is, for uniform [B] in [0, 1)."""
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    levels: Tensor = (low + uniform * (high - low)) ** RHO
    return levels
