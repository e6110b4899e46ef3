# SPDX-License-Identifier: MIT
"""The denoiser as an ONNX graph: traced once by torch's dynamo exporter, scalings and noise embedding inside.

    x [B, *shape], sigma [B], sigma_next [B] (of a flow map), each condition by its name  ->  denoised [B, *shape]

All are float32, classes int64. The precision is in the graph, with a Cast at every border to what stays float32: a
network of ours is traced as `Denoiser.to_precision` made it, any other in float32 and converted by `half`. So every
backend runs the same roundings, and none decides about types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx import helper
from onnx.helper import find_min_ir_version_for
from onnxscript.optimizer import fold_constants

from cmfast.conditions import Condition
from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_export import BF16_OPSET, DEFAULT_OPSET, OPSETS
from cmfast_export._options import check_opset
from cmfast_export.graphs.emulate import HALVES
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.graphs.half import INSIDE, depending, widen_some
from cmfast_export.graphs.trace import BATCH, EXAMPLE_SIZE, Axes, Traced, quiet, trace, unconvertible, wrong_output
from cmfast_export.graphs.translations import translate
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.precision import float32_weights

MOST = "cmfast.most"  # key of a graph's meta: the largest batch of the branch that was traced, or None


@uncollected()
def denoiser_graph(denoiser: Denoiser, batch: int | None = None, opset: int | None = None) -> ir.Model:
    """Return the ONNX model of a denoiser, without manifest.

    Args:
        denoiser: the model.
        batch: a fixed batch size, or None for a dynamic one.
        opset: None: the oldest that the backbone's type can be written in.

    Raises:
        CmfastError: the network cannot be traced or written; the line names the module.
    """
    least = BF16_OPSET if denoiser.backbone == torch.bfloat16 else OPSETS.start
    opset = max(least, DEFAULT_OPSET) if opset is None else opset
    check_opset(opset)
    if opset < least:
        raise CmfastError(f"bfloat16 convolutions exist from opset {least}, got {opset}; leave the opset out")
    if batch is not None and batch < 1:
        raise CmfastError(f"the batch must be at least 1 or dynamic, got {batch}")
    inputs, axes = _example(denoiser.spec, batch)
    traced = trace(denoiser, inputs, axes)
    model = written(traced, inputs, axes, "denoised", opset)
    returned = model.graph.outputs[0].shape
    if returned is not None and list(returned)[1:] != list(denoiser.spec.shape):
        raise wrong_output(list(returned)[1:], denoiser)
    if denoiser.backbone == torch.float32:
        _check_float32(model.graph)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.meta[INSIDE] = scopes.startswith("['', 'network'")
    finish(model, "denoiser", opset)
    check_branches(model.graph)
    if denoiser.backbone == torch.bfloat16:
        widen_some(model.graph)
    if opset >= LATE_OPSET:
        _norm_layers(model.graph)
        passes.RemoveUnusedNodesPass()(model)
    model.graph.meta[MOST] = traced.most
    return model


def written(traced: Traced, inputs: Mapping[str, torch.Tensor], axes: Axes, output: str, opset: int) -> ir.Model:
    """Return a trace as an ONNX model, its sizes named, before anything is folded."""
    with torch.inference_mode(False), quiet(), float32_weights():
        try:
            model = translate(traced.program, input_names=list(inputs), output_names=[output], opset_version=opset)
        except torch.onnx.OnnxExporterError as err:
            raise unconvertible(traced.program, err) from None
    _name_sizes(model, axes)
    return model


def finish(model: ir.Model, name: str, opset: int) -> None:
    """Fold and name a graph, in place."""
    with quiet():
        tidy(model)
    model.graph.name = name
    # The lowest that the opset allows: older readers, such as ONNX Runtime 1.17, refuse later ones.
    model.ir_version = find_min_ir_version_for([helper.make_opsetid("", opset)])


def _example(spec: ModelSpec, batch: int | None) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Return inputs to trace with, and the names of their dynamic axes."""
    b = batch or 2  # a dynamic axis must not be 0 or 1 in the example: torch.export would make it a constant
    inputs: dict[str, torch.Tensor] = {
        "x": torch.zeros(b, *spec.shape, dtype=torch.float32),
        "sigma": torch.ones(b, dtype=torch.float32),
    }
    if spec.second_time:
        inputs["sigma_next"] = torch.ones(b, dtype=torch.float32) / 2
    axes: dict[str, dict[int, str]] = {}
    for condition in spec.conditions:
        inputs[condition.name], free = example_of(condition, b)
        if free:
            axes[condition.name] = free
    if batch is None:
        axes = {name: {0: BATCH, **axes.get(name, {})} for name in inputs}
    return inputs, axes


