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

What a block adds to its input, the embedding and all statistics are float32, whatever the backbone runs in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast_train.kernels.layers import (
    Attention,
    Block,
    Box,
    Embeddings,
    FirstConv,
    LastConv,
    Norm,
    Pointwise,
    Waves,
    nhwc,
    of_kind,
)
from cmfast_train.kernels.resample import joined
from cmfast_train.networks import adm, edm
from cmfast_train.networks.adm import AdmUnet
from cmfast_train.networks.edm import DhariwalUnet, SongUnet
from cmfast_train.networks.edm_layers import PositionalWaves, Resample
from cmfast_train.networks.precision import cast


def fused(network: nn.Module) -> nn.Module:
    """Return the fused form of a network; it shares tensors with it, which is not to be used any more."""
    kinds = {AdmUnet: FusedAdm, SongUnet: FusedSong, DhariwalUnet: FusedDhariwal}
    with torch.no_grad():
        made: nn.Module = kinds[type(network)](network)
    return made.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class FusedAdm(nn.Module):
    """`AdmUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: AdmUnet) -> None:
        super().__init__()
        self.config = config = network.config
        self.time_embed = network.time_embed
        self.second_embed = network.second_embed if config.two_times else None
        self.label_emb = network.label_emb if config.classes else None
        self.waves = Waves(
            adm.frequencies(config.model_channels, of_kind(nn.Linear, network.time_embed[0]).weight.device)
        )
        self.embeddings = Embeddings(
            [
                (
                    of_kind(nn.Linear, block.emb_layers[1]),
                    None if config.scale_shift else of_kind(nn.Conv2d, block.in_layers[2]).bias,
                )
                for block in network.modules()
                if isinstance(block, adm.ResBlock)
            ]
        )
        self.input_blocks = nn.ModuleList([_adm_stage(stage) for stage in network.input_blocks])
        self.middle_block = _adm_stage(network.middle_block)
        self.output_blocks = nn.ModuleList([_adm_stage(stage) for stage in network.output_blocks])
        self.norm, self.conv = Norm(of_kind(nn.GroupNorm, network.out[0])), LastConv(of_kind(nn.Conv2d, network.out[2]))
        first = of_kind(adm.Stage, network.input_blocks[0])[0]
        of_kind(nn.ModuleList, self.input_blocks[0])[0] = FirstConv(of_kind(nn.Conv2d, first))

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_noise_next: Tensor | None = None
    ) -> Tensor:
        emb = self.time_embed(self.waves(cast(c_noise, torch.float32)))
        if self.second_embed is not None:
            second = torch.zeros_like(c_noise) if c_noise_next is None else c_noise_next
            emb = emb + self.second_embed(self.waves(second))
        if self.label_emb is not None:
            emb = emb + self.label_emb(label)
        parts = self.embeddings(F.silu(emb))
        patch, skips = self.config.patch, []
        h = x if patch == 1 else F.pixel_unshuffle(x, patch)
        for stage in self.input_blocks:
            h = _run(of_kind(nn.ModuleList, stage), h, parts)
            skips.append(h)
        for stage in (self.middle_block, *self.output_blocks):  # the last is joined to nothing
            h = _run(of_kind(nn.ModuleList, stage), h, parts, skips.pop() if skips else None)
        y: Tensor = self.conv(self.norm(h))
        return nhwc(y if patch == 1 else F.pixel_shuffle(y, patch))


class FusedSong(SongUnet):
    """`SongUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: SongUnet) -> None:
        nn.Module.__init__(self)
        self.config, self.map_label = network.config, network.map_label
        self.embeddings = _take_edm(self, network)
        for name, module in self.dec.items():
            if name.endswith("aux_norm"):
                self.dec[name] = Norm(of_kind(nn.GroupNorm, module), silu=False)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return joined(nhwc(h), nhwc(skip))

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Iterator[Tensor]:  # type: ignore[override]
        parts: Iterator[Tensor] = self.embeddings(super()._embedding(c_noise, label))
        return parts  # one to each block: `EdmBlock`

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(nhwc(x), c_noise, label)


class FusedDhariwal(DhariwalUnet):
    """`DhariwalUnet` with fused operations: the same arguments, the same result."""

    def __init__(self, network: DhariwalUnet) -> None:
        nn.Module.__init__(self)
        self.config, self.map_label = network.config, network.map_label
        self.embeddings = _take_edm(self, network)
        self.out_norm = Norm(of_kind(nn.GroupNorm, network.out_norm), silu=False)
        self.out_conv = LastConv(of_kind(nn.Conv2d, network.out_conv))

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return joined(nhwc(h), nhwc(skip))

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Iterator[Tensor]:  # type: ignore[override]
        parts: Iterator[Tensor] = self.embeddings(super()._embedding(c_noise, label))
        return parts  # one to each block: `EdmBlock`

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


def _adm_stage(stage: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(map(_adm_layer, of_kind(adm.Stage, stage)))


def _adm_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, adm.Attention):
        return Attention(layer.norm, Pointwise(layer.qkv), layer.proj_out, layer.heads)
    if not isinstance(layer, adm.ResBlock):
        return layer
    skip = layer.skip_connection
    direction = {nn.Identity: "", nn.AvgPool2d: "down", nn.Upsample: "up"}[type(layer.resample)]
    return Block(
        of_kind(nn.GroupNorm, layer.in_layers[0]), of_kind(nn.Conv2d, layer.in_layers[2]),
        of_kind(nn.GroupNorm, layer.out_layers[0]), of_kind(nn.Conv2d, layer.out_layers[3]), Box(direction),
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


def _take_edm(made: nn.Module, network: SongUnet | DhariwalUnet) -> Embeddings:
    """Give a fused network the parts of another; its blocks must stand in the order in which they are called.

    Returns what makes the parts of the noise embedding that the blocks take.
    """
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
    network.enc[first] = FirstConv(of_kind(nn.Conv2d, network.enc[first]))
    if isinstance(network.map_noise, PositionalWaves):
        made.map_noise = Waves(network.map_noise.frequencies(network.map_layer0.weight.device))
    return embeddings
