# SPDX-License-Identifier: MIT
"""The policy's network: a 1-D U-Net over the action chunk, and an encoder of the camera's image. Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 64  # of an encoded image


class Camera(nn.Module):
    """Features [B, 64] of an image [B, 2, 24, 24]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 16, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(32 * 3 * 3, FEATURES),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.body(image)
        return features


class Block(nn.Module):
    """Two convolutions along time; the condition scales and shifts what is between them (FiLM, arXiv:1709.07871)."""

    def __init__(self, channels: int, out: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv1d(channels, out, 3, padding=1))
        self.film = nn.Linear(condition, 2 * out)
        self.norm = nn.GroupNorm(8, out)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv1d(out, out, 3, padding=1))
        self.skip = nn.Conv1d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        hidden = self.norm(self.first(x)) * (1 + scale) + shift
        result: Tensor = self.skip(x) + self.second(hidden)
        return result


class Unet1d(nn.Module):
    """Actions [B, 16, 2] from noisy ones, the noise level, the state [B, 4] and the encoded image [B, 64]."""

    def __init__(self, channels: int = 32, condition: int = 128) -> None:
        super().__init__()
        wide = 2 * channels
        self.register_buffer("frequencies", torch.exp(torch.linspace(-2.0, 1.5, 16)))
        self.condition = nn.Sequential(
            nn.Linear(2 * 16 + 4 + FEATURES, condition), nn.SiLU(), nn.Linear(condition, condition), nn.SiLU()
        )
        self.enter = nn.Conv1d(2, channels, 3, padding=1)
        self.down1 = Block(channels, channels, condition)
        self.shrink1 = nn.Conv1d(channels, wide, 3, stride=2, padding=1)
        self.down2 = Block(wide, wide, condition)
        self.shrink2 = nn.Conv1d(wide, wide, 3, stride=2, padding=1)
        self.middle1, self.middle2 = Block(wide, wide, condition), Block(wide, wide, condition)
        self.grow2 = nn.ConvTranspose1d(wide, wide, 4, stride=2, padding=1)
        self.up2 = Block(2 * wide, wide, condition)
        self.grow1 = nn.ConvTranspose1d(wide, channels, 4, stride=2, padding=1)
        self.up1 = Block(2 * channels, channels, condition)
        self.leave = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv1d(channels, 2, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor, image: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        condition = self.condition(torch.cat([angles.cos(), angles.sin(), state, image], dim=1))
        fine = self.down1(self.enter(x.transpose(1, 2)), condition)
        coarse = self.down2(self.shrink1(fine), condition)
        hidden = self.middle2(self.middle1(self.shrink2(coarse), condition), condition)
        hidden = self.up2(torch.cat([self.grow2(hidden), coarse], dim=1), condition)
        hidden = self.up1(torch.cat([self.grow1(hidden), fine], dim=1), condition)
        actions: Tensor = self.leave(hidden)
        return actions.transpose(1, 2)
