# SPDX-License-Identifier: MIT
"""A checkpoint as a folder that diffusers' ConsistencyModelPipeline.from_pretrained loads. diffusers is not needed.

    model_index.json    scheduler/scheduler_config.json    unet/config.json    unet/diffusion_pytorch_model.safetensors

Names and layout are those of `cmfast_train.importers.diffusers`, which reads the folder back before it is given its
name. diffusers takes noise levels as indices into a Karras grid (`timesteps=[22, 0]`), so a model that was trained
without one is given the grid of 40 levels, and `Written.timesteps` says which indices come nearest to its defaults.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import atomic_folder, check_target_folder
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec
from cmfast_export._target import one_writer
from cmfast_train.checkpoint import Checkpoint, separate
from cmfast_train.importers import diffusers
from cmfast_train.importers.diffusers_tensors import WEIGHTS, to_diffusers
from cmfast_train.importers.facts import Facts, Given
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.networks.build import network_type
from cmfast_train.networks.shape import sides, size_text

if TYPE_CHECKING:
    from cmfast_export.request import Request

COLOURS = 3  # channels of the first noise that diffusers' pipeline takes
PIL_CHANNELS = 4  # at most, of an image
GRID = 40  # levels, where the model was trained without a grid: the default of diffusers' scheduler
VERSION = "0.21.0"  # of diffusers: the first that knows every field written here
_COMPUTED = {"scaling": "boundary", "c_noise": "250ln", "renoise": "sqrt"}  # by CMStochasticIterativeScheduler
_SAME = ("image", "classes", "clip", "sigma_min", "sigma_max", "sigma_data", *_COMPUTED)  # after reading it back


@dataclass(frozen=True, kw_only=True)
class Timesteps:
    """What to pass to the pipeline for one of the model's defaults."""

    indices: tuple[int, ...]  # timesteps=[...], descending as diffusers wants them
    sigmas: tuple[float, ...]  # noise levels that they stand for, data units, descending


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an export to diffusers made."""

    path: Path
    grid: int  # levels of the scheduler's grid, num_train_timesteps
    timesteps: Mapping[int, Timesteps]  # for each default number of steps that the grid can express
    trained_grid: bool  # whether the model was trained on that grid, or given it
    limits: str  # what diffusers' pipeline cannot do with such images; empty: nothing


@one_writer(check_target_folder)
def export_diffusers(checkpoint: Checkpoint, out: str | os.PathLike[str]) -> Written:
    """Write the folder `out`, which must be new or empty, and read it back; CheckFailed unless every bit is there."""
    check_target_folder(out)
    config, spec = _expressible(checkpoint)
    checkpoint.denoiser()  # fails unless the weights are those of the network
    grid = spec.grid or GRID
    with atomic_folder(out) as folder:
        _write_json(folder / diffusers.INDEX, _index())
        _write_json(folder / diffusers.SCHEDULER, _scheduler(spec, grid))
        _write_json(folder / diffusers.UNET, unet_config(config))
        _write_weights(folder / "unet" / f"{WEIGHTS}.safetensors", checkpoint.weights, config)
        _verify(folder, checkpoint, config)
    nearest = {steps: nearest_timesteps(sigmas, spec, grid) for steps, sigmas in sorted(spec.sigmas.items())}
    return Written(
        path=Path(out),
        grid=grid,
        timesteps={steps: t for steps, t in nearest.items() if t},
        trained_grid=bool(spec.grid),
        limits=pipeline_limits(spec.image[0]),
    )


def write(model: Checkpoint, request: Request) -> Written:
    """Write the folder of a request."""
    return export_diffusers(model, request.out)


def pipeline_limits(channels: int) -> str:
    """Return what diffusers' pipeline cannot do with images of so many channels, and what it can; "" if nothing."""
    if channels == COLOURS:
        return ""
    # ConsistencyModelPipeline.check_inputs of diffusers 0.21 to 0.42 compares with (B, 3, S, S), whatever the network.
    words = (
        f"diffusers' pipeline takes latents= of {COLOURS} channels only, a fault of diffusers, and these images have "
        f"{channels}: pass generator=, for noise that it draws itself"
    )
    return words if channels <= PIL_CHANNELS else f'{words}, and output_type="np": no PIL image has {channels} channels'


def nearest_timesteps(sigmas: Sequence[float], spec: ModelSpec, grid: int) -> Timesteps | None:
    """Return the indices of the grid whose levels come nearest to `sigmas`, by their ratio.

    None where the grid cannot express them: the pipeline starts at sigma_max whatever it is given, and the indices
    have to differ.
    """
    karras = karras_sigmas(grid, spec.sigma_min, spec.sigma_max)[:-1]  # at the last the model is the identity
    indices = [min(range(len(karras)), key=lambda i: abs(math.log(karras[i] / sigma))) for sigma in sigmas]
    if indices[0] != 0 or sorted(set(indices)) != indices:
        return None
    return Timesteps(indices=tuple(reversed(indices)), sigmas=tuple(karras[i] for i in indices))


