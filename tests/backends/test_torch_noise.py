# SPDX-License-Identifier: MIT
"""The portable noise in PyTorch: the bits of `cmfast.noise`, whose own tests say what those must be."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cmfast import noise as portable
from cmfast.errors import CmfastError, CmfastWarning
from cmfast_train.backends import torch_noise
from cmfast_train.backends.torch_noise import key_of
from helpers import GOLDEN_NOISE

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(GOLDEN_NOISE.read_text())
U32, U64 = 2**32 - 1, 2**64 - 1
INDICES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, U64]  # as far as they go, and on both sides of a sign and a word


def patterns(samples: Any) -> torch.Tensor:
    """Return indices of images as int64 of the same bits."""
    return torch.from_numpy(np.array(samples, np.uint64).view(np.int64))


def bits_of(values: Any) -> npt.NDArray[np.uint32]:
    array = np.asarray(values)
    assert array.dtype == np.float32
    return array.view(np.uint32)


def test_a_million_values_have_the_bits_of_numpy() -> None:
    seed, shape, steps = 2**63 + 5, (3, 160, 150), 2
    assert steps * len(INDICES) * np.prod(shape) > 10**6
    got = torch_noise.gaussian(key_of(seed), patterns(INDICES), steps, shape)
    assert got.shape == (steps, len(INDICES), *shape)
    for step in range(steps):
        want = portable.gaussian(seed, np.array(INDICES, np.uint64), step, shape)
        np.testing.assert_array_equal(bits_of(got[step]), bits_of(want))


def test_the_golden_values_of_gaussian_are_drawn_to_the_bit() -> None:
    for entry in GOLDEN["gaussian"]:
        samples, size = patterns([int(entry["sample"])]), entry["index"] + 1
        last = torch_noise.gaussian(key_of(int(entry["seed"])), samples, 1, (size,), first=entry["step"])[0, 0, -1]
        assert int(bits_of(last)) == int(entry["value"], 16), entry


def test_the_golden_values_of_the_quantile_are_those_at_its_ends_and_borders() -> None:
    words = torch.tensor([int(entry["bits"], 16) for entry in GOLDEN["quantile"]])
    got = bits_of(torch_noise.quantile(words).float())
    assert got.tolist() == [int(entry["value"], 16) for entry in GOLDEN["quantile"]]


def test_the_golden_labels_are_drawn() -> None:
    for entry in GOLDEN["labels"]:
        got = torch_noise.labels(key_of(int(entry["seed"])), patterns([int(entry["sample"])]), entry["classes"])
        assert got.tolist() == [entry["label"]]


def test_the_quantile_has_the_bits_of_numpy_in_float64_from_end_to_end() -> None:
    every = np.linspace(0, U32, 200_001).astype(np.uint32)
    ends = np.arange(5000, dtype=np.uint32)
    border = np.uint32(0.075 * 2**32) - 2500 + ends  # between the tail and the centre
    words = np.concatenate([every, ends, U32 - ends, border, U32 - border]).astype(np.uint32)
    got = torch_noise.quantile(torch.from_numpy(words.astype(np.int64))).numpy()
    np.testing.assert_array_equal(got.view(np.uint64), portable._normal_quantile(words).view(np.uint64))


@given(
    seed=st.integers(0, U64),
    samples=st.lists(st.integers(0, U64), min_size=1, max_size=4),
    first=st.integers(0, U32 - 2),
    shape=st.sampled_from([(1,), (5,), (1, 3, 3), (3, 8, 8)]),
)
def test_any_coordinates_give_the_bits_of_numpy(
    seed: int, samples: list[int], first: int, shape: tuple[int, ...]
) -> None:
    got = torch_noise.gaussian(key_of(seed), patterns(samples), 2, shape, first=first)
    want = [portable.gaussian(seed, np.array(samples, np.uint64), first + k, shape) for k in range(2)]
    np.testing.assert_array_equal(bits_of(got), bits_of(np.stack(want)))


@pytest.mark.parametrize("classes", [1, 10, 1000, 2**31 + 1, 2**32])
def test_labels_are_those_of_numpy_up_to_the_most_classes(classes: int) -> None:
    samples = [*range(500), *INDICES]
    got = torch_noise.labels(key_of(U64), patterns(samples), classes)
    np.testing.assert_array_equal(got, portable.labels(U64, np.array(samples, np.uint64), classes))


def test_the_last_step_is_one_below_that_of_the_labels() -> None:
    got = torch_noise.gaussian(key_of(7), patterns([3]), 1, (9,), first=U32)
    np.testing.assert_array_equal(got[0, 0], portable.gaussian(7, 3, U32, (9,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True])
def test_a_seed_that_is_none_is_refused_as_numpys_noise_refuses_it(seed: Any) -> None:
    with pytest.raises(CmfastError, match="the seed must be a whole number from 0"):
        key_of(seed)


# The Triton kernel, where there is no card: by Triton's interpreter, which is numpy, and as compiled text.

INTERPRETED = """
import numpy as np, torch
from cmfast import noise as portable
from cmfast_train.kernels import noise as kernels
from cmfast_train.backends.torch_noise import key_of

