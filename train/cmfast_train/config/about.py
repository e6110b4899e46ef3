# SPDX-License-Identifier: MIT
"""The cost of each preset and the result to expect, for cmfast-train --help, which starts without the presets."""

from __future__ import annotations

# What each costs and what to expect. A figure has a record in benchmarks/results.
ABOUT: dict[str, str] = {
    "digits": "0.8M parameters, built-in 8x8 digits; about 3 minutes on 2 CPU cores",
    "mnist": "7.7M parameters, 1x32x32; not run; a quarter of its length with other settings: docs/results.md",
    "fashion-mnist": "7.7M parameters, 1x32x32; not run",
    "cifar10": "43M parameters, 3x32x32; not run",
    "folder": "7.7M parameters, 3x32x32, any DIR/class/image.png; not run",
    "flowers32": "7.7M parameters, 3x32x32, 1500 photographs of 5 flowers as DIR/class/image.png; not run",
    "imagenet9": "44M parameters, 3x64x64, 9 classes of 42 synsets of ImageNet-1k; not run",
    "imagenet64": "296M parameters, 3x64x64, the 1000 classes of ImageNet-1k; for many GPUs; not run",
    "arrays": "a network and data of your own: --network, --spec, --data FILE.npz; 2 million samples",
}
