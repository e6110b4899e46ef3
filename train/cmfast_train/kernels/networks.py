# SPDX-License-Identifier: MIT
"""The U-Nets in channels_last with fused operations, made from trained ones by `fuse`. For inference only.

Against the networks that they are made from:

* norm, scale and shift, SiLU: one kernel, or two for large feature maps (`group_norm`);
* biases of 3x3 convolutions, which cuDNN adds in a pass of their own, are added by the kernel that follows;
* short cuts are resampled in the sum that ends a block, which is written joined to a skip (`resample`);
* the image has as many channels as tensor cores take, and its convolution adds its bias by one of them;
* 1x1 convolutions are matrix products, which add theirs;
* the layers behind the noise embedding are one product a call instead of one a block;
* queries, keys and values come out as flash kernels take them;
* the frequencies of the noise embedding are computed once.

What a block adds to its input, the embedding and all statistics are float32, whatever the trunk runs in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast_train.kernels.group_norm import group_norm_silu
from cmfast_train.kernels.resample import add_shortcut, joined, resampled
from cmfast_train.networks import adm, edm
from cmfast_train.networks.adm import AdmUnet
from cmfast_train.networks.edm import DhariwalUnet, SongUnet
from cmfast_train.networks.edm_layers import PositionalWaves, Resample
from cmfast_train.networks.precision import cast

ALIGNED = 8  # channels, 16 bytes of half precision: what tensor cores take


def fused(network: nn.Module) -> nn.Module:
    """Return the fused form of a network; it shares tensors with it, which is not to be used any more."""
    kinds = {AdmUnet: FusedAdm, SongUnet: FusedSong, DhariwalUnet: FusedDhariwal}
    with torch.no_grad():
        made: nn.Module = kinds[type(network)](network)
    return made.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Norm(nn.Module):
    """GroupNorm and, unless `silu` is false, SiLU; of x + before, where a convolution left its bias [C] to it."""

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
        return add_shortcut(x, h, self.bias, self.gain, self.resample.direction if self.inside else "", skip)


class Embeddings(nn.Module):
    """The layers behind the noise embedding as one product: [B, E] -> the [B, width] of each block, float32."""

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

    def __init__(self, freqs: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs)

    def forward(self, t: Tensor) -> Tensor:
        args = t[:, None] * self.freqs
        return torch.cat([args.cos(), args.sin()], dim=1)


class FusedAdm(nn.Module):
    """`AdmUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: AdmUnet) -> None:
        super().__init__()
        self.config = config = network.config
        self.time_embed = network.time_embed
        self.second_embed = network.second_embed if config.two_times else None
        self.label_emb = network.label_emb if config.classes else None
        self.waves = Waves(adm.frequencies(config.model_channels, network.time_embed[0].weight.device))
        self.embeddings = Embeddings(
            [
                (block.emb_layers[1], None if config.scale_shift else block.in_layers[2].bias)
                for block in network.modules()
                if isinstance(block, adm.ResBlock)
            ]
        )
        self.input_blocks = nn.ModuleList([nn.ModuleList(map(_adm_layer, stage)) for stage in network.input_blocks])
        self.middle_block = nn.ModuleList(map(_adm_layer, network.middle_block))
        self.output_blocks = nn.ModuleList([nn.ModuleList(map(_adm_layer, stage)) for stage in network.output_blocks])
        self.norm, self.conv = Norm(network.out[0]), LastConv(network.out[2])
        self.input_blocks[0][0] = FirstConv(network.input_blocks[0][0])

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_second: Tensor | None = None
    ) -> Tensor:
        emb = self.time_embed(self.waves(cast(c_noise, torch.float32)))
        if self.second_embed is not None:
            second = torch.zeros_like(c_noise) if c_second is None else c_second
            emb = emb + self.second_embed(self.waves(second))
        if self.label_emb is not None:
            emb = emb + self.label_emb(label)
        parts = self.embeddings(F.silu(emb))
        h = x
        skips = []
        for stage in self.input_blocks:
            h = _run(stage, h, parts)
            skips.append(h)
        for stage in (self.middle_block, *self.output_blocks):  # the last is joined to nothing
            h = _run(stage, h, parts, skips.pop() if skips else None)
        y: Tensor = self.conv(self.norm(h))
        return nhwc(y)


class FusedSong(SongUnet):
    """`SongUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: SongUnet) -> None:
        nn.Module.__init__(self)
        _take_edm(self, network)
        for name, module in self.dec.items():
            if name.endswith("aux_norm"):
                self.dec[name] = Norm(module, silu=False)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return joined(nhwc(h), nhwc(skip))

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Iterator[Tensor]:
        return self.embeddings(super()._embedding(c_noise, label))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(nhwc(x), c_noise, label)


