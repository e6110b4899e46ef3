# SPDX-License-Identifier: MIT
"""Fused operations: the Triton kernels by Triton's interpreter and as compiled for cards; fused networks on the CPU."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cmfast.errors import BackendError
from cmfast_train.backends.torch_noise import has_triton
from cmfast_train.denoiser import Denoiser
from cmfast_train.kernels import fuse as fuse_module
from cmfast_train.kernels.fuse import fuse
from cmfast_train.networks import adm, edm
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from helpers import HELPERS
from helpers.kernels.compiled import for_every_card, interpret, wide_reads
from helpers.specs import image_spec, named

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

INTERPRETED = HELPERS / "kernels" / "interpreted.py"
SMALL: dict[str, Any] = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1}
WIDE: dict[str, Any] = SMALL | {"model_channels": 64}  # EDM's ADM has heads of 64 channels
SMOOTH: dict[str, Any] = {"embedding": "fourier", "noise_mult": 2, "resample": (1, 3, 3, 1)}
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(**SMALL, attention=(4,), head_channels=32),
    "adm sum": AdmConfig(**SMALL, attention=(8, 4), head_channels=16, scale_shift=False, classes=3),
    "adm strided": AdmConfig(**SMALL, attention=(), head_channels=32, resblock_updown=False),
    "adm two times": AdmConfig(**SMALL, attention=(4,), head_channels=32, two_times=True, classes=3),
    "adm patches": AdmConfig(**SMALL | {"image_size": 16}, attention=(4,), head_channels=32, patch=2, classes=3),
    "song": SongConfig(**SMALL, attention=(8,), classes=3),
    "song residual": SongConfig(**SMALL, attention=(4,), encoder="residual", decoder="skip", **SMOOTH),
    "song skip": SongConfig(**SMALL, attention=(), encoder="skip"),
    "dhariwal": DhariwalConfig(**WIDE, attention=(8,), classes=3),
}


def new(name: str) -> Denoiser:
    config = NETWORKS[name]
    network = build_network(config).eval().requires_grad_(False)
    randomise(network)
    return Denoiser(network, image_spec(image=config.image_shape, classes=config.classes, c_noise="ln/4"))


def inputs(denoiser: Denoiser) -> dict[str, Tensor]:
    """Return x [3, C, H, W], sigma [3], and label [3] where there are classes."""
    x = torch.randn(3, *denoiser.spec.image, generator=torch.Generator().manual_seed(1))
    label = torch.arange(3) if denoiser.spec.classes else None
    return {"x": x, "sigma": torch.tensor([0.1, 1.0, 10.0]), **named(label)}


def split(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return x, sigma and the conditions, as `Denoiser.output` takes them."""
    return given["x"], given["sigma"], {name: value for name, value in given.items() if name == "label"}


