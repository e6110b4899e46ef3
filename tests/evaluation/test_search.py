# SPDX-License-Identifier: MIT
"""Golden-section search: exact facts of the method, and the noise levels that it is used on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast.errors import ArtifactError, CmfastError
from cmfast.schedule import karras_sigmas
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.evaluation.search import (
    RATIO,
    bounds,
    check_writable,
    golden_section,
    own_checkpoint,
    search_level,
    write_sigmas,
)
from helpers.full_disk import files_of_at_most
from helpers.specs import image_spec

Factory = Callable[..., Path]
SPEC = image_spec(image=(1, 8, 8))


@given(st.floats(-5, 5), st.floats(0.1, 20), st.floats(-1, 2), st.integers(2, 40), st.floats(0.5, 3))
def test_the_minimum_is_within_the_interval_that_is_left(
    low: float, width: float, where: float, calls: int, power: float
) -> None:
    high, minimum = low + width, low + where * width  # may lie outside: then an end is the best there is
    tried = golden_section(lambda x: abs(x - minimum) ** power, low, high, calls)
    assert len(tried) == calls
    assert all(low < x < high for x, _ in tried)
    best = min(tried, key=lambda pair: pair[1])[0]
    # rounding: where |x - minimum| is nothing to a power, values are equal
    assert abs(best - min(max(minimum, low), high)) <= width * RATIO ** (calls - 1) * (1 + 1e-9) + 1e-6


def test_the_points_tried_are_the_golden_ones_and_each_but_the_first_two_costs_one_evaluation() -> None:
    asked: list[float] = []

    def f(x: float) -> float:
        asked.append(x)
        return (x - 0.1) ** 2

    tried = golden_section(f, 0, 1, 7)
    assert [x for x, _ in tried] == asked
    falling = [RATIO**2, RATIO, RATIO**3, RATIO**4, RATIO**5, RATIO**6]
    assert asked[:6] == pytest.approx(falling, rel=1e-12)
    # f(0.056) is above f(0.090), so the minimum is between 0.056 and 0.146
    assert asked[6] == pytest.approx(RATIO**6 + RATIO * (RATIO**4 - RATIO**6), rel=1e-12)
    assert [value for _, value in tried] == [(x - 0.1) ** 2 for x in asked]


@pytest.mark.parametrize(("slope", "end"), [(1, 2.0), (-1, 3.0)])
def test_a_function_that_only_falls_or_rises_is_followed_to_the_end(slope: int, end: float) -> None:
    tried = golden_section(lambda x: slope * x, 2, 3, 30)
    assert tried[-1][0] == pytest.approx(end, abs=RATIO**28)


@pytest.mark.parametrize(("low", "high", "calls"), [(1, 1, 5), (2, 1, 5), (0, 1, 1), (math.nan, 1, 5)])
def test_nothing_to_search_is_an_error(low: float, high: float, calls: int) -> None:
    with pytest.raises(CmfastError, match="low < high and at least 2 evaluations"):
        golden_section(lambda x: x, low, high, calls)


def test_levels_are_searched_on_their_logarithm_and_have_four_digits() -> None:
    tried = search_level(lambda level: abs(math.log(level / 0.821)), SPEC, 0.05, 10, 20)
    best = min(tried, key=lambda pair: pair[1])[0]
    assert best == pytest.approx(0.821, rel=1e-3)
    assert all(level == float(f"{level:.4g}") for level, _ in tried)
    first = math.exp(math.log(10) - RATIO * math.log(10 / 0.05))
    assert tried[0][0] == pytest.approx(first, rel=1e-3)
    assert len(dict(tried)) == len(tried), "a level is evaluated once"


def test_a_model_of_a_grid_is_tried_at_the_levels_of_its_grid() -> None:
    spec = replace(SPEC, grid=40)
    tried = search_level(lambda level: abs(math.log(level / 1.4)), spec, 0.05, 10, 16)
    assert {level for level, _ in tried} <= set(karras_sigmas(40))
    assert min(tried, key=lambda pair: pair[1])[0] == karras_sigmas(40)[22]  # 1.382, of OpenAI's scripts
    assert len(tried) < 16


def test_bounds_are_about_sigma_data_and_inside_the_levels_of_the_model() -> None:
    assert bounds(SPEC, None) == (0.05, 10)
    assert bounds(replace(SPEC, sigma_data=0.1, sigma_max=4.0, sigmas={}), None) == (0.02, 1)
    assert bounds(SPEC, (0.1, 2.0)) == (0.1, 2.0)


@pytest.mark.parametrize("asked", [(0.1,), (2.0, 0.1), (0.002, 1.0), (0.1, 80.0), (0.1, 1.0, 2.0), (math.nan, 1.0)])
def test_bounds_that_make_no_sense_are_refused(asked: tuple[float, ...]) -> None:
    with pytest.raises(CmfastError, match=r"between sigma_min and sigma_max of the model \(0.002 and 80\), got"):
        bounds(SPEC, asked)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_levels_are_written_and_the_weights_stay_to_the_bit(
    suffix: str, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(tiny_checkpoint(10, suffix).read_bytes())
    before = load_checkpoint(tiny_checkpoint(10, suffix))
    write_sigmas(path, (80.0, 1.25))
    after = load_checkpoint(path)
    assert after.sha256() == before.sha256()
    assert after.weights.keys() == before.weights.keys()
    assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)
    assert after.spec == replace(before.spec, sigmas={**before.spec.sigmas, 2: (80.0, 1.25)})
    assert (after.network, after.source) == (before.network, before.source)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_levels_are_not_written_into_other_weights_or_without_space_or_into_a_device(
    tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(tiny_checkpoint(10).read_bytes())
    with pytest.raises(CmfastError, match="has other weights now than those that were searched"):
        write_sigmas(path, (80.0, 1.25), load_checkpoint(tiny_checkpoint(0)).sha256())
    with files_of_at_most(10_000), pytest.raises(CmfastError, match=f"cannot write {path}"):
        write_sigmas(path, (80.0, 1.25), load_checkpoint(path).sha256())
    assert path.read_bytes() == tiny_checkpoint(10).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    with pytest.raises(CmfastError, match="not a regular file"):
        check_writable(Path("/dev/null"))


def test_levels_that_do_not_fall_leave_the_file_as_it_was(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(tiny_checkpoint(10).read_bytes())
    with pytest.raises(CmfastError, match="strictly decrease"):
        write_sigmas(path, (80.0, 90.0))
    assert path.read_bytes() == tiny_checkpoint(10).read_bytes()


def test_only_a_checkpoint_of_ours_can_be_searched(
    tiny_checkpoint: Factory, handmade_onnx: Factory, tmp_path: Path
) -> None:
    assert own_checkpoint(tiny_checkpoint(10)).spec.classes == 10
    with pytest.raises(CmfastError, match="whose levels can be written"):
        own_checkpoint(handmade_onnx())
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(CmfastError, match=r"make it one: cmfast-export .*foreign.pt --format cmfast"):
        own_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(ArtifactError, match="no such file"):
        own_checkpoint(tmp_path / "nowhere.pt")
