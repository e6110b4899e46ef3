# SPDX-License-Identifier: MIT
"""EDM's family: checkpoints of EDM (arXiv:2206.00364), ECT (arXiv:2406.14548), CMT (arXiv:2509.24526), FastGen, SiD.

State dicts, and the pickles that all but FastGen write (`pickles`). They share their networks (`networks.edm`) and
nearly all conventions. What differs is the scaling, which no tensor shows: a pickle names the class, else `--set` does.
SiD (arXiv:2404.04057) and SiDA (2410.14919) keep EDM's scaling and call the network once, at one noise level.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.checkpoint import check_count
from cmfast_train.importers.facts import Draft, Facts, difference, shown, spec_of
from cmfast_train.importers.pickle_opcodes import Foreign
from cmfast_train.importers.pickles import module_tensors
from cmfast_train.networks.edm import HEAD_CHANNELS, DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.networks.edm_layers import FILTERS
from cmfast_train.networks.shape import Size

SHARED = {"c_noise": "ln/4", "renoise": "plain", "clip": False, "sigma_max": 80.0, "sigma_data": 0.5, "grid": 0}
SYSTEMS = {
    "edm": {"scaling": "edm", "sigma_min": 0.002},
    "ect": {"scaling": "boundary", "sigma_min": 0.003},  # trains with EDM's scaling, evaluates with this one
    "cmt": {"scaling": "boundary", "sigma_min": 0.003},  # ECT's code
    "fastgen": {"scaling": "edm", "sigma_min": 0.002},  # its sigma_shift is 0 unless a person sets it
    "sid": {"scaling": "edm", "sigma_min": 0.002, "sigma_max": 2.5},  # sigma_G, the only level that it is trained at
}
# Side in pixels: where the second step starts, data units. In FastGen it depends on the method, so the user passes it.
SECOND_LEVEL: dict[str, dict[Size, float]] = {"ect": {32: 0.821, 64: 1.526}, "cmt": {32: 0.821, 64: 0.821}}
TEACHER = re.compile(r"edm-.+-(vp|ve|adm)")  # names of files without suffix: EDM's networks, as FastGen converts them
# Names of files without suffix: what SiD's training writes (its alpha and thousands of images), what SiDA published.
SID = re.compile(r"network-snapshot-\d+\.\d{6}-\d{6}|.+_sid(|a|2a)_alpha[\d.]+-\d{6}")
USUAL_WHERE = {  # of what no pickle says
    "edm": "EDM's sampler", "ect": "ECT's evaluation", "cmt": "CMT's evaluation", "sid": "SiD's generation",
}  # fmt: skip
SHOWN = {"edm": "EDM", "ect": "ECT", "cmt": "CMT", "sid": "SiD"}
CLASSES = {  # of a pickle: the systems that have it, the first unless something says another
    "EDMPrecond": ("edm", "sid"), "ECMPrecond": ("ect", "cmt"), "EDMPrecond_EncoderDecoder": ("sid",),
}  # fmt: skip
BASELINES = {"VPPrecond": "DDPM++ of Song et al.", "VEPrecond": "NCSN++ of Song et al.", "iDDPMPrecond": "iDDPM"}


def matches(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as in EDM's networks."""
    names = {name.removeprefix("model.") for name in weights}
    return "map_layer0.weight" in names and any(re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name) for name in names)


def draft(weights: Mapping[str, Tensor], facts: Facts, source: str, file: Path) -> Draft:
    """Say what a state dict is, with or without "model." before its names."""
    system = source.partition(":")[0]
    where = f"--source {system}" if system else "EDM's family"
    if TEACHER.fullmatch(file.stem):
        if system not in ("", "edm"):
            raise CmfastError(
                f"{file}: --source {system}, but its name is that of EDM's own network, which others start from; "
                "leave --source out, or rename the file if it was trained further"
            )
        system, where = "edm", where if system else "the file's name"
    return _draft(weights, facts, system, SHARED | SYSTEMS.get(system, {}), where, file)


