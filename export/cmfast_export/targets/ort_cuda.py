# SPDX-License-Identifier: MIT
"""The flavour ort-cuda: a denoiser or sampler graph rewritten for ONNX Runtime's CUDA provider with `prefer_nhwc`.

GroupNorm with SiLU and MultiHeadAttention of com.microsoft replace the nodes that compute them, and everything between
two convolutions is [B, H, W, C]. ONNX has convolutions of [B, C, H, W] only, so each stands between two Transpose; the
provider's layout pass puts the inverse ones around it and drops all four
(onnxruntime/core/optimizer/layout_transformation/layout_transformation.cc). Without prefer_nhwc they stay, and cost.

`ort_cuda_patterns` finds what is replaced, `ort_cuda_stand_in` writes the new nodes out again to check a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from cmfast.errors import CmfastError
from cmfast_export.targets.ort_cuda_patterns import (
    MICROSOFT,
    Attention,
    GroupNorm,
    constant,
    find_attentions,
    find_group_norms,
)

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # Transpose to [B, H, W, C] and back
# What the provider runs in [B, H, W, C] itself, of what our graphs have (GetCUDALayoutSensitiveOps).
CONVERTED = ("Conv", "ConvTranspose", "AveragePool", "DepthToSpace")
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Sigmoid", "Cast", "Clip")
# Conv and the pools got a new version in opset 22, and the provider's kernels of [B, H, W, C] are those of opset 11
# (onnxruntime/core/providers/cuda/cuda_nhwc_kernels.cc). To be raised when that file has more.
LAST_OPSET = 21


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A graph for ONNX Runtime's CUDA provider, and what was rewritten."""

    model: ir.Model
    group_norms: int  # nodes of com.microsoft.GroupNorm
    group_norms_left: int  # of the graph before, which the kernel refuses: by the channels of a group
    attentions: int  # nodes of com.microsoft.MultiHeadAttention


def ort_cuda_graph(model: ir.Model) -> Rewritten:
    """Return the graph for ONNX Runtime's CUDA provider; `model`, a denoiser or sampler, stays as it is.

    Raises:
        CmfastError: the provider has no kernels for the opset, or a norm has an unknown form.
    """
    check_ort_cuda(model.graph.opset_imports[""])
    source = model.clone()
    norms, left = find_group_norms(source.graph)
    attentions = find_attentions(source.graph)
    rewriter = _Rewriter(source.graph)
    for node in source.graph:
        result = node.outputs[0]
        if result in norms:
            rewriter.group_norm(norms[result], node)
        elif result in attentions:
            rewriter.attention(attentions[result], node)
        else:
            rewriter.copy(node)
    made = ir.Model(rewriter.graph(), ir_version=source.ir_version)
    passes.RemoveUnusedNodesPass()(made)
    operators = [node.op_type for node in made.graph if node.domain == MICROSOFT]
    return Rewritten(
        model=made,
        group_norms=operators.count("GroupNorm"),
        group_norms_left=left,
        attentions=operators.count("MultiHeadAttention"),
    )


def check_ort_cuda(opset: int | None, precision: str = "fp32") -> None:
    """Raise CmfastError where the provider has no kernels for the graph; before the work."""
    if precision == "bf16":
        raise CmfastError(
            "ONNX Runtime's CUDA provider has no bfloat16 kernel of GroupNorm or of NHWC convolutions; "
            "use --precision fp16 with --format ort-cuda, or --format onnx"
        )
    if opset is not None and opset > LAST_OPSET:
        raise CmfastError(
            f"ONNX Runtime's CUDA provider has NHWC convolutions up to opset {LAST_OPSET}, got {opset}; "
            "leave the opset out"
        )


@dataclass(kw_only=True)
class _Image:
    """What stands for a value of the old graph with four axes; a form that is missing is made by a Transpose."""

    first: ir.Value | None = None  # [B, C, H, W]
    last: ir.Value | None = None  # [B, H, W, C]
    vector: bool = False  # a number per channel, [B, C, 1, 1]: both forms are there from the start
    converted: bool = False  # the output of a convolution: the provider computes its [B, H, W, C] form


