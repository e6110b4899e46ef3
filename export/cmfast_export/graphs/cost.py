# SPDX-License-Identifier: MIT
"""What an ONNX graph has to do for one image: operations, and the bytes that it has to move at least.

The numbers go into the manifest, and `cmfast.bench.roofline` turns them into the least time that a machine can need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from cmfast.errors import CmfastError
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.graphs.trace import BATCH, EXAMPLE_SIZE, quiet

MATRIX = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")  # what is counted
# Work that would be missing from the count: none of our graphs has these.
UNKNOWN = {"Attention", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "If", "Loop", "Scan"}


@uncollected()
def graph_cost(model: ir.Model) -> dict[str, float]:
    """Return what one run of a denoiser or sampler graph costs for one image; whole numbers. `model` is left as it is.

    flops             operations of convolutions and matrix products; a multiplication and an addition are two. The
                      elementwise rest, a few hundredths of the whole, is left out: no matrix unit runs it
    weight_bytes      constants, once for every node that reads them: a sampler reads its weights once a step, as the
                      denoiser does that is called as often. Of a table of embeddings one row. They do not grow with
                      the batch
    activation_bytes  what convolutions and products read, each tensor once, and what they write. A lower bound: all
                      elementwise work and normalisation is taken to be part of them, and the scores between the two
                      products of an attention to stay on the chip

    Shapes alone are looked at: weights are neither copied nor read.
    """
    graph = _of_one_image(model)
    batch = _shape(graph.outputs[0])[0]  # 1, unless the file has a fixed batch size
    known = _constants(graph)
    inside = _scores(graph)
    flops = weights = 0
    read, written = set[ir.Value](), set[ir.Value]()
    for node in graph:
        if node.op_type in UNKNOWN:
            raise CmfastError(f"the cost of a graph with {node.op_type} in it ({node.name}) is not known")
        if node.outputs[0] in known:
            continue  # every backend computes it once, when it loads the file
        weights += sum(_constant_bytes(node, known, batch))
        if node.op_type in MATRIX:
            flops += _flops(node)
            read |= {_stored(value) for value in node.inputs if value is not None and value not in known}
            written.add(_quantized(node.outputs[0]))
    activations = sum(_bytes(value) for value in read - inside) + sum(_bytes(value) for value in written - inside)
    return {
        "flops": _exactly(flops, batch),
        "weight_bytes": weights,
        "activation_bytes": _exactly(activations, batch),
    }


def _of_one_image(model: ir.Model) -> ir.Graph:
    """Return the graph of a copy whose tensors all have a shape; a dynamic batch becomes 1. The weights are shared."""
    copy = model.clone()
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None  # what the exporter wrote has the dynamic batch in it
    for value in copy.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([_size(size) for size in value.shape])
    with quiet():  # which says what it does not fold
        # The batch that Reshape takes from the shape of an input: inference does not follow it.
        fold_constants(copy, onnx_shape_inference=True)
    return copy.graph


def _size(size: int | ir.SymbolicDim) -> int:
    """Return the size of an axis for one sample: of the batch 1, of a condition's dynamic axis an example."""
    return size if isinstance(size, int) else 1 if size.value == BATCH else EXAMPLE_SIZE


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that depend on no input."""
    known = set(graph.initializers.values())
    for node in graph:
        if all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
    return known


def _constant_bytes(node: ir.Node, known: set[ir.Value], batch: int) -> Iterator[int]:
    """Yield the bytes of each constant that a node reads for one image."""
    for value in node.inputs:
        if value is None or value not in known or value.dtype is None or not value.dtype.is_floating_point():
            continue  # integers are shapes and axes
        yield _exactly(_bytes(node.outputs[0]), batch) if node.op_type == "Gather" else _bytes(_stored(value))


def _stored(value: ir.Value) -> ir.Value:
    """Return what a value is read as: behind a DequantizeLinear the 8-bit integers before it."""
    maker = value.producer()
    before = maker.inputs[0] if maker is not None and maker.op_type == "DequantizeLinear" else None
    return value if before is None else before


def _quantized(value: ir.Value) -> ir.Value:
    """Return what a result is written as: before a QuantizeLinear the 8-bit integers behind it."""
    users = [user for user, _ in value.uses()]
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type == "QuantizeLinear" else value


def _scores(graph: ir.Graph) -> set[ir.Value]:
    """Return what lies between the two products of an attention: the first's output, the second's first operand."""
    inside: set[ir.Value] = set()
    for node in graph:
        if node.op_type != "MatMul":
            continue
        operand = value = node.inputs[0]
        softmax = False
        while value is not None and (maker := value.producer()) and maker.op_type in ("Cast", "Mul", "Add", "Softmax"):
            softmax |= maker.op_type == "Softmax"
            value = maker.inputs[0]
        if softmax and operand is not None and value is not None and maker and maker.op_type == "MatMul":
            inside |= {operand, value}
    return inside


def _flops(node: ir.Node) -> int:
    """Return two times the multiplications of a convolution or a matrix product. Biases are not counted."""
    if node.op_type == "Einsum":
        return _einsum_flops(node)
    first, second = node.inputs[:2]
    assert first is not None
    assert second is not None
    output = math.prod(_shape(node.outputs[0]))
    if node.op_type == "Conv":  # weight [out, in / groups, *kernel]: so many terms are summed for each output
        return 2 * output * math.prod(_shape(second)[1:])
    if node.op_type == "ConvTranspose":  # weight [in, out / groups, *kernel]: each input goes into so many outputs
        return 2 * math.prod(_shape(first)) * math.prod(_shape(second)[1:])
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    return 2 * output * _shape(first)[0 if transposed else -1]


def _einsum_flops(node: ir.Node) -> int:
    """Return two times the multiplications of an Einsum: each index of the equation runs once."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    operands = equation.partition("->")[0].split(",")
    if len(operands) != 2 or "." in equation:
        raise CmfastError(f"the cost of a graph with Einsum {equation!r} in it ({node.name}) is not known")
    sizes: dict[str, int] = {}
    for operand, value in zip(operands, node.inputs, strict=True):
        assert value is not None
        sizes.update(zip(operand, _shape(value), strict=True))
    return 2 * math.prod(sizes.values())


def _bytes(value: ir.Value) -> int:
    if value.dtype is None:
        raise CmfastError(f"the type of {value.name} is unknown, so the cost of the graph is not known")
    return _exactly(math.prod(_shape(value)) * value.dtype.bitwidth, 8)


def _shape(value: ir.Value) -> tuple[int, ...]:
    shape = value.shape.dims if value.shape is not None else (None,)
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise CmfastError(f"the shape of {value.name} is unknown, so the cost of the graph is not known")
    return sizes


def _exactly(total: int, parts: int) -> int:
    if total % parts:
        raise CmfastError(f"the cost of the graph for one sample is not known: {total} is not a multiple of {parts}")
    return total // parts
