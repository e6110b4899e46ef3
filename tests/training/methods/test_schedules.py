# SPDX-License-Identifier: MIT
"""The schedules of training against the published formulas' golden values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast.schedule import karras_sigmas
from cmfast_train.methods.consistency import ct_pair, ect_r, ict_pair
from cmfast_train.methods.meanflow import meanflow_pair
from cmfast_train.methods.paths import flow_time, lognormal
from cmfast_train.methods.progressive import pd_steps
from cmfast_train.methods.schedules import alpha_of, ct_ema, ct_scales, ict_scales, pd_sigmas, pseudo_huber_c

# s0, s1, mu0, K: {k: (N(k), mu(k) as in OpenAI's code, which divides by N - 1)}
CT = {
    "imagenet64": ((2, 200, 0.95, 800_000), {
        0: (2, 0.9025), 1: (3, 0.95), 1000: (8, 0.98545164), 100_000: (72, 0.99855616), 400_000: (143, 0.99927782),
        799_999: (201, 0.99948720),
    }),
    "lsun256": ((2, 150, 0.95, 1_000_000), {
        0: (2, 0.9025), 1000: (6, 0.97969173), 10_000: (16, 0.99318423), 100_000: (48, 0.99781969),
        500_000: (107, 0.99903267), 999_999: (151, 0.99931632),
    }),
    "cifar10": ((2, 150, 0.9, 800_000), {
        0: (2, 0.81), 1: (3, 0.9), 1000: (6, 0.95873152), 100_000: (54, 0.99603202), 400_000: (107, 0.99801404),
        799_999: (151, 0.99859618),
    }),
}  # fmt: skip
PAPER_MU = {0: 0.95, 1: 0.96638253, 1000: 0.98725854, 100_000: 0.99857620, 400_000: 0.99928287, 799_999: 0.99948975}

ECT_T = [0.01, 0.1, 0.5, 1, 2.5, 10, 80]
ECT_R = {  # q = 2: stage -> r(t)
    0: [0, 0, 0, 0, 0.491418, 4.99818, 40],
    1: [0, 0, 0, 0.212117, 1.49571, 7.49909, 60],
    3: [0.0068875, 0.069999, 0.374365, 0.803029, 2.24893, 9.37477, 75],
    7: [0.00980547, 0.0981249, 0.492148, 0.987689, 2.48431, 9.96092, 79.6875],
}


@pytest.mark.parametrize("name", CT)
def test_the_number_of_levels_has_its_golden_values(name: str) -> None:
    (s0, s1, _, total), rows = CT[name]
    assert {k: ct_scales(k, total, s0, s1) for k in rows} == {k: n for k, (n, _) in rows.items()}


def test_the_target_decay_is_the_papers() -> None:
    s0, s1, mu0, total = CT["imagenet64"][0]
    for k, mu in PAPER_MU.items():
        assert ct_ema(k, total, s0, s1, mu0) == pytest.approx(mu, abs=5e-9)  # eight digits


@pytest.mark.parametrize("name", CT)
def test_the_target_decay_is_openais_with_n_for_n_minus_one(name: str) -> None:
    (s0, s1, mu0, total), rows = CT[name]
    for k, (n, openai) in rows.items():
        assert ct_ema(k, total, s0, s1, mu0) == pytest.approx(openai ** ((n - 1) / n), abs=1e-8)


@given(
    total=st.integers(1, 10**6), part=st.floats(0, 1, exclude_max=True), s0=st.integers(2, 20), more=st.integers(0, 300)
)
def test_levels_grow_from_s0_to_s1_plus_one(total: int, part: float, s0: int, more: int) -> None:
    k, s1 = int(part * total), s0 + more
    n, after = ct_scales(k, total, s0, s1), ct_scales(min(k + 1, total), total, s0, s1)
    assert s0 <= n <= after <= s1 + 1
    assert ct_scales(0, total, s0, s1) == s0
    assert 0 < ct_ema(k, total, s0, s1, 0.9) <= ct_ema(min(k + 1, total), total, s0, s1, 0.9) < 1


@given(n=st.integers(2, 160), uniform=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=20))
def test_a_pair_is_two_neighbours_of_the_grid(n: int, uniform: list[float]) -> None:
    grid = np.float32(karras_sigmas(n)[::-1])
    t, r = ct_pair(n, torch.tensor(uniform), 0.002, 80.0)
    at = np.searchsorted(grid, t.numpy())
    np.testing.assert_array_equal(grid[at], t.numpy())
    np.testing.assert_array_equal(grid[at - 1], r.numpy())
    assert (at >= 1).all()


def test_every_pair_is_as_likely_as_any_other() -> None:
    n = 11
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    t, _ = ct_pair(n, uniform, 0.002, 80.0)
    levels, counts = torch.unique(t, return_counts=True)
    np.testing.assert_array_equal(levels, np.float32(karras_sigmas(n)[-2::-1]))
    assert counts.tolist() == [1000] * 10


def test_a_uniform_that_rounds_up_to_one_stays_in_the_grid() -> None:
    t, r = ct_pair(5, torch.tensor([1.0, 0.99999994]), 0.002, 80.0)
    assert t.tolist() == [80.0, 80.0]
    assert r.tolist() == [pytest.approx(karras_sigmas(5)[1])] * 2


@pytest.mark.parametrize("stage", ECT_R)
def test_r_has_its_golden_values(stage: int) -> None:
    r = ect_r(torch.tensor(ECT_T, dtype=torch.float64), stage, q=2.0)
    np.testing.assert_allclose(r, ECT_R[stage], rtol=1e-5)  # the table has six digits


def test_the_first_stage_of_q_256_is_the_last_of_q_2() -> None:
    t = torch.tensor(ECT_T)
    np.testing.assert_array_equal(ect_r(t, 0, q=256.0), ect_r(t, 7, q=2.0))


@given(
    t=st.floats(2.0**-9, 80, width=32),
    q=st.sampled_from([2.0, 4.0, 16.0, 256.0]),
    bits=st.integers(0, 16),
    k=st.floats(0, 8),
    b=st.floats(0.1, 4),
)
def test_r_stays_between_zero_and_t_and_approaches_it(t: float, q: float, bits: int, k: float, b: float) -> None:
    stage = int(bits // math.log2(q))  # q**(stage + 1) up to 2**24 would still leave float32 a gap to divide by
    level = torch.tensor([t])
    r, later = ect_r(level, stage, q, k, b), ect_r(level, stage + 1, q, k, b)
    assert 0 <= r < level
    assert r <= later


def test_noise_levels_are_lognormal_within_the_range() -> None:
    normal = torch.linspace(-2, 2, 101, dtype=torch.float64)
    sigma = lognormal(normal, -1.2, 1.2, 0.002, 80.0)
    np.testing.assert_allclose(sigma.log(), -1.2 + 1.2 * normal, rtol=1e-12, atol=1e-12)
    extreme = lognormal(torch.tensor([-50.0, 50.0]), -1.2, 1.2, 0.002, 80.0)
    assert 0.002 < extreme[0] < 0.00201  # above sigma_min, where c_out is not yet 0
    assert extreme[1] == 80.0


@pytest.mark.parametrize(
    ("pixels", "c"),
    [
        (28 * 28, 0.01512),
        (32 * 32, 0.01728),
        (32 * 32 * 3, 0.0299298),
        (64 * 64 * 3, 0.0598597),
        (256 * 256 * 3, 0.2394387),
    ],
)
def test_the_pseudo_huber_constant_has_its_golden_values(pixels: int, c: float) -> None:
    assert pseudo_huber_c(pixels) == pytest.approx(c, rel=1e-5)


# iCT.


def test_icts_levels_double_at_even_intervals() -> None:
    total = 400_000
    at = [ict_scales(k, total, 10, 1280) for k in range(0, total, 50_000)]
    assert at == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ict_scales(49_999, total, 10, 1280) == 11
    assert ict_scales(total - 1, total, 10, 1280) == 1281


@given(
    total=st.integers(1, 3000), part=st.floats(0, 1, exclude_max=True), s0=st.integers(2, 20), more=st.integers(0, 99)
)
def test_icts_levels_stay_between_their_ends(total: int, part: float, s0: int, more: int) -> None:
    k, s1 = int(part * total), s0 + more
    n, after = ict_scales(k, total, s0, s1), ict_scales(min(k + 1, total - 1), total, s0, s1)
    assert s0 + 1 <= n <= after <= s1 + 1
    assert ict_scales(0, total, s0, s1) == s0 + 1


def test_icts_law_of_levels_has_its_golden_values() -> None:
    golden = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980]
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, r = ict_pair(11, uniform, -1.1, 2.0, 0.002, 80.0)
    levels, counts = torch.unique(r, return_counts=True)
    np.testing.assert_allclose(levels, karras_sigmas(11)[:0:-1], rtol=1e-12)
    np.testing.assert_allclose(
        counts / 100_000, golden, atol=1.5e-5
    )  # one part in a hundred thousand, and their digits
    np.testing.assert_allclose(t.unique(), karras_sigmas(11)[-2::-1], rtol=1e-12)
    assert (t > r).all()


def test_icts_pairs_never_leave_the_grid() -> None:
    for uniform in (0.0, 0.99999994, 1.0):
        t, r = ict_pair(1281, torch.tensor([uniform]), -1.1, 2.0, 0.002, 80.0)
        assert 0.002 <= r < t <= 80


# Progressive distillation, MeanFlow.


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_student_of_n_steps_is_called_at_every_other_level_of_its_teacher(n: int) -> None:
    student, teacher = pd_sigmas(n, 0.002, 80.0), pd_sigmas(2 * n, 0.002, 80.0)
    assert len(student) == n
    assert student[0] == 80
    np.testing.assert_allclose(teacher[::2], student, rtol=1e-12)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t, middle, r = pd_steps(n, uniform, 0.002, 80.0)
    np.testing.assert_allclose(t, student, rtol=1e-12)
    np.testing.assert_allclose(middle, teacher[1::2], rtol=1e-12)
    np.testing.assert_allclose(r, [*student[1:], 0.002], rtol=1e-12)


def test_two_steps_of_progressive_distillation_have_their_golden_level() -> None:
    # Karras grid of 3: the middle of the seventh roots.
    assert pd_sigmas(2, 0.002, 80.0)[1] == pytest.approx(2.515219, rel=1e-6)


def test_alpha_falls_from_one_to_nothing_over_its_share_of_the_phase() -> None:
    alphas = [alpha_of(k, 1000, 0.5) for k in range(1000)]
    assert alphas == sorted(alphas, reverse=True)
    assert (alphas[0], alphas[250], alphas[499], alphas[500]) == (1.0, 0.5, 0.0, 0.0)
    assert alphas[270] == pytest.approx(1 / (1 + math.exp(25 * 0.04)), rel=1e-12)
    assert min(alpha for alpha in alphas if alpha) >= 0.05
    assert max(alpha for alpha in alphas if alpha < 1) <= 0.95
    assert [alpha_of(k, 10, 0.0) for k in range(10)] == [0.0] * 10


def test_meanflows_times_are_logit_normal_and_most_pairs_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 40_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(40_000, generator=generator, dtype=torch.float64)
    t, r = meanflow_pair(z[0], z[1], uniform, 0.25, -0.4, 1.0, 80.0)
    assert (t >= r).all()
    assert float((t > r).double().mean()) == pytest.approx(0.25, abs=0.01)  # 40,000 draws: 0.002 of deviation
    both = torch.cat([t[t > r], r[t > r]])  # the larger and the smaller of two draws are two draws
    logit = torch.logit(flow_time(both))
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.03)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.03)
    equal, _ = meanflow_pair(z[0], z[1], uniform, 0.0, -0.4, 1.0, 80.0)
    np.testing.assert_allclose(equal, np.exp(-0.4 + z.max(0).values.numpy()).clip(max=80), rtol=1e-12)
