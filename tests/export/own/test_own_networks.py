# SPDX-License-Identifier: MIT
"""Any module wrapped, exported and compared with itself: every rank, every kind of condition, fp32 and fp16."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import cmfast
import cmfast_export
import cmfast_train
from cmfast.conditions import some_values
from cmfast.errors import CmfastError
from cmfast.noise import slices
from cmfast.sampling import sample
from cmfast_export import cli, pipeline
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import weights_sha256
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import wrap
from helpers.own_networks import CASES, Conv3d, Mlp, UNet1d, embed

SIGMAS = (80.0, 5.0, 0.8)
FP32 = 1e-4  # the promise; what is seen is rounding, two orders below
FP16 = 2e-2  # data units: what ten bits of mantissa lose in networks this deep with weights this large


def wrapped(name: str, **more: Any) -> Denoiser:
    if name.startswith("diffusers") and not find_spec("diffusers"):
        pytest.skip("needs diffusers")
    case = CASES[name]
    given = {"scaling": "edm", "c_noise": "ln/4", **case.more, **more}
    return wrap(case.net(), shape=case.shape, conditions=case.conditions, **given)


@pytest.fixture(scope="module", autouse=True)
def traced_once_each() -> Iterator[None]:
    """Trace each of these networks once; tests/helpers/traced_once.py does so for those of cmfast alone."""
    real, graphs = pipeline.denoiser_graph, dict[Any, Any]()

    def once(denoiser: Denoiser, *arguments: Any) -> Any:
        key = (weights_sha256(denoiser.state_dict()), repr(denoiser.network), repr(denoiser.spec), arguments)
        if key not in graphs:
            graphs[key] = real(denoiser, *arguments)
        return graphs[key].clone()

    with mock.patch.object(pipeline, "denoiser_graph", once):
        yield


def drawn(denoiser: Denoiser, noise: np.ndarray, conditions: dict[str, Any], sigmas: tuple[float, ...]) -> np.ndarray:
    """Return what the Python loop draws with PyTorch."""
    values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in conditions.items()}

    def denoise(x: Tensor, *levels: float) -> Tensor:
        times = dict(zip(("sigma", "sigma_next"), (x.new_full((len(x),), level) for level in levels), strict=False))
        result: Tensor = denoiser(x=x, **times, **values)
        return result

    with torch.inference_mode():
        result: np.ndarray = sample(denoise, torch.from_numpy(noise), sigmas, denoiser.spec).numpy()
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_wrapped_network_is_exported_and_computes_what_it_computed(name: str, tmp_path: Path) -> None:
    denoiser = wrapped(name)
    found = export_onnx(denoiser, tmp_path / "m.onnx", kind="sampler", sigmas=SIGMAS)
    assert found.manifest.parity["max_abs"] <= FP32
    assert denoiser.training, "the export looks at a copy"
    model = cmfast.load(tmp_path / "m.onnx")
    for batch, size in ((1, 3), (4, 11), (7, 32)):  # none of those that the export compared
        noise = slices(batch, range(batch), len(SIGMAS), denoiser.spec.shape)
        conditions = some_values(denoiser.spec.conditions, batch, seed=9, size=size)
        got = model.from_noise(noise, SIGMAS, conditions=conditions)
        assert got.std() > 0.1
        np.testing.assert_allclose(got, drawn(denoiser.eval(), noise, conditions, SIGMAS), rtol=0, atol=1e-5)
    if name == "guidance as a number":  # one weight for all samples, as any kind of number
        want = model.sample(3, conditions={"guidance": np.full(3, 3, np.float32)})
        for weight in (3.0, 3, np.float64(3), np.float32(3), np.array(3.0)):
            np.testing.assert_array_equal(model.sample(3, conditions={"guidance": weight}), want)
        assert np.abs(want - model.sample(3, conditions={"guidance": 30.0})).max() > 0.1
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["noise", *(each.name for each in denoiser.spec.conditions)]
    assert graph.output[0].name == ("images" if denoiser.spec.data == "image" else "samples")


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_made_on_the_graph_and_verified(name: str, tmp_path: Path) -> None:
    found = export_onnx(wrapped(name), tmp_path / "m.onnx", precision="fp16")
    assert 1e-6 < found.manifest.parity["max_abs"] <= FP16, "it is half precision, and no more than that"
    graph = onnx.load(tmp_path / "m.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    half = onnx.TensorProto.FLOAT16
    products = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")]
    types = Counter(weights[name].data_type == half for node in products for name in node.input[1:2] if name in weights)
    assert types[True] > types[False], "linear layers too"
    assert not {"Conv", "MatMul"} & found.left.keys()
    assert {"Cos", "Sin"} <= found.left.keys(), "the embedding of the noise level stays float32"
    norms = {"Softmax", "LayerNormalization", "InstanceNormalization"} & {node.op_type for node in graph.node}
    assert norms <= found.left.keys()
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} <= {
        onnx.TensorProto.FLOAT, onnx.TensorProto.INT64,
    }  # fmt: skip


def test_bfloat16_of_a_network_of_ones_own_is_verified(tmp_path: Path) -> None:
    found = export_onnx(wrapped("1-D U-Net of a vector"), tmp_path / "m.onnx", precision="bf16")
    assert found.manifest.dtype == "bfloat16"
    assert "LayerNormalization" in found.left


def test_a_branch_for_large_batches_is_noted_and_compared(tmp_path: Path) -> None:
    found = export_onnx(wrapped("diffusers' UNet2DModel"), tmp_path / "m.onnx")
    assert "batches above 63" in found.notes[0]
    assert max(row.batch for row in found.denoiser.parity.rows) == 64


def test_every_operator_of_these_networks_is_counted_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = export_onnx(wrapped("DiT of a sequence and a class"), tmp_path / "m.onnx")
    assert found.notes == ()
    assert found.manifest.cost["flops"] > 1e5
    assert capfd.readouterr() == ("", "")


class ShortcutMap(nn.Module):
    """Takes the length of a step beside its time, as shortcut models do, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.state, self.step = Mlp(6), nn.Linear(3, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor, c_noise_next: Tensor) -> Tensor:
        h: Tensor = self.body(x, c_noise) * (1 + self.step(embed(c_noise - c_noise_next)))
        return h + self.state(state)


