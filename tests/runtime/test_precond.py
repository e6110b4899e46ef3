# SPDX-License-Identifier: MIT
"""Preconditioning against golden values, and against what each convention says of itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast.preconditioning import (
    boundary_scalings,
    cloneofsimo_scalings,
    edm_scalings,
    flow_scalings,
    noise_condition,
    scalings,
)
from cmfast.schedule import DiscreteTimes
from cmfast.spec import C_NOISES, SCALINGS, ModelSpec
from helpers.specs import image_spec

# sigma, EDM c_skip, c_out, c_in, boundary c_skip, c_out, 250 ln sigma; sigma_data 0.5, sigma_min 0.002.
GOLDEN = np.array(
    [
        (0.002, 0.999984, 0.001999984, 1.999984, 1, 0, -1553.65202),
        (0.01, 0.99960016, 0.0099980006, 1.99960012, 0.999744066, 0.00799840048, -1151.29255),
        (0.1, 0.961538462, 0.0980580676, 1.96116135, 0.963005193, 0.0960969062, -575.646273),
        (0.5, 0.5, 0.353553391, 1.41421356, 0.502004, 0.352139177, -173.286795),
        (0.661, 0.36394287, 0.39876595, 1.20655355, 0.365346985, 0.397559396, -103.50036),
        (0.821, 0.270550766, 0.427039001, 1.04028989, 0.271514541, 0.425998711, -49.3080424),
        (1, 0.2, 0.447213595, 0.894427191, 0.20064141, 0.446319168, 0),
        (1.526, 0.0969489769, 0.475144984, 0.622732613, 0.0971788589, 0.474522251, 105.662483),
        (2, 0.0588235294, 0.48507125, 0.48507125, 0.0589344093, 0.484586179, 173.286795),
        (5, 0.0099009901, 0.497518595, 0.199007438, 0.00990883711, 0.497319588, 402.359478),
        (10, 0.00249376559, 0.499376169, 0.0998752339, 0.0024947609, 0.499276294, 575.646273),
        (80, 3.90609742e-05, 0.499990235, 0.0124997559, 3.90629272e-05, 0.499977735, 1095.50666),
    ]
)
SIGMA = GOLDEN[:, 0]
LEVELS = np.geomspace(0.002, 80, 200)


def spec(**values: Any) -> ModelSpec:
    return image_spec(**{"image": (1, 8, 8), "sigmas": {}, "times": DiscreteTimes(), **values})


def test_scalings_have_their_golden_values() -> None:
    nine_digits = {"rtol": 5e-9, "atol": 1e-18}  # the table has nine
    np.testing.assert_allclose(np.transpose(edm_scalings(SIGMA, 0.5)), GOLDEN[:, 1:4], **nine_digits)
    c_skip, c_out, c_in = boundary_scalings(SIGMA, 0.5, 0.002)
    np.testing.assert_allclose(c_skip, GOLDEN[:, 4], **nine_digits)
    np.testing.assert_allclose(c_out, GOLDEN[:, 5], **nine_digits)
    np.testing.assert_allclose(c_in, GOLDEN[:, 3], **nine_digits)
    np.testing.assert_allclose(noise_condition(SIGMA, spec(), np), GOLDEN[:, 6], rtol=5e-9)


@pytest.mark.parametrize(
    ("scaling", "sigma_data"), [("boundary", 0.5), ("boundary", 1.0), ("cloneofsimo", 0.5), ("ctm", 0.5)]
)
@pytest.mark.parametrize("sigma_min", [0.002, 0.003])
def test_the_model_is_the_identity_at_sigma_min_in_every_number_type(
    scaling: str, sigma_min: float, sigma_data: float
) -> None:
    model = spec(scaling=scaling, sigma_min=sigma_min, sigma_data=sigma_data)
    for sigma in (sigma_min, np.float32(sigma_min), np.full(3, sigma_min, np.float32), torch.full([3], sigma_min)):
        c_skip, c_out, _ = scalings(sigma, model)
        np.testing.assert_array_equal(np.asarray(c_skip), 1.0)
        np.testing.assert_array_equal(np.asarray(c_out), 0.0)


@pytest.mark.parametrize("scaling", ["edm", "trigflow"])
def test_a_diffusion_denoiser_is_not_the_identity_at_sigma_min(scaling: str) -> None:
    c_skip, c_out, _ = scalings(0.002, spec(scaling=scaling))
    assert c_skip < 1
    assert c_out != 0


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.1, 2), sigma_min=st.floats(1e-4, 1e-3))
def test_the_network_sees_unit_variance(sigma: float, sigma_data: float, sigma_min: float) -> None:
    for _, _, c_in in (edm_scalings(sigma, sigma_data), boundary_scalings(sigma, sigma_data, sigma_min)):
        assert c_in**2 * (sigma**2 + sigma_data**2) == pytest.approx(1, rel=1e-12)


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.1, 2))
def test_the_edm_network_is_requested_unit_variance(sigma: float, sigma_data: float) -> None:
    c_skip, c_out, _ = edm_scalings(sigma, sigma_data)
    # EDM, eq. 119: the effective target (x0 - c_skip x) / c_out has variance 1.
    assert ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1, rel=1e-9)


@given(sigma=st.floats(1e-3, 1e3), x=st.floats(-3, 3), out=st.floats(-3, 3), sigma_data=st.floats(0.1, 2))
def test_trigflow_is_its_rotated_formula(sigma: float, x: float, out: float, sigma_data: float) -> None:
    c_skip, c_out, c_in = scalings(sigma, spec(scaling="trigflow", sigma_data=sigma_data))
    t = math.atan(sigma / sigma_data)
    rotated = math.cos(t) * x  # x_t = cos t x0 + sin t sigma_data z, where x = x0 + sigma z
    assert c_skip * x + c_out * out == pytest.approx(
        math.cos(t) * rotated - math.sin(t) * sigma_data * out, rel=1e-9, abs=1e-12
    )
    assert c_in * x == pytest.approx(rotated / sigma_data, rel=1e-9, abs=1e-12)


def test_a_flow_has_its_golden_values() -> None:
    sigma = np.array([0.0, 0.25, 1.0, 3.0, 80.0])
    c_skip, c_out, c_in = flow_scalings(sigma)
    np.testing.assert_allclose(c_skip, [1, 0.8, 0.5, 0.25, 1 / 81], rtol=1e-15)
    np.testing.assert_allclose(c_out, [0, -0.2, -0.5, -0.75, -80 / 81], rtol=1e-15)
    np.testing.assert_array_equal(c_in, c_skip)
    np.testing.assert_array_equal(noise_condition(sigma, spec(c_noise="flow"), np), -c_out)


@given(sigma=st.floats(1e-3, 1e3), x0=st.floats(-1, 1), z=st.floats(-4, 4), sigma_data=st.floats(0.1, 2))
def test_the_exact_velocity_of_one_data_point_gives_that_point_in_every_parametrisation(
    sigma: float, x0: float, z: float, sigma_data: float
) -> None:
    t = math.atan(sigma / sigma_data)
    velocities = {
        "flow": z - x0,  # d/dt of (1 - t) x0 + t z
        "trigflow": math.cos(t) * z - math.sin(t) * x0 / sigma_data,  # d/dt of cos t x0 / sigma_data + sin t z
    }
    for scaling, velocity in velocities.items():
        c_skip, c_out, _ = scalings(sigma, spec(scaling=scaling, sigma_data=sigma_data))
        # c_skip x and c_out F, of the size of z each, cancel: a few roundings of 1e-16
        assert c_skip * (x0 + sigma * z) + c_out * velocity == pytest.approx(x0, abs=1e-14)


@given(sigma=st.floats(1e-3, 1e3), x=st.floats(-3, 3), out=st.floats(-3, 3))
def test_a_flow_is_its_formula_at_the_time_that_its_network_is_told(sigma: float, x: float, out: float) -> None:
    model = spec(scaling="flow", c_noise="flow", sigma_data=2.0)
    c_skip, c_out, c_in = scalings(sigma, model)
    t = noise_condition(sigma, model, np)
    assert t / (1 - t) == pytest.approx(sigma, rel=1e-12)  # 1 - t has lost three digits at sigma 1000
    z_t = (1 - t) * x
    assert c_in * x == pytest.approx(z_t, rel=1e-12)
    assert c_skip * x + c_out * out == pytest.approx(z_t - t * out, rel=1e-12, abs=1e-12)


def test_the_seed_has_half_of_c_out_and_no_c_in() -> None:
    right_skip, right_out, _ = boundary_scalings(LEVELS, 0.5, 0.002)
    c_skip, c_out, c_in = cloneofsimo_scalings(LEVELS, 0.002)
    np.testing.assert_allclose(c_skip, right_skip, rtol=1e-14)
    np.testing.assert_allclose(c_out, right_out / 2, rtol=1e-14)
    np.testing.assert_array_equal(c_in, np.ones_like(LEVELS))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("c_noise", C_NOISES)
def test_floats_numpy_and_torch_agree(scaling: str, c_noise: str) -> None:
    model = spec(scaling=scaling, c_noise=c_noise)
    arrays = (*scalings(LEVELS, model), noise_condition(LEVELS, model, np))
    tensors = (*scalings(torch.from_numpy(LEVELS), model), noise_condition(torch.from_numpy(LEVELS), model, torch))
    floats = [(*scalings(float(s), model), noise_condition(float(s), model, np)) for s in LEVELS]
    for array, tensor, numbers in zip(arrays, tensors, zip(*floats, strict=True), strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-14)  # logarithms may differ in their last bit
        np.testing.assert_allclose(numbers, array, rtol=1e-14)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_float32_is_enough(scaling: str) -> None:
    model = spec(scaling=scaling)
    exact, single = scalings(LEVELS, model), scalings(torch.from_numpy(LEVELS).float(), model)
    for want, got in zip(exact, single, strict=True):
        assert got.dtype == torch.float32
        # A few roundings of 6e-8; sigma - sigma_min cancels near sigma_min, which the absolute part allows. What LCM
        # has of the time moves with its logarithm, which rounds at 1e-4 of a step.
        room = 1e-3 if scaling.startswith("lcm") else 1e-6
        np.testing.assert_allclose(got.numpy(), want, rtol=room, atol=room * 1e-3)
    # 250 ln sigma reaches 1554, where float32 has steps of 1.2e-4.
    c_noise = noise_condition(torch.from_numpy(LEVELS).float(), model, torch)
    np.testing.assert_allclose(c_noise.numpy(), 250 * np.log(LEVELS), atol=2.5e-4)


@pytest.mark.parametrize(
    ("c_noise", "at_one", "at_eighty"),
    [
        ("250ln", 0, 1095.50666), ("ln/4", 0, 1.09550666), ("raw", 1, 80), ("trig", math.atan(2), 1.564546),
        ("flow", 0.5, 0.987654321),
    ],
)  # fmt: skip
def test_each_noise_condition_is_what_its_name_says(c_noise: str, at_one: float, at_eighty: float) -> None:
    got = noise_condition(np.array([1.0, 80.0]), spec(c_noise=c_noise), np)
    np.testing.assert_allclose(got, [at_one, at_eighty], rtol=1e-6)
