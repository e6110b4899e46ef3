# SPDX-License-Identifier: MIT
"""Images out: what stands in the grid, the folder and the .npz, read back with other people's code."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmfast.errors import CmfastError
from cmfast.images import check_output, grid_image, save_images

Pixels = npt.NDArray[np.uint8]
BACKGROUND = 32


def some_images(n: int, height: int = 8, width: int = 8, channels: int = 1) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), np.uint8)


def test_an_npz_has_the_images_as_arr_0_and_the_labels_as_arr_1(tmp_path: Path) -> None:
    images, labels = some_images(5, channels=3), np.arange(5)
    save_images(tmp_path / "with.npz", images, labels)
    save_images(tmp_path / "without.npz", images, None)
    with np.load(tmp_path / "with.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], labels)
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    assert zipfile.ZipFile(tmp_path / "without.npz").namelist() == ["arr_0.npy"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_has_one_lossless_png_an_image_in_order(channels: int, tmp_path: Path) -> None:
    images = some_images(12, height=9, width=7, channels=channels)
    save_images(tmp_path / "images", images, None)
    names = sorted(os.listdir(tmp_path / "images"))
    assert names == [f"{i:06d}.png" for i in range(12)]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "images" / name) as opened:
            assert (opened.format, opened.mode) == ("PNG", "L" if channels == 1 else "RGB")
            np.testing.assert_array_equal(np.asarray(opened).reshape(image.shape), image)


@given(n=st.integers(1, 40), height=st.integers(1, 40), width=st.integers(1, 40), channels=st.sampled_from([1, 3]))
def test_a_grid_holds_every_image_in_reading_order(n: int, height: int, width: int, channels: int) -> None:
    images = some_images(n, height, width, channels)
    sheet = np.asarray(grid_image(images))
    sheet = sheet.reshape(*sheet.shape[:2], channels)
    columns = math.ceil(math.sqrt(n))
    scale = (sheet.shape[1] - 2) // columns // width  # the gap of two is less than a pixel of an enlarged image
    scale = next(s for s in range(scale, 0, -1) if (width * s + 2) * columns + 2 == sheet.shape[1])
    assert sheet.shape[0] == (height * scale + 2) * math.ceil(n / columns) + 2
    covered = np.zeros(sheet.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = 2 + i // columns * (height * scale + 2), 2 + i % columns * (width * scale + 2)
        area = np.s_[top : top + height * scale, left : left + width * scale]
        np.testing.assert_array_equal(sheet[area], image.repeat(scale, axis=0).repeat(scale, axis=1))
        covered[area] = True
    assert (sheet[~covered] == BACKGROUND).all()


@pytest.mark.parametrize(("side", "shown"), [(8, 48), (16, 48), (28, 28), (31, 31), (32, 32), (64, 64)])
def test_small_images_are_enlarged_by_a_whole_number(side: int, shown: int) -> None:
    assert grid_image(some_images(1, side, side)).size == (shown + 4, shown + 4)


def test_a_saved_grid_is_the_grid(tmp_path: Path) -> None:
    images = some_images(5, 32, 32, 3)
    save_images(tmp_path / "grid.png", images, np.arange(5))
    with Image.open(tmp_path / "grid.png") as opened:
        assert opened.size == (3 * 34 + 2, 2 * 34 + 2)
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(grid_image(images)))
    assert os.listdir(tmp_path) == ["grid.png"]


def test_an_existing_file_is_replaced_and_an_existing_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("old")
    save_images(tmp_path / "grid.png", some_images(1), None)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    save_images(tmp_path / "images", some_images(1), None)
    with pytest.raises(CmfastError, match="images exists and is not an empty folder; name another or remove it"):
        save_images(tmp_path / "images", some_images(1), None)


def test_where_images_cannot_go_is_said_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").touch()
    for name, words in (
        ("images.jpg", r"NAME.png \(a grid\), NAME.npz, or a folder; got .jpg"),
        ("nowhere/grid.png", "the folder .*nowhere does not exist; make it first: mkdir -p"),
        ("taken.png", "taken.png is a folder; name a file"),
        ("file", "file exists and is not an empty folder"),
    ):
        with pytest.raises(CmfastError, match=words):
            check_output(tmp_path / name)
    assert [check_output(tmp_path / name) for name in ("a.png", "a.npz", "a")] == [".png", ".npz", ""]