def shortcut_map(renoise: str) -> Denoiser:
    net = ShortcutMap()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.3)
    return wrap(
        net, shape=(6,), conditions={"state": (3,)}, scaling="flow", c_noise="flow", second_time=True, renoise=renoise
    ).eval()


def test_a_flow_map_of_ones_own_is_the_same_in_the_loop_and_in_one_graph(tmp_path: Path) -> None:
    denoiser = shortcut_map("ddim")
    found = export_onnx(denoiser, tmp_path / "m.onnx", kind="sampler", sigmas=SIGMAS)
    assert max(found.denoiser.parity.worst.difference, found.manifest.parity["max_abs"]) <= 1e-5
    noise, state = slices(5, range(3), len(SIGMAS), (6,)), {"state": np.ones((3, 3), np.float32)}
    got = cmfast.load(tmp_path / "m.onnx").from_noise(noise, SIGMAS, conditions=state)
    np.testing.assert_allclose(got, drawn(denoiser, noise, state, SIGMAS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("renoise", ["ddim", "plain"])
def test_a_flow_map_goes_to_the_next_level_or_to_0_where_the_noise_is_fresh(renoise: str) -> None:
    noise, state = slices(5, range(3), len(SIGMAS), (6,)), {"state": np.ones((3, 3), np.float32)}
    seen: list[Tensor] = []
    with mock.patch.object(ShortcutMap, "forward", lambda _, x, t, state, c_noise_next: seen.append(c_noise_next) or x):
        drawn(shortcut_map(renoise), noise, state, SIGMAS)
    following = [s / (1 + s) for s in (*SIGMAS[1:], 0.0)] if renoise == "ddim" else [0.0] * 3
    np.testing.assert_allclose([float(each[0]) for each in seen], following, rtol=1e-6)


# Guidance and encoders.


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 5, 3)

    def forward(self, image: Tensor) -> Tensor:
        return torch.tanh(self.layer(image)).mean(-1)


def with_encoder() -> Denoiser:
    case = CASES["1-D U-Net of a vector"]
    encoder = Encoder()
    nn.init.normal_(encoder.layer.weight)
    return wrap(
        case.net(), shape=case.shape, conditions={"state": (2, None)}, encoders={"state": encoder}, scaling="edm",
        c_noise="ln/4",
    )  # fmt: skip


def test_an_encoder_is_evaluated_once_in_a_sampler_graph(tmp_path: Path) -> None:
    for kind, sigmas in (("denoiser", None), ("sampler", SIGMAS), ("server", SIGMAS)):
        found = export_onnx(with_encoder(), tmp_path / f"{kind}.onnx", kind=kind, sigmas=sigmas)
        operators = Counter(node.op_type for node in onnx.load(found.path).graph.node)
        assert (operators["Tanh"], operators["ConvTranspose"]) == (1, len(sigmas or (1,)))
        assert found.manifest.cost["flops"] > 0
    once, steps = (cmfast.read_manifest(tmp_path / f"{kind}.onnx").cost["flops"] for kind in ("denoiser", "sampler"))
    assert steps < 3 * once


@pytest.mark.parametrize(
    ("name", "null"),
    [
        ("mlp of classes", {"label": 4}),
        ("1-D U-Net of a vector", {"state": 0.0}),
        ("DiT of a sequence and a class", {"label": 3}),
    ],
)
def test_guidance_in_the_graph_is_guidance_in_the_loop(name: str, null: dict[str, float], tmp_path: Path) -> None:
    denoiser = wrapped(name).eval()
    found = export_onnx(denoiser, tmp_path / "m.onnx", kind="sampler", sigmas=SIGMAS, guidance=2.5, null=null)
    assert found.manifest.made_by["guidance"].startswith("2.5 ")
    noise = slices(3, range(4), len(SIGMAS), denoiser.spec.shape)
    conditions = some_values(denoiser.spec.conditions, 4, seed=3, size=5)

    def guided(x: Tensor, sigma: float) -> Tensor:
        given = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in conditions.items()}
        nothing = {**given, **{key: torch.full_like(given[key], value) for key, value in null.items()}}  # type: ignore[call-overload]
        level = x.new_full((len(x),), sigma)
        with_, without = (denoiser(x, level, **values) for values in (given, nothing))
        return without + 2.5 * (with_ - without)

    with torch.inference_mode():
        want = sample(guided, torch.from_numpy(noise), SIGMAS, denoiser.spec).numpy()
    got = cmfast.load(tmp_path / "m.onnx").from_noise(noise, SIGMAS, conditions=conditions)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)  # guidance multiplies rounding by its weight
    assert np.abs(got - drawn(denoiser, noise, conditions, SIGMAS)).max() > 1e-3


