# SPDX-License-Identifier: MIT
"""What is kept of the input while the model draws the rest: known values, a grey image, block averages.

Algorithm 4 of "Consistency Models" (arXiv:2303.01469) has an invertible A and a mask of what is kept of A x; `project`
is its step x0 <- A^-1 [what is kept, the rest of A x0]. For grey, A x is luminance and two colour differences,
so that a correction of brightness leaves the hue; OpenAI's code has an orthogonal A, with which it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, which Pillow's "L" has too


class Constraint(Protocol):
    """What is kept of the input, for N samples."""

    @property
    def before(self) -> Floats:
        """The input as data [N, *shape]: what is unknown is 0."""
        ...

    def project(self, x0: Floats, part: slice) -> Floats:
        """Return x0 [b, *shape] changed so that it keeps what is known of the samples `part`."""
        ...

    def limit(self, x0: Floats, part: slice) -> Floats:
        """Return x0 [b, *shape], which keeps it, moved into [-1, 1] in such a way that it still does."""
        ...


@dataclass(frozen=True)
class Known:
    """Values are kept where a mask is true: inpainting."""

    values: Floats  # [N, *shape]
    mask: npt.NDArray[np.bool_]  # [N, *shape]

    @property
    def before(self) -> Floats:
        """The known values, and 0 elsewhere."""
        return np.where(self.mask, self.values, np.float32(0))

    def project(self, x0: Floats, part: slice) -> Floats:
        """Return x0 with the known values."""
        return np.where(self.mask[part], self.values[part], x0)

    def limit(self, x0: Floats, part: slice) -> Floats:
        """Return x0 clipped where it is drawn."""
        return np.where(self.mask[part], self.values[part], x0.clip(-1, 1))


@dataclass(frozen=True)
class Grey:
    """The weighted sum of red, green and blue, the luminance, is kept: colour from grey."""

    grey: Floats  # [N, 1, H, W]

    @property
    def before(self) -> Floats:
        """The grey image in three equal channels."""
        return np.repeat(self.grey, 3, axis=1)

    def project(self, x0: Floats, part: slice) -> Floats:
        """Return x0 with the same shift of all channels in a pixel; the weights add up to 1."""
        return np.asarray(x0 + (self.grey[part] - luminance(x0)), np.float32)

    def limit(self, x0: Floats, part: slice) -> Floats:
        """Return x0 with less saturation where a channel is outside."""
        return _towards(self.grey[part], x0, lambda scale: scale.min(axis=1, keepdims=True))


@dataclass(frozen=True)
class Averages:
    """The averages of blocks are kept: super-resolution."""

    low: Floats  # [N, *sides], each a divisor of the sample's
    factors: tuple[int, ...]  # of each axis of a sample

    @property
    def before(self) -> Floats:
        """The averages, each as often as its block is large."""
        return spread(self.low, self.factors)

    def project(self, x0: Floats, part: slice) -> Floats:
        """Return x0 with each block moved to its average."""
        return x0 + spread(self.low[part] - averages(x0, self.factors), self.factors)

    def limit(self, x0: Floats, part: slice) -> Floats:
        """Return x0 with less contrast in blocks of which a value is outside."""
        return _towards(
            spread(self.low[part], self.factors),
            x0,
            lambda scale: spread(_reduce(np.min, scale, self.factors), self.factors),
        )


def luminance(x: Floats) -> Floats:
    """Return the grey [N, 1, H, W] of colours [N, 3, H, W]."""
    red, green, blue = (np.float32(weight) for weight in GREY)
    return np.asarray(red * x[:, :1] + green * x[:, 1:2] + blue * x[:, 2:], np.float32)


def averages(x: Floats, factors: Sequence[int]) -> Floats:
    """Return the averages of blocks of so many values along each axis of the samples [N, *shape]."""
    return _reduce(np.mean, x, factors)


def spread(low: Floats, factors: Sequence[int]) -> Floats:
    """Return each value of the samples [N, *sides] repeated so often along each axis."""
    for axis, factor in enumerate(factors, start=1):
        low = np.repeat(low, factor, axis=axis) if factor > 1 else low
    return low


def _reduce(how: Any, x: Floats, factors: Sequence[int]) -> Floats:
    sides = [side for size, factor in zip(x.shape[1:], factors, strict=True) for side in (size // factor, factor)]
    inner = tuple(range(2, len(sides) + 1, 2))
    return np.asarray(how(x.reshape(len(x), *sides), axis=inner), np.float32)


def _towards(centre: Floats, x: Floats, least: Any) -> Floats:
    """Return centre + s (x - centre) in [-1, 1], with the largest s up to 1; `least` makes s equal where it must be."""
    away = x - centre
    room = np.where(away > 0, 1 - centre, 1 + centre)
    # A little inside, for the rounding of the product; `away` is 0 where there is nothing to move.
    scale = np.where(np.abs(away) > room, room / np.maximum(np.abs(away), np.finfo(np.float32).tiny), np.float32(1))
    moved = centre + least(scale.astype(np.float32)) * away
    return np.asarray(moved.clip(-1, 1), np.float32)
