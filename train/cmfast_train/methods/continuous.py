# SPDX-License-Identifier: MIT
"""Continuous-time consistency training and distillation: sCM (Lu and Song 2024, arXiv:2410.11081), sCT and sCD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmfast_train.methods.distances import l2
from cmfast_train.methods.paths import expand, values_of
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Scm


def sct(s: Step[Scm]) -> Losses:
    """Take a step of continuous-time training, whose path leads straight to the sample."""
    t = s.lognormal(s.hyper.p_mean, s.hyper.p_std)
    return _continuous(s, t, s.x0, s.noise), t


def scd(s: Step[Scm]) -> Losses:
    """Take a step of continuous-time distillation, whose path follows the teacher."""
    t = s.lognormal(s.hyper.p_mean, s.hyper.p_std)
    x = s.at(t)
    with torch.no_grad():
        x0 = s.networks.teacher(x, t, s.conditions)
    return _continuous(s, t, x0, (x - x0) / expand(t, x)), t


def scm_target(
    output: Tensor,
    tangent: Tensor,
    x: Tensor,
    sigma: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma_data: float,
    warm: float = 1.0,
    c: float = 0.1,
) -> Tensor:
    """Return what the network's output is to become, F- + g, [B, *shape]: arXiv:2410.11081, Algorithm 1.

    Args:
        output: F-(x_t / sigma_data, t) of TrigFlow, at t = atan(sigma / sigma_data), x_t = cos(t) x.
        tangent: sigma dF-/dsigma along the path, which is cos(t) sin(t) dF-/dt.
        x: noised samples, [B, *shape].
        sigma: their noise levels [B], data units.
        x0: one end of the path: the training sample, or a teacher's x0.
        noise: the other: its unit noise, or (x - x0) / sigma.
        sigma_data: standard deviation of the data.
        warm: from 0 to 1: how much of the tangent's second, unstable term counts.
        c: g is divided by its root mean square + c.
    """
    t = torch.atan(expand(sigma, x) / sigma_data)
    cos, sin = t.cos(), t.sin()
    velocity = cos * sigma_data * noise - sin * x0  # dx_t / dt
    g = -(cos**2) * (sigma_data * output - velocity) - warm * (cos * sin * cos * x + sigma_data * tangent)
    size = g.square().mean(dim=values_of(g), keepdim=True).sqrt()
    return output + g / (size + c)


def _continuous(s: Step[Scm], t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return sCM's loss on either path. Of these scalings, the network's output is F of TrigFlow, or -F (EDM)."""
    sign = 1 if s.spec.scaling == "trigflow" else -1
    x = s.at(t)
    f, tangent = s.networks.output_along(x, t, s.conditions, None, expand(t, noise) * noise, t)
    (warm,) = s.constants
    target = sign * scm_target(sign * f, sign * tangent, x, t, x0, noise, s.spec.sigma_data, warm, s.hyper.tangent_c)
    output, u = s.networks.output(x, t, s.conditions)
    error = l2(output, target) / math.prod(x.shape[1:])
    return error / u.exp() + u
