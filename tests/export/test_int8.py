# SPDX-License-Identifier: MIT
"""Int8 for CPUs: which products, which ranges, how accurate, and what is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import cmfast
import cmfast_train
from cmfast.backends.openvino import library
from cmfast.checks import psnr_db
from cmfast.cli.info import main as info
from cmfast.conditions import Condition
from cmfast.errors import CheckFailed, CmfastError, CmfastWarning
from cmfast.formats.manifest import read_onnx
from cmfast_export import pipeline, report
from cmfast_export.cli import main as export
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.int8 import quantization
from cmfast_export.int8.calibration import best_range, conditions_of, observe
from cmfast_export.int8.graph import LEVELS, quantized
from cmfast_export.int8.options import Calibration
from cmfast_export.int8.products import products_of
from cmfast_export.pipeline import Exported, export_onnx
from cmfast_export.precision_search import Choice
from cmfast_export.request import GraphRequest, make_request
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import load_checkpoint
from helpers.own_networks import UNet1d

Make = Callable[..., Path]
FEW = Calibration(samples=4)


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Make) -> ir.Model:
    """Return the float32 graph of the tiny U-Net."""
    return denoiser_graph(load_checkpoint(tiny_checkpoint()).denoiser())


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    file = tmp_path_factory.mktemp("int8") / "denoiser.onnx"
    return export_onnx(tiny_checkpoint(), file, precision="int8", calibration=FEW, tolerance_db=30)


@pytest.fixture(scope="module")
def sampler(made: Exported, tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a sampler that has to be 3 dB better than the denoiser: half its error."""
    file = tmp_path_factory.mktemp("int8") / "sampler.onnx"
    assert made.int8
    better = {"calibration": FEW, "tolerance_db": made.int8.psnr_db + 3}
    return export_onnx(tiny_checkpoint(), file, kind="sampler", steps=2, precision="int8", **better)


