# SPDX-License-Identifier: MIT
"""The U-Nets of EDM ("Elucidating the Design Space", arXiv:2206.00364), which ECT and FastGen tune and distil too.

SongUnet      DDPM++ and NCSN++ of "Score-Based Generative Modeling through SDEs" (arXiv:2011.13456)
DhariwalUnet  EDM's form of ADM (arXiv:2105.05233); OpenAI's own form, with other names and layouts, is `adm`

Their layers are in `edm_layers`. The architecture and the names of its tensors are theirs, the code is not. The
module trees give exactly the state-dict keys of EDM's networks without the leading "model.", so those weights load
without renaming. No branch depends on data, so one trace serves every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_types
from cmfast_train.networks.count import check_values, edm_sizes
from cmfast_train.networks.dropout import dropped
from cmfast_train.networks.edm_layers import FILTERS, Conv, ConvDown, FourierWaves, GroupNorm, PositionalWaves, Resample
from cmfast_train.networks.fused import fuses, normalised
from cmfast_train.networks.precision import cast, full_precision
from cmfast_train.networks.shape import Size, check_network, plain_size, sides

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")
HEAD_CHANNELS = 64  # of DhariwalUnet; SongUnet has one head of all channels
SQRT_HALF = math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True)
class SongConfig:
    """The shape of one DDPM++ (the defaults) or NCSN++. Saved in the checkpoint under "network"."""

    image_size: Size  # pixels: one number of square images, else (height, width)
    channels: int = 3  # of the image, in and out
    classes: int = 0  # 0: unconditional
    model_channels: int = 128  # width of the first convolution, a multiple of 32
    channel_mult: tuple[int, ...] = (2, 2, 2)  # width of each level over model_channels
    emb_mult: int = 4  # width of the embedding over model_channels
    noise_mult: int = 1  # width of the noise level's waves over model_channels; NCSN++: 2
    res_blocks: int = 4  # per level
    attention: tuple[int, ...] = (16,)  # attention where the feature map has this height, pixels
    dropout: float = 0.0  # probability
    augment: int = 0  # length of the augmentation label that it was trained with; its weights are kept, not used
    embedding: str = "positional"  # one of EMBEDDINGS; NCSN++: fourier
    encoder: str = "standard"  # one of ENCODERS; NCSN++: residual
    decoder: str = "standard"  # one of DECODERS
    resample: tuple[int, ...] = (1, 1)  # one of FILTERS; NCSN++: 1,3,3,1

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", plain_size(self.image_size))
        check_types(self)
        check_network(vars(self) | {"head_channels": 1})
        _check_counts(self)
        for name, allowed in (("embedding", EMBEDDINGS), ("encoder", ENCODERS), ("decoder", DECODERS)):
            if getattr(self, name) not in allowed:
                raise CmfastError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.noise_mult < 1:
            raise CmfastError(f"noise_mult must be a whole number from 1, got {self.noise_mult!r}")
        if self.resample not in FILTERS:
            raise CmfastError(f"resample must be 1,1 or 1,3,3,1, got {self.resample!r}")
        check_values(edm_sizes(vars(self), song=True))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.channels, *sides(self.image_size))


@dataclass(frozen=True, kw_only=True)
class DhariwalConfig:
    """The shape of one ADM as EDM has it; the defaults are its ImageNet-64 model's. Saved under "network"."""

    image_size: Size  # pixels: one number of square images, else (height, width)
    channels: int = 3  # of the image, in and out
    classes: int = 0  # 0: unconditional
    model_channels: int = 192  # width of the noise level's waves, a multiple of 32
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  # width of each level over model_channels
    emb_mult: int = 4  # width of the embedding over model_channels
    res_blocks: int = 3  # per level
    attention: tuple[int, ...] = (32, 16, 8)  # attention where the feature map has this height, pixels
    dropout: float = 0.0  # probability
    augment: int = 0  # length of the augmentation label that it was trained with; its weights are kept, not used

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", plain_size(self.image_size))
        check_types(self)
        check_network(vars(self) | {"head_channels": HEAD_CHANNELS})
        _check_counts(self)
        check_values(edm_sizes(vars(self), song=False))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.channels, *sides(self.image_size))