def _check_float32(graph: ir.Graph) -> None:
    """Raise CmfastError where a network has half precision of its own: autocast, or .half() of a tensor."""
    for node in graph:
        for value in node.outputs:
            if value.dtype in HALVES:
                scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
                where = scopes[-2] if len(scopes) > 1 else "the network"  # the last is the operator's
                raise CmfastError(
                    f"{where} computes in {value.dtype.name.lower()} by itself; remove autocast and .half() there: "
                    "half precision is made by the export"
                )


def example_of(condition: Condition, b: int) -> tuple[torch.Tensor, dict[int, str]]:
    """Return a condition's value to trace with, and the names of its dynamic axes beside the batch."""
    if condition.kind == "class":
        return torch.zeros(b, dtype=torch.int64), {}
    sizes = [EXAMPLE_SIZE if isinstance(size, str) else size for size in condition.shape]
    free = {axis: size for axis, size in enumerate(condition.shape, 1) if isinstance(size, str)}
    return torch.zeros(b, *sizes, dtype=torch.float32), free


def check_branches(graph: ir.Graph) -> None:
    """Raise CmfastError where a graph takes one branch for a whole batch, by the values in it."""
    of_inputs = depending(graph, set(graph.inputs))
    if any(node.op_type == "If" and node.inputs[0] in of_inputs for node in graph):
        raise CmfastError(
            "the network takes one branch for all samples of a batch (torch.cond), by values of the batch; compute "
            "both and choose for each sample: torch.where"
        )


def _name_sizes(model: ir.Model, axes: Axes) -> None:
    """Call the dynamic sizes in the graph what they are: B, and CONDITION_AXIS."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, name in axes.get(value.name or "", {}).items():
            names.setdefault(str(value.shape[axis]), name)
    nodes = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *nodes):
        if value.shape is not None:
            sizes = (size if isinstance(size, int) else names.get(str(size), size.value) for size in value.shape)
            value.shape = ir.Shape(list(sizes))


def tidy(model: ir.Model) -> None:
    """Fold constants, drop what is not used, and give every value its type and shape, in place."""
    passes.InlinePass()(model)
    fold_constants(model)
    for step in (
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces name the files of whoever exported
        passes.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True),
    ):
        step(model)


# From here on ONNX Runtime 1.31 finds its CUDA kernel of InstanceNormalization no more (it is registered for version 6
# of the operator) and takes the CPU's, with copies both ways. LayerNormalization's is found. To be removed when it is.
LATE_OPSET = 22


def _norm_layers(graph: ir.Graph) -> None:
    """Turn each normalisation over the last axis of [B, groups, D] into the other operator that computes it."""
    for node in list(graph):
        if node.op_type != "InstanceNormalization":
            continue
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        assert x.shape is not None
        size = x.shape[2]
        if not isinstance(size, int):
            continue
        name = f"norm.ones.{size}"
        if name not in graph.initializers:
            tensor = ir.tensor(np.ones(size, np.float32), name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([size]), const_value=tensor)
            graph.register_initializer(value)
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
        layer = ir.node("LayerNormalization", [x, graph.initializers[name]], attributes, name=node.name)
        layer.meta.update(node.meta)
        result = layer.outputs[0]
        result.shape, result.type = y.shape, y.type
        y.replace_all_uses_with(result)
        result.name = y.name
        graph.insert_before(node, layer)
        graph.remove(node, safe=True)
