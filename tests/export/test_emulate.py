# SPDX-License-Identifier: MIT
"""Emulated arithmetic rounds as the narrow types do: against numpy's and ml_dtypes' own, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cmfast.formats.table import read_manifest
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.graphs.emulate import eleven_bits, emulate_file, emulated
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import load_checkpoint

HALVES = {"float16": (TensorProto.FLOAT16, np.float16), "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}


def run(model: ir.Model, *inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, inputs, strict=True)))[0])


def chain(half: int, numpy_half: Any) -> ir.Model:
    """y = float(half(x) * w + w), w in half precision: a cast in, two operators, a cast out."""
    weight = np.float32(1.0 + 1 / 3).astype(numpy_half)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], to=half, name="in"),
            helper.make_node("Mul", ["h", "w"], ["m"], name="mul"),
            helper.make_node("Add", ["m", "w"], ["a"], name="add"),
            helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT, name="out"),
        ],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor("w", half, [], weight.tobytes(), raw=True)],
        value_info=[helper.make_tensor_value_info(name, half, ["N"]) for name in ("h", "m", "a")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_result_is_rounded_once_and_as_the_type_rounds(dtype: str) -> None:
    half, kind = HALVES[dtype]
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 50
    w = np.float32(np.float32(4 / 3).astype(kind))
    product = (x.astype(kind).astype(np.float32) * w).astype(kind).astype(np.float32)
    want = (product + w).astype(kind).astype(np.float32)
    got = run(emulated(chain(half, kind), dtype), x)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - (x * np.float32(4 / 3) + np.float32(4 / 3))).max() > 0.01  # rounding is visible


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_value_of_an_exported_graph_is_rounded(
    dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    precision = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    graph = denoiser_graph(load_checkpoint(tiny_checkpoint(10)).denoiser().to_precision(precision))
    half = ir.DataType[dtype.upper()]
    values = [output for node in graph.graph for output in node.outputs]
    assert all(value.dtype is not None for value in values)
    rounded = [v for v in values if v.dtype == half]
    assert len(rounded) > 100
    casts = [node.attributes["to"].as_int() for node in emulated(graph, dtype).graph if node.op_type == "Cast"]
    assert casts.count(half.value) == len(rounded)


def test_a_value_of_unknown_type_gets_its_type_and_is_rounded() -> None:
    model = chain(*HALVES["float16"])
    for node in model.graph:
        node.outputs[0].type = None if node.outputs[0].name in ("m", "a") else node.outputs[0].type
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    np.testing.assert_array_equal(
        run(emulated(model, "float16"), x), run(emulated(chain(*HALVES["float16"]), "float16"), x)
    )


def test_the_graph_that_is_emulated_is_left_as_it_is() -> None:
    model = chain(*HALVES["float16"])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    emulated(model, "float16")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def product(op_type: str) -> ir.Model:
    shapes: dict[str, tuple[list[int], list[int]]] = {
        "MatMul": ([4, 32], [32, 8]),
        "Conv": ([2, 8, 6, 6], [5, 8, 3, 3]),
    }
    left, right = shapes[op_type]
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, left)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor(
                "w", TensorProto.FLOAT, right, np.random.default_rng(1).standard_normal(right).astype(np.float32)
            )
        ],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.mark.parametrize("op_type", ["MatMul", "Conv"])
def test_tf32_rounds_the_operands_of_products_and_nothing_else(op_type: str) -> None:
    model = product(op_type)
    left = [int(side) for side in model.graph.inputs[0].shape]  # type: ignore[union-attr]
    x = np.random.default_rng(0).standard_normal(left).astype(np.float32)
    w = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    function = torch.matmul if op_type == "MatMul" else torch.nn.functional.conv2d
    want = function(*(torch.from_numpy(eleven_bits(part)).double() for part in (x, w))).numpy()
    exact = function(torch.from_numpy(x).double(), torch.from_numpy(w).double()).numpy()
    got = run(emulated(model, "tf32"), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums of float32
    assert np.abs(got - exact).max() > 1e-3


@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100))
def test_eleven_bits_is_the_nearest_number_with_eleven_bits(x: float) -> None:
    if 0 < abs(x) < 2.0**-100:  # the products that do it would underflow
        return
    mantissa, exponent = np.frexp(x)
    nearest = float(np.ldexp(np.rint(mantissa * 2**11) / 2**11, exponent))  # rint: half to even
    assert float(eleven_bits(np.array(np.float32(x)))) == nearest


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("tf32", "tf32")])
def test_an_emulated_file_runs_on_any_cpu_and_differs_by_about_a_rounding(
    precision: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import cmfast

    exported = export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", precision=precision)
    target = emulate_file(exported.path, tmp_path / "emulated.onnx")
    assert (read_manifest(exported.path).dtype, read_manifest(target).dtype) == (dtype, "float32")
    types = {value.data_type for value in onnx.load(target).graph.initializer}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64}
    export_onnx(tiny_checkpoint(10), tmp_path / "exact.onnx")
    ours, exact = (cmfast.load(file).sample_float(8, steps=2) for file in (target, tmp_path / "exact.onnx"))
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-11}[dtype]
    worst = np.abs(ours - exact).max()
    assert unit / 10 < worst < 20 * unit  # some dozen roundings, of numbers around one
