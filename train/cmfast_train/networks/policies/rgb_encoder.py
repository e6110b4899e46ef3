# SPDX-License-Identifier: MIT
"""The encoder of cameras in Diffusion Policy and lerobot: a ResNet, a spatial softmax and a linear layer.

ResNet: arXiv:1512.03385, with two convolutions a block (18 and 34 layers), by torchvision's names. Spatial softmax:
arXiv:1509.06113: of each feature map the point where it is largest, in coordinates from -1 to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # layers of a ResNet: blocks of each of its four stages
WIDTHS = (64, 128, 256, 512)
PER_GROUP = 16  # channels of a group, where group norm replaces batch norm


class RgbEncoder(nn.Module):
    """Images [B, steps, cameras, C, H, W] as the policy normalises them -> features [B, steps, cameras * 2 keypoints].

    Args:
        channels: of an image.
        layers: of the ResNet, a key of BLOCKS.
        keypoints: points of a camera.
        crop: (height, width) that is cut from the middle; (): the whole image.
        group_norm: group norm instead of batch norm.
        encoders: one for all cameras, or one of each.
    """

    def __init__(
        self, *, channels: int, layers: int, keypoints: int, crop: tuple[int, ...], group_norm: bool, encoders: int
    ) -> None:
        super().__init__()
        self.crop = crop
        self.cameras = nn.ModuleList(Camera(channels, layers, keypoints, group_norm) for _ in range(encoders))

    def forward(self, images: Tensor) -> Tensor:
        if self.crop:
            height, width = self.crop
            top, left = (round((have - want) / 2) for have, want in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., top : top + height, left : left + width]
        each = [images[:, :, number] for number in range(images.shape[2])]
        encoders = list(self.cameras) * (len(each) if len(self.cameras) == 1 else 1)
        features = [encoder(x.flatten(0, 1)) for encoder, x in zip(encoders, each, strict=True)]
        return torch.cat([found.unflatten(0, (-1, images.shape[1])) for found in features], dim=-1)


class Camera(nn.Module):
    """One encoder: images [N, C, H, W] -> features [N, 2 keypoints]."""

    def __init__(self, channels: int, layers: int, keypoints: int, group_norm: bool) -> None:
        super().__init__()
        stages, width = [], WIDTHS[0]
        for number, (wider, blocks) in enumerate(zip(WIDTHS, BLOCKS[layers], strict=True)):
            stride = 2 if number else 1
            stage = [
                Block(width if n == 0 else wider, wider, stride if n == 0 else 1, group_norm) for n in range(blocks)
            ]
            stages.append(nn.Sequential(*stage))
            width = wider
        self.backbone = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], 7, 2, 3, bias=False),
            _norm(WIDTHS[0], group_norm),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            *stages,
        )
        self.pool = SpatialSoftmax(width, keypoints)
        self.out = nn.Linear(2 * keypoints, 2 * keypoints)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, 2 keypoints] of images [N, C, H, W]."""
        return F.relu(self.out(self.pool(self.backbone(x)).flatten(1)))


class Block(nn.Module):
    """Two convolutions around a short cut."""

    def __init__(self, c_in: int, c_out: int, stride: int, group_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = _norm(c_out, group_norm)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = _norm(c_out, group_norm)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), _norm(c_out, group_norm))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H', W'] of x [N, C_in, H, W]."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class FixedBatchNorm(nn.Module):
    """Batch norm by the statistics that the encoder was trained with, in training too."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [N, C, H, W] normalised."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class SpatialSoftmax(nn.Module):
    """Feature maps [N, C, H, W] -> where each of `keypoints` mixtures of them is largest, (x, y), [N, keypoints, 2]."""

    def __init__(self, channels: int, keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, keypoints, 2] of x [N, C, H, W]."""
        attention = self.nets(x).flatten(2).softmax(dim=-1)  # [N, K, H W]
        height, width = x.shape[-2:]
        down, across = (
            torch.linspace(-1, 1, side, dtype=torch.float64, device=x.device).to(x.dtype) for side in (height, width)
        )
        grid = torch.stack([across.repeat(height), down.repeat_interleave(width)], dim=1)  # [H W, 2]
        points: Tensor = attention @ grid
        return points


def _norm(channels: int, group_norm: bool) -> nn.Module:
    return nn.GroupNorm(channels // PER_GROUP, channels) if group_norm else FixedBatchNorm(channels)
