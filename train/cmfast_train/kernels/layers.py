# SPDX-License-Identifier: MIT
"""The layers of the fused U-Nets (`networks`), made from trained ones. Tensors are [B, C, H, W] in channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast_train.kernels.group_norm import group_norm_silu
from cmfast_train.kernels.resample import add_shortcut, resampled
from cmfast_train.networks import adm
from cmfast_train.networks.edm_layers import Resample

ALIGNED = 8  # channels, 16 bytes of half precision: what tensor cores take
M = TypeVar("M", bound=nn.Module)


class Norm(nn.Module):
    """GroupNorm and, unless `silu` is false, SiLU; of x + before, where a convolution left its bias [C] to it."""

    weight: Tensor  # [C], as bias
    bias: Tensor
    before: Tensor | None  # [1, C]

    def __init__(self, norm: nn.GroupNorm, silu: bool = True, before: Tensor | None = None) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.register_buffer("weight", float32(norm.weight))
        self.register_buffer("bias", float32(norm.bias))
        self.register_buffer("before", None if before is None else float32(before)[None])

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        if self.before is not None:
            add = self.before.expand(len(x), -1)
        return group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, scale, shift, self.silu, add)


class Pointwise(nn.Module):
    """A 1x1 convolution as a matrix product: [B, C, H, W] -> [B, C_out, H, W], both in channels_last."""

    weight: Tensor  # [C_out, C]
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, bias: bool = True, order: Tensor | None = None) -> None:
        """Take a convolution, with or without its bias, and where each row of the result comes from."""
        super().__init__()
        assert conv.kernel_size == (1, 1)
        assert conv.bias is not None
        rows = slice(None) if order is None else order
        self.register_buffer("weight", conv.weight.detach().flatten(1)[rows].contiguous())
        self.register_buffer("bias", conv.bias.detach()[rows] if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        return F.linear(rows, self.weight, self.bias).view(batch, height, width, -1).permute(0, 3, 1, 2)


class Conv(nn.Module):
    """A 3x3 convolution without its bias: [B, C, H, W] -> [B, C_out, H, W], both in channels_last."""

    weight: Tensor  # [C_out, C, 3, 3]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        self.register_buffer("weight", conv.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nhwc(F.conv2d(x, self.weight, padding=1))


class FirstConv(nn.Module):
    """The 3x3 convolution of the image, with its bias: [B, C, H, W] -> [B, C_out, H, W] in channels_last.

    cuDNN would pad the channels at each call, and add the bias in a pass over the result. Here they are a multiple of
    8, and the bias is the weight of a channel of ones, at the centre of the kernel, which never sees the border.
    """

    weight: Tensor  # [C_out, C and more, 3, 3]
    rest: Tensor  # the additional channels at a pixel, one and zeros

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        assert conv.bias is not None
        more = ALIGNED - conv.in_channels % ALIGNED
        weight = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, more))
        weight[:, conv.in_channels, 1, 1] = conv.bias.detach()
        self.register_buffer("weight", weight)
        self.register_buffer("rest", (torch.arange(more, device=weight.device) == 0).to(weight.dtype)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        size = (batch, self.weight.shape[1], height, width)
        padded = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        padded[:, :channels] = x
        padded[:, channels:] = self.rest
        return nhwc(F.conv2d(padded, self.weight, padding=1))


class LastConv(nn.Module):
    """The 3x3 convolution to an image, padded likewise: [B, C, H, W] -> [B, C_out, H, W] float32 in channels_last."""

    weight: Tensor  # [C_out and more, C, 3, 3]
    bias: Tensor  # [C_out, 1, 1]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        self.channels = conv.out_channels
        padding = (0, 0, 0, 0, 0, 0, 0, -conv.out_channels % ALIGNED)
        self.register_buffer("weight", F.pad(conv.weight.detach(), padding))
        self.register_buffer("bias", float32(conv.bias)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)[:, : self.channels] + self.bias


class Attention(nn.Module):
    """Norm, attention over all pixels, and the sum with x. The rows of qkv are ordered (three, head, channel)."""

    bias: Tensor  # [C]

    def __init__(self, norm: nn.GroupNorm, qkv: Pointwise, proj: nn.Conv2d, heads: int, gain: float = 1.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.heads, self.gain = Norm(norm, silu=False), qkv, heads, gain
        self.proj = Pointwise(proj, bias=False)
        self.register_buffer("bias", float32(proj.bias))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return the result, joined to a skip if there is one."""
        q, k, v = adm.split_heads(self.qkv(self.norm(x)), self.heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return add_shortcut(x, self.proj(nhwc(h)), self.bias, self.gain, "", skip)


class Box(nn.Module):
    """Double ("up") or halve ("down") the side, or neither (""): nearest neighbour and the mean of 2x2 pixels."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        return resampled(x, self.direction) if self.direction else x


class Block(nn.Module):
    """A residual block whose part of the noise embedding, e [B, width] float32, comes from outside."""

    bias: Tensor  # [C_out]

    def __init__(
        self, norm_in: nn.GroupNorm, conv_in: nn.Conv2d, norm_out: nn.GroupNorm, conv_out: nn.Conv2d,
        resample: Box | Resample, skip: nn.Conv2d | None, *, scale_shift: bool, gain: float = 1.0,
    ) -> None:  # fmt: skip
        """Take a block's layers; `resample` stands before the first convolution and in the short cut, there first."""
        super().__init__()
        self.scale_shift, self.resample, self.gain = scale_shift, resample, gain
        self.norm_in = Norm(norm_in)
        self.norm_out = Norm(norm_out, before=conv_in.bias if scale_shift else None)  # else the bias is in e
        self.conv_in, self.conv_out = Conv(conv_in), Conv(conv_out)
        self.skip = None if skip is None else Pointwise(skip, bias=False)
        # The sum resamples the short cut, unless it filters. 1x1 convolutions commute and run where pixels are fewer.
        self.direction = resample.direction if isinstance(resample, Box) else ""
        self.inside = isinstance(resample, Box) and (skip is None or resample.direction == "up")
        self.register_buffer("bias", float32(conv_out.bias) + (0 if skip is None else float32(skip.bias)))

    def forward(self, x: Tensor, e: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return the result, joined to a skip if there is one."""
        h = self.conv_in(self.resample(self.norm_in(x)))
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm_out(h, scale, shift)
        else:
            h = self.norm_out(h, add=e)
        h = self.conv_out(h)
        if not self.inside:
            x = nhwc(self.resample(x))
        x = x if self.skip is None else self.skip(x)
        return add_shortcut(x, h, self.bias, self.gain, self.direction if self.inside else "", skip)


class Embeddings(nn.Module):
    """The layers behind the noise embedding as one product: [B, E] -> the [B, width] of each block, float32."""

    weight: Tensor  # [widths, E]
    bias: Tensor  # [widths]

    def __init__(self, layers: list[tuple[nn.Linear, Tensor | None]]) -> None:
        """Take each block's layer, and the bias of the convolution whose result is added to the layer's, if it is."""
        super().__init__()
        self.widths = [layer.out_features for layer, _ in layers]
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer, _ in layers]))
        biases = [layer.bias.detach() + (0 if more is None else float32(more)) for layer, more in layers]
        self.register_buffer("bias", torch.cat(biases))

    def forward(self, emb: Tensor) -> Iterator[Tensor]:
        return iter(F.linear(emb, self.weight, self.bias).split(self.widths, dim=1))


class Waves(nn.Module):
    """[cos, sin] of t [B] at the frequencies of another such layer, [B, width]."""

    freqs: Tensor  # [width / 2]

    def __init__(self, freqs: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs)

    def forward(self, t: Tensor) -> Tensor:
        args = t[:, None] * self.freqs
        return torch.cat([args.cos(), args.sin()], dim=1)


def nhwc(x: Tensor) -> Tensor:
    """Return x [B, C, H, W] in channels_last; no copy where it is."""
    return x.contiguous(memory_format=torch.channels_last)


def float32(values: Tensor | None) -> Tensor:
    """Return a parameter's values."""
    assert values is not None
    return values.detach().float()


def of_kind(kind: type[M], module: nn.Module) -> M:
    """Return a module as the kind that it is: PyTorch's containers do not tell."""
    assert isinstance(module, kind)
    return module
