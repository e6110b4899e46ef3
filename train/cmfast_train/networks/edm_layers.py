# SPDX-License-Identifier: MIT
"""The layers of EDM's U-Nets (`edm`): convolutions that resample, the norm, the waves of the noise level."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast_train.networks.precision import cast

FILTERS = ((1, 1), (1, 3, 3, 1))  # taps of the resampling filters


class Conv(nn.Conv2d):
    """A convolution that keeps the side, after halving or doubling it where `resample` says so."""

    resample_filter: Tensor  # None where it does not resample

    def __init__(self, c_in: int, c_out: int, kernel: int, resample: str = "", taps: tuple[int, ...] = (1, 1)) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.resample = resample
        self.register_buffer("resample_filter", _square(taps) if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resampled(x, self.resample, self.resample_filter) if self.resample else x)


class ConvDown(nn.Conv2d):
    """A 3x3 convolution, then halving the side: the other order than `Conv`, with all padding before both."""

    resample_filter: Tensor

    def __init__(self, c_in: int, c_out: int, taps: tuple[int, ...]) -> None:
        super().__init__(c_in, c_out, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _square(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resampled(super().forward(x), "down", self.resample_filter, padding=0)


class Resample(nn.Module):
    """Halve or double the side. [B, C, H, W]."""

    resample_filter: Tensor

    def __init__(self, resample: str, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.resample = resample
        self.register_buffer("resample_filter", _square(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resampled(x, self.resample, self.resample_filter)


class GroupNorm(nn.GroupNorm):
    """At least 4 channels a group, at most 32 groups; statistics are float32 whatever the backbone runs in."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:  # casts to the same type slow down every trace
            return super().forward(x)
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class PositionalWaves(nn.Module):
    """[cos, sin] of t [B] at `width` / 2 frequencies from 1 down to 1/10000, which is reached with `endpoint`."""

    def __init__(self, width: int, endpoint: bool) -> None:
        super().__init__()
        self.count, self.steps = width // 2, width // 2 - (1 if endpoint else 0)

    def forward(self, t: Tensor) -> Tensor:
        args = t[:, None] * self.frequencies(t.device)
        return torch.cat([args.cos(), args.sin()], dim=1)

    def frequencies(self, device: torch.device) -> Tensor:
        """Return the frequencies, [width / 2] float32."""
        steps = torch.arange(self.count, dtype=torch.float32, device=device)
        return torch.exp(steps * (-math.log(10000) / self.steps))


class FourierWaves(nn.Module):
    """[cos, sin] of t [B] at `width` / 2 frequencies that were drawn once, before training (arXiv:2006.10739)."""

    freqs: Tensor  # [width / 2]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2, dtype=torch.float32))

    def forward(self, t: Tensor) -> Tensor:
        args = t[:, None] * (2 * math.pi * self.freqs.float())
        return torch.cat([args.cos(), args.sin()], dim=1)


def resampled(x: Tensor, direction: str, kernel: Tensor, padding: int | None = None) -> Tensor:
    """Return x [B, C, H, W] with half ("down") or twice ("up") the side, each channel filtered by kernel [1, 1, k, k].

    Args:
        padding: pixels of zeros on every side before halving; None: so many that the side is exactly halved
    """
    channels, taps = x.shape[1], kernel.shape[-1]
    if taps == 2:  # the box filter: the same numbers, and operators that every backend is fast at
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0)
    around = (taps - 1) // 2 if padding is None else padding
    each = cast(kernel, x.dtype).expand(channels, 1, taps, taps)
    if direction == "down":
        return F.conv2d(x, each, stride=2, padding=around, groups=channels)
    return F.conv_transpose2d(x, 4 * each, stride=2, padding=around, groups=channels)


def _square(taps: tuple[int, ...]) -> Tensor:
    """Return the separable filter of these taps, [1, 1, k, k], with sum one."""
    line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    return (line[:, None] * line)[None, None]
