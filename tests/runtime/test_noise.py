# SPDX-License-Identifier: MIT
"""The portable noise against known answers, against arithmetic written a second time, and against what a Gaussian is.

golden_noise.json is committed data, the proof for implementations in other languages; nothing here rewrites it.
"""

from __future__ import annotations

import json
import math
import statistics
import struct
from itertools import islice
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cmfast.errors import CmfastError
from cmfast.noise import _log, _normal_quantile, gaussian, labels, philox
from helpers import GOLDEN_NOISE

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(GOLDEN_NOISE.read_text())
U32, U64 = 2**32 - 1, 2**64 - 1
seeds = st.integers(0, U64)
samples = st.integers(0, U64)


# The second implementation: Python integers and floats, one value at a time.


def python_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k, q & U32, p >> 32 ^ d ^ m, p & U32
        k, m = k + 0x9E3779B9 & U32, m + 0xBB67AE85 & U32
    return a, b, c, d


def python_quantile(bits: int) -> float:
    q = (2 * bits + 1 - 2**32) / 2**33
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        top = (((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r
                   + 45921.953931549871457) * r + 13731.693765509461125) * r + 1971.5909503065514427) * r
                + 133.14166789178437745) * r + 3.387132872796366608)  # fmt: skip
        bottom = (((((((5226.495278852854561 * r + 28729.085735721942674) * r + 39307.89580009271061) * r
                      + 21213.794301586595867) * r + 5394.1960214247511077) * r + 687.1870074920579083) * r
                   + 42.313330701600911252) * r + 1.0)  # fmt: skip
        return q * (top / bottom)
    m, e = math.frexp((2**32 - abs(2 * bits + 1 - 2**32)) / 2**33)
    if m < 0.70710678118654752:
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    series = 2 / 21
    for odd in range(19, 0, -2):
        series = series * (s * s) + 2 / odd
    r = math.sqrt(-(e * 0.693147180559945309417 + s * series)) - 1.6
    top = (((((((7.7454501427834140764e-4 * r + 0.0227238449892691845833) * r + 0.24178072517745061177) * r
               + 1.27045825245236838258) * r + 3.64784832476320460504) * r + 5.7694972214606914055) * r
            + 4.6303378461565452959) * r + 1.42343711074968357734)  # fmt: skip
    bottom = (((((((1.05075007164441684324e-9 * r + 5.475938084995344946e-4) * r + 0.0151986665636164571966) * r
                  + 0.14810397642748007459) * r + 0.68976733498510000455) * r + 1.6763848301838038494) * r
               + 2.05319162663775882187) * r + 1.0)  # fmt: skip
    return math.copysign(top / bottom, q)


def python_word(seed: int, sample: int, step: int, index: int) -> int:
    counter = (index // 4, step, sample & U32, sample >> 32)
    return python_philox(counter, (seed & U32, seed >> 32))[index % 4]


def float32_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">f", value), "big")


def bits_of(values: np.ndarray) -> list[int]:
    assert values.dtype == np.float32
    return values.view(np.uint32).ravel().tolist()


def coordinates(entry: dict[str, Any]) -> tuple[int, int, int]:
    return int(entry["seed"]), int(entry["sample"]), entry["step"]


# Known answers.


@pytest.mark.parametrize("entry", GOLDEN["philox"])
def test_philox_gives_the_known_answers_of_random123(entry: dict[str, list[str]]) -> None:
    counter, key, words = ([int(word, 16) for word in entry[name]] for name in ("counter", "key", "words"))
    assert philox(np.array(counter, np.uint32), (key[0], key[1])).tolist() == words
    assert list(python_philox(tuple(counter), tuple(key))) == words  # type: ignore[arg-type]


def test_gaussian_gives_the_golden_values_to_the_bit() -> None:
    for entry in GOLDEN["gaussian"]:
        seed, sample, step = coordinates(entry)
        last = gaussian(seed, sample, step, (entry["index"] + 1,))[-1:]
        assert bits_of(last) == [int(entry["value"], 16)], entry


def test_plain_python_gives_the_golden_values_to_the_bit() -> None:
    for entry in GOLDEN["gaussian"]:
        word = python_word(*coordinates(entry), entry["index"])
        assert f"{word:08x}" == entry["bits"], entry
        assert f"{float32_bits(python_quantile(word)):08x}" == entry["value"], entry