def draft_pickle(tree: Any, facts: Facts, source: str, file: Path) -> Draft:
    """Say what a network snapshot is: {"ema": network, ...} as `read_pickle` returns it."""
    networks = {
        key: value
        for key, value in (tree.items() if isinstance(tree, dict) else ())
        if isinstance(key, str) and isinstance(value, Foreign) and "_modules" in value.state
    }
    if not networks:
        raise ArtifactError(f"{file}: a pickle without a network in it, so no model")
    key = facts.usual("weights", "ema", "the pickle")  # the average is what all of them evaluate
    if key not in networks:
        example = shown(next(iter(networks)))
        raise CmfastError(f"{file}: the pickle has no network {shown(key)!r}; say --set weights={example}")
    network, name = networks[key], networks[key].name
    if name in BASELINES:
        raise ArtifactError(
            f"{file}: its class {name} is a baseline of EDM's paper ({BASELINES[name]}), whose noise schedule "
            f"cmfast does not have; it reads {' and '.join(CLASSES)}"
        )
    if name not in CLASSES:
        raise ArtifactError(f"{file}: a pickled {name[:80]!r}, which is not known here; known are {', '.join(CLASSES)}")
    where, given = f"the pickle's class {name}", source.partition(":")[0]
    if given not in ("", *CLASSES[name]):
        owner = " or ".join(SHOWN[system] for system in CLASSES[name])
        raise CmfastError(f"{file}: --source {source}, but {where} is that of {owner}; leave --source out")
    by_name = "sid" in CLASSES[name] and SID.fullmatch(file.stem)
    system = given or ("sid" if by_name else CLASSES[name][0])
    if system == "sid":
        facts.fixed("system", "sid", "--source" if given else where if len(CLASSES[name]) == 1 else "the file's name")
    # The class computes with these. EDM's sigma_min is only the least that it supports, 0; its sampler has its own.
    fixed: dict[str, Any] = {"scaling": SYSTEMS[system]["scaling"], "c_noise": SHARED["c_noise"]}
    for field in ("sigma_data", "sigma_min") if name == "ECMPrecond" else ("sigma_data",):
        fixed[field] = _number(network.state.get(field), f"{file}: {where} has no {field}")
    tensors = module_tensors(network, file)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ArtifactError(f"{file}: the weight {shown(key)} is {tensor.dtype}, no floating-point numbers")
    usual = SHARED | SYSTEMS[system]
    return _draft(tensors, facts, system, usual, USUAL_WHERE[system], file, fixed, where)


def config_of(weights: Mapping[str, Tensor]) -> SongConfig | DhariwalConfig:
    """Return the shape of the network whose state dict this is, or raise ArtifactError if there is none.

    Args:
        weights: all tensors, by EDM's names without "model."

    Raises:
        ArtifactError: they are of no network of EDM.
    """
    try:
        config = _read_shape(weights)
    except KeyError as err:
        raise ArtifactError(f"not a whole network of EDM's: the tensor {err.args[0]!r} is missing") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise ArtifactError("not a network of EDM's: the shapes of its tensors do not fit together") from None
    except CmfastError as err:  # EDM's code has shapes that ours has not
        raise ArtifactError(f"a network of EDM's family of a shape that is not supported: {err}") from None
    check_count(config, len(weights))
    with torch.device("meta"):
        network = SongUnet(config) if isinstance(config, SongConfig) else DhariwalUnet(config)
    need = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if wrong := difference(need, {name: tensor.shape for name, tensor in weights.items()}):
        raise ArtifactError(f"not a network of EDM's: {wrong}")
    return config


def _draft(
    weights: Mapping[str, Tensor], facts: Facts, system: str, usual: Mapping[str, Any], where: str, file: Path,
    fixed: Mapping[str, Any] | None = None, fixed_where: str = "",
) -> Draft:  # fmt: skip
    if "u" in weights:
        raise ArtifactError(
            f"{file}: a network of iDDPMPrecond (it has its table u), whose noise schedule is unknown here"
        )
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    other = next((name for name in weights if not name.startswith("model.")), None)
    if other is not None and any(name.startswith("model.") for name in weights):
        raise ArtifactError(f"{file}: some of its tensors are named model. and more, others not ({shown(other)})")
    _refuse_two_times(tensors, system, file)
    # FastGen's estimate of the loss at a noise level: for training only.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("logvar_linear.")}
    try:
        config = config_of(tensors)
    except ArtifactError as err:
        raise ArtifactError(f"{file}: {err}") from None

    network = _words(config)
    facts.fixed("network", network)
    facts.fixed("parameters", sum(math.prod(t.shape) for n, t in tensors.items() if not n.endswith(_BUFFERS)))
    facts.fixed("image_size", config.image_size)
    facts.fixed("classes", config.classes)
    facts.fixed("qkv", "hd3", "the format")
    if isinstance(config, DhariwalConfig):
        facts.fixed("head_channels", HEAD_CHANNELS, "the format")
    elif facts.given.head_channels is not None:
        raise CmfastError(f"--set head_channels={facts.given.head_channels}: the attention of {network} has one head")

    top, sigmas = usual["sigma_max"] if facts.given.sigma_max is None else facts.given.sigma_max, {}
    if (second := SECOND_LEVEL.get(system, {}).get(config.image_size)) is not None:
        sigmas[2] = (top, second)
    spec = spec_of(
        facts, config.image_shape, config.classes, usual, where, sigmas, fixed=fixed, fixed_where=fixed_where
    )
    warnings = []
    if system == "edm" and spec is not None and spec.scaling == "edm":
        warnings.append(
            "a diffusion teacher, not a consistency model: its images need many steps, in few they are blurred"
            + ("; if it is SiD's one-step generator: --source sid" if fixed_where else "")
        )
    return Draft(
        format="edm",
        what=f"{network} of EDM's family, {config.image_size} px" + (", SiD's one-step generator" * (system == "sid")),
        facts=facts,
        network=config,
        spec=spec,
        source={"format": "edm", "qkv": "hd3", "network": network} | ({"system": system} if system else {}),
        weights=lambda: {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()},
        hint="" if system else "--source ect (or edm, fastgen, sid, cmt)",
        warnings=tuple(warnings),
    )


