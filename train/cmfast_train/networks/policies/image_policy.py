# SPDX-License-Identifier: MIT
"""A policy that sees: the 1-D U-Net with the encoder of its cameras, as lerobot has it.

F(x, c_noise, image, state): of each of a few steps the state and what the encoder makes of the images, together the
encoded observation of `networks.unet1d`. A sampler graph evaluates the encoder once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.conditions import Condition
from cmfast.errors import CmfastError
from cmfast_train.config.checks import shown
from cmfast_train.networks.policies.rgb_encoder import BLOCKS, RgbEncoder
from cmfast_train.networks.unet1d import Unet1d, Unet1dConfig
from cmfast_train.wrapping import Encoded

IMAGE, STATE, ENVIRONMENT = "image", "state", "environment_state"  # conditions
LARGEST = 4096  # of everything in an observation


@dataclass(frozen=True, kw_only=True)
class ImagePolicyConfig(Unet1dConfig):
    """The shape of one policy: of its U-Net, and of its observations and their encoder."""

    steps: int  # of an observation
    state: int  # numbers of a state
    cameras: int = 1
    environment: int = 0  # numbers of the environment's state; 0: none
    image: tuple[int, ...] = (3, 96, 96)  # C, H, W of each camera
    crop: tuple[int, ...] = ()  # height and width that are cut from the middle; (): the whole image
    layers: int = 18  # of the ResNet
    keypoints: int = 32  # of the spatial softmax
    group_norm: bool = False  # in the ResNet, instead of batch norm
    shared: bool = False  # one encoder for all cameras, else one of each

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("steps", "state", "cameras", "keypoints")}
        sizes |= {f"image[{n}]": side for n, side in enumerate(self.image)}
        for name, value in sizes.items():
            if not 0 < value <= LARGEST:
                raise CmfastError(f"{name} must be a whole number from 1 to {LARGEST}, got {value}")
        if not 0 <= self.environment <= LARGEST or len(self.image) != 3 or len(self.crop) not in (0, 2):
            raise CmfastError(
                "need environment from 0, image (C, H, W) and crop (height, width) or (), got "
                f"{self.environment}, {shown(self.image)} and {shown(self.crop)}"
            )
        if any(not 0 < part <= whole for part, whole in zip(self.crop, self.image[1:], strict=False)):
            raise CmfastError(f"crop={self.crop} must lie inside the image {self.image[1:]}")
        if self.layers not in BLOCKS:
            raise CmfastError(f"layers must be {' or '.join(map(str, BLOCKS))}, got {self.layers}")
        if self.global_cond != (need := self.steps * self.numbers):
            raise CmfastError(f"global_cond is {self.global_cond}, and {self.steps} observations have {need} numbers")

    @property
    def numbers(self) -> int:
        """How many numbers one encoded observation has."""
        return self.state + 2 * self.cameras * self.keypoints + self.environment

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The observation, as the policy normalises it."""
        found = [
            Condition(name=IMAGE, shape=(self.steps, self.cameras, *self.image)),
            Condition(name=STATE, shape=(self.steps, self.state)),
        ]
        if self.environment:
            found.append(Condition(name=ENVIRONMENT, shape=(self.steps, self.environment)))
        return tuple(found)


class ImagePolicy(nn.Module):
    """F(x, c_noise, image, state): x [B, T, A]; image, the features of the images [B, steps, ..] -> [B, T, A]."""

    def __init__(self, config: ImagePolicyConfig) -> None:
        super().__init__()
        self.unet = Unet1d(config)

    def forward(
        self, x: Tensor, c_noise: Tensor, image: Tensor, state: Tensor, environment_state: Tensor | None = None
    ) -> Tensor:
        parts = [state, image, *([] if environment_state is None else [environment_state])]
        output: Tensor = self.unet(x, c_noise, torch.cat(parts, dim=-1).flatten(1))
        return output


def image_policy(config: ImagePolicyConfig) -> nn.Module:
    """Return a new policy F(x, c_noise, image, state), image [B, steps, cameras, C, H, W], state [B, steps, S]."""
    encoder = RgbEncoder(
        channels=config.image[0],
        layers=config.layers,
        keypoints=config.keypoints,
        crop=config.crop,
        group_norm=config.group_norm,
        encoders=1 if config.shared else config.cameras,
    )
    return Encoded(ImagePolicy(config), {IMAGE: encoder})


def image_policy_sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the size of every tensor of the policy with these fields of ImagePolicyConfig."""
    yield from (tensor.numel() for tensor in image_policy_tensors(ImagePolicyConfig(**fields)).values())


@functools.lru_cache(maxsize=1)
def image_policy_tensors(config: ImagePolicyConfig) -> Mapping[str, Tensor]:
    """Return the tensors of a policy without their values, by name."""
    with torch.device("meta"):
        return image_policy(config).state_dict()
