# SPDX-License-Identifier: MIT
"""Compare restored images with the originals and with bicubic interpolation: PSNR, and a picture.

python compare.py runs/digits/low runs/digits/original runs/digits/restored -o compare.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from images import Pixels, bicubic, png_files, psnr, read_images
from PIL import Image

SHOWN = 8  # columns of the picture
SIDE = 64  # pixels of a cell


def sharpness(images: Pixels) -> float:
    """Return the mean difference of neighbouring pixels."""
    values = images.astype(np.float64)
    return float(np.abs(np.diff(values, axis=1)).mean() + np.abs(np.diff(values, axis=2)).mean())


def picture(rows: list[Pixels]) -> Image.Image:
    """Return rows of images as one picture, every pixel a square: the first SHOWN of each."""
    cells = []
    for images in rows:
        scale = SIDE // images.shape[1]
        enlarged = images[:SHOWN].repeat(scale, axis=1).repeat(scale, axis=2)
        cells.append(np.pad(enlarged, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255))
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in cells])
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Compare restored images with the originals and with bicubic.")
    parser.add_argument("low", type=Path, help="folder of images at low resolution")
    parser.add_argument("original", type=Path, help="folder of the originals")
    parser.add_argument("restored", type=Path, nargs="+", help="folders of restored images")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture: low, bicubic, restored, original")
    arguments = parser.parse_args()
    low, original = (read_images(png_files(folder)) for folder in (arguments.low, arguments.original))
    by_name = {"bicubic": bicubic(low, original.shape[1] // low.shape[1])}
    by_name |= {str(folder): read_images(png_files(folder)) for folder in arguments.restored}
    base = psnr(by_name["bicubic"], original).mean()
    for name, images in by_name.items():
        found = psnr(images, original).mean()
        sharp = sharpness(images) / sharpness(original)
        print(f"{name}: {found:.2f} dB, {found - base:+.2f} against bicubic; sharpness {sharp:.2f} of the original")
    picture([low, *by_name.values(), original]).save(arguments.out)


if __name__ == "__main__":
    main()
