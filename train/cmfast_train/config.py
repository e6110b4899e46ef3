# SPDX-License-Identifier: MIT
"""Everything that decides what a training run computes, and how a command line changes it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.networks.shape import check_network, check_seed_network

METHODS = ("edm", "ect", "ct")
DATA = ("digits", "mnist", "cifar10", "folder")
NETWORKS = ("adm", "seed")  # cmfast_train.networks


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training with one method. The network of a phase starts from the previous phase's EMA."""

    method: str  # edm (diffusion), ect (consistency tuning), ct (consistency training): cmfast_train.losses
    images: int  # length, counted in images
    lr: float = 1e-3  # learning rate of RAdam
    lr_decay: float = 0.0  # closing fraction of the phase over which lr falls linearly to 0
    ema: float = 0.999  # decay of the EMA weights, per optimiser step
    p_mean: float = -1.2  # mean of ln(sigma), edm and ect
    p_std: float = 1.2  # standard deviation of ln(sigma), edm and ect
    q: float = 2.0  # ect: each stage divides the gap t - r by this
    k: float = 8.0  # ect: how much wider the gap is at small t
    b: float = 1.0  # ect: how fast that fades with t
    stages: tuple[int, int] = (0, 7)  # ect: first and last stage, passed through evenly
    huber: float = 0.00054  # ect: Pseudo-Huber constant over sqrt(values of an image), data units; 0 is the l2 norm
    s0: int = 2  # ct: noise levels at the start
    s1: int = 150  # ct: noise levels at the end
    mu0: float = 0.9  # ct: decay of the target network at the start

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CmfastError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        _positive(self, "images", "lr", "p_std", "q", "s0", "s1")
        if not self.huber >= 0:
            raise CmfastError(f"{self.method}.huber must be at least 0, got {self.huber}")
        if not 0 <= self.ema < 1:
            raise CmfastError(f"{self.method}.ema must be at least 0 and below 1, got {self.ema}")
        if not 0 <= self.lr_decay <= 1:
            raise CmfastError(f"{self.method}.lr_decay is a fraction from 0 to 1, got {self.lr_decay}")
        if len(self.stages) != 2 or not 0 <= self.stages[0] <= self.stages[1]:
            raise CmfastError(f"{self.method}.stages must be first,last with 0 <= first <= last, got {self.stages}")
        if not 2 <= self.s0 <= self.s1:
            raise CmfastError(f"need 2 <= s0 <= s1, got s0={self.s0}, s1={self.s1}")
        if not 0 < self.mu0 < 1:
            raise CmfastError(f"{self.method}.mu0 must lie between 0 and 1, got {self.mu0}")


