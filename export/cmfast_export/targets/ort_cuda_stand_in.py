# SPDX-License-Identifier: MIT
"""A file of the flavour ort-cuda with the nodes of com.microsoft written out, so that a machine without CUDA checks it.

GroupNorm has kernels for CUDA only. Its formula is written down here as its schema has it (docs/ContribOperators.md of
ONNX Runtime), not as the graph had it before: a wrong layout, group or activation makes another image. What this cannot
see is the CUDA kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cmfast.formats.manifest import FLAVOUR, read_onnx
from cmfast_export.graphs import writer
from cmfast_export.targets.ort_cuda_patterns import MICROSOFT

HALF = ir.DataType.FLOAT16


def stand_in_file(file: Path, target: Path) -> Path:
    """Write `written_out` of an exported file to `target`, an ONNX file without a flavour; return it.

    Its attention stays ONNX Runtime's, which has a kernel for CPUs, in float32; in another precision it is written out,
    because only then its roundings can be emulated.
    """
    manifest, _ = read_onnx(file)
    graph = written_out(ir.load(file), attention=manifest.dtype != "float32")
    data = writer.write_data(graph, target) if writer.weight_bytes(graph) > writer.MAX_BYTES else None
    made_by = {name: value for name, value in manifest.made_by.items() if name != FLAVOUR}
    manifest = replace(manifest, made_by=made_by, parity={}, graph_sha256="")  # another graph, which nothing verified
    writer.write_with_manifest(graph, manifest, target, data)
    return target


def written_out(model: ir.Model, *, attention: bool) -> ir.Model:
    """Return the model with every GroupNorm, and with `attention` every MultiHeadAttention, in nodes of ONNX itself.

    Args:
        model: is left as it is
    """
    model = model.clone()
    for node in list(model.graph):
        if node.domain != MICROSOFT:
            continue
        if node.op_type == "GroupNorm":
            _replace(model.graph, node, _group_norm)
        elif node.op_type == "MultiHeadAttention" and attention:
            _replace(model.graph, node, _attention)
    if not any(node.domain == MICROSOFT for node in model.graph):
        del model.graph.opset_imports[MICROSOFT]
    return model


class _Nodes:
    """Nodes that take the place of one."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._name = graph, name

    def __call__(self, op_type: str, *inputs: ir.Value | np.ndarray[Any, Any], **attributes: Any) -> ir.Value:
        given = [self._constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        node = ir.node(op_type, given, attributes, name=f"{self._name}.{len(self.nodes)}")
        node.outputs[0].name = f"{node.name}.value"
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, content: np.ndarray[Any, Any]) -> ir.Value:
        name = f"{self._name}.{len(self.nodes)}.{len(self._graph.initializers)}"
        tensor = ir.tensor(content, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )  # fmt: skip
        self._graph.register_initializer(value)
        return value


def _replace(graph: ir.Graph, node: ir.Node, write_out: Callable[[_Nodes, ir.Node], ir.Value]) -> None:
    nodes, old = _Nodes(graph, str(node.name)), node.outputs[0]
    new = write_out(nodes, node)
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(node, nodes.nodes)
    graph.remove(node, safe=True)


def _group_norm(add: _Nodes, node: ir.Node) -> ir.Value:
    """Write out gamma (x - mean) / sqrt(variance + epsilon) + beta; x [B, H, W, C] if channels_last, else [B, C, H, W].

    Statistics and SiLU are float32, as in the kernel, and the result is rounded once.
    """
    x, gamma, beta = _inputs(node, 3)
    groups = node.attributes["groups"].as_int()
    last = node.attributes["channels_last"].as_int() if "channels_last" in node.attributes else 1
    half = x.dtype == HALF
    given = x
    if half:
        x = add("Cast", x, to=ir.DataType.FLOAT)
    if not last:
        x = add("Transpose", x, perm=[0, 2, 3, 1])
    channels = int(_sizes(gamma)[0])
    grouped = add("Reshape", x, np.array([0, -1, groups, channels // groups]))
    axes = np.array([1, 3])
    centred = add("Sub", grouped, add("ReduceMean", grouped, axes))
    variance = add("ReduceMean", add("Mul", centred, centred), axes)
    epsilon = np.float32(node.attributes["epsilon"].as_float())
    normed = add("Div", centred, add("Sqrt", add("Add", variance, np.asarray(epsilon))))
    *_, height, width, _ = _sizes(given) if last else [None, *_sizes(given)[2:], None]
    result = add("Reshape", normed, np.array([0, height, width, channels]))
    result = add("Add", add("Mul", result, gamma), beta)
    if node.attributes["activation"].as_int():
        result = add("Mul", result, add("Sigmoid", result))
    if not last:
        result = add("Transpose", result, perm=[0, 3, 1, 2])
    return add("Cast", result, to=HALF) if half else result


def _attention(add: _Nodes, node: ir.Node) -> ir.Value:
    """Write out softmax(scale q k^T) v; q, k, v [B, pixels, heads * width].

    In half precision every product is rounded, and the scale is divided between q and k, as `graphs.denoiser` does it:
    kernels that keep the scores in float32 round less.
    """
    q, k, v = _inputs(node, 3)
    _, pixels, channels = _sizes(q)
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    shape, half = np.array([0, pixels, heads, channels // heads]), q.dtype == HALF
    q, k, v = (add("Transpose", add("Reshape", each, shape), perm=[0, 2, 1, 3]) for each in (q, k, v))
    root = np.asarray(scale**0.5, np.float16 if half else np.float32)
    k = add("Transpose", add("Mul", k, root), perm=[0, 1, 3, 2])
    scores = add("MatMul", add("Mul", q, root), k)
    if half:
        scores = add("Cast", scores, to=ir.DataType.FLOAT)
    weights = add("Softmax", scores, axis=-1)
    if half:
        weights = add("Cast", weights, to=HALF)
    product = add("Transpose", add("MatMul", weights, v), perm=[0, 2, 1, 3])
    return add("Reshape", product, np.array([0, pixels, channels]))


def _inputs(node: ir.Node, count: int) -> list[ir.Value]:
    given = [value for value in node.inputs if value is not None]
    assert len(given) == len(node.inputs) == count, f"{node.name}: {node.op_type} with {len(node.inputs)} inputs"
    return given


def _sizes(value: ir.Value) -> Sequence[Any]:
    assert value.shape is not None, value.name
    return list(value.shape)
