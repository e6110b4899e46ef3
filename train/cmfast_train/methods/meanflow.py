# SPDX-License-Identifier: MIT
"""MeanFlow (Geng et al. 2025, arXiv:2505.13447): the average velocity between two times; sampled with r = 0.

Two improvements of its training are settings: the derivative along the network's own velocity ("Improved Mean Flows",
arXiv:2512.02012), and a curriculum that begins with flow matching (AlphaFlow, arXiv:2510.20771).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmfast_train.methods.distances import l2
from cmfast_train.methods.paths import expand, flow_time, sigma_of
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import MeanFlow


def mf(s: Step[MeanFlow]) -> Losses:
    """Take a step of Algorithm 1, or of AlphaFlow's eq. 7 while its alpha is above 0."""
    hyper, (alpha,) = s.hyper, s.constants
    t, r = meanflow_pair(
        s.normal(0), s.normal(1), s.uniform[:, 2], hyper.ratio, hyper.p_mean, hyper.p_std, s.spec.sigma_max
    )
    x = s.at(t)
    if alpha:
        target = alpha * (s.noise - s.x0)
        if alpha < 1:
            between = torch.where(r < t, sigma_of(alpha * flow_time(r) + (1 - alpha) * flow_time(t)), t)
            target = target + (1 - alpha) * s.networks.output_stopgrad(s.at(between), between, s.conditions, r)
    else:
        # The path of flow time t, z = (1 - t) x0 + t noise, in x = (1 + sigma) z and sigma.
        own = s.noise - s.x0 if hyper.velocity == "data" else s.networks.output_stopgrad(x, t, s.conditions, t)
        _, tangent = s.networks.output_along(x, t, s.conditions, r, expand(1 + t, x) * (own + x), (1 + t) ** 2)
        target = meanflow_target(tangent, flow_time(t), flow_time(r), s.x0, s.noise)
    velocity, _ = s.networks.output(x, t, s.conditions, r)
    error = l2(velocity, target)
    # Of a small alpha, velocity - target is alpha times what it is in MeanFlow: the gradient has the same limit.
    return alpha * self_weighted(error / alpha**2, hyper.power) if alpha else self_weighted(error, hyper.power), t


def meanflow_target(tangent: Tensor, t: Tensor, r: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return what the average velocity u(z, r, t) is to become, [B, *shape]: eq. 10.

    Args:
        tangent: du/dt along the path z = (1 - t) x0 + t noise, [B, *shape].
        t: flow times [B].
        r: flow times [B], at most t.
        x0: training samples, [B, *shape].
        noise: unit Gaussian, [B, *shape].
    """
    return noise - x0 - expand(t - r, tangent) * tangent


def self_weighted(error: Tensor, power: float, c: float = 1e-3) -> Tensor:
    """Return error / (error + c)^power, the weight without gradient: eq. 22. error: squared, [B]."""
    return error / (error.detach() + c) ** power


def meanflow_pair(
    normal: Tensor, normal_too: Tensor, uniform: Tensor, ratio: float, p_mean: float, p_std: float, sigma_max: float
) -> tuple[Tensor, Tensor]:
    """Return noise levels (t, r) [B] with t >= r, and r = t but for a fraction `ratio`: Section 4.3.

    Flow times are logit-normal there; the noise level t / (1 - t) of such a time is log-normal.
    """
    one, other = ((p_mean + p_std * z).exp().clamp(max=sigma_max) for z in (normal, normal_too))
    t = torch.maximum(one, other)
    return t, torch.where(uniform < ratio, torch.minimum(one, other), t)
