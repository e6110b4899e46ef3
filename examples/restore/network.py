# SPDX-License-Identifier: MIT
"""The network of the example: a small U-Net that works at the low resolution, as super-resolution networks do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RestoreNet(nn.Module):
    """Images [B, C, H, W] from noise and their low resolution [B, C, H / factor, W / factor].

    Pixels of a block become channels, so every convolution runs on H / factor x W / factor places.

    Args:
        channels: C.
        factor: pixels on a side of a block.
        width: channels inside.
        blocks: residual blocks before, on and after the coarser level.
    """

    def __init__(self, channels: int, factor: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.frequencies = nn.Parameter(torch.randn(32) * 2, requires_grad=False)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.enter = nn.Conv2d(channels * (factor**2 + 1), width, 3, padding=1)
        self.down = nn.ModuleList(Block(width) for _ in range(blocks))
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(Block(2 * width) for _ in range(blocks))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = nn.ModuleList(Block(width) for _ in range(blocks))
        self.leave = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, c_noise: Tensor, low: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        first = hidden = self.enter(torch.cat([functional.pixel_unshuffle(x, self.factor), low], dim=1))
        for block in self.down:
            hidden = block(hidden, embedding)
        skip, hidden = hidden, self.shrink(hidden)
        for block in self.middle:
            hidden = block(hidden, embedding)
        hidden = self.grow(hidden)[..., : skip.shape[2], : skip.shape[3]] + skip  # odd sizes come back one larger
        for block in self.up:
            hidden = block(hidden, embedding)
        return functional.pixel_shuffle(self.leave(hidden + first), self.factor)


class Block(nn.Module):
    """A residual block that the noise level modulates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(width // 16, width)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(128, 2 * width)
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[..., None, None].chunk(2, dim=1)
        hidden = self.one(functional.silu(self.norm(x)))
        return x + self.two(functional.silu(hidden * (1 + scale) + shift))
