# SPDX-License-Identifier: MIT
"""Conditions on a command line: --condition NAME=VALUE and --label, read as `Model.sample` takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cmfast.checks import shown
from cmfast.conditions import Condition, in_words, no_label
from cmfast.encoding import encoded_name
from cmfast.errors import ArtifactError, CmfastError, one_line


def read_conditions(conditions: Sequence[Condition], texts: Iterable[str], label: str | None) -> dict[str, Any]:
    """Return values by name.

    Args:
        conditions: Of the model that they are for.
        texts: NAME=VALUE. Of a class, VALUE is its number or name, or one for each sample with commas between; of a
            tensor a file NAME.npy, or numbers with commas between.
        label: The value of the condition named label, or None.

    Raises:
        CmfastError: no such condition, or a value that is none.
    """
    known = {condition.name: condition for condition in conditions}
    values: dict[str, Any] = {}
    for text in [*texts, *([] if label is None else [f"label={label}"])]:
        name, equals, value = text.partition("=")
        if not equals:
            raise CmfastError(f"--condition {shown(text)}: expected NAME=VALUE, such as state=state.npy")
        if name in values:
            raise CmfastError(f"--condition {name}: given twice; remove one")
        if name in known:
            values[name] = _read(known[name], value)
        elif encoded_name(name) in known:
            raise CmfastError(
                f"--condition {name}: the model takes it encoded; add --encoder FILE, the file of its encoder"
            )
        elif name == "label":
            raise no_label(conditions)
        else:
            have = ", ".join(known) or "none"
            raise CmfastError(f"--condition {shown(name)}: the model has no such condition; it has {have}")
    return values


def _read(condition: Condition, value: str) -> Any:
    if condition.kind == "class":
        return _classes(value, condition.class_names)
    if value.endswith(".npy"):
        return _array(condition, Path(value))
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        raise CmfastError(
            f"--condition {condition.name}: need a file NAME.npy or numbers such as 0.5,1, got {shown(value)}; it is "
            f"{in_words(condition)}"
        ) from None
    return numbers[0] if condition.shape == () else numbers


def _array(condition: Condition, file: Path) -> Any:
    import numpy as np

    if not file.is_file():
        raise ArtifactError(f"--condition {condition.name}: {file}: no such file")
    where = f"--condition {condition.name}: {file}"
    with file.open("rb") as opened:
        if opened.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ArtifactError(f"{where}: not a .npy file; numpy.save writes one")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as err:  # what numpy raises is not one kind
        if "object" in str(err).lower():
            why = "an array of Python objects, which are never read; save numbers: values.astype('float32')"
        else:
            why = f"not a whole .npy file: {one_line(err)}"
        raise ArtifactError(f"{where}: {why}") from None


def _classes(text: str, names: tuple[str, ...]) -> str | list[str]:
    """Return the class or classes in a text. A whole text that is a name is one, commas in it included."""
    parts = [text] if text in names else [part if part in names else part.strip() for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts
