# SPDX-License-Identifier: MIT
"""Few-step sampling with a consistency model. Start reading here.

    noise --> denoise(x, sigma) --> x0 --> (add a little noise, denoise again) --> x0

`sample` is the whole algorithm: Algorithm 1 of "Consistency Models" (Song et al. 2023, arXiv:2303.01469).
The denoiser is any callable: a backend's (`cmfast.load(...).denoise`), a torch module, a line in a test.
Noise levels come from `cmfast.schedule`, noise from `cmfast.noise`, preconditioning is inside the denoiser.
The exporter writes the same loop as one ONNX graph (`cmfast_export.graphs.sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import shown
from cmfast.errors import CmfastError
from cmfast.schedule import as_levels
from cmfast.spec import ModelSpec

Array = Any  # numpy.ndarray or torch.Tensor; the loop only uses operators and clip
Denoise = Callable[..., Array]  # (x, sigma) -> x0, of a flow map (x, sigma, sigma_next) -> x0


def sample(denoise: Denoise, noise: Array, sigmas: Sequence[float], spec: ModelSpec) -> Array:
    """Draw samples from noise in K = len(sigmas) network calls; return x0 [B, *shape] in data units.

    denoise  callable (x [B, *shape], sigma) -> x0 [B, *shape]; conditions are bound by the caller. A flow map
             (`spec.second_time`) is called with (x, sigma, sigma_next): with "ddim" the noise level of the next call,
             0 in the last, and else 0 always, because the noise of the next call is fresh
    noise    [K, B, *shape] unit Gaussian, one slice a step; "ddim" uses the first only
    sigmas   K noise levels, data units, decreasing (`ModelSpec.levels` also compares them with the model's range)
    spec     gives sigma_min, the renoising rule, and whether x0 is clipped to [-1, 1] after every call
    """
    if not isinstance(spec, ModelSpec):
        raise CmfastError(f"spec must be a cmfast.ModelSpec, got {shown(spec)}")
    sigmas = as_levels(sigmas)  # as Python floats they keep the type of the noise
    least = spec.sigma_min if spec.renoise == "sqrt" else 0.0
    if not sigmas or sigmas[-1] <= 0 or any(not least <= after <= before for before, after in pairwise(sigmas)):
        raise CmfastError(f"noise levels must decrease and stay above {least:g}, got {shown(sigmas)}")
    shape: tuple[int, ...] = getattr(noise, "shape", ())
    if len(shape) < 3 or shape[0] != len(sigmas):
        raise CmfastError(f"noise must be [{len(sigmas)}, B, ...] for {len(sigmas)} levels, got {shown(noise)}")
    # "ddim" takes no fresh noise but less of the same: DDIM, as progressive distillation has it (arXiv:2202.00512). It
    # is also how a flow map goes on: CTM (arXiv:2310.02279), eq. 9, and z_r = z_t - (t - r) u of MeanFlow.
    same_noise = spec.renoise == "ddim"
    x, x0 = sigmas[0] * noise[0], None
    for step, (sigma, z) in enumerate(zip(sigmas, noise, strict=True)):
        if x0 is not None:
            x = x0 + (sigma / sigmas[step - 1] * (x - x0) if same_noise else renoise_std(sigma, spec) * z)
        if spec.second_time:
            x0 = denoise(x, sigma, sigmas[step + 1] if same_noise and step + 1 < len(sigmas) else 0.0)
        else:
            x0 = denoise(x, sigma)
        x0 = _clip(x0, spec)
    return x0


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
