# SPDX-License-Identifier: MIT
"""The images of the example, in numpy and Pillow: originals, their low resolution, what is held out, PSNR.

Images are uint8 [N, H, W, C], C 1 or 3; networks take them as float32 [N, C, H, W] in [-1, 1].
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

HELD_OUT = 10  # every tenth image is not trained on


def load_images(data: Path | None) -> tuple[Pixels, Pixels]:
    """Return the images to train on and those held out.

    Args:
        data: a folder of PNG files of one size, also in folders below; a folder of MNIST's files, whose test images
            are held out, the first 1,000;
            None: the 1,797 digits of scikit-learn, 8x8.
    """
    if data is None:
        from sklearn.datasets import load_digits

        images = (load_digits().images * 255 / 16).round().astype(np.uint8)[..., None]
    elif (data / "train-images-idx3-ubyte.gz").exists():
        return _idx(data / "train-images-idx3-ubyte.gz"), _idx(data / "t10k-images-idx3-ubyte.gz")[:1000]
    else:
        images = read_images(png_files(data))
    held = np.arange(len(images)) % HELD_OUT == 0
    return images[~held], images[held]


def png_files(folder: Path) -> list[Path]:
    """Return the PNG files of a folder and of the folders below, in the order of their names."""
    files = sorted(folder.rglob("*.png"))
    if not files:
        raise SystemExit(f"{folder}: no PNG files")
    return files


def read_images(files: Sequence[Path]) -> Pixels:
    """Return PNG files of one size."""
    pixels = []
    for file in files:
        with Image.open(file) as image:
            pixels.append(np.asarray(image if image.mode == "L" else image.convert("RGB")))
        if pixels[-1].shape != pixels[0].shape:
            raise SystemExit(f"{file}: pixels {pixels[-1].shape}, and {files[0]} has {pixels[0].shape}; need one size")
    images = np.stack(pixels)
    return images if images.ndim == 4 else images[..., None]


def write_images(folder: Path, images: Pixels, names: Sequence[str | Path]) -> None:
    """Write images as PNG files."""
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / name)


def turned(images: Pixels) -> Pixels:
    """Return square images in all eight positions: turned by quarters, and mirrored."""
    return np.concatenate([np.rot90(each, k, (1, 2)) for each in (images, images[:, :, ::-1]) for k in range(4)])


def lower(images: Pixels, factor: int) -> Pixels:
    """Return the average of each block of factor x factor pixels, rounded: what a coarser sensor sees."""
    n, height, width, channels = images.shape
    if height % factor or width % factor:
        raise SystemExit(f"images of {width} x {height} do not divide into blocks of {factor} x {factor}; crop them")
    blocks = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def bicubic(low: Pixels, factor: int) -> Pixels:
    """Return images enlarged by bicubic interpolation."""
    size = (low.shape[2] * factor, low.shape[1] * factor)
    return np.stack([_plane(image, size) for image in low])


def to_floats(images: Pixels) -> Floats:
    """Return images as networks take them, float32 [N, C, H, W] in [-1, 1]."""
    return (images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32)


def psnr(images: Pixels, originals: Pixels) -> npt.NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each image, dB."""
    error = np.square(images.astype(np.float64) - originals).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


def _plane(image: Pixels, size: tuple[int, int]) -> Pixels:
    grey = image.shape[-1] == 1
    large = np.asarray(Image.fromarray(image[..., 0] if grey else image).resize(size, Image.Resampling.BICUBIC))
    return large[..., None] if grey else large


def _idx(file: Path) -> Pixels:
    """Return the images of an IDX file."""
    content = gzip.decompress(file.read_bytes())
    n, height, width = np.frombuffer(content, ">i4", 3, offset=4)
    return np.frombuffer(content, np.uint8, offset=16).reshape(n, height, width, 1)