def unet_config(config: AdmConfig) -> dict[str, Any]:
    """Return unet/config.json: the fields of diffusers' UNet2DModel."""
    resnet, levels = config.resblock_updown, range(len(config.channel_mult))
    attention = [sides(config.image_size)[0] // 2**level in config.attention for level in levels]
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    return {
        **_head("UNet2DModel"),
        "sample_size": config.image_size,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_class_embeds": config.classes or None,
        "class_embed_type": None,
        "block_out_channels": [mult * config.model_channels for mult in config.channel_mult],
        "layers_per_block": config.res_blocks,
        "down_block_types": ["AttnDownBlock2D" if here else down for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else up for here in reversed(attention)],
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "downsample_padding": 1,
        "attention_head_dim": config.head_channels,
        "add_attention": True,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        # Without it, scale_shift would leave out the norm before the attention of the middle block.
        "attn_norm_num_groups": 32 if config.scale_shift else None,
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "act_fn": "silu",
        "dropout": config.dropout,
        "mid_block_scale_factor": 1,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _expressible(checkpoint: Checkpoint) -> tuple[AdmConfig, ModelSpec]:
    """Return the network and the conventions if diffusers can compute them, else raise CmfastError."""
    config, spec = checkpoint.network, checkpoint.spec
    if not isinstance(config, AdmConfig):
        raise CmfastError(
            f"the network's type is {network_type(config)!r}; diffusers' UNet2DModel can only be 'adm': "
            "export it as ONNX"
        )
    if not isinstance(config.image_size, int):
        raise CmfastError(
            f"image_size is {size_text(config.image_size)}; diffusers' ConsistencyModelPipeline draws square images "
            "only: export it as ONNX"
        )
    for name, needed in _COMPUTED.items():
        if getattr(spec, name) != needed:
            raise CmfastError(
                f"{name} is {getattr(spec, name)!r}; diffusers' CMStochasticIterativeScheduler computes {needed!r} and "
                "no other: export it as ONNX"
            )
    if config.channel_mult[0] != 1:
        raise CmfastError(
            f"channel_mult is {config.channel_mult}; in diffusers' UNet2DModel the first level is as wide as the noise "
            "embedding, so channel_mult must begin with 1: export it as ONNX"
        )
    if config.heads:
        raise CmfastError(
            f"heads is {config.heads}; diffusers' UNet2DModel has heads of one width everywhere, attention_head_dim: "
            "export it as ONNX"
        )
    if config.patch > 1:
        raise CmfastError(
            f"patch is {config.patch}; diffusers' UNet2DModel takes pixels as they are: export it as ONNX"
        )
    if config.two_times:
        raise CmfastError(
            "two_times is True; diffusers' UNet2DModel embeds one noise level and no second: export it as ONNX"
        )
    return config, spec


def _index() -> dict[str, Any]:
    return {
        **_head("ConsistencyModelPipeline"),
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def _scheduler(spec: ModelSpec, grid: int) -> dict[str, Any]:
    return {
        **_head("CMStochasticIterativeScheduler"),
        "clip_denoised": spec.clip,
        "num_train_timesteps": grid,
        "rho": 7.0,
        "s_noise": 1.0,
        "sigma_data": spec.sigma_data,
        "sigma_max": spec.sigma_max,
        "sigma_min": spec.sigma_min,
    }


def _head(name: str) -> dict[str, str]:
    return {"_class_name": name, "_diffusers_version": VERSION}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(file: Path, weights: Mapping[str, Tensor], config: AdmConfig) -> None:
    from safetensors.torch import save_file

    theirs = to_diffusers({name: tensor.detach().cpu() for name, tensor in weights.items()}, config)
    # diffusers refuses a file that does not name the library that wrote it.
    save_file(separate(theirs), file, metadata={"format": "pt"})


def _verify(folder: Path, checkpoint: Checkpoint, config: AdmConfig) -> None:
    """Read the folder as a stranger's, and compare: conventions, network, every bit of every tensor."""
    read = diffusers.draft(folder, Facts(Given())).checkpoint(str(folder))
    for name in _SAME:
        if getattr(read.spec, name) != getattr(checkpoint.spec, name):
            raise CheckFailed(f"the folder does not read back: its {name} is another; nothing was written")
    if not isinstance(read.network, AdmConfig) or unet_config(read.network) != unet_config(config):
        raise CheckFailed("the folder does not read back: its network is another; nothing was written")
    for name, tensor in checkpoint.weights.items():
        if not _same_bits(tensor.detach().cpu(), read.weights[name]):
            raise CheckFailed(f"the folder does not read back: the weight {name} is another; nothing was written")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
