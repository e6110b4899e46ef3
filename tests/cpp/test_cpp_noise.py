# SPDX-License-Identifier: MIT
"""noise.hpp against cmfast.noise: equal to the bit, whatever compilers are allowed to do with arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmfast import noise
from cmfast.noise import _normal_quantile
from helpers import GOLDEN_NOISE
from helpers.cpp import SANITIZE, SOURCES, build, call, compiler

GOLDEN: dict[str, Any] = json.loads(GOLDEN_NOISE.read_text())
# Each would let a compiler round differently: by fusing multiplications and additions, or by vectorising.
BUILDS = {
    "g++": ("g++", SANITIZE),
    "g++ -O3 -march=native": ("g++", ("-O3", "-march=native", "-ffp-contract=fast")),
    "clang++": ("clang++", ("-O1",)),
    "clang++ -O3 -march=native": ("clang++", ("-O3", "-march=native", "-ffp-contract=fast")),
}


@pytest.fixture(scope="module", params=BUILDS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    by, flags = BUILDS[request.param]
    if compiler(by) is None:
        pytest.skip(f"needs {by}")
    return build(tmp_path_factory.mktemp("cpp"), SOURCES / "noise.cpp", *flags, by=by)


def test_philox_gives_the_known_answers(program: Path) -> None:
    rows = [[int(word, 16) for word in each["counter"] + each["key"]] for each in GOLDEN["philox"]]
    found = np.frombuffer(call(program, "philox", given=np.array(rows, np.uint32).tobytes()), np.uint32)
    wanted = [int(word, 16) for each in GOLDEN["philox"] for word in each["words"]]
    assert found.tolist() == wanted


def test_the_noise_is_equal_to_the_golden_values_to_the_bit(program: Path) -> None:
    bits = np.array([int(each["bits"], 16) for each in GOLDEN["quantile"]], np.uint32)
    values = quantile(program, bits).astype(np.float32).view(np.uint32)
    assert [f"{value:08x}" for value in values] == [each["value"] for each in GOLDEN["quantile"]]
    longest: dict[tuple[str, str, int], int] = {}
    for each in GOLDEN["gaussian"]:
        where = each["seed"], each["sample"], each["step"]
        longest[where] = max(longest.get(where, 0), each["index"] + 1)
    for (seed, sample, step), count in longest.items():
        found = np.frombuffer(call(program, "noise", seed, sample, 1, step, count), np.uint32)
        for each in GOLDEN["gaussian"]:
            if (each["seed"], each["sample"], each["step"]) == (seed, sample, step):
                assert f"{found[each['index']]:08x}" == each["value"]
    for each in GOLDEN["sums"]:
        found = call(program, "noise", each["seed"], each["sample"], 1, each["step"], each["count"])
        assert f"{np.frombuffer(found, np.uint32).sum(dtype=np.uint32):08x}" == each["sum"]
    for each in GOLDEN["labels"]:
        found = call(program, "labels", each["seed"], each["sample"], 1, each["classes"])
        assert np.frombuffer(found, np.int64)[0] == each["label"]


def test_a_million_values_are_equal_to_pythons_to_the_bit(program: Path) -> None:
    seed, first = 2**63 + 5, 2**32 - 2  # so that both words of both change
    found = np.frombuffer(call(program, "noise", seed, first, 4, 3, 250_001), np.float32).reshape(4, -1)
    wanted = noise.gaussian(seed, range(first, first + 4), 3, (250_001,))
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def quantile(program: Path, bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(call(program, "quantile", given=bits.tobytes()), np.float64)


def test_the_quantile_is_equal_in_float64_so_no_operation_was_fused(program: Path) -> None:
    """A fused multiplication changes the last bit of half of these, and a float32 in about a thousand million."""
    bits = np.arange(0, 2**32, 65_537, dtype=np.uint32)
    np.testing.assert_array_equal(quantile(program, bits), _normal_quantile(bits))


def test_fast_math_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="compile without -ffast-math"):
        build(tmp_path, SOURCES / "noise.cpp", "-ffast-math")
