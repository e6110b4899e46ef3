# SPDX-License-Identifier: MIT
"""Training images: what they hold, the order they come in, and what is said when they are not there.

The real sets are read from CMFAST_DATA, the folder that --data names; what is not there is skipped by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmfast.errors import CmfastError, MissingDependency
from cmfast_train.config import TrainConfig, override
from cmfast_train.data import FolderImages, Images, batches, load_data, to_unit_range
from cmfast_train.presets import PRESETS

EVERYTHING = slice(None)


def data_root(*path: str) -> Path:
    root = Path(os.environ.get("CMFAST_DATA", ""))
    if "CMFAST_DATA" not in os.environ or not root.joinpath(*path).exists():
        pytest.skip(f"{'/'.join(path)} is not in CMFAST_DATA")
    return root


def counting(n: int) -> Images:
    """Images that say their own number."""
    numbers = torch.arange(n)
    return Images(numbers.to(torch.uint8).reshape(n, 1, 1, 1), numbers, 0)


def order(
    n: int, batch: int, seed: int, start: int, stop: int, share: slice = EVERYTHING, workers: int = 0
) -> list[list[int]]:
    stream = batches(counting(n), batch, seed, start, stop, share, workers, False)
    return [labels.tolist() for _, labels in stream]


# Data sets.


def test_digits_are_1797_labelled_images_of_seventeen_greys() -> None:
    data = load_data(PRESETS["digits"], None)
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((1797, 1, 8, 8), torch.uint8, 10)
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.images.unique().tolist() == [round(grey / 16 * 255) for grey in range(17)]
    assert data.labels[:3].tolist() == [0, 1, 2]


def test_mnist_is_padded_to_32_pixels() -> None:
    data = load_data(PRESETS["mnist"], data_root("MNIST", "raw", "train-images-idx3-ubyte"))
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((60_000, 1, 32, 32), torch.uint8, 10)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(data.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.images[:, :, 2:-2, 2:-2].float().mean().item() == pytest.approx(33.3184, abs=1e-3)
    assert data.images.sum() == data.images[:, :, 2:-2, 2:-2].sum()  # the border is black


def test_cifar10_has_its_published_means() -> None:
    data = load_data(PRESETS["cifar10"], data_root("cifar-10-batches-py"))
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((50_000, 3, 32, 32), torch.uint8, 10)
    assert torch.bincount(data.labels).tolist() == [5000] * 10
    assert data.images.is_contiguous()
    means = data.images.double().mean(dim=(0, 2, 3))
    np.testing.assert_allclose(means, [125.307, 122.950, 113.865], atol=1e-3)


def test_pixels_go_to_the_unit_range() -> None:
    unit = to_unit_range(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert unit.dtype == torch.float32
    assert unit.tolist() == [-1, 1, pytest.approx(-0.6)]


# A folder of images.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; every file another size, mode and format. The middle is white, the margin black."""
    files = [
        ("a/1.jpg", "RGB", (16, 32)), ("a/2.png", "L", (24, 16)), ("a/3.bmp", "1", (9, 9)),
        ("b/1.png", "RGB", (8, 8)), ("b/2.png", "RGBA", (8, 12)), ("b/3.png", "P", (16, 16)),
    ]  # fmt: skip
    for name, mode, size in files:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image, side = Image.new("L", size), min(size)
        image.paste(255, tuple((length + sign * side) // 2 for sign in (-1, 1) for length in size))
        image.convert(mode).save(path)
    return tmp_path / "photos"


def folder_config(**values: Any) -> TrainConfig:
    return dataclasses.replace(PRESETS["folder"], **{"image_size": 8, "workers": 0, **values})


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_gives_the_middle_of_every_image_and_its_class(channels: int, folder: Path) -> None:
    data = load_data(folder_config(channels=channels), folder)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes) == (6, 2)
    images, labels = data.__getitems__(list(range(6)))
    assert (images.shape, images.dtype) == ((6, channels, 8, 8), torch.uint8)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]  # classes in the order of their names
    assert images[:, :, 2:-2, 2:-2].min() >= 250  # resizing rings a little at the edge, JPEG everywhere


