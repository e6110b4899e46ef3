# SPDX-License-Identifier: MIT
"""Schedules of training: which noise levels a step compares, and how the target follows.

Plain functions of the step; golden values are in test_schedules.py. The formulas that work on noise
levels use operators, floats included, where they can.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import torch
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast.schedule import karras_sigmas


def ct_scales(k: int, total: int, s0: int, s1: int) -> int:
    """Return N(k), the number of noise levels at step k of `total`: arXiv:2303.01469, Appendix C, as printed.

    s0 = s1 keeps it at s0.
    """
    if s0 == s1:
        return s0
    return math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def ct_ema(k: int, total: int, s0: int, s1: int, mu0: float) -> float:
    """Return mu(k), the decay of the target network at step k: arXiv:2303.01469, Appendix C, as printed.

    (OpenAI's code divides by N - 1 instead of N.)
    """
    return math.exp(s0 * math.log(mu0) / ct_scales(k, total, s0, s1))


def ct_pair(n: int, uniform: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[Tensor, Tensor]:
    """Return adjacent levels (t_{i+1}, t_i) of the n-level Karras grid, i uniform; uniform [B] in [0, 1)."""
    ascending = _levels(karras_sigmas(n, sigma_min, sigma_max, rho)[::-1], uniform.dtype, uniform.device)
    i = (uniform * (n - 1)).long().clamp(max=n - 2)
    return ascending[i + 1], ascending[i]


def ict_scales(k: int, total: int, s0: int, s1: int) -> int:
    """Return N(k), the number of noise levels at step k of `total`: iCT (arXiv:2310.14189), Section 3.4.

    s0 + 1 at first, doubling (s0 = 10: 11, 21, 41, ..) at even intervals up to s1 + 1.
    """
    period = max(1, int(total / (math.log2(s1 // s0) + 1)))
    return int(min(s0 * 2 ** (k // period), s1)) + 1


def ict_pair(
    n: int, uniform: Tensor, p_mean: float, p_std: float, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> tuple[Tensor, Tensor]:
    """Return adjacent levels (t_{i+1}, t_i) of the n-level Karras grid, i by iCT's discretised log-normal law.

    uniform [B] in [0, 1); p(i) is proportional to the normal law's mass between ln t_i and ln t_{i+1}: Section 3.5.
    """
    ascending = karras_sigmas(n, sigma_min, sigma_max, rho)[::-1]
    law = NormalDist(p_mean, p_std)
    below = [law.cdf(math.log(level)) for level in ascending]
    if not below[-1] > below[0]:
        raise CmfastError(
            f"ict.p_mean={p_mean:g} with ict.p_std={p_std:g} draws no noise level from {sigma_min:g} to {sigma_max:g}; "
            "p_mean is the mean of ln(sigma), such as -1.1"
        )
    edges = tuple((mass - below[0]) / (below[-1] - below[0]) for mass in below[1:])
    i = torch.searchsorted(_levels(edges, uniform.dtype, uniform.device), uniform.contiguous(), right=True)
    levels = _levels(ascending, uniform.dtype, uniform.device)
    i = i.clamp(max=n - 2)
    return levels[i + 1], levels[i]


def pd_levels(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[float, ...]:
    """Return the noise levels at which a model of progressive distillation with n steps is called, descending.

    The first n of the Karras grid of n + 1: every other one of them is a level of n / 2 steps.
    """
    return karras_sigmas(n + 1, sigma_min, sigma_max, rho)[:n]


def pd_steps(n: int, uniform: Tensor, sigma_min: float, sigma_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels (t, middle, r) [B]: a random step of n, and the level between that the teacher of 2 n steps has."""
    grid = _levels(karras_sigmas(2 * n + 1, sigma_min, sigma_max), uniform.dtype, uniform.device)
    i = 2 * (uniform * n).long().clamp(max=n - 1)
    return grid[i], grid[i + 1], grid[i + 2]


def flow_time(sigma: Tensor) -> Tensor:
    """Return t = sigma / (1 + sigma), the time of the straight path (1 - t) x0 + t noise."""
    return sigma / (1 + sigma)


def meanflow_pair(
    normal: Tensor, normal_too: Tensor, uniform: Tensor, ratio: float, p_mean: float, p_std: float, sigma_max: float
) -> tuple[Tensor, Tensor]:
    """Return noise levels (t, r) [B] with t >= r, and r = t but for a fraction `ratio`: arXiv:2505.13447, Section 4.3.

    Flow times are logit-normal there; the noise level t / (1 - t) of such a time is log-normal.
    """
    one, other = ((p_mean + p_std * z).exp().clamp(max=sigma_max) for z in (normal, normal_too))
    t = torch.maximum(one, other)
    return t, torch.where(uniform < ratio, torch.minimum(one, other), t)


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


@functools.lru_cache(maxsize=16)
def _levels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a grid as a tensor. Grids change rarely, and a copy to a GPU waits for all that it has been handed."""
    return torch.tensor(values, dtype=dtype, device=device)
