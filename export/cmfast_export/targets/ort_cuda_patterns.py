# SPDX-License-Identifier: MIT
"""Group norms and attentions in exported graphs, found for `ort_cuda`, and what the CUDA kernels accept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cmfast.errors import CmfastError

MICROSOFT = "com.microsoft"
# A thread of the CUDA kernel takes two channels of one group, and a block at most 512 channels: LaunchGroupNormKernel
# and kMaxSize in onnxruntime/contrib_ops/cuda/diffusion/group_norm_impl.cu and group_norm_common_base.h. It takes the
# variance as mean(x^2) - mean(x)^2 in float32, so a group whose mean is a thousand times its deviation is lost.
TOGETHER, BLOCK = 2, 512


def kernel_accepts(channels: int, groups: int) -> bool:
    """Whether com.microsoft.GroupNorm has a CUDA kernel for so many channels in so many groups."""
    each, rest = divmod(channels, groups)
    return rest == 0 and each % TOGETHER == 0 and 0 < each <= BLOCK


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """gamma (x - mean) / sqrt(var + epsilon) + beta in groups of channels of x [B, C, H, W], then SiLU or nothing."""

    x: ir.Value  # in the type of the backbone
    groups: int
    epsilon: float
    gamma: ir.Value  # float32 [C, 1, 1]
    beta: ir.Value  # float32 [C, 1, 1]
    silu: bool


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(scale q k^T) v over all pixels; q, k and v are the output of one convolution."""

    conv: ir.Node
    heads: int
    scale: float
    order: np.ndarray[Any, Any] | None  # rows of conv's weights as (q, k, v), head, channel; None: as they are


def find_group_norms(graph: ir.Graph) -> tuple[dict[ir.Value, GroupNorm], int]:
    """Return norms by their last value, and how many more there are that the CUDA kernel does not accept.

    A norm ends after its affine step, after the Cast back to half precision, or after SiLU where nothing else reads
    what SiLU gets. Where scale and shift follow, SiLU is theirs.
    """
    found: dict[ir.Value, GroupNorm] = {}
    left = 0
    for node in graph:
        if node.op_type != "InstanceNormalization":
            continue
        x, scale, bias = (_known(value) for value in node.inputs)
        before, ones, zeros = x.producer(), constant(scale), constant(bias)
        affine = _affine(node)
        if before is None or before.op_type != "Reshape" or affine is None or (ones != 1).any() or zeros.any():
            raise CmfastError(f"{node.name}: a norm of another form than cmfast-export writes, so it is not rewritten")
        gamma, beta, end = affine
        source = _known(before.inputs[0])
        if not kernel_accepts(constant(gamma).size, len(ones)):
            left += 1
            continue
        cast = source.producer()
        narrow = _only_user(end, "Cast")
        if cast is not None and cast.op_type == "Cast" and narrow is not None:
            half = _known(cast.inputs[0])
            if half.dtype == narrow.outputs[0].dtype == ir.DataType.FLOAT16:
                source, end = half, narrow.outputs[0]
        active = _silu(end)
        found[active or end] = GroupNorm(
            x=source, groups=len(ones), epsilon=node.attributes["epsilon"].as_float(), gamma=gamma, beta=beta,
            silu=active is not None,
        )  # fmt: skip
    return found, left


def find_attentions(graph: ir.Graph) -> dict[ir.Value, Attention]:
    """Return attentions by their last value, [B, C, H, W]."""
    found = {}
    for node in graph:
        if node.op_type == "Softmax" and (attention := _attention(node)) is not None:
            end, about = attention
            found[end] = about
    return found


def constant(value: ir.Value | None) -> np.ndarray[Any, Any]:
    """Return what an initializer holds."""
    assert value is not None
    assert value.const_value is not None, value.name
    return value.const_value.numpy()


