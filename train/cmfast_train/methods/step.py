# SPDX-License-Identifier: MIT
"""The input of a step function: samples, random numbers, and the networks that it may evaluate.

A method is a function of a `Step`. It chooses noise levels, evaluates networks, and returns the loss of each sample
with its (larger) noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor

from cmfast.spec import ModelSpec
from cmfast_train.methods.distances import Distance
from cmfast_train.methods.paths import Conditions, lognormal, noised

H = TypeVar("H")  # the dataclass of the method's hyperparameters

Losses = tuple[Tensor, Tensor]  # of each sample: the loss and the noise level, [B]


class Networks(Protocol):
    """The networks of a phase. All evaluations of one step draw the same dropout masks.

    x is [B, *shape], sigma [B] noise levels in data units, conditions [B, ..] by name.
    """

    def student(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return the denoiser in training, with gradient: x0 [B, *shape]."""

    def stopgrad(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 of the same weights without gradient: stopgrad(theta) of iCT (arXiv:2310.14189)."""

    def target(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 of the average theta^- of its weights, without gradient: `Method.target_decay`."""

    def teacher(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 of the model that is distilled, without gradient and without dropout: `Method.distils`."""

    def fake(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: Sequence[int]) -> Tensor:
        """Return x0 of the denoisers that learn the student's samples, with gradient: `Needs.fake_scores`.

        Args:
            x: noised samples.
            sigma: their noise levels.
            conditions: of the denoisers.
            parts: how many samples the first of them denoises, the second, ..; in this order, B together.
        """

    def scores(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return x0 of the teacher and of `fake`, for a gradient of x that `torch.autograd.grad` takes."""

    def output(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the network's output F [B, *shape] and the log-variance u(sigma) [B] of its loss, with gradient.

        Args:
            x: noised samples.
            sigma: their noise levels.
            conditions: of the denoiser.
            sigma_next: the second noise level [B] of a network that takes two.
        """

    def output_stopgrad(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None = None
    ) -> Tensor:
        """Return F of `output`, without gradient."""

    def output_along(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None, dx: Tensor, dsigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return F and its derivative along (dx [B, *shape], dsigma [B]), without gradient."""


@final
@dataclass(frozen=True, kw_only=True)
class Step(Generic[H]):
    """One micro-batch of an optimiser step.

    Attributes:
        hyper: the method's hyperparameters.
        spec: conventions of the model in training.
        networks: what the method may evaluate.
        distance: what `Needs.distance` names; l2 if nothing.
        constants: what `Method.constants` returns at this step.
        x0: training samples, [B, *shape], data units.
        noise: unit Gaussian, [B, *shape].
        more_noise: further ones, independent, [noises - 1, B, *shape]: `Needs.noises`.
        uniform: random numbers in [0, 1), [B, 3 or more].
        conditions: of the samples, by name; {} where the model has none.
    """

    hyper: H
    spec: ModelSpec
    networks: Networks
    distance: Distance
    constants: tuple[Any, ...]
    x0: Tensor
    noise: Tensor
    more_noise: Tensor = field(default_factory=lambda: torch.empty(0))
    uniform: Tensor
    conditions: Conditions

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level, data units."""
        return self.spec.sigma_min, self.spec.sigma_max

    def normal(self, column: int = 0) -> Tensor:
        """Return unit Gaussian numbers [B] from a column of `uniform`."""
        normal: Tensor = torch.special.ndtri(self.uniform[:, column].double().clamp(1e-6, 1 - 1e-6))
        return normal.to(self.uniform)

    def lognormal(self, p_mean: float, p_std: float) -> Tensor:
        """Return noise levels [B] in data units, whose logarithm has this mean and standard deviation."""
        return lognormal(self.normal(), p_mean, p_std, *self.sigma_range)

    def at(self, sigma: Tensor) -> Tensor:
        """Return the samples with their noise at level sigma [B]: [B, *shape]."""
        return noised(self.x0, sigma, self.noise)


StepFunction = Callable[[Step[H]], Losses]