class SongUnet(nn.Module):
    """F(x, c_noise, label): x [B, C, H, W], c_noise [B], label [B] int64 or None -> [B, C, H, W] float32."""

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config = config
        mc, emb, waves = config.model_channels, _emb(config), config.model_channels * config.noise_mult
        self.map_noise = FourierWaves(waves) if config.embedding == "fourier" else PositionalWaves(waves, endpoint=True)
        self.map_label = nn.Linear(config.classes, waves) if config.classes else None
        self.map_augment = nn.Linear(config.augment, waves, bias=False) if config.augment else None
        self.map_layer0 = nn.Linear(waves, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        def block(c_in: int, c_out: int, attends: bool, resample: str) -> Block:
            heads = 1 if attends else 0
            return Block(
                c_in, c_out, emb, resample=resample, taps=config.resample, heads=heads, scale_shift=False,
                project=True, gain=SQRT_HALF, eps=1e-6, dropout=config.dropout,
            )  # fmt: skip

        self.enc, self.dec = _backbone(config, first=mc, block=block, attend_going_up="last")
        places, taps, aux = _places(config), config.resample, config.channels
        for level in range(1, len(places)):
            at, width = places[level], config.channel_mult[level - 1] * mc
            if config.encoder == "skip":  # the image itself, smaller and smaller
                self.enc[at + "aux_down"] = Resample("down", taps)
                self.enc[at + "aux_skip"] = Conv(aux, width, 1)
            elif config.encoder == "residual":  # a second, thin path of features
                self.enc[at + "aux_residual"] = ConvDown(aux, width, taps)
                aux = width
        for level in range(len(places) if config.decoder == "skip" else 1):
            at, width = places[level], config.channel_mult[level] * mc
            if level < len(places) - 1 and config.decoder == "skip":
                self.dec[at + "aux_up"] = Resample("up", taps)
            self.dec[at + "aux_norm"] = GroupNorm(width, eps=1e-6)
            self.dec[at + "aux_conv"] = _zero(Conv(width, config.channels, 3))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self._embedding(c_noise, label)
        config, enc, dec, places = self.config, self.enc, self.dec, _places(self.config)
        skips = []
        h = aux = x
        for level, at in enumerate(places):
            if level == 0:
                h = enc[at + "conv"](h)
            else:
                h = enc[at + "down"](h, emb)
                if config.encoder == "skip":
                    aux = enc[at + "aux_down"](aux)
                    h = h + enc[at + "aux_skip"](aux)
                elif config.encoder == "residual":
                    h = aux = (h + enc[at + "aux_residual"](aux)) * SQRT_HALF
            skips.append(h)
            for i in range(config.res_blocks):
                h = enc[f"{at}block{i}"](h, emb)
                skips.append(h)
        out = None
        for level, at in reversed(list(enumerate(places))):
            h = _decode(dec, at, level == len(places) - 1, config.res_blocks, h, emb, skips, self._join)
            if config.decoder == "skip" or level == 0:
                norm = dec[at + "aux_norm"]
                part = dec[at + "aux_conv"](normalised(norm, h) if fuses(norm, h) else F.silu(norm(h)))
                out = part if out is None else part + dec[at + "aux_up"](out)
        assert out is not None
        return cast(out, torch.float32)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([h, skip], dim=1)

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        with full_precision(c_noise):  # half precision would blur the noise level
            emb = self.map_noise(cast(c_noise, torch.float32))
            half = emb.shape[1] // 2
            emb = torch.cat([emb.narrow(1, half, half), emb.narrow(1, 0, half)], dim=1)  # here it is [sin, cos]
            if self.map_label is not None:  # the one-hot label is scaled to unit variance
                assert label is not None
                row = F.embedding(label, self.map_label.weight.t())
                emb = emb + (row * math.sqrt(self.config.classes) + self.map_label.bias)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUnet(nn.Module):
    """F(x, c_noise, label): x [B, C, H, W], c_noise [B], label [B] int64 or None -> [B, C, H, W] float32."""

    def __init__(self, config: DhariwalConfig) -> None:
        super().__init__()
        self.config = config
        mc, emb = config.model_channels, _emb(config)
        self.map_noise = PositionalWaves(mc, endpoint=False)
        self.map_augment = nn.Linear(config.augment, mc, bias=False) if config.augment else None
        self.map_layer0 = nn.Linear(mc, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(config.classes, emb, bias=False) if config.classes else None

        def block(c_in: int, c_out: int, attends: bool, resample: str) -> Block:
            heads = c_out // HEAD_CHANNELS if attends else 0
            return Block(
                c_in, c_out, emb, resample=resample, taps=(1, 1), heads=heads, scale_shift=True,
                project=False, gain=1.0, eps=1e-5, dropout=config.dropout,
            )  # fmt: skip

        width = config.channel_mult[0] * mc
        self.enc, self.dec = _backbone(config, first=width, block=block, attend_going_up="all")
        self.out_norm: nn.Module = GroupNorm(width, eps=1e-5)
        self.out_conv: nn.Module = _zero(Conv(width, config.channels, 3))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self._embedding(c_noise, label)
        config, places = self.config, _places(self.config)
        skips = []
        h = x
        for level, at in enumerate(places):
            h = self.enc[at + "down"](h, emb) if level else self.enc[at + "conv"](h)
            skips.append(h)
            for i in range(config.res_blocks):
                h = self.enc[f"{at}block{i}"](h, emb)
                skips.append(h)
        for at in reversed(places):
            h = _decode(self.dec, at, at == places[-1], config.res_blocks, h, emb, skips, self._join)
        norm = self.out_norm
        return cast(self.out_conv(normalised(norm, h) if fuses(norm, h) else F.silu(norm(h))), torch.float32)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([h, skip], dim=1)

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        with full_precision(c_noise):  # half precision would blur the noise level
            emb = self.map_noise(cast(c_noise, torch.float32))
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None:
                assert label is not None
                emb = emb + F.embedding(label, self.map_label.weight.t())
            return F.silu(emb)


class Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, the noise embedding in between; attention after. x [B, C, H, W], emb [B, E].

    Args:
        project: whether the short cut of a block that resamples has a 1x1 convolution although the width stays
        gain: factor on every sum, sqrt(1/2) where the variance is to stay
    """

    def __init__(
        self, c_in: int, c_out: int, emb: int, *, resample: str, taps: tuple[int, ...], heads: int,
        scale_shift: bool, project: bool, gain: float, eps: float, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.c_out, self.heads, self.scale_shift, self.gain = c_out, heads, scale_shift, gain
        self.norm0 = GroupNorm(c_in, eps)
        self.conv0 = Conv(c_in, c_out, 3, resample, taps)
        self.affine = nn.Linear(emb, 2 * c_out if scale_shift else c_out)
        self.norm1 = GroupNorm(c_out, eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv1 = _zero(Conv(c_out, c_out, 3))
        self.skip: nn.Module = nn.Identity()
        if c_in != c_out or (resample and project):
            self.skip = Conv(c_in, c_out, 1, resample, taps)
        elif resample:
            self.skip = Resample(resample, taps)
        if heads:
            self.norm2 = GroupNorm(c_out, eps)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = _zero(Conv(c_out, c_out, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(normalised(self.norm0, x) if fuses(self.norm0, x) else F.silu(self.norm0(x)))
        norm, e = self.norm1, self.affine(emb)
        if fuses(norm, h):
            h = normalised(norm, h, e) if self.scale_shift else normalised(norm, h + cast(e[..., None, None], h.dtype))
            x = self._sum(self.skip(x), self.conv1(dropped(self.dropout, h, self.conv1)))
        else:
            e = cast(e[..., None, None], h.dtype)
            if self.scale_shift:
                h = norm(h) * (1 + e.narrow(1, 0, self.c_out)) + e.narrow(1, self.c_out, self.c_out)
            else:
                h = norm(h + e)
            x = self._sum(self.skip(x), self.conv1(dropped(self.dropout, F.silu(h), self.conv1)))
        if not self.heads:
            return x
        h = normalised(self.norm2, x, silu=False) if fuses(self.norm2, x) else self.norm2(x)
        return self._sum(x, self.proj(self._attention(h)))

    def _attention(self, x: Tensor) -> Tensor:
        """Attend over all pixels. The rows of qkv are ordered (head, channel, three): q, k, v of a channel together."""
        _, channels, height, width = x.shape
        qkv = self.qkv(x)
        if x.device.type == "cpu":  # the graph that is exported
            qkv = qkv.reshape(-1, self.heads, channels // self.heads, 3, height * width)
            qkv = qkv.transpose(2, 4)  # [B, heads, H W, 3, C / heads]
            h = F.scaled_dot_product_attention(qkv.select(3, 0), qkv.select(3, 1), qkv.select(3, 2))
        else:
            h = F.scaled_dot_product_attention(*split_heads(qkv, self.heads))
        return h.transpose(2, 3).reshape(-1, channels, height, width)

    def _sum(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h if self.gain == 1 else (x + h) * self.gain


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, heads, H W, C / heads] of qkv [B, 3 C, H, W], rows (head, channel, three).

    What `adm.split_heads` says holds here, but the three lie in each other, so this is always a copy.
    """
    batch, channels, height, width = qkv.shape
    rows = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, heads, channels // (3 * heads), 3)
    q, k, v = rows.permute(4, 0, 2, 1, 3).contiguous().unbind(0)
    return q, k, v


def _backbone(
    config: SongConfig | DhariwalConfig, first: int, block: Callable[[int, int, bool, str], Block], attend_going_up: str
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return the blocks of both halves of the U, by name.

    Args:
        first: width of the first convolution
        attend_going_up: which decoder blocks of a level attend, where it does: "all", or only the "last"
    """
    height = sides(config.image_size)[0]
    levels = [
        (at, height >> level in config.attention, mult * config.model_channels)
        for level, (at, mult) in enumerate(zip(_places(config), config.channel_mult, strict=True))
    ]
    enc, dec = nn.ModuleDict(), nn.ModuleDict()
    width, skips = first, [first]
    for level, (at, attended, target) in enumerate(levels):
        if level == 0:
            enc[at + "conv"] = Conv(config.channels, width, 3)
        else:
            enc[at + "down"] = block(width, width, False, "down")
            skips.append(width)
        for i in range(config.res_blocks):
            enc[f"{at}block{i}"] = block(width, target, attended, "")
            width = target
            skips.append(width)
    for level, (at, attended, target) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            dec[at + "in0"] = block(width, width, True, "")
            dec[at + "in1"] = block(width, width, False, "")
        else:
            dec[at + "up"] = block(width, width, False, "up")
        for i in range(config.res_blocks + 1):
            attends = attended and (attend_going_up == "all" or i == config.res_blocks)
            dec[f"{at}block{i}"] = block(width + skips.pop(), target, attends, "")
            width = target
    return enc, dec


def _decode(
    dec: nn.ModuleDict, at: str, innermost: bool, res_blocks: int, h: Tensor, emb: Tensor, skips: list[Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Run one level of the way up; it takes its skips off the end of the list."""
    h = dec[at + "in1"](dec[at + "in0"](h, emb), emb) if innermost else dec[at + "up"](h, emb)
    for i in range(res_blocks + 1):
        h = dec[f"{at}block{i}"](join(h, skips.pop()), emb)
    return h


def _places(config: SongConfig | DhariwalConfig) -> list[str]:
    """Return what the names of each level's tensors begin with: 64x64_, 32x32_, .., height first."""
    height, width = sides(config.image_size)
    return [f"{height >> level}x{width >> level}_" for level in range(len(config.channel_mult))]


def _emb(config: SongConfig | DhariwalConfig) -> int:
    return config.model_channels * config.emb_mult


def _check_counts(config: SongConfig | DhariwalConfig) -> None:
    for name, least in (("classes", 0), ("augment", 0), ("emb_mult", 1)):
        value = getattr(config, name)
        if value < least:
            raise CmfastError(f"{name} must be a whole number from {least}, got {value!r}")


def _zero(layer: Conv) -> Conv:
    """A new U-Net answers zero, as `adm` does; its other weights are PyTorch's defaults."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
