# SPDX-License-Identifier: MIT
"""Which tensors of a file are the model: people save weights bare, wrapped, twice (with their average), in modules.

Averages come as state dicts, as one state dict with the raw weights (`ema_model.`, `model_ema.`), and as lists in the
order of the module's parameters (`averages`). Where a file has raw and averaged weights, the user chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.importers.averages import (
    COUNTERS,
    OPTIMIZER,
    advised,
    average_in_optimizer,
    is_average,
    is_optimizer,
    named,
    of_undotted,
    parameters,
)  # fmt: skip
from cmfast_train.importers.facts import Facts, shown
from cmfast_train.importers.pickle_opcodes import Foreign
from cmfast_train.importers.pickles import module_tensors
from cmfast_train.safe_load import unusual

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEPTH = 4  # levels of containers that are looked through
MAX_SETS = 64
MAX_STATES = 32  # state dicts in one list: averages of several rates
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")  # DistributedDataParallel, torch.compile, FSDP
PREFIXES = frozenset({  # attributes that trainers (Lightning, lucidrains, latent diffusion) keep networks in
    "model", "net", "network", "denoiser", "unet", "diffusion_model", "student", "teacher", "target", "target_model",
    "online", "online_model", "ema", "ema_model", "ema_net", "net_ema", "model_ema", "averaged_model", "swa_model",
})  # fmt: skip
TOP = "top"  # what the user types for the set that stands at the top of the file

Weights = dict[str, Tensor]


def one_set(content: Any, facts: Facts, file: Path) -> tuple[str, Weights]:
    """Return the flat set of named tensors in what a file holds, and where it stood: of several sets the requested one.

    Wrappers are looked through: {"model": ...}, {"state_dict": ...}, FastGen's {"model": {"net": ..., "ema": ...}},
    ECT's {"net": a whole module}.
    """
    given = facts.given.weights
    budget = _Budget(file)
    sets: dict[str, Weights] = {}
    for place, tensors in _sets(content, file, budget):
        for name, part in _parts(place, tensors, file):
            if any(t.ndim > 1 for t in part.values()):
                _add(sets, name, part, given, file)
    sets = of_undotted(sets)
    raw = dict(sets)
    lengths = {len(parameters(weights)) for weights in raw.values()}
    unnamed: dict[str, int] = {}
    for name, listed in budget.lists:
        fits_in_length = len(listed) in lengths
        if given is not None and not _fits(name, given):
            continue
        if fits_in_length and (matched := named(listed, raw)) is not None:
            _add(sets, name, matched, given, file)
        elif fits_in_length or not raw or is_average(name):  # other lists of tensors are no model's weights
            unnamed[name] = len(listed)
    if not raw:
        if unnamed:
            name, count = next(iter(unnamed.items()))
            raise ArtifactError(
                f"{file}: {shown(name)} is a list of {count} tensors without their names; save the state dict: "
                "torch.save(model.state_dict(), FILE)"
            )
        raise ArtifactError(f"{file}: a PyTorch file without named weights, so no model")
    name = _chosen(sets, unnamed, average_in_optimizer(content), facts, file)
    weights = {_unwrapped(key): tensor for key, tensor in sets[name].items()}
    if len(weights) < len(sets[name]):
        raise ArtifactError(f"{file}: the same weights stand in it with and without the prefix of a wrapped module")
    for key, tensor in weights.items():
        _check(key, tensor, file)
    return name, weights


def _chosen(
    sets: Mapping[str, Weights], unnamed: Mapping[str, int], in_optimizer: str, facts: Facts, file: Path
) -> str:
    """Return the name of the set to read, the only one or the requested one; otherwise an error lists them."""
    given = facts.given.weights
    if given is None:
        fitting = list(sets) if not unnamed and not in_optimizer else []
    else:
        fitting = [name for name in sets if _fits(name, given)]
        fitting = [name for name in fitting if name == (given if given != TOP else "")] or fitting
    if len(fitting) == 1:
        (name,) = fitting
        if name:
            facts.usual("weights", name, "--set" if given else "the only set in the file")
        return name
    example = advised(sets)
    names = ", ".join(shown(name) or "at the top" for name in list(sets)[:8])
    said = (
        f"--set weights={shown(given)} is {'several' if fitting else 'not one'} of them"
        if given
        else f"choose one, for example --set weights={shown(example) or TOP}"
    )
    for name, count in list(unnamed.items())[:2]:
        said += (
            f" ({shown(name)} is a list of {count} tensors without names that fit none of these sets; "
            "it cannot be read)"
        )
    if in_optimizer:
        said += f" (the optimizer's state holds an average, {shown(in_optimizer)}, which is not read)"
    raise CmfastError(f"{file}: it holds {len(sets)} set(s) of weights ({names}); {said}")


def _fits(name: str, given: str) -> bool:
    """Whether a user who passed `given` can mean the set of this name: the end of a name is enough."""
    return not name if given == TOP else name == given or name.endswith(f".{given}")


def _add(sets: dict[str, Weights], name: str, part: Weights, given: str | None, file: Path) -> None:
    """Keep a set. Of those that were not requested, the first ones are enough: for names and for errors."""
    requested = given is not None and _fits(name, given)
    if len(sets) >= (2 * MAX_SETS if requested else MAX_SETS):
        if given is not None and not requested:
            return
        raise ArtifactError(
            f"{file}: it holds more than {MAX_SETS} sets of weights; choose one, for example "
            f"--set weights={shown(advised(sets)) or TOP}"
        )
    if name in sets:
        raise ArtifactError(f"{file}: two of its sets of weights are called {shown(name) or 'the same'}")
    sets[name] = part


class _Budget:
    """What may be looked at in one file. A few bytes can make one dictionary stand in a million places."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, 100_000 + file.stat().st_size
        self.lists: list[tuple[str, Sequence[Tensor]]] = []  # perhaps averages without names, by their place

    def spend(self, count: int) -> None:
        self.left -= count + 1
        if self.left < 0:
            raise ArtifactError(f"{self.file}: its containers refer to each other without end; refused")


