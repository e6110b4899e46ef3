# SPDX-License-Identifier: MIT
"""`group_norm` for training: the same forward pass, and its derivative in one kernel, or two for large feature maps.

With xhat = (x - mean) / deviation of a group, v = a xhat + o, where a = weight (1 + scale) and o = bias (1 + scale) +
shift, and y = act(v), the gradient of x is

    dx = (a dv - mean(a dv) - xhat mean(xhat a dv)) / deviation,    dv = dy act'(v),

the means over a group. Those of weight, bias, scale and shift follow from the sums of dv and of xhat dv over an image.
v is computed again from x, so that x and two numbers for each group are all that is kept. Like the forward pass, it
launches by shape alone, waits for nothing, and gives the same bits for the same input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmfast_train.kernels.group_norm import group_norm_silu, make_plan, norm_and_statistics, normed, on_kernels

AT_ONCE = 2048  # values of chunks that a program adds up at once


def norm_act(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """Return act(norm(x) * (1 + scale) + shift), act SiLU or nothing, with a derivative (of first order, backwards).

    Args:
        x: [B, C, H, W] in channels_last, float32, float16 or bfloat16; so are its gradient and the result.
        groups: a divisor of C.
        weight: [C], as `bias`.
        eps: added to the variance.
        scale: [B, C] float32, with `shift`; rows may have any stride.
    """
    if not on_kernels(x):
        return normed(x, groups, weight, bias, eps, scale, shift, silu)
    if not torch.is_grad_enabled():
        return group_norm_silu(x, groups, weight, bias, eps, scale, shift, silu)
    result: Tensor = _NormAct.apply(x, weight, bias, scale, shift, groups, eps, silu)  # type: ignore[no-untyped-call]
    return result


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int,
        eps: float, silu: bool,
    ) -> Tensor:  # fmt: skip
        y, statistics = norm_and_statistics(x, groups, weight, bias, eps, scale, shift, silu)
        ctx.save_for_backward(x, statistics, weight, bias, scale, shift)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias, scale, shift = ctx.saved_tensors
        dx, of_norm, of_rows = gradients(dy, x, statistics, ctx.groups, weight, bias, scale, shift, ctx.silu)
        dweight, dbias = of_norm.sum(0).unbind(0)
        dscale, dshift = (None, None) if scale is None else of_rows.unbind(1)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, dshift, None, None, None


def gradients(
    dy: Tensor, x: Tensor, statistics: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx [B, C, H, W]; of each image the shares in dweight and dbias, [B, 2, C]; dscale and dshift, [B, 2, C].

    statistics  of x, from `norm_and_statistics`
    """
    batch, channels, height, width = x.shape
    plan = make_plan(batch, height * width, channels, groups, x.element_size(), tensors=2)
    dx = torch.empty_like(x)
    of_norm, of_rows = torch.empty(2, batch, 2, channels, dtype=torch.float32, device=x.device)
    inputs = (
        dy.to(x.dtype).contiguous(memory_format=torch.channels_last), x, statistics, weight.contiguous(),
        bias.contiguous(), *(x if e is None else e for e in (scale, shift)),
    )  # fmt: skip
    sizes = (height * width, channels, *(0 if e is None else e.stride(0) for e in (scale, shift)))
    constants = {
        "PER_GROUP": channels // groups, "CHANNELS": plan.groups * (channels // groups), "ROWS": plan.rows,
        "BLOCK": plan.block, "HAS_SCALE": scale is not None, "SILU": silu, "num_warps": 4,
    }  # fmt: skip
    of_groups = {"GROUPS": triton.next_power_of_2(plan.groups)}
    programs = batch * plan.chunks * (groups // plan.groups)
    with torch.cuda.device_of(x):
        if plan.chunks == 1:
            _backward_kernel[(programs,)](dx, of_norm, of_rows, *inputs, *sizes, **constants, **of_groups)
            return dx, of_norm, of_rows
        parts = torch.empty(batch, plan.chunks, 2, channels, dtype=torch.float32, device=x.device)
        chunk = {"pixels_each": plan.pixels, "chunks": plan.chunks}
        _backward_parts_kernel[(programs,)](parts, *inputs, *sizes, **chunk, **constants)
        at_once = min(triton.next_power_of_2(plan.chunks), max(AT_ONCE // plan.block, 1))
        _backward_apply_kernel[(programs,)](
            dx, of_norm, of_rows, parts, *inputs, *sizes, **chunk, **constants, **of_groups, AT_ONCE=at_once
        )
    return dx, of_norm, of_rows


# As in `group_norm`, a program has CHANNELS neighbouring channels of one image, whole groups, padded to BLOCK.


@triton.jit
def _channels(x, statistics, weight, bias, scale, shift, image, first_channel, channels, scale_stride, shift_stride,
              PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
              HAS_SCALE: tl.constexpr):  # fmt: skip
    """Return of each channel: whether it is one, its index, pivot, mean less pivot, inverse deviation, a and o."""
    place = tl.arange(0, BLOCK)
    inside = place < CHANNELS
    c = first_channel + place
    groups = channels // PER_GROUP
    group = place // PER_GROUP
    pivot = tl.load(x + first_channel + group * PER_GROUP, mask=inside, other=0.0).to(tl.float32)
    statistics += image * 2 * groups + first_channel // PER_GROUP + group
    centre = tl.load(statistics, mask=inside, other=0.0)
    inverse = tl.load(statistics + groups, mask=inside, other=0.0)
    factor = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scaled = 1.0 + tl.load(scale + image * scale_stride + c, mask=inside, other=0.0)
        factor *= scaled
        offset = offset * scaled + tl.load(shift + image * shift_stride + c, mask=inside, other=0.0)
    return inside, c, pivot, centre, inverse, factor, offset


@triton.jit
def _values(dy, x, at, mask, pivot, centre, inverse, factor, offset, SILU: tl.constexpr):
    """Return xhat and dv, which is 0 outside."""
    hat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    hat = ((hat - pivot[:, None]) - centre[:, None]) * inverse[:, None]
    slope = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        value = hat * factor[:, None] + offset[:, None]
        gate = 1.0 / (1.0 + tl.exp(-value))
        slope *= gate * (1.0 + value * (1.0 - gate))
    return hat, slope


@triton.jit
def _sums(dy, x, first, last, channels, inside, c, pivot, centre, inverse, factor, offset, ROWS: tl.constexpr,
          BLOCK: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Return each channel's sum of dv and of xhat dv over the pixels from first to before last."""
    row = tl.arange(0, ROWS)
    plain = tl.zeros([BLOCK, ROWS], tl.float32)
    weighted = tl.zeros([BLOCK, ROWS], tl.float32)
    for start in range(first, last, ROWS):
        pixel = start + row
        mask = inside[:, None] & (pixel < last)[None, :]
        at = pixel[None, :] * channels + c[:, None]
        hat, slope = _values(dy, x, at, mask, pivot, centre, inverse, factor, offset, SILU)
        plain += slope
        weighted += hat * slope
    return tl.sum(plain, 1), tl.sum(weighted, 1)


@triton.jit
def _of_group(values, pixels, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return at each channel the mean over its group, given the channels' sums over all pixels."""
    member = tl.arange(0, GROUPS)[:, None] == (tl.arange(0, BLOCK) // PER_GROUP)[None, :]
    total = tl.sum(tl.where(member, values[None, :], 0.0), 1) / (pixels * PER_GROUP).to(tl.float32)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _write(dx, dy, x, first, last, plain, weighted, pixels, channels, inside, c, pivot, centre, inverse, factor, offset,
           PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
           SILU: tl.constexpr):  # fmt: skip
    """Write dx for the pixels from first to before last, given the sums over the whole image."""
    mean = _of_group(factor * plain, pixels, PER_GROUP, GROUPS, BLOCK)
    tilt = _of_group(factor * weighted, pixels, PER_GROUP, GROUPS, BLOCK)
    row = tl.arange(0, ROWS)
    for start in range(first, last, ROWS):
        pixel = start + row
        mask = inside[:, None] & (pixel < last)[None, :]
        at = pixel[None, :] * channels + c[:, None]
        hat, slope = _values(dy, x, at, mask, pivot, centre, inverse, factor, offset, SILU)
        value = inverse[:, None] * (slope * factor[:, None] - mean[:, None] - hat * tilt[:, None])
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _write_sums(of_norm, of_rows, plain, weighted, weight, bias, scale, image, scale_stride, channels, inside, c,
                HAS_SCALE: tl.constexpr):  # fmt: skip
    """Write an image's shares in the gradients of weight and bias, and its gradients of scale and shift."""
    at = image * 2 * channels + c
    share_weight, share_bias = weighted, plain
    if HAS_SCALE:
        scaled = 1.0 + tl.load(scale + image * scale_stride + c, mask=inside, other=0.0)
        share_weight, share_bias = weighted * scaled, plain * scaled
        gamma = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        beta = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_rows + at, gamma * weighted + beta * plain, mask=inside)
        tl.store(of_rows + at + channels, plain, mask=inside)
    tl.store(of_norm + at, share_weight, mask=inside)
    tl.store(of_norm + at + channels, share_bias, mask=inside)


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _backward_kernel(
    dx, of_norm, of_rows, dy, x, statistics, weight, bias, scale, shift, pixels, channels, scale_stride, shift_stride,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """All gradients of some groups of one image. Programs: image, then block of groups, which runs faster."""
    blocks = channels // CHANNELS
    image = tl.program_id(0) // blocks
    first_channel = (tl.program_id(0) % blocks) * CHANNELS
    start = image.to(tl.int64) * pixels * channels
    dx += start
    dy += start
    x += start
    inside, c, pivot, centre, inverse, factor, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, first_channel, channels, scale_stride, shift_stride,
        PER_GROUP, CHANNELS, BLOCK, HAS_SCALE)  # fmt: skip
    plain, weighted = _sums(dy, x, 0, pixels, channels, inside, c, pivot, centre, inverse, factor, offset, ROWS, BLOCK,
                            SILU)  # fmt: skip
    _write_sums(of_norm, of_rows, plain, weighted, weight, bias, scale, image, scale_stride, channels, inside, c,
                HAS_SCALE)  # fmt: skip
    _write(dx, dy, x, 0, pixels, plain, weighted, pixels, channels, inside, c, pivot, centre, inverse, factor, offset,
           PER_GROUP, GROUPS, ROWS, BLOCK, SILU)  # fmt: skip


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _backward_parts_kernel(
    parts, dy, x, statistics, weight, bias, scale, shift, pixels, channels, scale_stride, shift_stride, pixels_each,
    chunks,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Write the sums of a chunk of pixels: parts [B, chunks, 2, C], of dv, then of xhat dv."""
    blocks = channels // CHANNELS
    chunk = tl.program_id(0) // blocks  # over all images
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    start = image.to(tl.int64) * pixels * channels
    dy += start
    x += start
    inside, c, pivot, centre, inverse, factor, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, (tl.program_id(0) % blocks) * CHANNELS, channels,
        scale_stride, shift_stride, PER_GROUP, CHANNELS, BLOCK, HAS_SCALE)  # fmt: skip
    plain, weighted = _sums(dy, x, first, last, channels, inside, c, pivot, centre, inverse, factor, offset, ROWS,
                            BLOCK, SILU)  # fmt: skip
    parts += chunk * 2 * channels + c
    tl.store(parts, plain, mask=inside)
    tl.store(parts + channels, weighted, mask=inside)


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _backward_apply_kernel(
    dx, of_norm, of_rows, parts, dy, x, statistics, weight, bias, scale, shift, pixels, channels, scale_stride,
    shift_stride, pixels_each, chunks,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, SILU: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all chunks and write dx for one; the first writes the other gradients too."""
    blocks = channels // CHANNELS
    chunk = tl.program_id(0) // blocks
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    start = image.to(tl.int64) * pixels * channels
    dx += start
    dy += start
    x += start
    inside, c, pivot, centre, inverse, factor, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, (tl.program_id(0) % blocks) * CHANNELS, channels,
        scale_stride, shift_stride, PER_GROUP, CHANNELS, BLOCK, HAS_SCALE)  # fmt: skip
    plain = tl.zeros([BLOCK, AT_ONCE], tl.float32)
    weighted = tl.zeros([BLOCK, AT_ONCE], tl.float32)
    for before in range(0, chunks, AT_ONCE):
        part = before + tl.arange(0, AT_ONCE)
        known = inside[:, None] & (part < chunks)[None, :]
        at = (image * chunks + part)[None, :] * 2 * channels + c[:, None]
        plain += tl.load(parts + at, mask=known, other=0.0)
        weighted += tl.load(parts + at + channels, mask=known, other=0.0)
    of_channel, weighted_of_channel = tl.sum(plain, 1), tl.sum(weighted, 1)
    if chunk % chunks == 0:
        _write_sums(of_norm, of_rows, of_channel, weighted_of_channel, weight, bias, scale, image, scale_stride,
                    channels, inside, c, HAS_SCALE)  # fmt: skip
    _write(dx, dy, x, first, last, of_channel, weighted_of_channel, pixels, channels, inside, c, pivot, centre, inverse,
           factor, offset, PER_GROUP, GROUPS, ROWS, BLOCK, SILU)  # fmt: skip
