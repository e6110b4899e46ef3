# SPDX-License-Identifier: MIT
"""How many tensors and values a network will have, from its configuration alone, before anything is built.

The walks here follow the constructors in `adm`, `edm` and `cloneofsimo`; a test compares them with what those build.
torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cmfast.errors import CmfastError

MOST_BLOCKS = 1024  # residual blocks; the published networks have up to about 60
MOST_VALUES = 10**10  # in all tensors, 40 GB; the largest published network of these kinds has half a billion

Sizes = Iterator[int]  # values of each tensor


def check_blocks(fields: Mapping[str, Any]) -> None:
    """Raise CmfastError if a U-Net with these `channel_mult` and `res_blocks` has too many blocks to go through."""
    levels, each = len(fields["channel_mult"]), 2 * fields["res_blocks"] + 2
    if levels * each > MOST_BLOCKS:
        raise CmfastError(
            f"{levels} levels (channel_mult) with res_blocks={fields['res_blocks']} are {levels * each:,} blocks, more "
            f"than the {MOST_BLOCKS:,} that cmfast builds; make res_blocks smaller"
        )


def check_values(sizes: Sizes) -> None:
    """Raise CmfastError if the tensors of a network are together too large to build."""
    if (values := sum(sizes)) > MOST_VALUES:
        raise CmfastError(
            f"the network would have {values:.3g} weights, more than the {MOST_VALUES:,} that cmfast builds; make "
            "its width (model_channels), channel_mult or res_blocks smaller"
        )


def adm_sizes(f: Mapping[str, Any]) -> Sizes:
    """Yield the size of every tensor of `adm.AdmUnet` with these fields of AdmConfig."""
    mc, emb, mults = f["model_channels"], 4 * f["model_channels"], f["channel_mult"]
    height, values = _height(f["image_size"]) // f["patch"], f["channels"] * f["patch"] ** 2

    def block(c_in: int, c_out: int) -> Sizes:
        yield from (*_norm(c_in), *_conv(c_in, c_out, 3), *_linear(emb, (2 if f["scale_shift"] else 1) * c_out))
        yield from (*_norm(c_out), *_conv(c_out, c_out, 3))
        if c_in != c_out:
            yield from _conv(c_in, c_out, 1)

    def attention(c: int) -> Sizes:
        yield from (*_norm(c), *_conv(c, 3 * c, 1), *_conv(c, c, 1))

    def resampling(c: int) -> Sizes:
        yield from block(c, c) if f["resblock_updown"] else _conv(c, c, 3)

    for _ in range(2 if f["two_times"] else 1):
        yield from (*_linear(mc, emb), *_linear(emb, emb))
    if f["classes"]:
        yield f["classes"] * emb
    width = mults[0] * mc
    yield from _conv(values, width, 3)
    skips = [width]
    for level, mult in enumerate(mults):
        for _ in range(f["res_blocks"]):
            yield from block(width, mult * mc)
            width = mult * mc
            skips.append(width)
            if height >> level in f["attention"]:
                yield from attention(width)
        if level < len(mults) - 1:
            yield from resampling(width)
            skips.append(width)
    yield from (*block(width, width), *attention(width), *block(width, width))
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(f["res_blocks"] + 1):
            yield from block(width + skips.pop(), mult * mc)
            width = mult * mc
            if height >> level in f["attention"]:
                yield from attention(width)
            if level and i == f["res_blocks"]:
                yield from resampling(width)
    yield from (*_norm(width), *_conv(width, values, 3))


def edm_sizes(f: Mapping[str, Any], song: bool) -> Sizes:
    """Yield the size of every tensor of `edm.SongUnet` or `edm.DhariwalUnet`, its buffers included."""
    mc, emb, channels = f["model_channels"], f["model_channels"] * f["emb_mult"], f["channels"]
    waves = mc * f["noise_mult"] if song else mc
    filter_size = len(f["resample"]) ** 2 if song else 4
    height, widths = _height(f["image_size"]), [mult * mc for mult in f["channel_mult"]]

    def block(c_in: int, c_out: int, attends: bool, resample: bool) -> Sizes:
        yield from (*_norm(c_in), *_conv(c_in, c_out, 3), *_linear(emb, c_out if song else 2 * c_out))
        yield from (*_norm(c_out), *_conv(c_out, c_out, 3))
        if c_in != c_out or (resample and song):
            yield from _conv(c_in, c_out, 1)
        if resample:  # a filter before the convolution, and one in the short cut
            yield from (filter_size, filter_size)
        if attends:
            yield from (*_norm(c_out), *_conv(c_out, 3 * c_out, 1), *_conv(c_out, c_out, 1))

    yield from (*_linear(waves, emb), *_linear(emb, emb))
    if f["augment"]:
        yield f["augment"] * waves
    if f["classes"]:
        yield from _linear(f["classes"], waves) if song else (f["classes"] * emb,)
    if song and f["embedding"] == "fourier":
        yield waves // 2
    width = mc if song else widths[0]
    yield from _conv(channels, width, 3)
    skips = [width]
    for level, target in enumerate(widths):
        if level:
            yield from block(width, width, False, True)
            skips.append(width)
        for _ in range(f["res_blocks"]):
            yield from block(width, target, height >> level in f["attention"], False)
            width = target
            skips.append(width)
    for level, target in reversed(list(enumerate(widths))):
        if level == len(widths) - 1:
            yield from (*block(width, width, True, False), *block(width, width, False, False))
        else:
            yield from block(width, width, False, True)
        for i in range(f["res_blocks"] + 1):
            attends = height >> level in f["attention"] and (not song or i == f["res_blocks"])
            yield from block(width + skips.pop(), target, attends, False)
            width = target
    if not song:
        yield from (*_norm(width), *_conv(width, channels, 3))
        return
    aux = channels
    for level in range(1, len(widths)):
        if f["encoder"] == "skip":
            yield from (filter_size, *_conv(aux, widths[level - 1], 1))
        elif f["encoder"] == "residual":
            yield from (filter_size, *_conv(aux, widths[level - 1], 3))
            aux = widths[level - 1]
    for level in range(len(widths) if f["decoder"] == "skip" else 1):
        if level < len(widths) - 1 and f["decoder"] == "skip":
            yield filter_size
        yield from (*_norm(widths[level]), *_conv(widths[level], channels, 3))


def cloneofsimo_sizes(f: Mapping[str, Any]) -> Sizes:
    """Yield the size of every tensor of `cloneofsimo.CloneofsimoUnet`."""
    d, n = f["width"], f["channels"]
    blocks = ((d, d), (d, 2 * d), (2 * d, 2 * d), (2 * d, 2 * d), (2 * d, 2 * d), (4 * d, d), (d, d))
    for c_in, c_out in blocks:
        yield from (*_norm(c_in), *_conv(c_in, c_out, 3), *_norm(c_out), *_conv(c_out, c_out, 3))
    for width in (d, d, 2 * d, 2 * d):
        yield from _linear(2 * d, width)
    yield from (*_conv(n, d, 3), *_conv(2 * d, 2 * d, 3), *_conv(2 * d + n, n, 3))


def _height(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


def _conv(c_in: int, c_out: int, kernel: int) -> tuple[int, int]:
    return c_in * c_out * kernel**2, c_out


def _linear(width_in: int, width_out: int) -> tuple[int, int]:
    return width_in * width_out, width_out


def _norm(channels: int) -> tuple[int, int]:
    return channels, channels
