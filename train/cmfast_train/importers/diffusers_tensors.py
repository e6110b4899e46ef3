# SPDX-License-Identifier: MIT
"""The tensors of diffusers' UNet2DModel: their files, and their names and shapes in our U-Net and back.

`diffusers` reads the configuration beside them, `cmfast_export.targets.diffusers_folder` writes both.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, one_line
from cmfast.formats.manifest import check_file
from cmfast_train.border import naming, reading
from cmfast_train.checkpoint import read_tensors
from cmfast_train.importers.facts import shown
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from cmfast_train.networks.shape import sides
from cmfast_train.safe_load import refuse_others

MAX_INDEX, MAX_NAME = 16 << 20, 255  # bytes of an index of weights, characters of a file's name in it
WEIGHTS = "diffusion_pytorch_model"  # and a suffix, in unet/
MID_NORM = "mid_block.attentions.0.group_norm"
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
    return sides(config.image_size)[0] // 2**level in config.attention


def weight_files(unet: Path) -> list[Path]:
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
    values = read_json(index, MAX_INDEX)
    try:
        names = set(values["weight_map"].values())
        if not names or any(not name or len(name) > MAX_NAME or name != Path(name).name for name in names):
            raise ValueError("it must name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{index}: not an index of weights: {one_line(repr(err), 200)}") from None
    return [index.with_name(name) for name in sorted(names)]


def read_json(file: Path, limit: int) -> Any:
    """Return what a JSON file of at most so many bytes holds, or raise ArtifactError."""
    with naming(file):
        size = check_file(file).stat().st_size
        if size > limit:
            raise ArtifactError(f"{file}: it has {size} bytes; at most {limit} are read, and a real one has far fewer")
    with reading(file, "not JSON"):
        return json.loads(file.read_text(encoding="utf-8"))


def describe(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return {tensor: (shape, dtype)}; of safetensors only the header is read."""
    from safetensors import safe_open

    with naming(file), check_file(file).open("rb") as opened:
        refuse_others(file, opened)
    if file.suffix != ".safetensors":
        return _described(read_tensors(file), file)
    with reading(file, "not a whole safetensors file"), safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
        return {name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()}


def _described(tensors: Mapping[str, Any], file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ArtifactError(
                f"{file}: {shown(str(name))} in it is not a tensor; a U-Net's weights are named tensors"
            )
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}


def read_weights(files: list[Path], config: AdmConfig, folder: Path, unnormed: bool) -> dict[str, Tensor]:
    """Return the weights in our names and shapes, float32."""
    theirs, described = read_files(files)
    names = match_names(described, config, folder, unnormed)  # once more: this is what will be used
    return from_diffusers({name: theirs.pop(stored) for name, stored in names.items()}, config)


def read_files(files: list[Path]) -> tuple[dict[str, Tensor], Described]:
    """Return the tensors of several files, and their shapes and types."""
    theirs: dict[str, Tensor] = {}
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        tensors = read_tensors(file)
        described |= _described(tensors, file)
        theirs |= tensors
    return theirs, described


def match_names(described: Described, config: AdmConfig, folder: Path, unnormed: bool) -> dict[str, str]:
    """Return {tensor of UNet2DModel: its name in the file}; ArtifactError unless all are there, and nothing else."""
    unet = folder / "unet"
    if len(config.channel_mult) * config.res_blocks > len(described):  # before anything of that size is built
        raise ArtifactError(f"{unet}: {len(described)} tensors are too few for layers_per_block={config.res_blocks}")
    ours = {name: torch.empty(shape, device="meta") for name, shape in _shapes(config).items()}
    need = {name: tuple(tensor.shape) for name, tensor in to_diffusers(ours, config).items()}
    if unnormed and not any(name.startswith(MID_NORM) for name in described):
        raise ArtifactError(
            f'{unet / "config.json"}: resnet_time_scale_shift is "scale_shift" without attn_norm_num_groups, and the '
            f"weights lack {MID_NORM}: a known broken conversion; convert the original again with attn_norm_num_groups "
            "32, or fetch the folder again, which was fixed on the hub"
        )
    return matched(described, need, unet)


def matched(described: Described, need: Mapping[str, tuple[int, ...]], unet: Path) -> dict[str, str]:
    """Return {tensor of UNet2DModel: its name in the files}.

    Args:
        described: what the files hold.
        need: shapes of the network's tensors, by diffusers' names of today.
        unet: folder of the files.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape or type.
    """
    have = {_current(name): name for name in described}
    missing, extra = [n for n in need if n not in have], [s for n, s in have.items() if n not in need]
    if missing or extra or len(have) != len(described):
        wrong = [f"missing {_some(missing)}"] * bool(missing) + [f"not known {_some(extra)}"] * bool(extra)
        raise ArtifactError(f"{unet}: weights and config.json do not fit: {'; '.join(wrong) or 'a name occurs twice'}")
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
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
