# SPDX-License-Identifier: MIT
"""Folders of lerobot's diffusion policy: config.json and model.safetensors. Its U-Net, a teacher to distil from.

The configuration says everything about the network; `statistics` finds what actions and states are normalised with.
Without `--set encoder=true` (`lerobot_encoder`) the encoder of images stays outside: what it makes of them is part of
the condition.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.importers.diffusers_json import MAX_CONFIG, is_whole, refusal, whole
from cmfast_train.importers.diffusers_tensors import describe, read_files, read_json
from cmfast_train.importers.diffusion_folders import SCHEDULER_FIELDS, scheduled_spec
from cmfast_train.importers.facts import Draft, Facts, shown
from cmfast_train.importers.policies.lerobot_encoder import ENCODER, names_of, policy_of, with_encoder
from cmfast_train.importers.policies.statistics import BUFFERS, note, statistics
from cmfast_train.importers.policies.unet1d import TEACHER, config_of, describe_network
from cmfast_train.networks.unet1d import CONDITION, Unet1dConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
UNET = "diffusion.unet."  # of the names of tensors
NETWORK = {  # fields of config.json: of our network, where the tensors show the value
    "down_dims": "down_dims",
    "kernel_size": "kernel_size",
    "diffusion_step_embed_dim": "embed_dim",
    "use_film_scale_modulation": "film_scale",
}
OBJECTS = (
    "input_features", "output_features", "normalization_mapping", "input_shapes", "output_shapes",
    "input_normalization_modes", "output_normalization_modes",
)  # fmt: skip
OTHERS = frozenset({  # fields that say nothing about the network: inputs, the encoder, sampling, training, the hub
    "type", "n_obs_steps", "n_action_steps", "horizon", "n_groups", "input_features", "output_features",
    "normalization_mapping", "input_shapes", "output_shapes", "input_normalization_modes",
    "output_normalization_modes", "vision_backbone", "resize_shape", "crop_ratio", "crop_shape", "crop_is_random",
    "pretrained_backbone_weights", "use_group_norm", "spatial_softmax_num_keypoints",
    "use_separate_rgb_encoder_per_camera", "noise_scheduler_type", "num_inference_steps", "drop_n_last_frames",
    "do_mask_loss_for_padding", "gradient_checkpointing", "compile_model", "compile_mode", "optimizer_lr",
    "optimizer_betas", "optimizer_eps", "optimizer_weight_decay", "scheduler_name", "scheduler_warmup_steps", "device",
    "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path",
    "pretrained_revision",
})  # fmt: skip


def is_policy(folder: Path) -> bool:
    """Whether a folder has a configuration of lerobot, of any policy."""
    if not (folder / CONFIG).is_file():
        return False
    values = read_json(folder / CONFIG, MAX_CONFIG)
    return isinstance(values, dict) and "_class_name" not in values and bool({"type", "horizon"} & values.keys())


def draft(folder: Path, facts: Facts) -> Draft:
    """Read the configuration, the names and shapes of the weights and the statistics; the weights when needed.

    Args:
        folder: of a policy, as lerobot's save_pretrained writes it.
        facts: to be filled.

    Raises:
        ArtifactError: a file is missing or broken, or a field has a value that is not supported.
    """
    file, weights = folder / CONFIG, folder / WEIGHTS
    fields = _fields(file)
    described = describe(weights)
    others = (UNET, ENCODER, *BUFFERS)
    if unknown := [name for name in described if not name.startswith(others)]:
        raise ArtifactError(f"{weights}: the tensor {shown(unknown[0])} is of no part of a diffusion policy")
    stored = {_ours(name): name for name in described if name.startswith(UNET)}
    shapes = {name: torch.empty(described[theirs][0], device="meta") for name, theirs in stored.items()}
    for theirs in stored.values():
        if described[theirs][1] not in ("float32", "float16", "bfloat16"):
            raise ArtifactError(f"{weights}: {shown(theirs)} is {described[theirs][1]}; need floating-point numbers")
    config = _network(fields, config_of(shapes, weights, two_times=False), file)
    facts.fixed("weights", f"{WEIGHTS}, {UNET[:-1]}", "the folder")
    describe_network(facts, config, WEIGHTS)
    facts.fixed("horizon", config.horizon, CONFIG)
    facts.fixed("groups", config.groups, CONFIG)
    has_encoder = any(name.startswith(ENCODER) for name in described)
    network: Unet1dConfig = config
    if facts.given.encoder:
        network = policy = policy_of(config, fields, _shapes(fields, "input"), file)
        stored = names_of(policy, stored, described, weights)
        facts.fixed("encoder", True, "--set")
        facts.fixed("image encoder", f"ResNet of {policy.layers} layers, {policy.keypoints} points a camera", WEIGHTS)
    elif has_encoder:
        facts.fixed("left out", f"{ENCODER[:-1]}: its output is part of {CONDITION}; --set encoder=true", WEIGHTS)
    _describe_inputs(facts, fields, config, has_encoder)
    found, where = statistics(folder, weights, described, fields, images=bool(facts.given.encoder))
    noted = note(facts, found, where)
    if "action" not in found:
        facts.fixed(
            "units", "actions as the policy normalises them; its statistics are not in the folder", "the folder"
        )
    if unread := sorted(fields.keys() - NETWORK.keys() - OTHERS - SCHEDULER_FIELDS.keys()):
        facts.fixed("not known", f"{', '.join(map(shown, unread))[:300]}; of a newer lerobot, not read", CONFIG)
    spec = scheduled_spec(
        facts, fields, file, CONFIG, shape=config.image_shape, data="array", conditions=network.conditions
    )
    return Draft(
        format="lerobot",
        what="a diffusion policy of lerobot" if facts.given.encoder else "the U-Net of a diffusion policy of lerobot",
        facts=facts,
        network=network,
        spec=spec,
        source={"format": "lerobot", **noted},
        weights=lambda: _weights(weights, stored),
        warnings=(TEACHER,),
    )


def _fields(file: Path) -> dict[str, Any]:
    """Return the configuration, with all the fields that a network needs."""
    values = read_json(file, MAX_CONFIG)
    if (kind := values.get("type", "diffusion")) != "diffusion":
        raise refusal(file, "type", kind, "of lerobot's policies only diffusion is read")
    for name in ("horizon", "n_groups", "n_obs_steps", *NETWORK, *SCHEDULER_FIELDS):
        if name not in values:
            raise ArtifactError(f"{file}: it lacks {name}; is it the config.json of a diffusion policy of lerobot?")
    for name in OBJECTS:
        if not isinstance(value := values.get(name), (dict, type(None))):
            raise refusal(file, name, value, "supported: an object, with a value for each name")
    if (kind := values.get("noise_scheduler_type", "DDPM")) not in ("DDPM", "DDIM"):
        raise refusal(file, "noise_scheduler_type", kind, "supported: DDPM or DDIM")
    return dict(values)


def _network(fields: Mapping[str, Any], read: Unet1dConfig, file: Path) -> Unet1dConfig:
    """Return the network that the tensors have, with the fields that they do not show."""
    for name, ours in NETWORK.items():
        value, found = fields[name], getattr(read, ours)
        if (tuple(value) if isinstance(value, list) else value) != found:
            raise refusal(file, name, value, f"the weights have {list(found) if isinstance(found, tuple) else found}")
    if (actions := _sizes(fields, "output").get("action")) not in (None, read.actions):
        raise ArtifactError(f"{file}: an action has {actions} numbers; the weights have {read.actions}")
    horizon, groups = whole(fields, "horizon", file), whole(fields, "n_groups", file)
    try:
        return dataclasses.replace(read, horizon=horizon, groups=groups)
    except CmfastError as err:
        raise ArtifactError(f"{file}: {str(err).replace('groups=', 'n_groups=')}") from None


def _describe_inputs(facts: Facts, fields: Mapping[str, Any], config: Unet1dConfig, has_encoder: bool) -> None:
    """Record what the encoded observation is made of, where its sizes add up to the network's."""
    steps, keypoints = fields["n_obs_steps"], fields.get("spatial_softmax_num_keypoints")
    parts = _sizes(fields, "input")
    if has_encoder and isinstance(keypoints, int):  # two coordinates each
        parts |= {name: 2 * keypoints for name in parts if "image" in name}
    # Of every step the state, then the images, then the state of the environment.
    order = sorted(parts, key=lambda name: ("image" in name) + 2 * ("environment" in name))
    if is_whole(steps) and parts and steps * sum(parts.values()) == config.global_cond:
        made = ", ".join(f"{name} {parts[name]}" for name in order)
        facts.fixed(f"{CONDITION} of", f"{steps} steps, each {made}", CONFIG)
    if is_whole(fields.get("n_action_steps")) and is_whole(steps):
        first = steps - 1
        facts.fixed(
            "executed", f"actions {first} to {first + fields['n_action_steps'] - 1} of {config.horizon}", CONFIG
        )


