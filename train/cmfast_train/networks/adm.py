# SPDX-License-Identifier: MIT
"""The ADM U-Net ("Diffusion Models Beat GANs", arXiv:2105.05233), the network of OpenAI's consistency models.

The module tree gives exactly the state-dict keys of OpenAI's released checkpoints, so they load without
renaming; the small presets are the same class with smaller numbers. No Python branch depends on data, so one
trace serves every batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_types
from cmfast_train.networks.count import adm_sizes, check_values
from cmfast_train.networks.dropout import dropped
from cmfast_train.networks.fused import fuses, normalised
from cmfast_train.networks.precision import cast, full_precision
from cmfast_train.networks.shape import GROUPS, Size, check_network, plain_size, sides


@dataclass(frozen=True, kw_only=True)
class AdmConfig:
    """The shape of one U-Net. Saved in the checkpoint under "network"."""

    image_size: Size  # pixels: one number of square images, else (height, width)
    channels: int = 3  # of the image, in and out
    classes: int = 0  # 0: unconditional
    model_channels: int = 128  # width of the first level, a multiple of 32
    res_blocks: int = 2  # per level
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # width of each level over model_channels
    attention: tuple[int, ...] = (16,)  # attention where the feature map has this height, pixels
    patch: int = 1  # pixels, side of the squares that the first convolution takes as channels, and the last one gives
    head_channels: int = 64  # width of an attention head
    heads: int = 0  # of every attention, whatever its width, instead of head_channels; 0: by head_channels
    scale_shift: bool = True  # noise level enters as scale and shift of a norm, else as a sum
    resblock_updown: bool = True  # resample inside residual blocks, else by strided convolution
    dropout: float = 0.0  # probability
    two_times: bool = False  # takes a second noise level, MeanFlow's r; sampling never gives one, which means 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", plain_size(self.image_size))
        check_types(self)
        check_network(vars(self))
        if self.classes < 0:
            raise CmfastError(f"classes must be a whole number from 0, got {self.classes!r}")
        check_values(adm_sizes(vars(self)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.channels, *sides(self.image_size))


class AdmUnet(nn.Module):
    """F(x, c_noise, label): x [B, C, H, W], c_noise [B], label [B] int64 or None -> [B, C, H, W] float32.

    With two_times also F(x, c_noise, label, c_noise_next), c_noise_next [B]; without it, c_noise_next = 0.
    """

    def __init__(self, config: AdmConfig) -> None:
        super().__init__()
        self.config = config
        mc, emb = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(mc, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.two_times:
            self.second_embed = nn.Sequential(nn.Linear(mc, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.classes:
            self.label_emb = nn.Embedding(config.classes, emb)

        def block(c_in: int, c_out: int, height: int, resample: str = "") -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(c_in, c_out, emb, config, resample)]
            if height in config.attention and not resample:
                layers.append(Attention(c_out, config.heads or c_out // config.head_channels))
            return layers

        width = config.channel_mult[0] * mc
        skips, height = [width], sides(config.image_size)[0] // config.patch
        values = config.channels * config.patch**2
        self.input_blocks = nn.ModuleList([Stage([_conv(values, width)])])
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                self.input_blocks.append(Stage(block(width, mult * mc, height)))
                width = mult * mc
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                down: list[nn.Module]
                down = block(width, width, height, "down") if config.resblock_updown else [Downsample(width)]
                self.input_blocks.append(Stage(down))
                skips.append(width)
                height //= 2

        self.middle_block = Stage(
            [
                ResBlock(width, width, emb, config),
                Attention(width, config.heads or width // config.head_channels),
                ResBlock(width, width, emb, config),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.res_blocks + 1):
                layers = block(width + skips.pop(), mult * mc, height)
                width = mult * mc
                if level and i == config.res_blocks:
                    height *= 2
                    layers += block(width, width, height, "up") if config.resblock_updown else [Upsample(width)]
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), _zero(_conv(width, values)))

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_noise_next: Tensor | None = None
    ) -> Tensor:
        # 250 ln(sigma) is in the thousands: half precision would lose the noise level.
        with full_precision(x):
            first = self.time_embed[0]
            assert isinstance(first, nn.Linear)
            wide = first.weight.dtype  # float32, or float64 where all of the network is
            emb = self.time_embed(timestep_embedding(cast(c_noise, wide), self.config.model_channels))
            if self.config.two_times:
                second = torch.zeros_like(c_noise) if c_noise_next is None else c_noise_next
                emb = emb + self.second_embed(timestep_embedding(second, self.config.model_channels))
            if self.config.classes:
                emb = emb + self.label_emb(label)
        skips, patch = [], self.config.patch
        h = x if patch == 1 else F.pixel_unshuffle(x, patch)
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        norm, act, conv = self.out
        y = cast(conv(normalised(norm, h) if fuses(norm, h) else act(norm(h))), wide)
        return y if patch == 1 else F.pixel_shuffle(y, patch)


class Stage(nn.Sequential):
    """A sequence whose residual blocks also take the noise embedding."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(*layers)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the noise embedding in between. h [B, C_in, H, W], emb [B, E]."""

    def __init__(self, c_in: int, c_out: int, emb: int, config: AdmConfig, resample: str = "") -> None:
        super().__init__()
        self.resample = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.scale_shift = config.scale_shift
        self.in_layers = nn.Sequential(GroupNorm32(c_in), nn.SiLU(), _conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out if config.scale_shift else c_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(c_out),
            nn.SiLU(),
            nn.Dropout(config.dropout) if config.dropout else nn.Identity(),
            _zero(_conv(c_out, c_out)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(normalised(norm, x) if fuses(norm, x) else act(norm(x))))
        x = self.resample(x)
        norm, act, dropout, conv = self.out_layers
        assert isinstance(conv, nn.Conv2d)
        e = self.emb_layers(emb)
        if fuses(norm, h):
            h = normalised(norm, h, e) if self.scale_shift else normalised(norm, h + cast(e[..., None, None], h.dtype))
            by_kernels: Tensor = self.skip_connection(x) + conv(dropped(dropout, h, conv))
            return by_kernels
        e = cast(e[..., None, None], h.dtype)
        if self.scale_shift:
            channels = h.shape[1]
            h = norm(h) * (1 + e.narrow(1, 0, channels)) + e.narrow(1, channels, channels)  # scale, shift
        else:
            h = norm(h + e)
        y: Tensor = self.skip_connection(x) + conv(dropped(dropout, act(h), conv))
        return y


class Attention(nn.Module):
    """Self-attention over all pixels. The rows of qkv are ordered (three, head, channel): all queries first."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        qkv = self.qkv(normalised(self.norm, x, silu=False) if fuses(self.norm, x) else self.norm(x))
        if x.device.type == "cpu":  # the graph that is exported
            qkv = qkv.reshape(-1, 3, self.heads, channels // self.heads, height * width)
            qkv = qkv.transpose(3, 4)  # [B, 3, heads, H W, C / heads]
            h = F.scaled_dot_product_attention(qkv.select(1, 0), qkv.select(1, 1), qkv.select(1, 2))
        else:
            h = F.scaled_dot_product_attention(*split_heads(qkv, self.heads))
        y: Tensor = x + self.proj_out(h.transpose(2, 3).reshape(-1, channels, height, width))
        return y


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are float32 whatever the backbone runs in."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._trained_on_cpu(x)
        if x.dtype == self.weight.dtype and x.dtype.itemsize >= 4:  # casts to the same type slow down every trace
            return super().forward(x)
        return F.group_norm(x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)

    def _trained_on_cpu(self, x: Tensor) -> Tensor:
        """PyTorch's kernels of a CPU take bfloat16 with float32 weights; in channels_last, way and back save time."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
        y = F.group_norm(x.contiguous(), GROUPS, cast(self.weight, wide), cast(self.bias, wide), self.eps)
        return y.contiguous(memory_format=torch.channels_last) if last else y


class Downsample(nn.Module):
    """Halve the side by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x)
        return y


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2))
        return y


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, heads, H W, C / heads] of qkv [B, 3 C, H, W], rows (three, head, channel).

    The channels of a head are neighbours in memory: flash and memory-efficient kernels take nothing else, and without
    them a GPU writes all scores to memory. Of qkv in channels_last these are views, else one copy.
    """
    batch, channels, height, width = qkv.shape
    rows = qkv.permute(0, 2, 3, 1).contiguous().view(batch, height * width, 3, heads, channels // (3 * heads))
    q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return [cos, sin] of t [B] at dim / 2 frequencies from 1 down to almost 1/10000, [B, dim]."""
    freqs = frequencies(dim, t.device, t.dtype)
    args = t[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def frequencies(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dim / 2 frequencies of `timestep_embedding`."""
    half = dim // 2
    return torch.exp(torch.arange(half, dtype=dtype, device=device) * (-math.log(10000) / half))


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value of trained scale, so that a comparison compares something.

    A new U-Net ends in a zero convolution and computes exactly c_skip x, whatever is wrong with the rest.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)  # its numbers are those of the kind of device
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device=device)
            if parameter.ndim > 1:
                value *= parameter[0].numel() ** -0.5
            else:  # norms are around one, biases around zero
                is_norm_weight = name.endswith("weight")
                value = 0.1 * value + (1.0 if is_norm_weight else 0.0)
            parameter.copy_(value)


def _conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
