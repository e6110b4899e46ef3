# SPDX-License-Identifier: MIT
"""The portable noise of `cmfast.noise` as one Triton kernel, the same bits.

Everything about a number happens in registers; only the float32 is written. What makes the bits equal: integers are
uint32, the quantile is float64 with correctly rounded / and sqrt, and `enable_fp_fusion=False` at the launch, without
which the compiler fuses multiplications with additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast import noise as portable

BLOCK = 256  # counters of a program; each gives four numbers

_CENTRE_TOP, _CENTRE_BOTTOM = (tl.constexpr(each) for each in portable.CENTRE)
_TAIL_TOP, _TAIL_BOTTOM = (tl.constexpr(each) for each in portable.TAIL)
_ATANH, _LN2 = tl.constexpr(portable.ATANH), tl.constexpr(portable.LN2)


def gaussian(key: Tensor, samples: Tensor, slices: int, size: int, first: int = 0) -> Tensor:
    """Return unit Gaussian noise, float32 [slices, B, size]; the arguments are those of `torch_noise.gaussian`."""
    noise = torch.empty(slices, len(samples), size, dtype=torch.float32, device=samples.device)
    if noise.numel():
        tiles = triton.cdiv(size, 4 * BLOCK)
        with torch.cuda.device_of(samples):
            draw[(slices * len(samples) * tiles,)](
                noise, key, samples, len(samples), size, first, tiles, BLOCK=BLOCK, enable_fp_fusion=False
            )
    return noise


@triton.jit
def draw(noise, key, samples, images, size, first, tiles, BLOCK: tl.constexpr):
    """Fill one tile, 4 BLOCK numbers of one row of the noise [slices * images, size]."""
    program = tl.program_id(0)
    row, tile = program // tiles, program % tiles
    sample = tl.load(samples + row % images)
    seed = tl.load(key + 1) << 32 | tl.load(key)
    block = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    step, low, high = (row // images + first).to(tl.uint32), sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    none = tl.zeros_like(block)
    a, b, c, d = tl.philox(seed, block, none + step, none + low, none + high)
    bits = tl.join(tl.join(a, c), tl.join(b, d)).reshape(4 * BLOCK)  # a, b, c, d of each block in turn
    index = tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(noise + row.to(tl.int64) * size + index, quantile(bits).to(tl.float32), mask=index < size)


@triton.jit
def quantile(bits):
    """`cmfast.noise._normal_quantile` of uint32; centre and tail are both computed, as threads do together anyway."""
    q = bits.to(tl.float64) * 2.0**-32 + 2.0**-33 - 0.5
    r = 0.180625 - q * q
    centre = q * (_polynomial(_CENTRE_TOP, 7, r) / _polynomial(_CENTRE_BOTTOM, 7, r))
    r = tl.sqrt(-_log(0.5 - tl.abs(q))) - 1.6
    tail = _polynomial(_TAIL_TOP, 7, r) / _polynomial(_TAIL_BOTTOM, 7, r)
    return tl.where(tl.abs(q) > 0.425, tl.where(q < 0, -tail, tail), centre)


@triton.jit
def _log(x):
    word = x.to(tl.int64, bitcast=True)  # frexp, for x is positive and not tiny
    e = (word >> 52) - 1022
    m = (word & 0xFFFFFFFFFFFFF | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = m < 0.70710678118654752
    m = tl.where(low, m * 2.0, m)
    s = (m - 1.0) / (m + 1.0)
    return (e - low.to(tl.int64)).to(tl.float64) * _LN2 + s * _polynomial(_ATANH, 10, s * s)


@triton.jit
def _polynomial(coefficients: tl.constexpr, degree: tl.constexpr, x):
    total = tl.full(x.shape, coefficients[degree], tl.float64)
    for i in tl.static_range(1, degree + 1):
        total = total * x + coefficients[degree - i]
    return total
