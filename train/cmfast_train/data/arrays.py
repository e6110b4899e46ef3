# SPDX-License-Identifier: MIT
"""Samples of any shape with their conditions: arrays in memory, a .npz, a folder of .npy files, or a Dataset.

    {"x": [N, *shape], "state": [N, 14], "label": [N]}

Numbers are trained on as they are, in data units. Images (`ModelSpec.data`) may also be uint8, which becomes [-1, 1].
What does not fit is one line with the name of the condition: of arrays in memory before the run begins, otherwise when
a batch is read.
"""

from __future__ import annotations

import hashlib
import os
import traceback
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
DIGESTED = 256  # samples that tell data from others
ROUNDING = 1 / 255  # what float images may exceed [-1, 1] by
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
            self._items([0])
        except CmfastError as err:  # such as the KeyError of a table
            raise CmfastError(f"{err}; need a sequence of {{'x': [..], ..}}, or a mapping of arrays") from None
        if isinstance(first := self.__getitems__([0]), str):
            raise CmfastError(first)

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        """Return a batch, or what is wrong with it."""
        try:
            found = self._items(indices)
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

    def _items(self, indices: list[int]) -> Sequence[Any]:
        """Return some items; raise CmfastError for what the user's code raises."""
        many = getattr(self.items, "__getitems__", None)
        which = f"items {indices[0]}, .." if many and len(indices) > 1 else f"item {indices[0]}"
        try:
            if many:
                found: Sequence[Any] = many(indices)
                return found
            found = []
            for index in indices:
                which = f"item {index}"
                found.append(self.items[index])
            return found
        except Exception as err:  # whatever its code raises
            frames = [frame for frame in traceback.extract_tb(err.__traceback__) if frame.filename != __file__]
            place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            many_more = f"; its length is {len(self):,}" if isinstance(err, IndexError) else ""
            raise CmfastError(
                f"{self.where}: {which} cannot be read ({type(err).__name__}: {one_line(err, 100)}){place}{many_more}"
            ) from err

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
    if array.dtype.kind in "USO" and array.size and isinstance(array.flat[0], (str, bytes)):
        raise CmfastError(
            f"{what} must be numbers, got text such as {shown(str(array.flat[0]))}; "
            "number the classes: names, label = np.unique(labels, return_inverse=True)"
        )
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
        if not 0 <= wrong < condition.classes:
            null = ", which stands for no class" if wrong == condition.null else ""
            raise CmfastError(
                f"{where}: {condition.name} has the class {wrong}{null}; the model has 0 to {condition.classes - 1}, "
                "counted from 0"
            )
    return array.astype(np.int64)


def check_spread(samples: Samples, spec: ModelSpec) -> str:
    """Return a line about data that are far from the model's sigma_data, or no images of its range; "" otherwise.

    Looks at some thousand samples, evenly chosen.
    """
    x = check_batch(samples.__getitems__(_some(samples, LOOKED_AT, LOOKED_AT_ITEMS)))[0]
    if spec.data == "image" and x.is_floating_point() and (line := _check_range(x)):
        return line
    x = in_data_units(x).double()
    mean, std, known = float(x.mean()), float(x.std(correction=0)), spec.sigma_data
    if known / FAR <= std <= known * FAR and abs(mean) <= FAR * known:
        return ""
    if not std:
        return f"x is {mean:.4g} everywhere; a model cannot learn a scale from that"
    scaled = f"train on (x - {mean:.4g}) / {std / known:.4g}".replace("- -", "+ ")
    return (
        f"x has mean {mean:.4g} and standard deviation {std:.4g}, and the denoiser sigma_data={known:g}; {scaled}, or "
        f"pass sigma_data={std:.4g} to wrap, with sigma_min and sigma_max that fit"
    )


def _check_range(x: Tensor) -> str:
    """Return a line about float images that are not in [-1, 1], "" if they are."""
    least, most = float(x.min()), float(x.max())
    if (-1 - ROUNDING <= least < 0 and most <= 1 + ROUNDING) or least == most:
        return ""
    got = f"x has values from {least:.4g} to {most:.4g}"
    if least >= 0 and most <= 1:
        return f"{got}, and images are in [-1, 1]: train on 2 * x - 1"
    return (
        f"{got}, and images are in [-1, 1]: samples are clipped to that and drawn as uint8; scale x, or, if these are "
        'no images, wrap(.., data="array")'
    )


def digest(samples: Dataset[Any]) -> str:
    """Return a number that tells data from others of the same length, from some evenly chosen samples.

    Returns:
        Hexadecimal; "" for other data than arrays: the items of a Dataset may be drawn anew each time.
    """
    if not isinstance(samples, ArraySamples):
        return ""
    made = hashlib.sha256()
    for values in check_batch(samples.__getitems__(_some(samples, DIGESTED, 0))):
        made.update(values.numpy().tobytes())
    return made.hexdigest()[:16]


def _some(samples: Samples, of_arrays: int, of_items: int) -> list[int]:
    """Return indices of samples, evenly chosen, the first and the last among them."""
    most = of_arrays if isinstance(samples, ArraySamples) else of_items
    return sorted({round(index) for index in np.linspace(0, len(samples) - 1, min(most, len(samples))).tolist()})
