# SPDX-License-Identifier: MIT
"""Readers of command-line texts, one for each type that a field of the configuration may have."""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.checks import shown
from cmfast_train.networks.shape import Size, plain_size


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Converts a text to a value, or raises ValueError.

    Attributes:
        read: the conversion.
        example: what it reads, for the error message.
    """

    read: Callable[[str], Any]
    example: str = ""


def read(text: str, kind: Any, value: str, readers: typing.Mapping[Any, Reader]) -> Any:
    """Return a value of a type from its text.

    Args:
        text: the whole NAME=VALUE, which the error quotes.
        kind: annotated type of the field; an "int | None" is written as an int.
        value: the part after the equals sign.
        readers: by type.

    Raises:
        CmfastError: the text cannot be read as this type.
    """
    if isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind):
        kind = functools.reduce(operator.or_, (k for k in typing.get_args(kind) if k is not type(None)))
    reader = readers[kind]
    try:
        return reader.read(value)
    except (ValueError, KeyError):
        example = f" ({reader.example})" if reader.example else ""
        raise CmfastError(f"--set {cut(text)}: {cut(value)!r} does not convert to {type_name(kind)}{example}") from None


def cut(text: str) -> str:
    """Return a text, or the beginning of a long one."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def type_name(kind: Any) -> str:
    """Return a type as it is written in an annotation."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _bool(value: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]


def _size(value: str) -> Size:
    height, x, width = value.lower().partition("x")
    return plain_size((int(height), int(width))) if x else int(value.replace("_", ""))


def _floats(value: str) -> tuple[float, ...]:
    return tuple(float(v) for v in value.split(","))


def _ints(value: str) -> tuple[int, ...]:
    return tuple(int(v) for v in value.split(",")) if value else ()


READERS: dict[Any, Reader] = {
    int: Reader(read=lambda value: int(value.replace("_", "")), example="a whole number, such as 1000"),
    float: Reader(read=float, example="a number, such as 0.5 or 1e-4"),
    str: Reader(read=str),
    bool: Reader(read=_bool, example="true or false"),
    int | tuple[int, int]: Reader(
        read=_size, example="pixels of square images, such as 32, or HEIGHTxWIDTH, such as 32x64"
    ),
    tuple[int, ...]: Reader(read=_ints, example="whole numbers with commas between, such as 1,2,2"),
    tuple[int, int]: Reader(read=_ints, example="two whole numbers, such as 0,7"),
    tuple[float, ...]: Reader(read=_floats, example="numbers with commas between, such as 0.99,0.999"),
    tuple[tuple[float, ...], ...]: Reader(
        read=lambda value: tuple(_floats(part) for part in value.split(":")),
        example="lists with colons between, such as 80:80,0.8",
    ),
}


def frozen_names(values: Any, what: str) -> dict[str, Any]:
    """Return names and values with the lists among the values as tuples, two levels deep."""

    def frozen(value: Any, depth: int = 2) -> Any:
        return tuple(frozen(v, depth - 1) for v in value) if isinstance(value, (list, tuple)) and depth else value

    if not isinstance(values, Mapping):
        raise CmfastError(f"{what} must be names and values, got {shown(values)}")
    return {name: frozen(value) for name, value in values.items()}


def plain_values(value: Any) -> Any:
    """Return a value with dicts and lists where it has mappings and tuples, ready for JSON."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    return [plain_values(v) for v in value] if isinstance(value, (list, tuple)) else value
