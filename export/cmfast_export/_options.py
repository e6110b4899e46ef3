# SPDX-License-Identifier: MIT
"""NAME=VALUE of the command line into a dataclass of options, by the types of its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from cmfast.errors import CmfastError

Options = TypeVar("Options")


def parse_options(kind: type[Options], flag: str, assignments: Sequence[str]) -> Options:
    """Return `kind` with the fields that NAME=VALUE texts set; `flag` is named in errors."""
    types = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in types:
            raise CmfastError(f"{flag} {text}: expected NAME=VALUE, NAME one of {', '.join(types)}")
        if name in values:
            raise CmfastError(f"{flag} {text}: {name} was said twice")
        try:
            values[name] = CONVERT[types[name]](value.strip())
        except (ValueError, KeyError):
            kind = {"bool": " (true or false)", "int": " (a whole number)"}.get(types[name], "")
            raise CmfastError(f"{flag} {text}: {value!r} is no value for {name}{kind}") from None
    return kind(**values)


CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "bool": {"true": True, "false": False}.__getitem__,
    "tuple[int, ...]": lambda text: tuple(int(part) for part in text.split(",")),
    "tuple[str, ...]": lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
}
