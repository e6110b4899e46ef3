# SPDX-License-Identifier: MIT
"""The network of OpenAI's consistency decoder: from a latent of Stable Diffusion's encoder to an image.

F(x, c_noise, latent), as diffusers' ConsistencyDecoderVAE calls its UNet2DModel (extra `diffusers`): the latent is
normalised, enlarged to the size of the image and put beside it as channels; of the output the first half is F, the rest
is not used. The noise embedding is a table with an entry for each discrete time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast.schedule import MAX_TIMES
from cmfast_train.config.checks import check_types, shown
from cmfast_train.networks.precision import cast
from cmfast_train.networks.shape import Size, check_image, plain_size, sides, size_text
from cmfast_train.networks.unet2d import Unet2dConfig, new_unet2d

# Of the encoder's latents, by channel: openai/consistencydecoder, ldm_transform_latent.
MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)
CHANNELS = 3  # of the images
PARTS = 1024  # of the way between two times; see Times


@dataclass(frozen=True, kw_only=True)
class ConsistencyDecoderConfig:
    """The shape of the decoder. Its fields are those of Unet2dConfig, where they have the same name."""

    sample_size: Size  # pixels of the image: one number of square images, else (height, width)
    factor: int = 8  # pixels of the image for one of the latent, along each axis
    scaling_factor: float = 0.18215  # of Stable Diffusion's latents
    steps: int = 1024  # discrete times, entries of the table
    down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (320, 640, 1024, 1024)
    layers_per_block: int = 3
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "scale_shift"
    add_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_size", plain_size(self.sample_size))
        check_types(self)
        check_image(CHANNELS, self.sample_size)
        for name, least, most in (("steps", 2, MAX_TIMES), ("factor", 1, 64)):
            if not least <= getattr(self, name) <= most:
                raise CmfastError(f"{name} must be a whole number from {least} to {most}, got {getattr(self, name)}")
        if not 0 < self.scaling_factor < 1e6:
            raise CmfastError(f"scaling_factor must be a positive number, got {shown(self.scaling_factor)}")
        if any(side % self.factor for side in sides(self.sample_size)):
            raise CmfastError(
                f"image_size={size_text(self.sample_size)} is not a multiple of {self.factor}, one latent pixel"
            )
        self.unet()

    def unet(self) -> Unet2dConfig:
        """Return what the U-Net inside has in common with others, checked; it has more channels."""
        own = ("factor", "scaling_factor", "steps")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}
        return Unet2dConfig(in_channels=CHANNELS, **fields)

    @property
    def image_size(self) -> Size:
        """Size of an image, pixels."""
        return self.sample_size

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return CHANNELS

    @property
    def classes(self) -> int:
        """There are none."""
        return 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (CHANNELS, *sides(self.sample_size))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a latent, (C, H, W)."""
        height, width = sides(self.sample_size)
        return (len(MEANS), height // self.factor, width // self.factor)

    @property
    def channel_mult(self) -> tuple[int, ...]:
        """One entry a level, as the other networks have it."""
        return self.block_out_channels

    @property
    def res_blocks(self) -> int:
        """Residual blocks of a level, as the other networks have it."""
        return self.layers_per_block


def consistency_decoder(config: ConsistencyDecoderConfig) -> nn.Module:
    """Return a new decoder F(x, c_noise, latent): x [B, 3, H, W], c_noise [B], latent [B, 4, H / 8, W / 8].

    Raises:
        MissingDependency: diffusers is not installed.
        CmfastError: diffusers refuses the configuration.
    """
    return ConsistencyDecoder(config)


def decoder_sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the size of every tensor of the decoder with these fields of ConsistencyDecoderConfig."""
    yield from (tensor.numel() for tensor in decoder_tensors(ConsistencyDecoderConfig(**fields)).values())


@functools.lru_cache(maxsize=1)
def decoder_tensors(config: ConsistencyDecoderConfig) -> Mapping[str, Tensor]:
    """Return the tensors of a decoder without their values, by name."""
    with torch.device("meta"):
        return consistency_decoder(config).state_dict()


class ConsistencyDecoder(nn.Module):
    """The decoder's network, float32 outside."""

    half_on_graph = True  # as unet2d's

    def __init__(self, config: ConsistencyDecoderConfig) -> None:
        super().__init__()
        self.factor, self.scaling_factor = config.factor, config.scaling_factor
        fields = dataclasses.asdict(config.unet()) | {
            "in_channels": CHANNELS + len(MEANS),
            "out_channels": 2 * CHANNELS,
            "time_embedding_type": "learned",
            "num_train_timesteps": config.steps,
        }
        self.unet = new_unet2d(**fields)
        assert isinstance(self.unet.time_proj, nn.Embedding)
        self.unet.time_proj.__class__ = Times

    def forward(self, x: Tensor, c_noise: Tensor, latent: Tensor) -> Tensor:
        """Return F [B, 3, H, W]."""
        means, stds = (latent.new_tensor(values)[:, None, None] for values in (MEANS, STDS))
        features = F.interpolate(
            (latent * self.scaling_factor - means) / stds, scale_factor=float(self.factor), mode="nearest"
        )
        output: Tensor = self.unet(torch.cat([x, cast(features, x.dtype)], dim=1), c_noise)
        return output[:, :CHANNELS]


class Times(nn.Embedding):
    """The entry of a discrete time; between two times what lies between their entries.

    Times come from noise levels by logarithms in float32. They are rounded to a PARTS-th, so that the times of the
    table have their own entries and nothing of their neighbours'.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the entries [B, C] of times [B] from 0 to the last."""
        time = (input * PARTS).round() / PARTS
        low = time.floor().clamp(0, self.num_embeddings - 2)
        part, low = (time - low)[:, None], low.long()
        below, above = super().forward(low), super().forward(low + 1)
        return below + part * (above - below)