class FusedDhariwal(DhariwalUnet):
    """`DhariwalUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: DhariwalUnet) -> None:
        nn.Module.__init__(self)
        _take_edm(self, network)
        self.out_norm, self.out_conv = Norm(network.out_norm, silu=False), LastConv(network.out_conv)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return joined(nhwc(h), nhwc(skip))

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Iterator[Tensor]:
        return self.embeddings(super()._embedding(c_noise, label))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(nhwc(x), c_noise, label)


class EdmBlock(nn.Module):
    """`edm.Block`, which takes its part of the noise embedding from an iterator, in the order of the calls."""

    def __init__(self, block: edm.Block) -> None:
        super().__init__()
        conv, skip = block.conv0, block.skip
        resample: Box | Resample = Box(conv.resample)
        if conv.resample and conv.resample_filter.shape[-1] > 2:
            resample = Resample(conv.resample, (1, 1))
            resample.resample_filter = conv.resample_filter
        self.residual = Block(
            block.norm0, conv, block.norm1, block.conv1, resample, skip if isinstance(skip, nn.Conv2d) else None,
            scale_shift=block.scale_shift, gain=block.gain,
        )  # fmt: skip
        self.attention = None
        if block.heads:
            rows = torch.arange(block.qkv.out_channels, device=block.qkv.weight.device)  # (head, channel, three)
            qkv = Pointwise(block.qkv, order=rows.view(block.heads, -1, 3).movedim(2, 0).flatten())
            self.attention = Attention(block.norm2, qkv, block.proj, block.heads, block.gain)

    def forward(self, x: Tensor, parts: Iterator[Tensor]) -> Tensor:
        x = self.residual(x, next(parts))
        return x if self.attention is None else self.attention(x)


def nhwc(x: Tensor) -> Tensor:
    """Return x [B, C, H, W] in channels_last; no copy where it is."""
    return x.contiguous(memory_format=torch.channels_last)


def float32(values: Tensor | None) -> Tensor:
    """Return a parameter's values."""
    assert values is not None
    return values.detach().float()


def _adm_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, adm.Attention):
        return Attention(layer.norm, Pointwise(layer.qkv), layer.proj_out, layer.heads)
    if not isinstance(layer, adm.ResBlock):
        return layer
    skip = layer.skip_connection
    direction = {nn.Identity: "", nn.AvgPool2d: "down", nn.Upsample: "up"}[type(layer.resample)]
    return Block(
        layer.in_layers[0], layer.in_layers[2], layer.out_layers[0], layer.out_layers[3], Box(direction),
        skip if isinstance(skip, nn.Conv2d) else None, scale_shift=layer.scale_shift,
    )  # fmt: skip


def _run(stage: nn.ModuleList, h: Tensor, parts: Iterator[Tensor], skip: Tensor | None = None) -> Tensor:
    """Return the result of a stage, joined to a skip if there is one."""
    for layer in stage:
        last = skip if layer is stage[-1] else None
        if isinstance(layer, Block):
            h = layer(h, next(parts), last)
        elif isinstance(layer, Attention):
            h = layer(h, last)
        else:
            h = nhwc(layer(h))
            h = h if last is None else joined(h, last)
    return h


def _take_edm(made: nn.Module, network: SongUnet | DhariwalUnet) -> None:
    """Give a fused network the parts of another; its blocks must stand in the order in which they are called."""
    made.config, made.map_label = network.config, network.map_label
    halves = (network.enc, network.dec)
    blocks = [module for half in halves for module in half.values() if isinstance(module, edm.Block)]
    embeddings = Embeddings([(block.affine, None if block.scale_shift else block.conv0.bias) for block in blocks])
    for name, module in network._modules.items():
        made.add_module(name, module)
    for half in halves:
        for name, module in half.items():
            if isinstance(module, edm.Block):
                half[name] = EdmBlock(module)
    first = next(iter(network.enc))
    network.enc[first] = FirstConv(network.enc[first])
    made.embeddings = embeddings
    if isinstance(network.map_noise, PositionalWaves):
        made.map_noise = Waves(network.map_noise.frequencies(network.map_layer0.weight.device))
