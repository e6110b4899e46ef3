# SPDX-License-Identifier: MIT
"""Which shapes the networks can have. Apart from them, so that a configuration is checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmfast.errors import CmfastError

GROUPS = 32  # of every GroupNorm


def check_network(fields: Mapping[str, Any]) -> None:
    """Raise CmfastError unless a network can be built with these fields of `networks.adm.AdmConfig`."""
    names = ("image_size", "channels", "model_channels", "res_blocks", "head_channels")
    mult, attention = fields["channel_mult"], fields["attention"]
    for name, value in [*((n, fields[n]) for n in names), *(("channel_mult", m) for m in mult)]:
        if not isinstance(value, int) or value < 1:
            raise CmfastError(f"{name} must be a whole number from 1, got {value!r}")
    if not mult:
        raise CmfastError("channel_mult must name at least one level, for example channel_mult=1,2,2")
    side, width = fields["image_size"], fields["model_channels"]
    heads = fields.get("heads", 0)
    if not isinstance(heads, int) or heads < 0:
        raise CmfastError(f"heads must be a whole number from 0 (by head_channels), got {heads!r}")
    name = "heads" if heads else "head_channels"
    divisor = heads or fields["head_channels"]
    if side % 2 ** (len(mult) - 1):
        raise CmfastError(
            f"image_size={side} cannot be halved {len(mult) - 1} times, which channel_mult={tuple(mult)} needs; "
            f"it must be a multiple of {2 ** (len(mult) - 1)}"
        )
    if width % GROUPS:
        raise CmfastError(f"model_channels must be a multiple of {GROUPS}, got {width}")
    for level, factor in enumerate(mult):
        if side // 2**level in attention and factor * width % divisor:
            raise CmfastError(
                f"attention at {side // 2**level} px has {factor * width} channels, no multiple of {name}={divisor}"
            )
    if mult[-1] * width % divisor:  # the middle block always attends
        raise CmfastError(f"the middle block has {mult[-1] * width} channels, no multiple of {name}={divisor}")
    if not 0 <= fields["dropout"] < 1:
        raise CmfastError(f"dropout must be at least 0 and below 1, got {fields['dropout']}")


def check_seed_network(fields: Mapping[str, Any]) -> None:
    """Raise CmfastError unless a network can be built with these fields of `networks.seed.SeedConfig`."""
    for name in ("image_size", "channels", "width"):
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise CmfastError(f"{name} must be a whole number from 1, got {fields[name]!r}")
    if fields["image_size"] % 4:
        raise CmfastError(
            f"image_size={fields['image_size']} cannot be halved twice, which the first public implementation's "
            "network needs; it must be a multiple of 4"
        )
    if fields["width"] % GROUPS:
        raise CmfastError(f"width (in training: model_channels) must be a multiple of {GROUPS}, got {fields['width']}")