def _sizes(fields: Mapping[str, Any], side: str) -> dict[str, int]:
    """Return how many numbers each input or output has, by name; of images their channels."""
    return {name: shape[0] for name, shape in _shapes(fields, side).items()}


def _shapes(fields: Mapping[str, Any], side: str) -> dict[str, list[int]]:
    """Return the shape of each input or output, by name."""
    features = fields.get(f"{side}_features") or fields.get(f"{side}_shapes") or {}
    found = {}
    for name, what in features.items() if isinstance(features, dict) else ():
        shape = what.get("shape") if isinstance(what, dict) else what  # in old files the shape alone
        if isinstance(shape, list) and shape and all(is_whole(side) for side in shape):
            found[str(name)] = shape
    return found


def _ours(name: str) -> str:
    """Return the name that a tensor of lerobot's U-Net has in ours."""
    name = name.removeprefix(UNET).replace("_orig_mod.", "")
    name = re.sub(r"\.conv([12])\.block\.", lambda found: f".blocks.{int(found[1]) - 1}.block.", name)
    return re.sub(r"^((?:down|up)_modules\.\d+\.2)\.(weight|bias)$", r"\1.conv.\2", name)


def _weights(file: Path, stored: Mapping[str, str]) -> dict[str, Tensor]:
    return with_encoder(read_files([file])[0], stored)
