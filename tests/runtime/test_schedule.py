# SPDX-License-Identifier: MIT
"""Noise levels for sampling: golden grids, published settings, and the words a user reads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmfast.errors import CmfastError
from cmfast.schedule import check_sigmas, karras_sigmas, sigmas_of_indices

GRIDS = {
    18: "80 57.58598 40.78557 28.37458 19.35245 12.91008 8.400935 5.315195 3.256822 1.92334 1.088171 0.5853481 "
    "0.2964423 0.1395165 0.05994731 0.02293452 0.00752802 0.002",
    40: "80 69.45095 60.11739 51.88032 44.6302 38.26646 32.69689 27.83711 23.61009 19.94563 16.77989 14.05498 "
    "11.71851 9.723201 8.02648 6.590144 5.380004 4.365562 3.519699 2.818392 2.24044 1.767203 1.382368 1.071722 "
    "0.8229414 0.6253985 0.4699791 0.3489151 0.2556295 0.1845939 0.1311974 0.09162769 0.0627624 0.0420707 "
    "0.02752504 0.01752204 0.01081205 0.006437113 0.003676589 0.002",
    11: "80 45.3137 24.4083 12.3816 5.83895 2.51522 0.965417 0.318283 0.0850872 0.0167208 0.002",
}
AT = {
    151: {62: 5.2485032, 67: 3.9912186, 75: 2.515219, 149: 0.0023551626},
    201: {100: 2.515219, 106: 1.9128436, 199: 0.0022616634},
}


@pytest.mark.parametrize("n", GRIDS)
def test_the_grid_has_its_golden_values(n: int) -> None:
    want = [float(word) for word in GRIDS[n].split()]
    np.testing.assert_allclose(karras_sigmas(n), want, rtol=5e-6 if n == 11 else 5e-7)  # the digits of the table


@pytest.mark.parametrize("n", AT)
def test_the_long_grids_have_their_golden_values(n: int) -> None:
    grid = karras_sigmas(n)
    assert len(grid) == n
    for index, sigma in AT[n].items():
        assert grid[index] == pytest.approx(sigma, rel=5e-8)


@given(n=st.integers(2, 500), low=st.floats(1e-3, 0.1), ratio=st.floats(10, 1e5), rho=st.floats(1, 10))
def test_a_grid_falls_strictly_between_exact_ends(n: int, low: float, ratio: float, rho: float) -> None:
    grid = karras_sigmas(n, low, low * ratio, rho)
    assert len(grid) == n
    assert (grid[0], grid[-1]) == (low * ratio, low)
    assert all(before > after for before, after in itertools.pairwise(grid))
    assert all(type(sigma) is float for sigma in grid)


@given(n=st.integers(3, 100), rho=st.floats(1, 10))
def test_a_grid_is_straight_in_the_rho_th_root(n: int, rho: float) -> None:
    steps = np.diff(np.power(karras_sigmas(n, rho=rho), 1 / rho))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_a_grid_of_one_is_sigma_max_and_of_none_is_refused() -> None:
    assert karras_sigmas(1) == (80.0,)
    with pytest.raises(CmfastError, match="at least one noise level, got 0"):
        karras_sigmas(0)


@pytest.mark.parametrize(
    ("ts", "n", "second"),
    [  # the published two-step settings of OpenAI's checkpoints
        ([0, 22, 39], 40, 1.382368),
        ([0, 106, 200], 201, 1.912844),
        ([0, 17, 39], 40, 4.365562),
        ([0, 18, 39], 40, 3.519699),
        ([0, 67, 150], 151, 3.991219),
        ([0, 62, 150], 151, 5.248503),
    ],
)
def test_published_indices_become_noise_levels(ts: list[int], n: int, second: float) -> None:
    sigmas = sigmas_of_indices(ts, n)
    assert sigmas[0] == 80
    assert sigmas[1:] == (pytest.approx(second, rel=1e-6),)
    # diffusers writes the same setting rising, and without the closing index
    assert sigmas_of_indices(sorted(ts, reverse=True)[1:], n) == sigmas


def test_an_index_outside_the_grid_is_named() -> None:
    for index in (40, -1):
        with pytest.raises(CmfastError, match=f"index {index} is not in a grid of 40 noise levels.*from 0 to 39"):
            sigmas_of_indices([0, index], 40)


@given(st.lists(st.floats(0.0021, 80), min_size=1, max_size=6, unique=True))
def test_falling_levels_pass_unchanged(levels: list[float]) -> None:
    falling = sorted(levels, reverse=True)
    assert check_sigmas(falling, 0.002, 80) == tuple(falling)
    assert check_sigmas(np.array(falling), 0.002, 80) == tuple(falling)  # type: ignore[arg-type]


@given(st.lists(st.floats(0.0021, 80), min_size=2, max_size=6))
def test_levels_in_any_other_order_are_refused(levels: list[float]) -> None:
    if levels != sorted(set(levels), reverse=True):
        with pytest.raises(CmfastError, match="noise levels must strictly decrease"):
            check_sigmas(levels, 0.002, 80)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([], "no noise levels were given; give at least one, for example sigmas 80"),
        ([80, 0.8, 5], "5 follows 0.8"),
        ([80, 80], "80 follows 80"),
        ([80, 0.002], "stay above 0.002: 0.002 follows 80"),
        ([81], r"first noise level is 81, but this model was trained for 0.002 < sigma <= 80; start with 80"),
        ([0.002], "the first noise level is 0.002"),
        ([80, float("nan")], "noise levels must be finite numbers, got 80.0, nan"),
        ([float("inf")], "must be finite numbers, got inf"),
        ([80, -1], "-1 follows 80"),
    ],
)
def test_a_wrong_level_is_named_with_what_is_allowed(sigmas: list[float], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        check_sigmas(sigmas, 0.002, 80)
