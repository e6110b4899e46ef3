# SPDX-License-Identifier: MIT
"""The sampler graph: the loop of `cmfast.sampling.sample` in ONNX nodes, built from the denoiser graph.

    noise [K, B, *shape] float32, each condition by its name  ->  images or samples [B, *shape] float32

Every node of the denoiser is one of three: what depends on the noise levels alone (scalings, embeddings, the linear
layers behind) is computed here and stored; what depends on the conditions alone (an encoder, their projections) is in
the graph once; the rest is there once a step, or twice with guidance. The copies share all weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cmfast.backends.onnxruntime_library import import_onnxruntime
from cmfast.errors import CmfastError
from cmfast.sampling import renoise_std
from cmfast.spec import ModelSpec
from cmfast_export._options import check_steps
from cmfast_export.graphs.emulate import HALVES, emulated
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.graphs.half import depending, has_graph

# Operators that repeat an operand along an axis of size 1, as numpy does; to others a value of a noise level is given
# for the whole batch.
BROADCASTS = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where"))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598): x0 = u + weight (c - u), u without the conditions and c with them.

    Attributes:
        weight: 1 is no guidance.
        null: what stands for "no condition", by name: a class, or the value that fills a tensor. Conditions that are
            not named stay as they are in both evaluations.
    """

    weight: float
    null: Mapping[str, float]

    @property
    def in_words(self) -> str:
        """What the manifest records."""
        return " ".join([f"{self.weight:g}", *(f"{name}={value:g}" for name, value in self.null.items())])

    @classmethod
    def of(cls, weight: float, null: Mapping[str, float], spec: ModelSpec) -> Guidance:
        """Return the guidance of a model: `null`, else what its conditions declare (`Condition.null`).

        Raises:
            CmfastError: nothing stands for no condition, or what does is no value of a condition.
        """
        conditions = {condition.name: condition for condition in spec.conditions}
        have = ", ".join(conditions) or "none"
        declared = {name: each.null for name, each in conditions.items() if each.null is not None}
        made = cls(weight=weight, null=dict(null or declared))
        if not np.isfinite(weight):
            raise CmfastError(f"guidance needs a finite weight, got {weight}")
        if not made.null:
            raise CmfastError(
                f"guidance needs what stands for no condition (null), for example label=10; this model has the "
                f"conditions {have}, and declares none"
            )
        for name, value in made.null.items():
            if name not in conditions:
                raise CmfastError(f"null {name}={value:g}: no such condition; this model has {have}")
            entries = conditions[name].entries
            if entries and not (0 <= value < entries and value == int(value)):
                raise CmfastError(f"null {name}={value:g}: need a class from 0 to {entries - 1}")
        return made


@uncollected()
def sampler_graph(
    denoiser: ir.Model, sigmas: Sequence[float], spec: ModelSpec, guidance: Guidance | None = None
) -> ir.Model:
    """Return the ONNX model that runs `denoiser` at `sigmas`, without manifest. `denoiser` is left as it is."""
    check_steps(len(sigmas))
    if node := next((node for node in denoiser.graph if has_graph(node)), None):
        raise CmfastError(
            f"a sampler of a graph with {node.op_type} is not supported: write the network without torch.cond, "
            "while_loop and scan, or export its denoiser"
        )
    denoiser = denoiser.clone()
    source = denoiser.graph
    shape = source.inputs[0].shape
    assert shape is not None
    noise = ir.Value(name="noise", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([len(sigmas), *shape]))
    times = [value for value in source.inputs[1:] if value.name in ("sigma", "sigma_next")]
    given = [value for value in source.inputs[1:] if value not in times]
    conditions = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in given]
    builder = _Builder(noise)
    _measure_x(source, times)
    parts = _Parts(source, times)
    known_of_step = _values_of_sigmas(denoiser, parts, _times_of(sigmas, spec))

    once = [dict(zip(given, conditions, strict=True))]
    if guidance:
        once.append({old: builder.null(new, guidance.null) for old, new in once[0].items()})
    for known, suffix in zip(once, ("", ".null"), strict=False):
        builder.copy(parts.once, known, suffix)

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
        results = []
        for known, suffix in zip(once, (f".{step}", f".{step}.null"), strict=False):
            values = {**known, source.inputs[0]: x}
            for value, content in known_of_step[step].items():
                values[value] = builder.constant(f"{value.name}.{step}", content)
            builder.copy(parts.each, values, suffix)
            results.append(values[source.outputs[0]])
        x0 = results[0]
        if guidance:
            weight = builder.constant("sampler.guidance", np.float32(guidance.weight))
            x0 = builder.node("Add", [results[1], builder.node("Mul", [weight, builder.node("Sub", results)])])
        if spec.clip:
            bounds = [builder.constant("sampler.low", np.float32(-1)), builder.constant("sampler.high", np.float32(1))]
            x0 = builder.node("Clip", [x0, *bounds])

    assert x0 is not None
    x0 = builder.node("Identity", [x0])
    x0.name = "images" if spec.data == "image" else "samples"
    x0.shape, x0.type = shape, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [noise, *conditions],
        [x0],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=dict(source.opset_imports),
        name="sampler",
    )
    return ir.Model(graph, ir_version=denoiser.ir_version)


