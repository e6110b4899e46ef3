# SPDX-License-Identifier: MIT
"""Group norm, scale and shift, and SiLU in one kernel with a derivative, where the U-Nets are trained on CUDA.

`fuse_norms` sets a flag on the norms of a network, which stays the same network with the same weights. What the flag
does not serve (exports, torch.compile, forward-mode derivatives, other memory formats) runs as it is written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def fuse_norms(network: nn.Module) -> None:
    """Let the norms of a network use the fused kernels wherever `fuses` says so, in place."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.fused = True  # type: ignore[assignment]


def fuses(norm: nn.Module, x: Tensor) -> bool:
    """Return whether `normalised` is to be called with x [B, C, H, W] instead of the norm."""
    return (
        bool(getattr(norm, "fused", False))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and forward_ad.unpack_dual(x).tangent is None
    )


def normalised(norm: nn.Module, x: Tensor, e: Tensor | None = None, silu: bool = True) -> Tensor:
    """Return norm(x), after scale and shift by e [B, 2 C] where it is given, and after SiLU unless told otherwise."""
    from cmfast_train.kernels.group_norm_training import norm_act

    assert isinstance(norm, nn.GroupNorm)
    scale, shift = (None, None) if e is None else e.float().chunk(2, dim=1)
    return norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, shift, silu)
