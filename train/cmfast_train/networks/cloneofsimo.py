# SPDX-License-Identifier: MIT
"""The network of the first public implementation of consistency models (cloneofsimo/consistency_models, 2023).

Two halvings, residual blocks without attention, the noise level as one linear layer a level. The state-dict keys
are its 70, so the files that it wrote load without renaming. Here is F alone: its skip and output scaling, and the
noise level as it is, are `ModelSpec(scaling="cloneofsimo", c_noise="raw")`; with other conventions the same
network trains as the papers say.

The function is the original's, and the weights are; the multiplications are half of its. Nothing but rounding differs:

* the pixels that a halving drops are not computed: the convolution before it has stride 2;
* norms and SiLU come before the doubling of pixels, with which they commute, and see a quarter of them;
* nothing stands between the last two convolutions, so weights are multiplied with weights first, and of the 2D
  channels between the two only the sums are computed that the last one takes of them (`_last_two`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_types
from cmfast_train.networks.adm import GroupNorm32
from cmfast_train.networks.count import check_values, cloneofsimo_sizes
from cmfast_train.networks.precision import cast, full_precision
from cmfast_train.networks.shape import Size, check_cloneofsimo_network, plain_size, sides


@dataclass(frozen=True, kw_only=True)
class CloneofsimoConfig:
    """The shape of one network. Saved in the checkpoint under "network"."""

    image_size: (
        Size  # pixels, multiples of 4: one number of square images, else (height, width). No tensor depends on it
    )
    channels: int = 3  # of the image, in and out
    classes: int = 0  # always: it takes no label
    width: int = 128  # channels at full and half size, twice that below; a multiple of 32; the original's D

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", plain_size(self.image_size))
        check_types(self)
        check_cloneofsimo_network(vars(self))
        if self.classes != 0:
            raise CmfastError(f"the first public implementation's network takes no label, got classes={self.classes}")
        check_values(cloneofsimo_sizes(vars(self)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.channels, *sides(self.image_size))


class CloneofsimoUnet(nn.Module):
    """F(x, c_noise): x [B, C, H, W], c_noise [B] -> [B, C, H, W] float32. `label` is for the common contract."""

    def __init__(self, config: CloneofsimoConfig) -> None:
        super().__init__()
        self.config = config
        d, n = config.width, config.channels
        self.down = nn.ModuleList([_conv(n, d, 2), _Block(d, d), _Block(d, 2 * d, 2), _Block(2 * d, 2 * d)])
        self.time_downs = nn.ModuleList([nn.Linear(2 * d, width) for width in (d, d, 2 * d, 2 * d)])
        self.mid = _Block(2 * d, 2 * d)
        self.up = nn.ModuleList([_Block(2 * d, 2 * d), _DoublingBlock(4 * d, d), _Block(d, d), _conv(2 * d, 2 * d)])
        self.last = _conv(2 * d + n, n)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        # The raw noise level has up to 80 radians: half precision would lose its sines.
        with full_precision(x):
            emb = sine_embedding(cast(c_noise, torch.float32), self.config.width)
            e0, e1, e2, e3 = (linear(emb)[..., None, None] for linear in self.time_downs)
        d0, d1, d2, d3 = self.down
        u0, u1, u2, u3 = self.up
        assert isinstance(u3, nn.Conv2d)

        half = d0(x)  # [B, D, H/2, W/2]
        h = half + cast(e0, half.dtype)
        h = d1(h) + h
        h = h + cast(e1, h.dtype)
        quarter = d2(h)  # [B, 2D, H/4, W/4]
        h = quarter + cast(e2, quarter.dtype)
        h = d3(h) + h
        h = h + cast(e3, h.dtype)
        h = self.mid(h)
        h = u0(h) + h
        h = u1(torch.cat([h, quarter], dim=1))  # [B, D, H/2, W/2]
        h = u2(h) + h
        return cast(_last_two(u3, self.last, torch.cat([h, half], dim=1), x), torch.float32)


def sine_embedding(t: Tensor, dim: int) -> Tensor:
    """Return [sin, cos] of t [B] at dim frequencies from 1 down to almost 1/10000, float32 [B, 2 dim]."""
    freqs = torch.exp(torch.arange(dim, dtype=torch.float32, device=t.device) * -math.log(10000) / dim)
    args = t[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=-1)


class _Block(nn.Sequential):
    """GroupNorm, SiLU, convolution, twice; the two SiLU have no weights but count in the keys."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        norm_in, norm_out = GroupNorm32(c_in), GroupNorm32(c_out)
        convs = _conv(c_in, c_out), _conv(c_out, c_out, stride)
        super().__init__(norm_in, nn.SiLU(), convs[0], norm_out, nn.SiLU(), convs[1])


class _DoublingBlock(_Block):
    """The block of an image whose pixels are doubled before it: [B, c_in, H, W] -> [B, c_out, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        norm_in, act_in, conv_in, *rest = self
        x = conv_in(F.interpolate(act_in(norm_in(x)), scale_factor=2))
        for layer in rest:
            x = layer(x)
        return x


def _last_two(before: nn.Conv2d, last: nn.Conv2d, h: Tensor, x: Tensor) -> Tensor:
    """Return last([before(h doubled), x]), channels side by side: h [B, 2D, H/2, W/2], x [B, C, H, W] -> [B, C, H, W].

    For each channel of the answer, `last` takes nine sums over the 2D channels between the two, one at each pixel of
    3x3. A sum is a convolution of h, by a product of weights, float32. Then each moves to the pixel that it is for,
    and those at pixels beyond the edge, which are padding, count nothing.
    """
    assert before.bias is not None
    c, between = last.out_channels, before.out_channels
    with full_precision(h):
        last_weight = cast(last.weight, torch.float32)
        sums = last_weight[:, :between].movedim(1, 3).flatten(0, 2)  # [9 C, 2D]
        weight = sums @ cast(before.weight, torch.float32).flatten(1)
        weight = _of_doubled(weight.unflatten(1, (before.in_channels, 3, 3)))
        bias = (sums @ cast(before.bias, torch.float32)).repeat_interleave(4)
        move = (
            torch.eye(len(sums), dtype=torch.float32, device=h.device).unflatten(1, (c, 3, 3)).transpose(0, 1)
        )  # [C, 9 C, 3, 3]
        move = torch.cat([move, last_weight[:, between:]], dim=1)
    backbone = last.weight.dtype
    h = F.pixel_shuffle(F.conv2d(h, cast(weight, backbone), cast(bias, backbone), padding=1), 2)  # [B, 9 C, H, W]
    return F.conv2d(torch.cat([h, x], dim=1), cast(move, backbone), last.bias, padding=1)


def _of_doubled(weight: Tensor) -> Tensor:
    """Return the kernel [4 O, I, 3, 3] whose convolution is that of `weight` [O, I, 3, 3] with doubled pixels.

    Its four answers are for the four pixels that each pixel becomes, in the order of `pixel_shuffle`: two of three
    neighbouring pixels were one, whose weights add up.
    """
    for dim in (2, 4):  # rows; columns, behind the new dimension of the rows
        first, middle, last = weight.unbind(dim)
        none = torch.zeros_like(first)
        one, other = torch.stack([first, middle + last, none], dim), torch.stack([none, first + middle, last], dim)
        weight = torch.stack([one, other], dim // 2)
    return weight.flatten(0, 2)


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
