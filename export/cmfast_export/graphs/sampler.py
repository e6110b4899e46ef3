# SPDX-License-Identifier: MIT
"""The sampler graph: the loop of `cmfast.sampling.sample` in ONNX nodes, built from the denoiser graph.

    noise [K, B, C, H, W] float32, label [B] int64 (class-conditional)  ->  images [B, C, H, W] float32

The noise levels are constants, so whatever depends on them alone (scalings, embeddings, the linear layers behind)
is computed here, once, and stored. The steps share all other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from cmfast.backends._onnxruntime_library import import_onnxruntime
from cmfast.sampling import renoise_std
from cmfast.spec import ModelSpec
from cmfast_export._options import check_steps
from cmfast_export.graphs.emulate import HALVES, emulated


def sampler_graph(denoiser: ir.Model, sigmas: Sequence[float], spec: ModelSpec) -> ir.Model:
    """Return the ONNX model that runs `denoiser` at `sigmas`, without manifest. `denoiser` is left as it is."""
    check_steps(len(sigmas))
    source = denoiser.graph
    image = source.inputs[0]
    assert image.shape is not None
    noise = ir.Value(name="noise", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([len(sigmas), *image.shape]))
    builder = _Builder()
    label = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in source.inputs[2:]]
    constant = _nodes_of_sigma(source)
    levels = _values_of_sigma(denoiser, constant, sigmas)

    x: ir.Value | None = None
    x0: ir.Value | None = None
    for step, sigma in enumerate(sigmas):
        if x0 is not None and spec.renoise == "ddim":  # of the noise only slice 0 is read; the input keeps its shape
            z, std = builder.node("Sub", [x, x0]), sigma / sigmas[step - 1]
        else:
            index = builder.constant(f"sampler.step.{step}", np.array(step, np.int64))
            z = builder.node("Gather", [noise, index], {"axis": 0})
            std = renoise_std(sigma, spec) if step else sigma
        x = builder.node("Mul", [z, builder.constant(f"sampler.std.{step}", np.float32(std))])
        if x0 is not None:
            x = builder.node("Add", [x0, x])
        values = {source.inputs[0]: x, **dict(zip(source.inputs[2:], label, strict=True))}
        for value, content in levels[step].items():
            values[value] = builder.constant(f"{value.name}.{step}", content)
        x0 = builder.copy([node for node in source if node not in constant], values, source.outputs[0], f".{step}")
        if spec.clip:
            bounds = [builder.constant("sampler.low", np.float32(-1)), builder.constant("sampler.high", np.float32(1))]
            x0 = builder.node("Clip", [x0, *bounds])

    assert x0 is not None
    x0 = builder.node("Identity", [x0])
    x0.name, x0.shape, x0.type = "images", image.shape, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [noise, *label],
        [x0],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=dict(source.opset_imports),
        name="sampler",
    )
    return ir.Model(graph, ir_version=denoiser.ir_version)


class _Builder:
    """Nodes and initializers of the graph under construction; a weight that several steps use is stored once."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def constant(self, name: str, content: Any) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(np.asarray(content), name=name)
            self.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self.initializers[name]

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        node = ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            name=f"sampler.{len(self.nodes)}",
        )
        node.outputs[0].name = f"sampler.{op_type.lower()}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def copy(
        self, nodes: Sequence[ir.Node], values: dict[ir.Value, ir.Value], result: ir.Value, suffix: str
    ) -> ir.Value:
        """Append copies of `nodes`, names ending in `suffix`, inputs mapped by `values`; return that of `result`."""
        for node in nodes:
            outputs = [ir.Value(name=f"{v.name}{suffix}", type=v.type, shape=v.shape) for v in node.outputs]
            inputs = [None if v is None else values[v] if v in values else self._weight(v) for v in node.inputs]
            attributes = list(node.attributes.values())
            self.nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    attributes,
                    outputs=outputs,
                    version=node.version,
                    name=f"{node.name}{suffix}",
                )
            )
            values.update(zip(node.outputs, outputs, strict=True))
        return values[result]

    def _weight(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None, f"{value.name} is no initializer"
        assert value.name is not None
        if value.name not in self.initializers:
            self.initializers[value.name] = ir.Value(
                name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return self.initializers[value.name]


def _nodes_of_sigma(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that depend on sigma and, besides it, on weights only."""
    of_sigma: set[ir.Value | None] = {graph.inputs[1]}
    known: set[ir.Value | None] = {graph.inputs[1], *graph.initializers.values(), None}
    nodes: set[ir.Node] = set()
    for node in graph:
        if known.issuperset(node.inputs) and not of_sigma.isdisjoint(node.inputs):
            nodes.add(node)
            known.update(node.outputs)
            of_sigma.update(node.outputs)
    return nodes


def _values_of_sigma(
    model: ir.Model, nodes: set[ir.Node], sigmas: Sequence[float]
) -> list[dict[ir.Value, np.ndarray[Any, Any]]]:
    """Return, for each noise level, what the rest of the graph takes from `nodes`: shape [1, ...], which broadcasts.

    Computed by ONNX Runtime: the same kernels that run the denoiser graph. Half precision is computed as a GPU would,
    because a CPU has no kernels for all of it.
    """
    onnxruntime = import_onnxruntime("exporting")
    sigma = model.graph.inputs[1]
    outputs = [value for node in model.graph if node in nodes for value in node.outputs]
    frontier = [value for value in outputs if any(user not in nodes for user, _ in value.uses())]
    part = ir.Model(ir.convenience.extract(model.graph, inputs=[sigma], outputs=frontier), ir_version=model.ir_version)
    half = next((value.dtype for value in outputs if value.dtype in HALVES), None)
    if half is not None:
        part = emulated(part, half.name.lower())
    serialized = ir.to_proto(part).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    assert sigma.shape is not None
    batch = sigma.shape[0] if isinstance(sigma.shape[0], int) else 1
    levels = []
    for level in sigmas:
        values = session.run(None, {"sigma": np.full(batch, level, np.float32)})
        levels.append(
            {
                value: content[:1].astype(value.dtype.numpy()) if value.dtype in HALVES else content[:1]
                for value, content in zip(frontier, values, strict=True)
            }
        )
    return levels
