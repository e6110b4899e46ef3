# SPDX-License-Identifier: MIT
"""Sampling: in few steps with a consistency model, in many with a diffusion model. Start reading here.

    noise --> denoise(x, sigma) --> x0 --> (add a little noise, denoise again) --> x0

`sample` is the whole algorithm: Algorithm 1 of "Consistency Models" (Song et al. 2023, arXiv:2303.01469).
The denoiser is any callable: a backend's (`cmfast.load(...).denoise`), a torch module, a line in a test.
`heun` is for teachers: EDM's sampler, Algorithm 2 of arXiv:2206.00364. A step goes along
dx/dsigma = (x - f(x, sigma)) / sigma twice, the second time with the slope where the first one ended.
Noise levels come from `cmfast.schedule`, noise from `cmfast.noise`, preconditioning is inside the denoiser.
The exporter writes the same loop as one ONNX graph (`cmfast_export.graphs.sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import shown, whole_number
from cmfast.errors import CmfastError
from cmfast.schedule import MAX_STEPS, as_sigmas
from cmfast.spec import ModelSpec

Array = Any  # numpy.ndarray or torch.Tensor; the loop only uses operators and clip
Denoise = Callable[..., Array]  # (x, sigma) -> x0, of a flow map (x, sigma, sigma_next) -> x0

MAX_S_NOISE = 100.0  # EDM takes 1.003; noise that is far from 1 overflows float32 and samples nothing


def sample(denoise: Denoise, noise: Array, sigmas: Sequence[float], spec: ModelSpec) -> Array:
    """Draw samples from noise in K = len(sigmas) network calls: Algorithm 1 of arXiv:2303.01469.

    Args:
        denoise: callable (x [B, *shape], sigma) -> x0 [B, *shape]; conditions are bound by the caller. A flow map
            (`spec.second_time`) is called with (x, sigma, sigma_next): with "ddim" the noise level of the next
            call, 0 in the last, and else 0 always, because the noise of the next call is fresh.
        noise: [K, B, *shape] unit Gaussian, one slice per step; "ddim" uses the first only.
        sigmas: K noise levels, data units, decreasing (`ModelSpec.sigmas_for` also compares them with the model's
            range).
        spec: gives sigma_min, the renoising rule, and whether x0 is clipped to [-1, 1] after every call.

    Returns:
        x0 [B, *shape], data units.

    Raises:
        CmfastError: the levels do not decrease above sigma_min, or the noise has another number of slices.
    """
    if not isinstance(spec, ModelSpec):
        raise CmfastError(f"spec must be a cmfast.ModelSpec, got {shown(spec)}")
    sigmas = as_sigmas(sigmas)  # as Python floats they keep the type of the noise
    least = spec.sigma_min if spec.renoise == "sqrt" else 0.0
    if not sigmas or sigmas[-1] <= 0 or any(not least <= after <= before for before, after in pairwise(sigmas)):
        raise CmfastError(f"noise levels must decrease and stay above {least:g}, got {shown(sigmas)}")
    shape: tuple[int, ...] = getattr(noise, "shape", ())
    if len(shape) < 3 or shape[0] != len(sigmas):
        raise CmfastError(f"noise must be [{len(sigmas)}, B, ...] for {len(sigmas)} levels, got {shown(noise)}")
    x0 = None
    for call, z in zip(calls_of(sigmas, spec), noise, strict=True):
        if x0 is None:
            x = call.std * z
        elif call.ratio is None:
            x = x0 + call.std * z
        else:
            x = x0 + call.ratio * (x - x0)
        x0 = denoise(x, call.sigma, call.sigma_next) if spec.second_time else denoise(x, call.sigma)
        x0 = _clip(x0, spec)
    return x0


@dataclass(frozen=True, kw_only=True)
class Call:
    """A network call of the few-step loop: what it gets is x0 + std * noise, or x0 + ratio * (x - x0).

    Attributes:
        sigma: Noise level, data units.
        std: Standard deviation of the fresh noise, data units; in the first call, which has no x0, sigma.
        ratio: How much of the noise of the call before stays; None: the noise is fresh.
        sigma_next: Of a flow map, the noise level to go to, data units.
    """

    sigma: float
    std: float
    ratio: float | None = None
    sigma_next: float = 0.0


def calls_of(sigmas: Sequence[float], spec: ModelSpec) -> list[Call]:
    """Return the network calls of the few-step loop at these noise levels.

    "ddim" takes no fresh noise but less of the same: DDIM, as progressive distillation has it (arXiv:2202.00512). It is
    also how a flow map goes on: CTM (arXiv:2310.02279), eq. 9, and z_r = z_t - (t - r) u of MeanFlow.

    Args:
        sigmas: Noise levels, data units, decreasing.
        spec: Gives sigma_min and the renoising rule.
    """
    if spec.renoise != "ddim":
        first, *others = sigmas
        return [Call(sigma=first, std=first), *(Call(sigma=s, std=renoise_std(s, spec)) for s in others)]
    after = [*sigmas[1:], 0.0]
    ratios = [None, *(low / high for high, low in pairwise(sigmas))]
    return [
        Call(sigma=sigma, std=sigma, ratio=ratio, sigma_next=low)
        for sigma, ratio, low in zip(sigmas, ratios, after, strict=True)
    ]


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
    """Draw images in N = len(sigmas) steps, `heun_calls(N)` network calls: EDM (arXiv:2206.00364), Algorithm 2.

    Args:
        denoise: callable (x [B, C, H, W], sigma) -> x0 [B, C, H, W]; a label is bound by the caller. Churn calls it
            up to sqrt(2) sigmas[0]. Nothing is clipped.
        noise: [K, B, C, H, W] unit Gaussian: slice 0 the start, slice i the churn of step i, from 1; K is
            `noise_slices(N, churn)`, which is 1 without churn.
        sigmas: N noise levels, data units, strictly decreasing: `karras_sigmas(N, ...)`; the closing 0 is added
            here.
        churn: EDM's stochasticity; without it the sampler is deterministic.
        second_order: False: Euler's method, N network calls.

    Returns:
        x [B, C, H, W], data units.

    Raises:
        CmfastError: the levels do not strictly decrease above 0, or there is too little noise.
    """
    sigmas = as_sigmas(sigmas)
    if not sigmas or sigmas[-1] <= 0 or any(after >= before for before, after in pairwise(sigmas)):
        raise CmfastError(f"Heun's noise levels must strictly decrease and stay above 0, got {shown(sigmas)}")
    steps, need = len(sigmas), noise_slices(len(sigmas), churn)
    if len(noise) < need:
        raise CmfastError(f"{steps} steps need {need} slices of noise, got {len(noise)}")
    x = sigmas[0] * noise[0]
    for i, (sigma, after) in enumerate(pairwise([*sigmas, 0.0]), start=1):
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


def renoise_std(sigma: float, spec: ModelSpec) -> float:
    """Return how much fresh noise lifts x0 to noise level sigma: x0 already carries sigma_min, unless "plain"."""
    assert spec.renoise != "ddim", "it takes no fresh noise"
    return float((sigma**2 - spec.sigma_min**2) ** 0.5) if spec.renoise == "sqrt" else sigma


def to_uint8(x0: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return images [B, C, H, W] in [-1, 1] as uint8 [B, H, W, C], rounded to nearest, clipped."""
    return np.ascontiguousarray(pixels(x0).astype(np.uint8).transpose(0, 2, 3, 1))


def pixels(x0: Array) -> Array:
    """Return what lies in [-1, 1] as whole numbers from 0 to 255, float32: rounded to nearest, halves to even."""
    return ((x0 + 1) * 127.5).clip(0, 255).round()


def _clip(x0: Array, spec: ModelSpec) -> Array:
    # x0 - x0 is 0 where x0 is finite; else NaN, which is seen at the end: clipping would turn infinity into white.
    return x0.clip(-1, 1) + (x0 - x0) if spec.clip else x0
