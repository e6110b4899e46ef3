# SPDX-License-Identifier: MIT
"""Precision in the graph: what is half and what stays float32, how far that is from PyTorch, and auto's choice."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto

import cmfast
from cmfast.errors import BackendError, CheckFailed, CmfastError
from cmfast.formats.manifest import ROUNDING
from cmfast.formats.table import read_manifest
from cmfast.formats.values import PRECISIONS
from cmfast_export import cli, precision_search
from cmfast_export import pipeline as exporting
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.pipeline import Exported, export_onnx
from cmfast_export.precision_search import export_fastest
from cmfast_export.request import GraphRequest
from cmfast_train.checkpoint import Checkpoint, load_checkpoint
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from helpers.specs import image_spec

Factory = Callable[..., Path]
BF16 = onnx_ir.DataType.BFLOAT16
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a factory of two-step samplers of the tiny network, by precision; with what the denoiser said."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def make(precision: str, kind: str = "sampler") -> Exported:
        steps = 2 if kind == "sampler" else None
        return export_onnx(
            tiny_checkpoint(10), folder / f"{precision}_{kind}.onnx", kind=kind, steps=steps, precision=precision
        )

    return make


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_a_file_of_every_precision_is_verified_and_says_how(precision: str, exported: Callable[..., Exported]) -> None:
    made = exported(precision)
    manifest = read_manifest(made.path)
    dtype = PRECISIONS[precision]
    assert manifest.dtype == dtype
    assert manifest.made_by["verified"] == f"onnxruntime cpu, {dtype} emulated"
    assert made.sampler
    for agreement in (made.denoiser, made.sampler):
        assert 1e-5 < agreement.parity.worst.max_abs < ROUNDING[dtype] / 2  # a rounding is there, and half the room
        assert (agreement.same is not None) == (precision in HALF)
        assert (agreement.as_is is not None) == (precision != "bf16")
    assert made.denoiser.parity.boundary == 0
    assert manifest.parity["max_abs"] == float(f"{made.sampler.parity.worst.max_abs:.3g}")
    assert manifest.parity["boundary"] == 0
    if made.sampler.same:
        assert manifest.parity["same_precision"] == float(f"{made.sampler.same.worst.max_abs:.3g}")
        assert made.sampler.same.worst.max_abs != made.sampler.parity.worst.max_abs


@pytest.mark.parametrize("precision", HALF)
def test_the_backbone_is_half_and_the_embedding_norms_softmax_and_the_sum_are_float32(
    precision: str, exported: Callable[..., Exported]
) -> None:
    model = onnx.load(exported(precision, "denoiser").path)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    types |= {value.name: value.data_type for value in inferred.initializer}
    norm = "InstanceNormalization" if precision == "fp16" else "LayerNormalization"
    of = {"Conv": set(), norm: set(), "Softmax": set(), "Gemm": set(), "Log": set(), "Sin": set()}
    for node in inferred.node:
        if node.op_type in of:
            of[node.op_type] |= {types[name] for name in (*node.input, *node.output)}
    assert of.pop("Conv") == {HALF[precision]}
    assert set(map(frozenset, of.values())) == {frozenset({TensorProto.FLOAT})}
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [
        TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64,
    ]  # fmt: skip
    (output,) = model.graph.output
    assert output.type.tensor_type.elem_type == TensorProto.FLOAT
    (last,) = [node for node in inferred.node if output.name in node.output]
    assert last.op_type == "Add"  # c_skip x + c_out F
    assert {types[name] for name in last.input} == {TensorProto.FLOAT}


def test_a_half_file_has_half_the_weights(exported: Callable[..., Exported]) -> None:
    sizes = {p: exported(p).path.stat().st_size for p in ("fp32", "fp16", "bf16", "tf32")}
    assert sizes["fp16"] < 0.75 * sizes["fp32"]  # the linear layers of the embedding stay float32
    assert sizes["bf16"] == pytest.approx(sizes["fp16"], rel=0.01)
    assert sizes["tf32"] == pytest.approx(sizes["fp32"], rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_cpu_runs_fp16_files_and_draws_nearly_the_same_images(
    precision: str, exported: Callable[..., Exported]
) -> None:
    ours, exact = (cmfast.load(exported(p).path).sample(16, steps=2).astype(int) for p in (precision, "fp32"))
    mse = np.square(ours - exact).mean()
    assert mse == 0 if precision == "fp32" else 10 * np.log10(255**2 / mse) > 50


@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_fp16_gives_numbers_at_both_ends_of_the_noise_levels(sigma: float, exported: Callable[..., Exported]) -> None:
    model = cmfast.load(exported("fp16", "denoiser").path)
    x = np.float32(sigma) * np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    denoised = model.denoise(x, sigma, 3)
    assert np.isfinite(denoised).all()
    if sigma == 0.002:
        np.testing.assert_array_equal(denoised, x)  # the boundary is exact in any precision
    else:
        assert denoised.std() > 0.01


SMALL: dict[str, Any] = {
    "image_size": 8, "channels": 1, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention": (4,),
}  # fmt: skip
NETWORKS: dict[str, NetworkConfig] = {
    "cloneofsimo": CloneofsimoConfig(image_size=8, channels=1, width=32),
    "song": SongConfig(classes=10, **SMALL),
    "ncsn": SongConfig(embedding="fourier", noise_mult=2, encoder="residual", resample=(1, 3, 3, 1), **SMALL),
    "dhariwal": DhariwalConfig(**SMALL),
}


@pytest.mark.parametrize(
    ("name", "precision"), [("cloneofsimo", "fp16"), ("song", "bf16"), ("ncsn", "bf16"), ("dhariwal", "fp16")]
)
def test_every_network_has_a_half_precision_backbone(name: str, precision: str, tmp_path: Path) -> None:
    config = NETWORKS[name]
    network = build_network(config)
    randomise(network)
    scaling = (
        {"scaling": "cloneofsimo", "c_noise": "raw"} if name == "cloneofsimo" else {"scaling": "edm", "c_noise": "ln/4"}
    )
    spec = image_spec(image=(1, 8, 8), classes=config.classes, **scaling)  # type: ignore[arg-type]
    checkpoint = Checkpoint(spec=spec, network=config, weights=network.state_dict())
    made = export_onnx(checkpoint, tmp_path / "model.onnx", precision=precision, tolerance=1.0)
    # Without c_in the first implementation's network sees numbers of the size of sigma, and rounds them.
    room = 80 if name == "cloneofsimo" else 1
    assert 1e-5 < made.denoiser.parity.worst.max_abs < room * ROUNDING[PRECISIONS[precision]]
    weights = {value.data_type for value in onnx.load(made.path).graph.initializer if len(value.dims) == 4}
    assert weights >= {HALF[precision]}


def test_beyond_the_tolerance_there_is_no_file(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"differs from PyTorch by .* \(allowed 1e-05\); no file was written"):
        export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", precision="fp16", tolerance=1e-5)
    assert os.listdir(tmp_path) == []


ONE_ATTENTION = AdmConfig(  # in the middle
    image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(), head_channels=32
)  # fmt: skip


@pytest.mark.parametrize(("bias", "fits"), [(10.0, True), (110.0, False)])
def test_what_overflows_in_fp16_is_not_exported_in_fp16(bias: float, fits: bool, tmp_path: Path) -> None:
    # q . k = 32 bias^2 / sqrt(32): beyond 65504 from a bias of 107 on. In float32, and on a CPU that computes float16
    # files in float32, nothing happens.
    network = AdmUnet(ONE_ATTENTION)
    randomise(network)
    weights = dict(network.state_dict())
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        qkv = weights[name].clone()
        qkv[: 2 * len(qkv) // 3] = bias
        weights[name] = qkv
        weights[name.replace("qkv.bias", "proj_out.weight")] = (
            0.1 * weights[name.replace("qkv.bias", "proj_out.weight")]
        )
    spec = image_spec(image=(1, 8, 8), classes=0)
    checkpoint = Checkpoint(spec=spec, network=ONE_ATTENTION, weights=weights)
    if fits:
        export_onnx(checkpoint, tmp_path / "model.onnx", precision="fp16")
        return
    with pytest.raises(CheckFailed, match="the denoiser graph differs from PyTorch by nan"):
        export_onnx(checkpoint, tmp_path / "model.onnx", precision="fp16")
    export_onnx(checkpoint, tmp_path / "model.onnx", precision="bf16")  # eight bits of exponent


@pytest.mark.parametrize("name", ["song", "ncsn"])
def test_bf16_files_hold_no_operator_that_onnx_runtime_lacks_on_cuda(name: str) -> None:
    network = build_network(NETWORKS[name])
    randomise(network)
    spec = image_spec(image=(1, 8, 8), classes=NETWORKS[name].classes, scaling="edm", c_noise="ln/4")
    checkpoint = Checkpoint(spec=spec, network=NETWORKS[name], weights=network.state_dict())
    graph = denoiser_graph(checkpoint.denoiser().to_precision("bf16")).graph
    used = {
        node.op_type for node in graph if any(v is not None and v.dtype == BF16 for v in (*node.inputs, *node.outputs))
    }
    # Those with a bfloat16 kernel there, by its docs/OperatorKernels.md of November 2026.
    assert used <= {"Add", "AveragePool", "Cast", "Concat", "Conv", "MatMul", "Mul", "Reshape", "Sigmoid", "Slice",
                    "Transpose", "Gather", "Unsqueeze", "Squeeze", "Split", "Expand"}  # fmt: skip
    assert used & {"Conv", "Sigmoid"} == {"Conv", "Sigmoid"}
    every = {node.op_type for node in graph}
    assert "LayerNormalization" in every  # InstanceNormalization's CUDA kernel is not found at this opset
    assert "InstanceNormalization" not in every
    resampling = every & {"Resize", "ConvTranspose"}
    assert resampling == ({"Resize"} if name == "song" else {"ConvTranspose"})


def test_bf16_needs_an_opset_that_has_it(tiny_checkpoint: Factory) -> None:
    denoiser = load_checkpoint(tiny_checkpoint(10)).denoiser().to_precision("bf16")
    with pytest.raises(CmfastError, match="bfloat16 convolutions exist from opset 22, got 18"):
        denoiser_graph(denoiser, opset=18)
    assert denoiser_graph(denoiser).graph.opset_imports[""] == 22


def test_an_unknown_precision_is_refused(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match="precision must be one of fp32, tf32, fp16, bf16, int8, auto, got 'int4'"):
        export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", precision="int4")


def test_a_wrong_half_graph_is_found(tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.denoiser_graph

    def wrong(*arguments: Any) -> Any:
        graph = real(*arguments)
        weight = max(
            (v for v in graph.graph.initializers.values() if len(v.shape) == 4), key=lambda v: v.const_value.size
        )
        content = weight.const_value.numpy().copy()
        content[:8] *= -1
        weight.const_value = exporting_tensor(content)
        return graph

    monkeypatch.setattr(exporting, "denoiser_graph", wrong)
    with pytest.raises(CheckFailed, match="differs from PyTorch"):
        export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", precision="fp16")


def exporting_tensor(content: Any) -> Any:
    return onnx_ir.tensor(content)


# --precision auto.


@pytest.mark.parametrize(("tolerance", "precision"), [(None, "fp16"), (1e-5, "fp32")])
def test_without_a_clock_auto_takes_the_first_by_rate_inside_the_tolerance(
    tolerance: float | None, precision: str, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    choice = export_fastest(
        tiny_checkpoint(10), tmp_path / "model.onnx", GraphRequest(tolerance=tolerance), timed=False
    )
    assert choice.precision == precision
    assert read_manifest(tmp_path / "model.onnx").dtype == PRECISIONS[precision]
    assert choice.timed == ""
    order = [each.precision for each in sorted(choice.tried, key=lambda t: precision_search.BY_RATE.index(t.precision))]
    assert order == list(precision_search.BY_RATE[: precision_search.BY_RATE.index(precision) + 1])
    assert all((each.max_abs is None) == (each.precision != precision) for each in choice.tried)
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("fastest", ["fp32", "fp16"])
def test_with_a_clock_auto_takes_the_fastest(
    fastest: str, tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        precision_search, "_times", lambda files, device: {p: 1.0 if p == fastest else 2.0 for p in files}
    )
    choice = export_fastest(tiny_checkpoint(10), tmp_path / "model.onnx", GraphRequest(), timed=True)
    assert choice.precision == fastest
    assert {t.precision: t.median_ms for t in choice.tried} == {
        p: 1.0 if p == fastest else 2.0 for p in precision_search.ON_CPU
    }
    assert read_manifest(tmp_path / "model.onnx").dtype == PRECISIONS[fastest]


def test_auto_without_any_precision_inside_says_by_how_much_and_writes_nothing(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_search, "BY_RATE", ("fp16", "fp32"))
    with pytest.raises(CheckFailed, match=r"no precision is inside the tolerance: .*differs .*; .*differs "):
        export_fastest(tiny_checkpoint(10), tmp_path / "model.onnx", GraphRequest(tolerance=1e-12), timed=False)
    assert os.listdir(tmp_path) == []


def test_auto_on_a_gpu_that_is_not_there_says_so_before_any_work(
    tiny_checkpoint: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails() -> None:
        raise BackendError("device cuda was requested, but there is none")

    monkeypatch.setattr(precision_search, "check_cuda", fails)
    monkeypatch.setattr(precision_search, "export_onnx_as", None)
    options = ("-o", tmp_path / "model.onnx", "--precision", "auto", "--device", "cuda")
    refused(call(cli.main, tiny_checkpoint(10), *options), "device cuda was requested, but there is none")


def test_opset_0_is_no_opset(tiny_checkpoint: Factory) -> None:
    with pytest.raises(CmfastError, match="opset must be from 18 to 23, got 0"):
        denoiser_graph(load_checkpoint(tiny_checkpoint(10)).denoiser(), opset=0)


def test_the_command_says_what_auto_found(tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    result = call(cli.main, tiny_checkpoint(10), "-o", out, "--precision", "auto")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^fp32: \d\.\de-\d+ from float32 PyTorch, \d+\.\d+ ms an image$", result.stdout, re.MULTILINE)
    assert re.search(r"^fp16: \d\.\de-\d+ from float32 PyTorch, \d+\.\d+ ms an image$", result.stdout, re.MULTILINE)
    assert re.search(r"^precision (fp32|fp16): the fastest, by ONNX Runtime cpu$", result.stdout, re.MULTILINE)


def test_the_command_names_half_files_after_their_precision_and_shows_both_references(
    tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(tiny_checkpoint(10).read_bytes())
    result = call(cli.main, model, "--precision", "fp16")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "model_fp16.onnx"]
    for words in ("float32 PyTorch", "float16 PyTorch", "as this CPU runs it", "float16 emulated", "5e-02 allowed"):
        assert words in result.stdout
    assert json.loads(read_manifest(tmp_path / "model_fp16.onnx").to_json())["dtype"] == "float16"


def test_the_precision_of_a_model_is_that_of_its_convolutions(tiny_checkpoint: Factory) -> None:
    denoiser = load_checkpoint(tiny_checkpoint(10)).denoiser().to_precision("bf16")
    types = {
        type(m).__name__: m.weight.dtype
        for m in denoiser.modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }
    assert types == {
        "Conv2d": torch.bfloat16, "GroupNorm32": torch.float32, "Linear": torch.float32, "Embedding": torch.float32,
    }  # fmt: skip
