# SPDX-License-Identifier: MIT
"""ONNX models of a few nodes, written without onnx: what a library's speed and arithmetic are measured with.

The field numbers are those of onnx.proto, as in `cmfast.formats.protobuf`, which reads what this writes.
"""

from __future__ import annotations

from cmfast.formats.protobuf import encode_head, encode_varint


def chain_model(op: str, count: int, element: int) -> bytes:
    """Return the ONNX model y = op(... op(op(a, b), b) ..., b) with `count` nodes, all of one element type."""
    names = ["a", *(f"t{i}" for i in range(1, count)), "y"]
    nodes = [_node(op, [names[i], "b"], names[i + 1]) for i in range(count)]
    return _model(nodes, {"a": element, "b": element}, element)


def cast_model(element: int) -> bytes:
    """Return the ONNX model y = a, float32 converted to another element type."""
    to = _field(1, "to") + _field(3, element) + _field(20, 2)  # AttributeProto: name, i, type INT
    return _model([_node("Cast", ["a"], "y") + _field(5, to)], {"a": 1}, element)


def _model(nodes: list[bytes], inputs: dict[str, int], output: int) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "small")  # GraphProto: node, name, input, output
    graph += b"".join(_field(11, _value(name, element)) for name, element in inputs.items())
    graph += _field(12, _value("y", output))
    opset = _field(1, "") + _field(2, 18)  # OperatorSetIdProto: domain, version
    return _field(1, 8) + _field(7, graph) + _field(8, opset)  # ModelProto: ir_version, graph, opset_import


def _node(op: str, inputs: list[str], output: str) -> bytes:
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, op)  # NodeProto


def _value(name: str, element: int) -> bytes:
    tensor = _field(1, _field(1, element))  # TypeProto.tensor_type, and its elem_type; shapes are left open
    return _field(1, name) + _field(2, tensor)  # ValueInfoProto


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    content = value.encode() if isinstance(value, str) else value
    return encode_head(number, len(content)) + content