def _affine(norm: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return gamma, beta and the value after both, of Reshape, Mul, Add behind InstanceNormalization."""
    weights = []
    value = norm.outputs[0]
    for op_type in ("Reshape", "Mul", "Add"):
        user = _only_user(value, op_type)
        if user is None:
            return None
        if op_type != "Reshape":
            other = _known(next(v for v in user.inputs if v is not value))
            if other.const_value is None:
                return None
            weights.append(other)
        value = user.outputs[0]
    return weights[0], weights[1], value


def _silu(x: ir.Value) -> ir.Value | None:
    """Return x sigmoid(x) where that is all that is made of x."""
    users = {node.op_type: node for node, _ in x.uses()}
    if len(x.uses()) != 2 or users.keys() != {"Sigmoid", "Mul"} or x.is_graph_output():
        return None
    gate = _only_user(users["Sigmoid"].outputs[0], "Mul")
    return gate.outputs[0] if gate is not None and gate is users["Mul"] else None


def _attention(softmax: ir.Node) -> tuple[ir.Value, Attention] | None:
    scores = _maker(_maker(softmax.inputs[0], "Cast", optional=True), "MatMul")
    after = _user(softmax.outputs[0], "Cast", optional=True)
    product = _only_user(after, "MatMul") if after is not None else None
    turned = _only_user(product.outputs[0], "Transpose") if product is not None else None
    end = _only_user(turned.outputs[0], "Reshape") if turned is not None else None
    if not isinstance(scores, ir.Node) or product is None or turned is None or end is None:
        return None
    if list(turned.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        return None
    scale = 1.0
    made = []
    for value in (*scores.inputs, product.inputs[1]):
        producer = _known(value).producer()
        if producer is not None and producer.op_type == "Mul":
            factor = _known(producer.inputs[1])
            if factor.const_value is None or factor.const_value.size != 1:
                return None
            scale *= float(constant(factor).reshape(-1)[0])
            producer = _known(producer.inputs[0]).producer()
        made.append(producer)
    q, k, v = made
    if k is None or k.op_type != "Transpose" or list(k.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        return None
    parts = [q, _known(k.inputs[0]).producer(), v]
    if any(part is None or part.op_type != "Gather" for part in parts):
        return None
    gathers = [part for part in parts if part is not None]
    if [int(constant(part.inputs[1])) for part in gathers] != [0, 1, 2] or len({p.inputs[0] for p in gathers}) != 1:
        return None
    taken = {part.attributes["axis"].as_int() for part in gathers}
    qkv = _known(gathers[0].inputs[0]).producer()
    view = _known(qkv.inputs[0]).producer() if qkv is not None and qkv.op_type == "Transpose" else None
    conv = _known(view.inputs[0]).producer() if view is not None and view.op_type == "Reshape" else None
    if qkv is None or view is None or conv is None or conv.op_type != "Conv" or len(taken) != 1 or len(conv.inputs) < 3:
        return None
    return _described(conv, view, list(qkv.attributes["perm"].as_ints()), taken.pop(), scale, end.outputs[0])


def _described(
    conv: ir.Node, view: ir.Node, perm: list[int], taken: int, scale: float, end: ir.Value
) -> tuple[ir.Value, Attention] | None:
    """Return the attention whose q, k, v are `taken` of the convolution's output, viewed and turned by `perm`."""
    shape = view.outputs[0].shape
    if shape is None or len(shape) != 5 or end.shape is None or len(end.shape) != 4:
        return None
    three = perm[taken]
    head, pixels, width = (axis for axis in perm[1:] if axis != three)
    if pixels != 4 or shape[three] != 3:
        return None
    sizes = [size for size in shape[1:4] if isinstance(size, int)]
    if len(sizes) != 3:
        return None
    rows = np.arange(math.prod(sizes)).reshape(sizes).transpose(three - 1, head - 1, width - 1).reshape(-1)
    order = None if (np.diff(rows) == 1).all() else rows
    if any(_known(value).const_value is None for value in conv.inputs[1:3]):
        return None
    nominal = sizes[width - 1] ** -0.5
    if abs(scale / nominal - 1) < 2**-9:  # two factors in half precision
        scale = nominal
    return end, Attention(conv=conv, heads=sizes[head - 1], scale=scale, order=order)


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that alone reads a value, if it is of this type."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and uses[0][0].op_type == op_type and not value.is_graph_output() else None


def _user(value: ir.Value, op_type: str, *, optional: bool) -> ir.Value | None:
    """Return what the one node of this type makes of a value; the value itself where that is optional."""
    node = _only_user(value, op_type)
    return node.outputs[0] if node is not None else value if optional else None


def _maker(value: ir.Value | ir.Node | None, op_type: str, *, optional: bool = False) -> ir.Node | ir.Value | None:
    """Return the node of this type that makes a value; with `optional` what that node reads, or the value itself."""
    node = value.producer() if isinstance(value, ir.Value) else None
    fits = node is not None and node.op_type == op_type
    if optional:
        return node.inputs[0] if fits and node is not None else value
    return node if fits else None
