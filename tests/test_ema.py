# SPDX-License-Identifier: MIT
"""The moving average of the weights, against the sum that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast_train.ema import update_ema, warm_decay


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
