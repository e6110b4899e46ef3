# SPDX-License-Identifier: MIT
"""Robot policies as Diffusion Policy and Consistency Policy save them, and their U-Net by its formulas.

Written from the papers and the names of the tensors, with functions instead of modules: another way than ours.
"""

from __future__ import annotations

import functools
import json
import math
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cmfast_train.networks.adm import randomise
from cmfast_train.networks.unet1d import Unet1d, Unet1dConfig

Weights = dict[str, Tensor]
SMALL: dict[str, Any] = {"horizon": 8, "actions": 3, "down_dims": (8, 16), "kernel_size": 5, "embed_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "film": SMALL | {"film_scale": True, "global_cond": 5},
    "shift": SMALL | {"kernel_size": 3, "groups": 4, "down_dims": (8, 8, 16)},
    "one level": SMALL | {"down_dims": (16,), "global_cond": 2},
}


def weights_of(case: str = "film", seed: int = 0, **changes: Any) -> Weights:
    """Return random weights by the names of `ConditionalUnet1D`."""
    network = Unet1d(Unet1dConfig(**CASES[case] | changes))
    randomise(network, seed)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def workspace(policy: str = "ema_model", cfg: Any = None, **networks: Weights) -> dict[str, Any]:
    """Return what a workspace saves of a policy: its networks by attribute, an encoder of images, a normalizer."""
    state = {f"{name}.{key}": value for name, weights in networks.items() for key, value in weights.items()}
    others = {
        "obs_encoder.net.weight": torch.ones(2, 3),
        "normalizer.params_dict.action.scale": torch.tensor([2.0, 4.0, 0.1]),
        "normalizer.params_dict.action.offset": torch.tensor([0.0, -1.0, 0.5]),
    }
    return {"cfg": cfg, "state_dicts": {policy: state | others}, "pickles": {"epoch": b"\x80\x04K\x01."}}


def hydra(values: Any) -> Any:
    """Return a configuration as OmegaConf's objects; their modules are `omegaconf_modules`."""
    kinds = omegaconf_modules()
    if isinstance(values, dict):
        made = kinds["omegaconf.dictconfig"].DictConfig()
        made._content = {name: hydra(value) for name, value in values.items()}
    elif isinstance(values, list):
        made = kinds["omegaconf.listconfig"].ListConfig()
        made._content = [hydra(value) for value in values]
    else:
        made = kinds["omegaconf.nodes"].AnyNode()
        made._val = values
    made._metadata, made._parent = None, None
    return made


@functools.cache
def omegaconf_modules() -> dict[str, Any]:
    """Return modules by name with the classes of hydra's configurations, for sys.modules while one is saved."""
    found = {}
    for module, kind in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode")):
        name = f"omegaconf.{module}"
        found[name] = types.ModuleType(name)
        setattr(found[name], kind, type(kind, (), {"__module__": name}))
    return found | {"omegaconf": types.ModuleType("omegaconf")}


def unet(w: Weights, x: Tensor, times: list[Tensor], cond: Tensor | None = None, groups: int = 8) -> Tensor:
    """Return the output of the U-Net, [B, T, A].

    Args:
        w: weights by name.
        x: [B, T, A].
        times: of each noise level that it takes, [B].
        cond: the encoded observation [B, D].
        groups: of the norms, except the last.
    """
    known = torch.cat([*(_time(w, t) for t in times), *([] if cond is None else [cond])], dim=1)
    levels = len({name.split(".")[1] for name in w if name.startswith("down_modules.")})
    h, skips = x.movedim(1, 2), []
    for level in range(levels):
        for block in (0, 1):
            h = _block(w, f"down_modules.{level}.{block}", h, known, groups)
        skips.append(h)
        if level < levels - 1:
            h = F.conv1d(h, *_layer(w, f"down_modules.{level}.2.conv"), stride=2, padding=1)
    for block in (0, 1):
        h = _block(w, f"mid_modules.{block}", h, known, groups)
    for level in range(levels - 1):
        h = torch.cat([h, skips.pop()], dim=1)
        for block in (0, 1):
            h = _block(w, f"up_modules.{level}.{block}", h, known, groups)
        h = F.conv_transpose1d(h, *_layer(w, f"up_modules.{level}.2.conv"), stride=2, padding=1)
    h = _convolved(w, "final_conv.0", h, 8)
    return F.conv1d(h, *_layer(w, "final_conv.1")).movedim(2, 1)


