# SPDX-License-Identifier: MIT
"""NAME=VALUE of the command line into a dataclass of options, by the types of its fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from cmfast.checks import MAX_BATCH
from cmfast.errors import CmfastError
from cmfast_export import OPSETS

Options = TypeVar("Options")

MAX_SAMPLER_STEPS = 64  # network calls in a sampler graph: the denoiser is in it as often


def parse_options(kind: type[Options], flag: str, assignments: Sequence[str]) -> Options:
    """Return `kind` with the fields that NAME=VALUE texts set; `flag` is named in errors."""
    types = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in types:
            raise CmfastError(f"{flag} {shorten(text)}: expected NAME=VALUE, NAME one of {', '.join(types)}")
        if name in values:
            raise CmfastError(f"{flag} {shorten(text)}: {name} is given twice")
        try:
            values[name] = CONVERT[types[name]](value.strip())
        except (ValueError, KeyError):
            raise CmfastError(
                f"{flag} {shorten(text)}: {shorten(value)!r} is not a valid value for {name}{HINTS[types[name]]}"
            ) from None
    return kind(**values)


def parse_files(flag: str, texts: Sequence[str]) -> dict[str, Path]:
    """Return files by names from texts NAME=FILE; a FILE alone has the name ""."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals and name.isidentifier() else ("", text)
        if not file or name in files:
            raise CmfastError(f"{flag} {shorten(text)}: expected FILE, or NAME=FILE once for each name")
        files[name] = Path(file)
    return files


def parse_numbers(flag: str, assignments: Sequence[str]) -> dict[str, float]:
    """Return numbers by names from texts NAME=NUMBER; `flag` is named in errors."""
    values: dict[str, float] = {}
    for text in assignments:
        name, equals, number = text.partition("=")
        if name in values:
            raise CmfastError(f"{flag} {shorten(text)}: {name} is already set; remove one of the two")
        try:
            values[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not math.isfinite(values[name]):
            raise CmfastError(f"{flag} {shorten(text)}: expected NAME=NUMBER, for example label=10")
    return values


def parse_batch(text: str) -> int | None:
    """Return the fixed batch size of --batch, None for a dynamic one."""
    if text == "dynamic":
        return None
    try:
        size = whole_number(text)
    except ValueError:
        size = 0
    if not 1 <= size <= MAX_BATCH:
        raise CmfastError(f"--batch {shorten(text)}: a number from 1 to {MAX_BATCH:,}, or dynamic")
    return size


def whole_number(text: str) -> int:
    """Return the number that a text of plain digits stands for, else raise ValueError: ² and １ are none."""
    if not re.fullmatch(r"[+-]?[0-9][0-9_]{0,30}", text.strip()):
        raise ValueError(text)
    return int(text)


def check_range(name: str, value: int, least: int, most: int, unit: str = "") -> None:
    """Raise CmfastError unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        said = "a longer number" if isinstance(value, int) and abs(value) >= 10**40 else repr(value)
        raise CmfastError(f"{name} must be at least {least} and at most {most:,}{unit and f' {unit}'}, got {said}")


def check_steps(steps: int) -> None:
    """Raise CmfastError where a sampler graph would have too many steps: its manifest could not hold their levels."""
    if steps > MAX_SAMPLER_STEPS:
        raise CmfastError(
            f"a sampler graph has at most {MAX_SAMPLER_STEPS} steps, got {steps}; export the denoiser, which runs any "
            "number: kind denoiser"
        )


def check_opset(opset: int | None) -> None:
    """Raise CmfastError for an ONNX opset that is not offered; None is the oldest that a graph can be written in."""
    if opset is not None and opset not in OPSETS:
        raise CmfastError(f"opset must be from {OPSETS.start} to {OPSETS.stop - 1}, got {shorten(str(opset))}")


def check_tolerance(tolerance: float | None) -> None:
    """Raise CmfastError unless a tolerance is a number that a difference can be compared with."""
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < math.inf):  # which no NaN is
        raise CmfastError(f"the tolerance must be a finite number greater than 0 (data units), got {tolerance}")


def shorten(text: str) -> str:
    """Return a text as an error quotes it."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ValueError(text)
    return parts


CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": whole_number,
    "bool": {"true": True, "false": False}.__getitem__,
    "tuple[int, ...]": lambda text: tuple(whole_number(part) for part in text.split(",")),
    "tuple[str, ...]": _names,
}
HINTS = {
    "str": "",
    "int": " (a whole number)",
    "bool": " (true or false)",
    "tuple[int, ...]": " (whole numbers with commas between)",
    "tuple[str, ...]": " (names with commas between)",
}
