# SPDX-License-Identifier: MIT
"""Edits: Algorithm 4 written out beside ours, what is kept, and what is refused with one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper

import cmfast
from cmfast import editing
from cmfast.editing import inpaint
from cmfast.editing.constraints import GREY, averages, luminance
from cmfast.editing.inputs import from_pixels
from cmfast.sampling import renoise_std, to_uint8
from helpers.graphs import MANIFEST, save, value, write_denoiser

Array = npt.NDArray[Any]
Load = Callable[..., cmfast.Model]

RGB = {"shape": [3, 8, 8]}
WAY = {
    "shape": [12, 2],
    "data": "array",
    "clip": False,
    "conditions": [{"name": "state", "kind": "tensor", "shape": [3]}],
}
LEVELS = (80.0, 5.0, 0.8)
# float32 in another order, at values of up to 80 sigma: 80 * 4 * 2**-24 on the way, divided by 1 + sigma in the end.
ROUNDING = 1e-5
random = np.random.default_rng(0)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that writes a denoiser, x / (1 + sigma) and its conditions, and loads it."""

    def load(changes: Mapping[str, Any], batch: int | str = "B") -> cmfast.Model:
        return cmfast.load(write_denoiser(tmp_path / "model.onnx", changes, batch))

    return load


def colours(n: int = 2) -> Array:
    return random.integers(0, 256, (n, 8, 8, 3), np.uint8)


def orthogonal(first: Array) -> Array:
    """Return an orthogonal matrix whose first column points along a vector."""
    matrix = np.eye(len(first))
    matrix[:, 0] = first
    matrix = np.linalg.qr(matrix)[0]
    return matrix if matrix[:, 0] @ first > 0 else -matrix


def algorithm_4(
    model: cmfast.Model,
    y: Array,
    to_a: Callable[[Array], Array],
    from_a: Callable[[Array], Array],
    omega: Array,
    seed: int,
) -> Array:
    """Return what the paper's Algorithm 4 draws at LEVELS: A y is kept where omega is 0; in float64."""
    n, shape = len(y), model.spec.shape
    z = [cmfast.gaussian(seed, range(n), step, shape).astype(np.float64) for step in range(len(LEVELS))]
    y = from_a(to_a(y) * (1 - omega))
    x = y
    for step, sigma in enumerate(LEVELS):
        x = x + z[step] * (sigma if step == 0 else renoise_std(sigma, model.spec))
        x = np.clip(x / (1 + sigma), -1, 1) if model.spec.clip else x / (1 + sigma)
        x = from_a(to_a(y) * (1 - omega) + to_a(x) * omega)
    return x


def test_inpainting_is_algorithm_4_with_a_mask_of_pixels(load: Load) -> None:
    model, known = load(RGB), colours()
    mask = random.random((8, 8)) < 0.4
    drawn = editing.inpaint(model, known, mask, sigmas=LEVELS, seed=3, floats=True)
    given = from_pixels(known)
    want = algorithm_4(model, given, lambda x: x, lambda x: x, 1.0 - mask, 3)
    np.testing.assert_allclose(drawn, want, atol=ROUNDING)
    np.testing.assert_array_equal(drawn[:, :, mask], given[:, :, mask])
    pixels = editing.inpaint(model, known, mask, sigmas=LEVELS, seed=3)
    np.testing.assert_array_equal(pixels, to_uint8(drawn))
    np.testing.assert_array_equal(pixels[:, mask], known[:, mask])
    assert pixels[:, ~mask].std() > 20


def test_colour_from_grey_is_algorithm_4_with_luminance_and_two_differences_to_it(load: Load) -> None:
    model, grey = load({**RGB, "clip": False}), random.uniform(-0.2, 0.2, (2, 1, 8, 8)).astype(np.float32)
    a = np.array([GREY, np.eye(3)[0] - GREY, np.eye(3)[2] - GREY])  # Y, R - Y, B - Y
    omega = np.array([0.0, 1.0, 1.0])[:, None, None]
    any_colours = np.repeat(grey.astype(np.float64), 3, axis=1)  # with this grey

    def to_a(x: Array) -> Array:
        return np.einsum("dc,bchw->bdhw", a, x)

    def from_a(x: Array) -> Array:
        return np.einsum("cd,bdhw->bchw", np.linalg.inv(a), x)

    want = algorithm_4(model, any_colours, to_a, from_a, omega, 4)
    drawn = editing.colorize(model, grey, sigmas=LEVELS, seed=4, floats=True)
    np.testing.assert_allclose(drawn, want, atol=ROUNDING)
    np.testing.assert_allclose(luminance(drawn), grey, atol=1e-6)  # 2**-24 a term


