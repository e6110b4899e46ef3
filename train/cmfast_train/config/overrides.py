# SPDX-License-Identifier: MIT
"""NAME=VALUE texts of a command line, read as the fields of a `TrainConfig` and its phases."""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from collections.abc import Iterable
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.phase import METHODS, PD_STEPS, PHASE_DEFAULTS, Phase
from cmfast_train.config.train_config import LIMITS, OF_THE_MODEL, TrainConfig
from cmfast_train.networks.shape import Size, plain_size


def said_once(assignments: Iterable[str]) -> None:
    """Raise CmfastError if two NAME=VALUE strings are for the same field: one of them would count for nothing."""
    seen: dict[str, str] = {}
    for text in assignments:
        name = text.partition("=")[0]
        if name in seen:
            raise CmfastError(f"--set {_cut(text)}: {name} is already set by {_cut(seen[name])}; remove one of the two")
        seen[name] = text


def override(config: TrainConfig, assignments: Iterable[str]) -> TrainConfig:
    """Return `config` changed by NAME=VALUE strings; METHOD.NAME=VALUE changes every phase of that method.

    Lists are written with commas (channel_mult=1,2,2), the default noise levels with colons between the lists
    (sigmas=80:80,0.8), phases as METHOD:IMAGES (phases=edm:50000,ect:100000). pd/4:IMAGES is progressive distillation
    to 4 steps, pd:IMAGES to 8, 4, 2 and 1, one phase each.
    """
    changes: dict[str, Any] = {}
    of_phases: dict[str, dict[str, Any]] = {}
    said_of: dict[str, str] = {}  # a method and the first text about it
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise CmfastError(f"--set {text}: expected NAME=VALUE")
        if name == "class_names":
            raise CmfastError(
                f"--set {text}: the names of the classes are given by the data (their folders); remove it"
            )
        method, dot, field = name.partition(".")
        if dot:
            said_of.setdefault(method, text)
            of_phases.setdefault(method, {})[field] = parse_field(text, Phase, field, value)
        else:
            changes[name] = parse_field(text, TrainConfig, name, value)
    if "phases" in changes:  # other methods have other conventions, unless some were said
        usual = dict(zip(("scaling", "c_noise"), config.conventions(), strict=True))
        changes = {name: "auto" for name, value in usual.items() if getattr(config, name) == value} | changes
    # All at once: values that are only right together, such as sigma_max and sigmas, are checked together.
    phases = changes.get("phases", config.phases)
    have = [phase.method for phase in phases]
    for method, text in said_of.items():
        if method not in have:
            raise CmfastError(f"--set {text}: this run has no phase {method!r}; its phases: {', '.join(have)}")
    if changes.get("init", config.init) and (said := sorted(changes.keys() & OF_THE_MODEL)):
        raise CmfastError(f"--set {said[0]}: already set by the model of --init; leave it out")
    changes["phases"] = tuple(dataclasses.replace(phase, **of_phases.get(phase.method, {})) for phase in phases)
    return dataclasses.replace(config, **changes)


def parse_field(text: str, owner: type, name: str, value: str) -> Any:
    """Return `value` as the type of the field `name` of a dataclass; `text` is what the error quotes."""
    kinds = typing.get_type_hints(owner)
    if name not in kinds:
        phases = owner is TrainConfig and name in typing.get_type_hints(Phase)
        here = f" of the run, but of its phases: --set METHOD.{_cut(text)}" if phases else ""
        raise CmfastError(f"--set {_cut(text)}: no such field{here}; there are {', '.join(sorted(kinds))}")
    kind = kinds[name]
    if type(None) in typing.get_args(kind):  # "int | None": what is written is an int
        kind = functools.reduce(operator.or_, (k for k in typing.get_args(kind) if k is not type(None)))
    try:
        return _READERS[str(kind) if typing.get_origin(kind) else kind.__name__](value)
    except (ValueError, KeyError):
        readable = str(kind) if typing.get_origin(kind) else kind.__name__
        example = f" ({_EXAMPLES[readable]})" if readable in _EXAMPLES else ""
        raise CmfastError(f"--set {_cut(text)}: {_cut(value)!r} does not convert to {readable}{example}") from None


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bool(value: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]


def _size(value: str) -> Size:
    height, x, width = value.lower().partition("x")
    return plain_size((int(height), int(width))) if x else int(value.replace("_", ""))


def _floats(value: str) -> tuple[float, ...]:
    return tuple(float(v) for v in value.split(","))


def _ints(value: str) -> tuple[int, ...]:
    return tuple(int(v) for v in value.split(",")) if value else ()


def _phases(value: str) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    if value.count(",") >= LIMITS["phases"]:
        raise CmfastError(f"--set phases: there are {value.count(',') + 1:,}, more than {LIMITS['phases']}")
    for part in value.split(","):
        name, colon, images = part.partition(":")
        method, slash, steps = name.partition("/")
        if colon and method not in METHODS:
            raise CmfastError(f"--set phases: no method {_cut(method)!r}; there are {', '.join(METHODS)}")
        if not colon or (slash and method != "pd"):
            raise ValueError(part)
        values = {"method": method, "images": int(images), **PHASE_DEFAULTS[method]}
        if method != "pd":
            phases.append(Phase(**values))
        elif slash:
            phases.append(Phase(**values | {"steps": int(steps)}))
        else:
            each = values["images"] // len(PD_STEPS)
            phases += [Phase(**values | {"steps": n, "images": each}) for n in PD_STEPS]
    return tuple(phases)


_EXAMPLES = {  # what each reader reads
    "int": "a whole number, such as 1000",
    "float": "a number, such as 0.5 or 1e-4",
    "bool": "true or false",
    "int | tuple[int, int]": "pixels of square images, such as 32, or HEIGHTxWIDTH, such as 32x64",
    "tuple[int, ...]": "whole numbers with commas between, such as 1,2,2",
    "tuple[int, int]": "two whole numbers, such as 0,7",
    "tuple[float, ...]": "numbers with commas between, such as 0.99,0.999",
    "tuple[tuple[float, ...], ...]": "lists with colons between, such as 80:80,0.8",
    "tuple[cmfast_train.config.phase.Phase, ...]": "METHOD:IMAGES, such as edm:50000,ect:100000",
}

_READERS: dict[str, Any] = {
    "int": lambda value: int(value.replace("_", "")),
    "float": float,
    "int | tuple[int, int]": _size,
    "str": str,
    "bool": _bool,
    "tuple[int, ...]": _ints,
    "tuple[int, int]": _ints,
    "tuple[float, ...]": _floats,
    "tuple[tuple[float, ...], ...]": lambda value: tuple(_floats(part) for part in value.split(":")),
    "tuple[cmfast_train.config.phase.Phase, ...]": _phases,
}
