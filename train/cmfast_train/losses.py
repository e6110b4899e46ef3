# SPDX-License-Identifier: MIT
"""The training objectives: free functions of a denoiser, two points of a noising path, and nothing hidden.

Each returns one value per image, [B]. x0 and noise are [B, C, H, W]; noise levels are [B], data units.
The schedules that choose the noise levels are in `cmfast_train.schedules`; the loop is `cmfast_train.loop`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def edm_loss(
    denoise: Denoise, x0: Tensor, sigma: Tensor, noise: Tensor, label: Tensor | None, sigma_data: float
) -> Tensor:
    """Weighted squared error of a diffusion denoiser: EDM (arXiv:2206.00364), eq. 2 and 8. Mean over pixels."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoise(_noised(x0, sigma, noise), sigma, label) - x0).square().mean(dim=(1, 2, 3))


def ect_loss(
    denoise: Denoise,
    teach: Denoise,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    label: Tensor | None,
    c: float,
    sigma_min: float,
) -> Tensor:
    """Consistency between noise levels t > r of one path: "Consistency Models Made Easy" (arXiv:2406.14548).

    denoise  the model, with gradient
    teach    the same weights without gradient and with the same dropout masks (see `same_dropout`)
    c        Pseudo-Huber constant, data units; 0 gives the l2 norm

    Pseudo-Huber distance over the whole image, weight 1 / (t - r). Below sigma_min the target is the image.
    """
    with torch.no_grad():
        taught = teach(_noised(x0, r.clamp(min=sigma_min), noise), r.clamp(min=sigma_min), label)
        target = torch.where((r > sigma_min)[:, None, None, None], taught, x0)
    error = (denoise(_noised(x0, t, noise), t, label) - target).square().sum(dim=(1, 2, 3))
    return ((error + c**2).sqrt() - c) / (t - r)


def ct_loss(
    denoise: Denoise, target: Denoise, x0: Tensor, t: Tensor, r: Tensor, noise: Tensor, label: Tensor | None
) -> Tensor:
    """Consistency training: "Consistency Models" (arXiv:2303.01469), Algorithm 3, with d = squared l2, lambda = 1.

    t, r    adjacent noise levels t_{n+1} and t_n of the current grid
    target  the EMA model theta^-
    """
    with torch.no_grad():
        taught = target(_noised(x0, r, noise), r, label)
    return (denoise(_noised(x0, t, noise), t, label) - taught).square().sum(dim=(1, 2, 3))


def same_dropout(denoise: Denoise, devices: list[int]) -> Denoise:
    """Return `denoise` run from the current random state and leaving it untouched.

    A call of `denoise` right afterwards draws the same dropout masks: the two ends of a pair must see one network.
    devices  CUDA device indices whose random state counts; [] on a CPU
    """

    def run(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        with torch.random.fork_rng(devices=devices):
            return denoise(x, sigma, label)

    return run


def _noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return x0 + sigma[:, None, None, None] * noise
