# SPDX-License-Identifier: MIT
"""Which tensors of a file are the model: people save weights bare, wrapped, twice (with their average), in modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.importers.facts import Facts, shown
from cmfast_train.importers.pickles import Foreign, module_tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEPTH = 4  # levels of containers that are looked through
PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")  # of DistributedDataParallel, torch.compile, FSDP


def one_set(content: Any, facts: Facts, file: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the flat set of named tensors in what a file holds, and where it stood: of several the one that was told.

    Wrappers are looked through: {"model": ...}, {"state_dict": ...}, FastGen's {"model": {"net": ..., "ema": ...}},
    ECT's {"net": a whole module}.
    """
    sets = {name: tensors for name, tensors in _sets(content, file) if any(t.ndim > 1 for t in tensors.values())}
    if not sets:
        raise ArtifactError(f"{file}: a PyTorch file without named weights, so no model")
    told = facts.told.weights
    fitting = [name for name in sets if told in (name, name.rpartition(".")[2])] if told is not None else list(sets)
    if len(fitting) != 1:
        example = next((name for name in sets if "ema" in name), list(sets)[-1])
        names = ", ".join(shown(name) or "at the top" for name in list(sets)[:8])
        said = f"--set weights={told} is not one of them" if told else f"say which, for example --set weights={example}"
        raise CmfastError(f"{file}: it holds {len(sets)} set(s) of weights ({names}); {said}")
    (name,) = fitting
    if name:
        facts.usual("weights", name, "--set" if told else "the only set in the file")
    weights = {_unwrapped(key): tensor for key, tensor in sets[name].items()}
    if len(weights) < len(sets[name]):
        raise ArtifactError(f"{file}: the same weights stand in it with and without the prefix of a wrapped module")
    for key, tensor in weights.items():
        _check(key, tensor, file)
    return name, weights


def _sets(content: Any, file: Path, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every flat dictionary of tensors in nested containers, with the keys that lead to it joined by dots."""
    name = ".".join(path)
    if isinstance(content, Foreign) and isinstance(content.state, dict) and "_parameters" in content.state:
        yield name, module_tensors(content, file)
    if not isinstance(content, Mapping) or len(path) > DEPTH or any(part.startswith("optim") for part in path):
        return
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from _sets(value, file, (*path, key))


def _unwrapped(key: str) -> str:
    while any(key.startswith(prefix) for prefix in PREFIXES):
        key = key.partition(".")[2]
    for prefix in PREFIXES[1:]:  # these also stand inside
        key = key.replace(f".{prefix}", ".")
    return key


def _check(key: str, tensor: Tensor, file: Path) -> None:
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        what = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}".replace("torch.", "")
        raise ArtifactError(f"{file}: {shown(key)} is {what}; a model's weights are plain floating-point numbers")
