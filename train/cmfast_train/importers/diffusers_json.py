# SPDX-License-Identifier: MIT
"""The JSON files of diffusers' folders: every field is known, or switched off, or the file is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmfast.errors import ArtifactError
from cmfast_train.importers.diffusers_tensors import read_json
from cmfast_train.importers.facts import LARGEST, shown

MAX_CONFIG = 1 << 20  # bytes of a configuration; a real one has a few thousand


def read_config(file: Path, *kinds: str) -> dict[str, Any]:
    """Return a configuration file of one of these classes."""
    values = read_json(file, MAX_CONFIG)
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found not in kinds:
        are = "are" if len(kinds) > 1 else "is"
        raise ArtifactError(f"{file}: its _class_name is {json.dumps(found)[:200]}, and only {_and(kinds)} {are} read")
    return dict(values)


def read_fields(
    file: Path, kinds: Sequence[str], free: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Return all fields of a configuration; a missing one has the value that diffusers would give it.

    Args:
        file: the configuration.
        kinds: its class is one of these.
        free: fields of any value, with their defaults.
        choices: fields with the values that are supported, the default first.

    Raises:
        ArtifactError: it is of another class, or has a field that is not known and not switched off.
    """
    return checked_fields(read_config(file, *kinds), file, free, choices)


def checked_fields(
    said: Mapping[str, Any], file: Path, free: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Return all fields of a configuration that was read already; arguments and errors as of `read_fields`."""
    fields = {**free, **{name: allowed[0] for name, allowed in choices.items()}}
    for name, value in said.items():
        if name in fields:
            fields[name] = value
        elif value and not name.startswith("_"):
            raise refusal(file, name, value, "an option that this version of cmfast does not know")
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise refusal(file, name, fields[name], f"supported: {' or '.join(map(json.dumps, allowed))}")
    return fields


def refusal(file: Path, name: str, value: Any, need: str) -> ArtifactError:
    """Return the error for a field whose value is not supported."""
    return ArtifactError(f"{file}: {shown(name)} is {json.dumps(value)[:200]}; {need}")


def list_of(fields: Mapping[str, Any], name: str, file: Path) -> list[Any]:
    """Return a field that has an entry for every level."""
    value = fields[name]
    if not isinstance(value, list) or len(value) > 32:
        raise refusal(file, name, value, "supported: a list with an entry for every level")
    return value


def whole(fields: Mapping[str, Any], name: str, file: Path) -> int:
    """Return a field that is a positive whole number."""
    if not is_whole(fields[name]):
        raise refusal(file, name, fields[name], f"supported: a whole number from 1 to {LARGEST}")
    return int(fields[name])


def is_whole(value: Any) -> bool:
    """Whether a value is a positive whole number that a network could need."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def number(fields: Mapping[str, Any], name: str, file: Path) -> float:
    """Return a field that is a number."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        raise refusal(file, name, fields[name], "supported: a number")
    return float(fields[name])


def version_of(index: Mapping[str, Any]) -> str:
    """Return the version of diffusers that wrote a folder, "" if its index does not say."""
    return re.sub(r"[^\w.+-]", "", str(index.get("_diffusers_version", "")))[:40]


def _and(kinds: Sequence[str]) -> str:
    *most, last = kinds
    return f"{', '.join(most)} and {last}" if most else last
