# SPDX-License-Identifier: MIT
"""Folders of diffusers' DDPMPipeline and DDIMPipeline: diffusion models of discrete times, teachers to distil from.

The network stays diffusers' UNet2DModel (`networks.unet2d`); the scheduler's betas become a table of times, and what
its network predicts a scaling: `cmfast.schedule.DiscreteTimes`, `cmfast.preconditioning.prediction_scalings`. What
only a sampler does, such as timestep_spacing, plays no part.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.conditions import class_label
from cmfast.errors import ArtifactError, CmfastError
from cmfast.schedule import BETA_SCHEDULES, DiscreteTimes
from cmfast.spec import ModelSpec
from cmfast_train.importers.diffusers_json import checked_fields, number, read_fields, refusal, version_of, whole
from cmfast_train.importers.diffusers_tensors import describe, matched, read_files, weight_files
from cmfast_train.importers.facts import Draft, Facts, given_sigmas
from cmfast_train.networks.unet2d import CHOICES, Unet2dConfig, unet2d_tensors

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
PREDICTIONS = {"epsilon": "vp_eps", "v_prediction": "vp_v", "sample": "vp_x0"}  # prediction_type: scaling
STEPS = (10, 20, 50)  # numbers of steps with default noise levels: DDIM (arXiv:2010.02502), Table 1
WARNING = "a diffusion teacher, not a consistency model: its images need ten and more steps, in few they are blurred"

_FIELDS = {field.name: field for field in dataclasses.fields(Unet2dConfig)}
_UNET: dict[str, Any] = {  # fields of UNet2DModel, and what a missing one means
    **{name: None if field.default is dataclasses.MISSING else field.default for name, field in _FIELDS.items()},
    "out_channels": 3,
    "num_train_timesteps": None,  # of another time_embedding_type
}
_UNET_CHOICES: dict[str, tuple[Any, ...]] = {
    **{name: choices for name, choices in CHOICES.items() if name != "downsample_padding"},
    "downsample_padding": (1, 0),
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
}
_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample_range": 1.0,
    # of samplers
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "tensor_format": "pt",
    "timestep_spacing": "leading",
}
_SCHEDULER_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "clip_sample": (True, False),
    "predict_epsilon": (True,),  # before diffusers 0.10
    "prediction_type": tuple(PREDICTIONS),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "trained_betas": (None,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
SCHEDULER_FIELDS = {  # what a scheduler says about a model, and what a missing one means
    **{name: _SCHEDULER[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "clip_sample_range")},
    **{name: _SCHEDULER_CHOICES[name][0] for name in ("beta_schedule", "clip_sample", "prediction_type")},
}


def draft(folder: Path, facts: Facts, index: Mapping[str, Any]) -> Draft:
    """Read the JSON files and the names and shapes of the weights; the weights themselves when they are needed.

    Args:
        folder: of a whole pipeline. Folders of before diffusers 0.2 have all files at the top.
        facts: to be filled.
        index: content of its model_index.json.

    Raises:
        ArtifactError: a file is missing or broken, or a field has a value that is not supported.
        MissingDependency: diffusers is not installed.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = _network(unet / "config.json")
    files = weight_files(unet)
    described = {name: entry for file in files for name, entry in describe(file).items()}
    if config.res_blocks * len(config.channel_mult) > len(described):  # before anything of that size is built
        raise ArtifactError(f"{unet}: {len(described)} tensors are too few for layers_per_block={config.res_blocks}")
    try:
        need = {name: tuple(tensor.shape) for name, tensor in unet2d_tensors(config).items()}
    except ArtifactError:
        raise
    except CmfastError as err:
        err.args = (f"{unet / 'config.json'}: {err}",)
        raise
    matched(described, need, unet)

    def relative(file: Path) -> str:
        return str(file.relative_to(folder))

    where = relative(files[0])
    widths = ", ".join(map(str, config.block_out_channels))
    facts.fixed("weights", where, "the folder")
    facts.fixed(
        "network", f"diffusers' UNet2DModel, {config.layers_per_block} blocks a level, channels {widths}",
        relative(unet / "config.json"),
    )  # fmt: skip
    facts.fixed("parameters", sum(math.prod(shape) for shape in need.values()), where)
    for name in ("classes", "image_size"):
        facts.fixed(name, getattr(config, name), relative(unet / "config.json"))
    for name in ("head_channels", "heads", "qkv", "grid"):
        facts.fixed(name, None, "the folder")
    if dtypes := sorted({dtype for _, dtype in described.values()} - {"float32"}):
        facts.fixed("dtype", f"{' and '.join(dtypes)}, read as float32", where)
    file = scheduler / "scheduler_config.json"
    spec = _spec(config, facts, file, relative(file))
    version = version_of(index)
    return Draft(
        format="diffusers",
        what=f"a {index['_class_name']} of diffusers {version or 'of unknown version'}",
        facts=facts,
        network=config,
        spec=spec,
        source={"format": "diffusers", "pipeline": index["_class_name"], **({"diffusers": version} if version else {})},
        weights=lambda: _weights(files, need, unet),
        warnings=(WARNING,),
    )


