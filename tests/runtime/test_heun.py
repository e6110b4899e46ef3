# SPDX-License-Identifier: MIT
"""The Heun sampler on data whose exact denoiser is known: its order, its churn, and the images of a loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cmfast
from cmfast.errors import CmfastError
from cmfast.noise import gaussian
from cmfast.sampling import Churn, heun, heun_calls, noise_slices, sample, to_uint8
from cmfast.schedule import karras_sigmas
from helpers.specs import image_spec

Floats = npt.NDArray[np.floating[Any]]
S = 0.5  # standard deviation of the Gaussian data, data units
IMAGENET = Churn(s_churn=40, s_tmin=0.05, s_tmax=50, s_noise=1.003)  # arXiv:2206.00364, Table 5


def gaussian_denoiser(x: Floats, sigma: float) -> Floats:
    """The posterior mean of data N(0, S^2)."""
    return x * S**2 / (S**2 + sigma**2)


def two_point_denoiser(x: Floats, sigma: float) -> Floats:
    """The posterior mean of data that are -1 or 1, as likely the one as the other."""
    return np.tanh(x / sigma**2)


def unit_noise(*shape: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal(shape)


def algorithm_2(denoise: Callable[..., Floats], noise: Floats, t: list[float], churn: Churn) -> Floats:
    """The pseudocode of arXiv:2206.00364, line by line; t ends with 0."""
    n, x = len(t) - 1, t[0] * noise[0]
    for i in range(n):
        gamma = min(churn.s_churn / n, 2**0.5 - 1) if churn.s_tmin <= t[i] <= churn.s_tmax else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * (churn.s_noise * noise[i + 1]) if gamma else x
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_next)
    return x


@pytest.mark.parametrize("churn", [Churn(), Churn(s_churn=5), IMAGENET], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 18])
@pytest.mark.parametrize("denoise", [gaussian_denoiser, two_point_denoiser])
def test_it_computes_the_pseudocode_of_the_paper(denoise: Callable[..., Floats], steps: int, churn: Churn) -> None:
    noise, sigmas = unit_noise(steps + 1, 3, 1, 2, 2), karras_sigmas(steps)
    want = algorithm_2(denoise, noise, [*sigmas, 0.0], churn)
    np.testing.assert_allclose(heun(denoise, noise, sigmas, churn=churn), want, rtol=1e-9, atol=1e-9)


def error(steps: int, *, second_order: bool) -> float:
    """Return by what part the image is wrong: the ODE of Gaussian data only rescales x, so the exact one is known."""
    # sigma_min is that small because the closing step, of Euler's, errs by (sigma_min / S)^2 / 2 whatever the steps are
    x = heun(gaussian_denoiser, np.ones([1, 1, 1, 1, 1]), karras_sigmas(steps, 1e-4), second_order=second_order)
    exact = 80.0 * S / (S**2 + 80.0**2) ** 0.5
    return abs(float(x.item() / exact - 1))


def test_halving_the_steps_divides_the_error_by_four_and_that_of_euler_by_two() -> None:
    # 2n - 1 levels halve every step of n; the next order of the error is what is left of the ratio
    for steps in (129, 257):
        assert error(steps, second_order=True) / error(2 * steps - 1, second_order=True) == pytest.approx(4, rel=0.02)
        assert error(steps, second_order=False) / error(2 * steps - 1, second_order=False) == pytest.approx(2, rel=0.01)
    assert error(257, second_order=True) < error(257, second_order=False) / 40


def variance(steps: int, churn: Churn) -> float:
    """Return the variance of an image, exactly: the sampler is linear here, so image k is the weight of noise k."""
    k = noise_slices(steps, churn)
    basis = np.eye(k).reshape(k, k, 1, 1, 1)
    return float((heun(gaussian_denoiser, basis, karras_sigmas(steps), churn=churn) ** 2).sum())


@pytest.mark.parametrize("s_churn", [0.0, 5.0, 20.0, 40.0])
def test_churn_keeps_the_variance_of_the_data(s_churn: float) -> None:
    wrong = [abs(variance(steps, Churn(s_churn=s_churn, s_tmin=0.05, s_tmax=50)) / S**2 - 1) for steps in (128, 256)]
    assert wrong[1] < 0.005  # the solver's own error, which goes down with the steps; that of the churn would not
    assert wrong[1] < wrong[0] / 3


def test_noise_of_another_size_is_seen_in_the_variance() -> None:
    assert variance(256, Churn(s_churn=40, s_noise=1.1)) > 1.1 * S**2  # the test above can fail


def test_churn_draws_either_of_two_points_as_often() -> None:
    number = 4000
    x = heun(two_point_denoiser, unit_noise(33, number, 1, 1, 1), karras_sigmas(32), churn=IMAGENET)
    np.testing.assert_allclose(np.abs(x), 1, atol=1e-3)
    assert abs((x > 0).mean() - 0.5) < 4 * 0.5 / number**0.5  # four standard deviations of so many tosses of a coin


@given(steps=st.integers(1, 40), s_churn=st.floats(0, 200), s_tmin=st.floats(0, 1), s_tmax=st.floats(1, 80))
def test_it_calls_the_network_as_often_as_it_says_and_churns_between_its_limits_only(
    steps: int, s_churn: float, s_tmin: float, s_tmax: float
) -> None:
    churn, called = Churn(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax), []

    def denoise(x: Floats, sigma: float) -> Floats:
        called.append(sigma)
        return gaussian_denoiser(x, sigma)

    sigmas = karras_sigmas(steps)
    heun(denoise, unit_noise(noise_slices(steps, churn), 1, 1, 1, 1), sigmas, churn=churn)
    assert len(called) == heun_calls(steps) == 2 * steps - 1
    assert called[1::2] == list(sigmas[1:])  # the second calls, at the levels themselves
    for level, raised in zip(sigmas, called[::2], strict=True):
        inside = s_tmin <= level <= s_tmax
        assert raised == pytest.approx(level * (1 + min(s_churn / steps, math.sqrt(2) - 1) * inside), rel=1e-12)


def test_the_churn_of_a_step_is_its_own_slice_of_noise() -> None:
    sigmas, noise = karras_sigmas(4), unit_noise(5, 1, 1, 1, 1)
    base = heun(gaussian_denoiser, noise, sigmas, churn=Churn(s_churn=1, s_tmax=sigmas[1]))
    for i in range(5):
        other = noise.copy()
        other[i] += 1
        changed = heun(gaussian_denoiser, other, sigmas, churn=Churn(s_churn=1, s_tmax=sigmas[1]))
        assert (changed != base).any() == (i != 1)  # the first step is above s_tmax


def test_eulers_method_is_the_few_step_loop_without_fresh_noise() -> None:
    sigmas, noise = karras_sigmas(7), unit_noise(7, 2, 1, 2, 2)
    few = sample(two_point_denoiser, noise, sigmas, image_spec(image=(1, 2, 2), renoise="ddim", clip=False))
    np.testing.assert_allclose(heun(two_point_denoiser, noise, sigmas, second_order=False), few, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("churn", [Churn(), IMAGENET], ids=str)
def test_numpy_and_torch_give_the_same_to_the_bit(churn: Churn) -> None:
    noise, sigmas = unit_noise(9, 2, 3, 4, 4).astype(np.float32), karras_sigmas(8)
    arrays = heun(gaussian_denoiser, noise, sigmas, churn=churn)
    tensors = heun(gaussian_denoiser, torch.from_numpy(noise), sigmas, churn=churn)
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, tensors.numpy())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Churn(s_churn=-1), "s_churn must be a number from 0 and s_noise a positive one up to 100, got -1"),
        (lambda: Churn(s_churn=math.nan), "s_churn must be a number"),
        (lambda: Churn(s_noise=1e300), "s_noise a positive one up to 100, got 0 and 1e[+]300"),
        (lambda: Churn(s_noise=0), "s_noise a positive one up to 100, got 0 and 0"),
        (lambda: Churn(s_tmin=2, s_tmax=1), "need 0 <= s_tmin <= s_tmax, got 2 and 1"),
        (lambda: heun_calls(0), "the number of Heun steps must be at least 1, got 0"),
        (lambda: heun(gaussian_denoiser, unit_noise(3, 1, 1, 1, 1), karras_sigmas(3), churn=Churn(s_churn=1)),
         "3 steps need 4 slices of noise, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        make()


# The images of a loaded model, which denoises to 0.01 x.


@pytest.mark.parametrize("churn", [0.0, 3.0, IMAGENET], ids=str)
def test_a_model_draws_from_the_portable_noise_and_its_own_range_of_levels(
    churn: float | Churn, handmade_onnx: Callable[..., Path]
) -> None:
    model = cmfast.load(handmade_onnx(8))
    full = churn if isinstance(churn, Churn) else Churn(s_churn=churn)
    noise = np.stack([gaussian(3, range(5), k, (1, 8, 8)) for k in range(noise_slices(6, full))])
    want = heun(lambda x, sigma: x * np.float32(0.01), noise, karras_sigmas(6), churn=full)
    drawn = model.sample_heun_float(5, steps=6, churn=churn, seed=3)
    np.testing.assert_array_equal(drawn, want)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_an_image_of_a_seed_is_the_same_whatever_the_batch(churn: float, handmade_onnx: Callable[..., Path]) -> None:
    model = cmfast.load(handmade_onnx(8))
    whole = model.sample_heun_float(7, steps=3, churn=churn, seed=1)
    for batch in (1, 2, 64):
        np.testing.assert_array_equal(model.sample_heun_float(7, steps=3, churn=churn, seed=1, batch=batch), whole)
    np.testing.assert_array_equal(model.sample_heun_float(3, steps=3, churn=churn, seed=1, first=4), whole[4:])
    assert (model.sample_heun_float(7, steps=3, churn=churn, seed=2) != whole).any()


def test_one_heun_step_is_one_call_from_the_start_that_few_step_sampling_takes(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    model = cmfast.load(tiny_checkpoint(10))
    once = model.sample_heun_float(4, steps=1, seed=2, label=[1, 2, 3, 4])
    few = model.sample_float(4, steps=1, seed=2, label=[1, 2, 3, 4])
    np.testing.assert_allclose(once.clip(-1, 1), few, rtol=0, atol=1e-4)  # x - (x - x0) at x of 300 loses 3e-5


def test_a_model_clips_nothing_but_pixels(handmade_onnx: Callable[..., Path]) -> None:
    model = cmfast.load(handmade_onnx(8))
    drawn = model.sample_heun_float(5, steps=1)  # 0.8 z
    assert np.abs(drawn).max() > 2
    pixels = model.sample_heun(5, steps=1)
    np.testing.assert_array_equal(pixels, to_uint8(drawn))
    assert {0, 255} <= set(pixels.flat)


def test_a_number_of_steps_or_images_that_cannot_be_is_named(handmade_onnx: Callable[..., Path]) -> None:
    model = cmfast.load(handmade_onnx(8))
    with pytest.raises(CmfastError, match="number of Heun steps must be at least 1, got 0"):
        model.sample_heun(1, steps=0)
    with pytest.raises(CmfastError, match="number of images must be a whole number, at least 1, got 0"):
        model.sample_heun(0)
