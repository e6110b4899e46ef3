# SPDX-License-Identifier: MIT
"""Every method on Gaussian data, whose denoiser (the exact teacher) and consistency function are known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmfast.conditions import Condition
from cmfast.spec import ModelSpec
from cmfast_train.config.phase import Phase
from cmfast_train.config.phase import phase as new_phase
from cmfast_train.denoiser import Denoiser, denoised
from cmfast_train.methods import find, names
from cmfast_train.methods.distances import distance_of
from cmfast_train.methods.paths import expand
from cmfast_train.methods.step import Step
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.edm import DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.training.ema import update_ema
from cmfast_train.training.parallel import jvp
from cmfast_train.training.step_networks import StepNetworks, Student
from helpers.specs import image_spec

MEAN, STD = 0.3, 0.5  # of the data; a condition, where there is one, is added to the mean
SIGMAS = (0.02, 0.1, 0.5, 1.0, 3.0, 10.0, 80.0)  # where the model is compared with the solution
BATCH = 256


class Affine(nn.Module):
    """F(x, c, offset) = a(c) x + b(c) + d(c) offset: the form of all denoisers and consistency functions here."""

    def __init__(self, two_times: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2 if two_times else 1, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 3)
        )

    def forward(self, x: Tensor, c: Tensor, offset: Tensor | None = None, c_noise_next: Tensor | None = None) -> Tensor:
        two = self.body[0].in_features == 2
        times = (
            torch.stack([c, torch.zeros_like(c) if c_noise_next is None else c_noise_next], 1) if two else c[:, None]
        )
        a, b, d = (expand(values, x) for values in self.body(times).unbind(1))
        return a * x + b + d * moved(x, offset)


class Exact(nn.Module):
    """The denoiser E[x0 | x] of the Gaussian data."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, sigma: Tensor, offset: Tensor | None = None) -> Tensor:
        variance = expand(sigma, x) ** 2
        return (STD**2 * x + variance * (MEAN + moved(x, offset))) / (STD**2 + variance)


def solution(x: Tensor, sigma: float, sigma_min: float, offset: Tensor | None = None) -> Tensor:
    """Return where the probability-flow ODE leads from (x, sigma)."""
    mean = MEAN + moved(x, offset)
    return mean + (x - mean) * math.sqrt((STD**2 + sigma_min**2) / (STD**2 + sigma**2))


def moved(x: Tensor, offset: Tensor | None) -> Tensor | float:
    """Return what a condition [B, 1] adds to the mean of each value of x."""
    return 0.0 if offset is None else expand(offset[:, 0], x)


def samples(spec: ModelSpec, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Return data and their conditions."""
    x0 = MEAN + STD * torch.randn(n, *spec.shape, generator=generator)
    if not spec.conditions:
        return x0, {}
    offset = torch.rand(n, 1, generator=generator) - 0.5
    return x0 + moved(x0, offset), {"offset": offset}


PIXEL: dict[str, Any] = {"shape": (1, 1, 1)}
SEQUENCE: dict[str, Any] = {"shape": (3, 2), "conditions": (Condition(name="offset", shape=(1,)),)}  # [T, A]


def new_student(method: str, kind: dict[str, Any] = PIXEL) -> Student:
    torch.manual_seed(0)
    row = find(method)
    scaling = row.scaling or ("edm" if method == "pd" else "boundary")
    spec = ModelSpec(**kind, data="array", scaling=scaling, c_noise=row.c_noise or "ln/4")
    needs = new_phase(method, 1).needs
    fakes = [Denoiser(Affine(two_times=False), spec) for _ in range(needs.fake_scores)]
    return Student(Denoiser(Affine(row.second_time), spec), needs.log_variance, fakes)


def copy_of(denoiser: Denoiser) -> Denoiser:
    copied = Denoiser(Affine(denoiser.network.body[0].in_features == 2), denoiser.spec)
    copied.load_state_dict(denoiser.state_dict())
    return copied


def train(phase: Phase, steps: int, student: Student, teacher: Any, lr: float, seed: int = 0) -> Denoiser:
    """Train the student by the phase's method with a falling learning rate; return the averaged model."""
    generator = torch.Generator().manual_seed(seed)
    average = copy_of(student.denoiser)
    decay = phase.row.target_decay
    target = copy_of(student.denoiser) if decay is not None else None
    networks = StepNetworks(student, student, target, teacher, phase.needs.finite, [])
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for done in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - done / steps)
        x0, conditions = samples(student.denoiser.spec, BATCH, generator)
        step = Step(
            hyper=phase.hyper,
            spec=student.denoiser.spec,
            networks=networks,
            distance=distance_of(phase.needs, math.prod(x0.shape[1:]), None),
            constants=phase.constants(done, steps),
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            more_noise=torch.randn(phase.needs.noises - 1, *x0.shape, generator=generator),
            uniform=torch.rand(BATCH, 4, generator=generator),
            conditions=conditions,
        )
        loss, sigma = phase.row.function()(step)
        assert loss.shape == sigma.shape == (BATCH,)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average.parameters(), student.denoiser.parameters(), min(0.99, done / (done + 10)))
        if target is not None and decay is not None:
            update_ema(target.parameters(), student.denoiser.parameters(), decay(phase.hyper, done, steps))
    return average.eval().requires_grad_(False)


