# SPDX-License-Identifier: MIT
"""The denoiser as an ONNX graph: traced once by torch's dynamo exporter, scalings and noise embedding inside.

x [B, C, H, W] float32, sigma [B] float32, label [B] int64 (class-conditional)  ->  denoised [B, C, H, W] float32

The precision is in the graph: a trunk in half precision (`Denoiser.to_precision`) is traced as it is, with a Cast at
every border to what stays float32. So every engine runs the same roundings, and none decides about types.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx import helper
from onnx.helper import find_min_ir_version_for
from onnxscript import opset18
from onnxscript.optimizer import fold_constants

from cmfast.errors import CmfastError
from cmfast_export import BF16_OPSET, DEFAULT_OPSET, OPSETS
from cmfast_export._options import check_opset
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.precision import float32_weights

op: Any = opset18  # untyped: its annotations ask for element types, which differ from file to file


def denoiser_graph(denoiser: Denoiser, batch: int | None = None, opset: int | None = None) -> ir.Model:
    """Return the ONNX model of a denoiser, without manifest.

    batch  a fixed batch size, or None for a dynamic one
    opset  None: the oldest that the trunk's type can be written in
    """
    least = BF16_OPSET if denoiser.trunk == torch.bfloat16 else OPSETS.start
    opset = max(least, DEFAULT_OPSET) if opset is None else opset
    check_opset(opset)
    if opset < least:
        raise CmfastError(f"bfloat16 convolutions exist from opset {least}, got {opset}; leave --opset out")
    if batch is not None and batch < 1:
        raise CmfastError(f"the batch must be at least 1 or dynamic, got {batch}")
    spec = denoiser.spec
    example = batch or 2  # a dynamic axis must not be 0 or 1 in the example: torch.export would make it a constant
    inputs: dict[str, torch.Tensor] = {
        "x": torch.zeros(example, *spec.shape, dtype=torch.float32),
        "sigma": torch.ones(example, dtype=torch.float32),
    }
    inputs |= {each.name: torch.zeros(example, dtype=torch.int64) for each in spec.conditions}
    dynamic = None if batch else ({name: {0: torch.export.Dim("B", max=2**20)} for name in inputs},)
    with torch.inference_mode(False), _quiet(), float32_weights():
        program = torch.export.export(_OfOneDictionary(denoiser), (inputs,), dynamic_shapes=dynamic)
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=["denoised"],
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=_TRANSLATIONS,
        )
    assert exported is not None
    model = exported.model
    tidy(model)
    if denoiser.trunk == torch.bfloat16:
        _some_in_float32(model.graph)
    if opset >= LATE_OPSET:
        _norm_layers(model.graph)
        passes.RemoveUnusedNodesPass()(model)
    model.graph.name = "denoiser"
    # The lowest that the opset allows: older readers, such as ONNX Runtime 1.17, refuse later ones.
    model.ir_version = find_min_ir_version_for([helper.make_opsetid("", opset)])
    return model


class _OfOneDictionary(torch.nn.Module):
    """A denoiser as a function of one dictionary.

    torch.export of PyTorch 2.13 refuses dynamic shapes of a function that takes **conditions: "Must provide a
    tree_name". To be removed when it does not. The network is registered under its own name, so its weights keep
    theirs; the denoiser is not, or they would have two.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.network
        self._denoise = denoiser.forward

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._denoise(**inputs)


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
        assert isinstance(size, int)
        name = f"norm.ones.{size}"
        if name not in graph.initializers:
            tensor = ir.tensor(np.ones(size, np.float32), name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([size]), const_value=tensor)
            graph.register_initializer(value)
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
        layer = ir.node("LayerNormalization", [x, graph.initializers[name]], attributes, name=node.name)
        result = layer.outputs[0]
        result.shape, result.type = y.shape, y.type
        y.replace_all_uses_with(result)
        result.name = y.name
        graph.insert_before(node, layer)
        graph.remove(node, safe=True)


# Operators without a bfloat16 kernel in ONNX Runtime on CUDA (its docs/OperatorKernels.md, November 2026), to be taken
# off the list as it gets them. Resize moves numbers and the ConvTranspose is a filter of four taps.
NO_BF16 = ("Resize", "ConvTranspose")


def _some_in_float32(graph: ir.Graph) -> None:
    """Put casts around what cannot be bfloat16 everywhere: sums are float32 anyway, and the result is rounded."""
    for node in list(graph):
        if node.op_type not in NO_BF16:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                wide = _cast(value, ir.DataType.FLOAT, f"{node.name}.wide.{index}")
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        y = node.outputs[0]
        narrow = _cast(y, ir.DataType.BFLOAT16, f"{node.name}.narrow")
        y.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, y)  # the line above turned this one round too
        y.type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(node, narrow)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{name}.value", value.shape, ir.TensorType(to)
    return node


def _group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True) -> Any:
    """Group normalisation over InstanceNormalization, which every engine has a fast kernel for.

    Native GroupNormalization (opset 21) is taken apart into reductions by ONNX Runtime and crashes OpenVINO.
    """
    by_group = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
    ones, zeros = op.Constant(value_floats=[1.0] * groups), op.Constant(value_floats=[0.0] * groups)
    normed = op.InstanceNormalization(by_group, ones, zeros, epsilon=eps)
    normed = op.Reshape(normed, op.Constant(value_ints=[0, *(int(size) for size in x.shape[1:])]))
    axes = op.Constant(value_ints=[1, 2])
    return op.Add(op.Mul(normed, op.Unsqueeze(weight, axes)), op.Unsqueeze(bias, axes))


def _attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v; q, k, v [B, heads, pixels, d]. Plain nodes: the Attention operator needs opset 23.

    In half precision the scale is divided between q and k, whose product could overflow, and the softmax is float32.
    """
    assert (attn_mask, dropout_p, is_causal, enable_gqa) == (None, 0.0, False, False)
    factor = scale if scale is not None else float(q.shape[-1]) ** -0.5
    k = op.Transpose(k, perm=[0, 1, 3, 2])
    if q.dtype == ir.DataType.FLOAT:
        return op.MatMul(op.Softmax(op.MatMul(op.Mul(q, op.Constant(value_floats=[factor])), k), axis=-1), v)
    root = op.Cast(op.Constant(value_floats=[factor**0.5]), to=q.dtype)
    scores = op.Cast(op.MatMul(op.Mul(q, root), op.Mul(k, root)), to=ir.DataType.FLOAT)
    return op.MatMul(op.Cast(op.Softmax(scores, axis=-1), to=q.dtype), v)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and deprecation notes off the terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
