# SPDX-License-Identifier: MIT
"""Many-step sampling with a diffusion model, for teachers: EDM's Heun sampler, Algorithm 2 of arXiv:2206.00364.

    x at sigma --> (churn: a little more noise) --> along the ODE to the next level --> ... --> x at 0

A step goes along dx/dsigma = (x - f(x, sigma)) / sigma twice, the second time with the slope where the first one ended.
The denoiser is any callable, as in `cmfast.sampling`, and only operators are used, so numpy and torch share the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

from cmfast.checks import shown, whole_number
from cmfast.errors import CmfastError
from cmfast.schedule import MAX_STEPS, as_levels

Array = Any  # numpy.ndarray or torch.Tensor
Denoise = Callable[[Array, float], Array]

MAX_S_NOISE = 100.0  # EDM takes 1.003; noise that is far from 1 overflows float32 and samples nothing


@dataclass(frozen=True, kw_only=True)
class Churn:
    """The stochasticity of Algorithm 2, by the paper's names. The defaults are its deterministic sampler.

    What the paper took for its ImageNet-64 model (Table 5): s_churn 40, s_tmin 0.05, s_tmax 50, s_noise 1.003.
    """

    s_churn: float = 0.0  # how much, over all steps: each raises its noise level by the factor 1 + s_churn / steps
    s_tmin: float = 0.0  # noise level, data units: no churn below
    s_tmax: float = math.inf  # noise level, data units: no churn above
    s_noise: float = 1.0  # standard deviation of the fresh noise; slightly more than 1 makes up for lost detail

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
            value: Any = getattr(self, name)
            huge = isinstance(value, int) and value.bit_length() > 1000  # beyond float64
            if huge or isinstance(value, bool) or not isinstance(value, Real):
                raise CmfastError(f"{name} must be a number, got {shown(value)}")
        if not (0 <= self.s_churn < math.inf and 0 < self.s_noise <= MAX_S_NOISE):
            raise CmfastError(
                f"s_churn must be a number from 0 and s_noise a positive one up to {MAX_S_NOISE:g}, got "
                f"{self.s_churn:g} and {self.s_noise:g}"
            )
        if not 0 <= self.s_tmin <= self.s_tmax:
            raise CmfastError(f"need 0 <= s_tmin <= s_tmax, got {self.s_tmin:g} and {self.s_tmax:g}")

    def gamma(self, sigma: float, steps: int) -> float:
        """Return gamma_i: by what part of itself a step raises its noise level sigma, at most sqrt(2) - 1."""
        inside = self.s_tmin <= sigma <= self.s_tmax
        return min(self.s_churn / steps, math.sqrt(2) - 1) if inside else 0.0


NO_CHURN = Churn()


def heun(
    denoise: Denoise, noise: Array, sigmas: Sequence[float], *, churn: Churn = NO_CHURN, second_order: bool = True
) -> Array:
    """Draw images in N = len(sigmas) steps, `heun_calls(N)` network calls; return x [B, C, H, W] in data units.

    denoise       callable (x [B, C, H, W], sigma) -> x0 [B, C, H, W]; a label is bound by the caller. Churn calls it
                  up to sqrt(2) sigmas[0]. Nothing is clipped
    noise         [K, B, C, H, W] unit Gaussian: slice 0 the start, slice i the churn of step i, from 1; K is
                  `noise_slices(N, churn)`, which is 1 without churn
    sigmas        N noise levels, data units, strictly decreasing: `karras_sigmas(N, ...)`; the closing 0 is added here
    second_order  False: Euler's method, N network calls
    """
    sigmas = as_levels(sigmas)
    if not sigmas or sigmas[-1] <= 0 or any(after >= before for before, after in pairwise(sigmas)):
        raise CmfastError(f"Heun's noise levels must strictly decrease and stay above 0, got {shown(sigmas)}")
    steps, need = len(sigmas), noise_slices(len(sigmas), churn)
    if len(noise) < need:
        raise CmfastError(f"{steps} steps need {need} slices of noise, got {len(noise)}")
    levels = [*sigmas, 0.0]
    x = levels[0] * noise[0]
    for i, (sigma, after) in enumerate(pairwise(levels), start=1):
        raised = sigma * (1 + churn.gamma(sigma, steps))
        if raised > sigma:
            x = x + churn.s_noise * (raised**2 - sigma**2) ** 0.5 * noise[i]
        slope = (x - denoise(x, raised)) / raised
        if second_order and after > 0:
            ahead = x + (after - raised) * slope
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
        x = x + (after - raised) * slope
    return x


def heun_calls(steps: int) -> int:
    """Return the network calls an image of so many Heun steps: two a step, and one in the last, which ends at 0."""
    if isinstance(steps, int) and steps < 1:
        raise CmfastError(f"the number of Heun steps must be at least 1, got {shown(steps)}")
    return 2 * whole_number("number of Heun steps", steps, 1, MAX_STEPS) - 1


def noise_slices(steps: int, churn: Churn = NO_CHURN) -> int:
    """Return how many slices of noise so many steps take: the start, and with churn one a step."""
    return steps + 1 if churn.s_churn else 1