def test_what_stands_for_no_condition_is_taken_from_the_model(tmp_path: Path) -> None:
    denoiser = wrapped("mlp of classes", null={"label": 4})
    found = export_onnx(denoiser, tmp_path / "m.onnx", kind="sampler", sigmas=SIGMAS, guidance=2.0)
    assert found.manifest.made_by["guidance"] == "2 label=4"
    assert found.manifest.spec.conditions[0].null == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": 2.0}, "guidance is for a sampler: pass kind sampler"),
        ({"kind": "sampler", "guidance": 2.0}, r"what stands for no condition \(null\), for example label=10"),
        ({"kind": "sampler", "guidance": 2.0, "null": {"label": 5}}, "need a class from 0 to 4"),
        ({"kind": "sampler", "guidance": float("nan"), "null": {"label": 4}}, "guidance must be a finite number"),
        ({"kind": "sampler", "guidance": 2.0, "null": {"state": 0}}, "no such condition; this model has label"),
        ({"null": {"label": 0}}, "null requires guidance, the weight"),
    ],
)
def test_guidance_that_cannot_be_is_one_line(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=words):
        export_onnx(wrapped("mlp of classes"), tmp_path / "m.onnx", **options)


# What cannot be exported says where.


class FixesTheBatch(Mlp):
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        noise = torch.zeros(2, x.shape[1])
        return super().forward(x, c_noise) + noise  # the line that fixes it