def _sets(content: Any, file: Path, budget: _Budget, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Weights]]:
    """Yield every flat dictionary of tensors in nested containers, with the keys that lead to it joined by dots."""
    name = ".".join(path)
    if isinstance(content, Foreign) and "_parameters" in content.state:
        tensors = module_tensors(content, file)
        budget.spend(len(tensors))
        yield name, tensors
    if len(path) > DEPTH or any(part.startswith(OPTIMIZER) for part in path):
        return
    if isinstance(content, (list, tuple)):
        yield from _in_list(content, file, budget, path)
    if not isinstance(content, Mapping) or is_optimizer(content):
        return
    budget.spend(len(content))
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        for key, value in content.items():
            if isinstance(key, str) and (kind := unusual(value)):
                raise ArtifactError(f"{file}: {shown(key)} is {kind}; a model's weights are plain tensors with values")
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, (Mapping, list, tuple, Foreign)):
            yield from _sets(value, file, budget, (*path, key[:200]))


def _in_list(
    content: list[Any] | tuple[Any, ...], file: Path, budget: _Budget, path: tuple[str, ...]
) -> Iterator[tuple[str, Weights]]:
    """Keep a list of tensors for `averages.named`, and look into a short list of state dicts."""
    budget.spend(len(content))
    if all(isinstance(item, Tensor) for item in content):
        if any(item.ndim > 1 for item in content):
            budget.lists.append((".".join(path), content))
    elif len(content) <= MAX_STATES:
        for number, item in enumerate(content):
            yield from _sets(item, file, budget, (*path, str(number)))


def _parts(name: str, tensors: Weights, file: Path, depth: int = 0) -> Iterator[tuple[str, Weights]]:
    """Divide a state dict by the attributes of a trainer that hold networks: online_model. and ema_model. are two."""
    groups: dict[str, Weights] = {}
    for key, tensor in tensors.items():
        plain = _unwrapped(key)
        first, _, rest = plain.partition(".")
        last = plain.rpartition(".")[2]
        if last in COUNTERS and tensor.numel() == 1 and tensor.ndim <= 1:
            continue
        group, inner = (first, rest) if first in PREFIXES and rest else ("", plain)
        part = groups.setdefault(group, {})
        if inner in part:
            raise ArtifactError(f"{file}: the same weights stand in it with and without the prefix of a wrapped module")
        part[inner] = tensor
    if len(groups) == 1 or (len(groups) == 2 and set(groups) == {"", "model"} and _is_edm(groups["model"])):
        (group,) = [group for group in groups if group] or [""]
        if not group or (group == "model" and _is_edm(groups[group])) or depth >= DEPTH:
            # EDM's preconditioner has "model." itself, and tensors beside it that say what it is.
            yield name, {k: v for g, part in groups.items() for k, v in _with(g, part).items()}
        else:
            yield from _parts(name, groups[group], file, depth + 1)
        return
    for group, part in groups.items():
        inner_name = ".".join(filter(None, (name, group)))
        if depth >= DEPTH or not group:
            yield inner_name, part
        else:
            yield from _parts(inner_name, part, file, depth + 1)


def _with(group: str, part: Weights) -> Weights:
    return {f"{group}.{key}": tensor for key, tensor in part.items()} if group else part


def _is_edm(part: Weights) -> bool:
    return "map_layer0.weight" in part


def _unwrapped(key: str) -> str:
    while any(key.startswith(prefix) for prefix in WRAPPERS):
        key = key.partition(".")[2]
    for prefix in WRAPPERS[1:]:  # these also stand inside
        key = key.replace(f".{prefix}", ".")
    return key


def _check(key: str, tensor: Tensor, file: Path) -> None:
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        what = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}".replace("torch.", "")
        raise ArtifactError(f"{file}: {shown(key)} is {what}; a model's weights are plain floating-point numbers")
