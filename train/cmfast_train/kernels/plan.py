# SPDX-License-Identifier: MIT
"""How the work of the norms in `group_norm` and `group_norm_training` is cut up into programs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import triton

HELD = (8192, 2048)  # values of a program that keeps those of one tensor, or of each of two, in its registers
HELD_EACH = (64, 32)  # of a thread, of each tensor
DENSE = 0.7  # of these that are values, the rest filling up a power of 2
FEW_EACH = 16  # of a thread where programs are too few to hide each other's waiting
AT_ONCE = 16  # values that a thread has in hand where programs read twice, so that the loop itself costs little
LARGE = 24576  # values of a program that is worth 256 threads; fewer are worth 128
MOST_CHANNELS = 256  # of a program
MOST_GROUPS = 8  # of a program; a power of 2
MOST_PER_GROUP = 4096  # channels: `tiles.group_of` divides by no more
ONE_PASS = 32768  # values of a program that reads them twice and finds them in the L2 cache the second time
FEW = 16384  # the same where there are too few programs to fill a GPU
ENOUGH = 512  # programs: about four for each multiprocessor of a large GPU
LEAST_BYTES = 32  # neighbouring bytes of a pixel that are worth a read: one sector
GOOD_BYTES = 48  # from here on it matters little
MOST_CHUNKS = 128  # of an image; a power of 2
WIDE = 8  # channels of half precision that one load of a thread takes, and half of those in float32


@dataclass(frozen=True)
class Plan:
    """How the work on [B, C, H, W] is cut up into programs."""

    groups: int  # of a program
    chunks: int  # of an image's pixels; 1: one kernel
    pixels: int  # of a chunk; the last may have fewer
    held: bool  # one kernel, which reads its values once; else it reads them twice
    rows: int  # pixels that a program has in hand at once, a power of 2
    block: int  # channels of these, a power of 2
    per_group: int  # channels of a group
    even: bool  # an image is a whole number of `rows`
    warps: int  # of a program

    def sizes(self, pixels: int, channels: int) -> tuple[int, int, int, int]:
        """Return the kernels' pixels, per_group, units and blocks, for an image of that many pixels and channels."""
        width = self.groups * self.per_group
        return pixels, self.per_group, width // _unit(width), channels // width

    def constants(self) -> dict[str, int]:
        """Return what the kernels are compiled for."""
        unit = _unit(self.groups * self.per_group)
        return {"UNIT": unit, "ROWS": self.rows, "BLOCK": self.block, "EVEN": self.even, "num_warps": self.warps}


@functools.lru_cache(maxsize=1024)  # every norm asks at every call
def make_plan(batch: int, pixels: int, channels: int, groups: int, itemsize: int, tensors: int = 1) -> Plan:
    """Return how a shape is cut up; itemsize in bytes. It depends on the shape only, not on the GPU.

    Args:
        tensors: of this shape that a program reads: so many times fewer values of each
    """
    per_group = channels // groups
    fitting = [n for n in range(1, MOST_GROUPS + 1) if groups % n == 0 and (n == 1 or n * per_group <= MOST_CHANNELS)]
    return _held(batch, pixels, channels, groups, itemsize, tensors, fitting) or _twice(
        batch, pixels, channels, groups, itemsize, tensors, fitting
    )


def _held(
    batch: int, pixels: int, channels: int, groups: int, itemsize: int, tensors: int, fitting: list[int]
) -> Plan | None:
    """Return a plan for a kernel that reads each value once, where its threads can keep them."""
    per_group, rows = channels // groups, int(triton.next_power_of_2(pixels))

    def values(n: int) -> int:
        return int(triton.next_power_of_2(n * per_group)) * rows

    most, of_thread = HELD[tensors - 1], HELD_EACH[tensors - 1]
    dense = [n for n in fitting if n * per_group * pixels >= DENSE * values(n)]
    holding = [
        n for n in dense
        if values(n) <= most and batch * groups // n >= ENOUGH and n * per_group * itemsize >= LEAST_BYTES
    ]  # fmt: skip
    if holding:
        # The fewest channels that are read well and give a warp its work.
        each = min(
            holding,
            key=lambda n: (values(n) < 32 * of_thread, n * per_group * itemsize < GOOD_BYTES, -_unit(n * per_group), n),
        )
    elif batch * groups < ENOUGH and per_group * pixels <= FEW and values(1) <= most:
        each, of_thread = 1, FEW_EACH
    else:
        return None
    size = values(each)
    return Plan(
        groups=each, chunks=1, pixels=pixels, held=True, rows=rows, block=size // rows, per_group=per_group,
        even=rows == pixels, warps=min(max(size // (32 * of_thread), 1), 8),
    )  # fmt: skip


def _twice(
    batch: int, pixels: int, channels: int, groups: int, itemsize: int, tensors: int, fitting: list[int]
) -> Plan:
    """Return a plan for kernels that read each value twice: one, or two where that fills a GPU."""
    most, per_group = ONE_PASS // tensors, channels // groups
    filling = [n for n in fitting if batch * groups // n >= ENOUGH and n * per_group * pixels <= most]
    one_pass = bool(filling) and _widest(filling, per_group) * per_group * itemsize >= LEAST_BYTES
    one_launch = one_pass or (not filling and per_group * pixels <= FEW)
    each = _widest(filling if one_pass else [1] if one_launch else fitting, per_group)
    block = triton.next_power_of_2(each * per_group)
    warps = 8 if tensors == 1 and (not one_launch or each * per_group * pixels >= LARGE) else 4
    rows = max(32 * warps * AT_ONCE // block, 1)
    cut = {"groups": each, "held": False, "rows": rows, "block": block, "per_group": per_group, "warps": warps}
    even = pixels % rows == 0
    if one_launch:
        return Plan(chunks=1, pixels=pixels, even=even, **cut)
    values = min(max(batch * pixels * channels // ENOUGH, rows * block), most)
    least = triton.cdiv(pixels, MOST_CHUNKS)
    part = triton.cdiv(max(values // (each * per_group), least), rows) * rows
    return Plan(chunks=triton.cdiv(pixels, part), pixels=part, even=even, **cut)


def _widest(counts: list[int], per_group: int) -> int:
    """Return the largest number of groups, of those whose channels can be read UNIT at once where there are any."""
    return max(counts, key=lambda n: (_unit(n * per_group), n))


def _unit(channels: int) -> int:
    return math.gcd(channels, WIDE)
