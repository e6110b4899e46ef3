# SPDX-License-Identifier: MIT
"""Noise levels for sampling: canonical lists of sigma, decreasing, first = sigma_max.

Published settings are often indices into a Karras grid: `ts` 0,22,39 with 40 steps in OpenAI's scripts,
`timesteps=[22, 0]` in diffusers. Both mean the levels 80 and 1.382368; `sigmas_of_indices` converts.
The schedules of training are in `cmfast_train.methods.schedules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

from cmfast.checks import real_number, shown, whole_number
from cmfast.errors import CmfastError

MAX_STEPS = 10_000  # network calls or Heun steps an image
MAX_GRID = 2**20  # levels of a Karras grid


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """Return n noise levels from sigma_max down to sigma_min, data units: EDM (arXiv:2206.00364), eq. 5."""
    if isinstance(n, int) and n < 1:
        raise CmfastError(f"a grid needs at least one noise level, got {shown(n)}")
    n = whole_number("number of noise levels in a grid", n, 1, MAX_GRID)
    sigma_min, sigma_max, rho = (
        real_number(name, value) for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho))
    )
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise CmfastError(
            f"need 0 < sigma_min < sigma_max and rho > 0, got {sigma_min:g}, {sigma_max:g} and rho {rho:g}"
        )
    if n == 1:
        return (sigma_max,)
    try:
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        inner = [float((high + i / (n - 1) * (low - high)) ** rho) for i in range(1, n - 1)]
    except OverflowError:
        ends = f"from {sigma_max:g} to {sigma_min:g}"
        raise CmfastError(f"rho {rho:g} is too small for a grid {ends}; 7 is usual") from None
    # The end points are exact: the formula gives sigma_min only up to rounding, and the boundary condition
    # f(x, sigma_min) = x is exact or it is not.
    return (sigma_max, *inner, sigma_min)


def sigmas_of_indices(
    indices: Sequence[int], n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """Return the noise levels at `indices` of the n-level Karras grid, in decreasing order.

    A closing n - 1, which OpenAI's scripts write and which stands for "stop here", is dropped.
    """
    grid = karras_sigmas(n, sigma_min, sigma_max, rho)
    if isinstance(indices, (str, bytes)) or not hasattr(indices, "__iter__"):
        raise CmfastError(f"indices into a grid must be a list of whole numbers, got {shown(indices)}")
    indices = [i if type(i) is int else whole_number("index into a grid", i) for i in indices]
    for i in indices:
        if not 0 <= i < n:
            raise CmfastError(f"index {shown(i)} is not in a grid of {n} noise levels; indices go from 0 to {n - 1}")
    return tuple(grid[i] for i in sorted(set(indices)) if i != n - 1)


def check_sigmas(sigmas: Sequence[float], sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """Return sigmas as a tuple of floats, or say which one is wrong and what is allowed."""
    levels = as_levels(sigmas)
    if not levels:
        raise CmfastError(f"no noise levels were given; give at least one, for example --sigmas {sigma_max:g}")
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


def as_levels(sigmas: Any) -> tuple[float, ...]:
    """Return a list or array of finite numbers, at most MAX_STEPS of them, as floats; their order is not checked."""
    if isinstance(sigmas, (str, bytes, dict, set)) or not hasattr(sigmas, "__iter__"):
        raise CmfastError(f"noise levels must be a list of numbers such as [80, 0.8], got {shown(sigmas)}")
    try:
        values = list(islice(sigmas, MAX_STEPS + 1))
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor without an axis
        raise CmfastError(f"noise levels must be a list of numbers such as [80, 0.8], got {shown(sigmas)}") from None
    if len(values) > MAX_STEPS:
        raise CmfastError(f"there are more than {MAX_STEPS} noise levels; each is a network call, so give fewer")
    if not all(type(s) is float and math.isfinite(s) for s in values):
        try:
            values = [real_number("noise level", s) for s in values]
        except CmfastError:
            some = [str(float(s)) if isinstance(s, int) and abs(s) < 2**53 else shown(s) for s in values[:8]]
            listed = ", ".join(some) + (", .." if len(values) > 8 else "")
            raise CmfastError(f"noise levels must be finite numbers, got {listed}") from None
    return tuple(values)
