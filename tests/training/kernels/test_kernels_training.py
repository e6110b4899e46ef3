# SPDX-License-Identifier: MIT
"""Fused norms in training: the kernels by Triton's interpreter and as compiled for cards; networks on the CPU."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmfast.errors import BackendError, CmfastError
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.networks.fused import fuse_norms, fuses
from cmfast_train.training import context
from cmfast_train.training.context import check_fused, why_no_kernels, why_not_fused
from cmfast_train.training.initial_model import network_config
from cmfast_train.training.parallel import jvp, recompute
from helpers import HELPERS
from helpers.kernels.compiled import for_every_card, interpret, wide_reads

INTERPRETED = HELPERS / "kernels" / "interpreted_training.py"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL: dict[str, Any] = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1}
ADM = AdmConfig(**SMALL, attention=(4,), head_channels=32, classes=3)
NETWORKS: dict[str, NetworkConfig] = {
    "adm": ADM,
    "adm with dropout": dataclasses.replace(ADM, dropout=0.3),
    "adm sum": AdmConfig(**SMALL, attention=(4,), head_channels=16, scale_shift=False, resblock_updown=False),
    "song": SongConfig(**SMALL, attention=(8,), classes=3, resample=(1, 3, 3, 1), decoder="skip"),
    "dhariwal": DhariwalConfig(**SMALL | {"model_channels": 64}, attention=(8,), dropout=0.3),
}


# The kernels.


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """Return, for each case, the largest error of y and all gradients, and the tolerance it is to be held against."""
    pytest.importorskip("triton")
    return interpret(INTERPRETED)


@pytest.mark.timeout(360)
def test_the_gradients_are_those_of_torch_in_float64(interpreted: Any) -> None:
    cases = interpreted["kernels"]
    assert len(cases) > 8
    assert {name: case for name, case in cases.items() if not case["error"] <= case["tolerance"]} == {}
    assert all(case["size"] > 1 for case in cases.values())
    chunks = [case["chunks"] for case in cases.values()]
    assert min(chunks) == 1  # one kernel
    assert max(chunks) > 8  # two


def test_the_same_input_gives_the_same_gradients_to_the_bit(interpreted: Any) -> None:
    assert all(case["again"] == 0 for case in interpreted["kernels"].values())


def test_training_and_inference_compute_the_same_bits(interpreted: Any) -> None:
    assert all(case["inference"] == 0 for case in interpreted["kernels"].values())


def test_a_network_has_the_same_gradients_with_the_kernels(interpreted: Any) -> None:
    network = interpreted["network"]
    assert network["error"] <= network["tolerance"]
    assert network["size"] > 0.1
    assert network["different"] == 1, "the kernels were not used"


NARROW = {"UNIT": 2, "ROWS": 256, "BLOCK": 8, "EVEN": False, "AT_ONCE": 128}
EVEN = {"UNIT": 8, "ROWS": 64, "BLOCK": 32, "EVEN": True, "AT_ONCE": 32}
BROAD = {"UNIT": 8, "ROWS": 8, "BLOCK": 256, "EVEN": True, "AT_ONCE": 4}
SMALL_HELD = {"UNIT": 8, "ROWS": 64, "BLOCK": 32, "EVEN": True, "warps": 2}
HELD = {"UNIT": 8, "ROWS": 16, "BLOCK": 64, "EVEN": False, "warps": 1}
KERNELS = {
    "_backward_kernel": (NARROW, EVEN),
    "_backward_held_kernel": (SMALL_HELD, HELD),
    "_backward_parts_kernel": (EVEN, BROAD),
    "_backward_apply_kernel": (EVEN, BROAD),
}


@pytest.mark.parametrize(("kernel", "capability"), for_every_card(*KERNELS))
def test_the_kernels_compile_for_every_card_with_wide_loads(kernel: str, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels import group_norm_training

    function = getattr(group_norm_training, kernel)
    images = ("x", "dx", "dy")
    for constants, dtype in zip(KERNELS[kernel], itertools.cycle(["*fp16", "*bf16"])):
        known = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {
            name: "constexpr" if name in known else dtype if name in images else "fp32" if name == "gate"
            else "i32" if name in group_norm_training.NUMBERS else "*fp32" for name in function.arg_names
        }  # fmt: skip
        reads = wide_reads(function, signature, known, capability, tmp_path, constants.get("warps", 4))
        if known["UNIT"] == 8:  # eight halves at once, of x and of dy
            assert reads >= 2


class Nowhere:
    """A driver of Triton for a card that is not there; its kernels are those of no real device."""

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize("preset", ["mnist-large", "cifar10"])
def test_few_kernels_are_compiled_for_the_training_of_a_preset(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from cmfast_train.kernels import group_norm, group_norm_training

    network, shapes = build_network(network_config(PRESETS[preset], classes=10)), set()
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda norm, x, _: shapes.add((norm.num_groups, *x[0].shape[1:])))
    with torch.no_grad():
        network(torch.randn(1, *network.config.image_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert len(shapes) > 8
    kernels = set()
    monkeypatch.setattr(driver, "_active", Nowhere())
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, key, *_: kernels.add((self.__name__, key)))
    monkeypatch.setattr(group_norm, "on_kernels", lambda x: True)
    for groups, *shape in shapes:
        x = torch.empty(128, *shape, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        row = torch.empty(shape[0], device="meta")
        e = torch.empty(128, 2 * shape[0], device="meta")
        for scaled, silu in itertools.product((False, True), repeat=2):
            scale, shift = e.chunk(2, dim=1) if scaled else (None, None)
            y, statistics = group_norm.norm_and_statistics(x, groups, row, row, 1e-5, scale, shift, silu)
            group_norm_training.gradients(y, x, statistics, groups, row, row, scale, shift, silu)
    assert "_one_kernel" in {name for name, _ in kernels}
    assert "_backward_kernel" in {name for name, _ in kernels}
    assert len(kernels) <= 14  # each takes a third of a second


def test_where_programs_fill_a_gpu_each_reads_whole_sectors_of_a_pixel() -> None:
    pytest.importorskip("triton")
    from cmfast_train.kernels.plan import LEAST_BYTES, make_plan

    for batch, side, channels in itertools.product((128, 512), (4, 8, 16, 32, 64), (64, 128, 192, 256, 384, 576)):
        for tensors in (1, 2):
            plan = make_plan(batch, side**2, channels, 32, 2, tensors)
            assert 2 * plan.groups * channels // 32 >= LEAST_BYTES, (batch, side, channels)


# Networks, whose fused norms are torch operations on a CPU.


def gradients(network: nn.Module, classes: int) -> list[Tensor]:
    """Return a network's result, and the gradients of a loss with respect to its weights."""
    network.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(3, 3, 8, 8)
    y = network(x, torch.tensor([0.3, -1.0, 2.0]), torch.arange(3) if classes else None)
    (y - x).square().mean().backward()
    return [y.detach(), *(weight.grad.clone() for weight in network.parameters() if weight.grad is not None)]


