# SPDX-License-Identifier: MIT
"""How operators of PyTorch are written in ONNX where the exporter's own way is slow, wrong or needs a late opset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

op: Any = opset18  # untyped: its annotations ask for element types, which differ from file to file


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


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
