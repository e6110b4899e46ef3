# SPDX-License-Identifier: MIT
"""Preconditioning: how a network F becomes a denoiser f that is the identity at sigma_min.

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma), **conditions)

Only arithmetic operators, so the same lines serve floats, numpy arrays and torch tensors: the trainer, the
exporter's check and the tests quote this file, and a sign error cannot live in one of four copies.
Which convention a model follows is `ModelSpec.scaling` and `ModelSpec.c_noise`.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

from cmfast.schedule import DiscreteTimes
from cmfast.spec import ModelSpec

LCM_TIMESTEP_SCALING = 10.0  # diffusers' LCMScheduler, of all published models

BOUNDARY = ("boundary", "ctm", "cloneofsimo")  # scalings with f(x, sigma_min) = x exactly, in float32 too
LOGARITHMS = ("250ln", "ln/4", "discrete")  # values of c_noise that are not finite at noise level 0
Array = Any  # float, numpy.ndarray or torch.Tensor: what goes in is what comes out


def scalings(sigma: Array, spec: ModelSpec) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) of the model at noise level sigma (data units; any shape that broadcasts)."""
    if spec.scaling == "boundary":
        return boundary_scalings(sigma, spec.sigma_data, spec.sigma_min)
    if spec.scaling == "ctm":
        return ctm_scalings(sigma, spec.sigma_data, spec.sigma_min)
    if spec.scaling == "cloneofsimo":
        return cloneofsimo_scalings(sigma, spec.sigma_min)
    if spec.scaling == "flow":
        return flow_scalings(sigma)
    if spec.scaling not in ("edm", "trigflow"):
        return prediction_scalings(sigma, spec)
    # TrigFlow written for x = x0 + sigma z instead of the rotated x_t is EDM with the sign of c_out turned.
    c_skip, c_out, c_in = edm_scalings(sigma, spec.sigma_data)
    return (c_skip, -c_out, c_in) if spec.scaling == "trigflow" else (c_skip, c_out, c_in)


def edm_scalings(sigma: Array, sigma_data: float) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) of a diffusion denoiser: EDM (arXiv:2206.00364), Table 1."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total**0.5, 1 / total**0.5


def boundary_scalings(sigma: Array, sigma_data: float, sigma_min: float) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) with f(x, sigma_min) = x exactly.

    c_skip and c_out: "Consistency Models" (arXiv:2303.01469), Appendix C. c_in: EDM, Table 1.
    """
    above = sigma - sigma_min
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / total**0.5, 1 / total**0.5


def ctm_scalings(sigma: Array, sigma_data: float, sigma_min: float) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) of a flow map that always jumps to sigma_min: Consistency Policy (arXiv:2405.07503).

    G(x, t, s) = s/t x + (1 - s/t) g(x, t, s), CTM (arXiv:2310.02279), eq. 9, with s = sigma_min and g in the boundary
    scaling.
    """
    c_skip, c_out, c_in = boundary_scalings(sigma, sigma_data, sigma_min)
    kept = sigma_min / sigma
    return kept + (1 - kept) * c_skip, (1 - kept) * c_out, c_in


def cloneofsimo_scalings(sigma: Array, sigma_min: float) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) of the first public implementation: c_out is half of what it should be, no c_in.

    For its checkpoints only. It has 0.25 = sigma_data^2 where sigma_data = 0.5 belongs.
    """
    above = sigma - sigma_min
    return 0.25 / (above**2 + 0.25), 0.25 * above / (sigma**2 + 0.25) ** 0.5, sigma * 0 + 1.0


def flow_scalings(sigma: Array) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) of a flow: f = z_t - t u(z_t), where the network u is a velocity, mean or not.

    MeanFlow (arXiv:2505.13447), Algorithm 2, from any t to r = 0: z_t = (1 - t) x0 + t z, which for x = x0 + sigma z is
    x / (1 + sigma). At sigma = 0 the model is the identity. sigma_data plays no part.
    """
    return 1 / (1 + sigma), -flow_time(sigma), 1 / (1 + sigma)


