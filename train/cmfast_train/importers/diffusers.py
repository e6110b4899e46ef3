# SPDX-License-Identifier: MIT
"""Folders of diffusers' ConsistencyModelPipeline, read without diffusers: three JSON files and the weights.

Folders of its diffusion models go on to `diffusion_folders`.

Such a folder says everything: the shape of the network, the scheduler's noise levels; the conventions are what
CMStochasticIterativeScheduler computes. What our U-Net cannot compute is refused by the name of the field. An
option that this version does not know is let pass where it is switched off (null, false, 0, empty), else refused.
The tensors are the affair of `diffusers_tensors`; `cmfast_export.targets.diffusers_folder` writes the same folders.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmfast.conditions import class_label
from cmfast.errors import ArtifactError, CmfastError
from cmfast.formats.shipped import hidden
from cmfast.schedule import sigmas_of_indices
from cmfast.spec import ModelSpec
from cmfast_train.importers import diffusion_folders
from cmfast_train.importers.decoders import consistency_decoder
from cmfast_train.importers.diffusers_json import (
    is_whole,
    list_of,
    number,
    read_config,
    read_fields,
    refusal,
    version_of,
    whole,
)
from cmfast_train.importers.diffusers_tensors import MID_NORM, describe, match_names, read_weights, weight_files
from cmfast_train.importers.facts import Draft, Facts, given_sigmas
from cmfast_train.importers.openai import NETWORKS, RELEASED
from cmfast_train.networks.adm import AdmConfig

INDEX, SCHEDULER, UNET = "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"

_UNET: dict[str, Any] = {  # fields of UNet2DModel, and what a missing one means
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of another time_embedding_type
    "_name_or_path": "",  # where it was loaded from
}
_UNET_CHOICES: dict[str, tuple[Any, ...]] = {  # the same, with the values that our U-Net computes; missing: the first
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "attn_norm_num_groups": (None, 32),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
_BLOCKS: dict[str, dict[str, tuple[bool, str]]] = {  # type: has attention, resamples by; "": as *sample_type says
    "down": {
        "ResnetDownsampleBlock2D": (False, "resnet"),
        "DownBlock2D": (False, "conv"),
        "AttnDownBlock2D": (True, ""),
    },
    "up": {"ResnetUpsampleBlock2D": (False, "resnet"), "UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, "")},
}
_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
_SCHEDULER_CHOICES: dict[str, tuple[Any, ...]] = {"s_noise": (1,), "rho": (7,), "clip_denoised": (True, False)}


def draft(folder: Path, facts: Facts) -> Draft:
    """Read the JSON files and the names and shapes of the weights; the weights themselves on request."""
    if not (folder / INDEX).is_file() and (folder / "config.json").is_file() and folder.name != Path(UNET).parts[0]:
        return consistency_decoder.draft(folder, facts, read_config(folder / "config.json", consistency_decoder.CLASS))
    if not (folder / INDEX).is_file():
        raise ArtifactError(
            f"{folder}: no {INDEX} in it; name the folder of a whole ConsistencyModelPipeline, "
            f"DDPMPipeline or DDIMPipeline, which holds that file beside scheduler and unet{hidden(folder)}"
        )
    index = read_config(folder / INDEX, "ConsistencyModelPipeline", *diffusion_folders.PIPELINES)
    if index["_class_name"] in diffusion_folders.PIPELINES:
        return diffusion_folders.draft(folder, facts, index)
    unet = read_fields(folder / UNET, ["UNet2DModel"], _UNET, _UNET_CHOICES)
    scheduler = read_fields(folder / SCHEDULER, ["CMStochasticIterativeScheduler"], _SCHEDULER, _SCHEDULER_CHOICES)
    config = _network(unet, folder / UNET)
    # Without the field, diffusers has no norm before the attention of the middle block; our U-Net always has one.
    unnormed = unet["resnet_time_scale_shift"] == "scale_shift" and unet["attn_norm_num_groups"] is None

    files = weight_files(folder / "unet")
    described = {name: entry for file in files for name, entry in describe(file).items()}
    match_names(described, config, folder, unnormed)
    where = f"unet/{files[0].name}"
    widths = ", ".join(str(mult * config.model_channels) for mult in config.channel_mult)
    facts.fixed("weights", where, "the folder")
    facts.fixed("network", f"ADM U-Net, {config.res_blocks} blocks a level, channels {widths}", UNET)
    facts.fixed("parameters", sum(math.prod(shape) for shape, _ in described.values()), where)
    for name in ("classes", "image_size", "head_channels"):
        facts.fixed(name, getattr(config, name), UNET)
    facts.fixed("qkv", "separate q, k, v", where)
    if dtypes := sorted({dtype for _, dtype in described.values()} - {"float32"}):
        facts.fixed("dtype", f"{' and '.join(dtypes)}, read as float32", where)

    version = version_of(index)
    release = _release(folder, config, index, unet)
    spec = _spec(scheduler, config, facts, release, folder / SCHEDULER)
    warning = (
        f"{folder / UNET}: scale_shift without attn_norm_num_groups is a known broken conversion; its weights hold "
        f"{MID_NORM}, which diffusers leaves out and which is used here, as in the original model"
    )
    return Draft(
        format="diffusers",
        what=f"a ConsistencyModelPipeline of diffusers {version or 'of unknown version'}",
        facts=facts,
        network=config,
        spec=spec,
        source={
            "format": "diffusers",
            **({"name": release} if release else {}),
            "qkv": "separate",
            **({"diffusers": version} if version else {}),
        },
        weights=lambda: read_weights(files, config, folder, unnormed),
        warnings=(warning,) if unnormed else (),
    )


def _network(unet: Mapping[str, Any], file: Path) -> AdmConfig:
    """Return the U-Net of a configuration, or refuse what ours cannot be."""
    widths = list_of(unet, "block_out_channels", file)
    if not widths or any(not is_whole(width) or width % widths[0] for width in widths):
        raise refusal(file, "block_out_channels", widths, "supported: whole multiples of the first")
    channels, size = whole(unet, "in_channels", file), unet["sample_size"]
    if unet["out_channels"] != channels:
        raise refusal(file, "out_channels", unet["out_channels"], f"supported: as many as in_channels, {channels}")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not is_whole(size):
        raise refusal(file, "sample_size", size, "supported: one number of pixels, for square images")
    if unet["time_embedding_dim"] not in (None, 0, 4 * widths[0]):
        raise refusal(file, "time_embedding_dim", unet["time_embedding_dim"], f"supported: {4 * widths[0]}")

    attention, resblock_updown = _attention_levels(unet, len(widths), file)
    if not resblock_updown and unet["downsample_padding"] != 1:
        raise refusal(file, "downsample_padding", unet["downsample_padding"], "supported: 1")
    attended = [width for width, here in zip(widths, attention, strict=True) if here] + widths[-1:]
    head = unet["attention_head_dim"]
    if head is None and len(set(attended)) == 1:
        head = attended[0]  # one head of all channels
    if not is_whole(head) or any(width % head for width in attended):
        raise refusal(file, "attention_head_dim", head, f"supported: a divisor of the channels, {attended}")
    classes = 0 if unet["num_class_embeds"] is None else whole(unet, "num_class_embeds", file)
    res_blocks, dropout = whole(unet, "layers_per_block", file), number(unet, "dropout", file)
    try:
        return AdmConfig(
            image_size=size,
            channels=channels,
            classes=classes,
            model_channels=widths[0],
            res_blocks=res_blocks,
            channel_mult=tuple(width // widths[0] for width in widths),
            attention=tuple(size // 2**level for level, here in enumerate(attention) if here),
            head_channels=head,
            scale_shift=unet["resnet_time_scale_shift"] == "scale_shift",
            resblock_updown=resblock_updown,
            dropout=dropout,
        )
    except CmfastError as err:  # in our words; the file has diffusers'
        what = str(err).replace("res_blocks", "layers_per_block").replace("channel_mult", "block_out_channels")
        raise ArtifactError(f"{file}: {what}") from None


def _attention_levels(unet: Mapping[str, Any], count: int, file: Path) -> tuple[list[bool], bool]:
    """Return which levels attend, the widest image first, and whether residual blocks resample (else convolutions)."""
    ways: dict[str, list[tuple[bool, str]]] = {}
    for way, types in _BLOCKS.items():
        names = list_of(unet, f"{way}_block_types", file)
        for name in names:
            if not isinstance(name, str) or name not in types:
                raise refusal(file, f"{way}_block_types", names, f"supported: {', '.join(types)}")
        if len(names) != count:
            raise refusal(file, f"{way}_block_types", names, f"block_out_channels has {count}")
        default = unet[f"{way}sample_type"] or "conv"
        ways[way] = [(types[name][0], types[name][1] or default) for name in names]
    down, up = ways["down"], ways["up"][::-1]
    attention = [here for here, _ in down]
    if attention != [here for here, _ in up]:
        need = "supported: attention at the same levels as in down_block_types"
        raise refusal(file, "up_block_types", unet["up_block_types"], need)
    # The deepest level is not halved, and the widest not doubled.
    how = {resample for _, resample in (*down[:-1], *up[1:])} or {down[0][1]}
    if len(how) > 1:
        raise ArtifactError(
            f"{file}: down_block_types, up_block_types, downsample_type and upsample_type mix resampling by residual "
            "blocks and by convolutions; supported: one of the two at all levels, both ways"
        )
    return attention, how == {"resnet"}


def _spec(scheduler: Mapping[str, Any], config: AdmConfig, facts: Facts, release: str, file: Path) -> ModelSpec:
    """Return the conventions: the scheduler's numbers, and what its class computes."""
    values: dict[str, Any] = {
        name: facts.fixed(name, value, "CMStochasticIterativeScheduler")
        for name, value in {"scaling": "boundary", "c_noise": "250ln", "renoise": "sqrt"}.items()
    }
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        values[name] = facts.fixed(name, number(scheduler, name, file), SCHEDULER)
    values["clip"] = facts.fixed("clip", bool(scheduler["clip_denoised"]), SCHEDULER)
    grid = values["grid"] = facts.fixed("grid", whole(scheduler, "num_train_timesteps", file), SCHEDULER)
    try:
        conditions = (class_label(config.classes),) if config.classes else ()
        first: dict[int, tuple[float, ...]] = {1: (values["sigma_max"],)}
        spec = ModelSpec(shape=config.image_shape, data="image", conditions=conditions, **values, sigmas=first)
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None

    known = RELEASED.get(release)
    if (given := given_sigmas(facts)) is not None:
        return dataclasses.replace(spec, sigmas=given)
    if known and (known.grid, known.image_size) == (grid, config.image_size):
        where = "the sister file of bedroom256; none was published" if known.borrowed else f"the released {release}"
        sigmas = {**spec.sigmas, **known.sigmas}
    else:
        sigmas, where = {**spec.sigmas, **_even_sigmas(spec)}, "diffusers' num_inference_steps=2 and 4"
    facts.usual("sigmas", tuple(sigmas.values()), where)
    return dataclasses.replace(spec, sigmas=sigmas)


