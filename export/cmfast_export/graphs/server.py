# SPDX-License-Identifier: MIT
"""The server graph: the sampler graph of `sampler` with the batch first in every input, as servers batch requests.

    noise [B, K, *shape] float32, a class [B, 1] int64, a tensor [B, *sizes] float32  ->  images or samples [B, *shape]

`targets.triton_repository` puts such a file into a model repository.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def server_graph(sampler: ir.Model) -> ir.Model:
    """Return a sampler graph whose inputs are noise [B, K, *shape] and classes [B, 1], without manifest.

    `sampler` is left as it is; the weights are shared with it.
    """
    model = sampler.clone()
    graph = model.graph
    old_noise, *conditions = graph.inputs
    assert old_noise.shape is not None
    steps, batch, *shape = old_noise.shape
    noise = ir.Value(name="noise", type=old_noise.type, shape=ir.Shape([batch, steps, *shape]))
    order = [1, 0, *range(2, 2 + len(shape))]
    added = [ir.node("Transpose", [noise], {"perm": order}, name="server.noise")]
    inputs, turned = [noise], [old_noise]
    for old in conditions:
        if old.dtype != ir.DataType.INT64:  # a tensor has the batch first already
            inputs.append(old)
            continue
        new = ir.Value(name=old.name, type=old.type, shape=ir.Shape([batch, 1]))
        added.append(ir.node("Squeeze", [new, _axes(graph)], name=f"server.{old.name}"))
        inputs.append(new)
        turned.append(old)
    for old, node in zip(turned, added, strict=True):
        new = node.outputs[0]
        new.name, new.type, new.shape = node.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    graph.insert_before(graph[0], added)
    graph.inputs[:] = inputs
    graph.name = "server"
    return model


def _axes(graph: ir.Graph) -> ir.Value:
    """Return the constant [1], which a Squeeze takes."""
    name = "server.axes"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array([1]), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
