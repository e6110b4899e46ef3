# SPDX-License-Identifier: MIT
"""Which networks F(x, c_noise, label) a checkpoint can hold, and how each is built from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from cmfast.errors import CmfastError
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from cmfast_train.networks.edm import DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.networks.seed import SeedConfig, SeedUnet

# Every configuration has image_size, image_shape, channels and classes; networks are called with (x, c_noise, label).
NetworkConfig = AdmConfig | SeedConfig | SongConfig | DhariwalConfig
_TYPES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "adm": (AdmConfig, AdmUnet),
    "seed": (SeedConfig, SeedUnet),
    "song": (SongConfig, SongUnet),
    "dhariwal": (DhariwalConfig, DhariwalUnet),
}


def build_network(config: NetworkConfig) -> nn.Module:
    """Return a new network of this shape, on the current default device."""
    return _TYPES[network_type(config)][1](config)


def network_type(config: NetworkConfig) -> str:
    """Return the name of a configuration's network in checkpoints, for example adm."""
    return next(name for name, (kind, _) in _TYPES.items() if type(config) is kind)


def network_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """Return {"type": ..., ...} of plain containers; `network_from_dict` reads it back."""
    values = dataclasses.asdict(config)
    return {"type": network_type(config), **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def network_from_dict(values: Mapping[str, Any]) -> NetworkConfig:
    """Read what `network_to_dict` wrote."""
    values = dict(values)
    if (name := values.pop("type", None)) not in _TYPES:
        raise CmfastError(f"unknown network type {name!r}; this version knows {', '.join(_TYPES)}")
    kind = _TYPES[name][0]
    config: NetworkConfig = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return config
