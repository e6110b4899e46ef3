# SPDX-License-Identifier: MIT
"""Which shapes the networks can have. Apart from them, so that a configuration is checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.checks import shown
from cmfast_train.networks.count import check_blocks

GROUPS = 32  # of every GroupNorm
LARGEST_SIDE = 65536  # pixels
MOST_PIXELS = 2**28  # values of one image: 1 GB in float32

Size = int | tuple[int, int]  # of images, pixels: one number of square ones, else (height, width)


def sides(size: Size) -> tuple[int, int]:
    """Return the (height, width) of an image size."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: Any) -> Any:
    """Return (32, 32) as 32, the one form of a square's size; anything else as it is."""
    return size[0] if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1] else size


def size_text(size: Size) -> str:
    """Return a size as --set image_size takes it: 32, or 32x64, height first."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def check_image_size(size: Any) -> None:
    """Raise CmfastError unless this is the size of an image."""
    both = size if isinstance(size, tuple) else (size, size)
    if len(both) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in both):
        raise CmfastError(
            f"image_size must be a whole number from 1 to {LARGEST_SIDE} (pixels), or HEIGHTxWIDTH, got {shown(size)}"
        )


def check_image(channels: Any, size: Any) -> None:
    """Raise CmfastError unless an image of so many channels can have this size."""
    check_image_size(size)
    height, width = sides(size)
    if type(channels) is not int or channels < 1:
        raise CmfastError(f"channels must be a whole number from 1, got {shown(channels)}")
    if channels * height * width > MOST_PIXELS:
        raise CmfastError(
            f"image_size={size_text(size)} with channels={channels}: an image has at most {MOST_PIXELS:,} values"
        )


def check_network(fields: Mapping[str, Any]) -> None:
    """Raise CmfastError unless a network can be built with these fields of `networks.adm.AdmConfig`."""
    check_image(fields["channels"], fields["image_size"])
    names = ("model_channels", "res_blocks", "head_channels", *(("patch",) if "patch" in fields else ()))
    mult, attention = fields["channel_mult"], fields["attention"]
    for name, value in [*((n, fields[n]) for n in names), *(("channel_mult", m) for m in mult)]:
        if type(value) is not int or value < 1:
            raise CmfastError(f"{name} must be a whole number from 1, got {shown(value)}")
    if not mult:
        raise CmfastError("channel_mult must name at least one level, for example channel_mult=1,2,2")
    check_blocks(fields)
    size, width = fields["image_size"], fields["model_channels"]
    patch = fields.get("patch", 1)
    height = sides(size)[0] // patch
    heads = fields.get("heads", 0)
    if type(heads) is not int or heads < 0:
        raise CmfastError(f"heads must be a whole number from 0 (by head_channels), got {shown(heads)}")
    name = "heads" if heads else "head_channels"
    divisor = heads or fields["head_channels"]
    if any(side % (patch * 2 ** (len(mult) - 1)) for side in sides(size)):
        after = f" after squares of patch={patch} pixels" if patch > 1 else ""
        raise CmfastError(
            f"image_size={size_text(size)} cannot be halved {len(mult) - 1} times{after}, as "
            f"channel_mult={tuple(mult)} needs; it must be a multiple of {patch * 2 ** (len(mult) - 1)}"
        )
    if width % GROUPS:
        raise CmfastError(f"model_channels must be a multiple of {GROUPS}, got {width}")
    for level, factor in enumerate(mult):
        if height // 2**level in attention and factor * width % divisor:
            raise CmfastError(
                f"attention at {height // 2**level} px has {factor * width} channels, no multiple of {name}={divisor}"
            )
    if mult[-1] * width % divisor:  # the middle block always attends
        raise CmfastError(f"the middle block has {mult[-1] * width} channels, no multiple of {name}={divisor}")
    if not 0 <= fields["dropout"] < 1:
        raise CmfastError(f"dropout must be at least 0 and below 1, got {fields['dropout']}")


def check_cloneofsimo_network(fields: Mapping[str, Any]) -> None:
    """Raise CmfastError unless a network can be built with these fields of `networks.cloneofsimo.CloneofsimoConfig`."""
    size = fields["image_size"]
    check_image(fields["channels"], size)
    if type(fields["width"]) is not int or fields["width"] < 1:
        raise CmfastError(f"width must be a whole number from 1, got {shown(fields['width'])}")
    if any(side % 4 for side in sides(size)):
        raise CmfastError(
            f"image_size={size_text(size)} cannot be halved twice, which the first public implementation's "
            "network needs; it must be a multiple of 4"
        )
    if fields["width"] % GROUPS:
        raise CmfastError(f"width (in training: model_channels) must be a multiple of {GROUPS}, got {fields['width']}")
