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

from cmfast_train.kernels.group_norm import gate, group_norm_silu, norm_and_statistics, normed, on_kernels
from cmfast_train.kernels.plan import make_plan
from cmfast_train.kernels.tiles import NUMBERS, affine, group_of, members, places, read, sigmoid, within

CHUNKS_AT_ONCE = 1024  # values of chunks that a program adds up at once


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
    @once_differentiable
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

    Args:
        statistics: of x, from `norm_and_statistics`
    """
    batch, channels, height, width = x.shape
    plan = make_plan(batch, height * width, channels, groups, x.element_size(), tensors=2)
    dx = torch.empty_like(x)
    of_norm, of_rows = torch.empty(2, batch, 2, channels, dtype=torch.float32, device=x.device)
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    rows = [statistics if e is None else e for e in (scale, shift)]  # what is left out is not read
    strides = [0 if e is None else e.stride(0) for e in (scale, shift)]
    scaled = (weight.contiguous(), bias.contiguous(), *rows, *strides, int(scale is not None))
    inputs = (dy, x, statistics, *scaled, gate(silu), *plan.sizes(height * width, channels))
    constants, programs = plan.constants(), batch * plan.chunks * (groups // plan.groups)
    with torch.cuda.device_of(x):
        if plan.chunks == 1:
            kernel = _backward_held_kernel if plan.held else _backward_kernel
            kernel[(programs,)](dx, of_norm, of_rows, *inputs, **constants)
            return dx, of_norm, of_rows
        parts = torch.empty(batch, plan.chunks, 2, channels, dtype=torch.float32, device=x.device)
        chunk = (plan.pixels, plan.chunks)
        _backward_parts_kernel[(programs,)](parts, *inputs, *chunk, **constants)
        at_once = max(CHUNKS_AT_ONCE // plan.block, 1)
        _backward_apply_kernel[(programs,)](dx, of_norm, of_rows, parts, *inputs, *chunk, **constants, AT_ONCE=at_once)
    return dx, of_norm, of_rows


# As in `tiles`, a program has `width` neighbouring channels of one image, whole groups, padded to BLOCK. Why so
# little is a constant stands there.


@triton.jit
def _channels(x, statistics, weight, bias, scale, shift, image, block, channels, width, per_group, scale_stride,
              shift_stride, has_scale, BLOCK: tl.constexpr):  # fmt: skip
    """Return of each channel whether it is one, its index, group, middle, inverse deviation, rest, steepness, offset.

    With d = x - middle, xhat = d inverse + rest, which is what the rounding of middle leaves, and v = d steep + offset.
    """
    place = tl.arange(0, BLOCK)
    inside = place < width
    c = block * width + place
    group = group_of(place, per_group)
    pivot = tl.load(x + block * width + group * per_group, mask=inside, other=0.0).to(tl.float32)
    groups = channels // per_group
    statistics += image * 2 * groups + block * (width // per_group) + group
    centre = tl.load(statistics, mask=inside, other=0.0)
    inverse = tl.load(statistics + groups, mask=inside, other=0.0)
    factor, offset = affine(weight, bias, scale, shift, image, scale_stride, shift_stride, has_scale, inside, c)
    middle = pivot + centre
    rest = ((middle - pivot) - centre) * inverse
    return inside, c, group, middle, inverse, rest, factor * inverse, offset + factor * rest


@triton.jit
def _values(slope, x, middle, steep, offset, gate):
    """Return x - middle and dv, which is 0 where dy is."""
    off = x.to(tl.float32) - middle[:, None]
    value = off * steep[:, None] + offset[:, None]
    share = sigmoid(value, gate)
    return off, slope.to(tl.float32) * (share * (1.0 + value * (1.0 - share)))


@triton.jit
def _sums(dy, x, first, last, channels, inside, c, middle, inverse, rest, steep, offset, gate, ROWS: tl.constexpr,
          BLOCK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Return each channel's sum of dv and of xhat dv over the pixels from first to before last."""
    plain = tl.zeros([BLOCK, ROWS], tl.float32)
    weighted = tl.zeros([BLOCK, ROWS], tl.float32)
    for start in range(first, last, ROWS):
        slope = read(dy, start, last, channels, inside, c, ROWS, EVEN)
        value = read(x, start, last, channels, inside, c, ROWS, EVEN)
        off, slope = _values(slope, value, middle, steep, offset, gate)
        plain += slope
        weighted += off * slope
    of_channel = tl.sum(plain, 1)
    return of_channel, inverse * tl.sum(weighted, 1) + rest * of_channel


@triton.jit
def _of_group(values, pixels, per_group, group):
    """Return at each channel the mean over its group, given the channels' sums over all pixels."""
    member = members(group)
    total = tl.sum(tl.where(member, values[None, :], 0.0), 1) * (1.0 / (pixels * per_group).to(tl.float32))
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _means(plain, weighted, pixels, per_group, group, inverse, rest, steep):
    """Return what dx lacks of dv steep at each channel: a constant, and a factor of x - middle."""
    tilt = _of_group(steep * weighted, pixels, per_group, group)  # over the deviation, which a group's channels share
    mean = _of_group(steep * plain, pixels, per_group, group) + rest * tilt
    return mean, tilt * inverse


