# SPDX-License-Identifier: MIT
"""Folders of diffusers' ConsistencyModelPipeline, read without diffusers: three JSON files and the weights.

Such a folder says everything: the shape of the network, the scheduler's noise levels; the conventions are what
CMStochasticIterativeScheduler computes. What our U-Net cannot compute is refused by the name of the field. An
option that this version does not know is let pass where it is switched off (null, false, 0, empty), else refused.
`cmfast_export.to_diffusers` writes the same folders, with the table of names below.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.artifact import check_file
from cmfast.errors import ArtifactError, CmfastError
from cmfast.schedule import sigmas_of_indices
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import read_tensors
from cmfast_train.importers.facts import Draft, Facts
from cmfast_train.networks.adm import AdmConfig, AdmUnet

INDEX, SCHEDULER, UNET = "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
WEIGHTS = "diffusion_pytorch_model"  # and a suffix, in unet/
LARGEST = 65536  # of every whole number in a configuration: a file must not make us allocate what it likes

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
_MID_NORM = "mid_block.attentions.0.group_norm"
_QKV = ("to_q", "to_k", "to_v")
_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17
_PARTS = {  # of a residual block, an attention, a convolution that resamples
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors: in PyTorch

Described = Mapping[str, tuple[tuple[int, ...], str]]  # tensor: shape, dtype


def draft(folder: Path, facts: Facts) -> Draft:
    """Read the JSON files and the names and shapes of the weights; the weights themselves when they are asked for."""
    if not (folder / INDEX).is_file():
        raise ArtifactError(
            f"{folder}: no {INDEX} in it; name the folder of a whole ConsistencyModelPipeline, "
            "which holds that file beside scheduler and unet"
        )
    index = _json(folder / INDEX, "ConsistencyModelPipeline")
    unet = _fields(folder / UNET, "UNet2DModel", _UNET, _UNET_CHOICES)
    scheduler = _fields(folder / SCHEDULER, "CMStochasticIterativeScheduler", _SCHEDULER, _SCHEDULER_CHOICES)
    config = _network(unet, folder / UNET)
    # Without the field, diffusers has no norm before the attention of the middle block; our U-Net always has one.
    unnormed = unet["resnet_time_scale_shift"] == "scale_shift" and unet["attn_norm_num_groups"] is None

    files = _weight_files(folder / "unet")
    described = {name: entry for file in files for name, entry in _describe(file).items()}
    _match(described, config, folder, unnormed)
    where = f"unet/{files[0].name}"
    widths = ", ".join(str(mult * config.model_channels) for mult in config.channel_mult)
    facts.fixed("weights", where, "the folder")
    facts.fixed("network", f"ADM U-Net, {config.res_blocks} blocks a level, channels {widths}", UNET)
    facts.fixed("parameters", sum(torch.Size(shape).numel() for shape, _ in described.values()), where)
    for name in ("classes", "image_size", "head_channels"):
        facts.fixed(name, getattr(config, name), UNET)
    facts.fixed("qkv", "separate q, k, v", where)
    if dtypes := sorted({dtype for _, dtype in described.values()} - {"float32"}):
        facts.fixed("dtype", f"{' and '.join(dtypes)}, read as float32", where)

    version = re.sub(r"[^\w.+-]", "", str(index.get("_diffusers_version", "")))[:40]
    release = _release(folder, index, unet)
    spec = _spec(scheduler, config, facts, release, folder / SCHEDULER)
    warning = (
        f"{folder / UNET}: scale_shift without attn_norm_num_groups is a known broken conversion; its weights hold "
        f"{_MID_NORM}, which diffusers leaves out and which is used here, as in the original model"
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
        weights=lambda: _read(files, config, folder, unnormed),
        warnings=(warning,) if unnormed else (),
    )


# Names and layout.


def key_map(config: AdmConfig) -> dict[str, tuple[str, ...]]:
    """Return {our tensor: the tensors of UNet2DModel that it is made of}: one, or query, key and value."""
    modules = _modules(config)

    def theirs(name: str) -> tuple[str, ...]:
        ours = next(prefix for prefix in modules if name.startswith(prefix + "."))
        *layer, kind = name.removeprefix(ours + ".").split(".")
        if layer == ["qkv"]:
            return tuple(f"{modules[ours]}.{part}.{kind}" for part in _QKV)
        return (".".join([modules[ours], *([_PARTS[".".join(layer)]] if layer else []), kind]),)

    return {name: theirs(name) for name in _shapes(config)}


def to_diffusers(weights: Mapping[str, Tensor], config: AdmConfig) -> dict[str, Tensor]:
    """Return our tensors as UNet2DModel names and shapes them; query, key and value are copies."""
    found: dict[str, Tensor] = {}
    for name, theirs in key_map(config).items():
        tensor = weights[name]
        if name.endswith(("qkv.weight", "proj_out.weight")):
            tensor = tensor.flatten(1)  # a convolution of 1 x 1 is a matrix there
        parts = [part.clone() for part in tensor.chunk(3)] if len(theirs) == 3 else [tensor]
        found |= zip(theirs, parts, strict=True)
    return found


def from_diffusers(theirs: dict[str, Tensor], config: AdmConfig) -> dict[str, Tensor]:
    """Return the tensors of a UNet2DModel in our names and shapes, float32; `theirs` is emptied on the way.

    Emptied, so that a model of 2 GB is not held twice.
    """
    shapes, found = _shapes(config), {}
    for name, parts in key_map(config).items():
        tensors = [theirs.pop(part).detach().to(torch.float32) for part in parts]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # the rows of our qkv: all queries first
        found[name] = tensor.reshape(shapes[name]).contiguous()
    return found


@functools.lru_cache(maxsize=1)  # a large network takes a second, even without memory
def _shapes(config: AdmConfig) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in AdmUnet(config).state_dict().items()}


def _modules(config: AdmConfig) -> dict[str, str]:
    """Return {prefix of our tensors: prefix of theirs} of all residual blocks, attentions and single layers."""
    last = len(config.channel_mult) - 1
    found = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    here = 1
    for level in range(last + 1):
        for block in range(config.res_blocks):
            found[f"input_blocks.{here}.0"] = f"down_blocks.{level}.resnets.{block}"
            found[f"input_blocks.{here}.1"] = f"down_blocks.{level}.attentions.{block}"
            here += 1
        if level < last:
            found[f"input_blocks.{here}.0"] = f"down_blocks.{level}.downsamplers.0"
            here += 1
    here = 0
    for up in range(last + 1):  # from the deepest level
        attention = _attends(config, last - up)
        for block in range(config.res_blocks + 1):
            found[f"output_blocks.{here}.0"] = f"up_blocks.{up}.resnets.{block}"
            if attention:
                found[f"output_blocks.{here}.1"] = f"up_blocks.{up}.attentions.{block}"
            here += 1
        if up < last:
            found[f"output_blocks.{here - 1}.{2 if attention else 1}"] = f"up_blocks.{up}.upsamplers.0"
    return found


def _attends(config: AdmConfig, level: int) -> bool:
    return config.image_size // 2**level in config.attention


# The JSON files.


def _json(file: Path, kind: str) -> dict[str, Any]:
    """Return a configuration file of this class."""
    try:
        values = json.loads(check_file(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{file}: not JSON: {err}") from None
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found != kind:
        raise ArtifactError(f"{file}: its _class_name is {json.dumps(found)[:200]}, and only {kind} is read")
    return dict(values)


def _fields(file: Path, kind: str, free: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return all fields of a configuration; a missing one has the value that diffusers would give it."""
    fields = {**free, **{name: allowed[0] for name, allowed in choices.items()}}
    for name, value in _json(file, kind).items():
        if name in fields:
            fields[name] = value
        elif value and not name.startswith("_"):
            raise _refusal(file, name, value, "an option that this version of cmfast does not know")
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise _refusal(file, name, fields[name], f"supported: {' or '.join(map(json.dumps, allowed))}")
    return fields