def prediction_scalings(sigma: Array, spec: ModelSpec) -> tuple[Array, Array, Array]:
    """Return (c_skip, c_out, c_in) by what a network predicts, and in which coordinates it is given x.

    x0     the data; eps: the noise, x = x0 + sigma eps. Variance-exploding: the network is given x
    vp_..  variance-preserving: the network is given x_t = x / sqrt(1 + sigma^2) = alpha x0 + s eps, with
           alpha = 1 / sqrt(1 + sigma^2) and s = sigma alpha; vp_v predicts v = alpha eps - s x0
           ("Progressive Distillation", arXiv:2202.00512, Appendix D)
    lcm_.. vp_eps and vp_v inside the boundary condition of latent consistency models (arXiv:2310.04378), Appendix D:
           f = c_skip(t) x_t + c_out(t) x0, at ten times the discrete time t, with sigma_data
    """
    alpha = 1 / (1 + sigma**2) ** 0.5
    family, _, kind = spec.scaling.rpartition("_")
    c_in = alpha if family else sigma * 0 + 1.0
    if kind == "x0":
        return sigma * 0, sigma * 0 + 1.0, c_in
    c_skip, c_out = (alpha**2, -sigma * alpha) if kind == "v" else (sigma * 0 + 1.0, -sigma)
    if family == "lcm":
        t = LCM_TIMESTEP_SCALING * discrete_time(sigma, spec.times)
        total = t**2 + spec.sigma_data**2
        outer_skip, outer_out = spec.sigma_data**2 / total, t / total**0.5
        c_skip, c_out = outer_skip * alpha + outer_out * c_skip, outer_out * c_out
    return c_skip, c_out, c_in


def discrete_time(sigma: Array, times: DiscreteTimes | None) -> Array:
    """Return the time in a table at which a network is to be called, from 0, for noise level sigma (data units).

    Between the levels of the table by interpolation in ln(sigma); beyond them the first or the last.
    """
    assert times is not None, "ModelSpec checks it"
    logs = _log_sigmas(times)
    if hasattr(sigma, "new_tensor"):  # torch, without importing it
        table, log = _like(sigma, times), sigma.log()
    else:
        import numpy as np

        sigma = np.asarray(sigma)
        table, log = np.asarray(logs, sigma.dtype if sigma.dtype.kind == "f" else float), np.log(sigma)
    low = (log[..., None] >= table).sum(-1).clip(1, len(logs) - 1) - 1
    below, above = table[low], table[low + 1]
    return (low + (log - below) / (above - below)).clip(0, len(logs) - 1)


_ON_GPUS: dict[tuple[DiscreteTimes, str, str], Array] = {}  # by table, dtype and device


def _like(sigma: Array, times: DiscreteTimes) -> Array:
    """Return ln of a table's levels as a tensor like sigma.

    On a GPU it is made once: a copy from the host waits for the queue, and a CUDA graph, which is recorded after plain
    calls, cannot hold one.
    """
    torch: Any = sys.modules["torch"]  # whose tensor sigma is
    if not sigma.is_cuda or torch.compiler.is_compiling():
        return sigma.new_tensor(_log_sigmas(times))
    key = (times, str(sigma.dtype), str(sigma.device))
    if key not in _ON_GPUS:
        with torch.inference_mode(False):
            _ON_GPUS[key] = sigma.new_tensor(_log_sigmas(times))
    return _ON_GPUS[key]


@functools.lru_cache(maxsize=16)
def _log_sigmas(times: DiscreteTimes) -> list[float]:
    return [math.log(sigma) for sigma in times.sigmas]


def flow_time(sigma: Array) -> Array:
    """Return the time t of a flow, 0 to 1, at which noise and data have the ratio sigma: t / (1 - t) = sigma."""
    return sigma / (1 + sigma)


def noise_condition(sigma: Array, spec: ModelSpec, xp: Any) -> Array:
    """Return c_noise(sigma), what the network's noise embedding is fed.

    "250ln" reaches from -1553 to 1096 on the usual range: never compute it in half precision.

    Args:
        sigma: noise level, data units
        xp: the module that owns `log` and `atan`: numpy or torch
    """
    if spec.c_noise == "250ln":  # OpenAI, diffusers: 1000 * ln(sigma) / 4
        return 250.0 * xp.log(sigma)
    if spec.c_noise == "ln/4":  # EDM, Table 1
        return xp.log(sigma) / 4
    if spec.c_noise == "trig":  # sCM (arXiv:2410.11081): t = atan(sigma / sigma_data)
        return xp.atan(sigma / spec.sigma_data)
    if spec.c_noise == "flow":
        return flow_time(sigma)
    if spec.c_noise == "discrete":
        return discrete_time(sigma, spec.times)
    return sigma