def optimised(file: Path, folder: Path) -> ir.Model:
    """Return the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = os.fspath(folder / "optimised.onnx"), 4
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return ir.load(folder / "optimised.onnx")


def test_onnx_runtime_runs_as_many_int8_convolutions_as_the_file_says(made: Exported, tmp_path: Path) -> None:
    assert made.int8
    count = len(made.int8.products)
    assert count > 10
    assert made.manifest.made_by["int8"] == made.int8.in_words
    assert made.int8.in_words.startswith(f"{count} of {count + 2} products int8")
    ran = [node.op_type for node in optimised(made.path, tmp_path).graph]
    assert ran.count("QLinearConv") == count


def test_the_first_and_the_last_product_and_the_embeddings_stay_float32(graph: ir.Model) -> None:
    inside, ends = products_of(graph.graph)
    first, last = ends
    assert first.node.inputs[0] is not None
    assert list(first.weight.shape or ()) == [32, 1, 3, 3]  # from the one channel of the image
    assert list(last.weight.shape or ()) == [1, 32, 3, 3]  # and to it
    assert {product.node.op_type for product in inside} == {"Conv"}  # the embeddings' linear layers are Gemm
    assert sum(node.op_type == "Conv" for node in graph.graph) == len(inside) + 2
    renamed = graph.clone()
    for number, node in enumerate(renamed.graph):
        node.name = f"n{number}"
    assert [len(group) for group in products_of(renamed.graph)] == [len(inside), 2], "names play no part"


def test_the_weights_of_a_file_take_a_byte_each(made: Exported) -> None:
    assert made.int8
    constants = ir.load(made.path).graph.initializers.values()
    small = sum(v.const_value.size for v in constants if v.dtype == ir.DataType.INT8 and v.const_value)
    large = sum(v.const_value.size for v in constants if v.dtype == ir.DataType.FLOAT and v.const_value)
    assert small > large  # the rest is embeddings, norms, the first and the last
    assert made.manifest.cost["weight_bytes"] < 4 * (small + large)
    assert made.path.stat().st_size < 1.5 * (small + 4 * large)  # names take the rest of so small a file


def test_an_int8_file_is_a_float32_file_to_its_readers_and_says_what_is_int8(
    made: Exported, sampler: Exported, call: Callable[..., Any]
) -> None:
    for each in (made, sampler):
        manifest, _ = read_onnx(each.path)
        assert (manifest.dtype, manifest.parity["psnr_db"] >= 30) == ("float32", True)
        assert cmfast.load(each.path).sample(2).shape == (2, 8, 8, 1)
    shown = call(info, made.path).stdout
    assert "float32, int8 products" in shown
    assert made.int8
    assert made.int8.in_words in shown
    assert call(info, sampler.path, "--selftest").returncode == 0


def test_the_denoiser_is_as_near_to_pytorch_as_the_report_says(made: Exported, tiny_checkpoint: Make) -> None:
    want, got = (cmfast.load(file).sample_float(16, seed=9) for file in (tiny_checkpoint(), made.path))
    error = float(np.square(got - want).mean())
    assert 10 * np.log10(4 / error) > made.denoiser.parity.psnr_db - 3  # other samples: half the error, or twice


def test_products_are_given_back_until_the_file_is_accurate_enough(made: Exported, sampler: Exported) -> None:
    assert made.int8
    assert sampler.int8
    assert made.int8.returned == ()
    assert sampler.sampler
    assert min(sampler.denoiser.parity.psnr_db, sampler.sampler.parity.psnr_db) >= sampler.int8.allowed_db
    back = len(sampler.int8.returned)
    assert 0 < back < len(made.int8.products) / 2
    assert f"{back} for accuracy" in sampler.int8.in_words
    assert len(sampler.int8.products) + back == len(made.int8.products)


def test_a_graph_that_int8_cannot_do_is_refused(
    graph: ir.Model, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "ATTEMPTS", 1)
    reference = TorchBackend(tiny_checkpoint())
    request = GraphRequest(precision="int8", calibration=Calibration(samples=1), tolerance_db=190)
    with pytest.raises(CheckFailed, match=r"int8 is \d+\.\d dB from float32 with 33 of 33 products.*no file was"):
        quantization.quantize(graph, reference.manifest, request, (80.0,), None, [reference], None)


def test_a_calibration_sees_the_noise_levels_of_the_sampler_and_no_others(graph: ir.Model, tmp_path: Path) -> None:
    spec = cmfast.ModelSpec(shape=(1, 8, 8), conditions=(cmfast.class_label(10),))
    names = [product.data.name or "" for product in products_of(graph.graph)[0]]
    seen = observe(graph, names, spec, [(80.0, 0.8)], tmp_path, FEW, between=False)
    assert seen.levels == [80.0, 0.8]
    assert set(seen.ranges) == set(names)
    assert all(low <= 0 < high for low, high in seen.ranges.values())
    also = observe(graph, names, spec, [(80.0,), (80.0, 0.8)], tmp_path, FEW, between=True)
    assert also.levels[:2] == [80.0, 0.8]
    assert len(also.levels) == 9  # and eight from sigma_min to sigma_max, which is 80


def test_a_range_is_the_one_with_the_least_error_and_keeps_all_that_is_seen_evenly() -> None:
    rng = np.random.default_rng(0)
    even = rng.uniform(-1, 3, 4096).astype(np.float32)
    assert best_range(-1.0, 3.0, even) == (-1.0, 3.0)
    tailed = rng.standard_normal(100_000).clip(-4, 4).astype(np.float32)
    tailed[0] = 5
    high = best_range(-4.0, 5.0, tailed)[1]
    assert 3.5 < high < 5  # one that is clipped costs less than coarser steps for 99,999
    assert best_range(0.0, 0.0, np.zeros(8, np.float32)) == (0.0, 1.0)


def test_a_matrix_product_is_rounded_to_eight_bits_as_the_formula_has_it() -> None:
    """x -> A x + a -> B . + b -> C . : B alone is between two others."""
    rng = np.random.default_rng(1)
    weights = {n: rng.standard_normal((6, 6)).astype(np.float32) for n in "ABC"}
    bias = rng.standard_normal(6).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 6]))
    constants = {
        name: ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(content.shape),
            const_value=ir.tensor(content, name=name),
        )
        for name, content in {**weights, "bias": bias}.items()
    }  # fmt: skip
    nodes, value = [], x
    for name in "ABC":
        inputs = [value, constants[name], *([constants["bias"]] if name == "B" else [])]
        nodes.append(ir.node("Gemm" if name == "B" else "MatMul", inputs, name=name))
        value = nodes[-1].outputs[0]
        value.name, value.shape, value.type = f"{name}.out", x.shape, x.type
    initializers = list(constants.values())
    plain = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 18}, name="g")
    model = ir.Model(plain, ir_version=8)
    inside, ends = products_of(model.graph)
    assert ([each.name for each in inside], [each.name for each in ends]) == (["B"], ["A", "C"])

    z = rng.standard_normal((5, 6)).astype(np.float32)
    first = z @ weights["A"]
    second = first @ weights["B"] + bias
    ranges = {"A.out": (float(first.min()), float(first.max())), "B.out": (float(second.min()), float(second.max()))}
    session = onnxruntime.InferenceSession(ir.to_proto(quantized(model, ["B"], ranges)).SerializeToString())
    (got,) = session.run(None, {"x": z})

    def rounded(v: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
        scale = (high - low) / LEVELS
        zero = np.round(-low / scale)
        return (np.clip(np.round(v / scale) + zero, 0, LEVELS) - zero) * scale

    scale = np.abs(weights["B"]).max(0) / 127  # of a column, which is an output
    inner = rounded(first, *ranges["A.out"]) @ (np.round(weights["B"] / scale) * scale) + bias
    want = rounded(inner, *ranges["B.out"]) @ weights["C"]
    step = (ranges["B.out"][1] - ranges["B.out"][0]) / LEVELS
    # A sum at the border of two steps may go either way: at most one step of B's result, times C.
    assert np.abs(got - want).max() <= 1.01 * step * np.abs(weights["C"]).max() + 1e-4
    assert np.median(np.abs(got - want)) < 1e-5
    exact = second @ weights["C"]
    assert np.abs(got - exact).max() > 1e-3, "it was rounded"


def test_errors_of_products_are_taken_to_add_up_and_the_worst_call_decides() -> None:
    errors = np.array([[8.0, 1.0], [0.0, 9.0], [1.0, 2.0], [1.0, 1.0]])  # sums 10 and 13
    order, left = quantization._order(list("abcd"), errors)
    assert order == ["b", "a", "c", "d"]  # b of the second call, then the first is the worst
    assert left.tolist() == [13, 10, 3, 1]
    half = -10 * np.log10(0.5)
    assert quantization._how_many(left, 0, 40.0, 40.0 + half) == 2  # 3 of 13 are left; 10 are too many
    assert quantization._how_many(left, 2, 40.0, 40.1) == 3  # it came out worse than predicted: one more at least
    assert quantization._how_many(left, 0, 40.0, 90.0) == 3  # one product stays int8
    assert quantization._how_many(left, 3, 40.0, 90.0) == 3


def test_conditions_of_a_calibration_come_from_a_file_and_random_tensors_are_warned_of(tmp_path: Path) -> None:
    spec = cmfast.ModelSpec(shape=(4,), conditions=(Condition(name="state", kind="tensor", shape=(3,)),))
    with pytest.warns(CmfastWarning, match="random values of state; pass real ones: --calibration data=FILE.npz"):
        assert conditions_of(FEW, spec)["state"].shape == (4, 3)
    file = tmp_path / "state.npz"
    states = np.arange(18, dtype=np.float32).reshape(6, 3)
    np.savez(file, state=states)
    np.testing.assert_array_equal(conditions_of(replace(FEW, data=str(file)), spec)["state"], states[:4])
    with pytest.raises(CmfastError, match=r"state has the shape \[6, 3\], and 7 samples need as many"):
        conditions_of(Calibration(samples=7, data=str(file)), spec)
    np.savez(file, stat=states)
    with pytest.raises(CmfastError, match="'stat', which is no condition; this model has state"):
        conditions_of(replace(FEW, data=str(file)), spec)
    file.write_bytes(b"no zip")
    with pytest.raises(CmfastError, match=r"not a \.npz file that can be read"):
        conditions_of(replace(FEW, data=str(file)), spec)


def no_data(file: Path, kind: str) -> None:
    """Write what is no calibration data."""
    values = np.zeros((4, 5), np.float32)
    if kind == "npy":
        with file.open("wb") as opened:
            np.save(opened, values)
        return
    np.savez(file, state=values)
    file.write_bytes(file.read_bytes()[: -40 if kind == "cut" else None])
    if kind == "damaged":  # in the middle of the numbers
        content = bytearray(file.read_bytes())
        content[160] ^= 255
        file.write_bytes(content)


@pytest.mark.parametrize(("kind", "words"), [
    ("npy", "a .npy file, and calibration data are a .npz file with an array for each condition"),
    ("cut", "not a .npz file that can be read"),
    ("damaged", "not a .npz file that can be read"),
])  # fmt: skip
def test_calibration_data_that_cannot_be_read_are_one_line_before_the_model_is_read(
    kind: str, words: str, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    file, model = tmp_path / "data.npz", tmp_path / "model.pt"
    no_data(file, kind)
    model.write_bytes(b"no model: it is not read")
    refused(call(export, model, "--precision", "int8", "--calibration", f"data={file}"), f"{file}: {words}")


def test_calibration_data_that_do_not_fit_are_refused_before_the_graph_is_exported(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_denoiser_graph", None)
    np.savez(tmp_path / "data.npz", state=np.zeros((4, 5), np.float32))
    few = replace(FEW, data=str(tmp_path / "data.npz"))
    with pytest.raises(CmfastError, match="calibration data for 'state', which is no condition"):
        export_onnx(tiny_checkpoint(), tmp_path / "m.onnx", precision="int8", calibration=few)


@pytest.mark.parametrize(("options", "words"), [
    ({"tolerance": 0.1}, "pass --tolerance-db instead of --tolerance"),
    ({"weights": "fp16"}, "weights of precision int8 are stored in it already"),
    ({"device": "cuda"}, "int8 is for CPUs and verified there"),
    ({"encoders": {"": Path("e.onnx")}}, "int8 with an encoder in a file of its own"),
    ({"flavour": "ort-cuda"}, "the flavour ort-cuda is not"),
    ({"tolerance_db": float("nan")}, "a finite number of decibels greater than 0, got nan"),
    ({"precision": "fp32", "tolerance_db": 40.0}, "are for precision int8"),
    ({"precision": "fp16", "calibration": FEW}, "are for precision int8"),
])  # fmt: skip
def test_what_does_not_go_with_int8_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        GraphRequest(**{"precision": "int8"} | options)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--format", "engine"], "--precision int8 is not supported with --format engine; with --format onnx it makes"),
    (["--format", "openvino"], "not supported with --format openvino"),
    (["--calibration", "samples=0"], "calibration samples must be at least 1"),
    (["--calibration", "image=3"], "expected NAME=VALUE, NAME one of samples, seed, data"),
])  # fmt: skip
def test_what_the_command_cannot_do_in_int8_is_one_line(
    arguments: list[str], words: str, tiny_checkpoint: Make, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    refused(call(export, tiny_checkpoint(), "--precision", "int8", *arguments), words)


def test_an_int8_file_is_not_made_into_what_cannot_run_it(
    made: Exported, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    result = call(export, made.path, "--format", "ort", "-o", tmp_path / "model.ort")
    refused(result, "an int8 graph, for ONNX Runtime and OpenVINO on CPUs")
    assert list(tmp_path.iterdir()) == []


def test_the_report_has_decibels_and_grey_levels_and_says_where_the_cpu_lacks_vnni(
    made: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "has_vnni", lambda: False)
    request = make_request(model=Path(__file__), out=Path("model.onnx"), precision="int8")
    report.onnx(Choice(exported=made, precision="int8", tried=(), timed=""), request)
    said = capsys.readouterr().out
    assert "model.onnx against PyTorch: largest difference, 30 dB needed, by onnxruntime cpu" in said
    assert re.search(r"compared at +. float32 PyTorch . dB +. grey levels", said)
    assert "this CPU has no VNNI" in said
    assert f"{made.path}: denoiser, int8, " in said
    assert f"cmfast-sample {made.path} --variant openvino --precision bf16" in said


class Passing(nn.Module):
    """Predicts eps as about what it is given, which is right at high noise: three convolutions near the identity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 8), (8, 8), (8, 1))))
        for layer in self.layers:
            nn.init.dirac_(layer.weight)
            with torch.no_grad():
                layer.weight += 1e-3 * torch.randn_like(layer.weight)
                layer.bias.normal_(std=1e-3)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return eps, as x."""
        return self.layers(x + 0 * time.reshape(-1, 1, 1, 1))


def test_an_eps_network_that_int8_spoils_at_high_noise_is_refused(tmp_path: Path, call: Callable[..., Any]) -> None:
    denoiser = cmfast_train.wrap(Passing(), shape=(1, 8, 8), scaling="vp_eps", c_noise="ln/4", sigma_max=20.0)
    # A step of the convolution in the middle is about 0.03, and 20 times as large in the image: no use.
    with pytest.raises(CheckFailed, match=r"int8 is 1?\d\.\d dB from float32 with 1 of 1 .*no file was written"):
        export_onnx(denoiser, tmp_path / "m.onnx", precision="int8", calibration=FEW, tolerance_db=20)
    made = export_onnx(denoiser, tmp_path / "m.onnx", precision="int8", calibration=FEW, tolerance_db=3)
    x = 20 * np.random.default_rng(1).standard_normal((4, 1, 8, 8)).astype(np.float32)
    got, want = (model.denoise(x, 20.0) for model in (cmfast.load(made.path), cmfast.Model(TorchBackend(denoiser))))
    row = next(each for each in made.denoiser.parity.rows if each.where == "sigma 20")
    assert row.psnr_db == pytest.approx(psnr_db([got], [want], image=True), abs=3)  # other samples
    assert call(info, made.path, "--selftest").returncode == 0, "the tolerance is in data units"


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")
def test_openvino_runs_the_same_file_with_int8_convolutions(made: Exported, tiny_checkpoint: Make) -> None:
    wanted = cmfast.load(tiny_checkpoint()).sample_float(8, seed=2)
    model = cmfast.load(made.path, variant="openvino")
    got = model.sample_float(8, seed=2)
    assert 10 * np.log10(4 / np.square(got - wanted).mean()) >= 28  # 30 of the export, other samples
    ready = next(iter(model.backend._graphs._static.values()))[0]  # type: ignore[attr-defined]
    kinds = [str(op.get_rt_info()["primitiveType"].value) for op in ready.compiled.get_runtime_model().get_ops()
             if str(op.get_rt_info()["layerType"].value) == "Convolution"]  # fmt: skip
    assert made.int8
    assert sum(kind.endswith("I8") for kind in kinds) == len(made.int8.products)


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")
def test_around_int8_openvino_keeps_the_noise_embedding_in_float32_when_the_rest_is_bfloat16(tmp_path: Path) -> None:
    if "BF16" not in library.capabilities(library.import_openvino("this test").Core()):
        pytest.skip("a CPU without bfloat16")
    torch.manual_seed(0)
    network = cmfast_train.wrap(UNet1d(), shape=(8, 4), conditions={"state": (5,)}, scaling="edm", c_noise="250ln")
    states = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    np.savez(tmp_path / "states.npz", state=states)
    few = replace(FEW, data=str(tmp_path / "states.npz"))
    file = export_onnx(network, tmp_path / "x.onnx", precision="int8", calibration=few, tolerance_db=20).path
    exact, rounded = (cmfast.load(file, variant="openvino", precision=each) for each in ("", "bf16"))
    x = np.random.default_rng(1).standard_normal((4, 8, 4)).astype(np.float32)
    want, got = (model.denoise(30 * x, 30.0, conditions={"state": states}) for model in (exact, rounded))
    # c_noise is 850 here, where bfloat16 has steps of 4: rounded, it costs all but 34 dB.
    assert 10 * np.log10(4 / np.square(got - want).mean()) > 55
