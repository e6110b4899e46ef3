# SPDX-License-Identifier: MIT
"""cmfast-edit: what it reads and writes, and one line for what a user can get wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import cmfast
from cmfast import editing
from cmfast.cli.edit import TASKS, main
from helpers.graphs import write_denoiser

Call = Callable[..., Any]
Array = npt.NDArray[Any]

RGB = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
MASK = np.random.default_rng(1).random((8, 8)) < 0.5


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a model of 8x8 RGB images, inputs and masks of several kinds; it is the current one."""
    write_denoiser(tmp_path / "model.onnx", {"shape": [3, 8, 8]})
    Image.fromarray(RGB[0]).save(tmp_path / "rgb.png")
    Image.fromarray(RGB[0, ..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(RGB[0, :4, :4]).save(tmp_path / "small.png")
    Image.fromarray(RGB[0]).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(MASK * np.uint8(255)).save(tmp_path / "mask.png")
    Image.fromarray(MASK).save(tmp_path / "bits.png")
    Image.fromarray(~MASK * np.uint8(255)).convert("RGB").save(tmp_path / "holes.png")
    np.save(tmp_path / "mask.npy", MASK)
    np.save(tmp_path / "16bit.npy", RGB.astype(np.uint16))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    np.savez(tmp_path / "both.npz", arr_0=RGB)
    np.savez(tmp_path / "other.npz", images=RGB)
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:60])
    (tmp_path / "photo.jpg").write_bytes(b"")
    for name, image in (("folder/a.png", RGB[0]), ("folder/b.png", RGB[1]), ("uneven/a.png", RGB[0]),
                        ("uneven/b.png", RGB[0, :4])):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(name: str) -> Array:
    with Image.open(name) as image:
        return np.asarray(image)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("mask", [["mask.png"], ["bits.png"], ["mask.npy"], ["holes.png", "--invert-mask"]], ids=str)
def test_a_picture_and_a_mask_are_read_and_one_result_is_a_picture_of_that_size(call: Call, mask: list[str]) -> None:
    result = call(main, "inpaint", "model.onnx", "rgb.png", "--mask", *mask, "--sigmas", "2,0.5", "--seed", 3)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "edited.png: 1 image(s), inpaint, ONNX Runtime cpu\n"
    want = editing.inpaint(cmfast.load("model.onnx"), RGB[0], MASK, sigmas=(2, 0.5), seed=3)
    np.testing.assert_array_equal(picture("edited.png"), want[0])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("source", ["both.npz", "folder"])
def test_several_inputs_give_several_results_in_every_form_of_output(call: Call, source: str) -> None:
    want = editing.sdedit(cmfast.load("model.onnx"), RGB, 5)
    for out in ("out.npz", "out", "grid.png"):
        result = call(main, "sdedit", "model.onnx", source, "--sigma", 5, "-o", out, "--compare", "compare.png")
        assert (result.returncode, result.stderr) == (0, "")
    with np.load("out.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], want)
    assert sorted(os.listdir("out")) == ["000000.png", "000001.png"]
    np.testing.assert_array_equal(picture("out/000001.png"), want[1])
    compared = picture("compare.png")
    assert compared.shape == (2 * 50 + 2, 2 * 50 + 2, 3)  # 8 pixels shown as 48
    np.testing.assert_array_equal(compared[52:100:6, 2:50:6], RGB[1])
    np.testing.assert_array_equal(compared[52:100:6, 52:100:6], want[1])


@pytest.mark.usefixtures("here")
def test_every_task_draws_what_the_library_draws(call: Call) -> None:
    model, small = cmfast.load("model.onnx"), RGB[0, :4, :4]
    cases: dict[str, tuple[list[Any], Array]] = {
        "inpaint": (["rgb.png", "--mask", "mask.png", "-n", 3], editing.inpaint(model, RGB[0], MASK, n=3)),
        "colorize": (["grey.png", "--steps", 2], editing.colorize(model, RGB[0, ..., 0], steps=2)),
        "upscale": (["small.png", "--steps", 3, "--first", 2], editing.upscale(model, small, steps=3, first=2)),
        "sdedit": (["rgb.png", "--sigma", 2, "--seed", 1], editing.sdedit(model, RGB[0], 2, seed=1)),
        "denoise": (["rgb.png", "--sigma", 0.5], editing.denoise(model, RGB[0], 0.5)),
        "interpolate": (["--between", "3:1,4"], editing.interpolate(model, [(3, 1), 4])),
    }  # fmt: skip
    assert cases.keys() == TASKS.keys()
    for task, (arguments, want) in cases.items():
        compare = [] if task == "interpolate" else ["--compare", f"{task}_compare.png"]
        result = call(main, task, "model.onnx", *arguments, *compare, "-o", f"{task}.npz")
        assert (result.returncode, result.stderr) == (0, ""), task
        with np.load(f"{task}.npz") as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], want)
        if compare:
            assert picture(compare[1]).shape == (50 * len(want) + 2, 2 * 50 + 2, 3), "input and result in a row"
    before = picture("inpaint_compare.png")[2:50:6, 2:50:6]
    np.testing.assert_array_equal(before[MASK], RGB[0][MASK])
    assert set(before[~MASK].ravel()) == {128}, "what is not known is grey"


