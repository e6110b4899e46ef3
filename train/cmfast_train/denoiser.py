# SPDX-License-Identifier: MIT
"""The model f(x, sigma): a network inside its preconditioning. What is trained, exported and sampled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast.preconditioning import LOGARITHMS, noise_condition, scalings
from cmfast.spec import ModelSpec
from cmfast_train.networks.precision import BACKBONES, cast, convert_backbone


class Denoiser(nn.Module):
    """f(x, sigma, **conditions): x [B, *shape] float32, sigma [B] noise levels -> x0 [B, *shape] float32.

    Conditions are those of `ModelSpec.conditions`, by name: int64 [B] of a class, float32 [B, *shape] of a tensor. The
    network is called as network(c_in x, c_noise, **conditions), and where it takes a second noise level also with
    c_noise_next. Everything outside it is float32, whatever it runs in. Formulas: `cmfast.preconditioning`.

    Args:
        network: F, any module with this call; [B, *shape] -> [B, *shape].
        spec: the conventions of the model.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.backbone = torch.float32  # what the network's convolutions compute in

    def to_precision(self, precision: str) -> Denoiser:
        """Convert the network's backbone, in place.

        Args:
            precision: fp32, tf32, fp16 or bf16. In half precision are the convolutions and the attention between
                them; the scalings, the noise embedding, the statistics of the norms and the skip/out sum stay
                float32, and so do the inputs and the output. tf32 changes no weight: it is how a GPU multiplies
                float32.

        Returns:
            This model.
        """
        self.backbone = BACKBONES[precision]
        convert_backbone(self.network, self.backbone)
        return self

    def forward(self, x: Tensor, sigma: Tensor, sigma_next: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """Return x0 = c_skip x + c_out F(c_in x, c_noise, **conditions).

        Args:
            x: [B, *shape] float32, data units plus noise.
            sigma: noise levels [B], data units.
            sigma_next: noise levels [B] to go to, of a network with a second time; None: 0.
            **conditions: values by name, [B] or [B, *shape].

        Returns:
            x0 [B, *shape] float32, data units, not clipped.
        """
        return denoised(self.output(x, sigma, conditions, sigma_next), x, sigma, self.spec)

    def output(
        self, x: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], sigma_next: Tensor | None = None
    ) -> Tensor:
        """Return the network's output F(c_in x, c_noise(sigma), **conditions).

        Args:
            x: [B, *shape] float32, data units plus noise.
            sigma: noise levels [B], data units.
            conditions: values by name, [B] or [B, *shape].
            sigma_next: noise levels [B] from 0, data units, of a network with a second time: MeanFlow's r, CTM's s.
                Where c_noise is a logarithm, it begins at sigma_min.

        Returns:
            F [B, *shape], float32 unless the network's backbone is in half precision.

        Raises:
            CmfastError: a condition is missing, the model has none of that name, or the network returned another shape
                than it was given.
        """
        wanted = [condition.name for condition in self.spec.conditions]
        if list(conditions) != wanted and sorted(conditions) != sorted(wanted):
            raise CmfastError(
                f"this model has the conditions {', '.join(wanted) or 'none'}, got {', '.join(conditions) or 'none'}"
            )
        _, _, c_in = scalings(expand(sigma, x), self.spec)
        if self.spec.second_time and sigma_next is None:
            sigma_next = torch.zeros_like(sigma)
        times = {}
        if sigma_next is not None:
            least = self.spec.sigma_min if self.spec.c_noise in LOGARITHMS else 0.0
            times["c_noise_next"] = noise_condition(sigma_next.clamp(min=least), self.spec, torch)
        output: Tensor = self.network(
            cast(c_in * x, self.backbone), noise_condition(sigma, self.spec, torch), **times, **conditions
        )
        # Another shape would be broadcast to that of x without a word.
        if not isinstance(output, Tensor) or output.ndim != x.ndim or output.shape[1:] != x.shape[1:]:
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CmfastError(f"the network returned {what}, and must return [B, {str(list(x.shape[1:]))[1:]}")
        return output


def denoised(output: Tensor, x: Tensor, sigma: Tensor, spec: ModelSpec) -> Tensor:
    """Return f = c_skip x + c_out F, [B, *shape], from the network's output F."""
    c_skip, c_out, _ = scalings(expand(sigma, x), spec)
    f: Tensor = c_skip * x + c_out * output
    return f


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Return values [B] with as many axes as `like` [B, ...], of size 1, to multiply with it."""
    return values[(slice(None), *[None] * (like.ndim - 1))]
