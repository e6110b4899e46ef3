# SPDX-License-Identifier: MIT
"""Diffusion models, the usual teachers: "Elucidating the Design Space" (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from torch import Tensor

from cmfast_train.methods.paths import Conditions, Denoise, noised, values_of
from cmfast_train.methods.step import Losses, Step
from cmfast_train.methods.table import Edm


def edm(s: Step[Edm]) -> Losses:
    """Take a step of denoising with log-normal noise levels."""
    t = s.lognormal(s.hyper.p_mean, s.hyper.p_std)
    return edm_loss(s.networks.student, s.x0, t, s.noise, s.conditions, s.spec.sigma_data), t


def edm_loss(
    denoise: Denoise, x0: Tensor, sigma: Tensor, noise: Tensor, conditions: Conditions, sigma_data: float
) -> Tensor:
    """Return the weighted squared error of a denoiser, [B]: arXiv:2206.00364, eq. 2 and 8. Mean over the values.

    Args:
        denoise: the model, with gradient.
        x0: training samples, [B, *shape].
        sigma: noise levels [B], data units.
        noise: unit Gaussian, [B, *shape].
        conditions: of the denoiser, by name.
        sigma_data: standard deviation of the data.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    error = (denoise(noised(x0, sigma, noise), sigma, conditions) - x0).square()
    return weight * error.mean(dim=values_of(error))
