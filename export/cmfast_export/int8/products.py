# SPDX-License-Identifier: MIT
"""The products of a denoiser graph that int8 makes faster, found by the structure of the graph and not by names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from cmfast_export.graphs.half import PRODUCTS, depending, has_graph


@dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or a matrix product with constant weights, whose data depend on x.

    Attributes:
        node: of the graph.
        axis: of the weight: its output channels, which have a scale each.
    """

    node: ir.Node
    axis: int

    @property
    def name(self) -> str:
        """Name of the node, by which a clone of the graph has it too."""
        return self.node.name or ""

    @property
    def data(self) -> ir.Value:
        """What is multiplied with the weight."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def weight(self) -> ir.Value:
        """The weight, an initializer."""
        assert self.node.inputs[1] is not None
        return self.node.inputs[1]

    @property
    def bias(self) -> ir.Value | None:
        """The bias, an initializer, where there is one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def result(self) -> ir.Value:
        """What comes out."""
        return self.node.outputs[0]


def products_of(graph: ir.Graph) -> tuple[list[Product], list[Product]]:
    """Return the products that may become int8, in the graph's order, and the first and last, which stay float32.

    What depends on the noise level and the conditions alone, the embeddings, is not among them: it is small, and a
    sampler graph has it folded. Nor are the products of attention, whose two sides are data. First are those that no
    other product is before, last those that none is behind: they read the noisy image and write the denoised one.
    """
    x = graph.inputs[0]
    of_x = depending(graph, {x})
    outputs = {node.outputs[0] for node in graph if node.op_type in PRODUCTS and node.outputs[0] in of_x}
    behind = depending(graph, outputs)
    inside, ends = list[Product](), list[Product]()
    before = _before(graph)
    for node in graph:
        product = _product(node)
        if product is None or product.data not in of_x:
            continue
        first, last = product.data not in behind, product.result not in before
        (ends if first or last else inside).append(product)
    return inside, ends


def _before(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that some product depends on."""
    todo = [value for node in graph if node.op_type in PRODUCTS for value in node.inputs if value is not None]
    found = set(todo)
    while todo:
        maker = todo.pop().producer()
        new = [value for value in _inputs(maker) if value not in found] if maker else []
        found.update(new)
        todo += new
    return found


def _inputs(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)


def _product(node: ir.Node) -> Product | None:
    """Return a node as a product that has an int8 form in ONNX Runtime and OpenVINO, or None."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or has_graph(node):
        return None
    data, weight, *bias = node.inputs
    constant = [weight, *(value for value in bias if value is not None)]
    if data is None or data.dtype != ir.DataType.FLOAT:
        return None
    if any(value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT for value in constant):
        return None
    assert weight is not None
    rank = len(weight.shape) if weight.shape is not None else 0
    if node.op_type == "Conv":
        return Product(node=node, axis=0) if rank > 2 else None
    if rank != 2:
        return None
    if node.op_type == "MatMul":
        return Product(node=node, axis=1)
    attributes = node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1
    transposed = bool(attributes.get_int("transA", 0))
    if scaled or transposed or (bias and _rank(bias[0]) != 1):
        return None
    return Product(node=node, axis=int(not attributes.get_int("transB", 0)))


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0
