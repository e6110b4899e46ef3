# SPDX-License-Identifier: MIT
"""The released ADM networks of openai/consistency_models."""

from __future__ import annotations

from cmfast_train.networks.adm import AdmConfig

IMAGENET64 = AdmConfig(
    image_size=64, classes=1000, model_channels=192, res_blocks=3, channel_mult=(1, 2, 3, 4), attention=(32, 16, 8)
)
LSUN256 = AdmConfig(
    image_size=256,
    model_channels=256,
    res_blocks=2,
    channel_mult=(1, 1, 2, 2, 4, 4),
    attention=(32, 16, 8),
    scale_shift=False,
)
