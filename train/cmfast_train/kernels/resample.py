# SPDX-License-Identifier: MIT
"""Doubling and halving the side of channels_last images, residual sums with it, concatenation; each in one pass.

As in `group_norm`, nothing has a derivative, a CPU gets torch operations, and a CUDA graph can record the launches. A
direction is "up" (nearest neighbour, doubles the side), "down" (mean of 2x2 pixels, halves it) or "" (neither). All
arithmetic is float32 and in a fixed order; what is only moved keeps its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cmfast_train.kernels.group_norm import check_layout, on_kernels

SAME, DOWN, UP = (tl.constexpr(n) for n in range(3))  # directions, to the kernel
DIRECTIONS = {"": SAME.value, "down": DOWN.value, "up": UP.value}
WIDEST = 8  # neighbouring channels of a vector: 16 bytes of half precision
TILE = 2048  # values of a program, 16 for each of 128 threads: two reads in flight
SMALL_TILE = 1024  # of the smaller image, where four pixels of the larger one belong to each


def resampled(x: Tensor, direction: str) -> Tensor:
    """Return x [B, C, H, W] with twice ("up") or half ("down") the side; both in channels_last."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.cmfast.resampled(x, direction)
        return y
    check_layout(x)
    shape = _shape(x, direction)
    if not on_kernels(x):
        return moved(x, direction).to(x.dtype).contiguous(memory_format=torch.channels_last)
    y = _empty(x, *shape)
    _launch(y, x, None, None, 1.0, direction)
    return y


def add_shortcut(
    x: Tensor, h: Tensor, bias: Tensor, gain: float = 1.0, direction: str = "", skip: Tensor | None = None
) -> Tensor:
    """Return (resampled x + h + bias) * gain without writing, or rounding, the resampled x.

    Args:
        x: [B, C, H, W] in channels_last, float32, float16 or bfloat16.
        h: of the type of x and the shape that the result has, in channels_last.
        bias: [C] float32.
        gain: factor on the sum.
        direction: "up", "down" or "".
        skip: [B, D, H, W] to join to the sum, which is then written once, where the joined one has it.

    Returns:
        [B, C, H, W], with skip [B, C + D, H, W], in channels_last.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.cmfast.add_shortcut(x, h, bias, gain, direction, skip)
        return y
    check_layout(x)
    check_layout(h)
    shape = _shape(x, direction)
    if shape != h.shape or x.dtype != h.dtype:
        raise ValueError(f"a sum of {list(shape)} {x.dtype} and {list(h.shape)} {h.dtype}")
    if bias.shape != shape[1:2] or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"need a dense bias [{shape[1]}] float32, got {list(bias.shape)} {bias.dtype}")
    if skip is not None:
        _check_pair(h, skip)
    if not on_kernels(x):
        y = shortcut_added(x, h, bias, gain, direction)
        return y if skip is None else torch.cat([y, skip], dim=1)
    y = _room(h, skip)
    _launch(y, x, h, bias, gain, direction)
    if skip is not None:
        _place(y, skip, start=h.shape[1])
    return y


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Return the channels of a [B, C, H, W], then those of b [B, D, H, W]; both of one type and in channels_last."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.cmfast.joined(a, b)
        return y
    check_layout(a)
    _check_pair(a, b)
    if not on_kernels(a):
        return torch.cat([a, b], dim=1)
    y = _room(a, b)
    _place(y, a, start=0)
    _place(y, b, start=a.shape[1])
    return y


def moved(x: Tensor, direction: str) -> Tensor:
    """Return what `resampled` does, in torch operations, float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if direction == "":
        return wide
    return F.interpolate(wide, scale_factor=2.0) if direction == "up" else F.avg_pool2d(wide, 2)


def shortcut_added(x: Tensor, h: Tensor, bias: Tensor, gain: float = 1.0, direction: str = "") -> Tensor:
    """Return what `add_shortcut` does, in torch operations; in float64 for x in float64."""
    y = (moved(x, direction) + h + bias[:, None, None]) * gain
    return y.to(h.dtype).contiguous(memory_format=torch.channels_last)


