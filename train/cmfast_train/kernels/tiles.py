# SPDX-License-Identifier: MIT
"""What the kernels of `group_norm` and `group_norm_training` have in common: tiles of an image, and their arithmetic.

A program has `width` neighbouring channels of one image, whole groups, padded to BLOCK; there are `blocks` such widths.
Means are taken less a pivot, x at the first pixel and channel of the group: a mean that is large beside the deviations
then costs no digits.

Each combination of constants is compiled when it is first met, which takes longer than a training step. So there are
few: the tile and UNIT, a divisor of width that lets the compiler read so many channels at once. All other numbers
vary at run time and do not become constants where they happen to be 1 or divisible by 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cmfast_train.kernels.plan import MOST_CHUNKS, MOST_GROUPS

NUMBERS = [
    "pixels", "per_group", "units", "blocks", "pixels_each", "chunks", "add_stride", "has_add", "scale_stride",
    "shift_stride", "has_scale",
]  # fmt: skip
GROUPS, CHUNKS = tl.constexpr(MOST_GROUPS), tl.constexpr(MOST_CHUNKS)  # at most, of a program


@triton.jit
def within(start, last, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Return [BLOCK, ROWS], whether values from pixel `start` on are of the image, to before `last`.

    Args:
        EVEN: such a tile has ROWS pixels of the image or none, so no pixel needs to be looked at
    """
    if EVEN:
        mask = tl.broadcast_to((inside & (start < last))[:, None], inside.shape[0], ROWS)
    else:
        mask = inside[:, None] & (start + tl.arange(0, ROWS) < last)[None, :]
    return mask


@triton.jit
def places(start, channels, c, ROWS: tl.constexpr):
    """Return [BLOCK, ROWS], where the values from pixel `start` on are."""
    return (start + tl.arange(0, ROWS))[None, :] * channels + c[:, None]


@triton.jit
def read(x, start, last, channels, inside, c, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Return x [BLOCK, ROWS] from pixel `start` on, 0 where there is none."""
    return tl.load(x + places(start, channels, c, ROWS), mask=within(start, last, inside, ROWS, EVEN), other=0.0)


@triton.jit
def counted(value, start, last, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Return the values of pixels that there are, and 0 for the others."""
    if not EVEN:
        value = tl.where(within(start, last, inside, ROWS, EVEN), value, 0.0)
    return value


@triton.jit
def group_of(place, per_group):
    """Return place // per_group, below 4096 both, without a division for each."""
    return (place * ((1 << 24) // per_group + 1)) >> 24


@triton.jit
def sigmoid(value, gate):
    """Return 1 / (1 + exp(-value)), or 1 if gate is -inf.

    The root of a reciprocal, squared, is one instruction and a product where a division is ten; its error is 3e-7.
    """
    root = tl.rsqrt(1.0 + tl.exp2(value * -1.4426950408889634 + gate))
    return root * root


@triton.jit
def members(group):
    """Return [GROUPS, BLOCK], whether a channel is of a group."""
    return tl.arange(0, GROUPS)[:, None] == group[None, :]


@triton.jit
def affine(weight, bias, scale, shift, image, scale_stride, shift_stride, has_scale, inside, c):
    """Return factor and offset of each channel."""
    factor = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    given = inside & (has_scale != 0)
    scaled = 1.0 + tl.load(scale + image * scale_stride + c, mask=given, other=0.0)
    offset = offset * scaled + tl.load(shift + image * shift_stride + c, mask=given, other=0.0)
    return factor * scaled, offset
