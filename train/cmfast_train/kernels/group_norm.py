# SPDX-License-Identifier: MIT
"""GroupNorm, scale and shift by the noise embedding, and SiLU in one pass over channels_last images.

Nothing here has a derivative; `group_norm_training` adds one. On CUDA these are Triton kernels, on a CPU `normed` in
torch operations. The launches depend on shapes alone and nothing waits for the device, so a CUDA graph can record them.
The order of every sum is fixed for a shape: the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from cmfast_train.kernels.plan import MOST_PER_GROUP, make_plan
from cmfast_train.kernels.tiles import (
    CHUNKS,
    GROUPS,
    NUMBERS,
    affine,
    counted,
    group_of,
    members,
    places,
    read,
    sigmoid,
    within,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, silu: bool = True, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return act(norm(x + add) * (1 + scale) + shift), act SiLU or nothing; statistics are float32.

    Args:
        x: [B, C, H, W] in channels_last, float32, float16 or bfloat16.
        groups: a divisor of C.
        weight: [C], as `bias`; any of these types.
        eps: added to the variance.
        scale: [B, C] float32, with `shift`; rows may have any stride.
        add: [B, C] float32, before the norm; expand a vector [1, C] for the same in every image.

    Returns:
        [B, C, H, W] in channels_last, of the type of x.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.cmfast.group_norm_silu(x, groups, weight, bias, eps, scale, shift, silu, add)
        return y
    return norm_and_statistics(x, groups, weight, bias, eps, scale, shift, silu, add)[0]


def norm_and_statistics(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None,
    silu: bool, add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `group_norm_silu` does and, from the kernels, the statistics for a derivative.

    The statistics are [B, 2, groups] float32: the mean of a group less its first value, and 1 / its deviation.
    """
    check_layout(x)
    batch, channels, height, width = x.shape
    if channels % groups:
        raise ValueError(f"{channels} channels are not a multiple of {groups} groups")
    if channels // groups > MOST_PER_GROUP:
        raise ValueError(f"a group can have {MOST_PER_GROUP} channels at most, got {channels // groups}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together")
    rows = [_rows(e, batch, channels) for e in (scale, shift, add)]
    if not on_kernels(x):
        return normed(x, groups, weight, bias, eps, scale, shift, silu, add), x
    plan = make_plan(batch, height * width, channels, groups, x.element_size())
    y = torch.empty_like(x)  # keeps channels_last
    statistics = torch.empty(batch, 2, groups, dtype=torch.float32, device=x.device)
    scale, shift, add = (statistics if e is None else e for e in rows)  # what is left out is not read
    strides = [0 if e is None else e.stride(0) for e in rows]
    added = (add, strides[2], int(rows[2] is not None))
    scaled = (weight.contiguous(), bias.contiguous(), scale, shift, *strides[:2], int(rows[0] is not None))
    sizes, constants = plan.sizes(height * width, channels), plan.constants()
    programs = batch * plan.chunks * (groups // plan.groups)
    with torch.cuda.device_of(x):
        if plan.chunks == 1:
            kernel = _held_kernel if plan.held else _one_kernel
            kernel[(programs,)](y, statistics, x, *added, *scaled, gate(silu), eps, *sizes, **constants)
            return y, statistics
        parts = torch.empty(2 * batch * plan.chunks * groups, dtype=torch.float32, device=x.device)
        chunk = (plan.pixels, plan.chunks)
        _parts_kernel[(programs,)](parts, x, *added, *sizes, *chunk, **constants)
        _apply_kernel[(programs,)](
            y, statistics, parts, x, *added, *scaled, gate(silu), eps, *sizes, *chunk, **constants
        )
    return y, statistics


def normed(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, silu: bool = True, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what `group_norm_silu` does, in torch operations; in float64 for x in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if add is not None:
        y = y + add[..., None, None]
    y = F.group_norm(y, groups, weight.to(wide), bias.to(wide), eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


# To torch.compile this is an operator that it does not look into, of inputs whose strides it leaves alone.
_norm_operator = torch.library.custom_op(
    "cmfast::group_norm_silu", group_norm_silu, mutates_args=(),
    schema="(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale, Tensor? shift, bool silu, "
    "Tensor? add) -> Tensor",
)  # fmt: skip
_norm_operator.register_fake(lambda x, *_: torch.empty_like(x))


def gate(silu: bool) -> float:
    """Return what the kernels add to -v in SiLU's exponential: exp(-inf) = 0 leaves v as it is."""
    return 0.0 if silu else -math.inf


def on_kernels(x: Tensor) -> bool:
    """Return whether the kernels run on x: on CUDA, and anywhere in Triton's interpreter."""
    return x.is_cuda or knobs.runtime.interpret


def check_layout(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be [B, C, H, W] in channels_last, got {list(x.shape)} with strides {x.stride()}")


def _rows(e: Tensor | None, batch: int, channels: int) -> Tensor | None:
    if e is not None and (e.shape != (batch, channels) or e.dtype != torch.float32 or e.stride(1) != 1):
        raise ValueError(f"need [{batch}, {channels}] float32 with dense rows, got {list(e.shape)} {e.dtype}")
    return e


@triton.jit
def _channels(x, add, image, block, width, per_group, add_stride, has_add, BLOCK: tl.constexpr):
    """Return of each channel: whether it is one, its index, its group in the block, pivot and added value."""
    place = tl.arange(0, BLOCK)
    inside = place < width
    c = block * width + place
    group = group_of(place, per_group)
    pivot = tl.load(x + block * width + group * per_group, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(add + image * add_stride + c, mask=inside & (has_add != 0), other=0.0)
    return inside, c, group, pivot, added


@triton.jit
def _moments(x, first, last, channels, per_group, inside, c, group, pivot, added, ROWS: tl.constexpr,
             EVEN: tl.constexpr):  # fmt: skip
    """Return each group's mean, less its pivot, and its sum of squared deviations, over pixels from first to < last.

    Sums of x - near and of its square, near being a channel's mean over the first tile; then Chan's formula over the
    channels of a group. Should the other tiles lie elsewhere: of n tiles at a distance d, the variance is d^2 / n or
    more, so the difference between the two sums loses a factor of n, 16 as a rule.
    """
    raw = read(x, first, last, channels, inside, c, ROWS, EVEN)
    ahead = read(x, first + ROWS, last, channels, inside, c, ROWS, EVEN)  # two tiles on their way while sums wait
    beyond = read(x, first + 2 * ROWS, last, channels, inside, c, ROWS, EVEN)
    value = counted(raw.to(tl.float32) - pivot[:, None], first, last, inside, ROWS, EVEN)
    near = pivot + tl.sum(value, 1) * (1.0 / tl.minimum(last - first, ROWS).to(tl.float32))
    total = counted(raw.to(tl.float32) - near[:, None], first, last, inside, ROWS, EVEN)
    squares = total * total
    for start in range(first + ROWS, last, ROWS):
        value = counted(ahead.to(tl.float32) - near[:, None], start, last, inside, ROWS, EVEN)
        ahead, beyond = beyond, read(x, start + 2 * ROWS, last, channels, inside, c, ROWS, EVEN)
        total += value
        squares += value * value
    pixels = (last - first).to(tl.float32)
    off = tl.sum(total, 1) * (1.0 / pixels)
    squares_of_channel = tl.sum(squares, 1) - pixels * off * off
    squares_of_channel = tl.where(squares_of_channel < 0.0, 0.0, squares_of_channel)  # rounding; NaN stays
    of_channel = (near - pivot) + off + added
    member = members(group)
    of_group = tl.sum(tl.where(member, of_channel[None, :], 0.0), 1) * (1.0 / per_group.to(tl.float32))
    off = of_channel[None, :] - of_group[:, None]
    squares_of_group = tl.sum(tl.where(member, squares_of_channel[None, :] + pixels * off * off, 0.0), 1)
    return of_group, squares_of_group


@triton.jit
def _keep(statistics, of_group, squares_of_group, eps, pixels, per_group, channels, width, image, block, keeps):
    """Return the inverse of each group's deviation; where `keeps`, store it and the mean, less its pivot."""
    inverse = tl.rsqrt(squares_of_group * (1.0 / (pixels * per_group).to(tl.float32)) + eps)
    at = tl.arange(0, GROUPS)
    groups, each = channels // per_group, width // per_group
    statistics += image * 2 * groups + block * each + at
    tl.store(statistics, of_group, mask=(at < each) & keeps)
    tl.store(statistics + groups, inverse, mask=(at < each) & keeps)
    return inverse


@triton.jit
def _write(y, statistics, x, first, last, of_group, squares_of_group, weight, bias, scale, shift, scale_stride,
           shift_stride, has_scale, gate, eps, pixels, per_group, channels, width, image, block, keeps, inside, c,
           group, pivot, added, ROWS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Write the result for the pixels from first to before last, given the statistics of the whole image.

    Where `keeps`, store that too.
    """
    inverse = _keep(
        statistics, of_group, squares_of_group, eps, pixels, per_group, channels, width, image, block, keeps
    )
    member = members(group)
    centre = tl.sum(tl.where(member, of_group[:, None], 0.0), 0)
    factor, offset = affine(weight, bias, scale, shift, image, scale_stride, shift_stride, has_scale, inside, c)
    factor *= tl.sum(tl.where(member, inverse[:, None], 0.0), 0)
    middle = pivot + (centre - added)  # rounded, and what that leaves goes to the offset
    offset += ((middle - pivot) - (centre - added)) * factor
    ahead = read(x, first, last, channels, inside, c, ROWS, EVEN)
    beyond = read(x, first + ROWS, last, channels, inside, c, ROWS, EVEN)
    for start in range(first, last, ROWS):
        value = ahead.to(tl.float32)
        ahead, beyond = beyond, read(x, start + 2 * ROWS, last, channels, inside, c, ROWS, EVEN)
        value = (value - middle[:, None]) * factor[:, None] + offset[:, None]
        value *= sigmoid(value, gate)
        mask = within(start, last, inside, ROWS, EVEN)
        tl.store(y + places(start, channels, c, ROWS), value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _one_kernel(
    y, statistics, x, add, add_stride, has_add, weight, bias, scale, shift, scale_stride, shift_stride, has_scale, gate,
    eps, pixels, per_group, units, blocks, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Statistics and result of some groups of one image. Programs: image, then block of groups, which runs faster."""
    width = units * UNIT
    channels = blocks * width
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    x += image.to(tl.int64) * pixels * channels
    y += image.to(tl.int64) * pixels * channels
    inside, c, group, pivot, added = _channels(x, add, image, block, width, per_group, add_stride, has_add, BLOCK)
    mean, squares = _moments(x, 0, pixels, channels, per_group, inside, c, group, pivot, added, ROWS, EVEN)
    _write(y, statistics, x, 0, pixels, mean, squares, weight, bias, scale, shift, scale_stride, shift_stride,
           has_scale, gate, eps, pixels, per_group, channels, width, image, block, True, inside, c, group, pivot,
           added, ROWS, EVEN)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _held_kernel(
    y, statistics, x, add, add_stride, has_add, weight, bias, scale, shift, scale_stride, shift_stride, has_scale, gate,
    eps, pixels, per_group, units, blocks, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Statistics and result of some groups of one image, of ROWS pixels or fewer, each value read once.

    Programs: image, then block of groups, which runs faster.
    """
    width = units * UNIT
    channels = blocks * width
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    x += image.to(tl.int64) * pixels * channels
    y += image.to(tl.int64) * pixels * channels
    inside, c, group, pivot, added = _channels(x, add, image, block, width, per_group, add_stride, has_add, BLOCK)
    value = read(x, 0, pixels, channels, inside, c, ROWS, EVEN).to(tl.float32)
    value = counted(value - pivot[:, None], 0, pixels, inside, ROWS, EVEN)
    member = members(group)
    of_channel = tl.sum(value, 1) * (1.0 / pixels.to(tl.float32)) + added
    of_group = tl.sum(tl.where(member, of_channel[None, :], 0.0), 1) * (1.0 / per_group.to(tl.float32))
    centre = tl.sum(tl.where(member, of_group[:, None], 0.0), 0) - added
    value = counted(value - centre[:, None], 0, pixels, inside, ROWS, EVEN)
    squares = tl.sum(tl.where(member, tl.sum(value * value, 1)[None, :], 0.0), 1)
    inverse = _keep(statistics, of_group, squares, eps, pixels, per_group, channels, width, image, block, True)
    factor, offset = affine(weight, bias, scale, shift, image, scale_stride, shift_stride, has_scale, inside, c)
    factor *= tl.sum(tl.where(member, inverse[:, None], 0.0), 0)
    value = value * factor[:, None] + offset[:, None]
    value *= sigmoid(value, gate)
    mask = within(0, pixels, inside, ROWS, EVEN)
    tl.store(y + places(0, channels, c, ROWS), value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _parts_kernel(
    parts, x, add, add_stride, has_add, pixels, per_group, units, blocks, pixels_each, chunks,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a chunk of pixels: parts [B, chunks, 2, groups], means, then squared deviations."""
    width = units * UNIT
    channels = blocks * width
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # a chunk of those of all images
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    x += image.to(tl.int64) * pixels * channels
    inside, c, group, pivot, added = _channels(x, add, image, block, width, per_group, add_stride, has_add, BLOCK)
    mean, squares = _moments(x, first, last, channels, per_group, inside, c, group, pivot, added, ROWS, EVEN)
    at = tl.arange(0, GROUPS)
    groups, each = channels // per_group, width // per_group
    parts += chunk * 2 * groups + block * each + at
    tl.store(parts, mean, mask=at < each)
    tl.store(parts + groups, squares, mask=at < each)


@triton.jit(do_not_specialize=NUMBERS)
def _apply_kernel(
    y, statistics, parts, x, add, add_stride, has_add, weight, bias, scale, shift, scale_stride, shift_stride,
    has_scale, gate, eps, pixels, per_group, units, blocks, pixels_each, chunks, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Put the statistics of all chunks together (Chan's formula) and write the result of one."""
    width = units * UNIT
    channels = blocks * width
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    x += image.to(tl.int64) * pixels * channels
    y += image.to(tl.int64) * pixels * channels
    inside, c, group, pivot, added = _channels(x, add, image, block, width, per_group, add_stride, has_add, BLOCK)
    groups, each = channels // per_group, width // per_group
    of_group = tl.arange(0, GROUPS)
    part = tl.arange(0, CHUNKS)
    known = (of_group < each)[:, None] & (part < chunks)[None, :]
    at = (image * chunks + part)[None, :] * 2 * groups + (block * each + of_group)[:, None]
    means = tl.load(parts + at, mask=known, other=0.0)
    squares = tl.load(parts + at + groups, mask=known, other=0.0)
    count = tl.maximum(tl.minimum(pixels - part * pixels_each, pixels_each), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * count, 1) * (1.0 / pixels.to(tl.float32))
    off = means - mean[:, None]
    squares = tl.sum(squares + count * per_group.to(tl.float32) * off * off, 1)
    _write(y, statistics, x, first, last, mean, squares, weight, bias, scale, shift, scale_stride, shift_stride,
           has_scale, gate, eps, pixels, per_group, channels, width, image, block, chunk % chunks == 0, inside, c,
           group, pivot, added, ROWS, EVEN)  # fmt: skip
