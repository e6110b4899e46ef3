# SPDX-License-Identifier: MIT
"""OpenAI's consistency decoder, as diffusers has it: a folder of ConsistencyDecoderVAE, without its encoder.

It decodes latents of Stable Diffusion 1 and 2 in two calls. In variance-exploding coordinates its scaling is EDM's: the
scheduler's c_skip, c_out and c_in are those of x / sqrt(alpha), and its noise levels a table of cosine times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.conditions import Condition
from cmfast.errors import ArtifactError, CmfastError
from cmfast.schedule import DiscreteTimes
from cmfast.spec import ModelSpec
from cmfast_train.importers.diffusers_json import list_of, number, read_fields, refusal, version_of, whole
from cmfast_train.importers.diffusers_tensors import describe, matched, read_files, weight_files
from cmfast_train.importers.facts import Draft, Facts, given_sigmas
from cmfast_train.networks.consistency_decoder import (
    CHANNELS,
    MEANS,
    ConsistencyDecoderConfig,
    decoder_tensors,
)  # fmt: skip

CLASS = "ConsistencyDecoderVAE"
CODE = "openai/consistencydecoder"  # where what no file says comes from
SCHEDULED = (1008, 512)  # times of its calls: schedule [1.0, 0.5] of 1024 times in 64 steps
SIGMA_DATA = 0.5
DECODER, OTHERS = "decoder_unet.", ("encoder.", "quant_conv.")  # of the names of tensors

_FIELDS: dict[str, Any] = {  # and what a missing one means
    "scaling_factor": 0.18215,
    "sample_size": 32,  # of tiles
    "block_out_channels": None,  # the encoder's
    "decoder_block_out_channels": [320, 640, 1024, 1024],
    "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "decoder_downsample_padding": 1,
    "decoder_layers_per_block": 3,
    "decoder_norm_eps": 1e-5,
    "decoder_norm_num_groups": 32,
    "decoder_num_train_timesteps": 1024,
    "encoder_act_fn": "silu",
    "encoder_block_out_channels": [128, 256, 512, 512],
    "encoder_double_z": True,
    "encoder_down_block_types": [],
    "encoder_in_channels": 3,
    "encoder_layers_per_block": 2,
    "encoder_norm_num_groups": 32,
    "encoder_out_channels": 4,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "latent_channels": (len(MEANS),),
    "force_upcast": (False, True),
    "decoder_add_attention": (False, True),
    "decoder_in_channels": (CHANNELS + len(MEANS),),
    "decoder_out_channels": (2 * CHANNELS,),
    "decoder_resnet_time_scale_shift": ("scale_shift", "default"),
    "decoder_time_embedding_type": ("learned",),
}


def draft(folder: Path, facts: Facts, config: Mapping[str, Any]) -> Draft:
    """Read the configuration and the names and shapes of the weights; the weights themselves when they are needed.

    Args:
        folder: of the autoencoder, with config.json and its weights.
        facts: to be filled. The size of the images is required: the network takes any.
        config: content of config.json.

    Raises:
        ArtifactError: a file is missing or broken, or a field has a value that is not supported.
        MissingDependency: diffusers is not installed.
    """
    file = folder / "config.json"
    fields = read_fields(file, [CLASS], _FIELDS, _CHOICES)
    size = facts.required("image_size", 512)
    network = _network(fields, file, 512 if size is None else size)
    files = weight_files(folder)
    described = {name: entry for each in files for name, entry in describe(each).items()}
    decoder = {name.removeprefix(DECODER): entry for name, entry in described.items() if name.startswith(DECODER)}
    if unknown := [name for name in described if not name.startswith((DECODER, *OTHERS))]:
        raise ArtifactError(
            f"{folder}: the tensor {unknown[0][:100]!r} belongs neither to an encoder nor to the decoder"
        )
    if network.res_blocks * len(network.channel_mult) > len(decoder):  # before anything of that size is built
        raise ArtifactError(f"{folder}: {len(decoder)} tensors of {DECODER} are too few for its configuration")
    need = {name.removeprefix("unet."): tuple(tensor.shape) for name, tensor in decoder_tensors(network).items()}
    matched(decoder, need, folder)
    where = files[0].name
    facts.fixed("weights", f"{where}, {DECODER[:-1]}", "the folder")
    widths = ", ".join(map(str, network.block_out_channels))
    facts.fixed(
        "network",
        f"diffusers' UNet2DModel, {network.layers_per_block} blocks a level, channels {widths}",
        "config.json",
    )
    facts.fixed("parameters", sum(math.prod(shape) for shape in need.values()), where)
    for name in ("head_channels", "heads", "qkv", "grid", "classes"):
        facts.fixed(name, None, "the folder")
    if dtypes := sorted({dtype for _, dtype in decoder.values()} - {"float32"}):
        facts.fixed("dtype", f"{' and '.join(dtypes)}, read as float32", where)
    spec = _spec(network, facts)
    version = version_of(config)
    return Draft(
        format="diffusers",
        what=f"a {CLASS} of diffusers {version or 'of unknown version'}: latents to images, in two calls",
        facts=facts,
        network=network if size is not None else None,
        spec=spec if size is not None else None,
        source={"format": "diffusers", "pipeline": CLASS, **({"diffusers": version} if version else {})},
        weights=lambda: _weights(files, need, folder),
    )


def _network(fields: Mapping[str, Any], file: Path, size: Any) -> ConsistencyDecoderConfig:
    steps = whole(fields, "decoder_num_train_timesteps", file)
    if steps <= SCHEDULED[0]:
        raise refusal(file, "decoder_num_train_timesteps", steps, "supported: 1024, which its noise levels are for")
    shared = {field.name for field in dataclasses.fields(ConsistencyDecoderConfig)}
    decoder: dict[str, Any] = {
        name.removeprefix("decoder_"): tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name.removeprefix("decoder_") in shared and name.startswith("decoder_")
    }
    levels = len(list_of(fields, "encoder_block_out_channels", file))
    try:
        return ConsistencyDecoderConfig(
            sample_size=size,
            factor=2 ** (levels - 1),
            scaling_factor=number(fields, "scaling_factor", file),
            steps=steps,
            **decoder,
        )
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None


def _spec(network: ConsistencyDecoderConfig, facts: Facts) -> ModelSpec:
    """Return the conventions, which are the scheduler's in code: its configuration is in no file."""
    times = DiscreteTimes(schedule="squaredcos_cap_v2", steps=network.steps)
    facts.fixed("times", f"{network.steps}, squaredcos_cap_v2", CODE)
    values: dict[str, Any] = {
        "scaling": facts.fixed("scaling", "edm", CODE),
        "c_noise": facts.fixed("c_noise", "discrete", CODE),
        "renoise": facts.fixed("renoise", "plain", CODE),
        "sigma_data": facts.fixed("sigma_data", SIGMA_DATA, CODE),
        "sigma_min": facts.fixed("sigma_min", times.sigmas[0], CODE),
        "sigma_max": facts.fixed("sigma_max", times.sigmas[SCHEDULED[0]], CODE),
        "clip": facts.usual("clip", True, f"{CODE}; diffusers does not clip between its calls"),
    }
    sigmas = given_sigmas(facts)
    if sigmas is None:
        sigmas = {len(SCHEDULED): tuple(times.sigmas[time] for time in SCHEDULED)}
        facts.usual("sigmas", tuple(sigmas.values()), CODE)
    latent = Condition(name="latent", shape=network.latent_shape)
    return ModelSpec(
        shape=network.image_shape, data="image", conditions=(latent,), times=times, sigmas=sigmas, **values
    )


def _weights(files: list[Path], need: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
    tensors, described = read_files(files)
    theirs = {name: entry for name, entry in described.items() if name.startswith(DECODER)}
    names = matched({name.removeprefix(DECODER): entry for name, entry in theirs.items()}, need, folder)
    return {
        f"unet.{name}": tensors.pop(DECODER + stored).detach().to(torch.float32).reshape(need[name]).contiguous()
        for name, stored in names.items()
    }