_BUFFERS = ("resample_filter", "freqs")


def _words(config: SongConfig | DhariwalConfig) -> str:
    if isinstance(config, DhariwalConfig):
        return "ADM (DhariwalUNet)"
    match config.embedding, config.encoder, config.decoder, config.resample:
        case "positional", "standard", "standard", (1, 1):
            return "DDPM++ (SongUNet)"
        case "fourier", "residual", "standard", (1, 3, 3, 1):
            return "NCSN++ (SongUNet)"
    return "SongUNet"


def _refuse_two_times(weights: Mapping[str, Tensor], system: str, file: Path) -> None:
    """MeanFlow's networks take a second time: in FastGen the first layer is twice as wide as the noise's waves."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}

    def size(name: str, axis: int) -> int:  # 0: no such tensor
        return next((int(shape[axis]) for key, shape in shapes.items() if shape and re.fullmatch(name, key)), 0)

    waves = size(r"logvar_linear\.weight", -1) or 2 * size(r"map_noise\.freqs", -1)
    unsure = not waves and system in ("", "fastgen")  # the others can have wide waves, and take one time
    waves = size(r"enc\.\d+x\d+_conv\.weight", 0) if unsure else waves
    two_times = waves and size(r"map_layer0\.weight", -1) == 2 * waves
    if two_times or any(name.startswith("r_timestep.") for name in shapes):
        raise ArtifactError(
            f"{file}: a MeanFlow network, which takes two times (r_timestep); cmfast has networks of one noise level"
            + (" (if it is one of EDM's with wide waves: --source edm, or ect)" if unsure else "")
        )


def _read_shape(weights: Mapping[str, Tensor]) -> SongConfig | DhariwalConfig:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = (re.match(r"enc\.(\d{1,5})x\1_", name) for name in shapes)
    sides = sorted({int(side[1]) for side in found if side}, reverse=True)
    first, channels = shapes[f"enc.{sides[0]}x{sides[0]}_conv.weight"][:2]
    emb, waves = shapes["map_layer0.weight"]
    is_song = f"dec.{sides[0]}x{sides[0]}_aux_conv.weight" in shapes
    width = first if is_song else waves
    common: dict[str, Any] = {
        "image_size": sides[0],
        "channels": channels,
        "classes": shapes.get("map_label.weight", (0, 0))[1],
        "model_channels": width,
        "channel_mult": tuple(_times(shapes[f"enc.{s}x{s}_block0.conv0.weight"][0], width) for s in sides),
        "emb_mult": _times(emb, width),
        "res_blocks": sum(bool(re.fullmatch(rf"enc\.{sides[0]}x\d+_block\d+\.conv0\.weight", name)) for name in shapes),
        "attention": tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in shapes),
        "augment": shapes.get("map_augment.weight", (0, 0))[1],
    }
    taps = _taps(weights)
    if not is_song:
        return DhariwalConfig(**common)

    def has(half: str, part: str) -> bool:  # below the first level, which every kind has the same
        return any(f"{half}.{s}x{s}_{part}" in shapes for s in sides[1:])

    residual, skip = has("enc", "aux_residual.weight"), has("enc", "aux_skip.weight")
    return SongConfig(
        **common,
        noise_mult=_times(waves, width),
        embedding="fourier" if "map_noise.freqs" in shapes else "positional",
        encoder="residual" if residual else "skip" if skip else "standard",
        decoder="skip" if has("dec", "aux_conv.weight") else "standard",
        resample=taps,
    )


def _taps(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the filter of every resampling layer: the networks compute with the one that the configuration names."""
    filters = [tensor for name, tensor in weights.items() if name.endswith("resample_filter")]
    if any(f.shape not in [(1, 1, len(taps), len(taps)) for taps in FILTERS] for f in filters):
        raise ValueError
    for taps in FILTERS:
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        if all(f.shape[-1] == len(taps) and torch.allclose(f.float(), line[:, None] * line) for f in filters):
            return taps
    raise CmfastError("its layers resample with a filter that is neither 1,1 nor 1,3,3,1")


def _number(value: Any, refusal: str) -> float:
    """Return a noise level of a pickle, data units, or raise ArtifactError."""
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ArtifactError(f"{refusal} that is a number above 0")
    return float(value)


def _times(width: int, unit: int) -> int:
    if width % unit:
        raise ValueError
    return width // unit
