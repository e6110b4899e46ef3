# SPDX-License-Identifier: MIT
"""Samples out: images as one PNG, a folder of PNGs, or the .npz that FID evaluators read; other data as arrays.

Which of them is said by the suffix, in upper or lower case. Names that end in another known type of file are refused;
everything else is a folder, `run_0.8` too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import array_of_numbers, shown
from cmfast.errors import CmfastError
from cmfast.files import atomic_file, atomic_folder, check_target, check_target_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from cmfast.spec import ModelSpec

Pixels = npt.NDArray[np.uint8]

CHANNELS = (1, 3, 4)  # of a PNG: grey, RGB, RGBA
GAP = 2  # pixels between the images of a grid
MAX_GRID_PIXELS = 178_956_970  # larger pictures are not opened by Pillow, which takes them for an attack
OTHER_FILES = {  # types of files that are not written here, so that a slip does not become a folder
    ".jpg", ".jpeg", ".jxl", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".ppm", ".pgm", ".svg",
    ".pdf", ".mp4", ".avi", ".webm", ".npy", ".mat", ".h5", ".hdf5", ".pt", ".pth", ".ckpt", ".bin", ".pkl",
    ".pickle", ".safetensors", ".onnx", ".data", ".engine", ".plan", ".trt", ".xml", ".tflite", ".json", ".jsonl",
    ".yaml", ".yml", ".toml", ".csv", ".parquet", ".txt", ".md", ".log", ".html", ".py", ".zip", ".tar", ".gz",
    ".tgz", ".xz", ".bz2", ".7z",
}  # fmt: skip


def save_images(path: str | os.PathLike[str], images: Pixels, labels: npt.NDArray[np.int64] | None = None) -> None:
    """Write images where `path` says: NAME.png a grid, NAME.npz arrays, else a folder of PNGs.

    Args:
        path: the file or the folder; it has its name only when it is complete.
        images: uint8 [N, H, W, C], C 1 or 3.
        labels: their classes, int64 [N]; the .npz has them as arr_1, beside arr_0, the images.

    Raises:
        CmfastError: an array has another type or shape, or `path` cannot be written.
    """
    images = array_of_numbers("images", images)
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise CmfastError(f"images must be uint8 [N, H, W, C] with N >= 1, got {images.dtype} {list(images.shape)}")
    if labels is not None:
        labels = array_of_numbers("labels", labels)
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise CmfastError(
                f"labels must be {len(images)} whole numbers, one an image, got {labels.dtype} {list(labels.shape)}"
            )
    suffix = check_output(path)
    n, height, width, channels = images.shape
    check_images(path, n, (channels, height, width))
    if suffix == ".png":
        with atomic_file(path) as temporary:
            grid_image(images).save(temporary, format="PNG")
    elif suffix == ".npz":
        arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    else:
        width = max(6, len(str(len(images) - 1)))
        with atomic_folder(path) as folder:
            for i, image in enumerate(images):
                _image(image).save(folder / f"{i:0{width}d}.png", format="PNG")


def save_samples(
    path: str | os.PathLike[str], samples: npt.NDArray[Any], labels: npt.NDArray[np.int64] | None = None
) -> None:
    """Write what `Model.sample` returned: images as `save_images` does, float32 arrays to NAME.npz or NAME.npy.

    Args:
        path: Where to. The .npz has arr_0 (the samples) and, of a model with a label, arr_1 (the labels, int64 [N]).
        samples: uint8 [N, H, W, C] or float32 [N, *shape].
        labels: int64 [N], or None.

    Raises:
        CmfastError: the path is of a kind that does not hold them.
    """
    if samples.dtype == np.uint8:
        save_images(path, samples, labels)
        return
    suffix = check_output(path, arrays=True)
    _need_arrays(path, suffix)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        if suffix == ".npy":
            np.save(file, samples)
        elif labels is None:
            np.savez(file, arr_0=samples)
        else:
            np.savez(file, arr_0=samples, arr_1=labels)


def check_output(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, arrays: bool = False
) -> str:
    """Return what is written to `path`, .png, .npz or "" for a folder, or raise CmfastError if it cannot.

    Args:
        inputs: what the same command reads; none of it is replaced
        arrays: .npy is written too, of data that are no images
    """
    suffix = _suffix(path, arrays)
    if suffix:
        check_target(path, inputs=inputs)
    else:
        check_target_folder(path, inputs=inputs)
    return suffix


def check_fits(path: str | os.PathLike[str], n: int, spec: ModelSpec) -> None:
    """Raise CmfastError unless n samples of a model can be written to `path`: before they are drawn."""
    if spec.data == "image":
        check_output(path)
        check_images(path, n, spec.image)
    else:
        _need_arrays(path, _suffix(path, arrays=True))


def check_images(path: str | os.PathLike[str], n: int, image: Sequence[int]) -> None:
    """Raise CmfastError unless n images [C, H, W] can be written to `path`: before they are drawn."""
    suffix, (channels, height, width) = _suffix(path), image
    if suffix == ".npz":
        return
    if channels not in CHANNELS:
        have = ", ".join(map(str, CHANNELS[:-1]))
        raise CmfastError(
            f"a PNG has {have} or {CHANNELS[-1]} channels and these images have {channels}; "
            f"write arrays: {Path(path).with_suffix('.npz')}"
        )
    if suffix == ".png":
        columns, scale = _columns(n), _scale(height, width)
        wide, high = columns * (width * scale + GAP) + GAP, -(-n // columns) * (height * scale + GAP) + GAP
        if wide * high > MAX_GRID_PIXELS:
            raise CmfastError(
                f"a grid of {shown(n)} images has {shown(wide)} x {shown(high)} pixels, and at most "
                f"{MAX_GRID_PIXELS:,} are written, because programs refuse to open more; write arrays, "
                f"{Path(path).with_suffix('.npz')}, or a folder"
            )


def grid_image(images: Pixels, *, columns: int = 0) -> Image:
    """Return uint8 images [N, H, W, C] as one picture; small images are enlarged, unsmoothed.

    Args:
        images: uint8 [N, H, W, C].
        columns: images in a row; 0: about as many as rows.
    """
    n, height, width, channels = images.shape
    columns, scale, gap = columns or _columns(n), _scale(height, width), GAP
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels), 32, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (
            k * (size * scale + gap) + gap for k, size in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, axis=0).repeat(
            scale, axis=1
        )
    return _image(sheet)


def _need_arrays(path: str | os.PathLike[str], suffix: str) -> None:
    if suffix not in (".npz", ".npy"):
        raise CmfastError(
            f"{shown(os.fspath(path))[1:-1]}: these samples are not images; write arrays: -o NAME.npz or NAME.npy"
        )


def _suffix(path: str | os.PathLike[str], arrays: bool = False) -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or isinstance(os.fspath(path), bytes):
        raise CmfastError(f"images are written to NAME.png (a grid), NAME.npz, or a folder; got {shown(path)}")
    target = Path(path)
    if arrays and target.suffix.lower() == ".npy":
        return ".npy"
    suffix = target.suffix.lower() or (target.name.lower() if target.name.lower() in (".png", ".npz") else "")
    if suffix in OTHER_FILES or target.name.lower() == suffix != "" or "\0" in target.name:
        name = shown(os.fspath(path))[1:-1]
        raise CmfastError(f"{name}: images are written to NAME.png (a grid), NAME.npz, or a folder; got {suffix}")
    return suffix if suffix in (".png", ".npz") else ""


def _columns(n: int) -> int:
    return math.isqrt(n - 1) + 1


def _scale(height: int, width: int) -> int:
    return max(1, 48 // max(height, width)) if max(height, width) < 32 else 1


def _image(pixels: Pixels) -> Image:
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
