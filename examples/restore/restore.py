# SPDX-License-Identifier: MIT
"""Enlarge the images of a folder with an exported model. Needs no PyTorch.

python restore.py runs/digits/restore.onnx runs/digits/low -o runs/digits/restored
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from images import Floats, Pixels, bicubic, png_files, read_images, to_floats, write_images

import cmfast


def restore(
    model: cmfast.Model, low: Pixels, *, steps: int = 1, heun: int = 0, samples: int = 1, seed: int = 0
) -> Pixels:
    """Return images at full resolution.

    Args:
        model: draws what bicubic interpolation misses.
        low: uint8 [N, h, w, C].
        steps: network calls per sample.
        heun: steps of Heun's method instead, 2 heun - 1 calls; for the teacher.
        samples: drawn for each image and averaged: the more, the nearer to the original and the smoother.
        seed: of the first sample; the next have the next seeds.

    Returns:
        uint8 [N, H, W, C].
    """
    factor, conditions = model.spec.shape[1] // low.shape[1], {"low": to_floats(low)}
    drawn = [
        model.sample_heun(len(low), steps=heun, seed=seed + i, conditions=conditions)
        if heun
        else model.sample(len(low), steps=steps, seed=seed + i, conditions=conditions)
        for i in range(samples)
    ]
    images = to_floats(bicubic(low, factor)) + np.mean(drawn, axis=0)
    images = keep_averages(images, conditions["low"], factor)
    return ((images.transpose(0, 2, 3, 1) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def keep_averages(images: Floats, low: Floats, factor: int) -> Floats:
    """Shift each block of pixels to the average that the low resolution has there: it is known."""
    n, channels, height, width = low.shape
    blocks = images.reshape(n, channels, height, factor, width, factor)
    missing = low - blocks.mean(axis=(3, 5))
    return (blocks + missing[:, :, :, None, :, None]).reshape(images.shape)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Enlarge the PNG files of a folder.")
    parser.add_argument("model", type=Path, help="restore.onnx, or teacher.onnx")
    parser.add_argument("low", type=Path, help="folder of images at low resolution")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the restored images, by the same name")
    parser.add_argument("--steps", type=int, default=1, help="network calls per sample, 1 or 2 (default: 1)")
    parser.add_argument("--heun", type=int, default=0, metavar="N", help="N steps of Heun's method, for the teacher")
    parser.add_argument("--samples", type=int, default=1, help="samples that are averaged (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = cmfast.load(arguments.model)
    files = png_files(arguments.low)
    restored = restore(
        model, read_images(files), steps=arguments.steps, heun=arguments.heun, samples=arguments.samples,
        seed=arguments.seed,
    )  # fmt: skip
    write_images(arguments.out, restored, [file.relative_to(arguments.low) for file in files])
    print(f"{len(restored)} images are in {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except cmfast.CmfastError as err:  # one line instead of a traceback
        sys.exit(str(err))
