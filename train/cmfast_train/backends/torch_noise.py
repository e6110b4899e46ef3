# SPDX-License-Identifier: MIT
"""The portable noise of `cmfast.noise` in tensor operations, the same bits, on any device of PyTorch.

On CUDA one Triton kernel draws it where Triton works (`cmfast_train.kernels.noise`). Everywhere else it is made of the
eager operations below: integers in int64, the quantile in float64. An eager operation rounds once, so no
multiplication is fused with an addition; do not compile this module, because a compiler fuses them. On a CPU numpy
draws several times faster; there this module is for tests.

Seeds and indices are tensors, so that one CUDA graph draws any seed and any images.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cmfast.errors import CmfastWarning, one_line
from cmfast.noise import ATANH, CENTRE, FACTORS, LABEL_STEP, LN2, TAIL, WEYL, check_seed, polynomial

_WORD = 0xFFFFFFFF


def gaussian(key: Tensor, samples: Tensor, slices: int, shape: Sequence[int], *, first: int = 0) -> Tensor:
    """Return unit Gaussian noise, float32 [slices, B, *shape]; slice k is `cmfast.noise.gaussian` of step first + k.

    Args:
        key: the seed as `key_of` makes it, int64 [2], on the device of the samples
        samples: indices of the images, int64 [B]; one from 2**63 on is the negative number of the same bits
        slices: how many steps' noise
        shape: of one sample, for example (C, H, W); filled in C order
        first: the first of the steps, which all stay below 2**32
    """
    size = math.prod(shape)
    if samples.device.type == "cuda" and has_triton() and kernel_works(samples.device):
        from cmfast_train.kernels.noise import gaussian as on_card

        return on_card(key, samples, slices, size, first).view(slices, len(samples), *shape)
    return _by_operations(key, samples, slices, size, first).view(slices, len(samples), *shape)


def labels(key: Tensor, samples: Tensor, classes: int) -> Tensor:
    """Return a class for each sample index, int64 [B]: `cmfast.noise.labels`."""
    return _high(_bits(key, samples, LABEL_STEP, 1)[:, 0], classes)


def key_of(seed: int) -> Tensor:
    """Return the key of a seed, 0 <= seed < 2**64: its low and its high 32 bits, int64 [2], on the CPU."""
    seed = check_seed(seed)
    return torch.tensor([seed & _WORD, seed >> 32], dtype=torch.int64)


def has_triton() -> bool:
    """Whether Triton is installed, which is imported when the first kernel is launched."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # it is None in sys.modules: forbidden
        return False


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether the Triton kernel draws on a device: a few numbers are drawn and compared. If not, warn once.

    Triton comes with PyTorch, but needs a C compiler, Python's headers and a card that it knows.
    """
    key, samples = key_of(0).to(device), torch.arange(2, device=device)
    try:
        from cmfast_train.kernels.noise import gaussian as on_card

        same = torch.equal(on_card(key, samples, 1, 5), _by_operations(key, samples, 1, 5, 0))
        why = "" if same else "its kernel draws other numbers"
    except torch.OutOfMemoryError:
        raise
    except Exception as err:
        why = one_line(err, 200)
    if why:
        warnings.warn(
            f"Triton does not work on {device} ({why}); noise is drawn without it: the same bits, more slowly",
            CmfastWarning,
            stacklevel=2,
        )
    return not why


def quantile(bits: Tensor) -> Tensor:
    """Return the normal quantile of the uniform (bits + 1/2) / 2**32, float64: `cmfast.noise._normal_quantile`.

    Centre and tail are both computed everywhere: a choice of elements would have a size that a CUDA graph cannot have.
    """
    q = bits.double() * 2.0**-32 + 2.0**-33 - 0.5
    r = 0.180625 - q * q
    centre = q * (polynomial(CENTRE[0], r) / polynomial(CENTRE[1], r))
    r = _sqrt(-_log(0.5 - q.abs())) - 1.6
    tail = (polynomial(TAIL[0], r) / polynomial(TAIL[1], r)).copysign(q)
    return torch.where(q.abs() > 0.425, tail, centre)


def _by_operations(key: Tensor, samples: Tensor, slices: int, size: int, first: int) -> Tensor:
    noise = torch.empty(slices, len(samples), size, dtype=torch.float32, device=samples.device)
    for k in range(slices):  # one at a time: what is in between is several times as large
        noise[k] = quantile(_bits(key, samples, first + k, (size + 3) // 4)[:, :size])
    return noise


def _sqrt(x: Tensor) -> Tensor:
    """Return the root, rounded correctly. PyTorch's on the CPU is not, where a library of Intel's computes it."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _log(x: Tensor) -> Tensor:
    m, e = torch.frexp(x)
    low = m < 0.70710678118654752
    m = torch.where(low, m * 2.0, m)
    s = (m - 1.0) / (m + 1.0)
    log: Tensor = (e - low.int()).double() * LN2 + s * polynomial(ATANH, s * s)
    return log


def _bits(key: Tensor, samples: Tensor, step: int, blocks: int) -> Tensor:
    """Return random words [B, 4 blocks]: Philox4x32-10 of (block, step, sample low, sample high) and the key."""
    block = torch.arange(blocks, device=samples.device)
    c0, c1 = block[None, :], torch.full_like(block, step)[None, :]
    c2, c3 = (samples & _WORD)[:, None], (samples >> 32 & _WORD)[:, None]
    k0, k1 = key[0], key[1]
    for i in range(10):
        if i:
            k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
        c0, c1, c2, c3 = (
            _high(c2, FACTORS[1]) ^ c1 ^ k0,
            c2 * FACTORS[1] & _WORD,
            _high(c0, FACTORS[0]) ^ c3 ^ k1,
            c0 * FACTORS[0] & _WORD,
        )
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)


def _high(word: Tensor, factor: int) -> Tensor:
    """Return the upper 32 bits of a product of words; int64 wraps, and holds the bits of all 64."""
    return word * factor >> 32 & _WORD
