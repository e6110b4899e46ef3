# SPDX-License-Identifier: MIT
"""The cost of each preset and the result to expect, for cmfast-train --help, which starts without the presets."""

from __future__ import annotations

# What was trained as it stands. A figure has a record in benchmarks/results.
RECORDED: dict[str, str] = {
    "digits": "0.8M parameters, built-in 8x8 digits; one to three minutes on 2 CPU cores",
    "mnist": "1.4M parameters, 1x28x28; about 130 minutes on 2 CPU cores",
    "fashion-mnist": "1.4M parameters, 1x28x28; about 95 minutes, mostly on one CPU core",
}
# For data that cmfast does not know: settings to begin with.
YOURS: dict[str, str] = {
    "folder": "7.7M parameters, 3x32x32, any DIR/class/image.png; a length to change",
    "arrays": "a network and data of your own: --network, --spec, --data FILE.npz; 2 million samples",
}
# Published recipes, and the recorded ones with other data or other networks.
NOT_RUN: dict[str, str] = {
    "mnist-large": "7.7M parameters, 1x32x32; a quarter of its length with other settings: docs/results.md",
    "fashion-mnist-large": "7.7M parameters, 1x32x32",
    "cifar10": "43M parameters, 3x32x32",
    "flowers32": "7.7M parameters, 3x32x32, 1500 photographs of 5 flowers as DIR/class/image.png",
    "imagenet9": "44M parameters, 3x64x64, 9 classes of 42 synsets of ImageNet-1k",
    "imagenet64": "296M parameters, 3x64x64, the 1000 classes of ImageNet-1k; for many GPUs",
}
ABOUT: dict[str, str] = {**RECORDED, **YOURS, **NOT_RUN}