# The kernels.


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Return, for each case, the largest error of a kernel and the tolerance that it is to be held against."""
    pytest.importorskip("triton")
    return interpret(INTERPRETED)


def test_the_kernels_compute_what_torch_does_in_float64(interpreted: dict[str, dict[str, float]]) -> None:
    assert len(interpreted) == 23
    assert {name: case for name, case in interpreted.items() if not case["error"] <= case["tolerance"]} == {}
    assert all(case["size"] > 1 for case in interpreted.values())
    chunks = [case["chunks"] for case in interpreted.values()]
    assert min(chunks) == 0  # values held
    assert 1 in chunks  # read twice by one kernel
    assert max(chunks) > 2  # by two


def test_the_same_input_gives_the_same_bits(interpreted: dict[str, dict[str, float]]) -> None:
    assert all(case["again"] == 0 for case in interpreted.values())


NARROW = {"UNIT": 2, "ROWS": 256, "BLOCK": 8, "EVEN": False}
EVEN = {"UNIT": 8, "ROWS": 64, "BLOCK": 32, "EVEN": True}
BROAD = {"UNIT": 8, "ROWS": 8, "BLOCK": 256, "EVEN": True}
HELD = {"UNIT": 8, "ROWS": 256, "BLOCK": 32, "EVEN": True, "warps": 4}
SMALL_HELD = {"UNIT": 8, "ROWS": 64, "BLOCK": 32, "EVEN": False, "warps": 1}
CONSTANTS: dict[str, tuple[dict[str, int], ...]] = {
    "_one_kernel": (NARROW, EVEN),
    "_held_kernel": (HELD, SMALL_HELD),
    "_parts_kernel": (EVEN, BROAD),
    "_apply_kernel": (EVEN, BROAD),
}


@pytest.mark.parametrize(("kernel", "capability"), for_every_card(*CONSTANTS))
def test_the_kernels_compile_for_every_card_with_wide_loads(kernel: str, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels import group_norm

    function = getattr(group_norm, kernel)
    images, floats = ("x", "y"), ("weight", "bias", "scale", "shift", "add", "parts", "statistics")
    for known, dtype in zip(CONSTANTS[kernel], itertools.cycle(["*fp16", "*bf16"])):
        constants = {name: value for name, value in known.items() if name != "warps"}
        signature = {
            name: "constexpr" if name in constants else dtype if name in images else "*fp32" if name in floats
            else "fp32" if name in ("eps", "gate") else "i32" for name in function.arg_names
        }  # fmt: skip
        reads = wide_reads(function, signature, constants, capability, tmp_path, known.get("warps", 8))
        if constants["UNIT"] == 8:  # eight halves at once, in both directions where results are written
            assert reads >= (1 if kernel == "_parts_kernel" else 2)


def test_every_shape_is_cut_into_what_the_kernels_can_hold() -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels.plan import AT_ONCE, FEW, HELD, MOST_CHUNKS, MOST_GROUPS, make_plan

    shapes = itertools.product((1, 8, 64, 256), (1, 4, 8, 16, 32, 64, 128, 256), (32, 96, 128, 192, 576, 1344, 2048))
    for batch, side, channels in shapes:
        for groups, itemsize in itertools.product((min(32, channels // 4), 8), (2, 4)):
            tensors = 1 + itemsize // 4
            plan = make_plan(batch, side**2, channels, groups, itemsize, tensors)
            assert groups % plan.groups == 0
            assert plan.groups * channels // groups <= plan.block <= max(256, 2 * channels // groups)
            if plan.held:
                assert plan.chunks == 1
                assert plan.rows >= side**2
                assert plan.block * plan.rows <= min(HELD[tensors - 1], FEW)
            else:
                assert plan.block * plan.rows <= 32 * plan.warps * max(AT_ONCE, plan.block // (32 * plan.warps))
            assert plan.even == (side**2 % plan.rows == 0)
            assert plan.groups <= MOST_GROUPS
            assert (plan.chunks - 1) * plan.pixels < side**2 <= plan.chunks * plan.pixels
            assert plan.chunks <= MOST_CHUNKS
            assert plan.block & (plan.block - 1) == plan.rows & (plan.rows - 1) == 0


def test_a_group_that_the_kernels_would_divide_wrongly_is_refused() -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels.group_norm import group_norm_silu

    x = torch.randn(1, 8192, 1, 1).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="a group can have 4096 channels at most, got 8192"):
        group_norm_silu(x, 1, torch.ones(8192), torch.zeros(8192), 1e-5)
    assert group_norm_silu(x, 2, torch.ones(8192), torch.zeros(8192), 1e-5).shape == x.shape


# Fused networks.


@pytest.mark.parametrize("name", NETWORKS)
@needs_triton
def test_a_fused_network_computes_what_it_was_made_from(name: str) -> None:
    denoiser = new(name)
    x, sigma, conditions = split(inputs(denoiser))
    want = denoiser.output(x, sigma, conditions)
    second = denoiser.output(x, sigma, conditions, sigma / 2) if name == "adm two times" else None
    fuse(denoiser)
    got = denoiser.output(x, sigma, conditions)
    assert want.std() > 0.1
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # as far as channels_last alone moves it: 3e-6
    if second is not None:
        assert (second - want).abs().max() > 0.01
        np.testing.assert_allclose(denoiser.output(x, sigma, conditions, sigma / 2), second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 7, 8])
def test_padded_convolutions_of_an_image_are_those_that_were_given(channels: int) -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels.layers import FirstConv, LastConv

    first, last = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, channels, 3, padding=1)
    x = torch.randn(2, channels, 5, 7)
    wide = first(x).contiguous(memory_format=torch.channels_last)
    for conv, padded, image in ((first, FirstConv(first), x), (last, LastConv(last), wide)):
        got = padded(image)
        assert padded.weight.shape[0] % 8 == padded.weight.shape[1] % 8 == 0
        assert got.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_allclose(got.detach(), conv(image).detach(), rtol=0, atol=2e-6)  # sums of 9 x 32, near 1
        assert conv.bias is not None
        assert (conv.bias != 0).all()  # at borders too


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["adm", "adm sum", "song", "dhariwal"])
@needs_triton
def test_in_half_precision_it_is_no_further_from_float32_than_the_network_was(name: str, precision: str) -> None:
    full, denoiser = new(name), new(name).to_precision(precision)
    x, sigma, conditions = split(inputs(full))
    exact, before = full.output(x, sigma, conditions), denoiser.output(x, sigma, conditions)
    fuse(denoiser)
    after = denoiser.output(x, sigma, conditions)
    assert after.dtype == torch.float32
    error = float((before - exact).square().mean().sqrt())
    assert error > 1e-4
    assert (after - exact).square().mean().sqrt() < 1.2 * error  # the same number of roundings, others


@pytest.mark.parametrize("name", NETWORKS)
@needs_triton
def test_a_fused_network_computes_in_float32_what_its_convolutions_do_not_compute(name: str) -> None:
    denoiser = new(name).to_precision("bf16")
    fuse(denoiser)
    tensors = dict(itertools.chain(denoiser.network.named_parameters(), denoiser.network.named_buffers()))
    norms = [tensor for name, tensor in tensors.items() if "norm" in name or "embed" in name or "map_" in name]
    assert norms
    assert {tensor.dtype for tensor in norms} == {torch.float32}
    kernels = {tensor.dtype for tensor in tensors.values() if tensor.ndim == 4 and tensor.shape[1] > 1}
    assert kernels == {torch.bfloat16}


class Calls(TorchFunctionMode):
    """Counts functions of torch, and keeps what attention was called with."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.attended: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        if func is nn.functional.scaled_dot_product_attention:
            self.attended.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adm", "song", "dhariwal"])
