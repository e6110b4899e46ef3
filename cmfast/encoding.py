# SPDX-License-Identifier: MIT
"""Encoders of conditions in files of their own: evaluated once, however many steps and samples follow.

A model that was exported with its encoders apart takes the encoded condition, which is called NAME_encoded. With the
encoder's file beside it, `cmfast.model` takes NAME itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends import Backend, open_backend
from cmfast.checks import returned_array, shown
from cmfast.conditions import Condition, condition_values, in_words
from cmfast.errors import CheckFailed, CmfastError
from cmfast.formats.manifest import ENCODER, Manifest

BATCH = 64  # values that are encoded at a time
Path1 = str | os.PathLike[str]
Paths = Path1 | Sequence[Path1] | Mapping[str, Path1]


def encoded_name(name: str) -> str:
    """Return what an encoded condition is called: the name of an encoder's output, and of the other file's input."""
    return f"{name}_encoded"


class Encoders:
    """The encoders of a model by the names of their conditions; none for most models."""

    def __init__(self, manifest: Manifest, paths: Paths | None = None, threads: int | None = None) -> None:
        """Open the encoders' files.

        Args:
            manifest: Of the model that they are for.
            paths: Their files, or files by the names of their conditions; None: the model is given encoded conditions.
            threads: CPU threads.

        Raises:
            CmfastError: a file is no encoder, or not one that the model was exported with.
        """
        self._wanted, self._backends = manifest.encoders, dict[str, Backend]()
        for name, file in _files(paths):
            backend = open_backend(file, "cpu", threads)
            if backend.manifest.kind != ENCODER:
                raise CmfastError(f"{file}: a {backend.manifest.kind}, and encoder must name the file of an encoder")
            (condition,) = backend.manifest.spec.conditions
            if name not in (None, condition.name):
                raise CmfastError(f"{file}: the encoder of {condition.name}, not of {name}")
            digest = self._wanted.get(condition.name)
            if digest is None:
                have = ", ".join(self._wanted) or "no condition"
                raise CmfastError(f"{file}: encodes {condition.name}, and this model has encoders of {have}")
            if digest != backend.manifest.graph_sha256:
                raise CmfastError(
                    f"{file}: not the encoder of {condition.name} that this model was exported with; export the two "
                    "together: cmfast-export --encoder"
                )
            self._backends[condition.name] = backend

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What they encode."""
        return tuple(backend.manifest.spec.conditions[0] for backend in self._backends.values())

    def encode(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by name, those of these encoders' conditions encoded and renamed, the others as they are.

        A value for all samples is encoded once. Without an encoder for it, its condition is an error with the file.
        """
        values = dict(given)
        for name in self._wanted:
            if name not in values:
                if name in self._backends and encoded_name(name) not in values:
                    condition = self._backends[name].manifest.spec.conditions[0]
                    raise CmfastError(f"this model needs the condition {name}: {in_words(condition)}")
                continue
            if name not in self._backends:
                raise CmfastError(
                    f"this model takes {encoded_name(name)}, and the file that makes it of {name} is not open: "
                    "cmfast.load(model, encoder=FILE)"
                )
            if encoded_name(name) in values:
                raise CmfastError(f"the condition {name} was passed twice, encoded and not; remove one")
            values[encoded_name(name)] = _encoded(self._backends[name], values.pop(name))
        return values


def _files(paths: Paths | None) -> list[tuple[str | None, Path]]:
    """Return files, each with the name of its condition where that was given."""
    if paths is None:
        return []
    if isinstance(paths, (str, os.PathLike)):
        return [(None, Path(paths))]
    named = list(paths.items()) if isinstance(paths, Mapping) else None
    if named is None and isinstance(paths, (list, tuple)):
        named = [(None, file) for file in paths]  # type: ignore[misc]
    if named is None or not all(isinstance(file, (str, os.PathLike)) for _, file in named):
        raise CmfastError(f"encoder must be a path, paths, or paths by the names of conditions, got {shown(paths)}")
    return [(name, Path(file)) for name, file in named]


def check_model_kind(backend: Backend) -> None:
    """Raise CmfastError where a file is an encoder, which draws nothing."""
    if backend.manifest.kind == ENCODER:
        (condition,) = backend.manifest.spec.conditions
        raise CmfastError(
            f"this file is the encoder of the condition {condition.name} of another one: "
            "cmfast.load(model, encoder=FILE)"
        )


def _encoded(backend: Backend, value: Any) -> npt.NDArray[np.float32]:
    """Return a condition's value encoded: [*sizes] of one for all samples, else [n, *sizes]."""
    (condition,) = backend.manifest.spec.conditions
    count = _count(condition, value)
    values = condition_values([condition], {condition.name: value}, count or 1)[condition.name]
    size = backend.batch or BATCH
    parts = []
    for start in range(0, len(values), size):
        part = np.ascontiguousarray(values[start : start + size])
        short = (backend.batch or len(part)) - len(part)
        whole = np.pad(part, [(0, short), *[(0, 0)] * (part.ndim - 1)], mode="edge")
        result = backend.run({condition.name: whole})
        sizes = [
            got if isinstance(want, str) else want
            for got, want in zip(result.shape[1:], backend.manifest.returns, strict=False)
        ]
        parts.append(returned_array(backend.name, result, (len(whole), *sizes), np.float32)[: len(part)])
    encoded: npt.NDArray[np.float32] = np.concatenate(parts)
    if not np.isfinite(encoded).all():
        raise CheckFailed(f"the encoder of {condition.name} returned values that are not finite (NaN or infinity)")
    return encoded[0] if count is None else encoded


def _count(condition: Condition, value: Any) -> int | None:
    """Return how many samples a value is for; None: it is one for all."""
    if condition.kind == "class":
        return len(value) if isinstance(value, (list, tuple)) or np.ndim(value) else None
    try:
        shape = np.shape(value)
    except ValueError:  # a ragged list, which is refused with its name
        return None
    return shape[0] if len(shape) == len(condition.shape) + 1 else None
