# SPDX-License-Identifier: MIT
"""The configuration of a run whose network, and with it the conventions, is the user's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.config.checks import shown
from cmfast_train.config.train_config import ARRAYS, OF_THE_MODEL, OWN, TrainConfig

# Fields that such a network sets.
OF_OWN = OF_THE_MODEL - {"network"} | {"sigma_max", "scaling", "c_noise", "sigmas", "dropout", "class_names"}
_USUAL: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def with_own_network(config: TrainConfig) -> TrainConfig:
    """Return a configuration with a custom network instead of the one that it describes."""
    usual = {name: _USUAL[name] for name in OF_OWN}
    return dataclasses.replace(config, **{**usual, "network": OWN})


def of_denoiser(config: TrainConfig, spec: ModelSpec) -> TrainConfig:
    """Return the configuration of a run with a custom denoiser, with its conventions.

    Raises:
        CmfastError: the configuration says otherwise, or a method's noise levels do not fit.
    """
    sigmas = tuple(spec.sigmas[steps] for steps in sorted(spec.sigmas))
    values: dict[str, Any] = {name: getattr(spec, name) for name in ("sigma_min", "sigma_max", "sigma_data")}
    values |= {"scaling": spec.scaling, "c_noise": spec.c_noise, "sigmas": sigmas}
    for name in sorted(OF_OWN):
        here = getattr(config, name)
        if here not in (_USUAL[name], values.get(name, _USUAL[name])):
            raise CmfastError(f"{name}={shown(here)}: the denoiser has its own conventions and sizes; leave it out")
    if config.data != ARRAYS:
        values["conditional"] = bool(spec.classes)
    return dataclasses.replace(config, **{**values, "network": OWN})
