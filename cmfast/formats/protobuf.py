# SPDX-License-Identifier: MIT
"""As much protobuf as it takes to look into an ONNX file, and to write one: no dependency, no copy, lengths checked.

Field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MAX_DEPTH = 32  # graphs inside attributes of nodes inside graphs


class ProtobufError(Exception):
    """The bytes are not what they should be; the message says where."""


@dataclass
class OnnxModel:
    """What the reader keeps of a ModelProto."""

    ir: int = 0
    opset: int = 0  # of the default domain
    metadata: dict[str, str] = field(default_factory=dict)
    external: list[str] = field(default_factory=list)  # where external tensors say that their data is
    graph: bool = False


def read_onnx_model(path: Path) -> OnnxModel:
    """Read the header, the metadata and the locations of external data of an ONNX file."""
    return parse_onnx_model(map_file(path))


def parse_onnx_model(data: memoryview) -> OnnxModel:
    """Read the same from the bytes of a file."""
    model = OnnxModel()
    _model(data, model)
    if not model.graph:
        raise ProtobufError("it holds no graph")
    return model


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file, mapped into memory: read when they are looked at."""
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size == 0:  # which cannot be mapped
            return memoryview(b"")
        # Not closed by hand: the frames of an exception still hold views of it.
        return memoryview(mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ))


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of one message: an int, or a view of a length-delimited or fixed-width field."""
    position, size = 0, len(data)
    while position < size:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if key >= 1 << 32:  # other readers keep 32 bits of it, and would see another field than we do
            raise ProtobufError(f"field number {number} at byte {position}")
        if number == 0:
            raise ProtobufError(f"field number 0 at byte {position}")
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ProtobufError(f"wire type {wire} at byte {position}")
        if length > size - position:
            raise ProtobufError(f"{length} bytes are announced where {size - position} are left; it is truncated")
        yield number, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ProtobufError("a number runs past its end; it is truncated or not ONNX")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7


def encode_varint(value: int) -> bytes:
    """Return a whole number from 0 as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def encode_head(number: int, length: int) -> bytes:
    """Return the tag of a length-delimited field and the length of what follows."""
    return encode_varint(number << 3 | 2) + encode_varint(length)


def _model(data: memoryview, model: OnnxModel) -> None:
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            model.ir = value
        elif number == 7 and isinstance(value, memoryview):
            model.graph = True
            _graph(value, model, 0)
        elif number == 8 and isinstance(value, memoryview):
            entry = dict(fields(value))
            if entry.get(1, b"") in (b"", b"ai.onnx"):
                version = entry.get(2, 0)
                model.opset = version if isinstance(version, int) else 0
        elif number == 14 and isinstance(value, memoryview):
            key, text = string_pair(value)
            if key == "cmfast" and key in model.metadata:  # other readers may take the first, ONNX Runtime the last
                raise ProtobufError("it holds two cmfast manifests")
            model.metadata[key] = text
        elif number == 20 and isinstance(value, memoryview):  # training information: two graphs
            for inner, part in fields(value):
                if inner in (1, 2) and isinstance(part, memoryview):
                    _graph(part, model, 0)
        elif number == 25 and isinstance(value, memoryview):  # a function
            for inner, part in fields(value):
                if inner == 7 and isinstance(part, memoryview):
                    _node(part, model, 0)
                elif inner == 11 and isinstance(part, memoryview):  # a default attribute
                    _attribute(part, model, 0)


def _graph(data: memoryview, model: OnnxModel, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ProtobufError("graphs are nested too deeply")
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            _node(value, model, depth)
        elif number == 5:
            _tensor(value, model)
        elif number == 15:
            _sparse(value, model)


def _node(data: memoryview, model: OnnxModel, depth: int) -> None:
    for number, attribute in fields(data):
        if number == 5 and isinstance(attribute, memoryview):
            _attribute(attribute, model, depth)


def _attribute(data: memoryview, model: OnnxModel, depth: int) -> None:
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number in (5, 10):
            _tensor(value, model)
        elif number in (6, 11):
            _graph(value, model, depth + 1)
        elif number in (22, 23):
            _sparse(value, model)


def _sparse(data: memoryview, model: OnnxModel) -> None:
    for number, value in fields(data):
        if number in (1, 2) and isinstance(value, memoryview):
            _tensor(value, model)


def _tensor(data: memoryview, model: OnnxModel) -> None:
    locations: list[str] = []
    external = False
    for number, value in fields(data):
        if number == 13 and isinstance(value, memoryview):
            external = True
            key, text = string_pair(value)
            locations += [text] if key == "location" else []
        elif number == 14 and value == 1:
            external = True
    if external:
        model.external.extend(locations or [""])


def string_pair(data: memoryview) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    entry = dict(fields(data))
    key, value = entry.get(1, memoryview(b"")), entry.get(2, memoryview(b""))
    if not isinstance(key, memoryview) or not isinstance(value, memoryview):
        raise ProtobufError("a string is not a string")
    try:
        return bytes(key).decode(), bytes(value).decode()
    except UnicodeDecodeError:
        raise ProtobufError("a string is not UTF-8") from None