def _times_of(sigmas: Sequence[float], spec: ModelSpec) -> list[dict[str, float]]:
    """Return what each call is given: sigma, and of a flow map sigma_next, as `cmfast.sampling.sample` does."""
    following = [*sigmas[1:], 0.0] if spec.renoise == "ddim" else [0.0] * len(sigmas)
    return [
        {"sigma": sigma, **({"sigma_next": after} if spec.second_time else {})}
        for sigma, after in zip(sigmas, following, strict=True)
    ]


class _Builder:
    """Nodes and initializers of the graph under construction; a weight that several steps use is stored once."""

    def __init__(self, noise: ir.Value) -> None:
        self.noise = noise
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

    def null(self, condition: ir.Value, null: Mapping[str, float]) -> ir.Value:
        """Return what stands for no condition, as large as the condition; one that has no such value stays."""
        assert condition.name is not None
        if condition.name not in null:
            return condition
        content = np.array([null[condition.name]]).astype(condition.dtype.numpy() if condition.dtype else np.float32)
        value = self.node("ConstantOfShape", [self.node("Shape", [condition])], {"value": ir.tensor(content)})
        value.type, value.shape = condition.type, condition.shape
        return value

    def copy(self, nodes: Sequence[ir.Node], values: dict[ir.Value, ir.Value], suffix: str) -> None:
        """Append copies of `nodes`, names ending in `suffix`, inputs mapped by `values`, to which outputs are added."""
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

    def _weight(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None, f"{value.name} is no initializer"
        assert value.name is not None
        if value.name not in self.initializers:
            self.initializers[value.name] = ir.Value(
                name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return self.initializers[value.name]


class _Parts:
    """The nodes of a denoiser graph by what they depend on."""

    def __init__(self, graph: ir.Graph, times: Sequence[ir.Value]) -> None:
        x = {graph.inputs[0]}
        of_x, of_times = depending(graph, x), depending(graph, set(times))
        of_conditions = depending(graph, set(graph.inputs) - x - set(times))
        self.of_sigmas, self.once, self.each = list[ir.Node](), list[ir.Node](), list[ir.Node]()
        for node in graph:
            result = node.outputs[0]
            if result in of_times and result not in of_x and result not in of_conditions:
                self.of_sigmas.append(node)
            elif result not in of_times and result not in of_x:
                self.once.append(node)
            else:
                self.each.append(node)


def _measure_x(graph: ir.Graph, times: Sequence[ir.Value]) -> None:
    """Let what asks for the size of the batch ask x, in place: sigma, which torch asks as well, becomes a constant."""
    x = graph.inputs[0]
    for node in list(graph):
        if node.op_type == "Shape" and node.inputs[0] in times:
            size = ir.node("Shape", [x], {"start": 0, "end": 1}, name=f"{node.name}.of_x")
            result, old = size.outputs[0], node.outputs[0]
            result.name, result.type, result.shape = f"{old.name}.of_x", old.type, old.shape
            graph.insert_before(node, size)
            old.replace_all_uses_with(result)
            graph.remove(node, safe=True)


def _values_of_sigmas(
    model: ir.Model, parts: _Parts, calls: Sequence[Mapping[str, float]]
) -> list[dict[ir.Value, np.ndarray[Any, Any]]]:
    """Return, for each call, what the rest of the graph takes from the nodes of the noise levels.

    A value is computed for one sample and repeats along the batch by itself (BROADCASTS), or by an Expand that is put
    into the graph. Computed by ONNX Runtime: the same kernels that run the denoiser graph. Half precision is computed
    as a GPU would, because a CPU has no kernels for all of it.
    """
    onnxruntime = import_onnxruntime("exporting")
    nodes, graph = set(parts.of_sigmas), model.graph
    sigma = graph.inputs[1]
    assert sigma.shape is not None
    size = sigma.shape[0]
    times = [value for value in graph.inputs if value.name in calls[0]]
    direct = [value for value in times if any(user not in nodes for user, _ in value.uses())]
    outputs = [value for node in parts.of_sigmas for value in node.outputs]
    frontier = [value for value in outputs if any(user not in nodes for user, _ in value.uses())]
    part = ir.Model(ir.convenience.extract(graph, inputs=times, outputs=frontier), ir_version=model.ir_version)
    half = next((value.dtype for value in outputs if value.dtype in HALVES), None)
    if half is not None:
        part = emulated(part, half.name.lower())
    serialized = ir.to_proto(part).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    batch = size if isinstance(size, int) else 1
    wanted = {each.name for each in session.get_inputs()}
    found = []
    for call in calls:
        feed = {name: np.full(batch, level, np.float32) for name, level in call.items()}
        values = session.run(None, {name: value for name, value in feed.items() if name in wanted})
        contents = {value: _narrow(each, value, batch) for value, each in zip(frontier, values, strict=True)}
        found.append({**contents, **{value: feed[value.name or ""][:1] for value in direct}})
    frontier += direct
    parts.each[:0] = [node for value in frontier for node in _whole_batch(graph, value, nodes)]
    return found


def _narrow(content: np.ndarray[Any, Any], value: ir.Value, batch: int) -> np.ndarray[Any, Any]:
    """Return a value of a noise level in its type, of one sample: all samples of a batch have the same."""
    axis = _batch_axis(value, batch)
    one = content if axis is None else content.take([0], axis=axis)
    content = one if (one == content).all() else content  # a size that is not the batch's
    return content.astype(value.dtype.numpy()) if value.dtype in HALVES else content


def _batch_axis(value: ir.Value, batch: int) -> int | None:
    """Return the axis of the batch of a value that depends on noise levels, the first that has its size."""
    sizes = list(value.shape) if value.shape is not None else []
    return next(
        (axis for axis, size in enumerate(sizes) if not isinstance(size, int) or (batch > 1 and size == batch)), None
    )


def _whole_batch(graph: ir.Graph, value: ir.Value, nodes: set[ir.Node]) -> list[ir.Node]:
    """Return nodes that repeat a value along the batch for those users that would not; their inputs are turned."""
    size = graph.inputs[1].shape[0] if graph.inputs[1].shape is not None else None
    batch = size if isinstance(size, int) else 1
    axis = _batch_axis(value, batch)
    users = [(u, index) for u, index in value.uses() if u not in nodes and u.op_type not in BROADCASTS]
    if axis is None or not users or value.shape is None or value.shape.rank() is None:
        return []
    prefix, rank = f"{value.name}.whole", len(value.shape)
    measured = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1}, name=f"{prefix}.size")
    pieces = [_ones(graph, axis), measured.outputs[0], _ones(graph, rank - axis - 1)]
    shape = ir.node("Concat", [piece for piece in pieces if piece is not None], {"axis": 0}, name=f"{prefix}.shape")
    expand = ir.node("Expand", [value, shape.outputs[0]], name=prefix)
    for node in (measured, shape, expand):
        node.outputs[0].name = f"{node.name}.value"
    expand.outputs[0].type, expand.outputs[0].shape = value.type, value.shape
    for user, index in users:
        user.replace_input_with(index, expand.outputs[0])
    return [measured, shape, expand]


def _ones(graph: ir.Graph, count: int) -> ir.Value | None:
    if not count:
        return None
    name = f"sampler.ones.{count}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(count, np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([count]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
