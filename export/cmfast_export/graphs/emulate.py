# SPDX-License-Identifier: MIT
"""A graph of float32 arithmetic that rounds where another rounds: half precision and TF32, checked on any CPU.

CPUs have no kernels for most of it: ONNX Runtime refuses bfloat16 convolutions there, computes fp16 in float32 without
the roundings in between, and knows no TF32. A GPU multiplies in the narrow type, sums in float32 and rounds every
result to the type of its tensor. `emulated` writes down just that, so the check on a CPU sees the roundings that
a GPU makes; what it cannot see is the order in which a GPU sums.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from cmfast.formats.manifest import read_onnx
from cmfast_export.graphs import writer

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MULTIPLIED = {
    "Conv": 2,
    "ConvTranspose": 2,
    "MatMul": 2,
    "Gemm": 2,
    "Einsum": 2,
}  # how many first inputs a matrix unit multiplies
SPLITTER = 2.0**13 + 1  # Veltkamp's constant: x * s - (x * s - x) keeps 24 - 13 = 11 bits, TF32's, rounded to nearest


def emulate_file(file: Path, target: Path) -> Path:
    """Write what `emulated` makes of an exported file to `target`, an ONNX file that any CPU runs; return it.

    Its manifest is the file's, dtype float32, without parity. Weights that one file cannot hold stand beside it.
    """
    manifest, _ = read_onnx(file)
    graph = emulated(ir.load(file), manifest.dtype)
    graph.metadata_props.pop("cmfast", None)  # ours is written behind the graph, and a file has one
    data = writer.write_data(graph, target) if writer.weight_bytes(graph) > writer.MAX_BYTES else None
    manifest = replace(manifest, dtype="float32", parity={}, graph_sha256="")  # another graph, which nothing verified
    writer.write_with_manifest(graph, manifest, target, data)
    return target


def emulated(model: ir.Model, dtype: str) -> ir.Model:
    """Return the float32 model that computes what `model` computes in its precision, roundings included.

    Args:
        model: a graph whose backbone is in half precision, or a float32 graph to be run in TF32; it is left as it is
        dtype: the manifest's: float16, bfloat16 or tf32
    """
    model = model.clone()
    if dtype == "tf32":
        _round_operands(model.graph)
    else:
        # A value whose type is not known would not be rounded, unnoticed.
        passes.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
        assert all(output.dtype is not None for node in model.graph for output in node.outputs)
        _round_results(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _round_results(graph: ir.Graph) -> None:
    """Turn every half-precision tensor into float32 that passes through its old type once."""
    halves = {value for node in graph for value in (*node.inputs, *node.outputs) if value and value.dtype in HALVES}
    for value in graph.initializers.values():
        if value.dtype in HALVES:
            assert value.const_value is not None
            _set(value, value.const_value.numpy().astype(np.float32))
    for node in list(graph):
        if node.op_type == "Cast":
            to = ir.DataType(node.attributes["to"].as_int())
            if to in HALVES:  # float32 to half: the rounding itself
                _round(graph, node, to)
            elif to == ir.DataType.FLOAT and node.inputs[0] in halves:  # nothing is left to do
                node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
            continue
        for output in node.outputs:
            if output.dtype in HALVES:
                _round(graph, node, output.dtype, output=output)


def _round(graph: ir.Graph, node: ir.Node, to: ir.DataType, output: ir.Value | None = None) -> None:
    """Put Cast to half and back behind an output of a node, or, without one, in the place of a Cast to half."""
    source = output or node.inputs[0]
    result = output or node.outputs[0]
    assert source is not None
    narrow = ir.node("Cast", [source], {"to": to})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": ir.DataType.FLOAT})
    name = result.name
    narrow.outputs[0].name, wide.outputs[0].name = f"{name}.narrow", f"{name}.rounded"
    narrow.name, wide.name = f"{name}.narrow", f"{name}.rounded"  # by the value: a Split has several
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), result.shape
    result.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
    if output:
        narrow.replace_input_with(0, source)  # the line above turned this one round too
        result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, [narrow, wide])


def _round_operands(graph: ir.Graph) -> None:
    """Let every matrix product see its operands with TF32's eleven bits."""
    splitter = ir.Value(name="tf32.splitter", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    _set(splitter, np.float32(SPLITTER))
    graph.register_initializer(splitter)
    done: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for index in range(MULTIPLIED.get(node.op_type, 0)):
            operand = node.inputs[index]
            assert operand is not None
            if operand not in done:
                done[operand] = _eleven_bits(graph, node, operand, splitter)
            node.replace_input_with(index, done[operand])


def _eleven_bits(graph: ir.Graph, before: ir.Node, x: ir.Value, splitter: ir.Value) -> ir.Value:
    if x.const_value is not None:
        value = ir.Value(name=f"{x.name}.tf32", type=x.type, shape=x.shape)
        _set(value, eleven_bits(x.const_value.numpy()))
        graph.register_initializer(value)
        return value
    scaled = ir.node("Mul", [x, splitter])
    rest = ir.node("Sub", [scaled.outputs[0], x])
    result = ir.node("Sub", [scaled.outputs[0], rest.outputs[0]])
    for part, name in ((scaled, "scaled"), (rest, "rest"), (result, "tf32")):
        part.name = part.outputs[0].name = f"{x.name}.{name}"
    result.outputs[0].type, result.outputs[0].shape = x.type, x.shape
    graph.insert_before(before, [scaled, rest, result])
    return result.outputs[0]


def eleven_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float32 numbers rounded to TF32's eleven significant bits, half to even."""
    scaled = x.astype(np.float32) * np.float32(SPLITTER)
    rounded: np.ndarray[Any, Any] = scaled - (scaled - x)
    return rounded


def _set(value: ir.Value, content: Any) -> None:
    tensor = ir.tensor(np.asarray(content, np.float32), name=value.name)
    value.const_value, value.type = tensor, ir.TensorType(ir.DataType.FLOAT)
