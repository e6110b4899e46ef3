# SPDX-License-Identifier: MIT
"""The methods of training: each is one loss function and one schedule of noise levels, and stands here whole.

A method is a function of a `Step`. It chooses noise levels, asks the networks, and returns the loss of each image with
its (larger) noise level, both [B]. Distances and targets are in `losses`, formulas of noise levels in `schedules`; what
a method's hyperparameters mean, and their usual values, in `config.phase`; the loop in `training.trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.config.phase import CONTINUOUS, Phase
from cmfast_train.methods.losses import (
    Denoise,
    Distance,
    consistency_loss,
    edm_loss,
    l1,
    l2,
    meanflow_target,
    noised,
    ode_step,
    progressive_loss,
    pseudo_huber,
    scm_target,
    weighted_by_itself,
)
from cmfast_train.methods.schedules import (
    ct_ema,
    ct_pair,
    ct_scales,
    ect_r,
    flow_time,
    ict_pair,
    ict_scales,
    lognormal,
    meanflow_pair,
    pd_steps,
    pseudo_huber_c,
)

Losses = tuple[Tensor, Tensor]  # of each image: the loss and the noise level, [B]


class Networks(Protocol):
    """What a method may ask. x [B, C, H, W], sigma [B], label [B] or None; all draw the same dropout masks."""

    def student(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The denoiser in training, with gradient: x0."""

    def itself(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The same weights without gradient."""

    def target(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The average theta^- of its weights, without gradient."""

    def teacher(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The model that is distilled, without gradient and without dropout."""

    def output(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, second: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The network's output F, with gradient, and the log-variance u(sigma) [B] that a loss is weighted by."""

    def output_along(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, second: Tensor | None, dx: Tensor, dsigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """F and its derivative along (dx, dsigma), without gradient."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step's share of images, and what there is to train on them with."""

    phase: Phase
    spec: ModelSpec
    networks: Networks
    distance: Distance  # phase.loss
    done: int  # optimiser steps of the phase before this one
    steps: int  # of the phase
    x0: Tensor  # images [B, C, H, W]
    noise: Tensor  # unit Gaussian [B, C, H, W]
    uniform: Tensor  # [B, 3 or more] in [0, 1)
    label: Tensor | None  # [B]

    @property
    def grid(self) -> tuple[float, float]:
        """Ends of the noise levels, data units."""
        return self.spec.sigma_min, self.spec.sigma_max

    def normal(self, column: int = 0) -> Tensor:
        """Return unit Gaussian numbers [B] from a column of `uniform`."""
        normal: Tensor = torch.special.ndtri(self.uniform[:, column].double().clamp(1e-6, 1 - 1e-6))
        return normal.to(self.uniform)

    def at(self, sigma: Tensor) -> Tensor:
        """Return the images with their noise at level sigma [B]."""
        return noised(self.x0, sigma, self.noise)

    def lognormal(self) -> Tensor:
        """Return noise levels [B] of the phase's log-normal law."""
        return lognormal(self.normal(), self.phase.p_mean, self.phase.p_std, *self.grid)


def edm(s: Step) -> Losses:
    """Diffusion, the usual teacher: EDM (arXiv:2206.00364)."""
    t = s.lognormal()
    return edm_loss(s.networks.student, s.x0, t, s.noise, s.label, s.spec.sigma_data), t


def ct(s: Step) -> Losses:
    """Consistency training: "Consistency Models" (arXiv:2303.01469), Algorithm 3; target is an average of weights."""
    (n,) = constants(s.phase, s.done, s.steps)
    t, r = ct_pair(n, s.uniform[:, 0], *s.grid)
    return _consistency(s, s.networks.target, t, s.at(r), r), t


def cd(s: Step) -> Losses:
    """Consistency distillation: "Consistency Models" (arXiv:2303.01469), Algorithm 2; one ODE step of the teacher."""
    (n,) = constants(s.phase, s.done, s.steps)
    t, r = ct_pair(n, s.uniform[:, 0], *s.grid)
    with torch.no_grad():
        x_r = ode_step(s.networks.teacher, s.at(t), t, r, s.label, s.phase.solver == "heun")
    return _consistency(s, s.networks.target, t, x_r, r), t


def ict(s: Step) -> Losses:
    """Improved consistency training (arXiv:2310.14189): Pseudo-Huber, log-normal levels, doubling grid, no average."""
    (n,) = constants(s.phase, s.done, s.steps)
    t, r = ict_pair(n, s.uniform[:, 0], s.phase.p_mean, s.phase.p_std, *s.grid)
    return _consistency(s, s.networks.itself, t, s.at(r), r) / (t - r), t


def ect(s: Step) -> Losses:
    """Consistency tuning: "Consistency Models Made Easy" (arXiv:2406.14548); r approaches t in stages."""
    (stage,) = constants(s.phase, s.done, s.steps)
    t = s.lognormal()
    r = ect_r(t, stage, s.phase.q, s.phase.k, s.phase.b)
    below = torch.where(r > s.spec.sigma_min, r, 0)  # where the target is the image
    return _consistency(s, s.networks.itself, t, s.at(below), below) / (t - r), t


def pd(s: Step) -> Losses:
    """Progressive distillation (arXiv:2202.00512): one step does what the teacher does in two. Halve, repeat."""
    t, middle, r = pd_steps(s.phase.steps, s.uniform[:, 0], *s.grid)
    return progressive_loss(s.networks.student, s.networks.teacher, s.at(t), t, middle, r, s.label), t


def sct(s: Step) -> Losses:
    """Continuous-time consistency training: sCM (arXiv:2410.11081), sCT; the path leads straight to the image."""
    t = s.lognormal()
    return _continuous(s, t, s.x0, s.noise), t


def scd(s: Step) -> Losses:
    """Continuous-time consistency distillation: sCM (arXiv:2410.11081), sCD; the path follows the teacher."""
    t = s.lognormal()
    x = s.at(t)
    with torch.no_grad():
        image = s.networks.teacher(x, t, s.label)
    return _continuous(s, t, image, (x - image) / t[:, None, None, None]), t


def mf(s: Step) -> Losses:
    """MeanFlow (arXiv:2505.13447), Algorithm 1: the average velocity between two times; samples are drawn at r = 0."""
    phase = s.phase
    t, r = meanflow_pair(
        s.normal(0), s.normal(1), s.uniform[:, 2], phase.ratio, phase.p_mean, phase.p_std, s.spec.sigma_max
    )
    speed = (1 + t) ** 2  # d sigma / dt of flow time t
    along = s.noise * speed[:, None, None, None]
    _, tangent = s.networks.output_along(s.at(t), t, s.label, r, along, speed)
    target = meanflow_target(tangent, flow_time(t), flow_time(r), s.x0, s.noise)
    velocity, _ = s.networks.output(s.at(t), t, s.label, r)
    return weighted_by_itself(l2(velocity, target), phase.power), t


METHODS: dict[str, Callable[[Step], Losses]] = {
    "edm": edm, "ct": ct, "cd": cd, "ict": ict, "ect": ect, "pd": pd, "sct": sct, "scd": scd, "mf": mf,
}  # fmt: skip


def constants(phase: Phase, done: int, steps: int) -> tuple[Any, ...]:
    """Return the numbers of a step that follow its place in the phase: all else that it computes with is in tensors.

    They move one way through a phase, so between two steps where they are equal they are equal throughout.
    """
    if phase.method in ("ct", "cd"):
        return (ct_scales(done, steps, phase.s0, phase.s1),)  # noise levels
    if phase.method == "ict":
        return (ict_scales(done, steps, phase.s0, phase.s1),)
    if phase.method == "ect":
        first, last = phase.stages
        return (first + done * (last - first + 1) // steps,)  # stage
    if phase.method in CONTINUOUS:
        return (min(1.0, done / (phase.warmup * steps)) if phase.warmup else 1.0,)  # of the tangent's second term
    return ()


def target_decay(phase: Phase, done: int, steps: int) -> float | None:
    """Return the decay of the target's weights at a step; None where a method has no such average."""
    if phase.method not in ("ct", "cd"):
        return None
    return phase.mu0 if phase.mu == "fixed" else ct_ema(done, steps, phase.s0, phase.s1, phase.mu0)


def distance_of(phase: Phase, values: int, lpips: Distance | None) -> Distance:
    """Return the distance that `phase.loss` names, for images of that many values."""
    if phase.loss == "lpips":
        if lpips is None:
            raise CmfastError(f"{phase.method}.loss=lpips needs the weights of a network: --set lpips=vgg:FILE")
        return lpips
    return {"l1": l1, "l2": l2, "huber": pseudo_huber(pseudo_huber_c(values, phase.huber))}[phase.loss]


def _consistency(s: Step, target: Denoise, t: Tensor, x_r: Tensor, r: Tensor) -> Tensor:
    networks, x_t = s.networks, s.at(t)
    return consistency_loss(networks.student, target, s.distance, x_t, t, x_r, r, s.label, s.spec.sigma_min)


def _continuous(s: Step, t: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    """sCM's loss, whichever way the path goes. In these scalings the network says F of TrigFlow, or -F (EDM)."""
    sign = 1 if s.spec.scaling == "trigflow" else -1
    x = s.at(t)
    said, tangent = s.networks.output_along(x, t, s.label, None, t[:, None, None, None] * noise, t)
    (warm,) = constants(s.phase, s.done, s.steps)
    target = sign * scm_target(
        sign * said, sign * tangent, x, t, image, noise, s.spec.sigma_data, warm, s.phase.tangent_c
    )
    output, u = s.networks.output(x, t, s.label)
    error = l2(output, target) / math.prod(s.spec.image)
    return error / u.exp() + u
