# SPDX-License-Identifier: MIT
"""Dropout whose masks two passes share although they run in other precisions and memory formats."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dropped(dropout: nn.Module, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return x [B, C, H, W] after dropout and before a convolution; x itself where `dropout` is none or is off.

    The mask depends on the random state and the shape alone. PyTorch's own is drawn in the order of memory and, on
    CUDA, in groups that depend on the dtype, and neither is the same in all passes of a step: a group norm returns
    NCHW on CUDA whatever it was given, its forward derivative (`parallel.jvp`) does not, and central differences are
    float32 (`step_networks`). So the mask has a dtype of its own and x the memory format of the convolution's weights,
    into which the convolution would have copied it.
    """
    if not (isinstance(dropout, nn.Dropout) and dropout.training):
        return x
    plain = conv.weight.is_contiguous()
    x = x.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)
    kept = 1 - dropout.p
    return x * torch.empty_like(x, dtype=torch.bool).bernoulli_(kept) / kept