def _network(unet: Mapping[str, Any], file: Path) -> AdmConfig:
    """Return the U-Net of a configuration, or refuse what ours cannot be."""
    widths = _list(unet, "block_out_channels", file)
    if not widths or any(not _is_whole(width) or width % widths[0] for width in widths):
        raise _refusal(file, "block_out_channels", widths, "supported: whole multiples of the first")
    channels, size = _whole(unet, "in_channels", file), unet["sample_size"]
    if unet["out_channels"] != channels:
        raise _refusal(file, "out_channels", unet["out_channels"], f"supported: as many as in_channels, {channels}")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not _is_whole(size):
        raise _refusal(file, "sample_size", size, "supported: one number of pixels, for square images")
    if unet["time_embedding_dim"] not in (None, 0, 4 * widths[0]):
        raise _refusal(file, "time_embedding_dim", unet["time_embedding_dim"], f"supported: {4 * widths[0]}")

    attention, resblock_updown = _levels(unet, len(widths), file)
    if not resblock_updown and unet["downsample_padding"] != 1:
        raise _refusal(file, "downsample_padding", unet["downsample_padding"], "supported: 1")
    attended = [width for width, here in zip(widths, attention, strict=True) if here] + widths[-1:]
    head = unet["attention_head_dim"]
    if head is None and len(set(attended)) == 1:
        head = attended[0]  # one head of all channels
    if not _is_whole(head) or any(width % head for width in attended):
        raise _refusal(file, "attention_head_dim", head, f"supported: a divisor of the channels, {attended}")
    try:
        return AdmConfig(
            image_size=size,
            channels=channels,
            classes=0 if unet["num_class_embeds"] is None else _whole(unet, "num_class_embeds", file),
            model_channels=widths[0],
            res_blocks=_whole(unet, "layers_per_block", file),
            channel_mult=tuple(width // widths[0] for width in widths),
            attention=tuple(size // 2**level for level, here in enumerate(attention) if here),
            head_channels=head,
            scale_shift=unet["resnet_time_scale_shift"] == "scale_shift",
            resblock_updown=resblock_updown,
            dropout=_number(unet, "dropout", file),
        )
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None


def _levels(unet: Mapping[str, Any], count: int, file: Path) -> tuple[list[bool], bool]:
    """Return which levels attend, the widest image first, and whether residual blocks resample (else convolutions)."""
    ways: dict[str, list[tuple[bool, str]]] = {}
    for way, types in _BLOCKS.items():
        names = _list(unet, f"{way}_block_types", file)
        for name in names:
            if name not in types:
                raise _refusal(file, f"{way}_block_types", names, f"supported: {', '.join(types)}")
        if len(names) != count:
            raise _refusal(file, f"{way}_block_types", names, f"block_out_channels has {count}")
        default = unet[f"{way}sample_type"] or "conv"
        ways[way] = [(types[name][0], types[name][1] or default) for name in names]
    down, up = ways["down"], ways["up"][::-1]
    attention = [here for here, _ in down]
    if attention != [here for here, _ in up]:
        need = "supported: attention at the same levels as in down_block_types"
        raise _refusal(file, "up_block_types", unet["up_block_types"], need)
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
    from cmfast_train.importers.openai import RELEASED

    values: dict[str, Any] = {
        name: facts.fixed(name, value, "CMStochasticIterativeScheduler")
        for name, value in {"scaling": "boundary", "c_noise": "250ln", "renoise": "sqrt"}.items()
    }
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        values[name] = facts.fixed(name, _number(scheduler, name, file), SCHEDULER)
    values["clip"] = facts.fixed("clip", bool(scheduler["clip_denoised"]), SCHEDULER)
    grid = values["grid"] = facts.fixed("grid", _whole(scheduler, "num_train_timesteps", file), SCHEDULER)
    image = (config.channels, config.image_size, config.image_size)
    try:
        spec = ModelSpec(image=image, classes=config.classes, **values, sigmas={1: (values["sigma_max"],)})
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None

    known = RELEASED.get(release)
    if facts.told.sigmas is not None:
        sigmas, where = {len(levels): levels for levels in facts.told.sigmas}, "--set"
    elif known and (known.grid, known.image_size) == (grid, config.image_size):
        where = "the sister file of bedroom256; none was published" if known.borrowed else f"the released {release}"
        sigmas = {**spec.sigmas, **known.levels}
    else:
        sigmas, where = {**spec.sigmas, **_even_levels(spec)}, "diffusers' num_inference_steps=2 and 4"
    facts.usual("sigmas", tuple(sigmas.values()), where)
    return dataclasses.replace(spec, sigmas=sigmas)


def _even_levels(spec: ModelSpec) -> dict[int, tuple[float, ...]]:
    """Return the noise levels of 2 and 4 steps that CMStochasticIterativeScheduler.set_timesteps(K) takes.

    They are every (N // K)-th of its grid of N, from the first. Where that includes the last there are none: at
    sigma_min the model is the identity.
    """
    found: dict[int, tuple[float, ...]] = {}
    for steps in (2, 4):
        indices = [step * (spec.grid // steps) for step in range(steps)]
        levels = sigmas_of_indices(indices, spec.grid, spec.sigma_min, spec.sigma_max)
        if len(levels) == steps:
            found[steps] = levels
    return found


def _release(folder: Path, *files: Mapping[str, Any]) -> str:
    """Return the name of OpenAI's released model that a folder is a conversion of, or "": by its name, or its files'.

    The hub's cache calls a folder models--openai--diffusers-cd_imagenet64_l2/snapshots/HASH.
    """
    from cmfast_train.importers.openai import RELEASED

    path = folder.absolute()
    names = [str(values.get("_name_or_path", "")) for values in files]
    names += [path.name, path.parent.parent.name if path.parent.name == "snapshots" else ""]
    for name in names:
        for release, known in RELEASED.items():
            if known.scaling == "boundary" and re.search(rf"(?<![a-z0-9]){release}(?![a-z0-9])", name):
                return release
    return ""


def _refusal(file: Path, name: str, value: Any, need: str) -> ArtifactError:
    return ArtifactError(f"{file}: {_plain(name)} is {json.dumps(value)[:200]}; {need}")


def _list(fields: Mapping[str, Any], name: str, file: Path) -> list[Any]:
    value = fields[name]
    if not isinstance(value, list) or len(value) > 32:
        raise _refusal(file, name, value, "supported: a list with an entry for every level")
    return value


def _whole(fields: Mapping[str, Any], name: str, file: Path) -> int:
    if not _is_whole(fields[name]):
        raise _refusal(file, name, fields[name], f"supported: a whole number from 1 to {LARGEST}")
    return int(fields[name])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _number(fields: Mapping[str, Any], name: str, file: Path) -> float:
    if isinstance(fields[name], bool) or not isinstance(fields[name], (int, float)):
        raise _refusal(file, name, fields[name], "supported: a number")
    return float(fields[name])


# The weights.


def _weight_files(unet: Path) -> list[Path]:
    """Return the files that hold the weights: full precision before half, safetensors before pickles."""
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.fp16.bin"):
        file, parts = unet / name, unet / f"{name}.index.json"
        if file.is_file():
            return [file]
        if parts.is_file():
            return _parts(parts)
    raise ArtifactError(f"{unet}: no weights in it; looked for {WEIGHTS}.safetensors, .bin and .fp16.safetensors")


def _parts(index: Path) -> list[Path]:
    """Return the files of a model whose weights were divided."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(not name or name != Path(name).name for name in names):
            raise ValueError("it must name files beside it")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{index}: not an index of weights: {err!r}") from None
    return [index.with_name(name) for name in sorted(names)]


def _describe(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return {tensor: (shape, dtype)}; of safetensors only the header is read."""
    from safetensors import SafetensorError, safe_open

    with check_file(file).open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise ArtifactError(f"{file}: only a pointer to the weights; fetch them: git lfs pull")
    if file.suffix != ".safetensors":
        return _described(read_tensors(file), file)
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
            return {
                name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()
            }
    except SafetensorError as err:
        raise ArtifactError(f"{file}: not a whole safetensors file: {err}") from None


def _described(tensors: Mapping[str, Any], file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ArtifactError(f"{file}: {name!r} in it is no tensor; a U-Net's weights are named tensors")
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}


def _read(files: list[Path], config: AdmConfig, folder: Path, unnormed: bool) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        tensors = read_tensors(file)
        described |= _described(tensors, file)
        theirs |= tensors
    names = _match(described, config, folder, unnormed)  # once more: this is what will be used
    return from_diffusers({name: theirs.pop(stored) for name, stored in names.items()}, config)


def _match(described: Described, config: AdmConfig, folder: Path, unnormed: bool) -> dict[str, str]:
    """Return {tensor of UNet2DModel: its name in the file}; ArtifactError unless all are there, and nothing else."""
    unet = folder / "unet"
    if len(config.channel_mult) * config.res_blocks > len(described):  # before anything of that size is built
        raise ArtifactError(f"{unet}: {len(described)} tensors are too few for layers_per_block={config.res_blocks}")
    ours = {name: torch.empty(shape, device="meta") for name, shape in _shapes(config).items()}
    need = {name: tuple(tensor.shape) for name, tensor in to_diffusers(ours, config).items()}
    have = {_current(name): name for name in described}
    missing, extra = [n for n in need if n not in have], [s for n, s in have.items() if n not in need]
    if unnormed and any(name.startswith(_MID_NORM) for name in missing):
        raise ArtifactError(
            f'{folder / UNET}: resnet_time_scale_shift is "scale_shift" without attn_norm_num_groups, and the weights '
            f"lack {_MID_NORM}: a known broken conversion; convert the original again with attn_norm_num_groups 32, "
            "or fetch the folder again, which was mended on the hub"
        )
    if missing or extra or len(have) != len(described):
        told = [f"missing {_some(missing)}"] * bool(missing) + [f"not known {_some(extra)}"] * bool(extra)
        raise ArtifactError(f"{unet}: weights and config.json do not fit: {'; '.join(told) or 'a name occurs twice'}")
    for name, shape in need.items():
        found, dtype = described[have[name]]
        if found != shape and not (".attentions." in name and len(shape) == 2 and found == (*shape, 1, 1)):
            raise ArtifactError(f"{unet}: the weight {have[name]} is {list(found)}; config.json needs {list(shape)}")
        if dtype not in _DTYPES.values():
            raise ArtifactError(f"{unet}: the weight {have[name]} is {dtype}; need {', '.join(_DTYPES.values())}")
    return {name: have[name] for name in need}


def _current(name: str) -> str:
    """Return the name that diffusers has for a tensor now."""
    module, dot, rest = name.partition(".attentions.")
    number, _, layer = rest.partition(".")
    old, _, kind = layer.rpartition(".")
    return f"{module}{dot}{number}.{_DEPRECATED[old]}.{kind}" if dot and old in _DEPRECATED else name


def _some(names: list[str]) -> str:
    return ", ".join(map(_plain, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plain(name: str) -> str:
    """Return a name from a file fit for one line of a terminal."""
    return ascii(name)[1:-1][:100]