class LooksAtValues(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if h.abs().max() > 1e6 else h  # the line that looks; which of the two never depends on the batch


class Inverse(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(h[:, :, None] @ h[:, None])


def outer(inner: nn.Module) -> nn.Module:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.odd = Mlp(6), inner

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            result: Tensor = self.odd(self.body(x, c_noise))
            return result

    return Outer()


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (
            lambda: FixesTheBatch(6),
            r"batch must be dynamic.* constant 2: test_own_networks.py:\d+: .*the line that fixes",
        ),
        (
            lambda: outer(LooksAtValues()),
            r"network.odd \(LooksAtValues\) cannot be traced at test_own_networks.py:\d+: ",
        ),
        (
            lambda: outer(Inverse()),
            r"network.odd: the operator aten._linalg_eigh.default has no ONNX form, test_own_net",
        ),
    ],
    ids=["batch", "values", "operator"],
)
def test_what_cannot_be_traced_is_one_line_with_the_module_and_the_code(
    net: Callable[[], nn.Module], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    denoiser = wrap(net(), shape=(6,), scaling="edm", c_noise="ln/4")
    with pytest.raises(CmfastError, match=words) as caught:
        export_onnx(denoiser, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


class ReturnsMore(Mlp):
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, c_noise)[:, None].repeat(1, 2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"net": UNet1d(), "shape": (8, 4)}, r"network \(UNet1d\) fails: TypeError: .*missing .* 'state'"),
        (
            {"net": UNet1d(), "shape": (8, 3), "conditions": {"state": (5,)}},
            r"network.enter \(Conv1d\) fails at own_netw",
        ),
        ({"net": ReturnsMore(6), "shape": (6,)}, r"the network returned \[3, 2, 6\], and must return \[B, 6\]"),
    ],
)
def test_a_network_that_fails_says_so_itself(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=words):
        export_onnx(wrap(**{"scaling": "edm", "c_noise": "ln/4", **options}), tmp_path / "m.onnx")


def test_a_fixed_batch_may_be_fixed_by_the_code(tmp_path: Path) -> None:
    denoiser = wrap(FixesTheBatch(6), shape=(6,), scaling="edm", c_noise="ln/4")
    assert export_onnx(denoiser, tmp_path / "m.onnx", batch=2).manifest.parity["max_abs"] <= FP32


def test_a_wrong_graph_is_caught_at_one_of_three_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export_onnx(wrapped("mlp"), tmp_path / "m.onnx")
    assert {row.batch for row in found.denoiser.parity.rows} == {1, 2, 5}


# Wrapping.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": {"state": 0}}, "condition state: classes must be a positive whole number"),
        ({"conditions": {"state": "five"}}, "condition 'state': need a number of classes, or the sizes of a tensor"),
        ({"conditions": {"sigma": (3,)}}, "a condition's name must be an identifier other than"),
        ({"conditions": {"class": 3}}, "and Python's keywords, got 'class'"),
        ({"conditions": {"state": (0,)}}, "condition state: sizes are whole numbers from 1"),
        ({"shape": (1, 2, 3, 4, 5)}, "shape must be one to 4"),
        ({"scaling": "vp"}, "scaling must be one of"),
        ({"encoders": {"image": nn.Identity()}}, "encoders are {condition: torch.nn.Module}"),
        ({"null": {"label": 1}}, "null has 'label', and the conditions are none"),
        ({"times": {"beta": 1}}, "times has no 'beta'; there are schedule"),
        ({"net": "net"}, "net must be a torch.nn.Module"),
        ({"net": wrap(Mlp(6), shape=(6,), scaling="edm", c_noise="raw")}, r"pass denoiser\.network"),
        ({"net": nn.Linear(2, 2).half()}, "the weight weight is torch.float16; pass net.float()"),
    ],
)
def test_what_cannot_be_wrapped_is_one_line(options: dict[str, Any], words: str) -> None:
    given = {"net": Mlp(6), "shape": (6,), "scaling": "edm", "c_noise": "ln/4", **options}
    with pytest.raises(CmfastError, match=words):
        wrap(**given)


def test_images_are_clipped_and_arrays_are_not_unless_one_says_so() -> None:
    def clip(shape: tuple[int, ...], **more: Any) -> bool:
        return wrap(nn.Identity(), shape=shape, scaling="edm", c_noise="ln/4", **more).spec.clip

    assert (clip((3, 8, 8)), clip((8, 4)), clip((8, 4), clip=True), clip((3, 8, 8), clip=False)) == (
        True, False, True, False,
    )  # fmt: skip


