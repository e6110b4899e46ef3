# SPDX-License-Identifier: MIT
"""Exponential moving average of the weights. The average is what is saved and sampled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, in the average's precision (float32)."""
    average = list(average)
    torch._foreach_lerp_(average, [w.detach().to(a.dtype) for a, w in zip(average, weights, strict=True)], 1 - decay)


def warm_decay(decay: float, step: int) -> float:
    """Return the decay at optimiser step `step`: small at first, so that the start of the phase is forgotten."""
    return min(decay, (1 + step) / (10 + step))
