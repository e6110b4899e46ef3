# SPDX-License-Identifier: MIT
"""What the networks share about number formats: the noise level stays float32, whatever the trunk runs in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast on the device of x; without autocast, one that leaves no mark in a trace."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this dtype; casts to the same type slow down every trace."""
    return x if x.dtype == dtype else x.to(dtype)