def test_a_wrong_condition_is_one_line_that_names_it(tmp_path: Path) -> None:
    export_onnx(wrapped("1-D U-Net of a vector"), tmp_path / "m.onnx")
    model = cmfast.load(tmp_path / "m.onnx")
    x = np.zeros((2, 8, 4), np.float32)
    for given, words in (
        ({}, "needs the condition state"),
        ({"state": np.zeros(5), "more": 1}, "no condition 'more'"),
        ({"state": np.zeros(6)}, r"condition state must be \[5\]"),
        ({"state": np.full(5, np.nan)}, "condition state has values that are not finite"),
        ({"state": ["a"] * 5}, "condition state must be an array of numbers"),
    ):
        with pytest.raises(CmfastError, match=words):
            model.denoise(x, 1.0, conditions=given)


# The command line.

FACTORY = """
from torch import nn
from helpers.own_networks import UNet1d

calls = []

def make() -> nn.Module:
    calls.append(1)
    return UNet1d()

def not_a_module() -> int:
    return 1
"""
SPEC = {"shape": [8, 4], "conditions": {"state": [5]}, "scaling": "edm", "c_noise": "ln/4", "sigmas": {"1": [80.0]}}


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user's: his module, the conventions, the weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_policy.py").write_text(FACTORY)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    torch.save(CASES["1-D U-Net of a vector"].net().state_dict(), tmp_path / "weights.pt")
    yield tmp_path
    sys.modules.pop("my_policy", None)


def test_a_network_of_ones_own_is_exported_by_the_command(policy: Path, call: Callable[..., Any]) -> None:
    result = call(
        cli.main,
        "weights.pt",
        "--network",
        "my_policy:make",
        "--spec",
        "spec.json",
        "--kind",
        "sampler",
        "-o",
        "p.onnx",
    )
    assert result.returncode == 0, result.stderr
    assert "--condition state=state.npy -o samples.npz" in result.stdout
    model = cmfast.load("p.onnx")
    denoiser = wrapped("1-D U-Net of a vector", renoise="sqrt").eval()
    noise, state = slices(0, range(3), 1, (8, 4)), some_values(denoiser.spec.conditions, 3)
    np.testing.assert_allclose(
        model.from_noise(noise, (80.0,), conditions=state), drawn(denoiser, noise, state, (80.0,)), rtol=0, atol=1e-5
    )


