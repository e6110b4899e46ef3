# SPDX-License-Identifier: MIT
"""The objectives: zero where they must be, and equal to a few lines of numpy everywhere else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmfast.schedule import karras_sigmas
from cmfast_train.methods.consistency import consistency_loss, ct_pair
from cmfast_train.methods.continuous import scm_target
from cmfast_train.methods.diffusion import edm_loss
from cmfast_train.methods.distances import l1, l2, pseudo_huber
from cmfast_train.methods.meanflow import meanflow_pair, meanflow_target, mf, self_weighted
from cmfast_train.methods.midtraining import cmt
from cmfast_train.methods.paths import Conditions, noised, ode_step
from cmfast_train.methods.progressive import pd_steps, progressive_loss
from cmfast_train.methods.score_identity import karras_levels, log_uniform, score_identity_loss, sid
from cmfast_train.methods.table import Cmt, MeanFlow, Sid
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.training.parallel import jvp
from cmfast_train.training.step_networks import same_dropout
from helpers.specs import image_spec

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
SHAPE = (2, 3, 3)


def some(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


class Scaled(nn.Module):
    """f(x, sigma) = a x / (1 + sigma): a denoiser with one parameter, whose gradient is known."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.a * x / (1 + sigma[:, None, None, None])


# EDM.


def test_the_edm_loss_of_the_perfect_denoiser_of_one_data_point_is_zero() -> None:
    point = some(1)
    sigma = levels(0.002, 0.5, 80)
    loss = edm_loss(lambda x, sigma, conditions: point, point.expand(3, *SHAPE), sigma, some(3, seed=1), {}, SIGMA_DATA)
    assert loss.tolist() == [0, 0, 0]
    worse = edm_loss(
        lambda x, sigma, conditions: point + 0.1, point.expand(3, *SHAPE), sigma, some(3, seed=1), {}, SIGMA_DATA
    )
    assert (worse > 0).all()


@given(st.floats(0.002, 80), st.floats(0.1, 2))
def test_the_edm_weight_makes_every_noise_level_count_the_same(sigma: float, sigma_data: float) -> None:
    # Off by one unit of the network's output, that is by c_out: EDM, eq. 8, lambda = 1 / c_out^2.
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    x0 = some(4)
    loss = edm_loss(lambda x, s, conditions: x0 + c_out, x0, levels(*[sigma] * 4), some(4, seed=1), {}, sigma_data)
    np.testing.assert_allclose(loss, np.ones(4), rtol=1e-9)


def test_the_edm_denoiser_sees_the_image_with_noise_of_its_level_and_the_conditions() -> None:
    x0, noise, sigma, conditions = some(3), some(3, seed=1), levels(0.1, 1, 10), {"label": torch.tensor([4, 5, 6])}

    def denoise(x: Tensor, s: Tensor, given: Conditions) -> Tensor:
        np.testing.assert_array_equal(x, x0 + sigma[:, None, None, None] * noise)
        np.testing.assert_array_equal(s, sigma)
        assert given is conditions
        return x0

    assert edm_loss(denoise, x0, sigma, noise, conditions, SIGMA_DATA).shape == (3,)


# Consistency.


def pair_loss(
    denoise: Any, target: Any, x0: Tensor, t: Tensor, r: Tensor, distance: Any = l2, z: Tensor | None = None
) -> Tensor:
    """Return the loss of the two points of one noising path."""
    z = some(len(x0), *x0.shape[1:], seed=1) if z is None else z
    below = torch.where(r > SIGMA_MIN, r, 0)
    return consistency_loss(denoise, target, distance, noised(x0, t, z), t, noised(x0, below, z), below, {}, SIGMA_MIN)


