# SPDX-License-Identifier: MIT
"""GroupNorm, scale and shift by the noise embedding, and SiLU in one pass over channels_last images; sums that follow.

Nothing here has a derivative; `group_norm_training` adds one. On CUDA these are Triton kernels, on a CPU `normed` and
`summed` in torch operations. The launches depend on shapes alone and nothing waits for the device, so a CUDA graph can
record them. The order of every sum is fixed for a shape: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 4096  # values that a program holds at once: 32 for each of 128 threads
MOST_CHANNELS = 256  # of a program
ONE_PASS = 32768  # values of a program that reads them twice and finds them in the L2 cache the second time
FEW = 16384  # the same where there are too few programs to fill a GPU
ENOUGH = 512  # programs: about four for each multiprocessor of a large GPU
LEAST_BYTES = 32  # neighbouring bytes of a pixel that are worth a read: one sector
MOST_CHUNKS = 128  # of an image


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
    return norm_and_statistics(x, groups, weight, bias, eps, scale, shift, silu, add, keep=False)[0]


def norm_and_statistics(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None,
    silu: bool, add: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `group_norm_silu` does and, from the kernels and with `keep`, the statistics for a derivative.

    The statistics are [B, 2, groups] float32: the mean of a group less its first value, and 1 / its deviation.
    """
    _check(x)
    batch, channels, height, width = x.shape
    if channels % groups:
        raise ValueError(f"{channels} channels are no multiple of {groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together")
    rows = [_rows(e, batch, channels) for e in (scale, shift, add)]
    if not on_kernels(x):
        return normed(x, groups, weight, bias, eps, scale, shift, silu, add), x
    plan = make_plan(batch, height * width, channels, groups, x.element_size())
    y = torch.empty_like(x)  # keeps channels_last
    statistics = torch.empty(batch, 2, groups, dtype=torch.float32, device=x.device) if keep else x
    inputs = (x, weight.contiguous(), bias.contiguous(), *(x if e is None else e for e in rows))
    sizes = (height * width, channels, *(0 if e is None else e.stride(0) for e in rows), eps)
    constants = {
        "PER_GROUP": channels // groups, "CHANNELS": plan.groups * (channels // groups),
        "GROUPS": triton.next_power_of_2(plan.groups), "ROWS": plan.rows, "BLOCK": plan.block,
        "HAS_SCALE": scale is not None, "HAS_ADD": add is not None, "SILU": silu, "num_warps": 4,
    }  # fmt: skip
    programs = batch * plan.chunks * (groups // plan.groups)
    with torch.cuda.device_of(x):
        if plan.chunks == 1:
            _one_kernel[(programs,)](y, statistics, *inputs, *sizes, **constants, KEEP=keep)
            return y, statistics
        parts = torch.empty(2 * batch * plan.chunks * groups, dtype=torch.float32, device=x.device)
        chunk = {"pixels_each": plan.pixels, "chunks": plan.chunks}
        _parts_kernel[(programs,)](parts, *inputs, *sizes, **chunk, **constants)
        _apply_kernel[(programs,)](
            y, statistics, parts, *inputs, *sizes, **chunk, **constants, CHUNKS=triton.next_power_of_2(plan.chunks),
            KEEP=keep,
        )  # fmt: skip
    return y, statistics


def add_residual(x: Tensor, h: Tensor, bias: Tensor, gain: float = 1.0) -> Tensor:
    """Return (x + h + bias) * gain: x and h [B, C, H, W] in channels_last and of one type, bias [C] float32."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.cmfast.add_residual(x, h, bias, gain)
        return y
    _check(x)
    _check(h)
    if x.shape != h.shape or x.dtype != h.dtype:
        raise ValueError(f"a sum of {list(x.shape)} {x.dtype} and {list(h.shape)} {h.dtype}")
    if not on_kernels(x):
        return summed(x, h, bias, gain)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _sum_kernel[(triton.cdiv(x.numel(), 1024),)](y, x, h, bias, x.numel(), gain, CHANNELS=x.shape[1], BLOCK=1024)
    return y


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


def summed(x: Tensor, h: Tensor, bias: Tensor, gain: float = 1.0) -> Tensor:
    """Return what `add_residual` does, in torch operations."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return ((x.to(wide) + h.to(wide) + bias[:, None, None]) * gain).to(x.dtype)


# To torch.compile the two are operators that it does not look into, of inputs whose strides it leaves alone.
_norm_operator = torch.library.custom_op(
    "cmfast::group_norm_silu", group_norm_silu, mutates_args=(),
    schema="(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale, Tensor? shift, bool silu, "
    "Tensor? add) -> Tensor",
)  # fmt: skip
_sum_operator = torch.library.custom_op(
    "cmfast::add_residual", add_residual, mutates_args=(),
    schema="(Tensor x, Tensor h, Tensor bias, float gain) -> Tensor",
)  # fmt: skip
_norm_operator.register_fake(lambda x, *_: torch.empty_like(x))
_sum_operator.register_fake(lambda x, *_: torch.empty_like(x))


@dataclass(frozen=True)
class Plan:
    """How the work on [B, C, H, W] is cut up into programs."""

    groups: int  # of a program
    chunks: int  # of an image's pixels; 1: one kernel, which reads its values twice
    pixels: int  # of a chunk; the last may have fewer
    rows: int  # pixels that a program holds at once, a power of 2
    block: int  # channels that it holds, a power of 2


def make_plan(batch: int, pixels: int, channels: int, groups: int, itemsize: int, tensors: int = 1) -> Plan:
    """Return how a shape is cut up; itemsize in bytes. It depends on the shape only, not on the GPU.

    tensors  of this shape that a program reads: so many times fewer values of each
    """
    tile, most = TILE // tensors, ONE_PASS // tensors
    per_group = channels // groups
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * per_group <= MOST_CHANNELS)]
    filling = [n for n in fitting if batch * groups // n >= ENOUGH and n * per_group * pixels <= most]
    one_pass = bool(filling) and filling[-1] * per_group * itemsize >= LEAST_BYTES
    if one_pass or (not filling and per_group * pixels <= FEW):  # one launch
        each = filling[-1] if one_pass else 1
        block = triton.next_power_of_2(each * per_group)
        rows = min(max(tile // block, 1), triton.next_power_of_2(pixels))
        return Plan(groups=each, chunks=1, pixels=pixels, rows=rows, block=block)
    each = fitting[-1]
    block = triton.next_power_of_2(each * per_group)
    rows = max(tile // block, 1)
    values = min(max(batch * pixels * channels // ENOUGH, tile), most)
    least = triton.cdiv(pixels, MOST_CHUNKS)
    part = triton.cdiv(max(values // (each * per_group), least), rows) * rows
    return Plan(groups=each, chunks=triton.cdiv(pixels, part), pixels=part, rows=rows, block=block)


def on_kernels(x: Tensor) -> bool:
    """Return whether the kernels run on x: on CUDA, and anywhere in Triton's interpreter."""
    return x.is_cuda or knobs.runtime.interpret


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be [B, C, H, W] in channels_last, got {list(x.shape)} with strides {x.stride()}")


def _rows(e: Tensor | None, batch: int, channels: int) -> Tensor | None:
    if e is not None and (e.shape != (batch, channels) or e.dtype != torch.float32 or e.stride(1) != 1):
        raise ValueError(f"need [{batch}, {channels}] float32 with dense rows, got {list(e.shape)} {e.dtype}")
    return e


# What the kernels have in common: a program has CHANNELS neighbouring channels of one image, whole groups, padded to
# BLOCK. A value is read as (x - pivot) + add, where pivot is x at the first pixel and channel of its group: a mean that
# is large beside the deviations then costs no digits.


@triton.jit
def _channels(x, add, image, first_channel, channels, add_stride, PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr,
              BLOCK: tl.constexpr, HAS_ADD: tl.constexpr):  # fmt: skip
    """Return each channel's place in the block, whether it is one, its index, pivot and added value."""
    place = tl.arange(0, BLOCK)
    inside = place < CHANNELS
    c = first_channel + place
    pivot = tl.load(x + first_channel + (place // PER_GROUP) * PER_GROUP, mask=inside, other=0.0).to(tl.float32)
    added = tl.zeros([BLOCK], tl.float32)
    if HAS_ADD:
        added = tl.load(add + image * add_stride + c, mask=inside, other=0.0)
    return place, inside, c, pivot, added


@triton.jit
def _moments(x, first, last, channels, place, inside, c, pivot, added, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Return each group's mean, and its sum of squared deviations, over the pixels from first to before last.

    Welford's recurrence for each place of the tile, then Chan's formula over rows and over the channels of a group.
    """
    row = tl.arange(0, ROWS)
    count = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([BLOCK, ROWS], tl.float32)
    squares = tl.zeros([BLOCK, ROWS], tl.float32)
    for start in range(first, last, ROWS):
        pixel = start + row
        valid = pixel < last
        mask = inside[:, None] & valid[None, :]
        value = tl.load(x + pixel[None, :] * channels + c[:, None], mask=mask, other=0.0).to(tl.float32)
        value = (value - pivot[:, None]) + added[:, None]
        count += tl.where(valid, 1.0, 0.0)
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[None, :]
        squares += delta * (value - mean)
    pixels = (last - first).to(tl.float32)
    of_channel = tl.sum(mean * count[None, :], 1) / pixels
    off = mean - of_channel[:, None]
    squares_of_channel = tl.sum(squares + count[None, :] * off * off, 1)
    member = (tl.arange(0, GROUPS)[:, None] == (place // PER_GROUP)[None, :]) & inside[None, :]
    of_group = tl.sum(tl.where(member, of_channel[None, :], 0.0), 1) / PER_GROUP
    off = of_channel[None, :] - of_group[:, None]
    squares_of_group = tl.sum(tl.where(member, squares_of_channel[None, :] + pixels * off * off, 0.0), 1)
    return of_group, squares_of_group


@triton.jit
def _write(y, x, first, last, of_group, squares_of_group, weight, bias, scale, shift, image, pixels, channels,
           scale_stride, shift_stride, eps, place, inside, c, pivot, added, PER_GROUP: tl.constexpr,
           GROUPS: tl.constexpr, ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Write the result for the pixels from first to before last, given the statistics of the whole image."""
    deviation = tl.sqrt_rn(squares_of_group / (pixels * PER_GROUP).to(tl.float32) + eps)
    member = tl.arange(0, GROUPS)[:, None] == (place // PER_GROUP)[None, :]
    centre = tl.sum(tl.where(member, of_group[:, None], 0.0), 0)
    factor = tl.sum(tl.where(member, tl.div_rn(1.0, deviation)[:, None], 0.0), 0)
    factor *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scaled = 1.0 + tl.load(scale + image * scale_stride + c, mask=inside, other=0.0)
        factor *= scaled
        offset = offset * scaled + tl.load(shift + image * shift_stride + c, mask=inside, other=0.0)
    row = tl.arange(0, ROWS)
    for start in range(first, last, ROWS):
        pixel = start + row
        mask = inside[:, None] & (pixel < last)[None, :]
        at = pixel[None, :] * channels + c[:, None]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        value = (value - pivot[:, None]) + (added - centre)[:, None]
        value = value * factor[:, None] + offset[:, None]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _keep(statistics, image, first_group, channels, of_group, squares_of_group, pixels, eps, wanted,
          PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """Store each group's mean, less its pivot, and the inverse of its deviation, if `wanted`."""
    groups = channels // PER_GROUP
    group = tl.arange(0, GROUPS)
    known = (group < CHANNELS // PER_GROUP) & wanted
    deviation = tl.sqrt_rn(squares_of_group / (pixels * PER_GROUP).to(tl.float32) + eps)
    statistics += image * 2 * groups + first_group + group
    tl.store(statistics, of_group, mask=known)
    tl.store(statistics + groups, tl.div_rn(1.0, deviation), mask=known)


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _one_kernel(
    y, statistics, x, weight, bias, scale, shift, add, pixels, channels, scale_stride, shift_stride, add_stride, eps,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Statistics and result of some groups of one image. Programs: image, then block of groups, which runs faster."""
    blocks = channels // CHANNELS
    image = tl.program_id(0) // blocks
    first_channel = (tl.program_id(0) % blocks) * CHANNELS
    x += image.to(tl.int64) * pixels * channels
    y += image.to(tl.int64) * pixels * channels
    place, inside, c, pivot, added = _channels(x, add, image, first_channel, channels, add_stride, PER_GROUP, CHANNELS,
                                               BLOCK, HAS_ADD)  # fmt: skip
    mean, squares = _moments(x, 0, pixels, channels, place, inside, c, pivot, added, PER_GROUP, GROUPS, ROWS, BLOCK)
    if KEEP:
        _keep(statistics, image, first_channel // PER_GROUP, channels, mean, squares, pixels, eps, True, PER_GROUP,
              CHANNELS, GROUPS)  # fmt: skip
    _write(y, x, 0, pixels, mean, squares, weight, bias, scale, shift, image, pixels, channels, scale_stride,
           shift_stride, eps, place, inside, c, pivot, added, PER_GROUP, GROUPS, ROWS, HAS_SCALE, SILU)  # fmt: skip


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _parts_kernel(
    parts, x, weight, bias, scale, shift, add, pixels, channels, scale_stride, shift_stride, add_stride, eps,
    pixels_each, chunks,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a chunk of pixels: parts [B, chunks, 2, groups], means, then squared deviations."""
    blocks = channels // CHANNELS
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks  # over all images
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    x += image.to(tl.int64) * pixels * channels
    place, inside, c, pivot, added = _channels(x, add, image, block * CHANNELS, channels, add_stride, PER_GROUP,
                                               CHANNELS, BLOCK, HAS_ADD)  # fmt: skip
    mean, squares = _moments(x, first, last, channels, place, inside, c, pivot, added, PER_GROUP, GROUPS, ROWS, BLOCK)
    groups = channels // PER_GROUP
    group = tl.arange(0, GROUPS)
    known = group < CHANNELS // PER_GROUP
    parts += chunk * 2 * groups + block * (CHANNELS // PER_GROUP) + group
    tl.store(parts, mean, mask=known)
    tl.store(parts + groups, squares, mask=known)


@triton.jit(do_not_specialize=["pixels"])  # one pixel would be a constant, which has no type
def _apply_kernel(
    y, statistics, parts, x, weight, bias, scale, shift, add, pixels, channels, scale_stride, shift_stride, add_stride,
    eps, pixels_each, chunks,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr, CHUNKS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Put the statistics of all chunks together (Chan's formula) and write the result of one."""
    blocks = channels // CHANNELS
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    image = chunk // chunks
    first = (chunk % chunks) * pixels_each
    last = tl.minimum(first + pixels_each, pixels)
    x += image.to(tl.int64) * pixels * channels
    y += image.to(tl.int64) * pixels * channels
    place, inside, c, pivot, added = _channels(x, add, image, block * CHANNELS, channels, add_stride, PER_GROUP,
                                               CHANNELS, BLOCK, HAS_ADD)  # fmt: skip
    groups = channels // PER_GROUP
    group = tl.arange(0, GROUPS)
    part = tl.arange(0, CHUNKS)
    known = (group < CHANNELS // PER_GROUP)[:, None] & (part < chunks)[None, :]
    at = (image * chunks + part)[None, :] * 2 * groups + (block * (CHANNELS // PER_GROUP) + group)[:, None]
    means = tl.load(parts + at, mask=known, other=0.0)
    squares = tl.load(parts + at + groups, mask=known, other=0.0)
    count = tl.maximum(tl.minimum(pixels - part * pixels_each, pixels_each), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * count, 1) / pixels.to(tl.float32)
    off = means - mean[:, None]
    squares = tl.sum(squares + count * PER_GROUP * off * off, 1)
    if KEEP:
        _keep(statistics, image, block * (CHANNELS // PER_GROUP), channels, mean, squares, pixels, eps,
              chunk % chunks == 0, PER_GROUP, CHANNELS, GROUPS)  # fmt: skip
    _write(y, x, first, last, mean, squares, weight, bias, scale, shift, image, pixels, channels, scale_stride,
           shift_stride, eps, place, inside, c, pivot, added, PER_GROUP, GROUPS, ROWS, HAS_SCALE, SILU)  # fmt: skip


@triton.jit
def _sum_kernel(y, x, h, bias, values, gain, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < values - first
    c = ((first % CHANNELS).to(tl.int32) + place) % CHANNELS
    total = tl.load(x + first + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(h + first + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + c, mask=inside, other=0.0)
    tl.store(y + first + place, (total * gain).to(y.dtype.element_ty), mask=inside)