def _even_sigmas(spec: ModelSpec) -> dict[int, tuple[float, ...]]:
    """Return the noise levels of 2 and 4 steps that CMStochasticIterativeScheduler.set_timesteps(K) takes.

    They are every (N // K)-th of its grid of N, from the first. Where that includes the last there are none: at
    sigma_min the model is the identity.
    """
    found: dict[int, tuple[float, ...]] = {}
    for steps in (2, 4):
        indices = [step * (spec.grid // steps) for step in range(steps)]
        sigmas = sigmas_of_indices(indices, spec.grid, spec.sigma_min, spec.sigma_max)
        if len(sigmas) == steps:
            found[steps] = sigmas
    return found


def _release(folder: Path, config: AdmConfig, *files: Mapping[str, Any]) -> str:
    """Return the name of OpenAI's released model that a folder is a conversion of, or "": by its name, or its files'.

    The hub's cache calls a folder models--openai--diffusers-cd_imagenet64_l2/snapshots/HASH.
    """
    path = folder.absolute()
    names = [str(values.get("_name_or_path", "")) for values in files]
    names += [path.name, path.parent.parent.name if path.parent.name == "snapshots" else ""]
    for name in names:
        for release, known in RELEASED.items():
            network = {"image_size": known.image_size, **NETWORKS[known.image_size]}
            if known.scaling == "boundary" and re.search(rf"(?<![a-z0-9]){release}(?![a-z0-9])", name):
                return release if all(getattr(config, field) == value for field, value in network.items()) else ""
    return ""