def compare(seed, samples, slices, size, first):
    samples = np.array(samples, np.uint64)
    got = kernels.gaussian(key_of(seed), torch.from_numpy(samples.view(np.int64)), slices, size, first).numpy()
    assert got.shape == (slices, len(samples), size) and got.dtype == np.float32
    for k in range(slices):
        want = portable.gaussian(seed, samples, first + k, (size,))
        np.testing.assert_array_equal(got[k].view(np.uint32), want.view(np.uint32))
    return got.size

ends = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
size = 4 * kernels.BLOCK
compare(0, [3], 1, 1, 0)
compare(1, [], 2, 5, 0)
compare(2**64 - 1, [2**64 - 1, 5], 3, size, 2**32 - 3)
compare(2**32, ends, 1, size + 1, 2**31 - 1)
kernels.BLOCK = 8192  # a program costs the interpreter the same, whatever its size
count = compare(2**63 + 5, ends, 2, 72_000, 0)
assert count > 10**6
"""


def test_the_triton_kernel_draws_a_million_values_with_the_bits_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported, so in a process of its own
    result = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def ptx_of(capability: int, *, fuses: bool) -> str:
    """Return the kernel compiled for a card, as text; assemble it too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cmfast_train.kernels import noise as kernels

    types = dict.fromkeys(("images", "size", "first", "tiles"), "i32") | {"key": "*i64", "samples": "*i64"}
    signature = {"noise": "*fp32", **types, "BLOCK": "constexpr"}
    source = ASTSource(fn=kernels.draw, signature=signature, constexprs={"BLOCK": kernels.BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": fuses})
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def double_operations(ptx: str) -> set[str]:
    """Return the operations on float64 that can round: "mul.rn.f64"; without "rn" ptxas may fuse them."""
    return set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp)\S*\.f64\b", ptx))


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_the_triton_kernel_compiles_for_a_card_and_no_operation_of_it_rounds_otherwise(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = ptx_of(capability, fuses=False)
    assert double_operations(ptx) == {f"{name}.rn.f64" for name in ("mul", "add", "sub", "div", "sqrt")}
    for coefficient in (c for row in (*portable.CENTRE, *portable.TAIL, portable.ATANH, (portable.LN2,)) for c in row):
        assert struct.pack(">d", coefficient).hex() in ptx.lower(), "a constant was rounded to float32"


def test_the_triton_kernel_would_be_fused_if_the_launch_did_not_forbid_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "fma.rn.f64" in double_operations(ptx_of(90, fuses=True))


def test_a_kernel_that_does_not_run_is_one_warning_and_not_an_error() -> None:
    pytest.importorskip("triton")
    torch_noise.kernel_works.cache_clear()
    with pytest.warns(CmfastWarning, match=r"^Triton does not work on cpu \(.+\); noise is drawn without it") as caught:
        torch_noise.kernel_works(torch.device("cpu"))  # which Triton has no driver for
    assert not torch_noise.kernel_works(torch.device("cpu"))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("works", [True, False])
def test_the_kernel_draws_only_where_it_works(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels import noise

    asked = []
    monkeypatch.setattr(torch_noise, "kernel_works", lambda device: (asked.append(device.type), works)[1])
    monkeypatch.setattr(torch_noise, "_by_operations", lambda *_: torch.zeros(2, 3, 4))
    monkeypatch.setattr(noise, "gaussian", lambda *_: torch.ones(2, 3, 4))
    with FakeTensorMode():  # of a card that is not here
        samples = torch.empty(3, dtype=torch.int64, device="cuda")
    assert bool(torch_noise.gaussian(key_of(0), samples, 2, (4,)).all()) == works
    assert asked == ["cuda"]


def test_backend_and_noise_are_imported_and_used_where_there_is_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import cmfast_train.backends.pytorch; "
        "from cmfast_train.backends.torch_noise import *; "
        "assert not has_triton(); gaussian(key_of(0), torch.arange(2), 1, (4,))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
