# SPDX-License-Identifier: MIT
"""Resampling, short cuts and joins: the Triton kernels by Triton's interpreter and as compiled for cards; their use."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cmfast_train.denoiser import Denoiser
from cmfast_train.kernels.fuse import fuse
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from helpers import HELPERS
from helpers.kernels.compiled import SHARED, for_every_card, interpret, wide_reads
from helpers.specs import image_spec

pytest.importorskip("triton")

INTERPRETED = HELPERS / "kernels" / "interpreted_resample.py"
SMALL: dict[str, Any] = {"image_size": 8, "model_channels": 64, "channel_mult": (1, 1), "res_blocks": 1}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return interpret(INTERPRETED)


def test_the_kernels_compute_what_torch_does_in_float64(interpreted: dict[str, dict[str, float]]) -> None:
    assert len(interpreted) > 100
    assert {name: case for name, case in interpreted.items() if not case["error"] <= case["tolerance"]} == {}
    assert all(case["size"] > 0.5 for case in interpreted.values())


def test_they_round_nowhere_else_and_move_bits_unchanged(interpreted: dict[str, dict[str, float]]) -> None:
    assert {name: case for name, case in interpreted.items() if case["other"]} == {}


# Reads of 16 bytes by a thread, of half precision: x, h, and two for eight numbers of the bias; then its writes.
WIDE = {
    ("", True): (8, 2),
    ("down", True): (7, 1),
    ("down", False): (4, 1),
    ("up", True): (7, 4),
    ("up", False): (1, 4),
}


def accesses(kernel: Any, constants: dict[str, Any], dtype: str, capability: int, folder: Path) -> tuple[int, int, str]:
    """Compile a kernel; return how many wide reads and writes it has, and its code."""
    signature = {
        name: "constexpr" if name in constants else dtype if name in ("x", "y", "h")
        else "*fp32" if name == "bias" else "fp32" if name == "gain" else "i32" for name in kernel.arg_names
    }  # fmt: skip
    reads = wide_reads(kernel, signature, constants, capability, folder)
    code = (folder / "kernel.ptx").read_text()
    return reads, len(re.findall(r"st\.global\S*\.v4\.b32", code)), code


@pytest.mark.parametrize(("case", "capability"), for_every_card(*WIDE))
def test_resampling_compiles_for_every_card_with_wide_access_only(
    case: tuple[str, bool], capability: int, tmp_path: Path
) -> None:
    from cmfast_train.kernels.resample import DIRECTIONS, SMALL_TILE, TILE, _resample_kernel

    direction, with_sum = case
    block = (SMALL_TILE if direction else TILE) // 8
    constants = {"DIRECTION": DIRECTIONS[direction], "SUM": with_sum, "VECTOR": 8, "BLOCK": block}
    reads, writes, code = accesses(_resample_kernel, constants, "*bf16", capability, tmp_path)
    assert (reads, writes) == WIDE[case]
    assert len(re.findall(r"ld\.global", code)) == reads  # none is narrower
    assert len(re.findall(r"st\.global", code)) == writes
    assert ".shared" not in code  # nothing goes from thread to thread


@pytest.mark.parametrize("capability", SHARED)
def test_joining_compiles_for_every_card_with_wide_access_only(capability: int, tmp_path: Path) -> None:
    from cmfast_train.kernels.resample import TILE, _place_kernel

    reads, writes, code = accesses(_place_kernel, {"VECTOR": 8, "BLOCK": TILE // 8}, "*fp16", capability, tmp_path)
    assert (reads, writes) == (2, 2)
    assert len(re.findall(r"[ls][dt]\.global", code)) == reads + writes
    assert ".shared" not in code


@pytest.mark.parametrize(("vector", "dtype"), [(1, "*fp16"), (4, "*bf16"), (1, "*fp32"), (8, "*fp32")])
def test_other_widths_compile_too(vector: int, dtype: str, tmp_path: Path) -> None:
    from cmfast_train.kernels.resample import DIRECTIONS, SMALL_TILE, TILE, _place_kernel, _resample_kernel

    constants = {"DIRECTION": DIRECTIONS["up"], "SUM": True, "VECTOR": vector, "BLOCK": SMALL_TILE // vector}
    accesses(_resample_kernel, constants, dtype, 90, tmp_path)
    accesses(_place_kernel, {"VECTOR": vector, "BLOCK": TILE // vector}, dtype, 90, tmp_path)


def test_an_argument_that_does_not_fit_is_refused() -> None:
    from cmfast_train.kernels.resample import add_shortcut, joined, resampled

    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=torch.channels_last)
    bias, odd = torch.zeros(32), x[:, :, :3].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="in channels_last"):
        resampled(x.contiguous(), "up")
    with pytest.raises(ValueError, match=r"got torch\.float64$"):
        resampled(x.double(), "up")
    with pytest.raises(ValueError, match="direction must be up, down or empty, got 'left'"):
        resampled(x, "left")
    with pytest.raises(ValueError, match="only even sides can be halved, got 3x6 pixels"):
        resampled(odd, "down")
    for h, direction in ((x, "up"), (x, "down"), (odd, ""), (x.half(), "")):
        with pytest.raises(ValueError, match="a sum of"):
            add_shortcut(x, h, bias, 1.0, direction)
    with pytest.raises(ValueError, match="in channels_last"):
        add_shortcut(x, x.contiguous(), bias)
    for wrong in (bias[:31], bias.half(), torch.zeros(64)[::2]):
        with pytest.raises(ValueError, match=r"need a dense bias \[32\] float32"):
            add_shortcut(x, x, wrong)
    for other in (odd, x[:1], x.half()):
        with pytest.raises(ValueError, match="cannot join"):
            joined(x, other)
        with pytest.raises(ValueError, match="cannot join"):
            add_shortcut(x, x, bias, 1.0, "", other)
    with pytest.raises(ValueError, match="in channels_last"):
        joined(x, x.contiguous())


def test_sizes_that_32_bits_cannot_count_are_refused() -> None:
    from cmfast_train.kernels.resample import _vectors

    x = torch.empty(2**13, 256, 64, 64, device="meta")  # 2^33 values
    assert _vectors(x, 8) == 2**30
    with pytest.raises(ValueError, match="too many values for one launch"):
        _vectors(x, 4)


@pytest.mark.parametrize("direction", ["up", "down", ""])
def test_the_operators_hold_under_torch_compile(direction: str) -> None:
    from cmfast_train.kernels import resample

    x = torch.randn(2, 6, 4, 8).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    h, bias = torch.randn_like(resample.resampled(x, direction)), torch.randn(6)
    skip = torch.randn_like(h)[:, :4].contiguous(memory_format=torch.channels_last) if direction else None
    torch.library.opcheck(torch.ops.cmfast.resampled.default, (x, direction or "up"))
    torch.library.opcheck(torch.ops.cmfast.add_shortcut.default, (x, h, bias, 0.7, direction, skip))
    torch.library.opcheck(torch.ops.cmfast.joined.default, (x, x[:, :4].contiguous(memory_format=torch.channels_last)))


# Networks.

# How often it resamples before a convolution or for one; in a sum; how often a sum writes what is joined, of 4 joins.
NETWORKS: dict[str, tuple[NetworkConfig, int, int, int]] = {
    "adm": (AdmConfig(**SMALL, attention=()), 2, 2, 4),
    "adm strided": (AdmConfig(**SMALL, attention=(), resblock_updown=False), 0, 0, 3),  # a convolution ends a stage
    "song": (SongConfig(**SMALL, attention=()), 3, 1, 0),  # its short cuts have 1x1 convolutions
    "song smooth": (SongConfig(**SMALL, attention=(), resample=(1, 3, 3, 1)), 0, 0, 0),
    "dhariwal": (DhariwalConfig(**SMALL, attention=()), 2, 2, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_resamples_in_sums_and_joins_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmfast_train.kernels import layers, networks

    config, apart, within, joins = NETWORKS[name]
    network = build_network(config).eval().requires_grad_(False)
    randomise(network)
    denoiser = Denoiser(network, image_spec(image=config.image_shape, c_noise="ln/4"))
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    want = denoiser.output(x, sigma, {})
    fuse(denoiser)
    calls: list[tuple[str, str]] = []
    joined_sums = 0

    def counted(function: str) -> Callable[..., Any]:
        before = getattr(where[function], function)

        def count(*args: Any) -> Any:
            nonlocal joined_sums
            joined_sums += function == "add_shortcut" and args[5:] not in ((), (None,))
            calls.append((function, next((each for each in args if isinstance(each, str)), "")))
            return before(*args)

        return count

    where = {"resampled": layers, "add_shortcut": layers, "joined": networks}
    for function in where:
        monkeypatch.setattr(where[function], function, counted(function))
    np.testing.assert_allclose(denoiser.output(x, sigma, {}), want, rtol=0, atol=1e-5)  # as in test_kernels
    directions = {function: [d for f, d in calls if f == function] for function, _ in calls}
    assert sum(d != "" for d in directions.get("resampled", [])) == apart
    assert sum(d != "" for d in directions["add_shortcut"]) == within
    blocks = [module for module in denoiser.network.modules() if isinstance(module, layers.Block)]
    attentions = [module for module in denoiser.network.modules() if isinstance(module, layers.Attention)]
    assert len(directions["add_shortcut"]) == len(blocks) + len(attentions)
    assert joined_sums == joins
    assert len(directions.get("joined", [])) == 4 - joins


def test_a_pointwise_convolution_commutes_with_doubling() -> None:
    from cmfast_train.kernels.layers import Box, Pointwise

    layer, double = Pointwise(nn.Conv2d(32, 48, 1), bias=False), Box("up")
    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(double(layer(x)), layer(double(x)), rtol=0, atol=1e-6)  # sums of 32, in other blocks
