# SPDX-License-Identifier: MIT
"""Which networks F(x, c_noise, **conditions) a checkpoint can hold, and how each is built from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.config.checks import shown
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig, CloneofsimoUnet
from cmfast_train.networks.consistency_decoder import ConsistencyDecoderConfig, consistency_decoder, decoder_sizes
from cmfast_train.networks.count import adm_sizes, cloneofsimo_sizes, edm_sizes
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.networks.edm import DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.networks.policies.image_policy import ImagePolicyConfig, image_policy, image_policy_sizes
from cmfast_train.networks.precision import float32_weights
from cmfast_train.networks.unet1d import Unet1d, Unet1dConfig, unet1d_sizes
from cmfast_train.networks.unet2d import Unet2dConfig, unet2d, unet2d_sizes

# Each of ours has image_size, image_shape, channels and classes; networks are called with (x, c_noise), and label=,
# c_noise_next= where they have them.
OursConfig = (
    AdmConfig | CloneofsimoConfig | SongConfig | DhariwalConfig | Unet2dConfig | ConsistencyDecoderConfig | Unet1dConfig
)
NetworkConfig = OursConfig | OwnConfig
_TYPES: dict[str, tuple[type[Any], Callable[[Any], nn.Module]]] = {
    "adm": (AdmConfig, AdmUnet),
    "cloneofsimo": (CloneofsimoConfig, CloneofsimoUnet),
    "song": (SongConfig, SongUnet),
    "dhariwal": (DhariwalConfig, DhariwalUnet),
    "unet2d": (Unet2dConfig, unet2d),
    "consistency_decoder": (ConsistencyDecoderConfig, consistency_decoder),
    "unet1d": (Unet1dConfig, Unet1d),
    "image_policy": (ImagePolicyConfig, image_policy),
    "own": (OwnConfig, OwnConfig.build),
}
_FORMER = {"seed": "cloneofsimo"}  # names in files of "cmfast/1"
_SIZES: dict[str, Callable[[Mapping[str, Any]], Iterator[int]]] = {  # of every tensor
    "adm": adm_sizes,
    "cloneofsimo": cloneofsimo_sizes,
    "song": lambda fields: edm_sizes(fields, song=True),
    "dhariwal": lambda fields: edm_sizes(fields, song=False),
    "unet2d": unet2d_sizes,
    "consistency_decoder": decoder_sizes,
    "unet1d": unet1d_sizes,
    "image_policy": image_policy_sizes,
}


def build_network(config: NetworkConfig) -> nn.Module:
    """Return a new network of this shape, on the current default device, float32."""
    with float32_weights():
        return _TYPES[network_type(config)][1](config)


def check_weights(config: NetworkConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise CmfastError unless these are as many tensors and values as the network has: before it is built."""
    if isinstance(config, OwnConfig):
        return  # only its code knows
    have = [tensor.numel() for tensor in weights.values()]
    need = list(_SIZES[network_type(config)](vars(config)))
    if (len(have), sum(have)) != (len(need), sum(need)):
        raise CmfastError(
            f"the weights do not fit the network: they are {len(have):,} tensors of {sum(have):,} values, its "
            f"configuration needs {len(need):,} of {sum(need):,}"
        )


def network_type(config: NetworkConfig) -> str:
    """Return the name of a configuration's network in checkpoints, for example adm."""
    return next(name for name, (kind, _) in _TYPES.items() if type(config) is kind)


def network_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """Return {"type": ..., ...} of plain containers; `network_from_dict` reads it back."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.compare}
    return {"type": network_type(config), **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def network_from_dict(values: Mapping[str, Any]) -> NetworkConfig:
    """Read what `network_to_dict` wrote; CmfastError unless it is a network that can be built."""
    if not isinstance(values, Mapping):
        raise CmfastError(f"a network is described by names and values, got {shown(values)}")
    name = values.get("type")
    name = _FORMER.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in _TYPES:
        raise CmfastError(f"unknown network type {shown(name)}; this version knows {', '.join(_TYPES)}")
    kind = _TYPES[name][0]
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind) if field.compare}
    given = {key: value for key, value in values.items() if key != "type"}
    if unknown := [key for key in given if key not in fields]:
        raise CmfastError(f"the network {name} has no field {shown(unknown[0])}; is the file of a newer cmfast?")
    if missing := [key for key, needed in fields.items() if needed and key not in given]:
        raise CmfastError(f"the description of the network {name} lacks {missing[0]}")
    config: NetworkConfig = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
    return config
