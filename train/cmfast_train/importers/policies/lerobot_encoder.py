# SPDX-License-Identifier: MIT
"""The encoder of images in a lerobot policy, where `--set encoder=true` asks for it: its shape and its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.importers.diffusers_json import refusal, whole
from cmfast_train.importers.diffusers_tensors import Described
from cmfast_train.importers.facts import difference, shown
from cmfast_train.networks.policies.image_policy import ImagePolicyConfig, image_policy_tensors
from cmfast_train.networks.policies.rgb_encoder import BLOCKS
from cmfast_train.networks.unet1d import Unet1dConfig

ENCODER = "diffusion.rgb_encoder."  # of the names of tensors
OURS, UNET = "encoders.image_encoder.cameras.", "net.unet."
COMPUTED = ("num_batches_tracked", "pool.pos_grid")  # ends of names: what a forward pass does not need, or computes


def policy_of(unet: Unet1dConfig, fields: Mapping[str, Any], sizes: Mapping[str, Any], file: Path) -> ImagePolicyConfig:
    """Return the policy with the encoder of its images.

    Args:
        unet: its U-Net.
        fields: the configuration.
        sizes: shapes of the inputs by name.
        file: of the configuration, named in errors.

    Raises:
        ArtifactError: it has no images, or a field has a value that is not supported.
    """
    images = {name: shape for name, shape in sizes.items() if "image" in name}
    if not images:
        raise ArtifactError(f"{file}: --set encoder=true, and the policy has no images; leave it out")
    image = next(iter(images.values()))
    if any(shape != image for shape in images.values()) or len(image) != 3:
        raise ArtifactError(f"{file}: its images are {shown(str(images))}; supported: of one shape (C, H, W)")
    layers = {f"resnet{number}": number for number in BLOCKS}
    if (backbone := fields.get("vision_backbone")) not in layers:
        raise refusal(file, "vision_backbone", backbone, f"supported with encoder=true: {', '.join(layers)}")
    if (resize := fields.get("resize_shape")) is not None:
        raise refusal(file, "resize_shape", resize, "supported with encoder=true: null")
    states = {name: shape[0] for name, shape in sizes.items() if name not in images and shape}
    crop = fields.get("crop_shape")
    try:
        return ImagePolicyConfig(
            **dataclasses.asdict(unet),
            steps=whole(fields, "n_obs_steps", file),
            state=states.get("observation.state", 0),
            environment=states.get("observation.environment_state", 0),
            cameras=len(images),
            image=tuple(image),
            crop=tuple(crop) if isinstance(crop, list) else (),
            layers=layers[str(backbone)],
            keypoints=whole(fields, "spatial_softmax_num_keypoints", file),
            group_norm=bool(fields.get("use_group_norm")),
            shared=not fields.get("use_separate_rgb_encoder_per_camera"),
        )
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None


def names_of(config: ImagePolicyConfig, unet: Mapping[str, str], described: Described, file: Path) -> dict[str, str]:
    """Return {our tensor: its name in the file}.

    Args:
        config: the policy.
        unet: the same of its U-Net alone.
        described: what the file holds.
        file: named in errors.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape.
    """
    stored = {f"{UNET}{ours}": theirs for ours, theirs in unet.items()}
    for name in described:
        if name.startswith(ENCODER) and not name.endswith(COMPUTED):
            inner = name.removeprefix(ENCODER)
            stored[OURS + (f"0.{inner}" if config.shared else inner)] = name

    def theirs(name: str) -> str:
        return re.sub(f"^{re.escape(OURS)}", ENCODER, name)

    need = {theirs(name): tensor.shape for name, tensor in image_policy_tensors(config).items()}
    if wrong := difference(need, {theirs(name): described[each][0] for name, each in stored.items()}):
        raise ArtifactError(f"{file}: {wrong} by config.json")
    return stored


def with_encoder(tensors: Mapping[str, Tensor], stored: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors by our names, float32."""
    return {name: tensors[theirs].detach().to(torch.float32).contiguous() for name, theirs in stored.items()}