def test_a_folder_is_read_the_same_by_other_processes(folder: Path) -> None:
    data = load_data(folder_config(), folder)
    here = list(batches(data, 4, 0, 0, 3, EVERYTHING, 0, False))
    there = list(batches(data, 4, 0, 0, 3, EVERYTHING, 1, False))
    for (images, labels), (other_images, other_labels) in zip(here, there, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "cut", "bytes"])
def test_a_damaged_image_is_named_in_one_line_whoever_reads_it(damage: str, workers: int, folder: Path) -> None:
    whole = (folder / "a" / "2.png").read_bytes()
    damaged = {"text": b"not an image", "cut": whole[: len(whole) // 2], "bytes": whole[:40] + b"\xff" * 8 + whole[48:]}
    (folder / "a" / "2.png").write_bytes(damaged[damage])
    data = load_data(folder_config(), folder)
    with pytest.raises(CmfastError, match=r"^cannot read the image .*a/2\.png: ") as raised:
        list(batches(data, 6, 0, 0, 1, EVERYTHING, workers, False))
    assert "\n" not in str(raised.value)


def test_a_folder_whose_first_image_is_damaged_is_no_bug(folder: Path) -> None:
    (folder / "a" / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(CmfastError, match=r"cannot read the image .*a/1\.jpg: "):
        load_data(folder_config(), folder)


def test_a_folder_without_classes_or_images_is_no_data(tmp_path: Path) -> None:
    for name in ("empty", "class"):
        (tmp_path / "root" / name).mkdir(parents=True)
    for root in (tmp_path / "root" / "empty", tmp_path / "root"):
        with pytest.raises(CmfastError, match=rf"{root} is no folder of images by class \(ROOT/class/name.png\)"):
            load_data(folder_config(), root)


# What is said when the data are not there.


@pytest.mark.parametrize(("name", "place"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")])
def test_a_missing_set_is_named_with_the_place_for_it_and_nothing_is_fetched(
    name: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(
        CmfastError, match=rf"{name} was not found in {tmp_path}/{place} .*--set download=true"
    ) as raised:
        load_data(PRESETS[name], tmp_path)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10", "folder"])
def test_a_set_without_a_folder_asks_for_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=f"the data set {name} is read from a folder: --data DIR, or CMFAST_DATA=DIR"):
        load_data(PRESETS[name], None)
    with pytest.raises(CmfastError, match=r"the data folder .*nowhere does not exist"):
        load_data(PRESETS[name], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "package"), [("digits", "sklearn"), ("mnist", "torchvision"), ("folder", "torchvision")]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does to say "not importable"
    with pytest.raises(MissingDependency, match=r"not installed: pip install 'cmfast\[train\]'"):
        load_data(PRESETS[name], folder)


def test_images_of_another_size_are_refused() -> None:
    config = override(PRESETS["digits"], ["image_size=16"])
    with pytest.raises(CmfastError, match=r"the images are \[1, 8, 8\], the run says \[1, 16, 16\]: --set image_size"):
        load_data(config, None)


# The order.


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 99),
    start=st.integers(0, 9),
    length=st.integers(0, 6),
)
def test_the_order_is_a_function_of_the_step(n: int, batch: int, seed: int, start: int, length: int) -> None:
    whole = order(n, batch, seed, 0, start + length)
    assert order(n, batch, seed, start, start + length) == whole[start:]


@given(n=st.integers(1, 40), batch=st.integers(1, 16), seed=st.integers(0, 99), epochs=st.integers(1, 4))
def test_every_epoch_has_every_image_once(n: int, batch: int, seed: int, epochs: int) -> None:
    flat = list(itertools.chain(*order(n, batch, seed, 0, -(-n * epochs // batch))))
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    (first,), (second,) = order(200, 200, 0, 0, 1), order(200, 200, 0, 1, 2)
    assert list(range(200)) != first != second
    assert order(200, 200, 1, 0, 1) != [first]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_batch_without_overlap(processes: int) -> None:
    each = 8 // processes
    shares = [order(30, 8, 3, 0, 5, slice(i * each, (i + 1) * each)) for i in range(processes)]
    together = [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == order(30, 8, 3, 0, 5)