def test_weights_are_optional_and_the_code_is_imported_only_when_it_is_named(
    policy: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    refused(call(cli.main, "weights.pt"), "weights.pt")
    assert "my_policy" not in sys.modules
    result = call(cli.main, "--network", "my_policy:make", "--spec", "spec.json", "--dry-run")
    assert result.stdout == "would write spec.onnx: denoiser, fp32, batch dynamic\n"
    assert "my_policy" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a model"),
        (("--spec", "spec.json"), "add --network package.module:factory"),
        (("--network", "my_policy:make"), "returns a plain module: pass its conventions"),
        (("weights.pt", "--network", "my_policy:make"), "returns a plain module: pass its conventions"),
        (
            ("--network", "my_policy:make", "--spec", "spec.json", "--set", "sigma_data=3"),
            "the conventions of a network",
        ),
        (("--network", "my_policy", "--spec", "spec.json"), "need package.module:factory"),
        (("--network", "my_policy:none", "--spec", "spec.json"), "my_policy cannot be imported"),
        (("--network", "nowhere.net:make", "--spec", "spec.json"), "nowhere.net cannot be imported"),
        (("--network", "my_policy:not_a_module", "--spec", "spec.json"), "must return a torch.nn.Module"),
        (("--network", "broken:make", "--spec", "spec.json"), "broken cannot be imported: ZeroDivisionError: division"),
        (("--network", "my_policy:needs", "--spec", "spec.json"), "needs() failed: TypeError: "),
        (("--network", "my_policy:leaves", "--spec", "spec.json"), "leaves() failed: SystemExit: 0 ("),
        (("--network", "my_policy:make", "--spec", "weights.pt"), "weights.pt: not a JSON file"),
        (("--network", "my_policy:make", "--spec", "other.json"), "unknown 'image'; there are shape, "),
        (("--network", "my_policy:make", "--spec", "short.json"), "c_noise, scaling is missing"),
        (("--network", "my_policy:make", "--spec", "spec.json", "--format", "cmfast"), "not --network"),
        (("other.pt", "--network", "my_policy:make", "--spec", "spec.json"), "the weights do not fit my_policy:make"),
        (("--network", "my_policy:make", "--spec", "spec.json", "--null", "a"), "--null a: expected NAME=NUMBER"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: tuple[str, ...], words: str, policy: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    (policy / "other.json").write_text(json.dumps({**SPEC, "image": [1, 8, 8]}))
    (policy / "broken.py").write_text("1 / 0\n")
    with (policy / "my_policy.py").open("a") as opened:
        opened.write("\nimport sys\ndef needs(width): ...\ndef leaves(): sys.exit(0)\n")
    (policy / "short.json").write_text(json.dumps({"shape": [8, 4]}))
    torch.save(Conv3d().state_dict(), policy / "other.pt")
    refused(call(cli.main, *arguments, *(() if "cmfast" in arguments else ("-o", "m.onnx"))), words)


def test_engines_of_a_conditioned_network_have_a_profile_of_its_sizes(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from cmfast_export.targets.tensorrt_engine import build_engine
    from cmfast_export.targets.tensorrt_options import BuildOptions

    for name in ("1-D U-Net of a vector", "DiT of a sequence and a class"):
        export_onnx(wrapped(name), tmp_path / "m.onnx", kind="sampler", sigmas=SIGMAS[:2], precision="fp16")
        built = build_engine(
            tmp_path / "m.onnx", tmp_path / "m.engine", BuildOptions(batch=(1, 2, 8), sizes=(1, 8, 32))
        )
        assert built.manifest.spec.conditions == wrapped(name).spec.conditions
        assert built.manifest.engine.get("sizes") == ([1, 8, 32] if "sequence" in name else None)


@pytest.mark.parametrize("name", ["DiT of a sequence and a class", "guidance as a number", "1-D U-Net of a vector"])
def test_a_conditioned_network_is_served_by_a_repository_that_fits_its_graph(name: str, tmp_path: Path) -> None:
    from cmfast_export.targets.triton_repository import client_example, write_repository

    denoiser = wrapped(name).eval()
    export_onnx(denoiser, tmp_path / "m.onnx", kind="server", sigmas=SIGMAS[:2])
    noise = slices(3, range(4), 2, denoiser.spec.shape)
    conditions = some_values(denoiser.spec.conditions, 4, seed=3, size=5)
    got = cmfast.load(tmp_path / "m.onnx").from_noise(noise, SIGMAS[:2], conditions=conditions)
    np.testing.assert_allclose(got, drawn(denoiser, noise, conditions, SIGMAS[:2]), rtol=0, atol=1e-5)

    written = write_repository(tmp_path / "models", [tmp_path / "m.onnx"])
    compile(client_example(written), "client.py", "exec")
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse((tmp_path / "models/m/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    graph = onnx.load(tmp_path / "m.onnx").graph
    for declared, values in ((config.input, graph.input), (config.output, graph.output)):
        shapes = {
            value.name: [size.dim_value or -1 for size in value.type.tensor_type.shape.dim][1:] for value in values
        }
        one_number = {tensor.name for tensor in declared if tensor.HasField("reshape")}
        assert {tensor.name: [] if tensor.name in one_number else [*tensor.dims] for tensor in declared} == shapes
        assert one_number <= {"guidance"}
    for warmup in config.model_warmup:
        assert all(size > 0 for value in warmup.inputs.values() for size in value.dims)


def test_an_engine_is_built_in_one_call(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = cmfast_export.export_engine(
        wrapped("1-D U-Net of a vector"), tmp_path / "p.engine", kind="sampler", sigmas=SIGMAS[:1], batch=(1, 1, 4)
    )
    assert (built.manifest.kind, built.manifest.engine["batch"]) == ("sampler", [1, 1, 4])
    assert [path.name for path in tmp_path.iterdir()] == ["p.engine"]
    with pytest.raises(CmfastError, match="exported already"):
        cmfast_export.export_engine(tmp_path / "p.onnx", tmp_path / "q.engine", kind="sampler")


def test_the_names_of_the_packages_are_there_without_their_import_of_torch() -> None:
    code = (
        "import cmfast_train, cmfast_export, sys\n"
        "assert {'wrap', 'Denoiser'} <= set(dir(cmfast_train))\n"
        "assert {'export_onnx', 'export_engine'} <= set(dir(cmfast_export))\n"
        "assert not {'torch', 'onnx', 'numpy'} & sys.modules.keys()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (cmfast_export.export_onnx, cmfast_train.wrap) == (export_onnx, wrap)
    for package in (cmfast_export, cmfast_train):
        assert all(hasattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shape": 16}, "shape must be a list of sizes"),
        ({"conditions": ["state"]}, "conditions must be passed by name"),
        ({"null": 3}, "null must be passed by name"),
        ({"sigmas": [80.0]}, "sigmas must be"),
        ({"sigmas": {1: 80.0}}, "default noise levels for 1 steps are no list"),
        ({"clip": "no"}, "clip must be true or false, got 'no'"),
    ],
    ids=str,
)
def test_a_convention_of_the_wrong_kind_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        wrap(nn.Linear(3, 3), **{"shape": (3,), "scaling": "edm", "c_noise": "ln/4", **values})


class Returns(nn.Module):
    """A network that returns something else than it should."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(7, 7), make

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> Any:
        return self.make(self.layer(x) + c_noise[:, None, None])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda y: y[:, :1, :1], r"the network returned \[2, 1, 1\], and must return \[B, 16, 7\]"),
        (lambda y: y[0], r"returned \[16, 7\], and must return \[B, 16, 7\]"),
        (lambda y: y.flatten(1), r"returned \[2, 112\], and must return"),
        (lambda y: (y, y), "returned tuple, and must return"),
    ],
    ids=["broadcast", "no batch", "flat", "tuple"],
)
def test_a_network_that_returns_another_shape_is_one_line_and_no_file(make: Any, words: str, tmp_path: Path) -> None:
    denoiser = wrap(Returns(make), shape=(16, 7), scaling="edm", c_noise="ln/4")
    with pytest.raises(CmfastError, match=words):
        denoiser(torch.zeros(2, 16, 7), torch.ones(2))
    with pytest.raises(CmfastError, match="returned"):
        export_onnx(denoiser, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": nn.Linear(3, 3)}, r"got Linear; cmfast_train.wrap\(net, shape="),
        ({"out": "model.txt"}, "must end in .onnx"),
        ({"steps": "1"}, "number of steps must be a whole number"),
        ({"guidance": "2"}, "guidance must be a finite number"),
        ({"guidance": float("nan"), "null": {"label": 3}}, "guidance must be a finite number, got nan"),
        ({"guidance": 2.0, "null": {"label": "x"}}, "null of the condition label must be a finite number"),
        ({"tolerance": "a"}, "tolerance must be a finite number greater than 0"),
    ],
    ids=str,
)
def test_a_request_of_the_wrong_kind_is_one_line_before_the_work(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = {"model": wrap(nn.Linear(3, 3), shape=(3,), scaling="edm", c_noise="ln/4"), "kind": "sampler", **options}
    model, out = given.pop("model"), tmp_path / given.pop("out", "model.onnx")
    with pytest.raises(CmfastError, match=words):
        export_onnx(model, out, **given)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_may_be_called_like_a_method_of_a_module() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, c_noise: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x) + keys
            return y

    encoder = nn.Linear(5, 3)
    denoiser = wrap(
        Adds(), shape=(3,), scaling="edm", c_noise="ln/4", conditions={"keys": (5,)}, encoders={"keys": encoder}
    )
    x, sigma, keys = torch.randn(2, 3), torch.ones(2), torch.randn(2, 5)
    plain = wrap(Adds(), shape=(3,), scaling="edm", c_noise="ln/4", conditions={"keys": (3,)})
    plain.network.load_state_dict(denoiser.network.net.state_dict())
    torch.testing.assert_close(denoiser(x, sigma, keys=keys), plain(x, sigma, keys=encoder(keys)), rtol=0, atol=1e-6)


def test_scalars_of_numpy_are_numbers() -> None:
    as_numpy = wrap(
        nn.Linear(3, 3), shape=[np.int64(3)], scaling="edm", c_noise="ln/4", sigma_max=np.float64(80),
        sigmas={2: torch.tensor([80.0, 2.5])}, conditions={"state": (np.int32(4),)}, null={"state": np.float32(0)},
    )  # fmt: skip
    plain = wrap(
        nn.Linear(3, 3), shape=(3,), scaling="edm", c_noise="ln/4", sigmas={2: (80.0, 2.5)}, conditions={"state": (4,)},
        null={"state": 0.0},
    )  # fmt: skip
    assert as_numpy.spec == plain.spec
    assert json.dumps(as_numpy.spec.to_dict()) == json.dumps(plain.spec.to_dict())