def worst_error(denoiser: Denoiser, truth: Any, sigmas: tuple[float, ...] = SIGMAS) -> float:
    """Return the largest root mean square error against truth(x, sigma, **conditions), over noise levels."""
    generator, worst = torch.Generator().manual_seed(99), 0.0
    for sigma in sigmas:
        x, conditions = samples(denoiser.spec, 4096, generator)
        x = x + sigma * torch.randn(x.shape, generator=generator)
        error = denoiser(x, torch.full([len(x)], sigma), **conditions) - truth(x, sigma, **conditions)
        worst = max(worst, float(error.square().mean().sqrt()))
    return worst


def phase_of(method: str, **values: Any) -> Phase:
    return new_phase(method, 1, **values)


def exact_of(spec: ModelSpec) -> Any:
    exact = Exact(spec)
    return lambda x, sigma, **conditions: exact(x, torch.full([len(x)], sigma), **conditions)


def solution_of(spec: ModelSpec) -> Any:
    return lambda x, sigma, **conditions: solution(x, sigma, spec.sigma_min, **conditions)


@pytest.mark.parametrize("name", names())
def test_a_row_has_a_step_function_a_paper_and_words_for_each_hyperparameter(name: str) -> None:
    row = find(name)
    assert row.function().__doc__
    assert "arXiv" in row.paper
    assert all(field.metadata["about"] for field in dataclasses.fields(row.hyper))


# What each converges to. Steps and rates are what the error of 0.02 needs, not a recipe.

CONVERGENT: dict[str, tuple[int, float, dict[str, Any]]] = {
    "cd": (3000, 1e-2, {"s0": 40, "s1": 40, "mu0": 0.5}),
    "cmt": (1500, 1e-2, {"steps": 24}),
    "ict": (3000, 1e-2, {"s1": 320}),
    "ect": (3000, 1e-2, {}),
    "sct": (1500, 5e-3, {}),
    "scd": (1000, 5e-3, {}),
    "mf": (1500, 5e-3, {"p_std": 2.0, "ratio": 0.75, "power": 0.0}),
    "mf, improved": (1500, 5e-3, {"p_std": 2.0, "ratio": 0.75, "power": 0.0, "velocity": "model"}),
    "mf, with a curriculum": (1500, 5e-3, {"p_std": 2.0, "ratio": 0.75, "power": 0.0, "curriculum": 0.7}),
}


@pytest.mark.parametrize("name", CONVERGENT)
def test_it_converges_to_the_consistency_function_of_sequences_with_a_condition(name: str) -> None:
    (steps, lr, values), method = CONVERGENT[name], name.partition(",")[0]
    student = new_student(method, SEQUENCE)
    spec = student.denoiser.spec
    truth = solution_of(spec)
    assert worst_error(copy_of(student.denoiser).requires_grad_(False), truth) > 0.1  # it is not there at the start
    model = train(phase_of(method, **values), steps, student, Exact(spec), lr)
    assert worst_error(model, truth) <= 0.02


def test_consistency_training_comes_as_near_to_it_as_its_grid_is_fine() -> None:
    student = new_student("ct", SEQUENCE)
    truth = solution_of(student.denoiser.spec)
    assert worst_error(copy_of(student.denoiser).requires_grad_(False), truth) > 0.1
    model = train(phase_of("ct", s0=20, s1=160, mu="fixed", mu0=0.5), 1500, student, None, 1e-2)
    assert worst_error(model, truth) <= 0.06  # its targets are off by an error of first order in the gap


