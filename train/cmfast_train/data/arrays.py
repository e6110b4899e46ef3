# SPDX-License-Identifier: MIT
"""Samples of any shape with their conditions: arrays in memory, a .npz, a folder of .npy files, or a Dataset.

    {"x": [N, *shape], "state": [N, 14], "label": [N]}

Numbers are trained on as they are, in data units. Images (`ModelSpec.data`) may also be uint8, which becomes [-1, 1].
What does not fit is one line with the name of the condition: of arrays in memory before the run begins, otherwise when
a batch is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmfast.conditions import Condition, in_words
from cmfast.errors import CmfastError, one_line, shown
from cmfast.spec import ModelSpec
from cmfast_train.data.image_arrays import map_npy, read_npz
from cmfast_train.data.images import Batch, check_batch, in_data_units

X = "x"  # the name of the samples
LOOKED_AT, LOOKED_AT_ITEMS = 10_000, 500  # samples that the spread of the data is measured on
FAR = 2.0  # factor between the spread of the data and sigma_data that is worth a line

Array = npt.NDArray[Any]
Given = Any  # a mapping of arrays, a path, or a Dataset


@final
class ArraySamples(Dataset[Batch | str]):
    """Samples in arrays, float32 or uint8 [N, *shape], and arrays of their conditions, in memory or mapped from disk.

    Args:
        arrays: by name, "x" among them.
        spec: of the model they are for.
        where: what they are called in errors.

    Raises:
        CmfastError: an array is missing or unknown, has another shape or type, or holds what the model does not take.
    """

    def __init__(self, arrays: Mapping[str, Any], spec: ModelSpec, where: str = "data") -> None:
        self.spec, self.where = spec, where
        self.names = tuple(each.name for each in spec.conditions)
        self.classes, self.class_names = spec.classes, spec.class_names
        check_names(arrays, spec, where)
        arrays = {name: as_array(f"{where}: {name}", arrays[name]) for name in (X, *self.names)}
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise CmfastError(
                f"{where}: the arrays have different numbers of samples: "
                f"{', '.join(f'{name} {n:,}' for name, n in lengths.items())}"
            )
        if not lengths[X]:
            raise CmfastError(f"{where}: x holds no samples, got {list(arrays[X].shape)}")
        self._arrays = tuple(arrays.values())
        for name, array in zip((X, *self.names), self._arrays, strict=True):
            check_shape(name, array, spec, where)
        if self.in_memory:
            self._arrays = tuple(self._checked(a, n) for n, a in zip((X, *self.names), self._arrays, strict=True))

    @property
    def in_memory(self) -> bool:
        """Whether no array is on disk."""
        return not any(isinstance(array, np.memmap) for array in self._arrays)

    def tensors(self) -> Batch:
        """Return all samples and their conditions."""
        return tuple(torch.from_numpy(array) for array in self._arrays)

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitems__(self, indices: list[int]) -> Batch | str:
        """Return a batch, or what is wrong with it: an exception leaves a worker as a traceback."""
        parts = [array.take(indices, axis=0) for array in self._arrays]
        if not self.in_memory:
            try:
                parts = [self._checked(part, name) for part, name in zip(parts, (X, *self.names), strict=True)]
            except CmfastError as err:
                return str(err)
        return tuple(map(torch.from_numpy, parts))

    def _checked(self, array: Array, name: str) -> Array:
        return checked(name, array, self.spec, self.where)


@final
class ItemSamples(Dataset[Batch | str]):
    """Samples of a `torch.utils.data.Dataset`, or of any sequence, whose items are {"x": [*shape], **conditions}."""

    def __init__(self, items: Any, spec: ModelSpec) -> None:
        self.items, self.spec = items, spec
        self.where = type(items).__name__
        self.names = tuple(each.name for each in spec.conditions)
        self.classes, self.class_names = spec.classes, spec.class_names
        self.in_memory = False
        if not len(items):
            raise CmfastError(f"{self.where}: it holds no samples")
        try:
            first = self.__getitems__([0])
        except Exception as err:  # such as the KeyError of a table
            raise CmfastError(
                f"{self.where}: item 0 cannot be read ({type(err).__name__}: {one_line(err, 100)}); need a sequence of "
                "{'x': [..], ..}, or a mapping of arrays"
            ) from err
        if isinstance(first, str):
            raise CmfastError(first)

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        """Return a batch, or what is wrong with it."""
        many = getattr(self.items, "__getitems__", None)
        found = many(indices) if many else [self.items[index] for index in indices]
        try:
            parts: dict[str, list[Array]] = {name: [] for name in (X, *self.names)}
            for index, item in zip(indices, found, strict=True):
                where = f"{self.where}: item {index}"
                if not isinstance(item, Mapping):
                    raise CmfastError(f"{where}: need {{'x': .., {'..' if self.names else ''}}}, got {shown(item)}")
                check_names(item, self.spec, where)
                for name, values in parts.items():
                    values.append(as_array(f"{where}: {name}", item[name]))
            return tuple(torch.from_numpy(self._stacked(name, values)) for name, values in parts.items())
        except CmfastError as err:
            return str(err)

    def _stacked(self, name: str, values: Sequence[Array]) -> Array:
        shapes = {array.shape for array in values}
        if len(shapes) > 1:
            some = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
            raise CmfastError(f"{self.where}: {name} has different shapes in one batch, {some}; pad them to one")
        whole = np.stack(values)
        check_shape(name, whole, self.spec, self.where)
        return checked(name, whole, self.spec, self.where)


Samples = ArraySamples | ItemSamples


def samples_of(data: Given, spec: ModelSpec) -> Samples:
    """Return the samples to train a model on.

    Args:
        data: arrays by name, {"x": [N, *shape], **conditions}, NumPy's or PyTorch's; the path of a .npz file or of a
            folder with NAME.npy files, which are read from disk; or a Dataset with a length whose items are such
            mappings of one sample.
        spec: of the model.

    Raises:
        CmfastError: the data do not fit the model; the line names the condition.
    """
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        return ArraySamples(_read(path, spec), spec, str(path))
    if isinstance(data, Mapping):
        return ArraySamples(data, spec)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (np.ndarray, Tensor)):
        return ItemSamples(data, spec)
    raise CmfastError(
        "data must be a mapping of arrays {'x': [N, ..], ..}, a .npz file, a folder of .npy files, or a Dataset with "
        f"__len__ and __getitem__, so that a run can be resumed; got {shown(data)}"
    )


def _read(path: Path, spec: ModelSpec) -> dict[str, Array]:
    """Return the arrays of a .npz file, or of the .npy files in a folder, mapped from disk."""
    wanted = (X, *(each.name for each in spec.conditions))
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        check_names(files, spec, str(path))
        return {name: map_npy(files[name]) for name in wanted}
    if not path.exists():
        raise CmfastError(f"{path} does not exist; need a .npz file or a folder of .npy files with {', '.join(wanted)}")
    if path.suffix.lower() != ".npz":
        raise CmfastError(f"{path}: arrays are read from a .npz file, or from a folder with {wanted[0]}.npy, ..")
    return read_npz(path, lambda names: check_names(names, spec, str(path)))


def check_names(given: Any, spec: ModelSpec, where: str) -> None:
    """Raise CmfastError unless the samples and exactly the conditions of the model are there."""
    wanted = {X: f"the samples [N, {str(list(spec.shape))[1:]}"} | {e.name: in_words(e) for e in spec.conditions}
    for name, what in wanted.items():
        if name not in given:
            have = ", ".join(shown(each) for each in list(given)[:8]) or "nothing"
            raise CmfastError(f"{where}: {name} is missing, {what}; it has {have}")
    if unknown := [name for name in given if name not in wanted]:
        raise CmfastError(f"{where}: the model has no condition {shown(unknown[0])}; it takes {', '.join(wanted)}")


def as_array(what: str, value: Any) -> Array:
    """Return an array, or whatever numpy makes of it, without a copy where possible."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except Exception as err:  # of unknown objects
        raise CmfastError(f"{what} is not an array: {one_line(err, 100)}") from None
    if array.dtype.kind not in "fiub":
        raise CmfastError(f"{what} must be numbers, got {array.dtype} {list(array.shape)}")
    return array


