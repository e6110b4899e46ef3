# SPDX-License-Identifier: MIT
"""How the work of the norms in `group_norm` and `group_norm_training` is cut up into programs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton

TILE = 2048  # values of a tensor that a program holds at once: 8 for each of 256 threads
MOST_CHANNELS = 256  # of a program
MOST_GROUPS = 8  # of a program; a power of 2
ONE_PASS = 32768  # values of a program that reads them twice and finds them in the L2 cache the second time
FEW = 16384  # the same where there are too few programs to fill a GPU
ENOUGH = 512  # programs: about four for each multiprocessor of a large GPU
LEAST_BYTES = 32  # neighbouring bytes of a pixel that are worth a read: one sector
MOST_CHUNKS = 128  # of an image; a power of 2
WIDE = 8  # channels of half precision that one load of a thread takes, and half of those in float32


@dataclass(frozen=True)
class Plan:
    """How the work on [B, C, H, W] is cut up into programs."""

    groups: int  # of a program
    chunks: int  # of an image's pixels; 1: one kernel, which reads its values twice
    pixels: int  # of a chunk; the last may have fewer
    rows: int  # pixels that a program holds at once, a power of 2
    block: int  # channels that it holds, a power of 2
    per_group: int  # channels of a group

    def sizes(self, pixels: int, channels: int) -> tuple[int, int, int, int]:
        """Return the kernels' pixels, per_group, units and blocks, for an image of that many pixels and channels."""
        width = self.groups * self.per_group
        return pixels, self.per_group, width // _unit(width), channels // width

    def constants(self, warps: int) -> dict[str, int]:
        """Return what the kernels are compiled for."""
        unit = _unit(self.groups * self.per_group)
        return {"UNIT": unit, "ROWS": self.rows, "BLOCK": self.block, "num_warps": warps}


def make_plan(batch: int, pixels: int, channels: int, groups: int, itemsize: int, tensors: int = 1) -> Plan:
    """Return how a shape is cut up; itemsize in bytes. It depends on the shape only, not on the GPU.

    tensors  of this shape that a program reads twice: so many times fewer values of each
    """
    most = ONE_PASS // tensors
    per_group = channels // groups
    fitting = [n for n in range(1, MOST_GROUPS + 1) if groups % n == 0 and (n == 1 or n * per_group <= MOST_CHANNELS)]
    filling = [n for n in fitting if batch * groups // n >= ENOUGH and n * per_group * pixels <= most]
    one_pass = bool(filling) and _widest(filling, per_group) * per_group * itemsize >= LEAST_BYTES
    one_launch = one_pass or (not filling and per_group * pixels <= FEW)
    each = _widest(filling if one_pass else [1] if one_launch else fitting, per_group)
    block = triton.next_power_of_2(each * per_group)
    rows = max(TILE // block, 1)
    if one_launch:
        return Plan(groups=each, chunks=1, pixels=pixels, rows=rows, block=block, per_group=per_group)
    values = min(max(batch * pixels * channels // ENOUGH, TILE), most)
    least = triton.cdiv(pixels, MOST_CHUNKS)
    part = triton.cdiv(max(values // (each * per_group), least), rows) * rows
    chunks = triton.cdiv(pixels, part)
    return Plan(groups=each, chunks=chunks, pixels=part, rows=rows, block=block, per_group=per_group)


def _widest(counts: list[int], per_group: int) -> int:
    """Return the largest number of groups, of those whose channels can be read UNIT at once where there are any."""
    return max(counts, key=lambda n: (_unit(n * per_group), n))


def _unit(channels: int) -> int:
    return math.gcd(channels, WIDE)
