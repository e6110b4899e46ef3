# SPDX-License-Identifier: MIT
"""Moving averages of the weights. An average is what is saved and sampled.

Two profiles: constant decay, and the power functions of EDM2 (Karras et al. 2024, arXiv:2312.02696, Section 3 and
Appendix C), whose width is a fraction of the run and whose snapshots combine into averages of other widths afterwards:

    profile of width std after T updates:   p(t) = (gamma + 1) t^gamma / T^(gamma + 1),   0 <= t <= T

The update with decay (1 - 1/t)^(gamma + 1) gives the weights of step t exactly the integral of p from t - 1 to t.
`trainer` keeps the averages, `cli.ema` combines snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmfast.errors import CmfastError

MAX_STD = math.sqrt(1 / 12)  # gamma = 0: all steps weigh the same
MIN_STD = 1e-7  # gamma = 1e7, narrower than a step of any run; far below, inner products of profiles are NaN

Factors = npt.NDArray[np.float64]  # [N], one for each stored average


class Averages:
    """Several averages of the same weights, float32.

    The weights may be on any device, of any precision, or DTensors: an average is like its weight, in float32.

    Args:
        weights: to be averaged, by name.
        rates: constant decays, warmed up by `warm_decay`.
        stds: widths of power functions, fractions of the phase, at most MAX_STD.

    Attributes:
        averages: {"0.9999": {...}, "std0.05": {...}}: constant decays by their value, power functions by their std.

    Raises:
        CmfastError: a rate or a width is given twice, or a width is out of range.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], rates: tuple[float, ...] = (), stds: tuple[float, ...] = ()
    ) -> None:
        self.gammas = {f"std{std}": gamma_of_std(std) for std in stds}
        self.rates = {f"{rate}": rate for rate in rates}
        if len(self.rates) + len(self.gammas) < len(rates) + len(stds):
            raise CmfastError(f"every average must be different, got rates {rates}, stds {stds}")
        self.averages: dict[str, dict[str, Tensor]] = {
            name: {key: weight.detach().to(torch.float32, copy=True) for key, weight in weights.items()}
            for name in (*self.rates, *self.gammas)
        }

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return self.averages[name]

    def decays(self, step: int) -> dict[str, float]:
        """Return the decay of each average for the update after `step` others."""
        constant = {name: warm_decay(rate, step) for name, rate in self.rates.items()}
        return constant | {name: power_decay(step + 1, gamma) for name, gamma in self.gammas.items()}

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Update the averages with the weights after an optimiser step. step: updates before this one in the phase."""
        now = {name: _float32(weight) for name, weight in weights.items()}  # once for all averages
        for name, decay in self.decays(step).items():
            average = self.averages[name]
            update_ema(average.values(), [now[key] for key in average], decay)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return {average: {weight: tensor}}: the tensors themselves, to be saved before the next update."""
        return {name: dict(average) for name, average in self.averages.items()}


