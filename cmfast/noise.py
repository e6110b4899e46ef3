# SPDX-License-Identifier: MIT
"""Portable Gaussian noise: the same numbers, to the bit, in every language and on every backend.

    (seed, sample, step, index) --Philox4x32-10--> 32 random bits --> uniform --inverse CDF--> float32

A value depends on its four coordinates and on nothing else, so image 7 of seed 0 is the same image whatever
the batch size. The normal quantile is computed in float64 with + - * / and sqrt only (the logarithm of the
tails is our own), which IEEE 754 rounds correctly everywhere, so implementations agree to the bit as long as
no compiler fuses a multiplication with an addition. tests/golden_noise.json is the proof for each of them.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Quantile: Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988), PPND16.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import need_memory, shown, whole_number
from cmfast.errors import CmfastError

LABEL_STEP = 0xFFFFFFFF  # the stream of the labels; no sampler has that many steps
FACTORS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # Philox4x32: multipliers, steps of the key
_WORD = np.uint64(0xFFFFFFFF)
PEAK = 64  # bytes of memory for a number while it is drawn


def gaussian(
    seed: int, sample: int | Sequence[int] | npt.NDArray[np.integer[Any]], step: int, shape: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Return unit Gaussian noise: the same bits in every language and on every backend.

    Args:
        seed: 0 <= seed < 2**64.
        sample: index of the sample, 0 <= sample < 2**64, or a sequence of B indices.
        step: the network call that the noise is for, from 0.
        shape: of one sample, for example (C, H, W); filled in C order.

    Returns:
        float32 [*shape], or [B, *shape] for a sequence of indices.

    Raises:
        CmfastError: an argument is out of its range, or there is too little memory.
    """
    samples = as_u64(sample, "sample")
    sides = _as_shape(shape)
    size = math.prod(sides)
    need_memory(PEAK * size * len(samples), f"{len(samples)} samples of noise {list(sides)}", "draw fewer at a time")
    bits = _bits(seed, samples, step, (size + 3) // 4).reshape(len(samples), 4 * ((size + 3) // 4))[:, :size]
    values = _normal_quantile(bits).astype(np.float32)
    return values.reshape(sides if np.ndim(sample) == 0 else (len(samples), *sides))


def slices(
    seed: int, samples: Sequence[int] | npt.NDArray[np.integer[Any]], steps: int, shape: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Return the noise of so many steps for a batch of B samples, float32 [steps, B, *shape]: what `sample` takes."""
    return np.stack([gaussian(seed, samples, step, shape) for step in range(steps)])


def labels(
    seed: int, samples: Sequence[int] | npt.NDArray[np.integer[Any]], classes: int, *, step: int = LABEL_STEP
) -> npt.NDArray[np.int64]:
    """Return a class for each sample index, int64 [B], uniform over 0 .. classes - 1; step: the stream of numbers."""
    classes = whole_number("number of classes", classes, 1, 2**32)
    numbers = as_u64(samples, "sample")
    need_memory(4 * PEAK * len(numbers), f"{len(numbers)} labels", "draw fewer at a time")
    first = _bits(seed, numbers, step, 1)[:, 0, 0].astype(np.uint64)
    return ((first * np.uint64(classes)) >> np.uint64(32)).astype(np.int64)


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Return Philox4x32-10 of counters [..., 4], with one key of two 32-bit words; shape [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(FACTORS[0]), c2 * np.uint64(FACTORS[1])
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & _WORD,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & _WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple of ints, or raise CmfastError; a block of four numbers has a counter of 32 bits."""
    try:
        sides = tuple(operator.index(side) for side in shape)
    except (TypeError, ValueError):
        sides = (-1,)
    if any(side < 0 for side in sides) or isinstance(shape, bytes) or math.prod(sides) > 2**34:
        raise CmfastError(
            f"shape must be whole numbers from 0, for example (3, 32, 32), and at most 2**34 in all, got {shown(shape)}"
        )
    return sides


def as_u64(sample: Any, name: str) -> npt.NDArray[np.uint64]:
    """Return indices, 0 <= index < 2**64, as uint64 [B], or raise CmfastError."""
    if isinstance(sample, range) and len(sample):  # numpy makes floats of one across 2**63
        if min(sample[0], sample[-1]) < 0 or max(sample[0], sample[-1]) >= 2**64:
            raise CmfastError(f"{name} must be a whole number from 0, or a list of them, got {shown(sample)}")
        need_memory(24 * len(sample), f"{len(sample)} samples", "draw fewer at a time")
        step = np.uint64(sample.step % 2**64)  # modulo 2**64, where a falling range is a rising one
        return np.arange(len(sample), dtype=np.uint64) * step + np.uint64(sample.start)
    try:
        values = np.atleast_1d(np.asarray(sample))
    except Exception:  # ragged lists; tensors that hold no value here
        values = np.atleast_1d(np.asarray(None))
    if values.size == 0 and values.ndim == 1:
        return np.empty(0, np.uint64)
    if values.dtype.kind in "fO":  # numpy makes floats of a list across 2**63
        exact = np.atleast_1d(np.array(sample, dtype=object))
        if exact.ndim == 1 and exact.size and all(type(v) is int and 0 <= v < 2**64 for v in exact):
            values = exact.astype(np.uint64)
    if values.dtype.kind not in "iu" or values.ndim != 1 or (values.size and int(values.min()) < 0):
        raise CmfastError(f"{name} must be a whole number from 0, or a list of them, got {shown(sample)}")
    return values.astype(np.uint64)


def check_seed(seed: object) -> int:
    """Return a seed as an int, 0 <= seed < 2**64, or raise CmfastError."""
    return _number("seed", seed, 64)


def _number(name: str, value: object, bits: int) -> int:
    try:
        return whole_number(name, value, 0, 2**bits - 1)
    except CmfastError:
        raise CmfastError(f"the {name} must be a whole number from 0 to 2**{bits} - 1, got {shown(value)}") from None


def _bits(seed: int, samples: npt.NDArray[np.uint64], step: int, blocks: int) -> npt.NDArray[np.uint32]:
    """Return random words [B, blocks, 4]: counter = (block, step, sample low, sample high), key = seed."""
    seed = check_seed(seed)
    step = _number("step", step, 32)
    counter = np.empty((len(samples), blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = step
    counter[..., 2] = (samples & _WORD).astype(np.uint32)[:, None]
    counter[..., 3] = (samples >> np.uint64(32)).astype(np.uint32)[:, None]
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


# AS 241, PPND16: numerator and denominator, lowest power first.
CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
# The logarithm: 2 atanh(s) = s * (2 + 2/3 s^2 + 2/5 s^4 + ...).
ATANH = tuple(2.0 / (2 * i + 1) for i in range(11))
LN2 = 0.693147180559945309417


def _normal_quantile(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Return the normal quantile of the uniform (bits + 1/2) / 2**32, float64, same shape.

    The far tail of AS 241 (beyond 5 in its r, probabilities below e**-25) needs 33 bits and is left out.
    """
    q = bits.astype(np.float64) * 2.0**-32 + 2.0**-33 - 0.5  # exact: 33 bits
    r = 0.180625 - q * q
    result: npt.NDArray[np.float64] = q * (polynomial(CENTRE[0], r) / polynomial(CENTRE[1], r))
    tail = np.abs(q) > 0.425
    q = q[tail]
    r = np.sqrt(-_log(0.5 - np.abs(q))) - 1.6  # 0.5 - |q| is the smaller tail's probability, exact
    result[tail] = np.where(q < 0, -1.0, 1.0) * (polynomial(TAIL[0], r) / polynomial(TAIL[1], r))
    return result


def polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Return the polynomial of x, an array or a tensor of float64, from its coefficients, lowest power first."""
    total: Any = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):  # Horner: the order of rounding is part of the definition
        total = total * x + coefficient
    return total


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ln(x) for 0 < x < 1 in plain arithmetic: x = m 2^e, ln(m) = 2 atanh((m - 1) / (m + 1))."""
    m, exponent = np.frexp(x)  # exact
    low = m < 0.70710678118654752
    m = np.where(low, m * 2.0, m)
    e = exponent.astype(np.float64) - low
    s = (m - 1.0) / (m + 1.0)  # |s| <= 0.1716, so ten terms reach 1e-17
    series: npt.NDArray[np.float64] = s * polynomial(ATANH, s * s)
    return e * LN2 + series
