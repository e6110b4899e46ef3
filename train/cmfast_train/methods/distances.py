# SPDX-License-Identifier: MIT
"""Distances between two batches of samples [B, *shape], one value per sample, [B]. LPIPS is in `perceptual`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_train.methods.method import Needs
from cmfast_train.methods.paths import values_of
from cmfast_train.methods.schedules import pseudo_huber_c

Distance = Callable[[Tensor, Tensor], Tensor]  # two [B, *shape] -> [B]


def distance_of(needs: Needs, values: int, lpips: Distance | None) -> Distance:
    """Return the distance that a phase needs.

    Args:
        needs: of the phase; `needs.distance` names the distance.
        values: number of values of a sample.
        lpips: LPIPS with its weights, where they are loaded.

    Raises:
        CmfastError: LPIPS is needed and has no weights.
    """
    if needs.distance == "lpips":
        if lpips is None:
            raise CmfastError("loss=lpips needs the weights of a network: --set lpips=vgg:FILE")
        return lpips
    if not needs.distance:
        return l2
    return {"l1": l1, "l2": l2, "huber": pseudo_huber(pseudo_huber_c(values, needs.huber))}[needs.distance]


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Sum of absolute differences, [B]."""
    return (a - b).abs().sum(dim=values_of(a))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences, [B]: what arXiv:2303.01469 calls l2."""
    return (a - b).square().sum(dim=values_of(a))


def pseudo_huber(c: float) -> Distance:
    """Return sqrt(|a - b|^2 + c^2) - c over the whole sample: iCT (arXiv:2310.14189), eq. 9. c = 0 is the l2 norm."""
    return lambda a, b: (l2(a, b) + c**2).sqrt() - c
