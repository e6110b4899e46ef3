# SPDX-License-Identifier: MIT
"""Before and after side by side: a picture with a row for each sample and a column for each array of images."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from cmfast.checks import array_of_numbers
from cmfast.errors import CmfastError
from cmfast.files import atomic_file
from cmfast.images import check_output, grid_image

Pixels = npt.NDArray[np.uint8]


def save_comparison(path: str | os.PathLike[str], *columns: npt.ArrayLike) -> None:
    """Write a PNG whose row i shows image i of each column, such as inputs, results, results of another seed.

    Args:
        path: NAME.png.
        columns: uint8 [N, H, W, C]; one image is shown in every row. Smaller images are enlarged by whole factors, and
            grey ones are shown beside colours.

    Raises:
        CmfastError: the columns do not go together, or the path is no PNG.
    """
    if check_output(path) != ".png":
        raise CmfastError(f"{os.fspath(path)}: a comparison is written to NAME.png")
    if not columns:
        raise CmfastError("a comparison needs images: uint8 [N, H, W, C], one array a column")
    arrays = [_images(each) for each in columns]
    n, height, width, channels = (max(each.shape[axis] for each in arrays) for axis in range(4))
    cells = np.stack([_fitted(each, (n, height, width, channels)) for each in arrays], axis=1)
    with atomic_file(path) as temporary:
        grid_image(cells.reshape(-1, height, width, channels), columns=len(arrays)).save(temporary, format="PNG")


def _images(column: npt.ArrayLike) -> Pixels:
    images = array_of_numbers("images", column)
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size or images.shape[-1] not in (1, 3):
        raise CmfastError(f"images must be uint8 [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    return images


def _fitted(images: Pixels, shape: tuple[int, int, int, int]) -> Pixels:
    n, height, width, _ = shape
    if len(images) not in (1, n) or height % images.shape[1] or width % images.shape[2]:
        raise CmfastError(
            f"the columns of a comparison do not go together: {list(images.shape)} beside {list(shape)}; need one "
            "image or as many, and sizes that divide the largest"
        )
    images = images.repeat(height // images.shape[1], axis=1).repeat(width // images.shape[2], axis=2)
    return np.broadcast_to(images, shape)
