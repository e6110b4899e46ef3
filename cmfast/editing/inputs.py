# SPDX-License-Identifier: MIT
"""What a caller passes to be edited, as float32 [N, *shape] in data units: pixels or numbers, one sample or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import array_of_numbers, shown, whole_number
from cmfast.editing.constraints import Floats, luminance
from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec

MASKS = (0, 1, 255)  # values of a mask; 255 is the white of a picture


def samples(spec: ModelSpec, what: str, given: Any, *, inside: bool = True) -> Floats:
    """Return what was passed as samples, float32 [N, *shape].

    Args:
        spec: Of the model.
        what: A name for errors.
        given: Of images uint8 [H, W, C] or [N, H, W, C], or floats [C, H, W] or [N, C, H, W]; of other data numbers
            [*shape] or [N, *shape]. The channel of grey pixels may be left out.
        inside: Whether the floats of images must be in [-1, 1].

    Raises:
        CmfastError: another shape or type, or values outside.
    """
    array = _finite(what, given)
    if spec.data != "image":
        return _batch(what, array, [spec.shape], f"{_shape(spec.shape)} or [N, {_shape(spec.shape)[1:]}").astype(
            np.float32
        )
    channels, height, width = spec.image
    need = f"uint8 {_shape((height, width, channels))} or floats {_shape(spec.shape)}, or N of them"
    if array.dtype == np.uint8:
        layouts = [(height, width, channels), *([(height, width)] if channels == 1 else [])]
        return from_pixels(_batch(what, array, layouts, need).reshape(-1, *layouts[0]))
    return in_range(what, _batch(what, _floats(what, array), [spec.shape], need), inside)


def greys(spec: ModelSpec, given: Any) -> Floats:
    """Return grey images, float32 [N, 1, H, W], from pixels or floats with one channel, none or three.

    Raises:
        CmfastError: the model draws no colours, or the images do not fit it.
    """
    channels, height, width = spec.image
    if channels != 3:
        raise CmfastError(f"colorize needs a model of images with 3 channels; this one draws {channels}")
    array = _finite("grey", given)
    need = f"uint8 {_shape((height, width))} or floats [1, {height}, {width}], or N of them"
    if array.dtype == np.uint8:
        layouts: list[tuple[int, ...]] = [(height, width, 3), (height, width, 1), (height, width)]
        pixels = _batch("grey", array, layouts, need)
        found = from_pixels(pixels.reshape(len(pixels), height, width, -1))
    else:
        layouts = [(3, height, width), (1, height, width), (height, width)]
        values = _batch("grey", _floats("grey", array), layouts, need)
        found = in_range("grey", values.reshape(len(values), -1, height, width))
    return luminance(found) if found.shape[1] == 3 else found


def low_resolution(spec: ModelSpec, given: Any) -> tuple[Floats, tuple[int, ...]]:
    """Return averages, float32 [N, *sides], and how many values of a sample each axis of them stands for.

    Raises:
        CmfastError: the sides do not divide the sample's, or are the same.
    """
    array = _finite("low", given)
    image = spec.data == "image"
    pixels = image and array.dtype == np.uint8
    if pixels and spec.image[0] == 1 and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] != 1)):
        array = array[..., None]  # grey without its channel
    rank = len(spec.shape)
    if array.ndim not in (rank, rank + 1) or 0 in array.shape:
        raise CmfastError(f"low must be a smaller {_shape(spec.shape)}, or N of them, got {shown(array)}")
    array = array.reshape(-1, *array.shape[array.ndim - rank :])
    low = from_pixels(array) if pixels else np.asarray(_floats("low", array) if image else array, np.float32)
    low = in_range("low", low) if image else low
    sides = low.shape[1:]
    if any(size % side for size, side in zip(spec.shape, sides, strict=True)) or (image and sides[0] != spec.shape[0]):
        raise CmfastError(
            f"low has the shape {_shape(sides)} and the model draws {_shape(spec.shape)}; each side must divide the "
            f"model's{', and the channels must be the same' if image else ''}"
        )
    factors = tuple(size // side for size, side in zip(spec.shape, sides, strict=True))
    if set(factors) == {1}:
        raise CmfastError(f"low has the size of the model's samples, {_shape(spec.shape)}; pass a smaller one")
    return low, factors


def masks(spec: ModelSpec, given: Any, pixels: bool) -> npt.NDArray[np.bool_]:
    """Return masks, bool [N, *shape]: true where a value is known.

    Args:
        spec: Of the model.
        given: True or false, 1 or 0, 255 or 0. Of the shape of a sample, or 1 where it has an axis for all; of images
            also [H, W] or [N, H, W]; or N of them.
        pixels: Whether the channels of images come last, as in what it belongs to.

    Raises:
        CmfastError: another shape, or other values.
    """
    try:
        array = np.asarray(given)
    except Exception:  # ragged lists, tensors on a GPU
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or not np.isin(array, MASKS).all():
        some = f"; it has {_other(array)}" if array.dtype.kind in "biuf" else ""
        raise CmfastError(f"mask must be black and white: 0 or 1, true or false, 0 or 255; got {shown(given)}{some}")
    pixels = pixels and spec.data == "image"
    layout = (*spec.shape[1:], spec.shape[0]) if pixels else spec.shape
    if spec.data == "image":
        plain = layout[:2] if pixels else layout[1:]
        if array.shape[1:] == plain and _fits(array, layout) and len(array) > 1:
            raise CmfastError(
                f"mask {_shape(array.shape)} can be one a channel or one a sample; pass [1, {_shape(array.shape)[1:]} "
                f"or [{len(array)}, 1, {_shape(plain)[1:]}"
            )
        if array.shape == plain or (array.shape[1:] == plain and not _fits(array, layout)):
            array = array[..., None] if pixels else array[..., None, :, :]
    if _fits(array, layout):
        array = array[None]
    elif not (array.ndim and len(array) and _fits(array[0], layout)):
        also = f" or {_shape(plain)}" if spec.data == "image" else ""
        raise CmfastError(f"mask must be {_shape(layout)}{also}, or N of them, got {_shape(np.shape(given))}")
    known = np.broadcast_to(array != 0, (len(array), *layout))
    return known.transpose(0, 3, 1, 2) if pixels else known


def number(n: int | None, *given: tuple[str, int], first: str = "n") -> int:
    """Return how many samples: n, or as many as the inputs are, each (name, how many); one input serves all.

    Raises:
        CmfastError: they differ.
    """
    several = [(name, many) for name, many in given if many != 1]
    if n is not None:
        several = [(first, whole_number("number of samples", n, 1)), *several]
    if not several:
        return 1
    if differing := [each for each in several if each[1] != several[0][1]]:
        (one, many), (other, least) = several[0], differing[0]
        raise CmfastError(f"{one} is {many} and there are {least} of {other}; pass one for all or as many as samples")
    return several[0][1]


def from_pixels(pixels: npt.NDArray[Any]) -> Floats:
    """Return uint8 images [N, H, W, C] as float32 [N, C, H, W] in [-1, 1]."""
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(values)


def in_range(what: str, images: Floats, inside: bool = True) -> Floats:
    """Return images, if they are in [-1, 1]."""
    low, high = float(images.min()), float(images.max())
    if inside and not (low >= -1.00001 and high <= 1.00001):
        raise CmfastError(
            f"{what}: floats of images are in [-1, 1], got {low:g} to {high:g}; pass pixels as uint8, or x / 127.5 - 1"
        )
    return images


def _finite(what: str, given: Any) -> npt.NDArray[Any]:
    array = array_of_numbers(what, given)
    if not array.size or not np.isfinite(array).all():
        raise CmfastError(f"{what} must be finite numbers, got {shown(given)}")
    return array


def _floats(what: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind != "f":
        raise CmfastError(f"{what} must be uint8 pixels or floats in [-1, 1], got {array.dtype} {_shape(array.shape)}")
    return array.astype(np.float32)


def _batch(what: str, array: npt.NDArray[Any], layouts: Sequence[tuple[int, ...]], need: str) -> npt.NDArray[Any]:
    """Return an array with the shape of one of the layouts, or N of them, as N of them."""
    for layout in layouts:
        if array.shape == layout:
            return array[None]
        if array.shape[1:] == layout:
            return array
    raise CmfastError(f"{what} must be {need}, got {array.dtype} {_shape(array.shape)}")


def _fits(mask: npt.NDArray[Any], layout: Sequence[int]) -> bool:
    """Whether a mask has the shape of a sample, or 1 where it has an axis."""
    return mask.ndim == len(layout) and all(side in (1, size) for side, size in zip(mask.shape, layout, strict=True))


def _shape(sides: Sequence[int]) -> str:
    return f"[{', '.join(map(str, sides))}]"


def _other(array: npt.NDArray[Any]) -> str:
    return shown(array[~np.isin(array, MASKS)].flat[0].item())