@pytest.mark.parametrize(("changes", "sides"), [(RGB, (3, 4, 2)), (RGB, (3, 1, 1)), (WAY, (3, 2)), (WAY, (4, 1))])
def test_super_resolution_is_algorithm_4_with_an_orthogonal_matrix_of_blocks(
    load: Load, changes: dict[str, Any], sides: tuple[int, ...]
) -> None:
    model = load({**changes, "clip": False, "conditions": []})
    shape = model.spec.shape
    low = random.uniform(-0.2, 0.2, (2, *sides)).astype(np.float32)
    factors = [size // side for size, side in zip(shape, sides, strict=True)]
    split = [part for side, factor in zip(sides, factors, strict=True) for part in (side, factor)]
    outer, inner = range(1, 2 * len(sides), 2), range(2, 2 * len(sides) + 1, 2)
    order = (0, *outer, *inner)
    q = orthogonal(np.ones(int(np.prod(factors))))

    def to_a(x: Array) -> Array:
        return x.reshape(2, *split).transpose(order).reshape(2, *sides, -1) @ q

    def from_a(a: Array) -> Array:
        return (a @ q.T).reshape(2, *sides, *factors).transpose(np.argsort(order)).reshape(2, *shape)

    omega = np.ones(q.shape[0])
    omega[0] = 0
    any_with_it = low
    for axis, factor in enumerate(factors, start=1):
        any_with_it = any_with_it.repeat(factor, axis=axis)
    want = algorithm_4(model, any_with_it.astype(np.float64), to_a, from_a, omega, 5)
    drawn = editing.upscale(model, low, sigmas=LEVELS, seed=5, floats=True)
    np.testing.assert_allclose(drawn, want, atol=ROUNDING)
    np.testing.assert_allclose(averages(drawn, factors), low, atol=1e-6)  # 2**-24 a term


def test_what_is_kept_is_also_kept_of_black_and_white_and_nothing_leaves_the_range(load: Load) -> None:
    model = load(RGB)
    grey = random.choice(np.array([0, 1, 128, 254, 255], np.uint8), (2, 8, 8))
    drawn = editing.colorize(model, grey, sigmas=(2.0, 0.1), floats=True)
    assert np.abs(drawn).max() <= 1
    np.testing.assert_allclose(luminance(drawn), from_pixels(grey[..., None]), atol=1e-5)
    assert np.abs(drawn[:, 0] - drawn[:, 2])[grey == 128].mean() > 0.05, "there are colours"
    rounded = editing.colorize(model, grey, sigmas=(2.0, 0.1)) @ np.array(GREY)
    assert np.abs(rounded - grey).max() <= 0.5 + 1e-9  # of each channel at most 0.5, and the weights add up to 1

    low = random.choice(np.array([0, 1, 128, 254, 255], np.uint8), (2, 4, 4, 3))
    drawn = editing.upscale(model, low, sigmas=(2.0, 0.1), floats=True)
    assert np.abs(drawn).max() <= 1
    np.testing.assert_allclose(averages(drawn, (1, 2, 2)), from_pixels(low), atol=1e-5)
    assert drawn.std(axis=(2, 3)).min() > 0.05


def test_the_start_and_the_goal_of_a_trajectory_are_kept(load: Load) -> None:
    model = load(WAY)
    ends = np.zeros((12, 2), np.float32)
    ends[0], ends[-1] = (-3.0, 0.5), (2.0, 7.0)
    mask = np.zeros((12, 1), bool)
    mask[[0, -1]] = True
    state = np.array([0.1, 0.2, 0.6], np.float32)
    drawn = editing.inpaint(model, ends, mask, n=3, sigmas=(0.8,), seed=1, conditions={"state": state})
    assert (drawn.dtype, drawn.shape) == (np.float32, (3, 12, 2))
    np.testing.assert_array_equal(drawn[:, [0, -1]], np.broadcast_to(ends[[0, -1]], (3, 2, 2)))
    z = cmfast.gaussian(1, range(3), 0, (12, 2))
    np.testing.assert_allclose(drawn[:, 1:-1], (0.8 * z / 1.8 + state.mean())[:, 1:-1], atol=1e-6)  # 2**-24 of 5


@pytest.mark.parametrize("changes", [{**WAY, "second_time": True, "renoise": "ddim"}, {**WAY, "renoise": "plain"}])
def test_flow_maps_and_models_sampled_without_noise_are_edited_with_fresh_noise(
    load: Load, changes: dict[str, Any]
) -> None:
    model = load({**changes, "conditions": []})
    z = cmfast.gaussian(0, [0], 1, (12, 2))
    drawn = editing.upscale(model, np.zeros((1, 1)), sigmas=(80, 0.8))
    first = editing.upscale(model, np.zeros((1, 1)), sigmas=(80,))
    x0 = (first + 0.8 * z) / 1.8
    np.testing.assert_allclose(drawn, x0 - x0.mean(axis=(1, 2), keepdims=True), atol=ROUNDING)


def test_strokes_are_lifted_to_a_noise_level_and_denoised(load: Load) -> None:
    model, guide = load(RGB), colours(1)
    drawn = editing.sdedit(model, guide[0], 5, n=2, steps=1, seed=9, floats=True)
    x = from_pixels(guide) + 5 * cmfast.gaussian(9, range(2), 0, (3, 8, 8))
    np.testing.assert_allclose(drawn, model.denoise(x, 5).clip(-1, 1), atol=1e-6)  # sigma (x / sigma) is x to 2**-23
    assert editing.sdedit(model, guide, 5).dtype == np.uint8


def test_noise_of_a_known_level_is_removed_in_one_call(load: Load) -> None:
    model = load(RGB)
    noisy = random.normal(0, 1.5, (2, 3, 8, 8)).astype(np.float32)
    drawn = editing.denoise(model, noisy, 1.5, floats=True)
    np.testing.assert_allclose(drawn, model.denoise(noisy, 1.5).clip(-1, 1), atol=1e-6)  # as above
    assert not np.array_equal(editing.denoise(model, noisy, 1.5, steps=3, floats=True), drawn)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_ends_of_an_interpolation_are_samples_of_the_seeds(load: Load, steps: int) -> None:
    model = load({"conditions": [{"name": "label", "kind": "class", "classes": 3}]})
    way = editing.interpolate(model, (4, (5, 7), 6), n=5, steps=steps, label=2)
    for index, (seed, first) in {0: (4, 0), 2: (5, 7), 4: (6, 0)}.items():
        np.testing.assert_array_equal(way[index], model.sample(1, seed=seed, first=first, steps=steps, label=2)[0])
    between = editing.interpolate(model, (4, 5), n=3, steps=1, label=2, floats=True, batch=2)[1]
    a, b = (cmfast.gaussian(seed, 0, 0, (1, 4, 4)).astype(np.float64) for seed in (4, 5))
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    halfway = (a + b) / (2 * np.cos(np.arccos(cosine) / 2))
    np.testing.assert_allclose(between, (halfway * 80 / 81 + 2 / 16).clip(-1, 1), atol=1e-6)  # 2**-24 of 4


def test_a_sample_does_not_depend_on_the_batch_or_on_its_neighbours(load: Load) -> None:
    given = {"sigmas": LEVELS, "seed": 2, "floats": True}
    whole = editing.inpaint(load(RGB), colours(1)[0], np.zeros((8, 8)), n=5, **given)
    for changed in ({"n": 5, "batch": 2}, {"n": 2, "first": 3}):
        again = editing.inpaint(load(RGB), colours(1)[0], np.zeros((8, 8)), **given, **changed)
        np.testing.assert_array_equal(again, whole[-len(again) :])
    fixed = editing.inpaint(load(RGB, 2), colours(1)[0], np.zeros((8, 8)), n=5, **given)
    np.testing.assert_array_equal(fixed, whole)


def test_masks_come_in_every_layout_that_is_certain(load: Load) -> None:
    model, known = load(RGB), colours(2)
    mask = random.random((8, 8)) < 0.5
    want = editing.inpaint(model, known, mask, sigmas=[1.0])
    many = np.stack([mask, mask])
    for same in (
        mask.astype(int), mask * np.uint8(255), mask[..., None], many, many[..., None], np.dstack([mask] * 3),
        mask.tolist(), mask.astype(np.float32),
    ):  # fmt: skip
        np.testing.assert_array_equal(editing.inpaint(model, known, same, sigmas=[1.0]), want)
    floats = from_pixels(known)
    for same in (mask, mask[None], many, many[:, None], np.stack([mask] * 3)[None]):
        np.testing.assert_array_equal(editing.inpaint(model, floats, same, sigmas=[1.0]), want)
    two = editing.inpaint(model, known[0], np.stack([mask, ~mask]), sigmas=[1.0])
    np.testing.assert_array_equal(two[0], want[0])
    np.testing.assert_array_equal(two[1][~mask], known[0][~mask])


NO = np.zeros((8, 8))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: inpaint(m, colours()[:, :4], NO), "uint8 [8, 8, 3] or floats [3, 8, 8], or N of"),
        (lambda m: inpaint(m, colours()[..., :1], NO), "got uint8 [2, 8, 8, 1]"),
        (lambda m: inpaint(m, colours().astype(int), NO), "must be uint8 pixels or floats in [-1, 1], got int64"),
        (lambda m: inpaint(m, from_pixels(colours()) * 255, NO), "floats of images are in [-1, 1], got -25"),
        (lambda m: inpaint(m, np.full((3, 8, 8), np.nan), NO), "known must be finite numbers"),
        (lambda m: inpaint(m, "a", NO), "known must be an array of numbers, got 'a'"),
        (lambda m: inpaint(m, colours(), NO[:4]), "mask must be [8, 8, 3] or [8, 8], or N of them, got [4, 8]"),
        (lambda m: inpaint(m, colours(), NO + 0.5), "mask must be black and white: 0 or 1, true or false, 0 or"),
        (lambda m: inpaint(m, colours(), np.uint8(NO + 7)), "it has 7"),
        (lambda m: inpaint(m, colours(), None), "mask must be black and white"),
        (
            lambda m: inpaint(m, from_pixels(colours(3)), np.zeros((3, 8, 8))),
            "can be one a channel or one a sample; pass [1, 3, 8, 8] or [3, 1, 8, 8]",
        ),
        (lambda m: inpaint(m, colours(2), np.zeros((3, 8, 8))), "known is 2 and there are 3 of mask"),
        (lambda m: inpaint(m, colours(2), NO, n=3), "n is 3 and there are 2 of known"),
        (lambda m: inpaint(m, colours(2), NO, n=0), "samples must be a whole number, at least 1, got 0"),
        (lambda m: editing.colorize(m, colours(1)[:, :, :4]), "grey must be uint8 [8, 8] or floats [1, 8, 8], or N"),
        (lambda m: editing.upscale(m, colours(1)), "low has the size of the model's samples, [3, 8, 8]; pass"),
        (lambda m: editing.upscale(m, colours(1)[:, :3, :3]), "low has the shape [3, 3, 3] and the model draws [3, 8"),
        (lambda m: editing.upscale(m, colours(1)[:, :4, :4, :1]), "and the channels must be the same"),
        (lambda m: editing.sdedit(m, colours(1), 81), "the first noise level is 81, but this model was trained for"),
        (lambda m: editing.sdedit(m, colours(1), 0), "the noise level (sigma) must be above 0, got 0"),
        (lambda m: editing.sdedit(m, colours(1), "5"), "the noise level (sigma) must be a finite number, got '5'"),
        (lambda m: editing.denoise(m, colours(1), 0.001), "the first noise level is 0.001"),
        (lambda m: editing.denoise(m, colours(1), 1, steps=0), "number of steps must be a whole number"),
        (lambda m: editing.interpolate(m, [1]), "two or more, such as (0, 1) or ((0, 3), (0, 7)), got [1]"),
        (lambda m: editing.interpolate(m, [1, 1]), "there is no way from seed 1, sample 0, to itself"),
        (lambda m: editing.interpolate(m, [1, 2, 3], n=2), "samples must be a whole number, at least 3, got 2"),
        (lambda m: inpaint(m, colours(1), NO, label=1), "the model is unconditional"),
        (lambda m: inpaint(m, colours(1), NO, sigmas=[80, 90]), "90 follows 80"),
        (lambda m: inpaint(m, colours(1), NO, batch=0), "at least 1, got 0"),
        (lambda m: editing.inpaint("model.onnx", colours(1), NO), "model must be what cmfast.load returns, got str"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(load: Load, edit: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(cmfast.CmfastError) as error:
        edit(load(RGB))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_conditions_are_never_guessed(load: Load) -> None:
    classes = load({"conditions": [{"name": "label", "kind": "class", "classes": 3}]})
    image = np.zeros((4, 4), np.uint8)
    with pytest.raises(cmfast.CmfastError, match="class-conditional; give a label from 0 to 2"):
        editing.inpaint(classes, image, image)
    with pytest.raises(cmfast.CmfastError, match="a model of images with 3 channels; this one draws 1"):
        editing.colorize(classes, image, label=1)
    with pytest.raises(cmfast.CmfastError, match="this model needs the condition state"):
        editing.denoise(load(WAY), np.zeros((12, 2)), 1)
    with pytest.raises(cmfast.CmfastError, match="needs a model of images"):
        editing.colorize(load(WAY), image)


def write_sampler(path: Path) -> Path:
    """Write a sampler of one step that returns its noise."""
    first = helper.make_tensor("first", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(
        [helper.make_node("Squeeze", ["noise", "first"], ["images"])],
        "sampler",
        [value("noise", [1, "B", 1, 4, 4])],
        [value("images", ["B", 1, 4, 4])],
        [first],
    )
    return save(path, graph, MANIFEST | {"kind": "sampler", "sigmas": {"1": [80.0]}})


def test_a_sampler_file_is_refused(tmp_path: Path) -> None:
    model = cmfast.load(write_sampler(tmp_path / "sampler.onnx"))
    assert model.sample(1).shape == (1, 4, 4, 1)
    image = np.zeros((4, 4), np.uint8)
    for edit in (
        lambda: editing.inpaint(model, image, image),
        lambda: editing.upscale(model, image[:2, :2]),
        lambda: editing.sdedit(model, image, 5),
        lambda: editing.denoise(model, image, 5),
        lambda: editing.interpolate(model, (0, 1)),
    ):
        with pytest.raises(cmfast.CmfastError, match=r"this file is a sampler: its loop is fixed, .* --kind denoiser"):
            edit()


def test_a_comparison_has_a_row_for_each_sample(tmp_path: Path) -> None:
    from PIL import Image

    big = random.integers(0, 256, (2, 40, 40, 3), np.uint8)
    small, grey = big[:, :20, :20], big[:1, ..., :1]
    editing.save_comparison(tmp_path / "a.png", small, big, grey)
    with Image.open(tmp_path / "a.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (2 * 42 + 2, 3 * 42 + 2, 3)
    np.testing.assert_array_equal(sheet[44:84, 44:84], big[1])
    np.testing.assert_array_equal(sheet[44:84:2, 2:42:2], small[1])
    np.testing.assert_array_equal(sheet[44:84, 86:126], grey[0].repeat(3, axis=2))
    for columns, words in (
        ((big, big[:, :30]), "do not go together"), ((big.repeat(2, axis=0), big), "do not go together"),
        ((big[0],), r"images must be uint8 \[N, H, W, 1 or 3\]"), ((), "needs images"),
    ):  # fmt: skip
        with pytest.raises(cmfast.CmfastError, match=words):
            editing.save_comparison(tmp_path / "b.png", *columns)
    with pytest.raises(cmfast.CmfastError, match=r"written to NAME\.png"):
        editing.save_comparison(tmp_path / "b.npz", big)
