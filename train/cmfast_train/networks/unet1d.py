# SPDX-License-Identifier: MIT
"""The 1-D U-Net of robot policies: actions [T, A] from noise and an encoded observation, convolutions over time.

The network of Diffusion Policy (arXiv:2303.04137), and with two times of Consistency Policy (arXiv:2405.07503). The
module tree gives exactly the state-dict keys of their `ConditionalUnet1D`, so its weights load without renaming. Noise
level and observation enter every block as a scale and a shift of its channels (FiLM, arXiv:1709.07871).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.conditions import Condition
from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_types, shown
from cmfast_train.networks.count import check_values
from cmfast_train.networks.precision import cast, full_precision

CONDITION = "global_cond"  # the name of the condition, as in the original call
LARGEST = 65536  # of every width
MOST_LEVELS = 16
FINAL_GROUPS = 8  # of the last norm, whatever the others have
RESAMPLED = (3, 4)  # taps of the convolutions that halve and double the steps


@dataclass(frozen=True, kw_only=True)
class Unet1dConfig:
    """The shape of one network. Saved in the checkpoint under "network"."""

    horizon: int  # T, steps of a sequence of actions
    actions: int  # A, numbers of one action
    global_cond: int = 0  # numbers of the encoded observation; 0: it takes none
    down_dims: tuple[int, ...] = (256, 512, 1024)  # channels of each level; every level but the last halves the steps
    kernel_size: int = 3  # taps, odd
    groups: int = 8  # of every GroupNorm
    embed_dim: int = 256  # of the embedding of a noise level
    film_scale: bool = False  # the observation scales and shifts the channels; False: it shifts them
    two_times: bool = False  # takes a second noise level, CTM's s
    stop: float = 0.0  # c_noise of the second noise level where none is passed

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("horizon", "actions", "kernel_size", "groups", "embed_dim"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise CmfastError(f"{name} must be a whole number from 1 to {LARGEST}, got {getattr(self, name)}")
        if not 0 <= self.global_cond <= LARGEST:
            raise CmfastError(f"global_cond must be a whole number from 0 (none) to {LARGEST}, got {self.global_cond}")
        widths = self.down_dims
        if not 0 < len(widths) <= MOST_LEVELS or not all(0 < width <= LARGEST for width in widths):
            raise CmfastError(f"down_dims must be one to {MOST_LEVELS} widths up to {LARGEST}, got {shown(widths)}")
        if odd := [width for width in widths if width % self.groups]:
            raise CmfastError(f"a width of down_dims, {odd[0]}, is not a multiple of groups={self.groups}")
        if widths[0] % FINAL_GROUPS:
            raise CmfastError(f"the first width of down_dims must be a multiple of {FINAL_GROUPS}, got {widths[0]}")
        if self.kernel_size % 2 == 0:
            raise CmfastError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.embed_dim % 2 or self.embed_dim < 4:
            raise CmfastError(f"embed_dim must be even and at least 4, got {self.embed_dim}")
        if self.horizon % 2 ** (len(widths) - 1):
            raise CmfastError(
                f"horizon={self.horizon} cannot be halved {len(widths) - 1} times, as {len(widths)} down_dims need; "
                f"it must be a multiple of {2 ** (len(widths) - 1)}"
            )
        check_values(unet1d_sizes(vars(self)))

    @property
    def image_shape(self) -> tuple[int, int]:
        """Shape of a sample, (T, A), under the name that all networks have it."""
        return (self.horizon, self.actions)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The encoded observation, if it takes one."""
        return (Condition(name=CONDITION, shape=(self.global_cond,)),) if self.global_cond else ()

    @property
    def classes(self) -> int:
        """There are none."""
        return 0

    @property
    def channel_mult(self) -> tuple[int, ...]:
        """One entry a level, as the other networks have it."""
        return self.down_dims

    @property
    def res_blocks(self) -> int:
        """Residual blocks of a level on the way down, as the other networks have it."""
        return 2


