# SPDX-License-Identifier: MIT
"""The sampling loop with denoisers whose answer is known: a fixed image, and the exact one of Gaussian data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmfast.errors import CmfastError
from cmfast.sampling import renoise_std, sample, to_uint8
from cmfast.spec import RENOISES, ModelSpec
from cmfast_train.data.images import to_unit_range
from helpers.specs import image_spec

Floats = npt.NDArray[np.floating[Any]]
SCHEDULES = [(80.0,), (80.0, 0.8), (80.0, 24.0, 5.0, 0.8)]


def spec(**values: Any) -> ModelSpec:
    return image_spec(**{"image": (3, 4, 4), **values})


def unit_noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("sigmas", SCHEDULES)
def test_a_perfect_denoiser_returns_the_data_point_whatever_the_steps(sigmas: tuple[float, ...]) -> None:
    target = np.full([2, 3, 4, 4], 0.25, np.float32)
    x0 = sample(lambda x, sigma: target, unit_noise(len(sigmas), 2, 3, 4, 4), sigmas, spec())
    np.testing.assert_array_equal(x0, target)


@pytest.mark.parametrize("renoise", ["sqrt", "plain"])
def test_the_denoiser_is_called_once_a_level_on_x0_plus_the_noise_of_that_level(renoise: str) -> None:
    model, sigmas, noise = spec(renoise=renoise), (80.0, 5.0, 0.8), unit_noise(3, 2, 3, 4, 4)
    calls = []

    def denoise(x: Floats, sigma: float) -> Floats:
        calls.append((x, sigma))
        return np.full_like(x, len(calls) / 10)

    sample(denoise, noise, sigmas, model)
    assert [sigma for _, sigma in calls] == list(sigmas)
    np.testing.assert_array_equal(calls[0][0], np.float32(80) * noise[0])
    for i, sigma in ((1, 5.0), (2, 0.8)):
        std = (sigma**2 - 0.002**2) ** 0.5 if renoise == "sqrt" else sigma
        np.testing.assert_array_equal(calls[i][0], np.float32(i / 10) + std * noise[i])
        assert calls[i][0].dtype == np.float32


def gaussian_denoiser(s: float, sigma_min: float) -> Callable[[Any, float], Any]:
    """The exact consistency function of data N(0, s^2): the probability-flow ODE only rescales x."""
    return lambda x, sigma: x * ((s**2 + sigma_min**2) / (s**2 + sigma**2)) ** 0.5


def output_variance(sigmas: tuple[float, ...], model: ModelSpec, s: float) -> float:
    """Return the variance of a sample, exactly: the loop is linear, so image k is the weight of noise k."""
    k = len(sigmas)
    basis = np.eye(k).reshape(k, k, 1, 1, 1)
    return float((sample(gaussian_denoiser(s, model.sigma_min), basis, sigmas, model) ** 2).sum())


@given(
    s=st.floats(0.1, 2),
    levels=st.lists(st.floats(0.01, 79), max_size=4, unique=True),
    sigma_min=st.sampled_from([0.002, 0.009]),
)
def test_samples_of_gaussian_data_have_its_variance_after_any_steps(
    s: float, levels: list[float], sigma_min: float
) -> None:
    sigmas = (80.0, *sorted(levels, reverse=True))
    model = spec(clip=False, sigma_min=sigma_min)
    at_sigma_min = s**2 + sigma_min**2
    first = at_sigma_min * 80**2 / (s**2 + 80**2)  # the start 80 z is the data's marginal but for its own variance
    got = output_variance(sigmas, model, s)
    assert min(first, at_sigma_min) * (1 - 1e-9) <= got <= at_sigma_min * (1 + 1e-9)
    if len(sigmas) == 1:
        assert got == pytest.approx(first, rel=1e-12)


def test_renoising_plainly_makes_the_variance_too_large() -> None:
    sigmas = (80.0, 0.05, 0.04, 0.03, 0.02)
    exact = output_variance(sigmas, spec(clip=False, sigma_min=0.01), 0.05)
    plain = output_variance(sigmas, spec(clip=False, sigma_min=0.01, renoise="plain"), 0.05)
    assert exact < plain  # the test above can fail


@pytest.mark.parametrize(("clip", "second", "image"), [(False, 1.2 + 0.1 * 78.8, 0.1362), (True, 1 + 0.1 * 79, 0.1335)])
def test_ddim_scales_down_the_noise_that_is_there_around_the_clipped_image(
    clip: bool, second: float, image: float
) -> None:
    inputs = []

    def denoise(x: Floats, sigma: float) -> Floats:
        inputs.append(x.item())
        return 0.015 * x

    x0 = sample(denoise, np.ones([2, 1, 1, 1, 1]), (80.0, 8.0), spec(renoise="ddim", clip=clip))
    assert inputs == pytest.approx([80, second], rel=1e-12)
    assert x0.item() == pytest.approx(image, rel=1e-12)


@pytest.mark.parametrize("renoise", RENOISES)
def test_ddim_alone_reads_the_first_slice_of_noise_only(renoise: str) -> None:
    model, noise = spec(renoise=renoise), unit_noise(3, 2, 3, 4, 4)
    other = np.concatenate([noise[:1], -noise[1:]])
    first, second = (sample(lambda x, sigma: np.tanh(x), z, (80.0, 5.0, 0.8), model) for z in (noise, other))
    assert np.array_equal(first, second) == (renoise == "ddim")


@given(sigma=st.floats(0.01, 80), ratio=st.floats(0.01, 1), x0=st.floats(-1, 1), z=st.floats(-4, 4))
def test_a_ddim_step_is_an_euler_step_of_the_flow(sigma: float, ratio: float, x0: float, z: float) -> None:
    after, inputs = sigma * ratio, []
    x = x0 + sigma * z

    def denoise(given: Floats, level: float) -> Floats:
        inputs.append(given.item())
        return np.full_like(given, x0)

    sample(denoise, np.full([2, 1, 1, 1, 1], x / sigma), (sigma, after), spec(renoise="ddim", clip=False))
    t, s = sigma / (1 + sigma), after / (1 + after)
    velocity = z - x0
    z_s = (1 - t) * x - (t - s) * velocity
    assert inputs[1] == pytest.approx(z_s * (1 + after), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("renoise", RENOISES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sigmas", SCHEDULES)
def test_numpy_and_torch_give_the_same_to_the_bit(sigmas: tuple[float, ...], clip: bool, renoise: str) -> None:
    model, noise = spec(clip=clip, renoise=renoise), unit_noise(len(sigmas), 2, 3, 4, 4)
    arrays = sample(lambda x, sigma: x * 0.03 - 0.1, noise, sigmas, model)
    tensors = sample(lambda x, sigma: x * 0.03 - 0.1, torch.from_numpy(noise), sigmas, model)
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, tensors.numpy())


def test_clipping_happens_after_every_call_and_only_when_the_spec_says_so() -> None:
    noise, inputs = unit_noise(2, 2, 3, 4, 4), []

    def far(x: Floats, sigma: float) -> Floats:
        inputs.append(x)
        return np.full_like(x, 7)

    assert (sample(far, noise, (80.0, 0.8), spec(clip=True)) == 1).all()
    np.testing.assert_allclose(inputs[1] - renoise_std(0.8, spec()) * noise[1], 1, atol=1e-6)
    assert (sample(far, noise, (80.0, 0.8), spec(clip=False)) == 7).all()
    np.testing.assert_allclose(inputs[3] - renoise_std(0.8, spec()) * noise[1], 7, atol=1e-6)


@pytest.mark.parametrize("slices", [1, 3])
def test_noise_for_another_number_of_steps_is_an_error(slices: int) -> None:
    with pytest.raises(CmfastError, match=r"noise must be \[2, B, \.\.\.\] for 2 levels, got ndarray of float32"):
        sample(lambda x, sigma: x, unit_noise(slices, 2, 3, 4, 4), (80.0, 0.8), spec())


@given(st.floats(0.0021, 80))
def test_renoising_adds_up_to_the_level(sigma: float) -> None:
    assert renoise_std(sigma, spec()) ** 2 + 0.002**2 == pytest.approx(sigma**2, rel=1e-12)
    assert renoise_std(sigma, spec(renoise="plain")) == sigma


def test_pixels_survive_the_way_to_unit_range_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(to_unit_range(pixels).numpy())[..., 0], pixels[0])


@pytest.mark.parametrize(
    ("x0", "pixel"),
    [
        (-1, 0),
        (1, 255),
        (0, 128),
        (-3, 0),
        (3, 255),
        (-0.998, 0),
        (-0.994, 1),
        (0.994, 254),
        (0.998, 255),
        (np.inf, 255),
    ],
)
def test_a_value_becomes_the_nearest_pixel(x0: float, pixel: int) -> None:
    assert to_uint8(np.full([1, 1, 1, 1], x0, np.float32)).item() == pixel


@given(hnp.arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-2, 2, width=32)))
def test_pixels_are_channels_last_and_within_half_a_level(x0: npt.NDArray[np.float32]) -> None:
    pixels = to_uint8(x0)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    exact = (x0.clip(-1, 1).astype(np.float64) + 1) * 127.5
    assert np.abs(pixels.transpose(0, 3, 1, 2) - exact).max() <= 0.5 + 2e-5  # float32 has steps of 1.5e-5 at 255
