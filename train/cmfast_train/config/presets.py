# SPDX-License-Identifier: MIT
"""Presets: configurations that work. `about` gives the cost of each and the result to expect."""

from __future__ import annotations

from cmfast_train.config.phase import Phase, phase
from cmfast_train.config.train_config import ARRAYS, TrainConfig


def _small(data: str, phases: tuple[Phase, ...]) -> TrainConfig:
    """Return what two cores train in up to two and a quarter hours, with a network that fits into 3 MB.

    Args:
        data: at 28x28 pixels.
        phases: of the run.

    * patch=2: after 221 seconds the denoising error of 2x2 pixels in 64 channels is 3 to 7 % below that of pixels in
      32 channels after 188 seconds, at sigma from 1 to 80, and up to 5 % above it at lower sigma
      (benchmarks/results/trials_mnist.json).
    * channels_last=False, precision="bf16": for a CPU with bfloat16. On a GPU, channels_last=true has fused norms.
    * sigmas: set on the trained model; `cmfast-eval --search` looks for the second of two.
    * The rest as of the digits: a short run learns little of 250 ln(sigma), and an average needs an end of low rates.
    """
    return TrainConfig(
        data=data,
        image_size=28,
        channels=1,
        patch=2,
        model_channels=64,
        res_blocks=1,
        channel_mult=(1, 1),
        attention=(),
        c_noise="trig",
        sigmas=((80.0,), (80.0, 0.6), (80.0, 1.0, 0.5, 0.25)),
        precision="bf16",
        channels_last=False,
        batch=96,
        phases=phases,
        checkpoint_images=60_000,
    )


def _large(data: str) -> TrainConfig:
    """Return a network for a GPU, for the same data."""
    return TrainConfig(
        data=data,
        image_size=32,
        channels=1,
        model_channels=64,
        channel_mult=(1, 2, 2),
        attention=(8,),
        batch=128,
        phases=(phase("edm", 2_000_000, lr=5e-4), phase("ect", 4_000_000, lr=2e-4)),
    )


PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        data="digits",
        image_size=8,
        channels=1,
        model_channels=32,
        res_blocks=1,
        channel_mult=(1, 2),
        attention=(),
        c_noise="trig",  # smooth: a short run learns little of 250 ln(sigma), which turns hundreds of times
        batch=48,
        phases=(  # beta2: better than RAdam's usual 0.999 in their 646 and 980 steps (methods_digits.json)
            phase("edm", 31_000, beta2=0.99, ema=0.998, lr_decay=0.5),
            phase("ict", 47_000, lr=5e-4, beta2=0.99, ema=0.998, lr_decay=0.5),
        ),
        checkpoint_images=20_000,
        log_images=5_000,
    ),
    "mnist": _small(
        "mnist",
        (
            phase("edm", 640_000, lr=1e-3, ema=0.999, lr_decay=0.5),
            phase("ect", 1_300_000, lr=5e-4, ema=0.999, lr_decay=0.5, stages=(1, 6)),
            phase("sid", 500_000, lr=1e-4, ema=0.998, lr_decay=0.5),
        ),
    ),
    "mnist-large": _large("mnist"),
    "fashion-mnist": _small(
        "fashion-mnist",
        (
            phase("edm", 640_000, lr=1e-3, ema=0.999, lr_decay=0.5),
            phase("ect", 600_000, lr=5e-4, ema=0.999, lr_decay=0.5, stages=(1, 6)),
            phase("sid", 300_000, lr=1e-4, ema=0.998, lr_decay=0.5),
        ),
    ),
    "fashion-mnist-large": _large("fashion-mnist"),
    "cifar10": TrainConfig(
        data="cifar10",
        image_size=32,
        channels=3,
        flip=True,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        attention=(16,),
        dropout=0.2,
        batch=128,
        phases=(phase("edm", 50_000_000, ema=0.9999), phase("ect", 25_600_000, ema=0.9999)),
    ),
    "folder": TrainConfig(
        data="folder",
        image_size=32,
        channels=3,
        flip=True,
        model_channels=64,
        channel_mult=(1, 2, 2),
        attention=(8,),
        batch=64,
        phases=(phase("edm", 2_000_000, lr=5e-4), phase("ect", 4_000_000, lr=2e-4)),
        workers=2,
    ),
    "flowers32": TrainConfig(
        data="folder",
        image_size=32,
        channels=3,
        flip=True,
        model_channels=64,
        channel_mult=(1, 2, 2),
        attention=(8,),
        dropout=0.2,
        batch=64,
        phases=(phase("edm", 2_000_000, lr=5e-4), phase("ect", 4_000_000, lr=2e-4)),
        workers=2,
    ),
    "imagenet9": TrainConfig(
        data="imagenet9",
        image_size=64,
        channels=3,
        flip=True,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        attention=(16, 8),
        dropout=0.1,
        batch=128,
        phases=(phase("edm", 50_000_000, lr=5e-4, ema=0.9999), phase("ect", 25_600_000, ema=0.9999)),
        workers=8,
    ),
    # Network, lr and ema of edm: OpenAI's consistency_models. Length of edm: EDM, Table 7. q: ECT's on ImageNet, where
    # 4 stages end at the gap of CIFAR-10's 8.
    "imagenet64": TrainConfig(
        data="imagenet64",
        image_size=64,
        channels=3,
        flip=True,
        model_channels=192,
        res_blocks=3,
        channel_mult=(1, 2, 3, 4),
        attention=(32, 16, 8),
        dropout=0.1,
        batch=2048,
        accumulation=32,  # 64 images at once on one GPU, 8 on each of eight
        phases=(
            phase("edm", 2_500_000_000, lr=1e-4, ema=0.999943),
            phase("ect", 102_400_000, q=4.0, stages=(0, 3), ema=0.9999),
        ),
        workers=8,
    ),
    # A custom network (--network), whose conventions are in --spec: a length to change, no recommendation.
    "arrays": TrainConfig(batch=128, phases=(phase("edm", 1_000_000, lr=5e-4), phase("ect", 1_000_000, lr=2e-4))),
}

# Data sets that samples are compared with. Of two presets of one data set, it has the name of the smaller one.
DATA_SETS = tuple(name for name in PRESETS if name != ARRAYS and not name.endswith("-large"))