def _layer(w: Weights, name: str) -> tuple[Tensor, Tensor]:
    return w[f"{name}.weight"], w[f"{name}.bias"]


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def _time(w: Weights, t: Tensor) -> Tensor:
    half = w["diffusion_step_encoder.1.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))  # float32, as there
    h = F.linear(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1), *_layer(w, "diffusion_step_encoder.1"))
    return F.linear(_mish(h), *_layer(w, "diffusion_step_encoder.3"))


def _convolved(w: Weights, name: str, h: Tensor, groups: int) -> Tensor:
    weight, bias = _layer(w, f"{name}.block.0")
    h = F.conv1d(h, weight, bias, padding=weight.shape[2] // 2)
    return _mish(F.group_norm(h, groups, *_layer(w, f"{name}.block.1")))


def _block(w: Weights, name: str, x: Tensor, known: Tensor, groups: int) -> Tensor:
    h = _convolved(w, f"{name}.blocks.0", x, groups)
    film = F.linear(_mish(known), *_layer(w, f"{name}.cond_encoder.1"))[..., None]
    if film.shape[1] == 2 * h.shape[1]:
        scale, shift = film[:, : h.shape[1]], film[:, h.shape[1] :]
        h = h * scale + shift
    else:
        h = h + film
    h = _convolved(w, f"{name}.blocks.1", h, groups)
    short = f"{name}.residual_conv"
    return h + (F.conv1d(x, *_layer(w, short)) if f"{short}.weight" in w else x)


LEROBOT: dict[str, Any] = {  # config.json of a policy with a state and one camera
    "type": "diffusion",
    "n_obs_steps": 2,
    "input_features": {
        "observation.image": {"type": "VISUAL", "shape": [3, 96, 96]},
        "observation.state": {"type": "STATE", "shape": [2]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [3]}},
    "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    "horizon": 8,
    "n_action_steps": 4,
    "vision_backbone": "resnet18",
    "spatial_softmax_num_keypoints": 4,
    "down_dims": [8, 16],
    "kernel_size": 5,
    "n_groups": 8,
    "diffusion_step_embed_dim": 8,
    "use_film_scale_modulation": True,
    "noise_scheduler_type": "DDPM",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "optimizer_lr": 1e-4,
    "license": "apache-2.0",
}
LEROBOT_COND = 2 * (2 + 2 * 4)  # of two steps: the state and two coordinates a keypoint
STATISTICS = {
    "action.min": torch.tensor([-1.0, 0.0, 0.1]),
    "action.max": torch.tensor([1.0, 5.0, 0.3]),
    "observation.image.mean": torch.tensor([[[0.4]], [[0.5]], [[0.6]]]),
    "observation.image.std": torch.tensor([[[0.2]], [[0.2]], [[0.2]]]),
    "observation.state.min": torch.tensor([0.0, 0.0]),
    "observation.state.max": torch.tensor([512.0, 511.0]),
}


def lerobot_weights(weights: Weights) -> Weights:
    """Return weights of the U-Net by lerobot's names, and an encoder of images beside it."""
    found = {"diffusion.rgb_encoder.out.weight": torch.ones(8, 8)}
    for name, value in weights.items():
        for number in (0, 1):
            name = name.replace(f".blocks.{number}.block.", f".conv{number + 1}.block.")
        found[f"diffusion.unet.{name.replace('.2.conv.', '.2.')}"] = value
    return found


def save_lerobot(folder: Path, weights: Weights, *, old: bool = False, **changes: Any) -> None:
    """Write the folder of a policy as lerobot does: its statistics in files of their own, or in buffers (old)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = lerobot_weights(weights)
    if old:
        for name, value in STATISTICS.items():
            feature, _, kind = name.rpartition(".")
            side = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
            tensors[f"{side}.buffer_{feature.replace('.', '_')}.{kind}"] = value
    else:
        norms = {"eps": 1e-8, "norm_map": LEROBOT["normalization_mapping"]}
        for kind, number, registered in (("pre", 3, "normalizer"), ("post", 0, "unnormalizer")):
            name, step = f"policy_{kind}processor", f"{registered}_processor"
            state = f"{name}_step_{number}_{step}.safetensors"
            features = LEROBOT["output_features"] | (LEROBOT["input_features"] if kind == "pre" else {})
            config = norms | {"features": features}
            steps = [{"registry_name": step, "config": config, "state_file": state}]
            (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}))
            save_file(STATISTICS, folder / state)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LEROBOT | changes))
