# SPDX-License-Identifier: MIT
"""State dicts of openai/consistency_models and its relatives (guided-diffusion, CTM): ADM U-Nets, names as in ours.

The shape of the network follows from the tensors. The image size, the width of a head, the order of the qkv rows
and every convention do not: they are known by name for the twelve released files; for others the user passes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast.schedule import sigmas_of_indices
from cmfast_train.checkpoint import check_count
from cmfast_train.importers.facts import CONVENTIONS, EXAMPLES, Draft, Facts, difference, spec_of
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from cmfast_train.networks.shape import Size, sides


@dataclass(frozen=True, kw_only=True)
class Released:
    """What is published of one of OpenAI's files (scripts/launch.sh)."""

    image_size: int  # pixels
    scaling: str = "boundary"
    grid: int = 0  # levels of the Karras grid
    second: int | None = None  # index of the published second noise level in that grid
    borrowed: bool = False  # none was published, so `second` is that of the sister file

    @property
    def sigmas(self) -> dict[int, tuple[float, ...]]:
        """Default noise levels for two steps, data units."""
        return {} if self.second is None else {2: sigmas_of_indices([0, self.second], self.grid)}


RELEASED: dict[str, Released] = {
    "edm_imagenet64_ema": Released(image_size=64, scaling="edm"),
    "cd_imagenet64_l2": Released(image_size=64, grid=40, second=22),
    "cd_imagenet64_lpips": Released(image_size=64, grid=40, second=22),
    "ct_imagenet64": Released(image_size=64, grid=201, second=106),
    "edm_bedroom256_ema": Released(image_size=256, scaling="edm"),
    "cd_bedroom256_l2": Released(image_size=256, grid=40, second=18),
    "cd_bedroom256_lpips": Released(image_size=256, grid=40, second=17),
    "ct_bedroom256": Released(image_size=256, grid=151, second=67),
    "edm_cat256_ema": Released(image_size=256, scaling="edm"),
    "cd_cat256_l2": Released(image_size=256, grid=40, second=18, borrowed=True),
    "cd_cat256_lpips": Released(image_size=256, grid=40, second=17, borrowed=True),
    "ct_cat256": Released(image_size=256, grid=151, second=62),
}
NETWORKS: dict[int, dict[str, Any]] = {  # of the released files, by image size
    64: {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "res_blocks": 3, "scale_shift": True, "classes": 1000},
    256: {
        "model_channels": 256,
        "channel_mult": (1, 1, 2, 2, 4, 4),
        "res_blocks": 2,
        "scale_shift": False,
        "classes": 0,
    },
}
HEAD_CHANNELS = 64  # of all released files
RANGE = {"renoise": "sqrt", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}  # noise levels, data units
CLIP = {"clip": True}  # a choice at sampling time
TEACHER = "a diffusion model, not a consistency model: few-step images are blurred; it is a teacher to distil from"