def test_the_golden_values_reach_into_both_tails_and_past_53_bits() -> None:
    words = [int(entry["bits"], 16) for entry in GOLDEN["gaussian"]]
    assert sum(word < 0.075 * 2**32 for word in words) > 5
    assert sum(word > 0.925 * 2**32 for word in words) > 5
    assert any(int(entry["seed"]) == 2**63 + 5 for entry in GOLDEN["gaussian"])
    assert sum(int(entry["sample"]) >= 2**32 for entry in GOLDEN["gaussian"]) > 5


def test_the_quantile_has_golden_values_at_its_ends_borders_and_middle() -> None:
    for entry in GOLDEN["quantile"]:
        word = int(entry["bits"], 16)
        assert bits_of(_normal_quantile(np.array([word], np.uint32)).astype(np.float32)) == [int(entry["value"], 16)]
        assert float32_bits(python_quantile(word)) == int(entry["value"], 16)


@pytest.mark.parametrize("entry", GOLDEN["sums"], ids=lambda entry: entry["count"])
def test_a_long_stretch_adds_up_to_its_golden_sum(entry: dict[str, Any]) -> None:
    seed, sample, step = coordinates(entry)
    values = gaussian(seed, sample, step, (entry["count"],))
    assert int(values.view(np.uint32).sum(dtype=np.uint64)) % 2**32 == int(entry["sum"], 16)
    total = 0
    for block in range((entry["count"] + 3) // 4):
        words = python_philox((block, step, sample & U32, sample >> 32), (seed & U32, seed >> 32))
        total += sum(float32_bits(python_quantile(word)) for word in islice(words, entry["count"] - 4 * block))
    assert total % 2**32 == int(entry["sum"], 16)


def test_labels_have_golden_values() -> None:
    for entry in GOLDEN["labels"]:
        seed, sample = int(entry["seed"]), int(entry["sample"])
        (label,) = labels(seed, np.array([sample], np.uint64), entry["classes"])
        assert label == entry["label"] == python_word(seed, sample, 2**32 - 1, 0) * entry["classes"] >> 32


# Against arithmetic of other people.


def test_the_quantile_agrees_with_scipy() -> None:
    words = np.concatenate([np.linspace(0, U32, 200_001), np.arange(2000), U32 - np.arange(2000)]).astype(np.uint32)
    want = scipy.special.ndtri((words.astype(np.float64) + 0.5) / 2**32)
    # Both claim about 1e-16 of relative error; the tails also carry the error of their logarithm.
    np.testing.assert_allclose(_normal_quantile(words), want, rtol=4e-15)


@given(st.integers(0, U32))
def test_the_quantile_agrees_with_the_standard_library(word: int) -> None:
    want = statistics.NormalDist().inv_cdf((word + 0.5) / 2**32)  # AS 241 too, with the C library's logarithm
    assert python_quantile(word) == pytest.approx(want, rel=1e-14, abs=0)


def test_the_logarithm_of_the_tails_is_exact_to_two_units_in_the_last_place() -> None:
    x = np.concatenate(
        [
            np.geomspace(2.0**-33, 0.075, 100_001),
            2.0 ** -np.arange(4, 34),
            0.7071067811865475 * 2.0 ** -np.arange(4, 34),
        ]
    )
    np.testing.assert_allclose(_log(x), np.log(x), rtol=2 * np.finfo(float).eps)


@given(seed=seeds, sample=samples, step=st.integers(0, 2**32 - 2), size=st.integers(1, 9))
def test_numpy_and_plain_python_agree_to_the_bit(seed: int, sample: int, step: int, size: int) -> None:
    want = [float32_bits(python_quantile(python_word(seed, sample, step, index))) for index in range(size)]
    assert bits_of(gaussian(seed, sample, step, (size,))) == want


# Properties.


@given(seed=seeds, cut=st.integers(0, 7), step=st.integers(0, 9), shape=st.sampled_from([(5,), (1, 2, 3), (3, 8, 8)]))
def test_a_batch_is_its_images_however_it_is_cut(seed: int, cut: int, step: int, shape: tuple[int, ...]) -> None:
    whole = gaussian(seed, range(7), step, shape)
    assert whole.shape == (7, *shape)
    parts = [gaussian(seed, range(cut), step, shape)] if cut else []
    parts += [gaussian(seed, range(cut, 7), step, shape)] if cut < 7 else []
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(gaussian(seed, 6, step, shape), whole[6])


@given(seed=seeds, short=st.integers(1, 50), more=st.integers(0, 50))
def test_a_smaller_image_is_the_beginning_of_a_larger_one(seed: int, short: int, more: int) -> None:
    np.testing.assert_array_equal(gaussian(seed, 3, 1, (short,)), gaussian(seed, 3, 1, (short + more,))[:short])


@given(seed=seeds, other=seeds, sample=samples, step=st.integers(0, 100))
def test_other_coordinates_give_other_noise(seed: int, other: int, sample: int, step: int) -> None:
    here = gaussian(seed, sample, step, (16,))
    elsewhere = [gaussian(seed, sample ^ 1, step, (16,)), gaussian(seed, sample ^ 2**32, step, (16,))]
    elsewhere += [gaussian(seed, sample, step + 1, (16,))]
    elsewhere += [gaussian(other, sample, step, (16,))] if other != seed else []
    for there in elsewhere:
        assert (here == there).sum() <= 2  # one equal float32 in 16 pairs is rare, three do not happen


def test_samples_on_both_sides_of_2_to_the_63_go_into_one_batch() -> None:
    mixed = [1, 2**63 - 1, 2**63, U64]
    np.testing.assert_array_equal(gaussian(0, mixed, 0, (4,)), [gaussian(0, sample, 0, (4,)) for sample in mixed])


@given(st.integers(0, U32))
def test_the_quantile_is_odd_to_the_bit(word: int) -> None:
    below, above = _normal_quantile(np.array([word, U32 - word], np.uint32))
    assert below == -above


@given(st.lists(st.integers(0, U32), min_size=2, max_size=50))
def test_the_quantile_never_falls(words: list[int]) -> None:
    values = _normal_quantile(np.array(sorted(words), np.uint32)).astype(np.float32)
    assert (np.diff(values) >= 0).all()


def test_the_noise_is_gaussian() -> None:
    z = gaussian(0, range(16), 0, (1 << 16,)).astype(np.float64).ravel()
    n = z.size
    # Five standard errors of each moment of n unit normals: a correct generator fails once in two million seeds.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    assert 4.5 < np.abs(z).max() <= 6.3376  # 32 bits reach 6.3375 and no further


def test_images_steps_and_seeds_are_independent() -> None:
    z = gaussian(0, [0, 1, 2**32], 0, (1 << 16,))
    rows = np.vstack([z, gaussian(0, 0, 1, (1 << 16,)), gaussian(1, 0, 0, (1 << 16,)), np.roll(z[0], 1)])
    correlation = np.corrcoef(rows.astype(np.float64)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / 2**8  # five standard errors of 2**16 pairs


@given(seed=seeds, first=st.integers(0, 2**62), classes=st.integers(1, 10_000))
def test_labels_are_in_range_and_belong_to_the_image(seed: int, first: int, classes: int) -> None:
    drawn = labels(seed, range(first, first + 8), classes)
    assert drawn.dtype == np.int64
    assert ((drawn >= 0) & (drawn < classes)).all()
    np.testing.assert_array_equal(labels(seed, [first + 5], classes), drawn[5:6])


def test_labels_are_uniform() -> None:
    counts = np.bincount(labels(0, range(100_000), 10), minlength=10)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


# Errors.


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_does_not_fit_is_named(seed: int) -> None:
    with pytest.raises(CmfastError, match=rf"from 0 to 2\*\*64 - 1, got {seed}"):
        gaussian(seed, 0, 0, (4,))
    with pytest.raises(CmfastError, match=f"got {seed}"):
        labels(seed, [0], 10)


@pytest.mark.parametrize("sample", [-1, [3, -1], 1.5, [0.0], 2**64, "7", None, True, [[0, 1]]])
def test_a_sample_that_is_no_index_is_named(sample: Any) -> None:
    with pytest.raises(CmfastError, match="sample must be a whole number from 0, or a list of them, got"):
        gaussian(0, sample, 0, (4,))


@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_that_does_not_fit_is_named(step: int) -> None:
    with pytest.raises(CmfastError, match=f"got {step}"):
        gaussian(0, 0, step, (4,))