def new(name: str) -> nn.Module:
    network = build_network(NETWORKS[name]).to(memory_format=torch.channels_last)
    randomise(network)
    return network.train()


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)  # float32


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_fused_norms_has_the_same_result_and_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_norm_training = pytest.importorskip("cmfast_train.kernels.group_norm_training")
    network, classes = new(name), NETWORKS[name].classes
    want = gradients(network, classes)
    seen: list[Any] = []
    norm_act = group_norm_training.norm_act
    monkeypatch.setattr(group_norm_training, "norm_act", lambda *args: seen.append(args) or norm_act(*args))
    fuse_norms(network)
    got = gradients(network, classes)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(seen) == len(norms) > 8, "a norm is left as it was"
    assert_close(got, want)
    assert max(float(each.abs().max()) for each in want[1:]) > 0.05


def test_activations_that_are_computed_again_have_the_same_gradients() -> None:
    pytest.importorskip("triton")
    network = new("adm with dropout")
    want = gradients(network, 3)
    fuse_norms(network)
    recompute(network)
    assert_close(gradients(network, 3), want)


def test_a_flag_changes_no_bit_where_it_does_not_serve() -> None:
    network = build_network(ADM)  # NCHW
    randomise(network)
    want = gradients(network, 3)
    fuse_norms(network)
    assert all(map(torch.equal, gradients(network, 3), want))


