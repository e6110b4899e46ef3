# SPDX-License-Identifier: MIT
"""A custom model on the command line: a factory that is imported, a JSON file of conventions, weights.

    cmfast-export weights.pt --network package.module:factory --spec spec.json

The user's code runs because the user named it; weights are still read without running anything in them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from cmfast.errors import ArtifactError, CmfastError, one_line, shown
from cmfast.formats.manifest import check_file
from cmfast.formats.values import object_of
from cmfast_train.border import naming
from cmfast_train.checkpoint import Checkpoint, checkpoint_of, is_cmfast_checkpoint, read_tensors
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.importers.facts import Facts, Given
from cmfast_train.importers.sets import one_set
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.training.initial_model import Own
from cmfast_train.wrapping import wrap

LARGEST = 2**20  # bytes of a file of conventions


def own_model(
    network: str,
    spec: str | os.PathLike[str] | None,
    weights: str | os.PathLike[str] | None,
    given: Given | None = None,
    *,
    teacher: bool = False,
) -> Denoiser:
    """Return the denoiser around what a factory makes.

    Args:
        network: package.module:factory; called without arguments, it returns a `torch.nn.Module`, or a `Denoiser`. The
            current folder is searched too.
        spec: JSON object with the keyword arguments of `cmfast_train.wrap`, such as {"shape": [16, 7], "conditions":
            {"state": [14]}, "scaling": "edm", "c_noise": "ln/4"}; None: the factory returns a `Denoiser`, or `weights`
            is a checkpoint of cmfast, which has its conventions.
        weights: file with the network's state dict, .pt or .safetensors, or a checkpoint of cmfast; None: as the
            factory made them.
        given: which set of weights of several in the file.
        teacher: it is the teacher of what `spec` describes: the conventions of a checkpoint count, not an error.

    Raises:
        CmfastError: there is no such factory, the conventions are not whole, or the weights do not fit.
    """
    made = _made(network)
    if not isinstance(made, (nn.Module, Denoiser)):
        raise CmfastError(f"--network {network} must return a torch.nn.Module, got {shown(made)}")
    if weights is None:
        return _denoiser(made, network, spec)
    file = check_file(weights)
    with naming(file):
        content = read_tensors(file)
        if is_cmfast_checkpoint(content):
            checkpoint = checkpoint_of(content, file)
            if spec is not None and not teacher:
                raise CmfastError(f"{file}: a cmfast checkpoint, which has its conventions: leave --spec out")
            if teacher and not isinstance(checkpoint.network, OwnConfig):
                return checkpoint.denoiser()  # a teacher may have another network, here one of cmfast's
            return _fitting(checkpoint, made, file, network)
        denoiser = _denoiser(made, network, spec)
        module = made.network if isinstance(made, Denoiser) else made
        whole = isinstance(content, dict) and content.keys() == module.state_dict().keys()
        tensors = content if whole else one_set(content, Facts(given or Given()), file)[1]
        try:
            module.load_state_dict(dict(tensors), strict=True)
        except (RuntimeError, TypeError, ValueError) as err:
            raise ArtifactError(f"{file}: the weights do not fit {network}: {one_line(err, 300)}") from None
    return denoiser


def own_run(config: TrainConfig, network: str, spec: Path | None) -> Own:
    """Return what a run of `cmfast-train --network` starts from; new weights are those of the run's seed.

    Args:
        config: of the run, with the files of --init and --teacher.
        network: package.module:factory.
        spec: JSON file of conventions.

    Raises:
        CmfastError: as of `own_model`.
    """
    torch.manual_seed(config.seed)
    denoiser = own_model(network, spec, config.init or None)
    if config.init:  # a checkpoint's model is frozen; what the factory freezes stays so
        made = _made(network)
        module = made.network if isinstance(made, Denoiser) else made
        for weight, as_made in zip(denoiser.network.parameters(), module.parameters(), strict=True):
            weight.requires_grad_(as_made.requires_grad)
    teacher = own_model(network, spec, config.teacher, teacher=True) if config.teacher else None
    return Own(denoiser=denoiser, teacher=teacher, factory=network)


def _denoiser(made: nn.Module | Denoiser, network: str, spec: str | os.PathLike[str] | None) -> Denoiser:
    """Return what a factory made with its conventions."""
    if isinstance(made, Denoiser):
        if spec is not None:
            raise CmfastError(f"--network {network} returns a Denoiser, which has its conventions: leave --spec out")
        return made
    if spec is None:
        raise CmfastError(f"--network {network} returns a plain module: pass its conventions, --spec spec.json")
    return wrap(made, **_conventions(Path(spec)))


def _fitting(checkpoint: Checkpoint, made: nn.Module | Denoiser, file: Path, network: str) -> Denoiser:
    """Return the model of a checkpoint, whose network a factory made."""
    if not isinstance(checkpoint.network, OwnConfig):
        raise CmfastError(f"{file}: its network is one of cmfast's, which is in the file: leave --network out")
    try:
        return checkpoint.denoiser(made)
    except ArtifactError as err:
        raise ArtifactError(f"{file}: {network}: {err}") from None


def _made(place: str) -> Any:
    """Import and call a factory."""
    module, colon, name = place.partition(":")
    if not colon or not name:
        raise CmfastError(f"--network {shown(place)}: need package.module:factory")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` has it; a console script does not
    try:
        try:
            factory = resolve_name(place)
        except (Exception, SystemExit) as err:  # of the user's code
            raise CmfastError(f"--network {place}: {module} cannot be imported: {_raised(err)}") from err
        if isinstance(factory, nn.Module):
            return factory
        if not callable(factory):
            raise CmfastError(f"--network {place}: {name} is {shown(factory)}, which cannot be called")
        try:
            return factory()
        except (Exception, SystemExit) as err:
            raise CmfastError(f"--network {place}: {name}() failed: {_raised(err)}") from err
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _raised(err: BaseException) -> str:
    """Return what the user's code raised and where, on one line."""
    if isinstance(err, (CmfastError, ImportError)):
        return one_line(err, 200)
    frames = traceback.extract_tb(err.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(err).__name__}: {one_line(err, 200)}{place}"


def _conventions(file: Path) -> Mapping[str, Any]:
    """Return the arguments of `wrap` in a JSON file."""
    check_file(file)
    with naming(file):
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig")[:LARGEST], object_pairs_hook=object_of)
        except (ValueError, RecursionError) as err:
            raise ArtifactError(f"{file}: not a JSON file: {one_line(err, 200)}") from None
        names = [name for name in signature(wrap).parameters if name not in ("net", "encoders")]
        if not isinstance(values, dict):
            raise ArtifactError(f"{file}: need a JSON object with {', '.join(names)}")
        if unknown := [name for name in values if name not in names]:
            raise ArtifactError(f"{file}: unknown {shown(unknown[0])}; there are {', '.join(names)}")
        if missing := {"shape", "scaling", "c_noise"} - values.keys():
            raise ArtifactError(f"{file}: {', '.join(sorted(missing))} is missing")
        if isinstance(values.get("sigmas"), dict):
            values["sigmas"] = {int(k) if str(k).isdecimal() else k: v for k, v in values["sigmas"].items()}
        return values
