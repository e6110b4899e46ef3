# SPDX-License-Identifier: MIT
"""Distances between features: closed forms, extremes, and a reference by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_train.evaluation.metrics import (
    add_fake,
    all_are_data,
    check_numbers,
    frechet_distance,
    frechet_metric,
    inception_score,
    kernel_distance,
    kid_subset,
    precision_recall,
)


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(n: int, mean: Tensor, factor: Tensor, seed: int = 0) -> Tensor:
    """Return n points whose mean and covariance are exactly `mean` and factor factor^T."""
    x = points(n, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ factor.T + mean


# Frechet.


def test_the_distance_of_two_gaussians_with_diagonal_covariances_is_the_closed_form() -> None:
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.25]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 2.5]], dtype=torch.float64)
    real, fake = (gaussian(100, m, torch.diag(s), i) for i, (m, s) in enumerate(zip(means, deviations, strict=True)))
    want = 1 + 4 + 0.25 + 4 + 0 + 0.0625  # |mu1 - mu2|^2 + sum (s1 - s2)^2
    assert frechet_distance(real, fake) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(fake, real) == pytest.approx(want, rel=1e-10)


def test_covariances_that_do_not_commute_need_the_square_root_of_their_product() -> None:
    factors = [torch.linalg.cholesky(a @ a.T + torch.eye(5)) for a in (points(5, 5, 1), points(5, 5, 2))]
    means = points(2, 5, 3)
    real, fake = (gaussian(60, m, f, i) for i, (m, f) in enumerate(zip(means, factors, strict=True)))
    one, other = (np.asarray(f @ f.T) for f in factors)
    assert np.abs(one @ other - other @ one).max() > 1
    root = scipy.linalg.sqrtm(one @ other)
    want = float((means[0] - means[1]).square().sum()) + np.trace(one + other - 2 * root).real
    assert frechet_distance(real, fake) == pytest.approx(want, rel=1e-8)


def test_a_set_has_no_distance_to_itself_and_a_shifted_one_the_square_of_the_shift() -> None:
    real = points(200, 8)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, real + 0.5) == pytest.approx(8 * 0.25, rel=1e-9)


def test_single_precision_features_are_compared_in_double() -> None:
    """In float32 a distance of features far from the origin would be rounding only."""
    real = points(300, 4).float() + 1000
    fake = real + 2**-6
    got = frechet_distance(real, fake)
    assert got == pytest.approx(frechet_distance(real.double(), fake.double()), rel=1e-12)
    assert got == pytest.approx(4 * 2.0**-12, rel=1e-6)


def test_halves_of_the_data_add_up_to_the_data_and_samples_are_forgotten() -> None:
    real, fake = points(101, 6, 1), points(50, 6, 2) + 1
    metric = frechet_metric(6)
    metric.update(real[:51], real=True)
    assert add_fake(metric, real[51:]) == pytest.approx(frechet_distance(real[:51], real[51:]), rel=1e-12)
    metric = frechet_metric(6)
    metric.update(real[:51], real=True)
    metric.update(real[51:], real=False)
    all_are_data(metric)
    for _ in range(2):
        assert add_fake(metric, fake) == pytest.approx(frechet_distance(real, fake), rel=1e-12)


# Kernel distance.


def test_the_kernel_distance_of_two_points_repeated_is_the_closed_form() -> None:
    """Every subset is the same, so mean and deviation are exact: k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 2 + 1) ** 3

    mean, std = kernel_distance(a.repeat(20, 1), b.repeat(12, 1), seed=0)
    assert mean == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b), rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_of_one_distribution_is_nothing_and_grows_with_a_shift() -> None:
    real = points(300, 8, 1)
    same, spread = kernel_distance(real, points(300, 8, 2), seed=0)
    assert abs(same) < 3 * spread
    near, far = (kernel_distance(real, points(300, 8, 2) + shift, seed=0)[0] for shift in (0.3, 0.6))
    assert same < near < far