PHASE_DEFAULTS: dict[str, dict[str, Any]] = {  # what `--set phases=METHOD:IMAGES` starts from
    "edm": {"p_mean": -1.2, "p_std": 1.2},  # EDM, Table 1
    "ect": {"p_mean": -1.1, "p_std": 2.0, "lr": 1e-4},  # ECT, CIFAR-10
    "ct": {"lr": 4e-4, "ema": 0.9999},  # arXiv:2303.01469, CIFAR-10
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. Saved as config.json beside its checkpoints. Lengths are in images, noise levels in data units."""

    # data
    data: str  # digits, mnist, cifar10 or folder
    image_size: int  # pixels, square; images are padded (mnist) or resized and cropped (folder) to it
    channels: int  # 1 or 3
    conditional: bool = True  # class-conditional where the data have classes
    flip: bool = False  # mirror images at random
    download: bool = False  # let torchvision fetch mnist or cifar10 into --data
    # network
    network: str = "adm"  # adm or seed: the first public implementation's, unconditional
    model_channels: int = 128  # width of the first level; of seed, all there is to choose (its D)
    res_blocks: int = 2  # per level; this and the rest of the network's fields are adm's
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    attention: tuple[int, ...] = (16,)  # sides of the feature maps with attention, pixels
    head_channels: int = 64
    dropout: float = 0.0
    # noise levels (data units) and conventions: cmfast.spec
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    scaling: str = "boundary"
    c_noise: str = "250ln"
    sigmas: tuple[tuple[float, ...], ...] = ((80.0,), (80.0, 0.8), (80.0, 5.0, 0.8, 0.2))  # defaults for 1, 2, .. steps
    # optimisation
    phases: tuple[Phase, ...] = ()
    batch: int = 128  # images per optimiser step, summed over processes
    accumulation: int = 1  # micro-batches per optimiser step and process
    precision: str = "auto"  # fp32, bf16, fp16; auto is bf16 on CUDA and fp32 on a CPU
    channels_last: bool = True  # memory layout of the convolutions
    device: str = "auto"  # cpu or cuda; auto is CUDA where there is one
    seed: int = 0
    # records
    checkpoint_images: int = 1_000_000  # between checkpoints
    log_images: int = 10_000  # between lines of log.jsonl
    grid: int = 64  # images in the sample grid of a checkpoint
    workers: int = 0  # processes that read images
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise CmfastError(f"data must be one of {', '.join(DATA)}, got {self.data!r}")
        if self.channels not in (1, 3):
            raise CmfastError(f"channels must be 1 or 3, got {self.channels}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise CmfastError(f"precision must be auto, fp32, bf16 or fp16, got {self.precision!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise CmfastError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if not self.phases:
            raise CmfastError("a run needs at least one phase, for example --set phases=edm:100000,ect:200000")
        _positive(self, "image_size", "batch", "accumulation", "checkpoint_images", "log_images", "grid", "sigma_max")
        if self.workers < 0 or not 0 <= self.seed < 2**32:
            raise CmfastError(f"need workers >= 0 and 0 <= seed < 2**32, got {self.workers} and {self.seed}")
        self._check_network()
        if self.batch % self.accumulation:
            raise CmfastError(f"batch={self.batch} does not divide into accumulation={self.accumulation} micro-batches")
        if any(s[0] != self.sigma_max for s in self.sigmas if s):
            raise CmfastError(f"default noise levels must begin with sigma_max={self.sigma_max:g}, got {self.sigmas}")
        self.spec(0)  # checks the noise levels

    def spec(self, classes: int) -> ModelSpec:
        """Return the spec of the model that this run trains, on data of that many classes."""
        return ModelSpec(
            image=(self.channels, self.image_size, self.image_size),
            classes=classes if self.conditional else 0,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            sigma_data=self.sigma_data,
            scaling=self.scaling,
            c_noise=self.c_noise,
            sigmas={len(s): s for s in self.sigmas},
        )

    def network_fields(self) -> dict[str, Any]:
        """Return the fields of `networks.adm.AdmConfig` or `networks.seed.SeedConfig`, apart from the classes."""
        if self.network == "seed":
            return {"image_size": self.image_size, "channels": self.channels, "width": self.model_channels}
        names = ("image_size", "channels", "model_channels", "res_blocks", "channel_mult", "attention", "head_channels")
        return {name: getattr(self, name) for name in (*names, "dropout")}

    def _check_network(self) -> None:
        if self.network not in NETWORKS:
            raise CmfastError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        if self.network == "adm":
            check_network(self.network_fields())
            return
        if self.conditional:
            raise CmfastError("network=seed takes no label; add --set conditional=false")
        if self.dropout != 0:
            raise CmfastError(f"network=seed has no dropout, got dropout={self.dropout}; add --set dropout=0")
        check_seed_network(self.network_fields())

    @property
    def images(self) -> int:
        """Length of the run, in images."""
        return sum(self.steps(phase) for phase in self.phases) * self.batch

    def steps(self, phase: Phase) -> int:
        """Return the optimiser steps of a phase: its images over the batch, rounded up."""
        return -(-phase.images // self.batch)


# Fields that may change between a run and its continuation: they do not decide what is computed.
FREE_FIELDS = frozenset({"checkpoint_images", "log_images", "grid", "workers", "tensorboard", "download"})


def override(config: TrainConfig, assignments: Iterable[str]) -> TrainConfig:
    """Return `config` changed by NAME=VALUE strings; METHOD.NAME=VALUE changes every phase of that method.

    Lists are written with commas (channel_mult=1,2,2), the default noise levels with colons between the lists
    (sigmas=80:80,0.8), phases as METHOD:IMAGES (phases=edm:50000,ect:100000).
    """
    changes: dict[str, Any] = {}
    of_phases: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise CmfastError(f"--set {text}: expected NAME=VALUE")
        method, dot, field = name.partition(".")
        if dot:
            have = [phase.method for phase in changes.get("phases", config.phases)]
            if method not in have:
                raise CmfastError(f"--set {text}: this run has no phase {method!r}; its phases: {', '.join(have)}")
            of_phases.setdefault(method, {})[field] = parse_field(text, Phase, field, value)
        else:
            changes[name] = parse_field(text, TrainConfig, name, value)
    # All at once: values that are only right together, such as sigma_max and sigmas, are checked together.
    phases = changes.get("phases", config.phases)
    changes["phases"] = tuple(dataclasses.replace(phase, **of_phases.get(phase.method, {})) for phase in phases)
    return dataclasses.replace(config, **changes)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain containers, ready for JSON; `from_dict` reads them back."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Read what `to_dict` wrote."""

    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value

    fields = {name: frozen(value) for name, value in values.items() if name != "phases"}
    phases = tuple(Phase(**{k: frozen(v) for k, v in phase.items()}) for phase in values["phases"])
    return TrainConfig(**fields, phases=phases)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def parse_field(text: str, owner: type, name: str, value: str) -> Any:
    """Return `value` as the type of the field `name` of a dataclass; `text` is what the error quotes."""
    kinds = typing.get_type_hints(owner)
    if name not in kinds:
        raise CmfastError(f"--set {text}: no such field; there are {', '.join(sorted(kinds))}")
    kind = kinds[name]
    if type(None) in typing.get_args(kind):  # "int | None": what is written is an int
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    try:
        return _READERS[str(kind) if typing.get_origin(kind) else kind.__name__](value)
    except (ValueError, KeyError):
        readable = str(kind) if typing.get_origin(kind) else kind.__name__
        raise CmfastError(f"--set {text}: {value!r} does not convert to {readable}") from None


def _bool(value: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]


def _floats(value: str) -> tuple[float, ...]:
    return tuple(float(v) for v in value.split(","))


def _ints(value: str) -> tuple[int, ...]:
    return tuple(int(v) for v in value.split(",")) if value else ()


def _phases(value: str) -> tuple[Phase, ...]:
    phases = []
    for part in value.split(","):
        method, colon, images = part.partition(":")
        if not colon or method not in METHODS:
            raise ValueError(part)
        phases.append(Phase(**{"method": method, "images": int(images), **PHASE_DEFAULTS[method]}))
    return tuple(phases)


_READERS: dict[str, Any] = {
    "int": lambda value: int(value.replace("_", "")),
    "float": float,
    "str": str,
    "bool": _bool,
    "tuple[int, ...]": _ints,
    "tuple[int, int]": _ints,
    "tuple[float, ...]": _floats,
    "tuple[tuple[float, ...], ...]": lambda value: tuple(_floats(part) for part in value.split(":")),
    "tuple[cmfast_train.config.Phase, ...]": _phases,
}


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise CmfastError(f"{name} must be greater than 0, got {getattr(owner, name)}")
