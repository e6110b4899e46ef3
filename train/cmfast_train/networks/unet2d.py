# SPDX-License-Identifier: MIT
"""diffusers' own UNet2DModel, the network of its DDPM and DDIM pipelines, under our contract F(x, c_noise, label).

Everything is diffusers' (extra `diffusers`): the layers, the names of the tensors. `importers.diffusion_folders` reads
its folders. The configuration is checked without diffusers and without torch.
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

from cmfast.errors import CmfastError, MissingDependency, one_line
from cmfast_train.config.checks import check_types, shown
from cmfast_train.networks.count import check_blocks
from cmfast_train.networks.precision import cast, full_precision
from cmfast_train.networks.shape import Size, check_image, plain_size, sides, size_text
from cmfast_train.torchvision_cpu import torchvision_datasets

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
CHOICES: Mapping[str, tuple[Any, ...]] = {  # values of fields; others need inputs or layers that DDPM's networks lack
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
LARGEST = 65536  # of every width


@dataclass(frozen=True, kw_only=True)
class Unet2dConfig:
    """The shape of one UNet2DModel: the fields of its config.json, and their defaults there. Saved under "network"."""

    sample_size: Size  # pixels: one number of square images, else (height, width)
    in_channels: int = 3  # of the image, in and out
    center_input_sample: bool = False
    time_embedding_dim: int | None = None  # None: four times the first width
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)  # width of each level
    layers_per_block: int = 2  # residual blocks of a level, on the way down; one more on the way up
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: float = 0.0  # probability
    act_fn: str = "silu"
    attention_head_dim: int | None = 8  # channels of a head; None: one head of all
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None  # of the middle block's attention; None: as resnet_time_scale_shift has it
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle block
    num_class_embeds: int | None = None  # classes; None: unconditional

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_size", plain_size(self.sample_size))
        check_types(self)
        check_image(self.in_channels, self.sample_size)
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise CmfastError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")
        self._check_sizes()
        self._check_levels()

    def _check_sizes(self) -> None:
        names = (
            "time_embedding_dim", "layers_per_block", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups",
            "num_class_embeds",
        )  # fmt: skip
        may_be_none = {field.name for field in dataclasses.fields(self) if "None" in str(field.type)}
        for name in names:
            value = getattr(self, name)
            if not (value is None and name in may_be_none) and not 0 < value <= LARGEST:
                raise CmfastError(f"{name} must be a whole number from 1 to {LARGEST}, got {shown(value)}")
        if not 0 <= self.dropout < 1:
            raise CmfastError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not (self.norm_eps > 0 and self.mid_block_scale_factor > 0 and 0 <= self.freq_shift <= 1):
            raise CmfastError(
                "need norm_eps > 0, mid_block_scale_factor > 0 and freq_shift 0 or 1, got "
                f"{self.norm_eps:g}, {self.mid_block_scale_factor:g} and {self.freq_shift}"
            )

    def _check_levels(self) -> None:
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        if not widths or not all(0 < width <= LARGEST for width in widths) or widths[0] < 4:
            raise CmfastError(f"block_out_channels must be widths from 4 to {LARGEST}, got {shown(widths)}")
        for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
            types = getattr(self, name)
            if len(types) != levels:
                raise CmfastError(f"{name} has {len(types)} entries, block_out_channels has {levels}")
            if unknown := [each for each in types if each not in known]:
                raise CmfastError(f"{name} may hold {', '.join(known)}, got {shown(unknown[0])}")
        check_blocks({"channel_mult": widths, "res_blocks": self.layers_per_block})
        if any(side % 2 ** (levels - 1) for side in sides(self.sample_size)):
            raise CmfastError(
                f"sample_size={size_text(self.sample_size)} cannot be halved {levels - 1} times, as {levels} "
                "block_out_channels need"
            )
        for groups in filter(None, (self.norm_num_groups, self.attn_norm_num_groups)):
            if odd := [width for width in widths if width % groups]:
                raise CmfastError(f"a width of block_out_channels, {odd[0]}, is not a multiple of {groups} norm groups")
        attends = [any(each.startswith("Attn") for each in pair)
                   for pair in zip(self.down_block_types, reversed(self.up_block_types), strict=True)]  # fmt: skip
        attends[-1] |= self.mid_block_type is not None and self.add_attention
        head = self.attention_head_dim
        if head and (odd := [width for width, here in zip(widths, attends, strict=True) if here and width % head]):
            raise CmfastError(f"attention_head_dim={head} does not divide the {odd[0]} channels of a level")

    @property
    def image_size(self) -> Size:
        """Size of an image, pixels."""
        return self.sample_size

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.in_channels

    @property
    def classes(self) -> int:
        """Number of classes; 0: unconditional."""
        return self.num_class_embeds or 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.in_channels, *sides(self.sample_size))

    @property
    def channel_mult(self) -> tuple[int, ...]:
        """One entry a level, as the other networks have it."""
        return self.block_out_channels

    @property
    def res_blocks(self) -> int:
        """Residual blocks of a level, as the other networks have it."""
        return self.layers_per_block


def unet2d(config: Unet2dConfig) -> nn.Module:
    """Return a new UNet2DModel as F(x, c_noise, label): x [B, C, H, W], c_noise [B], label [B] int64 or None.

    Raises:
        MissingDependency: diffusers is not installed.
        CmfastError: diffusers refuses the configuration.
    """
    return new_unet2d(out_channels=config.in_channels, **dataclasses.asdict(config))


def new_unet2d(**fields: Any) -> nn.Module:
    """Return a new UNet2DModel with these fields of its config.json; what it raises, and how it is called: `unet2d`."""
    kind = _kind()
    try:
        return kind(**fields)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, ZeroDivisionError) as err:
        raise CmfastError(f"diffusers cannot build this UNet2DModel: {one_line(err, 300)}") from None


def unet2d_sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the size of every tensor of the UNet2DModel with these fields of Unet2dConfig."""
    yield from (tensor.numel() for tensor in unet2d_tensors(Unet2dConfig(**fields)).values())


