# SPDX-License-Identifier: MIT
"""Networks that are no function of one sample at a time are refused before they are traced, and the line says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CheckFailed, CmfastError
from cmfast_export import export_onnx
from cmfast_export.graphs.denoiser import check_branches
from cmfast_export.graphs.probe import check_module, check_network
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import wrap
from helpers.own_networks import CASES


class Net(nn.Module):
    """A layer and what one likes to do with its result [B, 6]."""

    def __init__(self, then: Callable[[Any, Tensor], Any], part: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.time, self.then, self.part = nn.Linear(6, 6), nn.Linear(1, 6), then, part
        self.register_buffer("count", torch.ones(()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for weight in self.parameters():
                nn.init.normal_(weight, std=0.5)

    def forward(self, x: Tensor, c_noise: Tensor) -> Any:
        return self.then(self, self.layer(x) + self.time(c_noise[:, None]))


def wrapped(then: Callable[[Any, Tensor], Any], part: nn.Module | None = None) -> Denoiser:
    return wrap(Net(then, part), shape=(6,), scaling="edm", c_noise="ln/4").eval()


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


def counts(net: Any, h: Tensor) -> Tensor:
    net.count.add_(1)
    result: Tensor = h * net.count
    return result


MIXES = {
    "the batch's mean": lambda _, h: h - h.mean(0, keepdim=True),
    "one number of the whole batch": lambda _, h: h / h.abs().max(),
    "attention over the batch": lambda _, h: torch.softmax(h @ h.T, -1) @ h,
    "the batch folded into an axis": lambda _, h: h.reshape(-1).cumsum(0).reshape(h.shape),
    "samples in another order": lambda _, h: h.flip(0),
    "the sample before": lambda _, h: h.roll(1, 0),
    "the first sample for all": lambda _, h: h + h[:1],
    "a number taken out": lambda _, h: h * h.mean().item(),
    "values above a threshold": lambda _, h: h + h[h > 0].sum(),
}


@pytest.mark.parametrize("batch", [None, 4], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("name", MIXES)
def test_a_network_that_mixes_the_samples_of_a_batch_is_refused_with_how_far_off(name: str, batch: int | None) -> None:
    words = (
        r"mixes the samples of a batch: sample \d of \d changes by \d.\de.\d\d, of values up to .*axes of one sample"
    )
    with pytest.raises(CmfastError, match=words) as caught:
        check_network(wrapped(MIXES[name]), batch)
    assert "\n" not in str(caught.value)


def test_the_module_that_mixes_is_named() -> None:
    with pytest.raises(CmfastError, match=r"first in network.part \(BatchNorm1d\)"):
        check_network(wrapped(lambda net, h: net.part(h), nn.BatchNorm1d(6, track_running_stats=False)))
    with pytest.raises(CmfastError, match=r"first before network.part \(Tanh\)"):
        check_network(wrapped(lambda net, h: net.part(h - h.mean(0)), nn.Tanh()))


def test_what_depends_on_the_size_of_the_batch_is_seen_by_a_sample_alone() -> None:
    with pytest.raises(CmfastError, match=r"sample 2 of 3 is off by .* when it is alone"):
        check_network(wrapped(lambda _, h: h * torch.ones(len(h)).sum()))
    with pytest.raises(CmfastError, match=r"sample 2 of 3 is off .* alone"):
        check_network(wrapped(lambda _, h: h + torch.arange(len(h))[:, None]))


def test_one_sample_at_a_time_cannot_be_mixed() -> None:
    check_network(wrapped(MIXES["the batch's mean"]), 1)


def test_norms_with_running_statistics_and_networks_of_the_other_tests_pass() -> None:
    norm = nn.BatchNorm1d(6)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    check_network(wrapped(lambda net, h: net.part(h), norm))
    for name, case in CASES.items():
        if not name.startswith("diffusers"):
            given = {"scaling": "edm", "c_noise": "ln/4", **case.more}
            check_network(wrap(case.net(), shape=case.shape, conditions=case.conditions, **given).eval())


def test_rounding_is_no_mixing() -> None:
    check_network(wrapped(lambda _, h: (torch.complex(h, h) * torch.complex(h, h)).real))  # zero, up to rounding
    check_network(wrapped(lambda _, h: 0 * h))


@pytest.mark.parametrize(
    ("then", "part", "words"),
    [
        (lambda _, h: F.dropout(h, 0.5, training=True), None, "it draws random numbers, as dropout does"),
        (lambda net, h: net.part(h), StaysInTraining(), r"network.part \(StaysInTraining\) stays in training mode"),
        (counts, None, "it changes its buffer network.count"),
    ],
    ids=["dropout", "training mode", "buffer"],
)
def test_what_is_no_function_of_its_inputs_is_refused_with_the_likely_cause(then: Any, part: Any, words: str) -> None:
    denoiser = wrapped(then, part)
    state = torch.random.get_rng_state()
    with pytest.raises(CmfastError, match=f"gives another result for the same inputs, .* off, of values .*: {words}"):
        check_network(denoiser)
    assert torch.equal(state, torch.random.get_rng_state()), "random numbers of the caller are left alone"


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (lambda _, h: h.double(), "returned float64, and must return float32"),
        (lambda _, h: h.half(), "returned float16, and must return float32"),
        (lambda _, h: {"sample": h}, "returned dict, and must return"),
        (lambda _, h: h[:, :3], r"returned \[3, 3\], and must return \[B, 6\]"),
        (lambda _, h: h.mean(0, keepdim=True), r"returned \[1, 6\] for a batch of 3, and must return as many samples"),
        (
            lambda _, h: {}["nothing"],
            r"network \(Net\) fails at test_probe.py:\d+: .*KeyError: 'nothing'",
        ),
    ],
    ids=["float64", "float16", "dict", "shape", "one sample", "fails"],
)
def test_what_returns_something_else_is_refused(then: Any, words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        check_network(wrapped(then))


def test_infinity_is_the_network_s_and_not_the_file_s() -> None:
    with pytest.raises(CheckFailed, match=r"the network returned NaN or infinity in PyTorch, at noise level 80"):
        check_network(wrapped(lambda _, h: h / 0))


def test_arguments_that_do_not_fit_say_how_a_network_is_called() -> None:
    with pytest.raises(CmfastError, match=r"takes 2 positional .*; it is called as net\(x, c_noise, \*\*conditions\)"):
        check_network(wrap(nn.Linear(6, 6), shape=(6,), scaling="edm", c_noise="ln/4"))


def test_a_condition_that_is_changed_in_place_is_refused() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, state: Tensor) -> Tensor:
            return x * state.mul_(2)

    denoiser = wrap(Doubles(), shape=(6,), conditions={"state": (6,)}, scaling="edm", c_noise="ln/4")
    with pytest.raises(CmfastError, match="changes the condition state in place"):
        check_network(denoiser)


def test_a_table_of_classes_without_a_row_for_no_class_is_refused_where_guidance_needs_it() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 6)

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            result: Tensor = x + self.table(label)
            return result

    denoiser = wrap(
        Table(), shape=(6,), conditions={"label": 10}, null={"label": 10}, scaling="edm", c_noise="ln/4"
    ).eval()
    assert check_network(denoiser) is None
    with pytest.raises(
        CmfastError, match=r"network.table \(Embedding\) fails without conditions, label=10, which guid"
    ):
        check_network(denoiser, null={"label": 10})


def on_meta(denoiser: Denoiser) -> Denoiser:
    denoiser.network.time.to("meta")
    return denoiser


def scripted(denoiser: Denoiser) -> Denoiser:
    return Denoiser(torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6)), denoiser.spec)


def halved(denoiser: Denoiser) -> Denoiser:
    return Denoiser(denoiser.network.half(), denoiser.spec)


def weight_normed(denoiser: Denoiser) -> Denoiser:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(denoiser.network.layer)
    return denoiser


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (on_meta, "the weight network.time.weight is on the meta device, so it has no values"),
        (scripted, "network is TorchScript, which cannot be exported"),
        (halved, "is torch.float16; pass net.float"),
        (weight_normed, r"network.layer \(Linear\) has torch.nn.utils.weight_norm, which cannot be copied"),
    ],
    ids=["meta", "script", "half", "weight_norm"],
)
def test_modules_that_cannot_be_copied_or_hold_no_values_are_refused(spoil: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=words):
        check_module(spoil(wrapped(lambda _, h: h)))
    with pytest.raises(CmfastError, match=words):
        export_onnx(spoil(wrapped(lambda _, h: h)), tmp_path / "m.onnx")


class Autocast(Net):
    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.layer(x)
        return h.float() + self.time(c_noise[:, None])


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Autocast(lambda _, h: h), "network computes in bfloat16 by itself; remove autocast"),
        (Net(lambda _, h: h * 2 if h.sum() > -1e6 else h), "the code branches on the value of a tensor"),
        (Net(MIXES["the batch's mean"]), "mixes the samples of a batch"),
    ],
    ids=["autocast", "if", "mixes"],
)
def test_an_export_refuses_them_in_one_line_and_prints_nothing(
    net: nn.Module, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    denoiser = wrap(net, shape=(6,), scaling="edm", c_noise="ln/4")
    before = copy.deepcopy(denoiser.state_dict())
    with pytest.raises(CmfastError, match=words) as caught:
        export_onnx(denoiser, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


BRANCHES = """
<ir_version: 8, opset_import: ["" : 18]>
denoiser (float[B, 6] x, float[B] sigma) => (float[B, 6] denoised) {
    most = ReduceMax <keepdims = 0> (x)
    zero = Constant <value = float {0}> ()
    positive = Greater (most, zero)
    denoised = If (positive) <
        then_branch = one () => (float[B, 6] a) { a = Add (x, x) },
        else_branch = two () => (float[B, 6] b) { b = Mul (x, x) }
    >
}
"""


def test_graphs_with_branches_are_refused() -> None:
    model = ir.from_proto(onnx.parser.parse_model(BRANCHES))
    with pytest.raises(CmfastError, match=r"one branch for all samples of a batch \(torch.cond\)"):
        check_branches(model.graph)
    with pytest.raises(CmfastError, match="a sampler of a graph with If is not supported"):
        sampler_graph(model, (80.0, 0.8), wrapped(lambda _, h: h).spec)