def test_without_a_second_level_the_target_is_the_image() -> None:
    x0, t = some(3), levels(0.5, 5, 80)

    def target(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        assert (sigma >= SIGMA_MIN).all()  # below it the logarithm of the noise embedding has no meaning
        return torch.full_like(x, 1e6)

    for r in (levels(0, 0, 0), levels(0.001, 0, SIGMA_MIN)):
        assert pair_loss(lambda x, sigma, conditions: x0, target, x0, t, r).tolist() == [0, 0, 0]
    assert (pair_loss(lambda x, sigma, conditions: x0, target, x0, t, levels(0.003, 0.1, 1)) > 1e4).all()


DISTANCES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "l1": (l1, lambda d: np.abs(d).sum()),
    "l2": (l2, lambda d: (d**2).sum()),
    "the norm": (pseudo_huber(0.0), lambda d: np.sqrt((d**2).sum())),
    "huber": (pseudo_huber(0.03), lambda d: np.sqrt((d**2).sum() + 0.03**2) - 0.03),
    "a wide huber": (pseudo_huber(5.0), lambda d: np.sqrt((d**2).sum() + 25) - 5),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_the_consistency_loss_is_its_formula(name: str) -> None:
    distance, formula = DISTANCES[name]
    x0, z, t, r = some(4), some(4, seed=1), levels(0.5, 1, 10, 80), levels(0, 0.2, 8, 79.7)
    loss = pair_loss(Scaled(0.9), Scaled(0.7), x0, t, r, distance, z)
    for i in range(4):
        x, n, ti, ri = x0[i].numpy(), z[i].numpy(), t[i].item(), r[i].item()
        target = 0.7 * (x + ri * n) / (1 + ri) if ri else x
        assert loss[i].item() == pytest.approx(formula(0.9 * (x + ti * n) / (1 + ti) - target), rel=1e-12)


def test_a_huber_constant_turns_small_differences_into_squares() -> None:
    x0, off = some(1), 1e-4
    for c, power in ((0.0, 1), (1.0, 2)):
        near, far = (pseudo_huber(c)(x0 + by, x0).item() for by in (off, 2 * off))
        assert far / near == pytest.approx(2**power, rel=1e-3)


def test_consistency_training_is_algorithm_3_with_a_fixed_grid() -> None:
    n, b = 18, 64
    uniform = torch.rand(b, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0, z = some(b), some(b, seed=1)
    t, r = ct_pair(n, uniform, SIGMA_MIN, SIGMA_MAX)
    x_t, x_r = noised(x0, t, z), noised(x0, r, z)
    loss = consistency_loss(Scaled(0.9), Scaled(0.8), l2, x_t, t, x_r, r, {}, SIGMA_MIN)

    rho = 7  # from here on the paper, in numpy
    for image in range(b):
        i = 1 + int(uniform[image] * (n - 1))  # 1 .. N - 1
        t_next, t_here = (
            (SIGMA_MIN ** (1 / rho) + (k - 1) / (n - 1) * (SIGMA_MAX ** (1 / rho) - SIGMA_MIN ** (1 / rho))) ** rho
            for k in (i + 1, i)
        )
        x, noise = x0[image].numpy(), z[image].numpy()
        online, target = 0.9 * (x + t_next * noise) / (1 + t_next), 0.8 * (x + t_here * noise) / (1 + t_here)
        if i == 1:
            target = x + t_here * noise  # the boundary condition, which a model keeps and Scaled does not
        assert loss[image].item() == pytest.approx(((online - target) ** 2).sum(), rel=1e-9)


def test_a_model_that_is_constant_along_a_path_has_no_loss_at_any_pair() -> None:
    grid = levels(*karras_sigmas(40)[::-1])
    x0, z = some(38), some(38, seed=1)

    def exact(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return x - sigma[:, None, None, None] * z  # knows the noise: both ends of every path map to x0

    def zero(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return x * 0  # the constant map is consistent as well; what forbids it is the boundary condition

    for model in (exact, zero):
        loss = pair_loss(model, model, x0, grid[2:], grid[1:-1], z=z)
        np.testing.assert_allclose(loss, np.zeros(38), atol=1e-24)


# The probability-flow ODE, and progressive distillation.


def gaussian(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
    """The exact denoiser of Gaussian data of standard deviation 1/2 around 0."""
    return 0.25 * x / (0.25 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize(("second_order", "order"), [(False, 1), (True, 2)])
def test_steps_along_the_ode_have_their_order_of_accuracy(second_order: bool, order: int) -> None:
    start = some(1) * 80

    def error(n: int) -> float:
        x, grid = start, karras_sigmas(n)
        for t, r in itertools.pairwise(grid):
            x = ode_step(gaussian, x, levels(t), levels(r), {}, second_order)
        exact = start * ((0.25 + grid[-1] ** 2) / (0.25 + grid[0] ** 2)) ** 0.5
        return float((x - exact).norm())

    assert error(80) / error(160) == pytest.approx(2**order, rel=0.1)


def test_one_step_towards_the_target_arrives_where_the_teachers_two_steps_do() -> None:
    uniform = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    t, middle, r = pd_steps(8, uniform, SIGMA_MIN, SIGMA_MAX)
    x = noised(some(8), t, some(8, seed=1))
    seen: list[Tensor] = []

    def student(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        seen.append(x)
        return target

    two = ode_step(gaussian, ode_step(gaussian, x, t, middle, {}), middle, r, {})
    ratio = (r / t)[:, None, None, None]
    target = (two - ratio * x) / (1 - ratio)  # arXiv:2202.00512, Algorithm 2, with alpha = 1
    np.testing.assert_allclose(progressive_loss(student, gaussian, x, t, middle, r, {}), np.zeros(8), atol=1e-12)
    np.testing.assert_allclose(ode_step(student, seen[0], t, r, {}), two, atol=1e-12)
    off = progressive_loss(lambda x, s, _: target + 0.1, gaussian, x, t, middle, r, {})
    np.testing.assert_allclose(off, np.maximum(1 / t.numpy() ** 2, 1) * 0.01 * target[0].numel(), rtol=1e-6)


# Mid-training.


def midtraining(student: Any, batch: int, steps: int, uniform: float, solver: str = "heun") -> tuple[Tensor, Tensor]:
    """Return the loss and the noise levels of one step; the teacher is that of Gaussian data."""
    step: Any = SimpleNamespace(
        hyper=Cmt(steps=steps, solver=solver),
        noise=some(batch),
        uniform=torch.full((batch, 3), uniform, dtype=torch.float64),
        conditions={"label": torch.arange(batch)},
        sigma_range=(SIGMA_MIN, SIGMA_MAX),
        networks=SimpleNamespace(student=student, teacher=gaussian),
        distance=l2,
    )
    loss, sigma = cmt(step)
    assert loss.shape == sigma.shape == (batch,)
    return loss, sigma


def test_mid_training_maps_each_point_of_a_trajectory_to_its_end() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def student(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        seen.append((x, sigma, conditions["label"]))
        return 0 * x

    loss, _ = midtraining(student, 12, 4, 0.0, "euler")
    ((x, sigma, label),) = seen
    grid, noise = karras_sigmas(5), some(12)
    assert label.tolist() == [0, 1, 2] * 4
    np.testing.assert_allclose(sigma, np.repeat(grid[:-1], 3), rtol=1e-12)
    for image in range(12):
        point, points = grid[0] * noise[image % 3].numpy(), []
        for t, r in itertools.pairwise(grid):  # Euler's steps, written out
            points.append(point)
            point = point + (r - t) * (point - 0.25 * point / (0.25 + t**2)) / t
        np.testing.assert_allclose(x[image], points[image // 3], rtol=1e-9)
        assert loss[image].item() == pytest.approx((point**2).sum(), rel=1e-9)


@pytest.mark.parametrize(("batch", "steps"), [(12, 4), (5, 8), (7, 3)])
def test_each_point_of_the_trajectories_has_the_same_chance(batch: int, steps: int) -> None:
    points = -(-batch // steps) * steps
    drawn = [midtraining(lambda x, s, c: x, batch, steps, (k + 0.5) / points)[1] for k in range(points)]
    _, counts = torch.cat(drawn).unique(return_counts=True)
    assert counts.tolist() == [batch * points // steps] * steps


def test_mid_training_has_no_loss_where_the_solver_and_the_model_are_exact() -> None:
    def exact(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return x * ((0.25 + SIGMA_MIN**2) / (0.25 + sigma[:, None, None, None] ** 2)).sqrt()

    coarse, fine = (midtraining(exact, 64, steps, 0.3)[0].mean() for steps in (32, 64))
    assert coarse / fine == pytest.approx(16, rel=0.3)  # the square of a second-order error
    assert midtraining(lambda x, s, c: 0.9 * exact(x, s, c), 64, 64, 0.3)[0].mean() > 100 * fine


# Score identity distillation.


def test_the_generators_loss_is_the_papers() -> None:
    x0, real, fake = some(4), some(4, seed=1), some(4, seed=2)
    loss = score_identity_loss(x0, real, fake, alpha=1.2)
    for i in range(4):
        phi, psi, drawn = (value[i].numpy() for value in (real, fake, x0))
        terms = (phi - psi) * (psi - drawn) + (1 - 1.2) * (phi - psi) ** 2  # eq. 23
        assert loss[i].item() == pytest.approx(terms.sum() / np.abs(drawn - phi).mean(), rel=1e-9)


def test_the_levels_of_score_identity_distillation() -> None:
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    np.testing.assert_allclose(log_uniform(uniform, 0.3, 8.0), np.geomspace(0.3, 8.0, 101)[:-1], rtol=1e-9)
    grid = karras_sigmas(101, 0.002, 24.0)[::-1]
    np.testing.assert_allclose(karras_levels(uniform, 0.002, 24.0), grid[:-1], rtol=1e-9)


class Sides:
    """The networks of a step, each a convolution, and what they were called with."""

    def __init__(self) -> None:
        self.nets = {name: nn.Conv2d(1, 1, 1).double() for name in ("student", "fake 0", "fake 1", "teacher")}
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def student(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.calls.append(("student", x, sigma))
        return self.nets["student"](x)

    def fake(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: tuple[int, ...]) -> Tensor:
        self.calls += [("fake", x, sigma)]
        return torch.cat([self.nets[f"fake {i}"](part) for i, part in enumerate(x.split(list(parts)))])

    def scores(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.nets["teacher"](x), self.fake(x, sigma, conditions, parts)


def sid_step(is_turn_of_student: bool, **hyper: Any) -> tuple[Sides, Tensor, Tensor, Any]:
    sides = Sides()
    step: Any = SimpleNamespace(
        hyper=Sid(**hyper),
        spec=image_spec((1, 3, 3)),
        constants=(is_turn_of_student,),
        x0=some(8, 1, 3, 3),
        noise=some(8, 1, 3, 3, seed=1),
        more_noise=some(8, 1, 3, 3, seed=2)[None],
        uniform=torch.rand(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        conditions={},
        sigma_range=(SIGMA_MIN, SIGMA_MAX),
        normal=lambda column: some(8, 1, seed=3)[:, 0],
        networks=sides,
    )
    loss, sigma = sid(step)
    assert loss.shape == sigma.shape == (8,)
    loss.sum().backward()
    return sides, loss, sigma, step


@pytest.mark.parametrize("is_turn_of_student", [True, False])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_each_network_learns_in_its_own_turn(share: float, is_turn_of_student: bool) -> None:
    sides, *_ = sid_step(is_turn_of_student, share=share)
    learning = {"student"} if is_turn_of_student else {"fake 0"} | ({"fake 1"} if share < 1 else set())
    for name, network in sides.nets.items():
        assert all((weight.grad is not None) == (name in learning) for weight in network.parameters()), name


def test_a_share_of_the_samples_is_drawn_from_noise_and_the_others_from_data() -> None:
    sides, _, _, step = sid_step(False, share=0.25, levels=(0.5, 2.0))
    (_, x, sigma), (_, noised_again, t) = sides.calls
    assert sigma[:2].tolist() == [80.0, 80.0]
    assert ((sigma[2:] >= 0.5) & (sigma[2:] <= 2.0)).all()
    np.testing.assert_allclose(x[:2], 80 * step.noise[:2], rtol=1e-12)
    np.testing.assert_allclose(x[2:], noised(step.x0, sigma, step.noise)[2:], rtol=1e-12)
    drawn = sides.nets["student"](x).detach()
    np.testing.assert_allclose(noised_again.detach(), noised(drawn, t, step.more_noise[0]), rtol=1e-12)


def test_the_student_gets_the_gradient_of_its_loss_through_its_samples() -> None:
    sides, loss, t, step = sid_step(True, alpha=1.2)
    given = {name: weight.grad for name, weight in sides.nets["student"].named_parameters()}
    _, x, _ = sides.calls[0]
    drawn = sides.nets["student"](x)  # and the whole of it differentiated at once, with scores that are constant
    again = noised(drawn, t, step.more_noise[0])
    whole = score_identity_loss(drawn, *sides.scores(again, t, {}, (4, 4)), alpha=1.2)
    np.testing.assert_allclose(loss.detach(), whole.detach(), rtol=1e-9)
    slopes = torch.autograd.grad(whole.sum(), list(sides.nets["student"].parameters()))
    for (name, slope), expected in zip(given.items(), slopes, strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-9, err_msg=name)


# Continuous time.


def test_the_tangent_of_the_exact_consistency_function_is_zero() -> None:
    # Gaussian data again. F of TrigFlow: f = cos(t) x_t - sin(t) sigma_data F, and f = x / sqrt(1 + 4 sigma^2).
    sigma = levels(0.01, 0.3, 1, 5, 80)
    x = noised(0.5 * some(5), sigma, some(5, seed=1))

    def f_output(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        t = torch.atan(s / SIGMA_DATA)
        return (t.cos() ** 2 * x - x * SIGMA_DATA / (SIGMA_DATA**2 + s**2) ** 0.5) / (t.sin() * SIGMA_DATA)

    image = gaussian(x, sigma, {})
    noise = (x - image) / sigma[:, None, None, None]
    said, tangent = jvp(f_output, (x, sigma), (sigma[:, None, None, None] * noise, sigma))
    target = scm_target(said, tangent, x, sigma, image, noise, SIGMA_DATA)
    np.testing.assert_allclose(target, said, atol=1e-9)
    # Along any other path it is not constant.
    assert (scm_target(said, tangent, x, sigma, image + 0.1, noise, SIGMA_DATA) - said).abs().min() > 1e-6


def test_the_tangent_is_the_papers_and_normalised() -> None:
    sigma, x0, z = levels(0.3, 2), some(2), some(2, seed=1)
    x, said, tangent = noised(x0, sigma, z), some(2, seed=2), some(2, seed=3)
    for warm in (0.0, 0.5, 1.0):
        moved = (scm_target(said, tangent, x, sigma, x0, z, SIGMA_DATA, warm) - said).numpy()
        for i in range(2):  # arXiv:2410.11081, Algorithm 1
            t = np.arctan(sigma[i].item() / 0.5)
            x_t = np.cos(t) * x0[i].numpy() + np.sin(t) * 0.5 * z[i].numpy()
            dx_dt = np.cos(t) * 0.5 * z[i].numpy() - np.sin(t) * x0[i].numpy()
            d_dt = tangent[i].numpy() / (np.cos(t) * np.sin(t))
            g = -(np.cos(t) ** 2) * (0.5 * said[i].numpy() - dx_dt)
            g -= warm * np.cos(t) * np.sin(t) * (x_t + 0.5 * d_dt)
            np.testing.assert_allclose(moved[i], g / (np.sqrt((g**2).mean()) + 0.1), rtol=1e-9)


def test_meanflows_target_is_the_average_velocity_of_an_exact_flow() -> None:
    # One image and one noise: the velocity is constant, so its average is the same, and nothing changes along the path.
    t, r = levels(0.9, 0.5, 0.3), levels(0.1, 0.5, 0)
    x0, z = some(3), some(3, seed=1)
    np.testing.assert_array_equal(meanflow_target(torch.zeros_like(x0), t, r, x0, z), z - x0)
    # u = (z_t - z_r) / (t - r) solves u = v - (t - r) du/dt whatever v(t) is, here v = 2 t a.
    a = some(3, seed=2)
    u, du = a * (t + r)[:, None, None, None], a
    moving = meanflow_target(du, t, r, torch.zeros_like(a), 2 * t[:, None, None, None] * a)
    np.testing.assert_allclose(moving, u, rtol=1e-12)


class Average(nn.Module):
    """An average velocity that depends on everything, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = ((level / (1 + level))[:, None, None, None] for level in (t, r))
        return self.a * torch.tanh(x * (1 - t)) * (1 + t - r**2)


NORMAL, UNIFORM = (some(16, seed=2)[:, 0, 0, 0], some(16, seed=3)[:, 0, 0, 0]), some(16, seed=5)[:, 0, 0].abs() % 1


def pairs() -> tuple[Tensor, Tensor]:
    """Return the noise levels of `meanflow`."""
    return meanflow_pair(*NORMAL, UNIFORM[:, 2], 0.75, -0.4, 1.0, 80.0)


def meanflow(alpha: float, velocity: str = "data", power: float = 0.75) -> tuple[Average, Tensor]:
    """Return a model that has the gradient of one step, and the loss of each sample."""
    model, x0, z = Average(), some(16), some(16, seed=1)

    def along(x: Tensor, t: Tensor, _: Any, r: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return jvp(lambda x, t: model(x, t, r), (x, t), (dx, dt))

    def stopgrad(x: Tensor, t: Tensor, _: Any, r: Tensor) -> Tensor:
        return model(x, t, r).detach()

    networks = SimpleNamespace(
        output=lambda x, t, _, r: (model(x, t, r), None), output_along=along, output_stopgrad=stopgrad
    )
    step: Any = SimpleNamespace(
        hyper=MeanFlow(velocity=velocity, power=power, ratio=0.75), constants=(alpha,), networks=networks, x0=x0,
        noise=z, conditions={}, spec=SimpleNamespace(sigma_max=80.0), at=lambda level: noised(x0, level, z),
        normal=NORMAL.__getitem__, uniform=UNIFORM,
    )  # fmt: skip
    loss, _ = mf(step)
    loss.sum().backward()
    return model, loss.detach()


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_alphaflow_is_flow_matching_at_one_and_meanflow_at_nothing(power: float) -> None:
    gradients = [float(meanflow(alpha, power=power)[0].a.grad) for alpha in (0.0, 1e-4, 1.0)]
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-2)
    assert abs(gradients[2] - gradients[0]) > 0.05 * abs(gradients[0])
    model, x0, z = Average(), some(16), some(16, seed=1)
    t, r = pairs()
    matched = self_weighted(l2(model(noised(x0, t, z), t, r), z - x0), power)
    np.testing.assert_allclose(meanflow(1.0, power=power)[1], matched.detach(), rtol=1e-9)


def test_improved_meanflow_differentiates_along_the_models_own_velocity() -> None:
    """By central differences of flow time: z moves with u(z, t, t), not with noise - x0."""
    found = meanflow(0.0, "model", 0.0)[1]
    model, x0, z = Average().requires_grad_(False), some(16), some(16, seed=1)
    t, r = pairs()
    time, h = t / (1 + t), 1e-6

    def u(moved: float) -> Tensor:
        here = (time + moved)[:, None, None, None]
        z_t = noised(x0, t, z) / (1 + t)[:, None, None, None] + moved * model(noised(x0, t, z), t, t)
        return model(z_t / (1 - here), (time + moved) / (1 - time - moved), r)

    target = z - x0 - (time - r / (1 + r))[:, None, None, None] * (u(h) - u(-h)) / (2 * h)
    np.testing.assert_allclose(found, l2(u(0.0), target), rtol=1e-5)
    assert (found - meanflow(0.0, "data", 0.0)[1]).abs().max() > 0.01


def test_a_loss_weighted_by_itself_has_the_gradient_of_its_power() -> None:
    error = levels(0.1, 1, 100).requires_grad_()
    self_weighted(error, 0.75, c=0.0).sum().backward()
    np.testing.assert_allclose(error.grad, error.detach() ** -0.75, rtol=1e-12)


# What gradients and dropout may touch.


def test_no_gradient_flows_through_the_target() -> None:
    student, teacher = Scaled(0.9), Scaled(0.9)
    x0, t, r = some(2), levels(5, 10), levels(4, 8)
    pair_loss(student, teacher, x0, t, r).sum().backward()
    assert teacher.a.grad is None
    assert student.a.grad is not None

    both = Scaled(0.9)  # with one and the same model on both ends, the gradient is that of the first end alone
    pair_loss(both, both, x0, t, r).sum().backward()
    assert both.a.grad == student.a.grad

    middle, teacher, pupil = levels(4.5, 9), Scaled(0.8), Scaled(0.9)
    progressive_loss(pupil, teacher, x0, t, middle, r, {}).sum().backward()
    assert teacher.a.grad is None
    assert pupil.a.grad is not None


@pytest.fixture
def dropped() -> Callable[..., Tensor]:
    config = AdmConfig(
        image_size=8,
        channels=1,
        model_channels=32,
        res_blocks=1,
        channel_mult=(1,),
        attention=(),
        head_channels=32,
        dropout=0.5,
    )
    network = AdmUnet(config).train()
    randomise(network)
    return lambda x, sigma, conditions: network(x, sigma.log())


def test_the_two_ends_of_a_pair_see_the_same_dropout_masks(dropped: Callable[..., Tensor]) -> None:
    x, sigma = some(2, 1, 8, 8).float(), torch.tensor([1.0, 2.0])
    torch.manual_seed(3)
    first = same_dropout(dropped, [])(x, sigma, {})
    second = dropped(x, sigma, {})
    third = dropped(x, sigma, {})
    np.testing.assert_array_equal(first.detach(), second.detach())
    assert not torch.equal(second, third)  # without it they would differ


def test_a_pair_at_one_level_has_no_loss_under_dropout(dropped: Callable[..., Tensor]) -> None:
    x, t = some(2, 1, 8, 8).float(), torch.tensor([1.0, 2.0])
    torch.manual_seed(3)
    same = same_dropout(dropped, [])
    assert consistency_loss(dropped, same, l2, x, t, x, t, {}, SIGMA_MIN).tolist() == [0, 0]
    # What other masks would cost.
    assert (consistency_loss(dropped, dropped, l2, x, t, x, t, {}, SIGMA_MIN) > 0).all()


def test_the_next_step_draws_other_masks(dropped: Callable[..., Tensor]) -> None:
    x, sigma = some(2, 1, 8, 8).float(), torch.tensor([1.0, 2.0])
    teach = same_dropout(dropped, [])
    outputs = [(teach(x, sigma, {}), dropped(x, sigma, {}))[1] for _ in range(2)]
    assert not torch.equal(*outputs)
