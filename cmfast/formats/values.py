# SPDX-License-Identifier: MIT
"""What the values of a manifest may be beside the model's description, which `ModelSpec` checks itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cmfast.errors import CmfastError, shown

# What the backbone of a network computes in, by the name of an option, and what the manifest calls it.
PRECISIONS = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16"}
MAX_TEXT = 4000  # characters of one text
MAX_DEPTH = 4  # of lists and objects in "source" and "engine"
LARGEST = 2.0**63  # of a number
OF_SELFTEST = {"seed", "conditions", "at", "values", "atol"}  # keys of "selftest": `cmfast.formats.selftest`


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raise CmfastError unless the objects of a manifest hold what they are for; engines: `tensorrt_plan`."""
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise CmfastError(f"{', '.join(parts)} must be objects")
        for key, value in part.items():
            where = f"{name}.{key}" if is_text(key) else name
            if not is_text(key):
                raise CmfastError(f"{name} must have printable keys, got {shown(key)}")
            if name in ("parity", "cost"):
                if not is_number(value) or (name == "cost" and value < 0):
                    raise CmfastError(f"{where} must be a finite number, got {shown(value)}")
            elif name == "made_by":
                if not is_text(value):
                    raise CmfastError(f"{where} must be a printable text, got {shown(value)}")
            elif not _is_plain(value, MAX_DEPTH):
                raise CmfastError(f"{where} must be printable texts, numbers, lists and objects, got {shown(value)}")


def check_selftest(recorded: Mapping[str, Any]) -> None:
    """Raise CmfastError unless a self-test has its keys, and numbers where numbers belong."""
    if not recorded:
        return
    seed, at, values, atol = (recorded.get(name) for name in ("seed", "at", "values", "atol"))
    whole = [seed, *(at if isinstance(at, (list, tuple)) else [None])]
    fits = recorded.keys() >= OF_SELFTEST and isinstance(recorded["conditions"], Mapping) and len(whole) > 1
    fits = fits and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in whole)
    fits = fits and isinstance(values, (list, tuple)) and len(values) == len(whole) - 1
    if not fits or not all(is_number(n) for n in (*(values or ()), atol)) or (atol or 0) < 0:
        raise CmfastError(
            f"selftest must have {', '.join(sorted(OF_SELFTEST))}, as docs/format.md says, got {shown(recorded)}"
        )


def object_of(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; CmfastError where a key is there twice, of which readers take one or the other."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise CmfastError(f"the manifest has the key {shown(key)} twice")
        values[key] = value
    return values


def is_text(value: Any) -> bool:
    """Whether a value is a text of bounded length that a terminal shows as it is."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that 64 bits hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -LARGEST <= value <= LARGEST and math.isfinite(value)


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    if isinstance(value, Mapping):
        return depth > 0 and all(is_text(k) and _is_plain(v, depth - 1) for k, v in value.items())
    return value is None or isinstance(value, bool) or is_text(value) or is_number(value)
