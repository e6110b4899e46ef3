# SPDX-License-Identifier: MIT
"""Noising paths x = x0 + sigma noise: points on a path, noise levels, steps of the probability-flow ODE.

x, x0 and noise are [B, *shape] of any rank; noise levels are [B], data units. Shared by the families of methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cmfast_train.denoiser import expand as expand

Conditions = Mapping[str, Tensor]  # by name: class conditions int64 [B], tensor conditions float32 [B, *shape]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]  # (x, sigma, conditions) -> x0


def values_of(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of x [B, *shape] behind the batch, to sum or average over one sample's values.

    Reduced in place: flattening would copy a channels_last tensor first, and add up in another order.
    """
    return tuple(range(1, x.ndim))


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return x0 + sigma noise, [B, *shape]."""
    return x0 + expand(sigma, x0) * noise


def ode_step(
    denoise: Denoise, x: Tensor, t: Tensor, r: Tensor, conditions: Conditions, second_order: bool = False
) -> Tensor:
    """Follow the probability-flow ODE from noise level t to r > 0: Euler's step, which is DDIM's, or Heun's.

    EDM (arXiv:2206.00364), Algorithm 1, with s(t) = 1 and sigma(t) = t.

    Args:
        denoise: the model whose ODE it is.
        x: samples at noise level t, [B, *shape].
        t: noise levels [B], data units.
        r: noise levels [B] where the step ends, data units.
        conditions: of the denoiser, by name.
        second_order: Heun's step, which evaluates twice.
    """
    slope = (x - denoise(x, t, conditions)) / expand(t, x)
    there = x + expand(r - t, x) * slope
    if second_order:
        slope = (slope + (there - denoise(there, r, conditions)) / expand(r, x)) / 2
        there = x + expand(r - t, x) * slope
    return there


def lognormal(normal: Tensor, p_mean: float, p_std: float, sigma_min: float, sigma_max: float) -> Tensor:
    """Return noise levels exp(p_mean + p_std * normal) [B], data units, kept inside the model's range."""
    return (p_mean + p_std * normal).exp().clamp(sigma_min * 1.0001, sigma_max)


def flow_time(sigma: Tensor) -> Tensor:
    """Return t = sigma / (1 + sigma), the time of the straight path (1 - t) x0 + t noise."""
    return sigma / (1 + sigma)


def sigma_of(time: Tensor) -> Tensor:
    """Return the noise level t / (1 - t) of a flow time below 1: `flow_time` backwards."""
    return time / (1 - time)


@functools.lru_cache(maxsize=16)
def grid_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a grid as a tensor, cached: grids change rarely, and a copy to a GPU waits for its queue."""
    return torch.tensor(values, dtype=dtype, device=device)
