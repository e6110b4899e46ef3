# SPDX-License-Identifier: MIT
"""Tables of times, and what networks of DDPM and LCM predict, against diffusers' own schedulers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cmfast
from cmfast import CmfastError, DiscreteTimes, ModelSpec
from cmfast.formats.manifest import Manifest
from cmfast.preconditioning import discrete_time, noise_condition, prediction_scalings, scalings

diffusers = pytest.importorskip("diffusers")

TABLES = [
    DiscreteTimes(), DiscreteTimes(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DiscreteTimes(schedule="squaredcos_cap_v2", steps=100), DiscreteTimes(steps=50, beta_start=0.001, beta_end=0.3),
]  # fmt: skip
PREDICTIONS = {"vp_eps": "epsilon", "vp_v": "v_prediction", "vp_x0": "sample"}


def scheduler(kind: str, times: DiscreteTimes, **values: Any) -> Any:
    return getattr(diffusers, kind)(
        num_train_timesteps=times.steps, beta_schedule=times.schedule, beta_start=times.beta_start,
        beta_end=times.beta_end, **values,
    )  # fmt: skip


def spec_of(times: DiscreteTimes, scaling: str, **values: Any) -> ModelSpec:
    ends = {"sigma_min": times.sigmas[0] / 2, "sigma_max": times.sigmas[-1], "sigmas": {1: (times.sigmas[-1],)}}
    usual = {"shape": (2, 3), "scaling": scaling, "c_noise": "discrete", "times": times, "clip": False}
    return ModelSpec(**{**usual, **ends, **values})


def network(x: Any, time: Any) -> Any:
    """Some function of its arguments, of numpy and torch alike."""
    return 0.3 * x * (x + 1) / (1 + x * x) + time / 1000 - 0.2


def denoiser(spec: ModelSpec) -> Any:
    def denoise(x: Any, sigma: float) -> Any:
        levels = np.full(1, sigma)  # float64: the reference rounds at 1e-7 itself
        c_skip, c_out, c_in = (each[0] for each in scalings(levels, spec))
        return c_skip * x + c_out * network(c_in * x, noise_condition(levels, spec, np)[0])

    return denoise


@pytest.mark.parametrize("times", TABLES, ids=lambda each: each.schedule)
def test_a_table_has_the_noise_levels_of_diffusers(times: DiscreteTimes) -> None:
    a = scheduler("DDPMScheduler", times).alphas_cumprod.double().numpy()
    # diffusers multiplies a thousand factors in float32: 1e-4 of the last ones, which are near 0.
    np.testing.assert_allclose(times.sigmas, np.sqrt((1 - a) / a), rtol=2e-4)
    assert list(times.sigmas) == sorted(times.sigmas)


@pytest.mark.parametrize("times", TABLES, ids=lambda each: each.schedule)
def test_the_time_of_a_level_in_the_table_is_its_index_and_between_two_between(times: DiscreteTimes) -> None:
    sigmas = np.array(times.sigmas)
    np.testing.assert_allclose(discrete_time(sigmas, times), np.arange(times.steps), atol=1e-9)
    middle = np.sqrt(sigmas[1:] * sigmas[:-1])
    np.testing.assert_allclose(discrete_time(middle, times), np.arange(times.steps - 1) + 0.5, atol=1e-9)
    beyond = np.array([sigmas[0] / 9, sigmas[-1] * 9])
    np.testing.assert_array_equal(discrete_time(beyond, times), [0, times.steps - 1])
    for time in (0, 0.25, times.steps - 1):
        assert float(discrete_time(np.array([times.sigma(time)]), times)[0]) == pytest.approx(time, abs=1e-6)
    single = discrete_time(torch.tensor(times.sigmas), times)
    np.testing.assert_allclose(single, np.arange(times.steps), atol=2e-3)  # ln of float32, over steps of 0.003 and more


@pytest.mark.parametrize("scaling", PREDICTIONS)
@pytest.mark.parametrize("times", TABLES[:2], ids=lambda each: each.schedule)
def test_ddim_steps_are_those_of_diffusers(scaling: str, times: DiscreteTimes) -> None:
    theirs = scheduler("DDIMScheduler", times, prediction_type=PREDICTIONS[scaling], clip_sample=False)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(5)
    steps = [int(t) for t in theirs.timesteps]
    sigmas = [times.sigma(t) for t in steps]
    z = torch.randn(5, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x: Tensor = z[0] * sigmas[0] / math.sqrt(1 + sigmas[0] ** 2)  # x_t, where the data are small beside the noise
    for t in steps:
        x = theirs.step(network(x, t), t, x, eta=0.0).prev_sample
    spec = spec_of(times, scaling, renoise="ddim")
    ours = cmfast.sample(denoiser(spec), z.numpy(), sigmas, spec)
    np.testing.assert_allclose(ours, x, rtol=2e-3, atol=2e-4)  # their table rounds at 1e-4


@pytest.mark.parametrize(("scaling", "kind"), [("lcm_eps", "epsilon"), ("lcm_v", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_latent_consistency_steps_are_those_of_diffusers(scaling: str, kind: str, steps: int) -> None:
    times = TABLES[1]
    theirs = scheduler("LCMScheduler", times, prediction_type=kind, clip_sample=False)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(steps)
    sigmas = times.lcm_sigmas(steps)
    np.testing.assert_allclose([times.sigma(int(t)) for t in theirs.timesteps], sigmas, rtol=1e-9)
    z = torch.randn(steps, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x: Tensor = z[0] * sigmas[0] / math.sqrt(1 + sigmas[0] ** 2)
    noise = iter(z[1:])
    drawn, module = None, __import__("diffusers.schedulers.scheduling_lcm", fromlist=["randn_tensor"])
    original = module.randn_tensor
    module.randn_tensor = lambda *_, **__: next(noise)
    try:
        for t in theirs.timesteps:
            step = theirs.step(network(x, int(t)), int(t), x)
            x, drawn = step.prev_sample, step.denoised
    finally:
        module.randn_tensor = original
    spec = spec_of(times, scaling, renoise="plain")
    ours = cmfast.sample(denoiser(spec), z.numpy(), sigmas, spec)
    assert drawn is not None
    np.testing.assert_allclose(ours, drawn, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("scaling", ["x0", "eps", "vp_x0", "vp_eps", "vp_v"])
def test_a_network_that_predicts_the_truth_gives_the_data(scaling: str) -> None:
    rng, spec = np.random.default_rng(0), ModelSpec(shape=(3,), scaling=scaling)
    x0, eps, sigma = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.array([[0.002], [0.3], [1.0], [9.0], [80.0]])
    alpha = 1 / np.sqrt(1 + sigma**2)
    truth = {"x0": x0, "eps": eps, "v": alpha * (eps - sigma * x0)}[scaling.rpartition("_")[2]]
    c_skip, c_out, c_in = prediction_scalings(sigma, spec)
    x = x0 + sigma * eps
    np.testing.assert_allclose(c_skip * x + c_out * truth, x0, atol=1e-12)
    given = alpha * x0 + sigma * alpha * eps if "vp" in scaling else x
    np.testing.assert_allclose(c_in * x, given, atol=1e-12)


def test_latent_consistency_models_are_the_identity_at_time_0() -> None:
    spec = spec_of(TABLES[1], "lcm_eps", sigma_min=TABLES[1].sigmas[0])
    c_skip, c_out, _ = scalings(np.array([spec.sigma_min]), spec)
    alpha = 1 / math.sqrt(1 + spec.sigma_min**2)
    assert (float(c_skip[0]), float(c_out[0])) == (pytest.approx(alpha, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_a_spec_with_times_survives_its_manifest_and_one_without_is_refused() -> None:
    manifest = Manifest(kind="denoiser", spec=spec_of(TABLES[1], "lcm_eps"))
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    for values in ({"c_noise": "discrete"}, {"scaling": "lcm_v"}, {"times": "linear"}):
        with pytest.raises(CmfastError, match="times"):
            ModelSpec(shape=(3,), **values)  # type: ignore[arg-type]
    for values in ({"schedule": "sigmoid"}, {"steps": 1}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"steps": 10**6}):
        with pytest.raises(CmfastError):
            DiscreteTimes(**values)  # type: ignore[arg-type]
