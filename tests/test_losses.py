# SPDX-License-Identifier: MIT
"""The objectives: zero where they must be, and equal to a few lines of numpy everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmfast.schedule import karras_sigmas
from cmfast_train.losses import ct_loss, ect_loss, edm_loss, same_dropout
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.schedules import ct_pair

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

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return self.a * x / (1 + sigma[:, None, None, None])


# EDM.


def test_the_edm_loss_of_the_perfect_denoiser_of_one_data_point_is_zero() -> None:
    point = some(1)
    sigma = levels(0.002, 0.5, 80)
    loss = edm_loss(lambda x, sigma, label: point, point.expand(3, *SHAPE), sigma, some(3, seed=1), None, SIGMA_DATA)
    assert loss.tolist() == [0, 0, 0]
    worse = edm_loss(
        lambda x, sigma, label: point + 0.1, point.expand(3, *SHAPE), sigma, some(3, seed=1), None, SIGMA_DATA
    )
    assert (worse > 0).all()


@given(st.floats(0.002, 80), st.floats(0.1, 2))
def test_the_edm_weight_makes_every_noise_level_count_the_same(sigma: float, sigma_data: float) -> None:
    # Off by one unit of the network's output, that is by c_out: EDM, eq. 8, lambda = 1 / c_out^2.
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    x0 = some(4)
    loss = edm_loss(lambda x, s, label: x0 + c_out, x0, levels(*[sigma] * 4), some(4, seed=1), None, sigma_data)
    np.testing.assert_allclose(loss, np.ones(4), rtol=1e-9)


def test_the_edm_denoiser_sees_the_image_with_noise_of_its_level_and_the_label() -> None:
    x0, noise, sigma, label = some(3), some(3, seed=1), levels(0.1, 1, 10), torch.tensor([4, 5, 6])

    def denoise(x: Tensor, s: Tensor, given_label: Tensor | None) -> Tensor:
        np.testing.assert_array_equal(x, x0 + sigma[:, None, None, None] * noise)
        np.testing.assert_array_equal(s, sigma)
        assert given_label is label
        return x0

    assert edm_loss(denoise, x0, sigma, noise, label, SIGMA_DATA).shape == (3,)


# ECT.


def ect(denoise: Any, teach: Any, x0: Tensor, t: Tensor, r: Tensor, c: float = 0.0, seed: int = 1) -> Tensor:
    return ect_loss(denoise, teach, x0, t, r, some(len(x0), *x0.shape[1:], seed=seed), None, c, SIGMA_MIN)


def test_without_a_second_level_the_target_is_the_image() -> None:
    x0, t = some(3), levels(0.5, 5, 80)

    def teach(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        assert (sigma >= SIGMA_MIN).all()  # below it the logarithm of the noise embedding has no meaning
        return torch.full_like(x, 1e6)

    for r in (levels(0, 0, 0), levels(0.001, 0, SIGMA_MIN)):
        assert ect(lambda x, sigma, label: x0, teach, x0, t, r).tolist() == [0, 0, 0]
    assert (ect(lambda x, sigma, label: x0, teach, x0, t, levels(0.003, 0.1, 1)) > 1e4).all()


@pytest.mark.parametrize("c", [0.0, 0.03, 5.0])
def test_the_ect_loss_is_its_formula(c: float) -> None:
    student, teacher = Scaled(0.9), Scaled(0.7)
    x0, z, t, r = some(4), some(4, seed=1), levels(0.5, 1, 10, 80), levels(0, 0.2, 8, 79.7)
    loss = ect(student, teacher, x0, t, r, c)
    for i in range(4):
        x, n, ti, ri = x0[i].numpy(), z[i].numpy(), t[i].item(), r[i].item()
        target = 0.7 * (x + ri * n) / (1 + ri) if ri else x
        distance = np.sqrt(((0.9 * (x + ti * n) / (1 + ti) - target) ** 2).sum() + c**2) - c
        assert loss[i].item() == pytest.approx(distance / (ti - ri), rel=1e-12)


def test_a_huber_constant_turns_small_differences_into_squares() -> None:
    x0, off = some(1), 1e-4
    for c, power in ((0.0, 1), (1.0, 2)):
        near, far = (
            ect(lambda x, s, label, by=by: x0 + by, lambda x, s, label: x0, x0, levels(1), levels(0), c).item()
            for by in (off, 2 * off)
        )
        assert far / near == pytest.approx(2**power, rel=1e-3)


# CT.


def test_consistency_training_is_algorithm_3_with_a_fixed_grid() -> None:
    n, b = 18, 64
    uniform = torch.rand(b, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0, z = some(b), some(b, seed=1)
    t, r = ct_pair(n, uniform, SIGMA_MIN, SIGMA_MAX)
    loss = ct_loss(Scaled(0.9), Scaled(0.8), x0, t, r, z, None)

    rho = 7  # from here on the paper, in numpy
    for image in range(b):
        i = 1 + int(uniform[image] * (n - 1))  # 1 .. N - 1
        t_next, t_here = (
            (SIGMA_MIN ** (1 / rho) + (k - 1) / (n - 1) * (SIGMA_MAX ** (1 / rho) - SIGMA_MIN ** (1 / rho))) ** rho
            for k in (i + 1, i)
        )
        x, noise = x0[image].numpy(), z[image].numpy()
        online, target = 0.9 * (x + t_next * noise) / (1 + t_next), 0.8 * (x + t_here * noise) / (1 + t_here)
        assert loss[image].item() == pytest.approx(((online - target) ** 2).sum(), rel=1e-9)


def test_a_model_that_is_constant_along_a_path_has_no_loss_at_any_pair() -> None:
    grid = levels(*karras_sigmas(40)[::-1])
    x0, z = some(39), some(39, seed=1)

    def exact(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return x - sigma[:, None, None, None] * z  # knows the noise: both ends of every path map to x0

    np.testing.assert_allclose(ct_loss(exact, exact, x0, grid[1:], grid[:-1], z, None), np.zeros(39), atol=1e-24)
    # The constant map is consistent as well; what forbids it is the boundary condition, not the loss.
    assert ct_loss(lambda x, s, _: x * 0, lambda x, s, _: x * 0, x0, grid[1:], grid[:-1], z, None).tolist() == [0] * 39


# What gradients and dropout may touch.


@pytest.mark.parametrize("method", ["ect", "ct"])
def test_no_gradient_flows_through_the_target(method: str) -> None:
    student, teacher = Scaled(0.9), Scaled(0.9)
    x0, t, r = some(2), levels(5, 10), levels(4, 8)
    loss = (
        ect(student, teacher, x0, t, r)
        if method == "ect"
        else ct_loss(student, teacher, x0, t, r, some(2, seed=1), None)
    )
    loss.sum().backward()
    assert teacher.a.grad is None
    assert student.a.grad is not None

    # With one and the same model on both ends, the gradient is that of the first end alone.
    both = Scaled(0.9)
    again = ect(both, both, x0, t, r) if method == "ect" else ct_loss(both, both, x0, t, r, some(2, seed=1), None)
    again.sum().backward()
    assert both.a.grad == student.a.grad


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
    return lambda x, sigma, label: network(x, sigma.log())


def test_the_two_ends_of_a_pair_see_the_same_dropout_masks(dropped: Callable[..., Tensor]) -> None:
    x, sigma = some(2, 1, 8, 8).float(), torch.tensor([1.0, 2.0])
    torch.manual_seed(3)
    first = same_dropout(dropped, [])(x, sigma, None)
    second = dropped(x, sigma, None)
    third = dropped(x, sigma, None)
    np.testing.assert_array_equal(first.detach(), second.detach())
    assert not torch.equal(second, third)  # without it they would differ


def test_a_pair_at_one_level_has_no_loss_under_dropout(dropped: Callable[..., Tensor]) -> None:
    x0, noise = some(2, 1, 8, 8).float(), some(2, 1, 8, 8, seed=1).float()
    t = torch.tensor([1.0, 2.0])
    torch.manual_seed(3)
    assert ct_loss(dropped, same_dropout(dropped, []), x0, t, t, noise, None).tolist() == [0, 0]
    assert (ct_loss(dropped, dropped, x0, t, t, noise, None) > 0).all()  # what other masks would cost


def test_the_next_step_draws_other_masks(dropped: Callable[..., Tensor]) -> None:
    x, sigma = some(2, 1, 8, 8).float(), torch.tensor([1.0, 2.0])
    teach = same_dropout(dropped, [])
    outputs = [(teach(x, sigma, None), dropped(x, sigma, None))[1] for _ in range(2)]
    assert not torch.equal(*outputs)
