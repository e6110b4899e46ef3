# SPDX-License-Identifier: MIT
"""The description of a model: what it refuses, what it survives, which noise levels it chooses."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmfast.errors import CmfastError
from cmfast.schedule import DiscreteTimes
from cmfast.spec import C_NOISES, RENOISES, SCALINGS, ModelSpec
from helpers.specs import image_spec

NAN, INF = float("nan"), float("inf")


def spec(**values: Any) -> ModelSpec:
    return image_spec(**{"image": (1, 8, 8), **values})


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    low, high = draw(st.floats(1e-4, 0.1)), draw(st.floats(1, 200))
    levels = st.lists(st.floats(low * 1.01, high), min_size=1, max_size=5, unique=True)
    lists = [tuple(sorted(levels, reverse=True)) for levels in draw(st.lists(levels, max_size=4))]
    scaling = draw(st.sampled_from(SCALINGS))
    return spec(
        image=draw(st.tuples(*[st.integers(1, 65536)] * 3)),
        classes=draw(st.integers(0, 10**6)),
        sigma_min=low,
        sigma_max=high,
        sigma_data=0.5 if scaling == "cloneofsimo" else draw(st.floats(0.01, 10)),
        scaling=scaling,
        c_noise=draw(st.sampled_from(C_NOISES)),
        renoise=draw(st.sampled_from(RENOISES)),
        times=DiscreteTimes(steps=draw(st.integers(2, 3000)), beta_end=draw(st.floats(0.001, 0.1))),
        clip=draw(st.booleans()),
        grid=draw(st.one_of(st.just(0), st.integers(2, 65536))),
        sigmas={len(levels): levels for levels in lists},
    )


@given(specs())
def test_a_spec_survives_json_to_the_bit(model: ModelSpec) -> None:
    assert ModelSpec.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_the_dictionary_has_the_keys_of_the_contract_and_no_others() -> None:
    assert spec(classes=10).to_dict() == {
        "shape": [1, 8, 8], "data": "image", "conditions": [{"name": "label", "kind": "class", "classes": 10}],
        "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
        "scaling": "boundary", "c_noise": "250ln", "renoise": "sqrt", "clip": True,
        "sigmas": {"1": [80.0], "2": [80.0, 0.8]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": (8, 8)}, "images have the shape"),
        ({"grid": 1}, "grid must be 0 .none. or 2 to 65536 levels, got 1"),
        ({"grid": 2**31}, "grid must be 0 .none. or 2 to 65536 levels"),
        ({"scaling": "cloneofsimo", "sigma_data": 1.0}, "cloneofsimo has sigma_data 0.5 built in, got 1"),
        ({"image": (1, 8, 0)}, r"got \(1, 8, 0\)"),
        ({"image": (1, 8, 8.0)}, "whole numbers from 1 to 65536"),
        ({"image": (1, 8, 65537)}, "whole numbers from 1 to 65536"),
        ({"classes": -1}, r"classes must be a positive whole number, got -1"),
        ({"classes": 2.0}, "classes must be"),
        ({"sigma_min": 0}, "must be positive numbers"),
        ({"sigma_max": INF}, "must be positive numbers"),
        ({"sigma_data": NAN}, "must be positive numbers"),
        ({"sigma_data": "0.5"}, "must be positive numbers"),
        ({"sigma_min": 90.0}, "need sigma_min < sigma_max, got 90 and 80"),
        (
            {"scaling": "vp"},
            "scaling must be one of boundary, edm, trigflow, cloneofsimo, flow, x0, .* got 'vp'",
        ),
        ({"c_noise": "ln"}, "c_noise must be one of 250ln, ln/4, raw, trig, flow, discrete, got 'ln'"),
        ({"renoise": "none"}, "renoise must be one of sqrt, plain, ddim, got 'none'"),
        ({"sigmas": {2: (80.0,)}}, "the default noise levels for 2 steps are 1"),
        ({"sigmas": {2: (80.0, 90.0)}}, "90 follows 80"),
        ({"sigmas": {0: ()}}, "no noise levels"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        spec(**values)


@pytest.mark.parametrize("missing", sorted(spec().to_dict()))
def test_a_missing_key_is_named(missing: str) -> None:
    values = spec().to_dict()
    del values[missing]
    with pytest.raises(CmfastError, match=f"the description of the model lacks {missing}"):
        ModelSpec.from_dict(values)


def test_unknown_keys_are_ignored() -> None:
    assert ModelSpec.from_dict({**spec().to_dict(), "invented": [1, 2], "kind": "denoiser"}) == spec()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": 8}, {"shape": "abc"}, {"shape": [1, 8, "8"]}, {"conditions": 8}, {"conditions": ["label"]},
        {"data": "auto"}, {"data": ["image"]}, {"second_time": 1}, {"sigmas": [80.0]}, {"sigmas": {"one": [80.0]}},
        {"sigmas": {"1": [None]}}, {"sigmas": {"1": 80.0}}, {"sigma_min": "small"}, {"sigma_max": 10**400},
        {"conditions": None}, {"scaling": ["edm"]}, {"sigmas": {"1": ["nan"]}}, {"clip": "false"}, {"clip": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_in_our_own_words(wrong: dict[str, Any]) -> None:
    with pytest.raises(CmfastError):
        ModelSpec.from_dict({**spec().to_dict(), **wrong})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(spec().to_dict())), values, max_size=3))
def test_whatever_json_holds_it_is_a_spec_or_our_error(wrong: dict[str, Any]) -> None:
    try:
        model = ModelSpec.from_dict({**spec().to_dict(), **wrong})
    except CmfastError:
        return
    assert ModelSpec.from_dict(model.to_dict()) == model


def test_steps_pick_the_models_own_levels_and_the_fewest_without_steps() -> None:
    model = spec(sigmas={2: (80.0, 0.8), 4: (80.0, 5.0, 0.8, 0.2)})
    assert model.sigmas_for(4) == (80.0, 5.0, 0.8, 0.2)
    assert model.sigmas_for() == (80.0, 0.8)
    assert model.sigmas_for(sigmas=[80, 1.5, 0.3]) == (80.0, 1.5, 0.3)
    assert model.sigmas_for(2, [70.0, 1.0]) == (70.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 2, "sigmas": [80.0]}, "2 steps were requested with 1 noise levels; pass one of the two"),
        ({"steps": 0}, "the number of steps must be at least 1, got 0"),
        ({"steps": 3}, "for these numbers of steps: 1, 2; for 3, pass them, for example sigmas 80"),
        ({"sigmas": [80.0, 90.0]}, "90 follows 80"),
        ({"sigmas": []}, "no noise levels were given"),
    ],
)
def test_steps_without_levels_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        spec().sigmas_for(**arguments)


@given(steps=st.integers(1, 40), sigma_max=st.floats(1, 200), sigma_min=st.floats(1e-3, 0.01))
def test_the_levels_that_the_error_suggests_are_accepted(steps: int, sigma_max: float, sigma_min: float) -> None:
    model = spec(sigmas={}, sigma_max=sigma_max, sigma_min=sigma_min)
    with pytest.raises(CmfastError) as raised:
        model.sigmas_for(steps)
    suggested = re.search(r"for example sigmas (\S+)", str(raised.value))
    assert suggested
    assert len(model.sigmas_for(sigmas=[float(s) for s in suggested[1].split(",")])) == steps


def test_an_absurd_number_of_steps_is_answered_in_one_short_line() -> None:
    with pytest.raises(CmfastError) as raised:
        spec().sigmas_for(200_000)
    assert len(str(raised.value)) < 1000


def test_whole_numbers_are_the_floats_that_a_manifest_has() -> None:
    model = spec(sigma_max=80, sigma_min=1, sigma_data=1, sigmas={1: (80,), 2: [80, 2]})
    assert model == spec(sigma_max=80.0, sigma_min=1.0, sigma_data=1.0, sigmas={1: (80.0,), 2: (80.0, 2.0)})
    assert json.dumps(model.to_dict()) == json.dumps(ModelSpec.from_dict(model.to_dict()).to_dict())