@functools.lru_cache(maxsize=1)  # a large network takes a second, even without memory
def unet2d_tensors(config: Unet2dConfig) -> Mapping[str, Tensor]:
    """Return the tensors of a UNet2DModel without their values, by name."""
    with torch.device("meta"):
        return unet2d(config).state_dict()


@functools.cache
def _kind() -> type[nn.Module]:
    """Return UNet2DModel with our signature; diffusers is imported by the first call only."""
    torchvision_datasets()  # diffusers imports torchvision, which beside a CPU torch fails without this
    try:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.embeddings import TimestepEmbedding
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.unets.unet_2d import UNet2DModel
        from diffusers.models.upsampling import Upsample2D
    except ModuleNotFoundError as err:
        raise MissingDependency("a network of diffusers", (err.name or "?").split(".")[0], "diffusers") from None

    class Unet2d(UNet2DModel):
        """diffusers' UNet2DModel as F(x, c_noise, label), float32 outside."""

        half_on_graph = True  # its linear layers and its dtype go by the first weight: `precision.convert_backbone`

        def __init__(self, **fields: Any) -> None:
            super().__init__(**fields)
            for module in self.modules():
                if type(module) is TimestepEmbedding:
                    module.__class__ = Embedding
                elif type(module) is Upsample2D and module.norm is None and not module.use_conv_transpose:
                    module.__class__ = Doubling

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:  # type: ignore[override]
            (output,) = super().forward(x, cast(c_noise, torch.float32), label, return_dict=False)
            return cast(output, torch.float32)

        def blocks(self) -> list[nn.Module]:
            """Return the blocks that training shards and recomputes."""
            return [module for module in self.modules() if isinstance(module, (ResnetBlock2D, Attention))]

    class Embedding(TimestepEmbedding):
        """The embedding of the noise level, float32 also where training runs in half precision."""

        def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
            with full_precision(sample):
                embedded: Tensor = super().forward(sample, condition)
                return embedded

    class Doubling(Upsample2D):
        """Pixels doubled, then a convolution: no branch by the size of the batch, which a trace would follow one way.

        diffusers copies large tensors that are channels_last there, against faults of old PyTorch (pytorch/pytorch
        #81665, #141831). To be removed when it no longer does.
        """

        def forward(self, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
            x = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest") if self.interpolate else hidden_states
            layer: nn.Module | None = self.conv if self.name == "conv" else self.Conv2d_0
            return layer(x) if self.use_conv and layer is not None else x

    return Unet2d
