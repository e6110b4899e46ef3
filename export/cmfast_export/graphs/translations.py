# SPDX-License-Identifier: MIT
"""How a traced program becomes ONNX: by torch's exporter, with operators of our own.

An operator has a translation here where the exporter's own way is slow, wrong or needs a late opset.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

Program = torch.export.ExportedProgram
aten = torch.ops.aten
op: Any = opset18  # untyped: its annotations ask for element types, which differ from file to file


def translate(
    program: Program, *, input_names: Sequence[str], output_names: Sequence[str], opset_version: int
) -> ir.Model:
    """Return a traced program as an ONNX model, nothing folded.

    The exporter first traces each program once more, to write it in fewer operators, which takes longer than all the
    rest. A program of operators that have a translation each (PLAIN) it is given as it is.

    Raises:
        torch.onnx.OnnxExporterError: an operator has no ONNX form.
    """

    def export(program: Program, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
        exported = torch.onnx.export(
            program,
            input_names=list(input_names),
            output_names=list(output_names),
            opset_version=opset_version,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=dict(table),
        )
        assert exported is not None
        return exported.model

    if is_plain(program):
        with contextlib.suppress(torch.onnx.OnnxExporterError):  # of another version, which lacks one of them
            return export(_as_it_is(program), TRANSLATIONS | PLAIN_TRANSLATIONS)
    return export(program, TRANSLATIONS)


def is_plain(program: Program) -> bool:
    """Whether a program is made of the operators PLAIN alone, without graphs inside it."""
    nodes = program.graph.nodes
    return all(node.op in ("placeholder", "output") or node.target in PLAIN for node in nodes)


def _as_it_is(program: Program) -> Program:
    """Return the program, whose `run_decompositions` gives it back."""
    same = copy.copy(program)
    setattr(same, "run_decompositions", lambda *_, **__: same)  # noqa: B010  of this one object
    return same


def group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True) -> Any:
    """Group normalisation over InstanceNormalization, which every backend has a fast kernel for; x [B, C, ...].

    Native GroupNormalization (opset 21) is taken apart into reductions by ONNX Runtime and crashes OpenVINO.
    """
    by_group = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
    ones, zeros = op.Constant(value_floats=[1.0] * groups), op.Constant(value_floats=[0.0] * groups)
    normed = op.InstanceNormalization(by_group, ones, zeros, epsilon=eps)
    sizes = list(x.shape)[1:]
    fixed = all(isinstance(size, int) for size in sizes)
    normed = op.Reshape(normed, op.Constant(value_ints=[0, *sizes]) if fixed else op.Shape(x))
    if len(sizes) > 1:
        axes = op.Constant(value_ints=list(range(1, len(sizes))))
        weight, bias = (None if value is None else op.Unsqueeze(value, axes) for value in (weight, bias))
    normed = normed if weight is None else op.Mul(normed, weight)
    return normed if bias is None else op.Add(normed, bias)


def attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(q k^T / sqrt(d) + mask) v; q, k, v [..., tokens, d]. Plain nodes: the Attention operator needs opset 23.

    In half precision the scale is divided between q and k, whose product could overflow, and the softmax is float32.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout, or with fewer heads of k than of q")
    factor = scale if scale is not None else float(q.shape[-1]) ** -0.5
    rank = len(k.shape)
    k = op.Transpose(k, perm=[*range(rank - 2), rank - 1, rank - 2])
    if q.dtype == ir.DataType.FLOAT:
        scores = op.MatMul(op.Mul(q, op.Constant(value_floats=[factor])), k)
        return op.MatMul(op.Softmax(_masked(scores, attn_mask, is_causal), axis=-1), v)
    root = op.Cast(op.Constant(value_floats=[factor**0.5]), to=q.dtype)
    scores = op.Cast(op.MatMul(op.Mul(q, root), op.Mul(k, root)), to=ir.DataType.FLOAT)
    return op.MatMul(op.Cast(op.Softmax(_masked(scores, attn_mask, is_causal), axis=-1), to=q.dtype), v)


def _masked(scores: Any, mask: Any, is_causal: bool) -> Any:
    """Return float32 scores [..., T, S] without what attention must not see: a mask of bool, or numbers to add."""
    if is_causal:
        rows, columns = (
            op.Range(_number(0), op.Squeeze(op.Shape(scores, start=start, end=start + 1 or None)), _number(1))
            for start in (-2, -1)
        )
        mask = op.LessOrEqual(op.Unsqueeze(columns, _axes(0)), op.Unsqueeze(rows, _axes(1)))
    elif mask is None:
        return scores
    if is_causal or mask.dtype == ir.DataType.BOOL:
        return op.Where(mask, scores, op.Constant(value_float=float("-inf")))
    return op.Add(scores, op.Cast(mask, to=ir.DataType.FLOAT))


def _number(value: int) -> Any:
    return op.Constant(value_int=value)


def _axes(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def to_dtype(
    x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: str | None = None
) -> Any:
    """The values of x in another type."""
    return op.Cast(x, to=dtype)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.group_norm.default: group_norm,
    aten.scaled_dot_product_attention.default: attention,
}
PLAIN_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {aten.to.dtype: to_dtype}
# Functions of their operands that the exporter translates one by one: what most of cmfast's networks are made of.
PLAIN = frozenset(
    (
        *TRANSLATIONS,
        *PLAIN_TRANSLATIONS,
        aten._assert_tensor_metadata.default,  # which the exporter removes
        aten.add.Tensor,
        aten.arange.default,
        aten.atan.default,
        aten.avg_pool2d.default,
        aten.cat.default,
        aten.clamp.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv_transpose2d.input,
        aten.cos.default,
        aten.div.Tensor,
        aten.embedding.default,
        aten.exp.default,
        aten.linear.default,
        aten.log.default,
        aten.mul.Tensor,
        aten.narrow.default,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.reciprocal.default,
        aten.reshape.default,
        aten.select.int,
        aten.silu.default,
        aten.sin.default,
        aten.sub.Tensor,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.upsample_nearest2d.vec,
    )
)
