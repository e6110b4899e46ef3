# SPDX-License-Identifier: MIT
"""What of a graph stays float32 where OpenVINO computes in bfloat16 or float16.

OpenVINO rounds everything but what follows the last product. A noise embedding then is lost: c_noise is up to 1,000,
where bfloat16 has steps of 4 or 8, a period of a sine. So everything between x, the noise levels or the noise and the
next product stays float32: c_in x, c_noise and its sines, the skip/out sums and renoising between steps.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = {"x", "sigma", "sigma_next", "noise"}
ENDS = {
    "MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "Result",
    "Parameter", "Constant",
}  # fmt: skip
# openvino 2026.4, transformations/rt_info: the CPU plugin keeps the precision of an operation that has this.
MARK = '<attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16" />'
_TAG = re.compile(rb'<layer id="(?P<id>\d+)"[^>]*?(?P<empty>/?)>|(?P<body></?\w*body>)')


def marked(ov: Any, model: Any) -> Any:
    """Return a model with those operations marked, read again: Python cannot set the mark, a file can."""
    model = model.clone()
    _reshape(ov, model)
    _bar(ov, model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        ov.serialize(model, str(file))
        file.write_bytes(with_marks(file.read_bytes(), to_mark(model)))
        core = ov.Core()
        if os.name == "posix":  # the weights stay mapped, and what is mapped may be unlinked
            return core.read_model(str(file))
        return core.read_model(file.read_bytes(), file.with_suffix(".bin").read_bytes())


def to_mark(model: Any) -> set[int]:
    """Return the ids that the operations which stay float32 have in a file: their places in the order of the graph."""
    places = {operation.get_friendly_name(): place for place, operation in enumerate(model.get_ordered_ops())}
    found: set[int] = set()

    def reached(operation: Any) -> bool:
        """Take an operation into the set; return whether to go on behind it."""
        place = places[operation.get_friendly_name()]
        if place in found or operation.get_type_name() in ENDS:
            return False
        found.add(place)
        return True

    todo = [each.get_node() for each in model.inputs if each.get_names() & SOURCES]
    while todo:
        after = [target.get_node() for each in todo.pop().outputs() for target in each.get_target_inputs()]
        todo += filter(reached, after)
    todo = [each for each in model.get_ops() if each.get_type_name() in ("Sin", "Cos")]  # also of conditions
    found |= {places[each.get_friendly_name()] for each in todo}
    while todo:
        todo += filter(reached, [each.get_node() for each in todo.pop().input_values()])
    return found


def _reshape(ov: Any, model: Any) -> None:
    """Write Unsqueeze of a noise level [B] as the Reshape that the CPU plugin makes of it, which loses the mark."""
    ids, operations = to_mark(model), model.get_ordered_ops()
    for place in ids:
        operation = operations[place]
        if operation.get_type_name() != "Unsqueeze" or operation.input_value(0).get_partial_shape().rank != 1:
            continue
        axes = operation.input_value(1).get_node()
        if axes.get_type_name() != "Constant":
            continue
        sides = [1] * (1 + axes.get_data().size)
        at = next(i for i in range(len(sides)) if i not in {int(axis) % len(sides) for axis in axes.get_data().flat})
        sides[at] = -1
        made = ov.opset13.reshape(operation.input_value(0), sides, False, name=operation.get_friendly_name())
        operation.output(0).replace(made.output(0))


def _bar(ov: Any, model: Any) -> None:
    """Part a product with a constant from the Reshape behind it, by a maximum that changes nothing.

    In a graph with int8 OpenVINO takes it for the scale of integers, and moves it behind the Reshape, without its mark.
    """
    ids, operations = to_mark(model), model.get_ordered_ops()
    if not any(each.get_type_name() == "FakeQuantize" for each in operations):
        return
    for place in ids:
        operation = operations[place]
        if operation.get_type_name() != "Reshape":
            continue
        source = operation.input_value(0)
        inputs = [each.get_node().get_type_name() for each in source.get_node().input_values()]
        if source.get_node().get_type_name() in ("Multiply", "Add", "Subtract") and "Constant" in inputs:
            least = ov.opset13.constant(np.float32(np.finfo(np.float32).min))
            operation.input(0).replace_source_output(ov.opset13.maximum(source, least).output(0))


def with_marks(graph: bytes, ids: set[int]) -> bytes:
    """Return the bytes of an IR's graph with the mark in these layers, not in those of the bodies of loops."""
    depth = 0

    def mark(match: re.Match[bytes]) -> bytes:
        nonlocal depth
        if match["body"]:
            depth += -1 if match["body"].startswith(b"</") else 1
        elif not depth and int(match["id"]) in ids and not match["empty"]:
            return match[0] + f"\n\t\t\t<rt_info>{MARK}</rt_info>".encode()
        return match[0]

    return _TAG.sub(mark, graph)
