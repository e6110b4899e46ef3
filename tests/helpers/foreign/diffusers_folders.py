# SPDX-License-Identifier: MIT
"""Folders of diffusers' pipelines, and the images that they and we draw from one noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast import sampling
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import diffusers as importer
from cmfast_train.importers.facts import Draft, Facts, Given
from helpers.specs import named

FULL: dict[str, dict[str, Any]] = {  # unet/config.json of the hub's folders, where it is not the default
    "imagenet64": {
        "sample_size": 64,
        "layers_per_block": 3,
        "block_out_channels": [192, 384, 576, 768],
        "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "num_class_embeds": 1000,
        "attention_head_dim": 64,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "lsun256": {
        "sample_size": 256,
        "layers_per_block": 2,
        "block_out_channels": [256, 256, 512, 512, 1024, 1024],
        "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3],
        "attention_head_dim": 64,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}


def draft(folder: Path, **given: Any) -> Draft:
    return importer.draft(folder, Facts(Given(**given)))


def imported(folder: Path) -> Checkpoint:
    return draft(folder).checkpoint(str(folder))


def with_pipeline(pipeline: Any, n: int, label: Tensor | None, seed: int = 1, **arguments: Any) -> Tensor:
    """Return n images in [-1, 1] from diffusers; the first noise is given, the others come from its generator."""
    pipeline.set_progress_bar_config(disable=True)
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, channels, size, size, generator=generator)
    images = pipeline(n, class_labels=label, latents=first, generator=generator, output_type="pt", **arguments).images
    return 2 * images - 1


def with_denoiser(
    checkpoint: Checkpoint, n: int, label: Tensor | None, sigmas: tuple[float, ...], seed: int = 1
) -> Tensor:
    """Return the images that our loop makes from the same noise."""
    denoiser, generator = checkpoint.denoiser(), torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(n, *checkpoint.spec.image, generator=generator) for _ in sigmas])
    with torch.inference_mode():
        return sampling.sample(
            lambda x, s: denoiser(x, torch.full((n,), s), **named(label)), noise, sigmas, checkpoint.spec
        )


def labels(checkpoint: Checkpoint, n: int) -> Tensor | None:
    return torch.arange(n) % checkpoint.spec.classes if checkpoint.spec.classes else None


def assert_same_images(ours: Tensor, theirs: Tensor, atol: float) -> None:
    inside = (theirs.abs() < 0.99).float().mean()
    assert inside > 0.5, "where both are clipped, any two models agree"
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=atol)
