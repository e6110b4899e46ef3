# SPDX-License-Identifier: MIT
"""The moving averages of the weights, against the sums that they stand for."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from cmfast.errors import CmfastError
from cmfast_train.training.ema import (
    MAX_STD,
    Averages,
    Snapshot,
    gamma_of_std,
    posthoc_coefficients,
    posthoc_error,
    power_decay,
    reconstruct,
    std_of_gamma,
    update_ema,
    warm_decay,
)
from cmfast_train.training.parallel import fill


def test_the_average_is_the_weighted_sum_of_all_that_came() -> None:
    decay, history = 0.9, torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    average = [history[0].clone()]
    for weights in history[1:]:
        update_ema(average, [weights], decay)
    factors = (1 - decay) * decay ** torch.arange(48, -1, -1, dtype=torch.float64)
    want = decay**49 * history[0].double() + torch.einsum("t,tij->ij", factors, history[1:].double())
    np.testing.assert_allclose(average[0], want, rtol=0, atol=1e-6)  # fifty roundings of numbers around one


@pytest.mark.parametrize(("decay", "want"), [(0.0, 5.0), (0.5, 3.0), (1.0, 1.0)])
def test_decay_is_the_share_of_the_old(decay: float, want: float) -> None:
    average, weights = [torch.ones(2), torch.ones(3, 3)], [torch.full([2], 5.0), torch.full([3, 3], 5.0)]
    addresses = [tensor.data_ptr() for tensor in average]
    update_ema(average, weights, decay)
    assert all((tensor == want).all() for tensor in average)
    assert [tensor.data_ptr() for tensor in average] == addresses  # in place: others hold these tensors
    assert all((tensor == 5).all() for tensor in weights)


def test_the_average_of_half_precision_weights_stays_float32() -> None:
    average = [torch.ones(1)]
    for _ in range(1000):
        update_ema(average, [torch.full([1], 2.0, dtype=torch.bfloat16)], 0.999)
    assert average[0].dtype == torch.float32
    assert average[0].item() == pytest.approx(2 - 0.999**1000, abs=1e-4)  # bfloat16 itself would never have left 1


def test_parameters_are_averaged_without_a_graph() -> None:
    average, parameter = [torch.zeros(2)], torch.nn.Parameter(torch.ones(2))
    update_ema(average, [parameter], 0.5)
    assert not average[0].requires_grad


def test_a_missing_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        update_ema([torch.zeros(1), torch.zeros(1)], [torch.zeros(1)], 0.5)


@given(decay=st.floats(0, 0.99999), step=st.integers(0, 10**7))
def test_the_decay_warms_up_to_its_value(decay: float, step: int) -> None:
    assert 0 <= warm_decay(decay, step) <= warm_decay(decay, step + 1) <= decay
    assert warm_decay(decay, 10**8) == decay


def test_the_first_decays_forget_quickly() -> None:
    assert [warm_decay(0.999, step) for step in (0, 1, 90)] == [0.1, 2 / 11, 0.91]


# Power functions: EDM2, arXiv:2312.02696.


def shares(steps: int, gamma: float, until: int | None = None) -> Any:
    """Return how much each of `steps` updates weighs in the average after the first `until` of them, float64."""
    t = np.minimum(np.arange(steps + 1) / (until or steps), 1)
    return np.diff(t ** (gamma + 1))


def test_two_widths_of_the_paper_have_its_exponents() -> None:
    assert [round(gamma_of_std(std), 2) for std in (0.05, 0.10)] == [16.97, 6.94]  # Section 3.1
    assert gamma_of_std(MAX_STD) == pytest.approx(0, abs=1e-14)
    assert std_of_gamma(0) == pytest.approx(math.sqrt(1 / 12), rel=1e-15)  # of the uniform distribution


@given(std=st.floats(1e-6, MAX_STD))
def test_every_width_has_an_exponent(std: float) -> None:
    assert std_of_gamma(gamma_of_std(std)) == pytest.approx(std, rel=1e-12)


@given(gamma=st.floats(0, 1e6))
def test_every_exponent_has_a_width(gamma: float) -> None:
    assume(std_of_gamma(gamma) <= MAX_STD)
    # Where the slope of std is shallow, at gamma = 0 it is -1/6 of std, a rounding of std moves gamma by six.
    assert gamma_of_std(std_of_gamma(gamma)) == pytest.approx(gamma, rel=1e-12, abs=1e-13)


@given(std=st.floats(1e-3, MAX_STD), wider=st.floats(1.001, 10))
def test_a_wider_profile_has_a_smaller_exponent(std: float, wider: float) -> None:
    assume(std * wider <= MAX_STD)
    assert gamma_of_std(std * wider) < gamma_of_std(std)


def test_the_width_is_the_standard_deviation_of_the_profile() -> None:
    p, t = shares(100_000, gamma_of_std(0.1)), (np.arange(100_000) + 0.5) / 100_000
    assert math.sqrt(p @ t**2 - (p @ t) ** 2) == pytest.approx(0.1, rel=1e-6)  # the rectangles' own error is 1e-10


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3, math.nan, math.inf, 1e-300, 1e-320])
def test_a_width_that_no_profile_has_is_refused(std: float) -> None:
    with pytest.raises(CmfastError, match=r"at least 1e-07 and at most 0.2887 .*; got"):
        gamma_of_std(std)


def test_the_first_power_update_copies_and_later_ones_weigh_by_the_profile() -> None:
    gamma, history = gamma_of_std(0.1), torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    assert power_decay(1, gamma) == 0
    average = [torch.full([5], 1e30)]
    for step, weights in enumerate(history, start=1):
        update_ema(average, [weights], power_decay(step, gamma))
        if step == 1:
            np.testing.assert_array_equal(average[0], weights)
    want = shares(200, gamma) @ history.double().numpy()
    np.testing.assert_allclose(average[0], want, rtol=0, atol=1e-6)  # two hundred roundings that decay, of about one


# Several averages at once.

RATES, STDS = (0.5, 0.9999), (0.05, 0.1)


def history(steps: int, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {
            "a": torch.randn(3, 4, generator=generator).to(dtype),
            "b": torch.randn(5, generator=generator).to(dtype),
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_average_is_what_it_would_be_alone(dtype: torch.dtype) -> None:
    first = next(history(1, dtype))
    averages = Averages(first, RATES, STDS)
    alone = {name: [first[key].clone().float() for key in first] for name in ("0.5", "0.9999", "std0.05", "std0.1")}
    for step, weights in enumerate(history(20, dtype)):
        averages.update(weights, step)
        for rate in RATES:
            update_ema(alone[f"{rate}"], weights.values(), warm_decay(rate, step))
        for std in STDS:
            update_ema(alone[f"std{std}"], weights.values(), power_decay(step + 1, gamma_of_std(std)))
    assert list(averages.averages) == list(alone)
    for name, want in alone.items():
        for got, one in zip(averages[name].values(), want, strict=True):
            assert got.dtype == torch.float32
            np.testing.assert_array_equal(got, one)


def test_the_averages_begin_as_copies_of_the_weights() -> None:
    weights = {"w": torch.nn.Parameter(torch.ones(3))}
    averages = Averages(weights, RATES, STDS)
    with torch.no_grad():
        weights["w"].fill_(2)
    for average in averages.averages.values():
        assert (average["w"] == 1).all()
        assert not average["w"].requires_grad


def test_an_average_finds_its_weight_by_name() -> None:
    averages = Averages({"a": torch.zeros(2), "b": torch.zeros(2)}, rates=(0.5,))
    averages.update({"b": torch.ones(2), "a": torch.full([2], 5.0)}, step=100)
    assert [averages["0.5"][name].tolist() for name in ("a", "b")] == [[2.5, 2.5], [0.5, 0.5]]


def test_a_state_that_was_saved_goes_on_to_the_bit() -> None:
    every = list(history(30))
    plain, cut = Averages(every[0], RATES, STDS), Averages(every[0], RATES, STDS)
    for step, weights in enumerate(every):
        plain.update(weights, step)
    for step, weights in enumerate(every[:12]):
        cut.update(weights, step)
    file = io.BytesIO()
    torch.save(cut.state(), file)
    file.seek(0)
    again = Averages(every[5], RATES, STDS)
    held = again["0.5"]["a"]
    for name, average in torch.load(file, weights_only=True).items():
        fill(again[name], average)
    for step, weights in enumerate(every[12:], start=12):
        again.update(weights, step)
    for name, average in plain.averages.items():
        for key, tensor in average.items():
            np.testing.assert_array_equal(again[name][key], tensor)
    assert held is again["0.5"]["a"]  # in place: others hold these tensors


def test_an_average_that_is_requested_twice_is_refused() -> None:
    with pytest.raises(CmfastError, match="every average must be different"):
        Averages({"w": torch.zeros(2)}, (0.5, 0.5))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_averages_of_sharded_weights_are_sharded_and_the_same() -> None:
    mesh = init_device_mesh("cpu", (1,))

    def sharded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in weights.items()}

    first = next(history(1))
    plain, spread = Averages(first, RATES, STDS), Averages(sharded(first), RATES, STDS)
    for step, weights in enumerate(history(4)):
        plain.update(weights, step)
        spread.update(sharded(weights), step)
    again = Averages(sharded(first), RATES, STDS)
    for name, average in spread.state().items():
        fill(again[name], {key: tensor.full_tensor() for key, tensor in average.items()})
    for name, average in plain.averages.items():
        for key, tensor in average.items():
            got = again[name][key]
            assert isinstance(got, DTensor)
            assert got.placements == (Shard(0),)
            np.testing.assert_array_equal(got.full_tensor(), tensor)


# Snapshots combined after training.

steps_and_stds = st.lists(
    st.tuples(st.integers(1, 10**6), st.sampled_from([0.05, 0.1, 0.15])), min_size=1, max_size=12, unique=True
)


@given(stored=steps_and_stds, which=st.integers(0, 11))
def test_an_average_that_was_stored_is_taken_as_it_is(stored: list[tuple[int, float]], which: int) -> None:
    which %= len(stored)
    profiles = [(step, gamma_of_std(std)) for step, std in stored]
    factors = posthoc_coefficients(profiles, *profiles[which])
    np.testing.assert_array_equal(factors, np.eye(len(stored))[which])


@given(stored=steps_and_stds, std=st.floats(0.02, MAX_STD))
def test_the_factors_sum_to_one(stored: list[tuple[int, float]], std: float) -> None:
    profiles, last = [(step, gamma_of_std(s)) for step, s in stored], max(step for step, _ in stored)
    factors = posthoc_coefficients(profiles, last, gamma_of_std(std))
    assert math.fsum(factors) == pytest.approx(1, abs=1e-14 * np.abs(factors).sum())  # a dozen roundings


def test_the_combination_is_the_best_and_its_error_is_what_is_said() -> None:
    steps, gamma = 2000, gamma_of_std(0.15)
    stored = [(step, gamma_of_std(std)) for step in (500, 1000, 1500, 2000) for std in STDS]
    factors = posthoc_coefficients(stored, steps, gamma)
    profiles = np.stack([shares(steps, g, until) for until, g in stored])
    want = shares(steps, gamma)

    def error(factors: Any) -> float:
        return float(np.linalg.norm(factors @ profiles - want) / np.linalg.norm(want))

    # The sums over 2000 steps stand for the integrals up to the curvature of the profiles within a step.
    assert posthoc_error(stored, factors, steps, gamma) == pytest.approx(error(factors), rel=1e-3)
    away = np.random.default_rng(0).standard_normal((50, len(stored))) * 1e-3
    away -= away.mean(axis=1, keepdims=True)  # so that the sum stays 1
    assert all(error(factors + change) > error(factors) for change in away)


@pytest.mark.parametrize(("count", "std"), [(2, 0.07), (8, 0.03), (8, 0.07), (8, 0.15), (8, 0.2), (32, 0.25)])
def test_snapshots_give_the_average_that_training_would_have_kept(count: int, std: float) -> None:
    steps, values, generator = 1600, 500, torch.Generator().manual_seed(0)
    walk = {"w": torch.zeros(values)}
    averages = Averages(walk, stds=(*STDS, std))
    snapshots = []
    for step in range(steps):
        walk["w"] += torch.randn(values, generator=generator)
        averages.update(walk, step)
        if (step + 1) % (steps // count) == 0:
            snapshots += [Snapshot(step=step + 1, std=s, weights={"w": averages[f"std{s}"]["w"].clone()}) for s in STDS]
    got, want = reconstruct(snapshots, std)["w"], averages[f"std{std}"]["w"]

    # The difference is sum_k e_k w_k with e the difference of the profiles; for a random walk w_k of unit steps it is
    # normal with the variance sum_j (sum of e_k from j on)^2.
    stored = [(snapshot.step, gamma_of_std(snapshot.std)) for snapshot in snapshots]
    factors = posthoc_coefficients(stored, steps, gamma_of_std(std))
    e = sum(x * shares(steps, g, until) for x, (until, g) in zip(factors, stored, strict=True))
    e = e - shares(steps, gamma_of_std(std))
    tail = e[::-1].cumsum()
    predicted = math.sqrt(tail @ tail)
    assert got.dtype == torch.float32
    # 500 values: their root mean square is within 1/sqrt(1000) of the deviation, five times that; and the averages'
    # own roundings, of numbers around 40, which the factors (at most 8 in sum) magnify.
    assert (got - want).square().mean().sqrt().item() == pytest.approx(predicted, rel=0.16, abs=1e-4)
    # It is an improvement: much nearer to what was wanted than the nearest that was stored.
    nearest = min((averages[f"std{s}"]["w"] - want).square().mean().sqrt().item() for s in STDS)
    assert predicted < 0.3 * nearest


def test_weights_that_stand_still_come_out_as_they_are() -> None:
    still = {"a": torch.full([4], 0.3), "b": torch.full([2, 2], -7.1)}
    snapshots = [Snapshot(step=step, std=std, weights=still) for step in (10, 20, 30) for std in STDS]
    for name, tensor in reconstruct(snapshots, 0.2).items():
        np.testing.assert_array_equal(tensor, still[name])


def test_an_average_can_end_before_the_last_snapshot() -> None:
    snapshots = [Snapshot(step=step, std=0.1, weights={"w": torch.tensor([float(step)])}) for step in (10, 20)]
    assert reconstruct(snapshots, 0.1, step=10)["w"].item() == 10
    assert reconstruct(snapshots, 0.1)["w"].item() == 20