def check_shape(name: str, array: Array, spec: ModelSpec, where: str) -> None:
    """Raise CmfastError unless an array [N, ..] has the type and the shape that the model takes under this name."""
    condition = next((each for each in spec.conditions if each.name == name), None)
    got, kind = f"got {array.dtype} {list(array.shape)}", array.dtype.kind
    if condition is not None and condition.kind == "class":
        if kind not in "iu" or array.ndim != 1:
            raise CmfastError(f"{where}: {name} must be whole numbers [N], a class each, {got}")
        return
    shape: tuple[int | str, ...] = spec.shape if condition is None else condition.shape
    sizes = array.shape[1:]
    fits = len(sizes) == len(shape) and all(
        size > 0 if isinstance(side, str) else size == side for size, side in zip(sizes, shape, strict=True)
    )
    pixels = condition is None and spec.data == "image" and array.dtype == np.uint8
    if not fits or (kind not in "f" and not pixels and condition is None):
        types = "float32, or uint8 images," if condition is None and spec.data == "image" else "float32"
        raise CmfastError(f"{where}: {name} must be {types} [{', '.join(map(str, ('N', *shape)))}], {got}")


def checked(name: str, array: Array, spec: ModelSpec, where: str) -> Array:
    """Return an array of the right shape as a run takes it: float32, uint8 of images, int64 of classes.

    Raises:
        CmfastError: it holds NaN, infinity, or a class that the model does not have.
    """
    condition = next((each for each in spec.conditions if each.name == name), None)
    if condition is not None and condition.kind == "class":
        return _classes(condition, array, where)
    if array.dtype == np.uint8 and condition is None:
        return np.require(array, requirements=["C", "W"])
    with np.errstate(over="ignore"):
        numbers: Array = np.require(array, np.float32, ["C", "W"])
    if not np.isfinite(numbers).all():
        first = int(np.argmin(np.isfinite(numbers.reshape(len(numbers), -1)).all(axis=1)))
        raise CmfastError(f"{where}: {name} has values that are not finite in float32, the first in sample {first}")
    return numbers