@triton.jit
def _write(dx, dy, x, first, last, plain, weighted, pixels, per_group, channels, inside, c, group, middle, inverse,
           rest, steep, offset, gate, ROWS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Write dx for the pixels from first to before last, given the sums over the whole image."""
    mean, tilt = _means(plain, weighted, pixels, per_group, group, inverse, rest, steep)
    for start in range(first, last, ROWS):
        slope = read(dy, start, last, channels, inside, c, ROWS, EVEN)
        value = read(x, start, last, channels, inside, c, ROWS, EVEN)
        off, slope = _values(slope, value, middle, steep, offset, gate)
        value = slope * steep[:, None] - mean[:, None] - off * tilt[:, None]
        mask = within(start, last, inside, ROWS, EVEN)
        tl.store(dx + places(start, channels, c, ROWS), value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _write_sums(of_norm, of_rows, plain, weighted, weight, bias, scale, image, scale_stride, has_scale, channels,
                inside, c):  # fmt: skip
    """Write an image's shares in the gradients of weight and bias, and its gradients of scale and shift."""
    at = image * 2 * channels + c
    given = inside & (has_scale != 0)
    scaled = 1.0 + tl.load(scale + image * scale_stride + c, mask=given, other=0.0)
    gamma = tl.load(weight + c, mask=given, other=0.0).to(tl.float32)
    beta = tl.load(bias + c, mask=given, other=0.0).to(tl.float32)
    tl.store(of_rows + at, gamma * weighted + beta * plain, mask=given)
    tl.store(of_rows + at + channels, plain, mask=given)
    tl.store(of_norm + at, weighted * scaled, mask=inside)
    tl.store(of_norm + at + channels, plain * scaled, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_kernel(
    dx, of_norm, of_rows, dy, x, statistics, weight, bias, scale, shift, scale_stride, shift_stride, has_scale, gate,
    pixels, per_group, units, blocks, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of some groups of one image. Programs: image, then block of groups, which runs faster."""
    width = units * UNIT
    channels = blocks * width
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = image.to(tl.int64) * pixels * channels
    dx += start
    dy += start
    x += start
    inside, c, group, middle, inverse, rest, steep, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, block, channels, width, per_group, scale_stride, shift_stride,
        has_scale, BLOCK)  # fmt: skip
    plain, weighted = _sums(dy, x, 0, pixels, channels, inside, c, middle, inverse, rest, steep, offset, gate, ROWS,
                            BLOCK, EVEN)  # fmt: skip
    _write_sums(of_norm, of_rows, plain, weighted, weight, bias, scale, image, scale_stride, has_scale, channels,
                inside, c)  # fmt: skip
    _write(dx, dy, x, 0, pixels, plain, weighted, pixels, per_group, channels, inside, c, group, middle, inverse, rest,
           steep, offset, gate, ROWS, EVEN)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _backward_held_kernel(
    dx, of_norm, of_rows, dy, x, statistics, weight, bias, scale, shift, scale_stride, shift_stride, has_scale, gate,
    pixels, per_group, units, blocks, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of some groups of one image, of ROWS pixels or fewer, each value read once.

    Programs: image, then block of groups, which runs faster.
    """
    width = units * UNIT
    channels = blocks * width
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = image.to(tl.int64) * pixels * channels
    dx += start
    dy += start
    x += start
    inside, c, group, middle, inverse, rest, steep, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, block, channels, width, per_group, scale_stride, shift_stride,
        has_scale, BLOCK)  # fmt: skip
    slope = read(dy, 0, pixels, channels, inside, c, ROWS, EVEN)
    value = read(x, 0, pixels, channels, inside, c, ROWS, EVEN)
    off, slope = _values(slope, value, middle, steep, offset, gate)
    plain = tl.sum(slope, 1)
    weighted = inverse * tl.sum(off * slope, 1) + rest * plain
    _write_sums(of_norm, of_rows, plain, weighted, weight, bias, scale, image, scale_stride, has_scale, channels,
                inside, c)  # fmt: skip
    mean, tilt = _means(plain, weighted, pixels, per_group, group, inverse, rest, steep)
    value = slope * steep[:, None] - mean[:, None] - off * tilt[:, None]
    mask = within(0, pixels, inside, ROWS, EVEN)
    tl.store(dx + places(0, channels, c, ROWS), value.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_parts_kernel(
    parts, dy, x, statistics, weight, bias, scale, shift, scale_stride, shift_stride, has_scale, gate, pixels,
    per_group, units, blocks, pixels_each, chunks, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Write the sums of a chunk of pixels: parts [B, chunks, 2, C], of dv, then of xhat dv."""
    width = units * UNIT
    channels = blocks * width
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # a chunk of those of all images
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    start = image.to(tl.int64) * pixels * channels
    dy += start
    x += start
    inside, c, _, middle, inverse, rest, steep, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, block, channels, width, per_group, scale_stride, shift_stride,
        has_scale, BLOCK)  # fmt: skip
    plain, weighted = _sums(dy, x, first, last, channels, inside, c, middle, inverse, rest, steep, offset, gate, ROWS,
                            BLOCK, EVEN)  # fmt: skip
    parts += chunk * 2 * channels + c
    tl.store(parts, plain, mask=inside)
    tl.store(parts + channels, weighted, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_apply_kernel(
    dx, of_norm, of_rows, parts, dy, x, statistics, weight, bias, scale, shift, scale_stride, shift_stride, has_scale,
    gate, pixels, per_group, units, blocks, pixels_each, chunks, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all chunks and write dx for one; the first writes the other gradients too."""
    width = units * UNIT
    channels = blocks * width
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    start = image.to(tl.int64) * pixels * channels
    dx += start
    dy += start
    x += start
    inside, c, group, middle, inverse, rest, steep, offset = _channels(
        x, statistics, weight, bias, scale, shift, image, block, channels, width, per_group, scale_stride, shift_stride,
        has_scale, BLOCK)  # fmt: skip
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
                    has_scale, channels, inside, c)  # fmt: skip
    _write(dx, dy, x, first, last, of_channel, weighted_of_channel, pixels, per_group, channels, inside, c, group,
           middle, inverse, rest, steep, offset, gate, ROWS, EVEN)  # fmt: skip