def test_a_trajectory_is_drawn_between_its_ends(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = [{"name": "state", "kind": "tensor", "shape": [2]}]
    write_denoiser(tmp_path / "policy.onnx", {"shape": [6, 2], "data": "array", "clip": False, "conditions": state})
    ends, mask = np.zeros((6, 2)), np.zeros((6, 1))
    ends[0], ends[-1], mask[[0, -1]] = -1, 2, 1
    np.save("ends.npy", ends)
    np.save("mask.npy", mask)
    result = call(
        main, "inpaint", "policy.onnx", "ends.npy", "--mask", "mask.npy", "--condition", "state=1,2", "-o", "a.npy"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "a.npy: 1 sample(s), inpaint, ONNX Runtime cpu\n"
    drawn = np.load("a.npy")
    assert (drawn[0, 0], drawn[0, -1]) == (pytest.approx([-1, -1]), pytest.approx([2, 2]))
    np.testing.assert_array_equal(
        drawn, editing.inpaint(cmfast.load("policy.onnx"), ends, mask, conditions={"state": [1, 2]})
    )


IN = ["inpaint", "model.onnx"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*IN, "rgb.png"], "inpaint needs --mask FILE, white or 1 where the input is kept"),
        ([*IN, "--mask", "mask.png"], "inpaint needs what to edit: NAME.png, a folder of them, NAME.npy or NAME.npz"),
        ([*IN, "rgb.png", "--mask", "mask.png", "--sigma", "2"], "--sigma is not for inpaint; remove it"),
        ([*IN, "grey.png", "--mask", "mask.png"], "known must be uint8 [8, 8, 3] or floats [3, 8, 8], or N of them"),
        ([*IN, "small.png", "--mask", "mask.png"], "got uint8 [4, 4, 3]"),
        ([*IN, "rgba.png", "--mask", "mask.png"], "rgba.png: has transparent pixels; save it without an alpha channel"),
        ([*IN, "deep.png", "--mask", "mask.png"], "deep.png: its mode is I;16; save it with 8 bits a channel"),
        ([*IN, "broken.png", "--mask", "mask.png"], "broken.png: not a readable PNG"),
        ([*IN, "photo.jpg", "--mask", "mask.png"], "photo.jpg: not read here; need NAME.png, a folder of them, "),
        ([*IN, "none.png", "--mask", "mask.png"], "none.png: no such file"),
        ([*IN, "other.npz", "--mask", "mask.png"], "other.npz: has no array named arr_0"),
        ([*IN, "16bit.npy", "--mask", "mask.png"], "must be uint8 pixels or floats in [-1, 1], got uint16"),
        ([*IN, "uneven", "--mask", "mask.png"], "b.png: height, width and channels are [4, 8, 3], of a.png [8, 8, 3]"),
        ([*IN, "empty", "--mask", "mask.png"], "empty: a folder without PNG files"),
        ([*IN, "rgb.png", "--mask", "rgb.png"], "rgb.png: a mask is black and white, and this picture has colours"),
        ([*IN, "rgb.png", "--mask", "grey.png"], "mask must be black and white"),
        ([*IN, "rgb.png", "--mask", "grey.png", "--invert-mask"], "mask must be black and white"),
        ([*IN, "rgb.png", "--mask", "small.png"], "a mask is black and white"),
        ([*IN, "rgb.png", "--mask", "mask.png", "-o", "model.onnx"], "images are written to NAME.png"),
        ([*IN, "rgb.png", "--mask", "mask.png", "-o", "mask.png"], "mask.png"),
        ([*IN, "rgb.png", "--mask", "mask.png", "--compare", "a.npz"], "--compare writes images side by side"),
        ([*IN, "rgb.png", "--mask", "mask.png", "--encoder", "none.onnx"], "none.onnx: no such file"),
        ([*IN, "rgb.png", "--mask", "mask.png", "--label", "1"], "the model is unconditional"),
        (["denoise", "model.onnx", "rgb.png"], "denoise needs --sigma S, a noise level in data units"),
        (["sdedit", "model.onnx", "rgb.png", "--sigma", "100"], "the first noise level is 100"),
        (["interpolate", "model.onnx"], "interpolate needs --between A,B, two seeds, or A:I,B:J"),
        (["interpolate", "model.onnx", "rgb.png", "--between", "0,1"], "INPUT is not for interpolate; remove it"),
        (["interpolate", "model.onnx", "--between", "0;1"], "seeds such as 0,1 or samples of seeds such as 0:3,0:7"),
        (["paint", "model.onnx", "rgb.png"], "'paint' is not one of 'inpaint', 'colorize'"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_writes_nothing(
    call: Call, refused: Callable[..., None], arguments: list[str], words: str, here: Path
) -> None:
    before = sorted(os.listdir(here))
    refused(call(main, *arguments), words)
    assert sorted(os.listdir(here)) == before