class _Rewriter:
    """The new graph under construction, node by node in the order of the old one."""

    def __init__(self, source: ir.Graph) -> None:
        self._source = source
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._values: dict[ir.Value, ir.Value] = {}  # of fewer or more than four axes
        self._images: dict[ir.Value, _Image] = {}
        self._inputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in source.inputs]
        for old, new in zip(source.inputs, self._inputs, strict=True):
            self._keep(old, new)

    def graph(self) -> ir.Graph:
        """Return the new graph, unused nodes and all."""
        outputs = [self._first(value) for value in self._source.outputs]
        for new, old in zip(outputs, self._source.outputs, strict=True):
            new.name = old.name
        return ir.Graph(
            self._inputs, outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports={**self._source.opset_imports, MICROSOFT: 1}, name=self._source.name,
        )  # fmt: skip

    def group_norm(self, norm: GroupNorm, end: ir.Node) -> None:
        """Append GroupNorm for the nodes that end in `end`."""
        gamma, beta = (
            self._weight(f"{value.name}.vector", constant(value).reshape(-1)) for value in (norm.gamma, norm.beta)
        )
        attributes = {
            "groups": norm.groups, "epsilon": norm.epsilon, "activation": int(norm.silu), "channels_last": 1,
        }  # fmt: skip
        self._last_output(end, "GroupNorm", [self._last(norm.x), gamma, beta], attributes, MICROSOFT)

    def attention(self, found: Attention, end: ir.Node) -> None:
        """Append MultiHeadAttention for the nodes from the convolution that makes q, k and v to `end`."""
        conv = found.conv
        _, weight, bias = conv.inputs
        assert weight is not None
        assert bias is not None
        inputs: list[ir.Value | None] = [self._first(conv.inputs[0])]
        for value in (weight, bias):
            content = constant(value)
            if found.order is None:
                inputs.append(self._constant(value))
            else:  # rows in the order of (q, k, v), head, channel
                inputs.append(self._weight(f"{value.name}.qkv", content[found.order]))
        batch, channels, height, width = _sizes(end.outputs[0])
        of_conv = conv.outputs[0]
        name = f"{of_conv.name}.qkv"
        qkv = self._add("Conv", inputs, conv.attributes, name, of_conv.dtype, [batch, 3 * channels, height, width])
        qkv = self._transpose(qkv, LAST, f"{name}.nhwc", [batch, height, width, 3 * channels])
        pixels = height * width
        shape = self._weight(f"attention.{pixels}x{3 * channels}", np.array([0, pixels, 3 * channels]))
        qkv = self._add("Reshape", [qkv, shape], {}, f"{name}.pixels", qkv.dtype, [batch, pixels, 3 * channels])
        thirds = self._weight(f"attention.thirds.{channels}", np.array([channels] * 3))
        split = ir.node("Split", [qkv, thirds], {"axis": 2}, num_outputs=3, name=f"{name}.split")
        for value, letter in zip(split.outputs, "qkv", strict=True):
            value.name, value.type, value.shape = f"{name}.{letter}", qkv.type, ir.Shape([batch, pixels, channels])
        self._nodes.append(split)
        attributes = {"num_heads": found.heads, "scale": found.scale}
        attended = self._add(
            "MultiHeadAttention", split.outputs, attributes, f"{name}.attended", qkv.dtype, [batch, pixels, channels],
            MICROSOFT,
        )  # fmt: skip
        back = self._weight(f"attention.{height}x{width}x{channels}", np.array([0, height, width, channels]))
        self._last_output(end, "Reshape", [attended, back], {})

    def copy(self, node: ir.Node) -> None:
        """Append a node as it was, or in its [B, H, W, C] form where all images that it reads have that."""
        (result,) = node.outputs
        if node.op_type in CONVERTED and _rank(result) == 4:
            self._images[result] = _Image(first=self._as_it_was(node), converted=True)
            return
        inputs = [value for value in node.inputs if value is not None and value in self._images]
        if _rank(result) != 4 or not inputs or not self._can_be_last(node):
            self._keep(result, self._as_it_was(node), vector=self._vector(node))
            return
        images = [self._images[value] for value in inputs]
        if any(image.last is None and not image.converted for image in images):
            self._keep(result, self._as_it_was(node))
            return
        if all(image.vector for image in images):
            self._images[result] = _Image(first=self._as_it_was(node), vector=True)
        given, attributes = self._in_last_form(node)
        self._last_output(node, node.op_type, given, attributes)

    def _can_be_last(self, node: ir.Node) -> bool:
        """Whether `_in_last_form` knows the node."""
        if node.op_type in ELEMENTWISE:
            shapes = [value for value in node.inputs if value is not None and value not in self._images]
            return all(value.const_value is not None for value in shapes)
        if node.op_type == "Concat":
            return node.attributes["axis"].as_int() == 1 and all(value in self._images for value in node.inputs)
        if node.op_type == "Slice":
            return node.inputs[3] is not None and constant(node.inputs[3]).tolist() == [1]
        if node.op_type == "Resize":
            _, roi, scales = (*node.inputs, None, None)[:3]
            return roi is None and scales is not None and scales.const_value is not None and len(node.inputs) == 3
        return False

    def _in_last_form(self, node: ir.Node) -> tuple[list[ir.Value | None], dict[str, Any]]:
        """Return inputs and attributes of the node that computes the same on [B, H, W, C]."""
        attributes: dict[str, Any] = dict(node.attributes)
        if node.op_type == "Concat":
            return [self._last(value) for value in node.inputs], {"axis": 3}
        if node.op_type == "Slice":
            x, start, end, _, *steps = node.inputs
            axis = self._weight("nhwc.channels", np.array([3]))
            return [self._last(x), *map(self._constant, (start, end)), axis, *map(self._constant, steps)], attributes
        if node.op_type == "Resize":
            scales = node.inputs[2]
            assert scales is not None
            return [
                self._last(node.inputs[0]), None, self._weight(f"{scales.name}.nhwc", constant(scales)[list(LAST)]),
            ], attributes  # fmt: skip
        return [
            None if v is None else self._last(v) if v in self._images else self._broadcast(v) for v in node.inputs
        ], attributes

    def _broadcast(self, value: ir.Value) -> ir.Value:
        """Return a constant that is broadcast to an image, [C, 1, 1] for example, as one for [B, H, W, C]."""
        content = constant(value)
        if content.size == 1:
            return self._constant(value)
        four = content.reshape((1,) * (4 - content.ndim) + content.shape)
        return self._weight(f"{value.name}.nhwc", four.transpose(LAST))

    def _vector(self, node: ir.Node) -> ir.Value | None:
        """Return the [B, 1, 1, C] form where the node is the last of two that make [B, C, 1, 1] of [B, C]."""
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "Unsqueeze" or before is None or before.op_type != "Unsqueeze":
            return None
        axes = [constant(each.inputs[1]).tolist() for each in (before, node)]
        if axes != [[2], [3]] or before.inputs[0] is None or _rank(before.inputs[0]) != 2:
            return None
        batch, channels, *_ = _sizes(node.outputs[0])
        inputs = [self._values[before.inputs[0]], self._weight("nhwc.pixel", np.array([1, 2]))]
        result = node.outputs[0]
        return self._add("Unsqueeze", inputs, {}, f"{result.name}.nhwc", result.dtype, [batch, 1, 1, channels])

    def _as_it_was(self, node: ir.Node) -> ir.Value:
        (result,) = node.outputs
        inputs = [None if value is None else self._first(value) for value in node.inputs]
        shape = list(result.shape) if result.shape is not None else None
        return self._add(node.op_type, inputs, node.attributes, str(result.name), result.dtype, shape, node.domain)

    def _last_output(
        self, end: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Any, domain: str = ""
    ) -> None:
        """Append a node whose output is the [B, H, W, C] form of what `end` made."""
        result = end.outputs[0]
        batch, channels, height, width = _sizes(result)
        shape = [batch, height, width, channels]
        image = self._images.setdefault(result, _Image())
        image.last = self._add(op_type, inputs, attributes, f"{result.name}.nhwc", result.dtype, shape, domain)

    def _keep(self, old: ir.Value, new: ir.Value, vector: ir.Value | None = None) -> None:
        if _rank(old) == 4:
            self._images[old] = _Image(first=new, last=vector, vector=vector is not None)
        else:
            self._values[old] = new

    def _first(self, value: ir.Value | None) -> ir.Value:
        """Return the value as the old graph has it."""
        assert value is not None
        if value.const_value is not None:
            return self._constant(value)
        if value not in self._images:
            return self._values[value]
        image = self._images[value]
        if image.first is None:
            assert image.last is not None
            image.first = self._transpose(image.last, FIRST, str(value.name), _sizes(value))
        return image.first

    def _last(self, value: ir.Value | None) -> ir.Value:
        """Return the value as [B, H, W, C]."""
        assert value is not None
        image = self._images[value]
        if image.last is None:
            assert image.first is not None
            batch, channels, height, width = _sizes(value)
            image.last = self._transpose(image.first, LAST, f"{value.name}.nhwc", [batch, height, width, channels])
        return image.last

    def _transpose(self, value: ir.Value, perm: Sequence[int], name: str, shape: Sequence[Any]) -> ir.Value:
        return self._add("Transpose", [value], {"perm": list(perm)}, name, value.dtype, shape)

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Any, name: str,
        dtype: ir.DataType | None, shape: Sequence[Any] | None, domain: str = "",
    ) -> ir.Value:  # fmt: skip
        node = ir.Node(domain, op_type, inputs, _attributes(attributes), name=f"{name}.{op_type}")
        (result,) = node.outputs
        result.name, result.type = name, None if dtype is None else ir.TensorType(dtype)
        result.shape = None if shape is None else ir.Shape(shape)
        self._nodes.append(node)
        return result

    def _constant(self, value: ir.Value | None) -> ir.Value:
        """Return an initializer of the old graph in the new one."""
        assert value is not None
        assert value.const_value is not None
        name = str(value.name)
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return self._initializers[name]

    def _weight(self, name: str, content: np.ndarray[Any, Any]) -> ir.Value:
        """Return an initializer with this content; the name says what it holds."""
        if name not in self._initializers:
            tensor = ir.tensor(np.ascontiguousarray(content), name=name)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]


def _attributes(given: Mapping[str, Any]) -> list[ir.Attr]:
    """Return attributes of a node, of values and of attributes of another node."""
    plain = {name: value for name, value in given.items() if not isinstance(value, ir.Attr)}
    kept = [value for value in given.values() if isinstance(value, ir.Attr)]
    return [*kept, *ir.convenience.convert_attributes(plain)]


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _sizes(value: ir.Value) -> list[Any]:
    """Return [B, C, H, W]; B may be dynamic."""
    assert value.shape is not None
    return list(value.shape)
