# SPDX-License-Identifier: MIT
"""The network of the first public implementation of consistency models (cloneofsimo/consistency_models, 2023).

Two halvings, residual blocks without attention, the noise level as one linear layer a level. The state-dict keys
are its 70, so the files that it wrote load without renaming. Here is F alone: its skip and output scaling, and the
noise level as it is, are `ModelSpec(scaling="seed", c_noise="raw")`; with other conventions the same network trains
as the papers say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.networks.adm import GroupNorm32
from cmfast_train.networks.precision import cast, full_precision
from cmfast_train.networks.shape import check_seed_network


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """The shape of one network. Saved in the checkpoint under "network"."""

    image_size: int  # pixels, square, a multiple of 4; no tensor depends on it
    channels: int = 3  # of the image, in and out
    classes: int = 0  # always: it takes no label
    width: int = 128  # channels at full and half size, twice that below; a multiple of 32; the original's D

    def __post_init__(self) -> None:
        check_seed_network(vars(self))
        if self.classes != 0:
            raise CmfastError(f"the first public implementation's network takes no label, got classes={self.classes}")


class SeedUnet(nn.Module):
    """F(x, c_noise): x [B, C, H, W], c_noise [B] -> [B, C, H, W] float32. `label` is for the common contract."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.config = config
        d, n = config.width, config.channels
        self.down = nn.ModuleList([_conv(n, d), _block(d, d), _block(d, 2 * d), _block(2 * d, 2 * d)])
        self.time_downs = nn.ModuleList([nn.Linear(2 * d, width) for width in (d, d, 2 * d, 2 * d)])
        self.mid = _block(2 * d, 2 * d)
        self.up = nn.ModuleList([_block(2 * d, 2 * d), _block(4 * d, d), _block(d, d), _conv(2 * d, 2 * d)])
        self.last = _conv(2 * d + n, n)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        # The raw noise level has up to 80 radians: half precision would lose its sines.
        with full_precision(x):
            emb = sine_embedding(cast(c_noise, torch.float32), self.config.width)
            e0, e1, e2, e3 = (linear(emb)[..., None, None] for linear in self.time_downs)
        d0, d1, d2, d3 = self.down
        u0, u1, u2, u3 = self.up

        half = _halve(d0(x))  # [B, D, H/2, W/2]
        h = half + cast(e0, half.dtype)
        h = d1(h) + h
        h = h + cast(e1, h.dtype)
        quarter = _halve(d2(h))  # [B, 2D, H/4, W/4]
        h = quarter + cast(e2, quarter.dtype)
        h = d3(h) + h
        h = h + cast(e3, h.dtype)
        h = self.mid(h)
        h = u0(h) + h
        h = u1(_double(torch.cat([h, quarter], dim=1)))
        h = u2(h) + h
        h = u3(_double(torch.cat([h, half], dim=1)))
        return cast(self.last(torch.cat([h, x], dim=1)), torch.float32)


def sine_embedding(t: Tensor, dim: int) -> Tensor:
    """Return [sin, cos] of t [B] at dim frequencies from 1 down to almost 1/10000, float32 [B, 2 dim]."""
    freqs = torch.exp(torch.arange(dim, dtype=torch.float32, device=t.device) * -math.log(10000) / dim)
    args = t[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=-1)


def _block(c_in: int, c_out: int) -> nn.Sequential:
    """GroupNorm, SiLU, convolution, twice; the two SiLU have no weights but count in the keys."""
    norm_in, norm_out = GroupNorm32(c_in), GroupNorm32(c_out)
    return nn.Sequential(norm_in, nn.SiLU(), _conv(c_in, c_out), norm_out, nn.SiLU(), _conv(c_out, c_out))


def _conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _halve(x: Tensor) -> Tensor:
    """Every second pixel: nearest neighbour to half the size, which takes the upper left of four."""
    return x[..., ::2, ::2]


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)