def _network(file: Path) -> Unet2dConfig:
    """Return the network of a configuration."""
    fields = read_fields(file, ["UNet2DModel"], _UNET, _UNET_CHOICES)
    if fields["out_channels"] != fields["in_channels"]:
        need = f"supported: as many as in_channels, {fields['in_channels']}"
        raise refusal(file, "out_channels", fields["out_channels"], need)
    if fields["sample_size"] is None:
        raise refusal(file, "sample_size", None, "supported: the size of the images, pixels")
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name in _FIELDS
    }
    try:
        return Unet2dConfig(**values)
    except CmfastError as err:  # in our words; the file has diffusers'
        what = str(err).replace("res_blocks", "layers_per_block").replace("channel_mult", "block_out_channels")
        raise ArtifactError(f"{file}: {what}") from None


def _spec(config: Unet2dConfig, facts: Facts, file: Path, where: str) -> ModelSpec:
    """Return the conventions of a scheduler's configuration; `where` names it in the facts."""
    fields = read_fields(file, SCHEDULERS, _SCHEDULER, _SCHEDULER_CHOICES)
    conditions = (class_label(config.classes),) if config.classes else ()
    return scheduled_spec(facts, fields, file, where, shape=config.image_shape, conditions=conditions)


def scheduler_fields(said: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return all fields of the scheduler that hydra's configuration says, `_target_` its class.

    Raises:
        ArtifactError: it is another class's, or has a field that is not supported.
    """
    target = said.get("_target_")
    if str(target).rpartition(".")[2] not in SCHEDULERS:
        raise refusal(file, "noise_scheduler._target_", target, f"supported: {' or '.join(SCHEDULERS)}")
    return checked_fields(said, file, _SCHEDULER, _SCHEDULER_CHOICES)


def scheduled_spec(facts: Facts, fields: Mapping[str, Any], file: Path, where: str, **model: Any) -> ModelSpec:
    """Return the conventions of a network that diffusers' DDPMScheduler samples.

    Args:
        facts: to be filled.
        fields: of the scheduler, SCHEDULER_FIELDS among them.
        file: named in errors.
        where: names it in the facts.
        model: other fields of ModelSpec, its shape among them.

    Raises:
        ArtifactError: a field has a value that is not supported.
    """
    for name, allowed in _SCHEDULER_CHOICES.items():
        if name in fields and fields[name] not in allowed:
            raise refusal(file, name, fields[name], f"supported: {' or '.join(map(json.dumps, allowed))}")
    if fields["clip_sample"] and fields["clip_sample_range"] != 1:
        raise refusal(file, "clip_sample_range", fields["clip_sample_range"], "supported: 1.0")
    steps, schedule = whole(fields, "num_train_timesteps", file), fields["beta_schedule"]
    start, end = (number(fields, name, file) for name in ("beta_start", "beta_end"))
    try:
        times = DiscreteTimes(schedule=schedule, steps=steps, beta_start=start, beta_end=end)
        betas = "" if schedule == "squaredcos_cap_v2" else f", beta {start:g} to {end:g}"
        facts.fixed("times", f"{steps}, {schedule}{betas}", where)
        values: dict[str, Any] = {
            "scaling": facts.fixed("scaling", PREDICTIONS[fields["prediction_type"]], where),
            "c_noise": facts.fixed("c_noise", "discrete", where),
            "sigma_min": facts.fixed("sigma_min", times.sigmas[0], where),
            "sigma_max": facts.fixed("sigma_max", times.sigmas[-1], where),
            "clip": facts.fixed("clip", fields["clip_sample"], where),
            "sigma_data": facts.usual("sigma_data", 0.5, "usual; diffusion models do without"),
            "renoise": facts.usual("renoise", "ddim", "DDIM without noise"),
        }
        sigmas = given_sigmas(facts)
        if sigmas is None:
            sigmas = default_sigmas(times)
            facts.usual("sigmas", f"of {', '.join(map(str, sigmas))} steps", 'DDIM, timestep_spacing "trailing"')
        return ModelSpec(times=times, sigmas=sigmas, **values, **model)
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None


def default_sigmas(times: DiscreteTimes) -> dict[int, tuple[float, ...]]:
    """Return the noise levels of DDIM with STEPS steps, at evenly spaced times from the last one.

    diffusers calls these times timestep_spacing "trailing" (arXiv:2305.08891, Table 2): the first step is at the
    noise level that sampling starts from.
    """
    n = times.steps
    found = {k: tuple(times.sigma(round(n - i * n / k) - 1) for i in range(k)) for k in STEPS if 2 * k <= n}
    return found or {1: (times.sigmas[-1],)}


def _weights(files: list[Path], need: Mapping[str, tuple[int, ...]], unet: Path) -> dict[str, Tensor]:
    theirs, described = read_files(files)
    names = matched(described, need, unet)  # once more: this is what will be used
    return {
        name: theirs.pop(stored).detach().to(torch.float32).reshape(need[name]).contiguous()
        for name, stored in names.items()
    }
