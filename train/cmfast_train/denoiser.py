# SPDX-License-Identifier: MIT
"""The model f(x, sigma): a network inside its preconditioning. What is trained, exported and sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmfast.preconditioning import noise_condition, scalings
from cmfast.spec import ModelSpec
from cmfast_train.networks.precision import TRUNKS, cast, convert_trunk


class Denoiser(nn.Module):
    """f(x, sigma, label): x [B, C, H, W] float32, sigma [B] noise levels, label [B] int64 -> x0 [B, C, H, W].

    Everything outside the network is float32, whatever the network runs in. Formulas: `cmfast.preconditioning`.
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
        return denoised(self.output(x, sigma, label), x, sigma, self.spec)

    def output(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        """Return F(c_in x, c_noise(sigma), label), what the network says, [B, C, H, W] float32.

        second  noise levels [B] from 0, data units, of a network with two times: MeanFlow's r
        """
        _, _, c_in = scalings(sigma[:, None, None, None], self.spec)
        inputs = [cast(c_in * x, self.trunk), noise_condition(sigma, self.spec, torch)]
        if self.spec.classes or second is not None:
            inputs.append(label if self.spec.classes else None)
        if second is not None:
            inputs.append(noise_condition(second, self.spec, torch))
        output: Tensor = self.network(*inputs)
        return output


def denoised(output: Tensor, x: Tensor, sigma: Tensor, spec: ModelSpec) -> Tensor:
    """Return f = c_skip x + c_out F, [B, C, H, W], from what the network said."""
    c_skip, c_out, _ = scalings(sigma[:, None, None, None], spec)
    f: Tensor = c_skip * x + c_out * output
    return f
