# SPDX-License-Identifier: MIT
"""Changes a `TrainConfig` and its phases by the NAME=VALUE texts of a command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.custom_network import OF_OWN
from cmfast_train.config.phase import Phase, phase, types_of
from cmfast_train.config.readers import READERS, Reader, cut, read
from cmfast_train.config.train_config import LIMITS, OF_THE_MODEL, OWN, TrainConfig
from cmfast_train.methods.method import ROWS, find, names


def check_set_once(assignments: Iterable[str]) -> None:
    """Raise CmfastError if two NAME=VALUE strings set the same field: one of them would have no effect."""
    seen: dict[str, str] = {}
    for text in assignments:
        name = text.partition("=")[0]
        if name in seen:
            raise CmfastError(f"--set {cut(text)}: {name} is already set by {cut(seen[name])}; remove one of the two")
        seen[name] = text


def override(config: TrainConfig, assignments: Iterable[str]) -> TrainConfig:
    """Return `config` changed by NAME=VALUE strings; METHOD.NAME=VALUE changes every phase of that method.

    Lists are written with commas (channel_mult=1,2,2), the default noise levels with colons between the lists
    (sigmas=80:80,0.8), phases as METHOD:IMAGES (phases=edm:50000,ect:100000). pd/4:IMAGES is progressive distillation
    to 4 steps, pd:IMAGES to 8, 4, 2 and 1, one phase each.

    Raises:
        CmfastError: a text names no field or cannot be read, or the result is not a valid configuration.
    """
    changes: dict[str, Any] = {}
    texts_of: dict[str, list[str]] = {}  # by method
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise CmfastError(f"--set {text}: expected NAME=VALUE")
        if name == "class_names":
            raise CmfastError(
                f"--set {text}: the names of the classes are given by the data (their folders); remove it"
            )
        method, dot, _ = name.partition(".")
        if dot:
            texts_of.setdefault(method, []).append(text)
        else:
            changes[name] = parse_field(text, TrainConfig, name, value)
    if "phases" in changes and not config.own:  # other methods have other conventions, unless some were set
        usual = dict(zip(("scaling", "c_noise"), config.conventions(), strict=True))
        changes = {name: "auto" for name, value in usual.items() if getattr(config, name) == value} | changes
    # All at once: values that are only right together, such as sigma_max and sigmas, are checked together.
    phases = changes.get("phases", config.phases)
    have = [phase.method for phase in phases]
    for method, texts in texts_of.items():
        if method not in have:
            raise CmfastError(f"--set {texts[0]}: this run has no phase {method!r}; its phases: {', '.join(have)}")
    if changes.get("init", config.init) and (given := sorted(changes.keys() & OF_THE_MODEL)):
        raise CmfastError(f"--set {given[0]}: already set by the model of --init; remove it")
    if changes.get("network", config.network) == OWN and (given := sorted(changes.keys() & OF_OWN)):
        raise CmfastError(f"--set {given[0]}: a network of your own has its conventions, --spec; remove it")
    of_phases = {method: _settings(method, texts) for method, texts in texts_of.items()}
    changes["phases"] = tuple(phase.changed(of_phases.get(phase.method, {})) for phase in phases)
    return dataclasses.replace(config, **changes)


def lost_settings(preset: TrainConfig, assignments: Iterable[str], config: TrainConfig) -> list[str]:
    """Return the settings of the preset's phases that a new list of phases does not have, as METHOD.NAME.

    A phase that --set phases= names has its method's defaults, also where the preset has others for that method.

    Args:
        preset: what the command line changes.
        assignments: how.
        config: what came of it.
    """
    given = {text.partition("=")[0] for text in assignments}
    if "phases" not in given:
        return []
    tuned = {each.name: each for each in preset.phases}
    lost = []
    for new in {each.name: each for each in config.phases}.values():
        if (old := tuned.get(new.name)) is None:
            continue
        usual, theirs, ours = phase(new.method, new.images).values(), old.values(), new.values()
        names = (name for name in ours if name != "images" and theirs[name] != ours[name] == usual[name])
        lost += [f"{new.method}.{name}" for name in names]
    return [name for name in lost if name not in given]


def parse_field(text: str, owner: type, name: str, value: str) -> Any:
    """Return the value of one field of a dataclass from its text.

    Args:
        text: the whole NAME=VALUE, which the error quotes.
        owner: the dataclass.
        name: of the field.
        value: the part after the equals sign.

    Raises:
        CmfastError: there is no such field, or the text does not convert to its type.
    """
    kinds = typing.get_type_hints(owner)
    if name not in kinds:
        here = ""
        if owner is TrainConfig and any(name in types_of(method) for method in names()):
            here = f" of the run, but of its phases: --set METHOD.{cut(text)}"
        raise CmfastError(f"--set {cut(text)}: no such field{here}; there are {', '.join(sorted(kinds))}")
    return read(text, kinds[name], value, READERS | {tuple[Phase, ...]: PHASES})


def setting_text(value: Any) -> str:
    """Return the value of a field as --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings(method: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return the values that METHOD.NAME=VALUE texts set, by name."""
    kinds, values = types_of(method), {}
    for text in texts:
        name, _, value = text.partition(".")[2].partition("=")
        if name not in kinds:
            raise CmfastError(f"--set {cut(text)}: {method} has no such field; there are {', '.join(sorted(kinds))}")
        values[name] = read(text, kinds[name], value, READERS)
    return values


def _phases(value: str) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    if value.count(",") >= LIMITS["phases"]:
        raise CmfastError(f"--set phases: there are {value.count(',') + 1:,}, more than {LIMITS['phases']}")
    for part in value.split(","):
        title, colon, images = part.partition(":")
        method, slash, number = title.partition("/")
        if not colon:
            raise ValueError(part)
        if method not in ROWS and method not in names():  # which looks at all installed packages
            raise CmfastError(f"--set phases: no method {cut(method)!r}; there are {', '.join(names())}")
        row = find(method)
        if slash and not row.numbered:
            raise ValueError(part)
        series = (int(number),) if slash else row.series
        if not series:
            phases.append(phase(method, int(images)))
        phases += [phase(method, int(images) // len(series), **{row.numbered: n}) for n in series]
    return tuple(phases)


PHASES = Reader(read=_phases, example="METHOD:IMAGES, such as edm:50000,ect:100000")
