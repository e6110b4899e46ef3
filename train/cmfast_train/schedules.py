# SPDX-License-Identifier: MIT
"""Schedules of training: which noise levels a step compares, and how the target follows.

Plain functions of the step; golden values are in tests/test_schedules.py. The formulas that work on noise
levels use operators, floats included, where they can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmfast.schedule import karras_sigmas


def ct_scales(k: int, total: int, s0: int, s1: int) -> int:
    """Return N(k), the number of noise levels at step k of `total`: arXiv:2303.01469, Appendix C, as printed."""
    return math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def ct_ema(k: int, total: int, s0: int, s1: int, mu0: float) -> float:
    """Return mu(k), the decay of the target network at step k: arXiv:2303.01469, Appendix C, as printed.

    (OpenAI's code divides by N - 1 instead of N.)
    """
    return math.exp(s0 * math.log(mu0) / ct_scales(k, total, s0, s1))


def ct_pair(n: int, uniform: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[Tensor, Tensor]:
    """Return adjacent levels (t_{i+1}, t_i) of the n-level Karras grid, i uniform; uniform [B] in [0, 1)."""
    ascending = uniform.new_tensor(karras_sigmas(n, sigma_min, sigma_max, rho)[::-1])
    i = (uniform * (n - 1)).long().clamp(max=n - 2)
    return ascending[i + 1], ascending[i]


def lognormal(normal: Tensor, p_mean: float, p_std: float, sigma_min: float, sigma_max: float) -> Tensor:
    """Return noise levels exp(p_mean + p_std * normal) [B], data units, kept inside the model's range."""
    return (p_mean + p_std * normal).exp().clamp(sigma_min * 1.0001, sigma_max)


def ect_r(t: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return r(t) < t [B] of stage s = 0, 1, ..: r = t (1 - (1 + k sigmoid(-b t)) / q^(s+1)), at least 0.

    The sigmoid mapping of ECT (arXiv:2406.14548), Section 4.
    """
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


def pseudo_huber_c(values: int, factor: float = 0.00054) -> float:
    """Return the Pseudo-Huber constant factor * sqrt(d) of images of d values: iCT (arXiv:2310.14189), Section 3.3."""
    return factor * math.sqrt(values)