def test_the_seed_draws_the_subsets_and_the_generator_of_torch_is_left_alone() -> None:
    real, fake, logits = points(60, 4, 1), points(60, 4, 2), points(60, 3, 3)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    assert kernel_distance(real, fake, 0) == kernel_distance(real, fake, 0) != kernel_distance(real, fake, 1)
    assert inception_score(logits, 0) == inception_score(logits, 0) != inception_score(logits, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("real", "fake", "subset"), [(5000, 4000, 1000), (5000, 700, 350), (9, 5000, 4)])
def test_subsets_are_a_thousand_or_half_of_the_smaller_set(real: int, fake: int, subset: int) -> None:
    assert kid_subset(torch.empty(real, 1), torch.empty(fake, 1)) == subset


# Inception score.


def test_the_score_is_one_without_information_and_the_number_of_classes_at_most() -> None:
    assert inception_score(torch.zeros(100, 7), 0) == pytest.approx((1, 0), abs=1e-12)
    sure = 50 * torch.eye(5).repeat(400, 1)
    mean, std = inception_score(sure, 0)
    assert 4.9 < mean <= 5  # a split has not exactly as many of each class
    assert std < 0.05
    assert inception_score(50 * torch.eye(5)[:1].repeat(100, 1), 0)[0] == pytest.approx(1, abs=1e-9)


# Precision and recall.


def by_brute_force(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Equations 1 and 2 of arXiv:1904.06991, one pair at a time."""

    def inside(points: list[list[float]], manifold: list[list[float]]) -> float:
        radii = [sorted(math.dist(p, q) for q in manifold)[k] for p in manifold]
        hits = [any(math.dist(x, p) <= radius for p, radius in zip(manifold, radii, strict=True)) for x in points]
        return sum(hits) / len(hits)

    return inside(fake.tolist(), real.tolist()), inside(real.tolist(), fake.tolist())


@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 3), st.integers(1, 6))
def test_precision_and_recall_are_those_of_the_definition(seed: int, k: int, shift: float, d: int) -> None:
    real, fake = points(15, d, seed), 0.7 * points(15, d, seed + 1) + shift
    assert precision_recall(real, fake, k) == pytest.approx(by_brute_force(real, fake, k), abs=1e-12)


def test_the_chunks_of_a_large_set_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = points(90, 5, 1), points(90, 5, 2) + 0.5
    whole = precision_recall(real, fake)
    assert 0 < whole[0] < 1
    assert 0 < whole[1] < 1
    monkeypatch.setattr("cmfast_train.evaluation.metrics.ROWS", 7)
    assert precision_recall(real, fake) == whole


def test_a_set_covers_itself_also_where_points_coincide_and_far_sets_cover_nothing() -> None:
    real = points(600, 70).float()
    assert precision_recall(real, real.clone()) == (1, 1)
    copies = real[:20].repeat(10, 1) + 100  # radii are 0, and distances of 0 a product of large numbers
    assert precision_recall(copies, copies.flip(0)) == (1, 1)
    assert precision_recall(real, real + 50) == (0, 0)


def test_one_good_image_over_and_over_is_precise_and_recalls_nothing() -> None:
    real = points(500, 4)
    precision, recall = precision_recall(real, real[:1].repeat(500, 1))
    assert precision == 1
    assert recall == 1 / 500


def test_as_many_of_each_count() -> None:
    """The balls of a set depend on how dense it is."""
    real, fake = points(400, 3, 1), points(100, 3, 2)
    assert precision_recall(real, fake) == precision_recall(real[:100], fake)
    assert precision_recall(fake, real) == precision_recall(fake, real[:100])


# How many images there must be.


@pytest.mark.parametrize(("metric", "least"), [("fd", 2), ("kid", 4), ("pr", 4), ("is", 10)])
def test_a_metric_says_how_many_images_it_needs_and_works_with_them(metric: str, least: int) -> None:
    check_numbers((metric,), least, 100)
    with pytest.raises(CmfastError, match=f"the metric {metric} needs at least {least} images .*, there are 100 and"):
        check_numbers(("fd", metric), 100, least - 1)
    few, many = points(least, 3, 1), points(100, 3, 2)
    found = {
        "fd": lambda: (frechet_distance(many, few),),
        "kid": lambda: kernel_distance(many, few, 0),
        "pr": lambda: precision_recall(many, few),
        "is": lambda: inception_score(few, 0)[:1],
    }[metric]()
    assert all(math.isfinite(value) for value in found)
