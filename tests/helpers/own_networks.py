# SPDX-License-Identifier: MIT
"""Networks as people have them, tiny: none of cmfast's, every weight random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed(t: Tensor, width: int = 8) -> Tensor:
    """Return sines and cosines of a noise level [B], [B, width]."""
    angles = t[:, None] * torch.exp(-torch.arange(width // 2, device=t.device) * 0.5)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Mlp(nn.Module):
    def __init__(self, size: int, classes: int = 0) -> None:
        super().__init__()
        self.time, self.enter, self.leave = nn.Linear(8, 32), nn.Linear(size, 32), nn.Linear(32, size)
        self.norm = nn.LayerNorm(32)
        self.classes = nn.Embedding(classes, 32) if classes else None

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.enter(x) + self.time(embed(c_noise))
        if self.classes is not None:
            h = h + self.classes(label)
        result: Tensor = self.leave(F.gelu(self.norm(F.silu(h))))
        return result


class Guided(nn.Module):
    """Distilled with guidance: its weight is a condition, one number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = Mlp(6), nn.Linear(1, 6)

    def forward(self, x: Tensor, c_noise: Tensor, guidance: Tensor) -> Tensor:
        result: Tensor = self.body(x, c_noise) * self.weight(guidance[:, None])
        return result


class UNet1d(nn.Module):
    """As in Diffusion Policy: actions x [B, T, A], an observation vector, convolutions over time."""

    def __init__(self, actions: int = 4, state: int = 5) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(actions, 16, 3, padding=1), nn.Conv1d(32, actions, 3, padding=1)
        self.down, self.up = nn.Conv1d(16, 32, 4, 2, 1), nn.ConvTranspose1d(32, 16, 4, 2, 1)
        self.norm_in, self.norm = nn.GroupNorm(4, 16), nn.GroupNorm(4, 32)
        self.time, self.state = nn.Linear(8, 32), nn.Linear(state, 32)

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor) -> Tensor:
        skip = F.silu(self.norm_in(self.enter(x.transpose(1, 2))))
        h = self.down(skip) + (self.time(embed(c_noise)) + self.state(state))[:, :, None]
        h = self.up(F.mish(self.norm(h)))
        return self.leave(torch.cat([h, skip], dim=1)).transpose(1, 2)


class Dit(nn.Module):
    """Patches, adaLN, attention by einsum and by PyTorch's operator, cross-attention to a sequence of tokens."""

    def __init__(self, classes: int = 4, width: int = 32, token: int = 6) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, width, 2, 2), nn.Parameter(torch.zeros(1, 16, width))
        self.time, self.classes, self.modulate = nn.Linear(8, width), nn.Embedding(classes, width), nn.Linear(32, 192)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross = nn.MultiheadAttention(width, 4, kdim=token, vdim=token, batch_first=True)
        self.norm, self.rms = nn.LayerNorm(width, elementwise_affine=False), nn.RMSNorm(width)
        self.wide, self.narrow, self.leave = nn.Linear(width, 64), nn.Linear(64, width), nn.Linear(width, 12)

    def forward(self, x: Tensor, c_noise: Tensor, tokens: Tensor, label: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.place
        condition = F.silu(self.time(embed(c_noise)) + self.classes(label))
        shift, scale, gate, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv(self.norm(h) * (1 + scale) + shift).unflatten(-1, (3, 4, 8)).unbind(2)
        weights = (torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5).softmax(-1)
        h = h + gate * self.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        h = h + self.cross(self.rms(h), tokens, tokens, need_weights=False)[0]
        q, k, v = self.qkv(h).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = h + gate2 * self.narrow(F.gelu(self.wide(self.norm(h) * (1 + scale2) + shift2), approximate="tanh"))
        y = self.leave(self.norm(h)).unflatten(1, (4, 4)).unflatten(-1, (3, 2, 2))
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Conv3d(nn.Module):
    """A volume and a coarse one as its condition, as in weather models."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 2, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(2, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, c_noise: Tensor, coarse: Tensor) -> Tensor:
        h = self.enter(torch.cat([x, coarse], dim=1)) + self.time(embed(c_noise))[:, :, None, None, None]
        result: Tensor = self.leave(F.silu(self.norm(h)))
        return result


class FlowMap(nn.Module):
    """Two noise levels; both enter by a concatenation, which no value of batch 1 survives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp(6)
        self.mix = nn.Linear(8, 6)

    def forward(self, x: Tensor, c_noise: Tensor, c_noise_next: Tensor) -> Tensor:
        both = torch.cat([self.body(x, c_noise), c_noise[:, None], c_noise_next[:, None]], dim=1)
        result: Tensor = self.mix(both)
        return result


def diffusers_unet() -> nn.Module:
    """diffusers' UNet2DModel, called like any module. Upsample2D has a branch for batches from 64 on."""
    from cmfast_train.torchvision_cpu import torchvision_datasets

    torchvision_datasets()  # beside a CPU build of torch diffusers cannot import it
    from diffusers import UNet2DModel

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4, attention_head_dim=8,
            )  # fmt: skip

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            result: Tensor = self.unet(x, c_noise, return_dict=False)[0]
            return result

    return Plain()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and what `wrap` is told of it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    conditions: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def net(self) -> nn.Module:
        """Return the network; the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = self.make()
            for weight in net.parameters():
                nn.init.normal_(weight, std=0.2)
        return net


CASES = {
    "mlp": Case(make=lambda: Mlp(6), shape=(6,)),
    "mlp of classes": Case(make=lambda: Mlp(6, 5), shape=(6,), conditions={"label": 5}),
    "1-D U-Net of a vector": Case(make=UNet1d, shape=(8, 4), conditions={"state": (5,)}, more={"renoise": "ddim"}),
    "DiT of a sequence and a class": Case(
        make=Dit, shape=(3, 8, 8), conditions={"tokens": (None, 6), "label": 4}, more={"scaling": "boundary"}
    ),
    "3-D convolution of an image": Case(make=Conv3d, shape=(2, 4, 6, 6), conditions={"coarse": (2, 4, 6, 6)}),
    "guidance as a number": Case(make=Guided, shape=(6,), conditions={"guidance": ()}),
    "discrete times": Case(
        make=lambda: Mlp(6),
        shape=(6,),
        more={"scaling": "vp_v", "c_noise": "discrete", "times": {"steps": 100}},
    ),
    "flow map": Case(make=FlowMap, shape=(6,), more={"second_time": True, "renoise": "ddim"}),
    "diffusers' UNet2DModel": Case(make=diffusers_unet, shape=(1, 8, 8), more={"c_noise": "250ln"}),
}