def test_diffusion_converges_to_the_denoiser_and_not_to_the_consistency_function() -> None:
    student = new_student("edm", SEQUENCE)
    model = train(phase_of("edm", p_mean=0.0, p_std=2.0), 2000, student, None, 1e-2)
    assert worst_error(model, exact_of(model.spec), SIGMAS[:-1]) <= 0.04
    assert worst_error(model, solution_of(model.spec)) > 0.2


def test_progressive_distillation_halves_to_the_consistency_function() -> None:
    # From 128 of the teacher's steps, because Euler's error is of first order, to one.
    student = new_student("pd", SEQUENCE)
    spec, teacher = student.denoiser.spec, Exact(student.denoiser.spec)
    student.denoiser.load_state_dict(train(phase_of("edm"), 2000, student, None, 5e-3).state_dict())
    for n in (64, 32, 16, 8, 4, 2, 1):
        model = train(phase_of("pd", steps=n), 500, student, teacher, 5e-3)
        student.denoiser.load_state_dict(model.state_dict())
        teacher = copy_of(model).requires_grad_(False)
    assert worst_error(model, solution_of(spec), (spec.sigma_max,)) <= 0.02


def test_score_identity_distillation_gives_samples_the_distribution_of_the_teachers() -> None:
    student = new_student("sid", SEQUENCE)
    spec = student.denoiser.spec

    def moments(denoiser: Denoiser, sigma: float) -> tuple[float, float]:
        x, conditions = samples(spec, 20_000, torch.Generator().manual_seed(99))
        noise = sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(98))
        drawn = denoiser(noise if sigma == spec.sigma_max else x + noise, torch.full([len(x)], sigma), **conditions)
        without = drawn - moved(drawn, conditions["offset"])
        return float(without.mean()), float(without.std())

    assert abs(moments(copy_of(student.denoiser).requires_grad_(False), spec.sigma_max)[1] - STD) > 0.1
    model = train(phase_of("sid", fakes=2), 4000, student, Exact(spec), 3e-3)
    assert moments(model, spec.sigma_max) == pytest.approx((MEAN, STD), abs=0.03)
    assert moments(model, 1.0) == pytest.approx((MEAN, STD), abs=0.06)  # its fake score sees all levels below it


# Against a reference.


@pytest.mark.parametrize("kind", [PIXEL, SEQUENCE], ids=["pixel", "sequence"])
@pytest.mark.parametrize("n", [18, 2])  # of 2 levels, every target is the sample without noise, at sigma_min
def test_consistency_training_with_a_fixed_grid_is_ten_lines_of_reference(n: int, kind: dict[str, Any]) -> None:
    steps, lr, mu = 30, 1e-2, 0.9
    ours = new_student("ct", kind)
    reference, target = copy_of(ours.denoiser), copy_of(ours.denoiser)
    train(phase_of("ct", s0=n, s1=n, mu="fixed", mu0=mu), steps, ours, None, lr)

    grid = ((0.002 ** (1 / 7) + torch.arange(n) / (n - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7).clamp(min=0.002)
    draw, adam = torch.Generator().manual_seed(0), torch.optim.Adam(reference.parameters(), lr=lr)
    for k in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - k / steps)
        x0, given = samples(ours.denoiser.spec, BATCH, draw)
        z, i = torch.randn(x0.shape, generator=draw), (torch.rand(BATCH, 4, generator=draw)[:, 0] * (n - 1)).long()
        t, r = grid[i + 1], grid[i]
        goal = target(x0 + expand(r, z) * z, r, **given).detach()
        (reference(x0 + expand(t, z) * z, t, **given) - goal).square().mean().backward()
        adam.step(), adam.zero_grad()
        for weight, other in zip(target.parameters(), reference.parameters(), strict=True):
            weight.data = mu * weight.data + (1 - mu) * other.data

    for (name, mine), other in zip(ours.denoiser.named_parameters(), reference.parameters(), strict=True):
        # Levels and averages are rounded otherwise, and Adam divides by small gradients.
        np.testing.assert_allclose(mine.detach(), other.detach(), rtol=0, atol=1e-3, err_msg=name)


# Derivatives along a path.


def adm(dropout: float = 0.0, two_times: bool = False) -> AdmUnet:
    network = AdmUnet(
        AdmConfig(
            image_size=8, channels=1, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,),
            head_channels=32, dropout=dropout, two_times=two_times,
        )
    )  # fmt: skip
    randomise(network)
    return network


