# SPDX-License-Identifier: MIT
"""The server graph: the sampler graph of `sampler` with the batch first in every input, as servers batch requests.

    noise [B, K, C, H, W] float32, label [B, 1] int64 (class-conditional)  ->  images [B, C, H, W] float32

`targets.triton_repository` puts such a file into a model repository.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def server_graph(sampler: ir.Model) -> ir.Model:
    """Return a sampler graph whose inputs are noise [B, K, C, H, W] and label [B, 1], without manifest.

    `sampler` is left as it is; the weights are shared with it.
    """
    model = sampler.clone()
    graph = model.graph
    old_noise, *old_label = graph.inputs
    assert old_noise.shape is not None
    steps, batch, *image = old_noise.shape
    noise = ir.Value(name="noise", type=old_noise.type, shape=ir.Shape([batch, steps, *image]))
    added = [ir.node("Transpose", [noise], {"perm": [1, 0, 2, 3, 4]}, name="server.noise")]
    inputs = [noise]
    if old_label:
        axes = ir.Value(name="server.axes", const_value=ir.tensor(np.array([1]), name="server.axes"))
        axes.type, axes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.register_initializer(axes)
        label = ir.Value(name="label", type=old_label[0].type, shape=ir.Shape([batch, 1]))
        added.append(ir.node("Squeeze", [label, axes], name="server.label"))
        inputs.append(label)
    for old, node in zip(list(graph.inputs), added, strict=True):
        new = node.outputs[0]
        new.name, new.type, new.shape = node.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    graph.insert_before(graph[0], added)
    graph.inputs[:] = inputs
    graph.name = "server"
    return model
