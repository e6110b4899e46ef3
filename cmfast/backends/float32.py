# SPDX-License-Identifier: MIT
"""Whether a library multiplies float32 as float32: two products whose error against float64 tells.

    errors = measured(multiply, convolve)      # of what is to be tested
    check(errors, "PyTorch on cuda")           # raises where it is not

GPU libraries multiply float32 as TensorFloat-32 on tensor cores unless told otherwise, each by a switch of its own,
and not every switch reaches every kernel: so the number is measured, and the switch is not believed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from cmfast.errors import BackendError

Floats = npt.NDArray[np.float32]

# Every operand is a multiple of 1/32 in [1, 2), which all formats hold, plus 2^-12, which only float32 does. Rounded
# to TensorFloat-32 or to half precision, a product so loses 2^-11 / 1.5 of itself, 3.3e-4. All are positive, so no sum
# cancels: one of 576 float32 products is off by 576 * 2^-24 at the very most, 3.4e-5, and by 2e-6 as libraries sum.
LIMIT = 2.0**-13
TERMS = 576  # of a sum: 64 channels of 3 x 3
SIDE, CHANNELS, BATCH = 16, 64, 8  # large enough for tensor cores to be chosen where they are allowed


def measured(
    multiply: Callable[[Floats, Floats], Floats], convolve: Callable[[Floats, Floats], Floats]
) -> dict[str, float]:
    """Return the largest relative error of the library's matrix product and of its convolution.

    Args:
        multiply: a [512, 576], b [576, 512] -> a b
        convolve: x [8, 64, 16, 16], w [64, 64, 3, 3] -> their convolution without padding, [8, 64, 14, 14]
    """
    return {
        "product": _error(multiply(*product_operands()), _exact_product()),
        "convolution": _error(convolve(*convolution_operands()), _exact_convolution()),
    }


def check(errors: Mapping[str, float], name: str) -> None:
    """Raise BackendError where an error of `measured` is larger than float32's."""
    if off := [f"{what} by {error:.1e}" for what, error in errors.items() if not error < LIMIT]:
        raise BackendError(
            f"{name} was to multiply float32 as float32, and is off ({', '.join(off)}; float32: {LIMIT:.1e} at most), "
            "as TensorFloat-32 is; set NVIDIA_TF32_OVERRIDE=0 in the environment, which no library overrides, or "
            "choose another precision"
        )


@functools.cache
def product_operands() -> tuple[Floats, Floats]:
    """Return a [512, 576] and b [576, 512]."""
    return _operand(0, 512, TERMS), _operand(1, TERMS, 512)


@functools.cache
def convolution_operands() -> tuple[Floats, Floats]:
    """Return x [8, 64, 16, 16] and w [64, 64, 3, 3]."""
    return _operand(2, BATCH, CHANNELS, SIDE, SIDE), _operand(3, CHANNELS, CHANNELS, 3, 3)


def _operand(seed: int, *shape: int) -> Floats:
    coarse = 1 + np.random.default_rng(seed).integers(0, 32, shape) / 32
    return (coarse + 2.0**-12).astype(np.float32)


@functools.cache
def _exact_product() -> npt.NDArray[np.float64]:
    a, b = (each.astype(np.float64) for each in product_operands())
    product: npt.NDArray[np.float64] = a @ b
    return product


@functools.cache
def _exact_convolution() -> npt.NDArray[np.float64]:
    x, w = (each.astype(np.float64) for each in convolution_operands())
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))  # [B, C, H - 2, W - 2, 3, 3]
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, TERMS)
    return (rows @ w.reshape(CHANNELS, TERMS).T).reshape(BATCH, SIDE - 2, SIDE - 2, CHANNELS).transpose(0, 3, 1, 2)


def _error(result: Floats, exact: npt.NDArray[np.float64]) -> float:
    return float(np.max(np.abs(result - exact) / exact))  # not a number where the result is none
