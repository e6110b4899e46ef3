# SPDX-License-Identifier: MIT
"""The model f(x, sigma): a network inside its preconditioning. What is trained, exported and sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmfast.precond import noise_condition, scalings
from cmfast.spec import ModelSpec
from cmfast_train.networks.precision import TRUNKS, cast, convert_trunk


class Denoiser(nn.Module):
    """f(x, sigma, label): x [B, C, H, W] float32, sigma [B] noise levels, label [B] int64 -> x0 [B, C, H, W].

    Everything outside the network is float32, whatever the network runs in. Formulas: `cmfast.precond`.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.trunk = torch.float32  # what the network's convolutions compute in

    def to_precision(self, precision: str) -> Denoiser:
        """Convert the network's trunk, in place, and return the model.

        precision  fp32, tf32, fp16 or bf16. In half precision are the convolutions and the attention between them; the
                   scalings, the noise embedding, the statistics of the norms and the skip/out sum stay float32, and so
                   do the inputs and the output. tf32 changes no weight: it is how a GPU multiplies float32
        """
        self.trunk = TRUNKS[precision]
        convert_trunk(self.network, self.trunk)
        return self

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in = scalings(sigma[:, None, None, None], self.spec)
        c_noise = noise_condition(sigma, self.spec, torch)
        scaled = cast(c_in * x, self.trunk)
        network = self.network(scaled, c_noise, label) if self.spec.classes else self.network(scaled, c_noise)
        return c_skip * x + c_out * network
