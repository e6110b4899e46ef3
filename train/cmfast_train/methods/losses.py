# SPDX-License-Identifier: MIT
"""The training objectives: free functions of denoisers, points of noising paths, and nothing hidden.

Each returns one value per image, [B]. x0, noise and x are [B, C, H, W], x = x0 + sigma noise; noise levels are [B],
data units. The schedules that choose the noise levels are in `cmfast_train.methods.schedules`;
`cmfast_train.methods.objectives` puts the two together, one short function a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, sigma, label) -> x0
Distance = Callable[[Tensor, Tensor], Tensor]  # two [B, C, H, W] -> [B]


def edm_loss(
    denoise: Denoise, x0: Tensor, sigma: Tensor, noise: Tensor, label: Tensor | None, sigma_data: float
) -> Tensor:
    """Weighted squared error of a diffusion denoiser: EDM (arXiv:2206.00364), eq. 2 and 8. Mean over pixels."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoise(noised(x0, sigma, noise), sigma, label) - x0).square().mean(dim=(1, 2, 3))


def consistency_loss(
    denoise: Denoise,
    target: Denoise,
    distance: Distance,
    x_t: Tensor,
    t: Tensor,
    x_r: Tensor,
    r: Tensor,
    label: Tensor | None,
    sigma_min: float,
) -> Tensor:
    """Distance between what is said at two points of one path, noise levels t > r: arXiv:2303.01469, eq. 7 and 10.

    denoise   the model, with gradient
    target    what it is to agree with, no gradient: an average of the weights, or the same weights and dropout masks
    x_t, x_r  the two points: one image with the same noise, or x_r an `ode_step` of a teacher from x_t

    Up to sigma_min the model is the identity by definition, so there the target is x_r itself.
    """
    with torch.no_grad():
        taught = torch.where(_image(r > sigma_min), target(x_r, r.clamp(min=sigma_min), label), x_r)
    return distance(denoise(x_t, t, label), taught)


def progressive_loss(
    denoise: Denoise, teacher: Denoise, x_t: Tensor, t: Tensor, middle: Tensor, r: Tensor, label: Tensor | None
) -> Tensor:
    """Squared error of one deterministic step t -> r against the teacher's two: arXiv:2202.00512, Algorithm 2.

    The target is the image that a single step would have to see to arrive where two arrive. Weight: truncated SNR,
    max(1 / t^2, 1). Sum over pixels.
    """
    with torch.no_grad():
        x_r = ode_step(teacher, ode_step(teacher, x_t, t, middle, label), middle, r, label)
        target = x_t - _image(t) * (x_r - x_t) / _image(r - t)
    return (1 / t**2).clamp(min=1) * (denoise(x_t, t, label) - target).square().sum(dim=(1, 2, 3))


def scm_target(
    output: Tensor,
    tangent: Tensor,
    x: Tensor,
    sigma: Tensor,
    image: Tensor,
    noise: Tensor,
    sigma_data: float,
    warm: float = 1.0,
    c: float = 0.1,
) -> Tensor:
    """Return what the network's output is to become, F- + g, [B, C, H, W]: sCM (arXiv:2410.11081), Algorithm 1.

    output        F-(x_t / sigma_data, t) of TrigFlow, at t = atan(sigma / sigma_data), x_t = cos(t) x
    tangent       sigma dF-/dsigma along the path, which is cos(t) sin(t) dF-/dt
    image, noise  the path's direction: the training image and its unit noise, or a teacher's x0 and (x - x0) / sigma
    warm          from 0 to 1: how much of the tangent's second, unstable term counts
    c             g is divided by its root mean square + c
    """
    t = torch.atan(_image(sigma) / sigma_data)
    cos, sin = t.cos(), t.sin()
    velocity = cos * sigma_data * noise - sin * image  # dx_t / dt
    g = -(cos**2) * (sigma_data * output - velocity) - warm * (cos * sin * cos * x + sigma_data * tangent)
    size = g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return output + g / (size + c)


def meanflow_target(tangent: Tensor, t: Tensor, r: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return what the average velocity u(z, r, t) is to become, [B, C, H, W]: MeanFlow (arXiv:2505.13447), eq. 10.

    tangent  du/dt along the path z = (1 - t) x0 + t noise
    t, r     flow times, t >= r
    """
    return noise - x0 - _image(t - r) * tangent


def weighted_by_itself(error: Tensor, power: float, c: float = 1e-3) -> Tensor:
    """Return error / (error + c)^power, the weight without gradient: arXiv:2505.13447, eq. 22. error: squared, [B]."""
    return error / (error.detach() + c) ** power


def ode_step(
    denoise: Denoise, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None, second_order: bool = False
) -> Tensor:
    """Follow the probability-flow ODE from noise level t to r > 0: Euler's step, which is DDIM's, or Heun's.

    EDM (arXiv:2206.00364), Algorithm 1, with s(t) = 1 and sigma(t) = t.
    """
    slope = (x - denoise(x, t, label)) / _image(t)
    there = x + _image(r - t) * slope
    if second_order:
        slope = (slope + (there - denoise(there, r, label)) / _image(r)) / 2
        there = x + _image(r - t) * slope
    return there


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Sum of absolute differences, [B]."""
    return (a - b).abs().sum(dim=(1, 2, 3))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences, [B]: what arXiv:2303.01469 calls l2."""
    return (a - b).square().sum(dim=(1, 2, 3))


def pseudo_huber(c: float) -> Distance:
    """Return sqrt(|a - b|^2 + c^2) - c over the whole image: iCT (arXiv:2310.14189), eq. 9. c = 0 is the l2 norm."""
    return lambda a, b: (l2(a, b) + c**2).sqrt() - c


def same_dropout(denoise: Callable[..., Any], devices: list[int]) -> Callable[..., Any]:
    """Return `denoise` run from the current random state and leaving it untouched.

    A call of `denoise` right afterwards draws the same dropout masks: the two ends of a pair must see one network.
    devices  CUDA device indices whose random state counts; [] on a CPU
    """

    def run(*inputs: Any) -> Any:
        with torch.random.fork_rng(devices=devices):
            return denoise(*inputs)

    return run


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return x0 + sigma noise, [B, C, H, W]."""
    return x0 + _image(sigma) * noise


def _image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