def _classes(condition: Condition, array: Array, where: str) -> Array:
    for wrong in (int(array.min()), int(array.max())):
        if not 0 <= wrong < condition.entries:
            raise CmfastError(
                f"{where}: {condition.name} has the class {wrong}; the model has 0 to {condition.entries - 1}"
            )
    return array.astype(np.int64)


def spread(samples: Samples) -> tuple[float, float]:
    """Return mean and standard deviation of the data, data units, over some thousand samples, evenly chosen."""
    most = LOOKED_AT if isinstance(samples, ArraySamples) else LOOKED_AT_ITEMS
    chosen = range(0, len(samples), -(-len(samples) // most))
    x = in_data_units(check_batch(samples.__getitems__(list(chosen)))[0]).double()
    return float(x.mean()), float(x.std(correction=0))


def check_spread(samples: Samples, spec: ModelSpec) -> str:
    """Return a line about data that are far from the model's sigma_data, "" if they are not."""
    mean, std = spread(samples)
    known = spec.sigma_data
    if known / FAR <= std <= known * FAR and abs(mean) <= FAR * known:
        return ""
    if not std:
        return f"x is {mean:.4g} everywhere; a model cannot learn a scale from that"
    scaled = f"train on (x - {mean:.4g}) / {std / known:.4g}".replace("- -", "+ ")
    return (
        f"x has mean {mean:.4g} and standard deviation {std:.4g}, and the denoiser sigma_data={known:g}; {scaled}, or "
        f"pass sigma_data={std:.4g} to wrap, with sigma_min and sigma_max that fit"
    )
