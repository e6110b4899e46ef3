# SPDX-License-Identifier: MIT
"""Small runs of the training loop, what they write, and how two of them are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.training.trainer import train

# Steps of some ten milliseconds, a line of the log at each, a checkpoint every eight.
QUICK = [
    "batch=8", "flip=true", "checkpoint_images=64", "log_images=8", "grid=4", "tensorboard=false", "device=cpu",
]  # fmt: skip
TINY = ["channel_mult=1", "head_channels=32", *QUICK]


def arguments(out: Path, settings: list[str]) -> list[str]:
    last = {setting.partition("=")[0]: setting for setting in settings}  # the command takes each name once
    return ["digits", "--out", str(out), *(word for setting in last.values() for word in ("--set", setting))]


def run_here(out: Path, *settings: str) -> Path:
    base = QUICK if any(setting.startswith("init=") for setting in settings) else TINY  # --init brings its network
    return train(override(PRESETS["digits"], [*base, *settings]), out, None)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[dict[str, Any]]:
    """Return the lines of the log without what the clock decides."""
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in log_of(out) if "loss" in line]


def weights_of(model: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(model).weights)


def assert_equal_to_the_bit(one: Any, two: Any, where: str = "") -> None:
    assert type(one) is type(two), where
    if isinstance(one, Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal_to_the_bit(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal_to_the_bit(*pair, f"{where}/{i}")
    else:
        assert one == two, where


def assert_equal_weights(got: Any, want: Any) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].detach(), tensor), name


def save_images(folder: Path, images: Any) -> None:
    (folder / "class").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "class" / f"{i}.png")