@pytest.mark.parametrize(("scaling", "c_noise"), [("trigflow", "trig"), ("edm", "ln/4"), ("flow", "flow")])
def test_the_derivative_of_a_network_is_that_of_finite_differences(scaling: str, c_noise: str) -> None:
    spec = image_spec(image=(1, 8, 8), classes=3, scaling=scaling, c_noise=c_noise)
    two_times = scaling == "flow"
    student = Student(Denoiser(adm(two_times=two_times), spec), log_variance=False).double()
    student.denoiser.backbone = torch.float64
    networks = StepNetworks(student, student, None, None, False, [])
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.05, 0.4, 2.0, 40.0], dtype=torch.float64)
    x, dx = (torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    conditions, second = {"label": torch.tensor([0, 1, 2, 0])}, 0.5 * sigma if two_times else None
    x, dx = (1 + sigma)[:, None, None, None] * x, sigma[:, None, None, None] * dx
    f, tangent = networks.output_along(x, sigma, conditions, second, dx, sigma)
    np.testing.assert_array_equal(f, student(x, sigma, conditions, second)[0].detach())

    h = 1e-5
    with torch.no_grad():
        ahead, behind = (student(x + s * h * dx, sigma + s * h * sigma, conditions, second)[0] for s in (1, -1))
    difference = (ahead - behind) / (2 * h)
    assert difference.abs().max() > 0.1
    np.testing.assert_allclose(tangent, difference, rtol=1e-6, atol=1e-6)  # h^2 and rounding over h


def test_the_derivative_of_a_norm_is_taken_of_sequences_in_any_layout() -> None:
    norm = nn.GroupNorm(2, 4)
    x, dx = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    for shape in ((3, 6, 4), (3, 2, 3, 4), (3, 1, 2, 3, 4)):  # the channels last in memory, as after attention

        def function(x: Tensor, shape: tuple[int, ...] = shape) -> Tensor:
            output: Tensor = norm(x.reshape(shape).movedim(-1, 1))
            return output.movedim(1, -1).reshape(3, 6, 4)

        norm.double()
        _, along = jvp(function, (x,), (dx,))
        difference = (function(x + 1e-6 * dx) - function(x - 1e-6 * dx)).detach() / 2e-6
        np.testing.assert_allclose(along, difference, rtol=0, atol=1e-7)  # h^2, and rounding over h


NETWORKS = {
    "adm": lambda: adm(dropout=0.3),
    "song": lambda: SongUnet(
        SongConfig(
            image_size=8, channels=1, classes=3, model_channels=32, channel_mult=(1, 2), attention=(4,), dropout=0.3
        )
    ),
    "dhariwal": lambda: DhariwalUnet(
        DhariwalConfig(
            image_size=8, channels=1, classes=3, model_channels=64, channel_mult=(1, 2), attention=(4,), dropout=0.3
        )
    ),
}


@pytest.mark.parametrize("finite", [False, True], ids=["jvp", "finite"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_evaluations_of_a_step_draw_the_same_dropout_masks(name: str, channels_last: bool, finite: bool) -> None:
    network = NETWORKS[name]()
    randomise(network)
    student = Student(
        Denoiser(network, image_spec(image=(1, 8, 8), classes=3, c_noise="ln/4")), log_variance=False
    ).train()
    if channels_last:
        student.to(memory_format=torch.channels_last)
    networks = StepNetworks(student, student, None, None, finite, [])
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    conditions = {"label": torch.tensor([0, 1, 2])}
    torch.manual_seed(3)
    along, _ = networks.output_along(x, sigma, conditions, None, x, sigma)
    stopgrad = networks.stopgrad(x, sigma, conditions)
    output = networks.output(x, sigma, conditions)[0].detach()
    again = networks.output(x, sigma, conditions)[0].detach()
    np.testing.assert_allclose(along, output, atol=1e-4)  # another kernel of attention; masks move it by tenths
    np.testing.assert_allclose(stopgrad, denoised(output, x, sigma, student.denoiser.spec), atol=1e-4)
    assert (again - output).abs().max() > 0.1


def test_finite_differences_are_float32_whatever_the_run_computes_in() -> None:
    student = Student(Denoiser(adm(), image_spec(image=(1, 8, 8), classes=3, c_noise="ln/4")), log_variance=False)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    conditions = {"label": torch.tensor([0, 1, 2])}
    tangents = []
    for finite in (False, True):
        networks = StepNetworks(student, student, None, None, finite, [])
        with torch.autocast("cpu", torch.bfloat16, enabled=finite):
            tangents.append(networks.output_along(x, sigma, conditions, None, x, sigma)[1])
    exact, found = tangents
    assert (found - exact).norm() < 0.01 * exact.norm()  # in bfloat16 the difference is ten times the derivative
