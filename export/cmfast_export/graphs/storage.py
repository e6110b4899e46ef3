# SPDX-License-Identifier: MIT
"""Weights stored as float16 in a graph that computes in float32: half the file, the same arithmetic.

A runtime converts them once, when it opens the file (constant folding). Rounding a weight to 11 bits changes a sample
by a small part of a grey level; `cmfast_export.pipeline` measures by how much, as it does for every export.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cmfast.errors import CmfastError

SMALLEST = 1024  # bytes; what is smaller stays float32: constants, scales, noise levels
LARGEST = float(np.finfo(np.float16).max)


def stored_as_float16(model: ir.Model) -> ir.Model:
    """Return a graph whose large float32 weights are float16 with a Cast behind them; `model` is left as it is.

    Raises:
        CmfastError: a weight is larger than float16 can hold.
    """
    model = model.clone()
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes < SMALLEST:
            continue
        numbers = tensor.numpy()
        if (largest := float(np.abs(numbers).max())) > LARGEST:
            raise CmfastError(
                f"the weight {name} has values up to {largest:.3g}, and float16 ends at {LARGEST:g}; "
                "leave its weights float32"
            )
        half = ir.tensor(numbers.astype(np.float16), name=f"{name}.float16")
        stored = ir.Value(name=half.name, type=ir.TensorType(half.dtype), shape=value.shape, const_value=half)
        node = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.float32")
        wide = node.outputs[0]
        wide.type, wide.shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, wide)
        del graph.initializers[name]
        wide.name = name
        graph.register_initializer(stored)
        casts.append(node)
    if casts:
        graph.insert_before(graph[0], casts)
    return model
