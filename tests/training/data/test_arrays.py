# SPDX-License-Identifier: MIT
"""Samples that are no images: arrays, files and data sets of one's own, and the errors of those that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmfast.conditions import Condition
from cmfast.errors import ArtifactError, CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.data.arrays import check_spread, samples_of
from cmfast_train.data.batches import batches

N, T, A, S = 12, 4, 2, 3
SPEC = ModelSpec(
    shape=(T, A),
    conditions=(Condition(name="state", shape=(S,)), Condition(name="task", kind="class", classes=5, null=5)),
)


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(0, 0.5, (N, T, A)).astype(np.float32),
        "state": rng.normal(size=(N, S)).astype(np.float32),
        "task": np.arange(N) % 5,
    }


def items(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: array[index] for name, array in values.items()} for index in range(N)]


def npz(values: dict[str, Any], folder: Path) -> Path:
    np.savez(folder / "data.npz", **values)
    return folder / "data.npz"


def npy(values: dict[str, Any], folder: Path) -> Path:
    for name, array in values.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in values.items()}


FORMS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "arrays": lambda values, folder: values,
    "tensors": lambda values, folder: tensors(values),
    "float64": lambda values, folder: {**values, "x": values["x"].astype(np.float64)},
    "torch, float64": lambda values, folder: {**values, "state": torch.from_numpy(values["state"]).double()},
    "read-only": lambda values, folder: {**values, "task": np.broadcast_to(values["task"], N)},
    ".npz": npz,
    "folder of .npy": npy,
    "items": lambda values, folder: items(values),
    "items of tensors": lambda values, folder: items(tensors(values)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(form: str, tmp_path: Path) -> None:
    samples = samples_of(FORMS[form](arrays(), tmp_path), SPEC)
    assert len(samples) == N
    values, steps = tensors(arrays()), (4, 0, 2, 5, slice(1, 3), 0, False)  # epochs of three steps: two of them
    made = list(batches(samples, *steps))
    assert len(made) == 3
    for x, state, task in made:
        assert (x.dtype, state.dtype, task.dtype) == (torch.float32, torch.float32, torch.int64)
        for one, its_state, its_task in zip(x, state, task, strict=True):
            (index,) = (values["x"] == one).all(dim=(1, 2)).nonzero()[:, 0]
            assert torch.equal(values["state"][index], its_state)
            assert values["task"][index] == its_task
    for one, other in zip(batches(samples, *steps, torch.device("cpu")), made, strict=True):  # as a GPU gathers them
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_worker_processes_give_the_same_batches() -> None:
    samples = samples_of(items(arrays()), SPEC)
    whole, made = (list(batches(samples, 4, 0, 0, 3, slice(0, 4), workers, False)) for workers in (0, 1))
    assert all(
        torch.equal(a, b) for one, other in zip(whole, made, strict=True) for a, b in zip(one, other, strict=True)
    )


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {**values, **{name: change(values[name]) for name, change in changes.items()}}


def spoilt(array: Any, value: float) -> Any:
    array = array.copy()
    array[7] = value
    return array


class Table:
    """As a DataFrame: its items are columns."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, name: str) -> Any:
        return {"x": 1}[name]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda v: {"x": v["x"], "task": v["task"]}, r"state is missing, float32 \[B, 3\]; it has 'x', 'task'"),
    "unknown": (lambda v: {**v, "image": v["x"]}, "the model has no condition 'image'; it takes x, state, task"),
    "lengths": (changed(state=lambda a: a[:5]), "different numbers of samples: x 12, state 5, task 12"),
    "shape of x": (changed(x=lambda a: a[:, :3]), r"x must be float32 \[N, 4, 2\], got float32 \[12, 3, 2\]"),
    "shape": (changed(state=lambda a: a[:, :2]), r"state must be float32 \[N, 3\], got float32 \[12, 2\]"),
    "rank": (changed(state=lambda a: a[:, 0]), r"state must be float32 \[N, 3\], got float32 \[12\]"),
    "NaN": (
        changed(x=lambda a: spoilt(a, np.nan)),
        "x has values that are not finite in float32, the first in sample 7",
    ),
    "too large": (changed(state=lambda a: spoilt(a.astype(float), 1e39)), "state has values that are not finite"),
    "whole numbers": (changed(x=lambda a: a.astype(np.int32)), r"x must be float32 \[N, 4, 2\], got int32"),
    "bytes": (changed(x=lambda a: a.astype(np.uint8)), r"x must be float32 \[N, 4, 2\], got uint8"),
    "complex": (changed(x=lambda a: a * 1j), "x must be numbers, got complex64"),
    "texts": (changed(state=lambda a: ["a"] * N), "state must be numbers, got text such as .*'a'"),
    "names of classes": (changed(task=lambda a: ["cat"] * N), r"np.unique\(labels, return_inverse=True\)"),
    "nothing": (changed(x=lambda a: None), "x must be numbers, got object"),
    "ragged": (changed(state=lambda a: [[1, 2, 3], [1]]), "state is not an array: "),
    "no samples": (lambda v: {name: array[:0] for name, array in v.items()}, "x holds no samples"),
    "class of float": (changed(task=lambda a: a.astype(np.float32)), r"task must be whole numbers \[N\], a class each"),
    "class in a row": (changed(task=lambda a: a[:, None]), r"task must be whole numbers \[N\], a class each"),
    "class too large": (changed(task=lambda a: a + 2), "task has the class 6; the model has 0 to 4"),
    "class below 0": (changed(task=lambda a: a - 1), "task has the class -1; the model has 0 to 4"),
    "classes from 1": (
        changed(task=lambda a: a + 1),
        "task has the class 5, which stands for no class; the model has 0 to 4, counted from 0",
    ),
    "no names": (lambda v: v["x"], "data must be a mapping of arrays"),
    "a generator": (lambda v: iter(items(v)), "a Dataset with __len__ and __getitem__, so that a run can be resumed"),
    "tuples": (lambda v: list(zip(v["x"], v["state"], v["task"], strict=True)), "item 0: need {'x': .., ..}, got"),
    "an item": (lambda v: [{"x": v["x"][0]}], "item 0: state is missing"),
    "a table": (lambda v: Table(), r"Table: item 0 cannot be read \(KeyError: 0\).*; need a sequence of"),
    "an empty list": (lambda v: [], "it holds no samples"),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_that_do_not_fit_are_one_line_that_names_the_condition(what: str) -> None:
    wrong, words = WRONG[what]
    with pytest.raises(CmfastError, match=words) as caught:
        samples_of(wrong(arrays()), SPEC)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read_are_one_line_with_their_name(tmp_path: Path) -> None:
    whole = npz(arrays(), tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:300])
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "none.npz": "none.npz does not exist", "cut.npz": "not a whole .npz file", "data.txt": "read from a .npz file",
        "empty": "x is missing, .* it has nothing",
    }.items():  # fmt: skip
        with pytest.raises(CmfastError, match=words):
            samples_of(tmp_path / name, SPEC)
    np.savez(tmp_path / "objects.npz", **{**arrays(), "x": np.array([None] * N)})
    with pytest.raises(ArtifactError, match="Python objects, which are not unpickled"):
        samples_of(tmp_path / "objects.npz", SPEC)