def matches(weights: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are named as in guided-diffusion's U-Net, of which this is one."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= weights.keys()


def draft(weights: Mapping[str, Tensor], facts: Facts, source: str, file: Path) -> Draft:
    """Read what the tensors say, and take the rest from the file's name, `source` or what was given."""
    name, known, where = _released(source, file)
    fixed: dict[str, Any] = {}
    if known:
        fixed = {"qkv": "3hd", "image_size": known.image_size, "head_channels": HEAD_CHANNELS}
        fixed |= {"scaling": known.scaling, "grid": known.grid, "c_noise": "250ln", **RANGE}
    usual = {"c_noise": "250ln", "grid": 0, **RANGE, **CLIP} if source or known else {}

    def fact(field: str) -> Any:
        return facts.fixed(field, fixed[field], where) if known else facts.required(field, EXAMPLES[field])

    image_size, qkv = fact("image_size"), fact("qkv")
    if known:
        facts.fixed("heads", None, where)
    head = fact("head_channels") if facts.given.heads is None else None

    config = infer_config(weights, file, image_size, head, facts.given.heads)
    for field, value in NETWORKS[known.image_size].items() if known else ():
        if getattr(config, field) != value:
            raise CmfastError(
                f"{file}: {where} means {field}={value}, but its tensors have {field}={getattr(config, field)}; "
                "name another with --source, or tell what it is with --set"
            )
    widths = ", ".join(str(mult * config.model_channels) for mult in config.channel_mult)
    facts.fixed("network", f"ADM U-Net, {config.res_blocks} blocks a level, channels {widths}")
    facts.fixed("parameters", sum(w.numel() for w in weights.values()))
    facts.fixed("classes", config.classes)
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    if dtypes != ["float32"]:
        facts.fixed("dtype", f"{' and '.join(dtypes)}, read as float32")

    image = None if image_size is None else config.image_shape
    sigmas, borrowed = (known.sigmas, known.borrowed) if known else ({}, False)
    spec = spec_of(
        facts,
        image,
        config.classes,
        usual,
        where or "openai/consistency_models",
        sigmas,
        "the sister file of bedroom256; none was published" if borrowed else where,
        {field: value for field, value in fixed.items() if field in CONVENTIONS},
        where,
    )
    what = "an ADM U-Net with the names of openai/consistency_models"
    if known:
        what = f"OpenAI's released {name or source.partition(':')[2]}"
    return Draft(
        format="openai",
        what=what,
        facts=facts,
        network=config,
        spec=spec,
        source={"format": "openai", **({"name": name} if name else {}), "qkv": qkv},
        weights=lambda: _converted(weights, qkv, config),
        hint="--source openai:imagenet64-cd (or another released name)"
        + (", or --source openai" if not source else ""),
        warnings=(TEACHER,) if spec and spec.scaling == "edm" else (),
    )


def infer_config(
    weights: Mapping[str, Tensor],
    file: Path,
    image_size: Size | None = None,
    head_channels: int | None = None,
    heads: int | None = None,
) -> AdmConfig:
    """Return the shape of the U-Net, from the tensors.

    Args:
        weights: all tensors, by OpenAI's names.
        file: named in errors.
        image_size: pixels; None: not known yet, any size that fits stands there.
        head_channels: width of an attention head; None: not known yet, any that fits.
        heads: number of heads, instead of their width.

    Raises:
        ArtifactError: a name or a shape does not fit this network.
    """

    def blocks(side: str) -> int:
        numbers = [int(m.group(1)) for name in weights if (m := re.match(rf"{side}_blocks\.(\d{{1,4}})\.", name))]
        return max(numbers, default=-1) + 1

    try:
        width = weights["time_embed.0.weight"].shape[1]
        ups = [
            n
            for n in range(blocks("output"))
            if any(
                f"output_blocks.{n}.{i}.{part}.weight" in weights for i in (1, 2) for part in ("in_layers.0", "conv")
            )
        ]
        # The first block that ends a level is number res_blocks; without one there is one level.
        per_level = (ups[0] if ups else blocks("output") - 1) + 1
        levels = len(ups) + 1
        image_size = image_size or 2**levels
        firsts = [1 + level * per_level for level in range(levels)]
        outs = [weights[f"input_blocks.{n}.0.out_layers.0.weight"].shape[0] for n in firsts]
        if any(out % width for out in outs):
            raise ArtifactError(f"{file}: its levels have {outs} channels, no multiples of {width}; not supported here")
        first = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        config = AdmConfig(
            image_size=image_size,
            channels=weights["input_blocks.0.0.weight"].shape[1],
            classes=_classes(weights),
            model_channels=width,
            res_blocks=per_level - 1,
            channel_mult=tuple(out // width for out in outs),
            attention=tuple(
                sides(image_size)[0] >> i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.qkv.weight" in weights
            ),
            head_channels=head_channels or width,
            heads=heads or 0,
            scale_shift=first == 2 * outs[0],
            resblock_updown=not any(name.endswith(".0.op.weight") for name in weights),
        )
    except (KeyError, IndexError, ZeroDivisionError) as err:
        raise ArtifactError(f"{file}: named as OpenAI's U-Net, but incomplete: {err}") from None
    check_count(config, len(weights))
    with torch.device("meta"):
        need = {name: tensor.shape for name, tensor in AdmUnet(config).state_dict().items()}
    if wrong := difference(need, {name: tensor.shape for name, tensor in weights.items()}):
        raise ArtifactError(f"{file}: not a U-Net that is supported here: {wrong}")
    return config


def to_3hd(rows: Tensor, order: str, head_channels: int) -> Tensor:
    """Return the rows [3 C, ...] of a qkv layer, given in `order`, as all queries, all keys, all values."""
    heads = rows.shape[0] // 3 // head_channels
    if order == "h3d":
        rows = rows.unflatten(0, (heads, 3, head_channels)).transpose(0, 1).flatten(0, 2)
    elif order == "hd3":
        rows = rows.unflatten(0, (heads, head_channels, 3)).movedim(2, 0).flatten(0, 2)
    return rows


def _converted(weights: Mapping[str, Tensor], order: str, config: AdmConfig) -> dict[str, Tensor]:
    def ours(name: str, tensor: Tensor) -> Tensor:
        if ".qkv." not in name:
            return tensor
        channels = tensor.shape[0] // 3
        return to_3hd(tensor, order, channels // config.heads if config.heads else config.head_channels)

    return {name: ours(name, tensor).float().contiguous() for name, tensor in weights.items()}


def _classes(weights: Mapping[str, Tensor]) -> int:
    return weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0


def _released(source: str, file: Path) -> tuple[str, Released | None, str]:
    """Return the released name that `source` or the file's name says, what is published of it, and who said so.

    Where several released files are alike in all but their weights the name is "".
    """
    by_name = RELEASED.get(file.stem)
    said = source.partition(":")[2].replace("-", "_")
    if not said:
        return (file.stem, by_name, f"the file's name, {file.stem}") if by_name else ("", None, "")
    parts = said.split("_")
    fitting = [name for name in RELEASED if len(set(parts)) == len(parts) and set(parts) <= set(name.split("_"))]
    if not fitting or any(RELEASED[name] != RELEASED[fitting[0]] for name in fitting):
        what = "fits several of the released files" if fitting else "none of the released files"
        raise CmfastError(f"--source {source}: {what}; they are {', '.join(_short(name) for name in RELEASED)}")
    if by_name and by_name != RELEASED[fitting[0]]:
        raise CmfastError(f"{file}: --source {source} contradicts its name, which is that of another released file")
    return fitting[0] if len(fitting) == 1 else "", RELEASED[fitting[0]], f"--source {source}"


def _short(name: str) -> str:
    """Return a released name in the order data set, method, loss: cd_imagenet64_l2 is imagenet64-cd-l2."""
    method, data, *loss = name.split("_")
    return "-".join([data, method, *(part for part in loss if part != "ema")])
