# SPDX-License-Identifier: MIT
"""Noise levels: canonical lists of sigma for sampling, decreasing, first = sigma_max; tables of discrete times.

Published settings are often indices into a Karras grid: `ts` 0,22,39 with 40 steps in OpenAI's scripts,
`timesteps=[22, 0]` in diffusers. Both mean the levels 80 and 1.382368; `sigmas_of_indices` converts.
The schedules of training are in `cmfast_train.methods.schedules`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from cmfast.checks import real_number, shown, whole_number
from cmfast.errors import CmfastError

MAX_STEPS = 10_000  # network calls or Heun steps an image
MAX_GRID = 2**20  # levels of a Karras grid
MAX_TIMES = 10_000  # of a table
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # by the names of diffusers


@dataclass(frozen=True, kw_only=True)
class DiscreteTimes:
    """The noise levels of a network that was trained at times t = 0, 1, .., steps - 1: DDPM, LCM, Stable Diffusion.

    Time t stands for the noise level sqrt((1 - a) / a), a the product of (1 - beta_s) over s = 0, .., t: DDPM
    (arXiv:2006.11239), eq. 4, in variance-exploding coordinates. The betas are those of diffusers' schedulers.
    """

    schedule: str = "linear"  # one of BETA_SCHEDULES
    steps: int = 1000
    beta_start: float = 1e-4  # of the cosine schedule, which has none: ignored
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str) or self.schedule not in BETA_SCHEDULES:
            raise CmfastError(f"schedule must be one of {', '.join(BETA_SCHEDULES)}, got {shown(self.schedule)}")
        whole_number("number of times", self.steps, 2, MAX_TIMES)
        start, end = real_number("beta_start", self.beta_start), real_number("beta_end", self.beta_end)
        if not 0 < start <= end < 1:
            raise CmfastError(f"need 0 < beta_start <= beta_end < 1, got {start:g} and {end:g}")
        if not math.isfinite(self.sigmas[-1]):
            raise CmfastError("the noise level of the last time is infinite; this schedule has no finite table")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise level of each time, ascending, data units."""
        return _sigmas_of_times(self)

    def sigma(self, time: float) -> float:
        """Return the noise level of a time, between whole ones by interpolation in ln(sigma).

        Args:
            time: from 0 to steps - 1.

        Returns:
            The noise level, data units.

        Raises:
            CmfastError: the time is outside of the table.
        """
        time = real_number("time", time)
        if not 0 <= time <= self.steps - 1:
            raise CmfastError(f"time {time:g} is outside of 0 to {self.steps - 1}")
        low = min(int(time), self.steps - 2)
        a, b = (math.log(self.sigmas[i]) for i in (low, low + 1))
        return self.sigmas[round(time)] if time == round(time) else math.exp(a + (time - low) * (b - a))

    def lcm_sigmas(self, steps: int, original: int = 50) -> tuple[float, ...]:
        """Return the noise levels at which a latent consistency model is called: diffusers' LCMScheduler.

        Args:
            steps: number of network calls.
            original: steps of the solver that it was distilled with; the times are evenly spread over its own.

        Returns:
            The noise levels, data units, decreasing.

        Raises:
            CmfastError: not 1 <= steps <= original <= the number of times.
        """
        original = whole_number("number of original steps", original, 1, self.steps)
        steps = whole_number("number of steps", steps, 1, original)
        times = [i * (self.steps // original) - 1 for i in range(original, 0, -1)]
        return tuple(self.sigma(times[i * original // steps]) for i in range(steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the manifest.

        Returns:
            The fields by name, ready for JSON.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> DiscreteTimes:
        """Read what `to_dict` wrote.

        Args:
            values: the fields by name; unknown keys are ignored.

        Returns:
            The table of times.

        Raises:
            CmfastError: a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise CmfastError(f"times must be an object with a schedule, got {shown(values)}")
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


@functools.lru_cache(maxsize=16)
def _sigmas_of_times(times: DiscreteTimes) -> tuple[float, ...]:
    n, start, end = times.steps, float(times.beta_start), float(times.beta_end)
    if times.schedule == "squaredcos_cap_v2":  # Improved DDPM (arXiv:2102.09672), eq. 17, capped at 0.999
        at = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(at)]
    elif times.schedule == "scaled_linear":
        low, high = math.sqrt(start), math.sqrt(end)
        betas = [(low + i / (n - 1) * (high - low)) ** 2 for i in range(n)]
    else:
        betas = [start + i / (n - 1) * (end - start) for i in range(n)]
    alphas = accumulate((1 - beta for beta in betas), lambda a, b: a * b)
    return tuple(math.sqrt((1 - a) / a) if a > 0 else math.inf for a in alphas)


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """Return n noise levels from sigma_max down to sigma_min: EDM (arXiv:2206.00364), eq. 5.

    Args:
        n: number of noise levels.
        sigma_min: the last one, data units.
        sigma_max: the first one, data units.
        rho: how much the grid favours low noise levels; 7 in EDM.

    Returns:
        n noise levels, data units, decreasing; both ends are exact.

    Raises:
        CmfastError: n is below 1, or not 0 < sigma_min < sigma_max, or rho is too small.
    """
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
    """Return the noise levels at `indices` of the n-level Karras grid.

    Args:
        indices: whole numbers from 0, which is sigma_max, in any order. A closing n - 1, which OpenAI's scripts write
            and which stands for "stop here", is dropped.
        n: noise levels of the grid.
        sigma_min: its last one, data units.
        sigma_max: its first one, data units.
        rho: see `karras_sigmas`.

    Returns:
        The noise levels, data units, decreasing.

    Raises:
        CmfastError: an index is not in the grid.
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
    """Return sigmas as a tuple of floats.

    Args:
        sigmas: noise levels, data units.
        sigma_min: all of them must be above it.
        sigma_max: none may be above it.

    Returns:
        The noise levels as floats.

    Raises:
        CmfastError: they are not numbers that strictly decrease inside the range; the error names the first wrong one.
    """
    sigmas = as_sigmas(sigmas)
    if not sigmas:
        raise CmfastError(f"no noise levels were given; give at least one, for example sigmas {sigma_max:g}")
    if not sigma_min < sigmas[0] <= sigma_max:
        raise CmfastError(
            f"the first noise level is {sigmas[0]:g}, but this model was trained for "
            f"{sigma_min:g} < sigma <= {sigma_max:g}; start with {sigma_max:g}"
        )
    for before, after in pairwise(sigmas):
        if not sigma_min < after < before:
            raise CmfastError(
                f"noise levels must strictly decrease and stay above {sigma_min:g}: {after:g} follows {before:g}"
            )
    return sigmas


def as_sigmas(sigmas: Any) -> tuple[float, ...]:
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
