# SPDX-License-Identifier: MIT
"""Schedules: functions of a step's place in its phase, and grids of noise levels, in plain floats. No torch.

Golden values are in test_schedules.py. The module of each family draws noise levels from these grids.
"""

from __future__ import annotations

import math
from statistics import NormalDist

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


def alpha_of(k: int, total: int, share: float, sharpness: float = 25.0, least: float = 0.05) -> float:
    """Return AlphaFlow's alpha at step k of `total`: a falling sigmoid over this share of them, then 0.

    arXiv:2510.20771. Below `least` it is 0, above 1 - `least` it is 1; there they are 0.005. A difference of two
    outputs is divided by alpha, so that a small one would enlarge what bfloat16 rounds.
    """
    if k >= share * total:
        return 0.0
    alpha = 1 / (1 + math.exp(sharpness * (k / (share * total) - 0.5)))
    return 0.0 if alpha < least else 1.0 if alpha > 1 - least else alpha


def ict_scales(k: int, total: int, s0: int, s1: int) -> int:
    """Return N(k), the number of noise levels at step k of `total`: iCT (arXiv:2310.14189), Section 3.4.

    s0 + 1 at first, doubling (s0 = 10: 11, 21, 41, ..) at even intervals up to s1 + 1.
    """
    period = max(1, int(total / (math.log2(s1 // s0) + 1)))
    return int(min(s0 * 2 ** (k // period), s1)) + 1


def ict_law(p_mean: float, p_std: float, sigma_min: float, sigma_max: float) -> str:
    """Return what is wrong with a log-normal law that draws no noise level between the two, "" if it draws some.

    Args:
        p_mean: mean of ln(sigma).
        p_std: standard deviation of ln(sigma).
        sigma_min: smallest noise level, data units.
        sigma_max: largest noise level, data units.
    """
    law = NormalDist(p_mean, p_std)
    if law.cdf(math.log(sigma_max)) > law.cdf(math.log(sigma_min)):
        return ""
    return (
        f"p_mean={p_mean:g} with p_std={p_std:g} draws no noise level from {sigma_min:g} to {sigma_max:g}; "
        "p_mean is the mean of ln(sigma), such as -1.1"
    )


def ect_stage(k: int, total: int, first: int, last: int) -> int:
    """Return the stage at step k of `total`: from first to last, passed through evenly."""
    return first + k * (last - first + 1) // total


def tangent_warmup(k: int, total: int, warmup: float) -> float:
    """Return how much of the tangent's unstable term counts at step k: sCM (arXiv:2410.11081), Section 4.1.

    It grows from 0 to 1 over the opening fraction `warmup` of the phase.
    """
    return min(1.0, k / (warmup * total)) if warmup else 1.0


def pd_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[float, ...]:
    """Return the noise levels at which a model of progressive distillation with n steps is called, descending.

    The first n of the Karras grid of n + 1: every other one of them is a level of n / 2 steps.
    """
    return karras_sigmas(n + 1, sigma_min, sigma_max, rho)[:n]


def pseudo_huber_c(values: int, factor: float = 0.00054) -> float:
    """Return the Pseudo-Huber constant factor * sqrt(d) of samples of d values: iCT (arXiv:2310.14189), Section 3.3."""
    return factor * math.sqrt(values)
