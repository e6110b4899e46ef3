# SPDX-License-Identifier: MIT
"""A digest of what an ONNX file computes: its graph and its weights, wherever they are, without what is said of them.

`cmfast.formats.manifest.check_unchanged` compares it with the manifest's "graph_sha256". It is the SHA-256 of the
fields of the ModelProto in the order of their numbers, those of one number in the order of the file, each written as

    an integer   NUMBER=VALUE\\n
    bytes        NUMBER:LENGTH\\n and the bytes
    a message    NUMBER{\\n and its fields by the same rules, }\\n: the graph (7), and in it each initializer (5)

without the fields 1 to 6 and 14 of the ModelProto (IR version, producer, texts, metadata) and 12 to 14 of a TensorProto
(texts, external data), whose content stands as field 9, in the file or in a data file. So loading and saving with the
onnx package changes nothing, nor does moving weights into a data file, other metadata, or another IR version. A changed
node, shape, name, opset or weight does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cmfast.formats import protobuf as pb

_LOCATION, _EXTERNAL = 14, 1  # of a TensorProto: where its data is
_INSIDE = {4, 5, 6, 7, 9, 10, 11}  # its data
_HEADER = {1, 2, 3, 4, 5, 6, 14}  # of a ModelProto
_GRAPH, _INITIALIZER = 7, 5
_RAW, _OUTSIDE = 9, {12, 13, 14}  # of a TensorProto: raw_data; doc_string, external_data and data_location

Fields = dict[int, list[int | memoryview]]


def content_sha256(path: Path, beside: Callable[[str], Path]) -> str:
    """Return the digest of an ONNX file, hex digits.

    Args:
        beside: returns the data file of a location that the file names, or raises
    """
    opened: dict[str, memoryview] = {}

    def outside(location: str) -> memoryview:
        if location not in opened:
            opened[location] = pb.map_file(beside(location))
        return opened[location]

    return content_digest(pb.map_file(path), outside)


def content_digest(data: memoryview, outside: Callable[[str], memoryview]) -> str:
    """Return the same of the bytes of a file; `outside` returns the bytes of the data file of a location."""
    sha256 = hashlib.sha256()
    parts = _by_number([data])
    graphs = [graph for graph in parts.pop(_GRAPH, []) if isinstance(graph, memoryview)]
    model: dict[int, Any] = {number: values for number, values in parts.items() if number not in _HEADER}
    for number in sorted([*model, _GRAPH]):
        if number != _GRAPH:
            _add(sha256, number, model[number])
            continue
        sha256.update(b"%d{\n" % _GRAPH)
        graph = _by_number(graphs)  # parsers merge several
        for inner in sorted(graph):
            if inner == _INITIALIZER:
                for tensor in graph[inner]:
                    _add_tensor(sha256, tensor, outside)
            else:
                _add(sha256, inner, graph[inner])
        sha256.update(b"}\n")
    return sha256.hexdigest()


def _add_tensor(sha256: Any, tensor: int | memoryview, outside: Callable[[str], memoryview]) -> None:
    if isinstance(tensor, int):
        raise pb.ProtobufError("an initializer is a number")
    parts = _by_number([tensor])
    place = [pb.string_pair(entry) for entry in parts.get(13, []) if isinstance(entry, memoryview)]
    external = bool(parts.get(_LOCATION)) and parts[_LOCATION][-1] == _EXTERNAL
    if bool(place) != external or (external and parts.keys() & _INSIDE):  # readers differ in which of the two they take
        raise pb.ProtobufError("a weight has its data both inside and outside the file, or neither")
    if place:
        parts[_RAW] = [_slice(dict(place), outside)]
    sha256.update(b"%d{\n" % _INITIALIZER)
    for number in sorted(parts.keys() - _OUTSIDE):
        _add(sha256, number, parts[number])
    sha256.update(b"}\n")


def _slice(place: dict[str, str], outside: Callable[[str], memoryview]) -> memoryview:
    """Return the bytes of a tensor in a data file."""
    data = outside(place.get("location", ""))
    offset, length = (place.get(name, default) for name, default in (("offset", "0"), ("length", "")))
    if not all(text.isascii() and (text.isdigit() or not text) and len(text) < 20 for text in (offset, length)):
        raise pb.ProtobufError("where its weights begin in the data file is not a number")
    begin = int(offset or "0")
    end = begin + int(length) if length else len(data)
    if not begin <= end <= len(data):
        raise pb.ProtobufError("its data file is shorter than its weights; it is truncated")
    return data[begin:end]


def _add(sha256: Any, number: int, values: Iterable[int | memoryview]) -> None:
    for value in values:
        if isinstance(value, int):
            sha256.update(b"%d=%d\n" % (number, value))
        else:
            sha256.update(b"%d:%d\n" % (number, len(value)))
            sha256.update(value)


def _by_number(messages: Iterable[memoryview]) -> Fields:
    parts: Fields = {}
    for message in messages:
        for number, value in pb.fields(message):
            parts.setdefault(number, []).append(value)
    return parts
