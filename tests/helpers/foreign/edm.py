# SPDX-License-Identifier: MIT
"""EDM's networks in small, and the weights and inputs that the golden values were computed with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmfast_train.networks.edm import DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from helpers import DATA

GOLDEN = DATA / "edm_golden.npz"
# Of the largest value. Sums of hundreds of float32 products in another order differ by half of it, a wrong eps by more.
GOLDEN_ERROR = 2e-6
NCSNPP: dict[str, Any] = {
    "noise_mult": 2, "embedding": "fourier", "encoder": "residual", "resample": (1, 3, 3, 1)
}  # fmt: skip


def song(**values: Any) -> SongConfig:
    small = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention": (8,)}
    return SongConfig(**{**small, **values})


def dhariwal(**values: Any) -> DhariwalConfig:
    small = {"image_size": 8, "model_channels": 64, "channel_mult": (1, 2), "res_blocks": 1, "attention": (8,)}
    return DhariwalConfig(**{**small, **values})


CASES: dict[str, SongConfig | DhariwalConfig] = {
    "ddpmpp": song(augment=9),
    "ddpmpp-cond": song(classes=10, attention=(8, 4), res_blocks=2),
    "ncsnpp": song(channel_mult=(1, 2, 2), attention=(4,), augment=9, **NCSNPP),
    "ncsnpp-cond": song(classes=5, emb_mult=2, **NCSNPP),
    "skip": song(channel_mult=(2, 1, 2), encoder="skip", decoder="skip", attention=()),
    "skip-smooth": song(encoder="skip", decoder="skip", embedding="fourier", resample=(1, 3, 3, 1)),
    "residual-box": song(encoder="residual", decoder="skip"),
    "adm": dhariwal(attention=(), augment=9, channel_mult=(2, 1)),
    "adm-cond": dhariwal(classes=10, attention=(8, 4), res_blocks=2),
}
PUBLISHED = [  # parameters, and SHA-256 over the lines "key shape" of EDM's own modules of these shapes, sorted
    ("cifar10-ddpmpp", SongConfig(image_size=32, augment=9), 425, 55_733_891,
     "df05676c38f28e6b4111f9897c7c5e829b60c2cf3f0a8272112db8e8b55d903e"),
    ("cifar10-cond-ddpmpp", SongConfig(image_size=32, augment=9, classes=10), 427, 55_735_299,
     "93d71cff364c7f68e109505c2da2bde3e9f421ea892147f14ecbdf5003bebe40"),
    ("cifar10-ncsnpp", SongConfig(image_size=32, augment=9, **NCSNPP), 432, 56_397_827,
     "d21880c99a3421745a9f6e52cf3499a24ba5b814bbb2e08626732d79d62565d5"),
    ("ffhq64-ddpmpp", SongConfig(image_size=64, augment=9, channel_mult=(1, 2, 2, 2)), 553, 61_805_571,
     "11bff956de62d7eae6549a39239d662546075bb98826affc50e61f0f24eae849"),
    ("imagenet64-adm", DhariwalConfig(image_size=64, classes=1000), 553, 295_899_267,
     "20e9b809b94291599fcaa3bfd2e2d481d2604ba61a9b3585d8ce2a15f5d6eae6"),
]  # fmt: skip


def golden_numbers(name: str, *shape: int) -> np.ndarray:
    """Return uniform float32 numbers of mean 0 and variance 1, a function of the name alone.

    Philox's raw 64-bit words are the same in every version of numpy, what is drawn from them is not.
    """
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((2 * (words >> np.uint64(11)) / 2**53 - 1) * 3**0.5).reshape(shape).astype(np.float32)


def golden_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of trained scale for the names and shapes of a state dict; filters stay as they are."""
    weights = {}
    for name, tensor in state.items():
        value = golden_numbers(name, *tensor.shape)
        if name.endswith("resample_filter"):
            value = tensor.numpy()
        elif name.endswith("freqs"):
            value = 4 * value
        elif tensor.ndim > 1:
            value = value * np.float32(math.prod(tensor.shape[1:]) ** -0.5)
        else:  # norms are around one, biases around zero
            value = np.float32(name.endswith("weight")) + np.float32(0.1) * value
        weights[name] = torch.from_numpy(value)
    return weights


def golden_inputs(config: SongConfig | DhariwalConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x [2, C, H, W], sigma [2] and label [2]. The network is fed x and ln(sigma) / 4, a model sigma x."""
    x = torch.from_numpy(golden_numbers("x", 2, config.channels, config.image_size, config.image_size))
    return x, torch.tensor([0.02, 3.0]), torch.tensor([1, config.classes - 1]) if config.classes else None


def new(config: SongConfig | DhariwalConfig) -> SongUnet | DhariwalUnet:
    network = SongUnet(config) if isinstance(config, SongConfig) else DhariwalUnet(config)
    return network.eval().requires_grad_(False)


def weights_of(name: str) -> dict[str, Tensor]:
    return golden_weights(new(CASES[name]).state_dict())


class Precond(nn.Module):
    """EDM's wrapper, in what its pickles show of it."""

    def __init__(self, model: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update({"sigma_data": 0.5, "sigma_min": 0, "sigma_max": float("inf"), **attributes})
        self.model = model