def test_forward_mode_derivatives_leave_the_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmfast_train.kernels.group_norm_training", None)  # its import fails
    network = new("adm").eval()
    x, c_noise, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.0]), torch.tensor([0, 2])
    along = torch.ones(2, 3, 8, 8), torch.ones(2)
    want = jvp(lambda x, c: network(x, c, label), (x, c_noise), along)
    fuse_norms(network)
    got = jvp(lambda x, c: network(x, c, label), (x, c_noise), along)
    assert all(map(torch.equal, got, want))
    with pytest.raises(ImportError):
        network(x, c_noise, label)


def test_traces_and_exports_leave_the_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmfast_train.kernels.group_norm_training", None)  # its import fails
    network = new("adm").eval()
    fuse_norms(network)
    assert isinstance(network, AdmUnet)
    norm = network.out[0]
    x = torch.randn(2, norm.num_channels, 3, 3).to(memory_format=torch.channels_last)
    assert fuses(norm, x)
    assert not fuses(norm, x.contiguous())
    asked: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(fuses(norm, x))
            return x + 1

    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        torch.jit.trace(Asks(), x, check_trace=False)
    assert asked == [False]
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.0]), torch.tensor([0, 2]))
    torch.export.export(network, inputs)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():  # where norms run as they are traced
        plain = new("adm").eval()(*inputs)
    torch.testing.assert_close(compiled(*inputs), plain, rtol=0, atol=0)


# The setting.


def config(*settings: str) -> TrainConfig:
    return override(PRESETS["digits"], ["phases=edm:80,ect:80", *settings])


@pytest.mark.parametrize(
    ("settings", "network", "device", "processes", "why"),
    [
        ((), ADM, CUDA, 1, ""),
        ((), NETWORKS["song"], CUDA, 1, ""),
        (("fused=true",), ADM, CUDA, 2, ""),
        (("fused=false",), ADM, CUDA, 1, "fused=false"),
        ((), ADM, CPU, 1, "the device is cpu"),
        ((), CloneofsimoConfig(image_size=8, width=32), CUDA, 1, "network=cloneofsimo has other layers"),
        (("phases=sct:80",), ADM, CUDA, 1, "sct differentiates in forward mode"),
        (("phases=mf:80",), ADM, CUDA, 1, "mf differentiates in forward mode"),
        (("channels_last=false",), ADM, CUDA, 1, "channels_last=false"),
        (("compile=true",), ADM, CUDA, 1, "compile=true fuses in its own way"),
        (("shard=true",), ADM, CUDA, 1, ""),
        (("shard=true",), ADM, CUDA, 2, "shard=true keeps no channels_last"),
    ],
)
def test_what_has_fused_norms_and_why_the_rest_has_not(
    settings: tuple[str, ...], network: NetworkConfig, device: torch.device, processes: int, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(context, "why_no_kernels", lambda _: "")  # as on a machine with a GPU
    asked = config(*settings)
    assert why_not_fused(asked, asked.phases[0], network, device, processes) == why
    check_fused(asked, network, device, processes)  # nothing was demanded that cannot be
    if not settings or settings[0].partition("=")[0] != "fused":
        demanded = config(*settings, "fused=true")
        if not why:
            check_fused(demanded, network, device, processes)
            return
        kind = BackendError if device == CPU else CmfastError
        with pytest.raises(kind, match=f"^fused=true: .* with fused norms, {re.escape(why)}; use --set") as caught:
            check_fused(demanded, network, device, processes)
        assert "\n" not in str(caught.value)


def test_one_phase_that_cannot_be_fused_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "why_no_kernels", lambda _: "")
    with pytest.raises(CmfastError, match="fused=true: sct cannot be trained with fused norms"):
        check_fused(config("phases=edm:80,sct:80", "fused=true"), ADM, CUDA, 1)


def test_without_triton_the_reason_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    why_no_kernels.cache_clear()
    assert why_no_kernels(CUDA) == "triton is not installed"
    why_no_kernels.cache_clear()


def test_a_kernel_that_does_not_run_is_a_reason_in_one_line() -> None:
    pytest.importorskip("triton")
    why_no_kernels.cache_clear()
    why = why_no_kernels(torch.device("meta"))  # which computes nothing
    assert why.startswith("triton does not work here (")
    assert "\n" not in why


def test_another_value_of_fused_is_refused() -> None:
    with pytest.raises(CmfastError, match="fused must be auto, true or false, got 'yes'"):
        config("fused=yes")
