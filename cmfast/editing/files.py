# SPDX-License-Identifier: MIT
"""What is edited, and masks, from files: a PNG, a folder of PNGs, an array .npy or .npz; and one image as a PNG."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.errors import ArtifactError, CmfastError, one_line
from cmfast.files import atomic_file

Pixels = npt.NDArray[np.uint8]

ARRAYS = (".npy", ".npz")


def read_input(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Return what a file holds: uint8 [H, W, C] of a PNG, [N, H, W, C] of a folder of PNGs in the order of their names.

    Args:
        path: NAME.png, a folder, NAME.npy, or NAME.npz, whose first array arr_0 counts: what `cmfast-sample` writes.

    Raises:
        ArtifactError: it is none of these, or is damaged.
        CmfastError: a picture with transparency or 16 bits, or pictures of different sizes.
    """
    file = Path(path)
    if file.is_dir():
        names = sorted(each for each in file.iterdir() if each.suffix.lower() == ".png")
        if not names:
            raise ArtifactError(f"{file}: a folder without PNG files")
        images = [_png(name) for name in names]
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise CmfastError(
                    f"{name}: height, width and channels are {list(image.shape)}, of {names[0].name} "
                    f"{list(images[0].shape)}; pictures of a folder must be alike"
                )
        return np.stack(images)
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    if file.suffix.lower() == ".png":
        return _png(file)
    if file.suffix.lower() not in ARRAYS:
        raise ArtifactError(f"{file}: not read here; need NAME.png, a folder of them, NAME.npy or NAME.npz")
    try:
        with open(file, "rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return np.asarray(loaded["arr_0"] if file.suffix.lower() == ".npz" else loaded)
    except KeyError:
        raise ArtifactError(f"{file}: has no array named arr_0") from None
    except Exception as err:  # what numpy raises is not one kind
        raise ArtifactError(f"{file}: not an array of numpy: {one_line(err)}") from None


def read_mask(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Return a mask as `read_input` does; of pictures [H, W] or [N, H, W], and colours in them are refused."""
    found = read_input(path)
    if Path(path).suffix.lower() in ARRAYS:
        return found
    if not (found == found[..., :1]).all():
        raise CmfastError(f"{os.fspath(path)}: a mask is black and white, and this picture has colours")
    return found[..., 0]


def write_image(path: str | os.PathLike[str], image: Pixels) -> None:
    """Write one image uint8 [H, W, 1 or 3] as a PNG of its size."""
    from PIL import Image

    with atomic_file(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="PNG")


def _png(file: Path) -> Pixels:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=["PNG"]) as image:
                mode = image.mode
                if mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                    raise CmfastError(f"{file}: has transparent pixels; save it without an alpha channel")
                if mode not in ("1", "L", "P", "RGB"):
                    raise CmfastError(f"{file}: its mode is {mode}; save it with 8 bits a channel, grey or RGB")
                return np.atleast_3d(np.asarray(image.convert("L" if mode in ("1", "L") else "RGB")))
    except CmfastError:
        raise
    except Exception as err:  # damaged in many ways; a picture that is too large
        raise ArtifactError(f"{file}: not a readable PNG: {one_line(err)}") from None
