# SPDX-License-Identifier: MIT
"""The model f(x, sigma): a network inside its preconditioning. What is trained, exported and sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmfast.precond import noise_condition, scalings
from cmfast.spec import ModelSpec


class Denoiser(nn.Module):
    """f(x, sigma, label): x [B, C, H, W] float32, sigma [B] noise levels, label [B] int64 -> x0 [B, C, H, W].

    Everything outside the network is float32, whatever the network runs in. Formulas: `cmfast.precond`.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in = scalings(sigma[:, None, None, None], self.spec)
        c_noise = noise_condition(sigma, self.spec, torch)
        network = self.network(c_in * x, c_noise, label) if self.spec.classes else self.network(c_in * x, c_noise)
        return c_skip * x + c_out * network