class Unet1d(nn.Module):
    """F(x, c_noise, global_cond): x [B, T, A], c_noise [B], global_cond [B, D] or None -> [B, T, A] float32.

    With two_times also F(x, c_noise, global_cond, c_noise_next), c_noise_next [B]; without it, config.stop.
    """

    half_on_graph = True  # of its transposed convolutions

    def __init__(self, config: Unet1dConfig) -> None:
        super().__init__()
        self.config = config
        wide, dims = config.embed_dim, config.down_dims
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(wide, 4 * wide), nn.Mish(), nn.Linear(4 * wide, wide)
        )

        def level(c_in: int, c_out: int, resample: nn.Module) -> nn.ModuleList:
            return nn.ModuleList([Block(c_in, c_out, config), Block(c_out, c_out, config), resample])

        downs = [
            level(c_in, c_out, Resample(nn.Conv1d(c_out, c_out, RESAMPLED[0], 2, 1)))
            for c_in, c_out in zip((config.actions, *dims), dims[:-1], strict=False)
        ]
        last_in = dims[-2] if len(dims) > 1 else config.actions
        self.down_modules = nn.ModuleList([*downs, level(last_in, dims[-1], nn.Identity())])
        self.mid_modules = nn.ModuleList([Block(dims[-1], dims[-1], config) for _ in range(2)])
        self.up_modules = nn.ModuleList(
            level(2 * below, above, Resample(nn.ConvTranspose1d(above, above, RESAMPLED[1], 2, 1)))
            for above, below in reversed(list(pairwise(dims)))
        )
        self.final_conv = nn.Sequential(
            Convolved(dims[0], dims[0], config.kernel_size, FINAL_GROUPS), nn.Conv1d(dims[0], config.actions, 1)
        )

    def forward(
        self, x: Tensor, c_noise: Tensor, global_cond: Tensor | None = None, c_noise_next: Tensor | None = None
    ) -> Tensor:
        # c_noise is in the thousands where it is 250 ln(sigma): half precision would lose the noise level.
        with full_precision(x):
            known = [self._embedded(cast(c_noise, torch.float32))]
            if self.config.two_times:
                stop = torch.full_like(c_noise, self.config.stop) if c_noise_next is None else c_noise_next
                known.append(self._embedded(cast(stop, torch.float32)))
            if global_cond is not None:
                known.append(cast(global_cond, torch.float32))
            e = F.mish(torch.cat(known, dim=1))  # of every block's FiLM layer
        h, skips = x.transpose(1, 2), []
        for first, second, resample in map(_level, self.down_modules):
            h = second(first(h, e), e)
            skips.append(h)
            h = resample(h)
        for block in self.mid_modules:
            h = block(h, e)
        for first, second, resample in map(_level, self.up_modules):
            h = resample(second(first(torch.cat([h, skips.pop()], dim=1), e), e))
        return cast(self.final_conv(h), torch.float32).transpose(1, 2)

    def _embedded(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.diffusion_step_encoder(sines(t, self.config.embed_dim))
        return embedded

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that training shards and recomputes."""
        return [module for module in self.modules() if isinstance(module, Block)]


def _level(modules: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the two blocks of a level and what resamples after them."""
    assert isinstance(modules, nn.ModuleList)
    first, second, resample = modules
    return first, second, resample


class Block(nn.Module):
    """Two convolutions with FiLM between them, around a short cut."""

    def __init__(self, c_in: int, c_out: int, config: Unet1dConfig) -> None:
        super().__init__()
        taps, groups = config.kernel_size, config.groups
        self.blocks = nn.ModuleList([Convolved(c_in, c_out, taps, groups), Convolved(c_out, c_out, taps, groups)])
        film = nn.Linear(_known(vars(config)), (2 if config.film_scale else 1) * c_out)
        self.cond_encoder = nn.Sequential(nn.Identity(), film)
        self.residual_conv = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.film_scale = config.film_scale

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return [B, C, T] of x [B, C_in, T] and e, all that is known, after Mish [B, E]."""
        before, after = self.blocks
        h = before(x)
        with full_precision(x):
            film = cast(self.cond_encoder(e), h.dtype)[:, :, None]
        if self.film_scale:
            scale, shift = film.chunk(2, dim=1)
            h = scale * h + shift
        else:
            h = h + film
        result: Tensor = after(h) + self.residual_conv(x)
        return result


class Convolved(nn.Module):
    """Convolution, group norm, Mish; `block` as in the names of the weights."""

    def __init__(self, c_in: int, c_out: int, taps: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(c_in, c_out, taps, padding=taps // 2), nn.GroupNorm(groups, c_out), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, T] of x [B, C_in, T]."""
        y: Tensor = self.block(x)
        return y


class Resample(nn.Module):
    """A convolution that halves or doubles the steps, under the name that its weights have."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, T / 2] or [B, C, 2 T] of x [B, C, T]."""
        y: Tensor = self.conv(x)
        return y


def sines(t: Tensor, dim: int) -> Tensor:
    """Return [sin, cos] of t [B] at dim / 2 frequencies from 1 down to 1/10000, [B, dim]."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000) / (half - 1)))
    args = t[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=-1)


def unet1d_sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the size of every tensor of `Unet1d` with these fields of Unet1dConfig."""
    dims, taps, wide = fields["down_dims"], fields["kernel_size"], fields["embed_dim"]

    def conv(c_in: int, c_out: int, taps: int) -> tuple[int, int]:
        return c_in * c_out * taps, c_out

    def block(c_in: int, c_out: int) -> Iterator[int]:
        yield from (*conv(c_in, c_out, taps), c_out, c_out, *conv(c_out, c_out, taps), c_out, c_out)
        yield from conv(_known(fields), (2 if fields["film_scale"] else 1) * c_out, 1)
        if c_in != c_out:
            yield from conv(c_in, c_out, 1)

    yield from (*conv(wide, 4 * wide, 1), *conv(4 * wide, wide, 1))
    for c_in, c_out in zip((fields["actions"], *dims), dims, strict=False):
        yield from (*block(c_in, c_out), *block(c_out, c_out))
    yield from (*block(dims[-1], dims[-1]), *block(dims[-1], dims[-1]))
    for above, below in pairwise(dims):
        yield from (*block(2 * below, above), *block(above, above))
        yield from (*conv(above, above, RESAMPLED[0]), *conv(above, above, RESAMPLED[1]))
    yield from (*conv(dims[0], dims[0], taps), dims[0], dims[0], *conv(dims[0], fields["actions"], 1))


def _known(fields: Mapping[str, Any]) -> int:
    """Return how many numbers FiLM depends on: the embedded noise levels and the observation."""
    levels = 2 if fields["two_times"] else 1
    return int(levels * fields["embed_dim"] + fields["global_cond"])
