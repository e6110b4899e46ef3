# SPDX-License-Identifier: MIT
"""Half precision made on the graph, for networks whose modules know nothing of it.

Which operator computes in what, inside the network; the scalings and the sum around it stay float32:

    half     products: Conv, ConvTranspose, MatMul, Gemm, Einsum, and the elementwise work on what they give
    float32  softmax and norms, whose result is rounded again; powers, sums, exponentials and what a norm is made of;
             everything that depends on the noise level and not on x, which is its embedding

A value in float32 that depends on x makes what it meets float32, as in torch.autocast; one that does not is rounded.
The networks of cmfast convert their own modules instead (`cmfast_train.networks.precision`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from cmfast.errors import CmfastError

INSIDE = "cmfast.inside"  # key of a node's meta: whether the node is the network's
PRODUCTS = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"))
# Statistics are float32, and the result, which is bounded, is rounded where the input was half.
ROUNDED = frozenset((
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
    "LpNormalization", "RMSNormalization", "Softmax",
))  # fmt: skip
# These overflow or cancel in half precision, or their parts are statistics of a norm.
FLOAT32 = frozenset((
    "Acos", "Asin", "Atan", "Cos", "Cosh", "CumSum", "Exp", "Log", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sin", "Sinh",
    "Softplus", "Sqrt", "Tan",
))  # fmt: skip
# These compute nothing, so their type does not matter.
MOVES = frozenset((
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
))  # fmt: skip
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, kw_only=True)
class Halved:
    """A graph in half precision."""

    model: ir.Model
    left: Mapping[str, int]  # operators of the network that stay float32, and how many of each


def halved(model: ir.Model, dtype: ir.DataType) -> Halved:
    """Return a float32 denoiser graph with its network in half precision; inputs and output stay float32.

    Args:
        model: its nodes are marked by `INSIDE`; it is left as it is.
        dtype: float16 or bfloat16.

    Raises:
        CmfastError: the graph has branches or loops.
    """
    marks = [node.meta.get(INSIDE, node.op_type in PRODUCTS) for node in model.graph]
    model = model.clone()
    for node, inside in zip(model.graph, marks, strict=True):
        node.meta[INSIDE] = inside
        if has_graph(node):
            raise CmfastError(f"half precision of a graph with {node.op_type} is not supported; pass precision fp32")
    left = _Halving(model, dtype).run()
    if dtype == ir.DataType.BFLOAT16:
        widen_some(model.graph)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True),
    ):
        step(model)
    return Halved(model=model, left=left)


# Operators without a bfloat16 kernel in ONNX Runtime on CUDA (its docs/OperatorKernels.md, November 2026), to be taken
# off the list as it gets them. Resize moves numbers and the ConvTranspose is a filter of four taps.
NO_BF16 = ("Resize", "ConvTranspose")


def widen_some(graph: ir.Graph) -> None:
    """Put casts around what cannot be bfloat16 everywhere: sums are float32 anyway, and the result is rounded."""
    for node in list(graph):
        if node.op_type not in NO_BF16:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                wide = _cast(value, ir.DataType.FLOAT, f"{node.name}.wide.{index}")
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        y = node.outputs[0]
        narrow = _cast(y, ir.DataType.BFLOAT16, f"{node.name}.narrow")
        y.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, y)  # the line above turned this one round too
        y.type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(node, narrow)


class _Halving:
    """One conversion: which values are half already, and the casts that were made."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self.graph, self.dtype = model.graph, dtype
        self.opset = model.graph.opset_imports[""]
        x, *others = self.graph.inputs
        self.of_x = depending(self.graph, {x})
        self.of_sigma = depending(self.graph, {v for v in others if v.name in ("sigma", "sigma_next")})
        self.half: set[ir.Value] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.left: Counter[str] = Counter()

    def run(self) -> Mapping[str, int]:
        """Convert the graph in place; return what stays float32 inside the network."""
        for node in list(self.graph):
            numbers = [i for i, value in enumerate(node.inputs) if value is not None and self._is_number(value)]
            to_half = bool(numbers) and self._to_half(node, numbers)
            had_half = any(node.inputs[i] in self.half for i in numbers)
            for i in numbers:
                value = node.inputs[i]
                assert value is not None
                if to_half and self._takes_half(node, i):
                    node.replace_input_with(i, self._as(value, self.dtype))
                elif value in self.half:
                    node.replace_input_with(i, self._as(value, FLOAT))
            if to_half:
                for output in node.outputs:
                    if output.dtype == FLOAT:
                        output.type = ir.TensorType(self.dtype)
                        self.half.add(output)
            elif numbers and node.meta[INSIDE] and node.op_type not in MOVES:
                self.left[node.op_type] += 1
                if had_half and node.op_type in ROUNDED:
                    self._round(node)
        for index, output in enumerate(self.graph.outputs):
            if output in self.half:
                self.graph.outputs[index] = self._as(output, FLOAT)
        return dict(sorted(self.left.items()))

    def _to_half(self, node: ir.Node, numbers: list[int]) -> bool:
        """Whether a node computes in half precision."""
        values = [value for i in numbers if self._takes_half(node, i) and (value := node.inputs[i]) is not None]
        if not values or not node.meta[INSIDE] or node.op_type in FLOAT32 | ROUNDED:
            return False
        if not all(_fits(value, self.dtype) for value in values):
            return False
        result = node.outputs[0]
        if result in self.of_sigma and result not in self.of_x:
            return False  # the embedding of the noise level
        if node.op_type in PRODUCTS:
            return True
        data = [value for value in values if not _is_constant(value)]
        return any(v in self.half for v in data) and all(v in self.half or v not in self.of_x for v in data)

    def _takes_half(self, node: ir.Node, index: int) -> bool:
        return _allows(node.op_type, node.domain, self.opset, index, self.dtype)

    def _is_number(self, value: ir.Value) -> bool:
        return value.dtype == FLOAT or value in self.half

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in this type: itself, a constant of ours, or a Cast that stands where the value is made."""
        if (self.dtype if value in self.half else FLOAT) == dtype:
            return value
        key = (value, dtype)
        if key in self.casts:
            return self.casts[key]
        name = f"{value.name}.{dtype.name.lower()}"
        if value.is_initializer():
            assert value.const_value is not None
            tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
            made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=tensor)
            self.graph.register_initializer(made)
        else:
            cast = ir.node("Cast", [value], {"to": dtype}, name=name)
            made = cast.outputs[0]
            made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
            maker = value.producer()
            if maker is not None:
                self.graph.insert_after(maker, cast)
            else:
                self.graph.insert_before(self.graph[0], cast)
        if dtype != FLOAT:
            self.half.add(made)
        self.casts[key] = made
        return made

    def _round(self, node: ir.Node) -> None:
        """Let everything behind a node have its result in half precision."""
        result = node.outputs[0]
        users = [(user, index) for user, index in result.uses()]
        rounded = self._as(result, self.dtype)
        for user, index in users:
            user.replace_input_with(index, rounded)
        for table in (self.of_x, self.of_sigma):
            if result in table:
                table.add(rounded)


def has_graph(node: ir.Node) -> bool:
    """Whether a node has a graph of its own, as branches and loops have; it may take values from outside."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def depending(graph: ir.Graph, sources: set[ir.Value]) -> set[ir.Value]:
    """Return the values that depend on these, which are among them."""
    found = set(sources)
    for node in graph:
        if not found.isdisjoint(value for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _fits(value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether a constant has no finite number that this type makes infinite; other values may."""
    if not value.is_initializer() or value.const_value is None or dtype == ir.DataType.BFLOAT16:
        return True
    content = value.const_value.numpy()
    return bool((np.abs(content[np.isfinite(content)]) <= np.finfo(np.float16).max).all())


@functools.cache
def _allows(op_type: str, domain: str, opset: int, index: int, dtype: ir.DataType) -> bool:
    """Whether an input of an operator may have this type, by ONNX's own schema."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return False
    if not schema.inputs:
        return False
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    return f"tensor({dtype.name.lower()})" in allowed.get(formal.type_str, [formal.type_str])


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{name}.value", value.shape, ir.TensorType(to)
    return node
