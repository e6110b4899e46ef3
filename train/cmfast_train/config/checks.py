# SPDX-License-Identifier: MIT
"""Checks of dataclass fields: types as annotated, values within bounds.

Values come from a command line, JSON, a foreign checkpoint or Python. True is not a number, 8.0 is not a whole number,
NaN is not a value: each raises an error with the name of the field, before anything is computed with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from dataclasses import dataclass
from typing import Any

from cmfast.errors import CmfastError

LARGEST = 10**12  # limit of whole numbers; lengths in images are the largest
MOST = 1000  # limit of list entries, except names of classes
MOST_NAMES = 1 << 20
LONGEST = 4096  # limit of characters in a text: a path


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Allowed values of a field; stored in the field's metadata under "bounds".

    Attributes:
        least: smallest value.
        most: largest value.
        above: exclusive lower limit.
        below: exclusive upper limit.
        choices: the only texts allowed.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def wrong(self, value: Any) -> str:
        """Return the requirement that a value breaks, "" if it is allowed."""
        if self.choices:
            return "" if value in self.choices else f"must be {' or '.join(self.choices)}"
        inside = (
            (self.above is None or value > self.above, f"greater than {self.above}"),
            (self.least is None or value >= self.least, f"at least {self.least}"),
            (self.below is None or value < self.below, f"below {self.below}"),
            (self.most is None or value <= self.most, f"at most {self.most}"),
        )
        if all(holds for holds, _ in inside):
            return ""
        return f"must be {' and '.join(words for _, words in inside if 'None' not in words)}"


def check_bounds(owner: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass that have bounds.

    Args:
        owner: an instance of a dataclass whose types are checked.
        prefix: text before the field's name in the error.

    Raises:
        CmfastError: a value is out of bounds.
    """
    for field in dataclasses.fields(owner):
        bounds: Bounds | None = field.metadata.get("bounds")
        value = getattr(owner, field.name)
        if bounds is not None and (wrong := bounds.wrong(value)):
            raise CmfastError(f"{prefix}{field.name} {wrong}, got {shown(value)}")


def check_positive(owner: Any, *names: str) -> None:
    """Raise CmfastError unless these fields of a dataclass are greater than 0."""
    for name in names:
        if not getattr(owner, name) > 0:
            raise CmfastError(f"{name} must be greater than 0, got {getattr(owner, name)}")


def check_types(owner: Any, prefix: str = "") -> None:
    """Check that every field of a dataclass has its annotated type; `object` takes anything.

    Args:
        owner: an instance of a dataclass.
        prefix: text before the field's name in the error.

    Raises:
        CmfastError: a value has another type, is not finite, or is too large.
    """
    for name, kind in _kinds(type(owner)).items():  # type: ignore[arg-type]  # a class is hashable
        if kind is object:
            continue
        value = getattr(owner, name)
        if not _is(value, kind, MOST_NAMES if name == "class_names" else MOST):
            raise CmfastError(f"{prefix}{name} must be {in_words(kind)}, got {shown(value)}")


def shown(value: Any) -> str:
    """Return any value as a short text of one line."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # repr of an unknown object may fail, for example for a number of too many digits
        text = f"a value of type {type(value).__name__}"
    return " ".join(text.split())[:200]


def in_words(kind: Any) -> str:
    """Return a description of the values that a field of this type takes."""
    if kind in _WORDS:
        return _WORDS[kind]
    (inner, *_) = (*typing.get_args(kind), str)
    return f"a list (a tuple in Python) of at most {MOST:,} entries, each {in_words(inner)}"


@functools.cache
def _kinds(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _is(value: Any, kind: Any, most: int = MOST) -> bool:
    if kind is int:
        return type(value) is int and -LARGEST <= value <= LARGEST
    if kind is float:
        return (isinstance(value, float) and math.isfinite(value)) or _is(value, int)
    if kind is str:
        return type(value) is str and len(value) <= LONGEST
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]  # also of tuple[int, int]; the owner checks the length
        return type(value) is tuple and len(value) <= most and all(_is(entry, inner) for entry in value)
    return type(value) is kind


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxtuple, _SHORT.maxlist, _SHORT.maxdict = 2, 6, 6, 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_WORDS: dict[Any, str] = {
    int: f"a whole number, at most {LARGEST:,}",
    float: "a finite number",
    bool: "true or false",
    str: f"a text of at most {LONGEST:,} characters",
    int | tuple[int, int]: "a number of pixels, or HEIGHTxWIDTH",
    int | None: "a whole number or none",
    str | None: "a text or none",
}
