# SPDX-License-Identifier: MIT
"""Noise levels for sampling: canonical lists of sigma, decreasing, first = sigma_max.

Published settings are often indices into a Karras grid: `ts` 0,22,39 with 40 steps in OpenAI's scripts,
`timesteps=[22, 0]` in diffusers. Both mean the levels 80 and 1.382368; `sigmas_of_indices` converts.
The schedules of training are in `cmfast_train.schedules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from cmfast.errors import CmfastError


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """Return n noise levels from sigma_max down to sigma_min, data units: EDM (arXiv:2206.00364), eq. 5."""
    if n < 1:
        raise CmfastError(f"a grid needs at least one noise level, got {n}")
    if n == 1:
        return (float(sigma_max),)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = [float((high + i / (n - 1) * (low - high)) ** rho) for i in range(1, n - 1)]
    # The end points are exact: the formula gives sigma_min only up to rounding, and the boundary condition
    # f(x, sigma_min) = x is exact or it is not.
    return (float(sigma_max), *inner, float(sigma_min))


def sigmas_of_indices(
    indices: Sequence[int], n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """Return the noise levels at `indices` of the n-level Karras grid, in decreasing order.

    A closing n - 1, which OpenAI's scripts write and which stands for "stop here", is dropped.
    """
    grid = karras_sigmas(n, sigma_min, sigma_max, rho)
    for i in indices:
        if not 0 <= i < n:
            raise CmfastError(f"index {i} is not in a grid of {n} noise levels; indices go from 0 to {n - 1}")
    return tuple(grid[i] for i in sorted(set(indices)) if i != n - 1)


def check_sigmas(sigmas: Sequence[float], sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """Return sigmas as a tuple of floats, or say which one is wrong and what is allowed."""
    levels = tuple(float(s) for s in sigmas)
    if not levels:
        raise CmfastError(f"no noise levels were given; give at least one, for example --sigmas {sigma_max:g}")
    if not all(math.isfinite(s) for s in levels):
        raise CmfastError(f"noise levels must be finite numbers, got {', '.join(map(str, levels))}")
    if not sigma_min < levels[0] <= sigma_max:
        raise CmfastError(
            f"the first noise level is {levels[0]:g}, but this model was trained for "
            f"{sigma_min:g} < sigma <= {sigma_max:g}; start with --sigmas {sigma_max:g}"
        )
    for before, after in pairwise(levels):
        if not sigma_min < after < before:
            raise CmfastError(
                f"noise levels must strictly decrease and stay above {sigma_min:g}: {after:g} follows {before:g}"
            )
    return levels