@needs_triton
def test_all_layers_behind_the_embedding_are_one_product(name: str) -> None:
    denoiser = new(name)
    x, sigma, conditions = split(inputs(denoiser))
    with Calls() as before:
        denoiser.output(x, sigma, conditions)
    fuse(denoiser)
    with Calls() as after:
        denoiser.output(x, sigma, conditions)
    attention = len(after.attended)
    pointwise = sum(type(module).__name__ == "Pointwise" for module in denoiser.network.modules())
    assert after.names.count("linear") == 2 + 1 + pointwise  # of the embedding; behind it; 1x1 convolutions
    assert before.names.count("linear") > 8
    assert attention == len(before.attended) > 0
    assert after.names.count("exp") == 0  # the frequencies are known


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["adm", "adm sum", "song", "dhariwal"])
def test_queries_keys_and_values_are_such_as_flash_kernels_take(name: str, form: torch.memory_format) -> None:
    network = new(name).network.to("meta").to(memory_format=form)  # not on a CPU, whose graph is the exported one
    modules = [m for m in network.modules() if isinstance(m, adm.Attention) or (isinstance(m, edm.Block) and m.heads)]
    assert modules
    for module in modules:
        x = torch.empty(3, module.qkv.in_channels, 4, 6, device="meta").contiguous(memory_format=form)
        with Calls() as calls:
            y = module(x) if isinstance(module, adm.Attention) else module._attention(x)
        assert y.shape == x.shape
        for tensor in calls.attended[0]:
            assert tensor.shape[2] == 4 * 6
            assert tensor.shape[3] % 8 == 0
            assert tensor.stride(3) == 1
            assert all(stride % 8 == 0 for stride in tensor.stride()[:3])  # 16 bytes of half precision


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_heads_are_split_as_the_exported_graph_splits_them(form: torch.memory_format) -> None:
    qkv, heads = torch.randn(2, 3 * 96, 3, 5).contiguous(memory_format=form), 3
    want = qkv.reshape(2, 3, heads, 32, 15).transpose(3, 4).unbind(1)
    for got, expected in zip(adm.split_heads(qkv, heads), want, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.stride() == (15 * 3 * 96, 32, 3 * 96, 1)
        assert (got.untyped_storage().data_ptr() == qkv.data_ptr()) == (form == torch.channels_last)  # a view
    want = qkv.reshape(2, heads, 32, 3, 15).transpose(2, 4).unbind(3)
    for got, expected in zip(edm.split_heads(qkv, heads), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["adm", "song", "dhariwal"])
@needs_triton
def test_so_they_are_in_a_fused_network(name: str) -> None:
    denoiser = new(name)
    given = inputs(denoiser)
    fuse(denoiser)
    with Calls() as calls:
        denoiser(**given)
    assert calls.attended
    for tensor in itertools.chain(*calls.attended):
        assert tensor.stride(3) == 1
        assert tensor.untyped_storage().nbytes() == 3 * tensor.numel() * 4  # one of three views: nothing was copied


@pytest.mark.parametrize("name", ["adm strided", "song residual", "dhariwal"])
@needs_triton
def test_nothing_in_a_fused_network_changes_the_memory_format(name: str) -> None:
    denoiser = new(name)
    fuse(denoiser)
    left: list[str] = []

    def look(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                left.extend([] if output.is_contiguous(memory_format=torch.channels_last) else [path])

        return hook

    for path, module in denoiser.network.named_modules():
        module.register_forward_hook(look(path))
    denoiser(**inputs(denoiser))
    assert left == []


@pytest.mark.parametrize("name", ["adm", "dhariwal"])
@needs_triton
def test_a_fused_network_can_be_compiled_whole(name: str) -> None:
    denoiser = new(name)
    fuse(denoiser)
    given = inputs(denoiser)
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        np.testing.assert_allclose(compiled(**given), denoiser(**given), rtol=0, atol=1e-5)


def test_other_formats_than_channels_last_are_refused() -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels.group_norm import group_norm_silu

    x, rows = torch.randn(2, 32, 3, 3), torch.zeros(2, 32)
    with pytest.raises(ValueError, match="in channels_last"):
        group_norm_silu(x, 8, rows[0], rows[0], 1e-5)
    x = x.contiguous(memory_format=torch.channels_last)
    for wrong in (rows.t(), rows.half(), rows[:, ::2], torch.zeros(32, 2).t()):
        with pytest.raises(ValueError, match="float32 with dense rows"):
            group_norm_silu(x, 8, rows[0], rows[0], 1e-5, add=wrong)
    with pytest.raises(ValueError, match="come together"):
        group_norm_silu(x, 8, rows[0], rows[0], 1e-5, scale=rows)
    with pytest.raises(ValueError, match="not a multiple of 5 groups"):
        group_norm_silu(x, 5, rows[0], rows[0], 1e-5)


@pytest.mark.parametrize("name", ["adm", "song residual", "dhariwal"])
@needs_triton
def test_the_weights_that_were_given_stay_as_they_were(name: str) -> None:
    denoiser = new(name)
    given = dict(denoiser.network.state_dict())  # a checkpoint's: other backends are made from it
    before = {key: tensor.clone() for key, tensor in given.items()}
    fuse(denoiser)
    denoiser(**inputs(denoiser))
    for key, tensor in given.items():
        np.testing.assert_array_equal(tensor, before[key])


def test_other_networks_are_refused_in_one_line() -> None:
    network = build_network(CloneofsimoConfig(image_size=8, width=32))
    with pytest.raises(
        BackendError, match="for the networks adm, song and dhariwal, not for CloneofsimoUnet"
    ) as caught:
        fuse(Denoiser(network, image_spec(image=(3, 8, 8))))
    assert "\n" not in str(caught.value)


def test_without_triton_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    denoiser = new("adm")
    before = denoiser.network
    with pytest.raises(BackendError, match="need triton, which is not installed: pip install triton"):
        fuse(denoiser)
    assert denoiser.network is before


def test_where_triton_does_not_work_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(fuse_module, "why_no_kernels", lambda _: "triton does not work here (no C compiler)")
    denoiser = new("adm")
    before = denoiser.network
    with pytest.raises(BackendError, match=r"^the fused kernels do not run here: .*\(no C compiler\); use another"):
        fuse(denoiser)
    assert denoiser.network is before


@needs_triton
def test_a_network_is_fused_once() -> None:
    denoiser = new("adm")
    fuse(denoiser)
    with pytest.raises(BackendError, match="not for FusedAdm"):
        fuse(denoiser)
