# SPDX-License-Identifier: MIT
"""Images out: a grid as one PNG, a folder of PNGs, or the .npz that FID evaluators read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cmfast.errors import CmfastError
from cmfast.files import atomic_file, atomic_folder, check_target, check_target_folder

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]


def save_images(path: str | os.PathLike[str], images: Pixels, labels: npt.NDArray[np.int64] | None = None) -> None:
    """Write uint8 images [N, H, W, C] where `path` says: NAME.png a grid, NAME.npz arrays, else a folder of PNGs.

    The .npz has arr_0 (the images) and, of a class-conditional model, arr_1 (the labels, int64 [N]).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        raise CmfastError(f"images must be uint8 [N, H, W, C] with N >= 1, got {images.dtype} {list(images.shape)}")
    suffix = check_output(path)
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


def check_output(path: str | os.PathLike[str]) -> str:
    """Return the suffix of `path` if `save_images` can write there, else raise CmfastError, before any work is done."""
    target = Path(path)
    if target.suffix not in (".png", ".npz", ""):
        raise CmfastError(
            f"{target}: images are written to NAME.png (a grid), NAME.npz, or a folder; got {target.suffix}"
        )
    if target.suffix:
        check_target(target)
    else:
        check_target_folder(target)
    return target.suffix


def grid_image(images: Pixels) -> Image:
    """Return uint8 images [N, H, W, C] as one picture, about as wide as high; small images are enlarged, unsmoothed."""
    n, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    scale = max(1, 48 // max(height, width)) if max(height, width) < 32 else 1
    gap = 2
    sheet = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels), 32, np.uint8
    )
    for i, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = (
            k * (size * scale + gap) + gap for k, size in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height * scale, left : left + width * scale] = image
    return _image(sheet)


def _image(pixels: Pixels) -> Image:
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