@torch.no_grad()
def update_ema(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, in the average's precision (float32)."""
    average = list(average)
    # One call per weight would take as long as a small network's step.
    now = [w if w.dtype == a.dtype else w.detach().to(a.dtype) for a, w in zip(average, weights, strict=True)]
    torch._foreach_lerp_(average, now, 1 - decay)


def _float32(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float32 else weight.detach().to(torch.float32)


def warm_decay(decay: float, step: int) -> float:
    """Return the decay at optimiser step `step`: small at first, so that the initial weights fade quickly."""
    return min(decay, (1 + step) / (10 + step))


def power_decay(step: int, gamma: float) -> float:
    """Return the decay of update number `step`, counted from 1, which copies. arXiv:2312.02696, Section 3.1."""
    return math.pow(1 - 1 / step, gamma + 1)


def std_of_gamma(gamma: float) -> float:
    """Return the standard deviation of the profile t^gamma as a fraction of the run. gamma >= 0.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); arXiv:2312.02696, Section 3.1. It falls with gamma.
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of_std(std: float) -> float:
    """Return the exponent gamma >= 0 of the profile with this standard deviation, a fraction of the run.

    With u = gamma + 2 the cubic reads u = sqrt((u - 1) / (u + 1)) / std. Repeating that contracts: the slope is
    u / (u^2 - 1), at most 2/3 where gamma >= 0.
    """
    if not MIN_STD <= std <= MAX_STD:
        raise CmfastError(
            f"the width of an average is a fraction of the run, at least {MIN_STD:g} and at most {MAX_STD:.4f} (all "
            f"steps weigh the same), for example 0.05 or 0.10; got {std:g}"
        )
    u = 1 / std
    for _ in range(100):  # (2/3)^100 is below a rounding
        u = max(math.sqrt((u - 1) / (u + 1)) / std, 2.0)
    return u - 2


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A power-function average at one moment: width `std` (a fraction of the phase) after `step` updates."""

    step: int
    std: float
    weights: Mapping[str, Tensor]


def reconstruct(snapshots: Sequence[Snapshot], std: float, step: int | None = None) -> dict[str, Tensor]:
    """Return an average of any width, combined from snapshots: arXiv:2312.02696, Section 3.2. See `posthoc_error`.

    Args:
        snapshots: of one phase, with the same weight names.
        std: width wanted, a fraction of the phase.
        step: updates after which the average is wanted; default: those of the last snapshot.

    Returns:
        float32 tensors by weight name, on the device of the first snapshot's; of whole numbers the last snapshot's.
    """
    step = max(snapshot.step for snapshot in snapshots) if step is None else step
    stored = [(snapshot.step, gamma_of_std(snapshot.std)) for snapshot in snapshots]
    coefficients = posthoc_coefficients(stored, step, gamma_of_std(std))
    used = [(float(x), snapshot.weights) for x, snapshot in zip(coefficients, snapshots, strict=True) if x]
    last = max(snapshots, key=lambda snapshot: snapshot.step).weights
    return {
        name: _combine(used, name) if value.is_floating_point() else value  # a count or a mask
        for name, value in last.items()
    }


def posthoc_coefficients(stored: Sequence[tuple[float, float]], wanted_step: float, wanted_gamma: float) -> Factors:
    """Return the factors, float64 [N], whose weighted sum of profiles is nearest the wanted profile.

    Least squares over the profiles as functions of time, arXiv:2312.02696, Appendix C, by their inner products. The
    factors also sum to 1, so constant weights are reproduced exactly: deviations are relative to the nearest stored
    profile, and a stored profile that is the wanted one gets the factor 1.

    Args:
        stored: (step, gamma) of each average.
        wanted_step: updates of the wanted average.
        wanted_gamma: its exponent.
    """
    factors: Factors = np.zeros(len(stored))
    if (wanted_step, wanted_gamma) in stored:
        factors[list(stored).index((wanted_step, wanted_gamma))] = 1
        return factors
    gram, overlap, norm = _products(stored, wanted_step, wanted_gamma)
    nearest = int((gram.diagonal() - 2 * overlap + norm).argmin())
    # Inner products of (p_i - p_nearest) with each other and with (p_wanted - p_nearest).
    differences = gram - gram[:, [nearest]] - gram[[nearest]] + gram[nearest, nearest]
    target = overlap - overlap[nearest] - gram[:, nearest] + gram[nearest, nearest]
    length = np.sqrt(differences.diagonal().clip(min=0))
    scale = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
    factors += np.linalg.lstsq(differences * np.outer(scale, scale), target * scale, rcond=1e-12)[0] * scale
    factors[nearest] = 0
    factors[nearest] = 1 - factors.sum()
    return factors


def posthoc_error(
    stored: Sequence[tuple[float, float]],
    coefficients: Factors,
    wanted_step: float,
    wanted_gamma: float,
) -> float:
    """Return the relative error of the combined profile: norm of its difference from the wanted one over its norm."""
    gram, overlap, norm = _products(stored, wanted_step, wanted_gamma)
    square = coefficients @ gram @ coefficients - 2 * coefficients @ overlap + norm
    return math.sqrt(max(float(square), 0.0) / norm)


def _products(stored: Sequence[tuple[float, float]], wanted_step: float, wanted_gamma: float) -> tuple[Any, Any, float]:
    """Return the inner products: stored with stored [N, N], stored with wanted [N], wanted with wanted.

    Time is counted in wanted_step, so that the numbers are around one.
    """
    t, gamma = np.array(stored, dtype=np.float64).T
    t = t / wanted_step
    gram = _inner(t[:, None], gamma[:, None], t, gamma)
    return gram, _inner(t, gamma, np.float64(1), wanted_gamma), float(_inner(1.0, wanted_gamma, 1.0, wanted_gamma))


def _inner(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Return the integral of the product of two profiles. arXiv:2312.02696, Appendix C.

    (a + 1)(b + 1) / (a + b + 1) * first^(a + b + 1) / (t_a^(a + 1) t_b^(b + 1)) with first = min(t_a, t_b), written so
    that no power overflows.
    """
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent = np.where(t_a > t_b, gamma_a, gamma_b)  # of the profile that lasts longer
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** exponent / last


def _combine(used: Sequence[tuple[float, Mapping[str, Tensor]]], name: str) -> Tensor:
    """Return the sum of factor * weights[name], summed in float64, as float32."""
    first = used[0][1][name]
    total = torch.zeros_like(first, dtype=torch.float64)
    for factor, weights in used:
        total.add_(weights[name].to(total), alpha=factor)
    return total.to(torch.float32)