class Damaged:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 7:
            raise OSError("truncated")
        return {name: array[index] for name, array in self.values.items()}


class TooLong(list[Any]):
    def __len__(self) -> int:
        return N + 1


def test_what_is_read_later_is_checked_later(tmp_path: Path) -> None:
    values = arrays()
    values["state"][7, 1] = np.nan
    values["x"] = list(values["x"])
    ragged = [{**item, "x": item["x"][: 3 if index == 7 else 4]} for index, item in enumerate(items(arrays()))]
    for data, words in (
        (Damaged(values), r"Damaged: item 7 cannot be read \(OSError: truncated\) at .*test_arrays.py:\d+"),
        (TooLong(items(arrays())), r"TooLong: item 12 cannot be read \(IndexError: .*; its length is 13"),
        (npy({**values, "x": np.stack(values["x"])}, tmp_path), "state has values that are not finite"),
        (items(values), "state has values that are not finite"),
        (ragged, r"x has different shapes in one batch, \[3, 2\] and \[4, 2\]; pad them to one"),
    ):
        samples = samples_of(data, SPEC)
        stream = batches(samples, len(samples), 0, 0, 1, slice(0, len(samples)), 0, False)
        with pytest.raises(CmfastError, match=words):
            next(stream)


def test_images_may_be_bytes() -> None:
    spec = ModelSpec(shape=(1, 4, 4))
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4)
    (x,) = next(batches(samples_of({"x": pixels}, spec), 2, 0, 0, 1, slice(0, 2), 0, False))
    assert x.dtype == torch.uint8
    assert sorted(x.flatten().tolist()) == list(range(32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x, ""),
        (
            lambda x: 3 * x,
            r"standard deviation 1\.\d+, and the denoiser sigma_data=0.5; train on \(x . 0\.\d+\) / 2.\d+",
        ),
        (lambda x: 0.1 * x, r"pass sigma_data=0\.04\d+ to wrap"),
        (lambda x: x + 2, "x has mean [12]"),
        (lambda x: 0 * x, "x is 0 everywhere"),
    ],
)
def test_data_far_from_sigma_data_are_named(change: Any, words: str) -> None:
    values = arrays()
    said = check_spread(samples_of({**values, "x": change(values["x"])}, SPEC), SPEC)
    assert bool(said) == bool(words)
    assert re.search(words, said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x, ""),
        (lambda x: x * 1.003, ""),  # as a resized image may be
        (lambda x: (x + 1) / 2, r"from 0 to 1, and images are in \[-1, 1\]: train on 2 \* x - 1"),
        (lambda x: 1.5 * x, r'clipped to that and drawn as uint8; .* wrap\(.., data="array"\)'),
        (lambda x: 127.5 * (x + 1), r"from 0 to 255, and images are in \[-1, 1\]"),
    ],
)
def test_float_images_outside_their_range_are_named(change: Any, words: str) -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 1, 4, 4)
    for data in ("image", "array"):
        spec = ModelSpec(shape=(1, 4, 4), data=data)
        said = check_spread(samples_of({"x": change(x)}, spec), spec)
        if data == "array":
            assert "images" not in said
        else:
            assert bool(said) == bool(words), said
            assert re.search(words, said)