# To torch.compile these are operators that it does not look into, of inputs whose strides it leaves alone.
_resample_operator = torch.library.custom_op(
    "cmfast::resampled", resampled, mutates_args=(), schema="(Tensor x, str direction) -> Tensor"
)
_sum_operator = torch.library.custom_op(
    "cmfast::add_shortcut", add_shortcut, mutates_args=(),
    schema="(Tensor x, Tensor h, Tensor bias, float gain, str direction, Tensor? skip) -> Tensor",
)  # fmt: skip
_join_operator = torch.library.custom_op(
    "cmfast::joined", joined, mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)
_resample_operator.register_fake(lambda x, direction: _empty(x, *_shape(x, direction)))
_sum_operator.register_fake(lambda x, h, bias, gain, direction, skip: _room(h, skip))
_join_operator.register_fake(lambda a, b: _room(a, b))


def _shape(x: Tensor, direction: str) -> torch.Size:
    """Return the shape of x after resampling."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be up, down or empty, got {direction!r}")
    batch, channels, height, width = x.shape
    if direction == "down":
        if height % 2 or width % 2:
            raise ValueError(f"only even sides can be halved, got {height}x{width} pixels")
        return torch.Size((batch, channels, height // 2, width // 2))
    return torch.Size((batch, channels, 2 * height, 2 * width)) if direction == "up" else x.shape


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _room(h: Tensor, skip: Tensor | None) -> Tensor:
    """Return an image batch for the channels of both."""
    batch, channels, height, width = h.shape
    return _empty(h, batch, channels + (0 if skip is None else skip.shape[1]), height, width)


def _check_pair(a: Tensor, b: Tensor) -> None:
    check_layout(b)
    if a.shape[:1] + a.shape[2:] != b.shape[:1] + b.shape[2:] or a.dtype != b.dtype:
        raise ValueError(f"cannot join {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}")


def _vector(*channels: int) -> int:
    """Return how many neighbouring channels make a vector, a power of 2 that divides all of these numbers."""
    return min(WIDEST, *(n & -n for n in channels if n))


def _vectors(x: Tensor, vector: int) -> int:
    """Return how many vectors an image batch has; the kernels count them in 32 bits."""
    vectors = x.numel() // vector
    if vectors > 2**31 - 2 * TILE:
        raise ValueError(f"{list(x.shape)} has too many values for one launch; use smaller batches")
    return vectors


def _launch(y: Tensor, x: Tensor, h: Tensor | None, bias: Tensor | None, gain: float, direction: str) -> None:
    """Run `_resample_kernel`; y may have more channels than x, which it leaves alone."""
    channels = x.shape[1]
    pixels, width = min((y.numel() // y.shape[1], y.shape[3]), (x.numel() // channels, x.shape[3]))
    vector = _vector(channels, y.shape[1])
    _vectors(x, vector), _vectors(y, vector)
    vectors, block = pixels * channels // vector, (SMALL_TILE if direction else TILE) // vector
    with torch.cuda.device_of(x):
        _resample_kernel[(triton.cdiv(vectors, block),)](
            y, x, x if h is None else h, x if bias is None else bias, vectors, channels // vector,
            (y.shape[1] - channels) // vector, width, gain,
            DIRECTION=DIRECTIONS[direction], SUM=h is not None, VECTOR=vector, BLOCK=block,
        )  # fmt: skip


def _place(y: Tensor, x: Tensor, start: int) -> None:
    """Copy x to the channels of y from `start`."""
    vector = _vector(x.shape[1], y.shape[1], start)
    _vectors(y, vector)
    vectors, block = _vectors(x, vector), TILE // vector
    with torch.cuda.device_of(x):
        _place_kernel[(triton.cdiv(vectors, block),)](
            y, x, vectors, x.shape[1] // vector, y.shape[1] // vector, start // vector, VECTOR=vector, BLOCK=block
        )


# A program has BLOCK vectors, VECTOR neighbouring channels of one pixel, of the smaller image, or of the result where
# both have one size. Divisions, which find a vector's pixel, are so a fraction of the work, and reads and writes are as
# wide as a vector whatever the number of channels: that is no constant, which would compile a kernel for each.


@triton.jit(do_not_specialize=["vectors", "of_pixel", "more", "width"])
def _resample_kernel(
    y, x, h, bias, vectors, of_pixel, more, width, gain,
    DIRECTION: tl.constexpr, SUM: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x resampled; with SUM, + h + bias, * gain. `vectors` of the smaller image, `width` its pixels in a row.

    A pixel has `of_pixel` vectors, and y so many `more`.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (index < vectors)[:, None]
    place = tl.arange(0, VECTOR)[None, :]
    near = index[:, None].to(tl.int64) * VECTOR + place
    pixel = index // of_pixel
    offset = tl.zeros([BLOCK, VECTOR], tl.float32)
    if SUM:
        offset = tl.load(bias + (index - pixel * of_pixel)[:, None] * VECTOR + place, mask=inside, other=0.0)
    if DIRECTION != UP:
        result = y + (index + pixel * more)[:, None].to(tl.int64) * VECTOR + place
    if DIRECTION == SAME:
        value = tl.load(x + near, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(h + near, mask=inside, other=0.0).to(tl.float32)
        tl.store(result, ((value + offset) * gain).to(y.dtype.element_ty), mask=inside)
    else:
        # Of the four pixels of the larger image the first is in row 2 i, column 2 j: 2 i (2 width) + 2 j pixels on.
        corner = 2 * (pixel + (pixel // width) * width)
        first = corner * of_pixel + (index - pixel * of_pixel)
        a = first[:, None].to(tl.int64) * VECTOR + place
        b = (first + of_pixel)[:, None].to(tl.int64) * VECTOR + place
        c = (first + 2 * width * of_pixel)[:, None].to(tl.int64) * VECTOR + place
        d = (first + (2 * width + 1) * of_pixel)[:, None].to(tl.int64) * VECTOR + place
        if DIRECTION == DOWN:
            upper = tl.load(x + a, mask=inside, other=0.0).to(tl.float32)
            upper += tl.load(x + b, mask=inside, other=0.0).to(tl.float32)
            lower = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
            lower += tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
            value = (upper + lower) * 0.25
            if SUM:
                value += tl.load(h + near, mask=inside, other=0.0).to(tl.float32)
                value = (value + offset) * gain
            tl.store(result, value.to(y.dtype.element_ty), mask=inside)
        else:
            last = first + corner * more
            upper = y + last[:, None].to(tl.int64) * VECTOR + place
            right = y + (last + of_pixel + more)[:, None].to(tl.int64) * VECTOR + place
            lower = y + (last + 2 * width * (of_pixel + more))[:, None].to(tl.int64) * VECTOR + place
            other = y + (last + (2 * width + 1) * (of_pixel + more))[:, None].to(tl.int64) * VECTOR + place
            same = tl.load(x + near, mask=inside, other=0.0)
            if SUM:
                value = same.to(tl.float32)
                of_a = tl.load(h + a, mask=inside, other=0.0)  # all reads before writes, which they could not overtake
                of_b = tl.load(h + b, mask=inside, other=0.0)
                of_c = tl.load(h + c, mask=inside, other=0.0)
                of_d = tl.load(h + d, mask=inside, other=0.0)
                tl.store(upper, ((value + of_a.to(tl.float32) + offset) * gain).to(y.dtype.element_ty), mask=inside)
                tl.store(right, ((value + of_b.to(tl.float32) + offset) * gain).to(y.dtype.element_ty), mask=inside)
                tl.store(lower, ((value + of_c.to(tl.float32) + offset) * gain).to(y.dtype.element_ty), mask=inside)
                tl.store(other, ((value + of_d.to(tl.float32) + offset) * gain).to(y.dtype.element_ty), mask=inside)
            else:
                tl.store(upper, same, mask=inside)
                tl.store(right, same, mask=inside)
                tl.store(lower, same, mask=inside)
                tl.store(other, same, mask=inside)


@triton.jit(do_not_specialize=["vectors", "of_x", "of_y", "start"])
def _place_kernel(y, x, vectors, of_x, of_y, start, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the `of_x` vectors of each pixel of x to the `of_y` of y, from `start`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (index < vectors)[:, None]
    place = tl.arange(0, VECTOR)[None, :]
    at = index + (index // of_x) * (of_y - of_x) + start
    value = tl.load(x + index[:, None].to(tl.int64) * VECTOR + place, mask=inside)
    tl.store(y + at[:, None].to(tl.int64) * VECTOR + place, value, mask=inside)
