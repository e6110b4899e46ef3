# SPDX-License-Identifier: MIT
"""The configuration of a training run: everything that decides what it computes. `overrides` changes it by texts."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cmfast.conditions import Condition, class_label
from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.config.checks import check_positive, check_types, shown
from cmfast_train.config.phase import Phase, phase_from_dict
from cmfast_train.config.readers import frozen_names, plain_values
from cmfast_train.methods.method import Method, find, names
from cmfast_train.networks.count import adm_sizes, check_values, cloneofsimo_sizes
from cmfast_train.networks.shape import (
    Size,
    check_cloneofsimo_network,
    check_image,
    check_network,
    plain_size,
    sides,
    size_text,
)

ARRAYS, OWN = "arrays", "own"  # data and network that the caller of `cmfast_train.train` passes
DATA = ("digits", "mnist", "fashion-mnist", "cifar10", "folder", "imagenet9", "imagenet64", ARRAYS)
NETWORKS = ("adm", "cloneofsimo", OWN)  # cmfast_train.networks
LIMITS: dict[str, int] = {  # largest values, and lengths of lists
    "batch": 2**20,  # images
    "grid": 4096,  # images
    "workers": 256,  # processes
    "phases": 100,
    "emas": 32,  # copies of the weights
    "ema_stds": 32,
    "attention": 32,
    "sigmas": 32,
}
MOST_VALUES = 2**31  # of the images of a batch or a grid: 8 GB in float32
MOST_LEVELS = 256  # in a list of default noise levels


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. Saved as config.json beside its checkpoints. Lengths are in images, noise levels in data units.

    Raises:
        CmfastError: a value is not allowed, or two values do not fit together.
    """

    # data
    data: str = ARRAYS  # one of DATA: cmfast_train.data.images; arrays: cmfast_train.data.arrays
    image_size: Size = 0  # pixels: one number for square images, else (height, width), --set image_size=32x64; images
    # are resized and cropped (folder) to it, mnist's padded to 32. 0 for arrays, whose shape the network has
    channels: int = 0  # 1 or 3; 0 for arrays
    conditional: bool = True  # class-conditional where the data have classes
    label_dropout: float = 0.0  # probability that a sample is trained without its label, for guidance; of a network of
    # one's own: without all conditions that have a null
    flip: bool = False  # mirror images at random
    class_names: tuple[str, ...] = ()  # of the data's classes, filled in by the run
    download: bool = False  # let torchvision fetch mnist, fashion-mnist or cifar10 into --data
    # network
    init: str = ""  # model to start from, with its network and its conventions; cmfast-train --init
    teacher: str = ""  # model to distil, instead of the one that a phase starts from; cmfast-train --teacher
    network: str = "adm"  # adm; cloneofsimo: the first public implementation's, unconditional; own: a denoiser that is
    # passed, with its conventions, always so for arrays
    model_channels: int = 128  # width of the first level; of cloneofsimo, all there is to choose (its D)
    res_blocks: int = 2  # per level; this and the rest of the network's fields are adm's
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    attention: tuple[int, ...] = (16,)  # heights of the feature maps with attention, pixels
    patch: int = 1  # side of the squares of pixels that the network takes as channels; 2: a quarter of the positions
    head_channels: int = 64
    dropout: float = 0.0
    # noise levels (data units) and conventions: cmfast.spec
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    scaling: str = "auto"  # auto: the usual one of the phases' methods (methods.table), else boundary
    c_noise: str = "auto"  # auto: the same, else 250ln
    sigmas: tuple[tuple[float, ...], ...] = ((80.0,), (80.0, 0.8), (80.0, 5.0, 0.8, 0.2))  # defaults for 1, 2, .. steps
    # optimisation
    phases: tuple[Phase, ...] = ()
    batch: int = 128  # images per optimiser step, over all processes
    accumulation: int = 1  # micro-batches per optimiser step and process
    precision: str = "auto"  # fp32, bf16, fp16; auto is bf16 on CUDA and fp32 on a CPU
    channels_last: bool = True  # memory layout of the convolutions
    compile: bool = False  # torch.compile the network
    graph: str = "auto"  # record optimiser steps as CUDA graphs: true, false; auto: where possible
    fused: str = "auto"  # norms by fused kernels (Triton): true, false; auto: where possible, on CUDA
    recompute: bool = False  # recompute activations in the backward pass: less memory, more time
    shard: bool = False  # spread weights, averages and optimiser over the processes (FSDP)
    emas: tuple[float, ...] = ()  # decays of additional averages, kept in DIR/ema
    ema_stds: tuple[float, ...] = ()  # widths of power-function averages; cmfast-ema combines their snapshots
    lpips: str = ""  # NET:FILE, torchvision's weights of vgg, alex or squeeze, for loss=lpips
    device: str = "auto"  # cpu or cuda; auto: CUDA if available
    seed: int = 0
    # records
    checkpoint_images: int = 1_000_000  # between checkpoints
    log_images: int = 10_000  # between lines of log.jsonl
    grid: int = 64  # images in the sample grid of a checkpoint
    workers: int = 0  # processes that read images; 0: a thread. On CUDA, small data sets are on the GPU, without either
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", plain_size(self.image_size))
        if type(self.seed) is int and not 0 <= self.seed < 2**32:
            raise CmfastError(f"seed must be from 0 to 2**32 - 1, got {shown(self.seed)}")
        if not isinstance(self.phases, tuple) or not all(isinstance(each, Phase) for each in self.phases):
            raise CmfastError(f'phases must be a tuple: phases=(phase("edm", 100_000),); got {shown(self.phases)}')
        check_types(self)
        if self.data == ARRAYS:
            object.__setattr__(self, "network", OWN)
        for name, value in () if self.own else zip(("scaling", "c_noise"), self.conventions(), strict=True):
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, value)
        if self.data not in DATA:
            raise CmfastError(f"data must be one of {', '.join(DATA)}, got {self.data!r}")
        if self.data != ARRAYS and self.channels not in (1, 3):
            raise CmfastError(f"channels must be 1 or 3, got {self.channels}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise CmfastError(f"precision must be auto, fp32, bf16 or fp16, got {self.precision!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise CmfastError(f"device must be auto, cpu or cuda, got {self.device!r}")
        for name in ("graph", "fused"):
            if getattr(self, name) not in ("auto", "true", "false"):
                raise CmfastError(f"{name} must be auto, true or false, got {getattr(self, name)!r}")
        if not self.phases:
            raise CmfastError("a run needs at least one phase, for example --set phases=edm:100000,ect:200000")
        check_positive(self, "batch", "accumulation", "checkpoint_images", "log_images", "grid", "sigma_max")
        if self.data != ARRAYS:
            check_image(self.channels, self.image_size)
        elif self.flip:
            raise CmfastError("flip=true mirrors images, and data=arrays are trained on as they are; remove it")
        self._check_limits()
        if self.workers < 0:
            raise CmfastError(f"workers must be at least 0, got {self.workers}")
        if not 0 <= self.label_dropout < 1 or (self.label_dropout and not self.conditional and not self.own):
            raise CmfastError(
                f"label_dropout must be from 0 and below 1, and needs conditional=true, got {self.label_dropout}"
            )
        if not all(0 <= decay < 1 for decay in self.emas):
            raise CmfastError(f"emas must be at least 0 and below 1, got {self.emas}")
        if not all(0 < std <= 0.288 for std in self.ema_stds):
            raise CmfastError(f"ema_stds must be fractions of a phase above 0 and up to 0.288, got {self.ema_stds}")
        if len({f"{std:.3f}" for std in self.ema_stds}) < len(self.ema_stds):
            raise CmfastError(f"ema_stds must differ by at least 0.001, got {self.ema_stds}")
        self._check_network()
        self._check_methods()
        if self.batch % self.accumulation:
            raise CmfastError(f"batch={self.batch} does not divide into accumulation={self.accumulation} micro-batches")
        if not self.own and any(s[0] != self.sigma_max for s in self.sigmas if s):
            raise CmfastError(f"default noise levels must begin with sigma_max={self.sigma_max:g}, got {self.sigmas}")
        if not self.own:
            self.spec(0)  # checks the noise levels
        for phase in self.phases:
            if wrong := phase.row.check_sigmas(phase.hyper, self.sigma_min, self.sigma_max):
                raise CmfastError(f"{phase.method}.{wrong}")
            if (steps := self.steps(phase)) < (least := phase.row.least_steps(phase.hyper)):
                raise CmfastError(
                    f"{phase.name} needs {least} optimiser steps, {least * self.batch:,} images, to train the student; "
                    f"it has {steps}"
                )

    def spec(self, classes: int) -> ModelSpec:
        """Return the spec of the model that this run trains; not of one with `init`.

        Args:
            classes: of the data.

        Returns:
            The spec.
        """
        classes = classes if self.conditional else 0
        return ModelSpec(
            shape=(self.channels, *self.image_sides),
            data="image",
            conditions=(self._label(classes),) if classes else (),
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            sigma_data=self.sigma_data,
            scaling=self.scaling,
            c_noise=self.c_noise,
            sigmas={len(s): s for s in self.sigmas},
        )

    def _label(self, classes: int) -> Condition:
        return class_label(classes, self.class_names, null=classes if self.label_dropout else None)

    def network_fields(self) -> dict[str, Any]:
        """Return the fields of `AdmConfig` or `CloneofsimoConfig` of `networks`, apart from the classes."""
        if self.network == "cloneofsimo":
            return {"image_size": self.image_size, "channels": self.channels, "width": self.model_channels}
        names = ("image_size", "channels", "model_channels", "res_blocks", "channel_mult", "attention", "patch")
        two_times = any(row.second_time for row in self.methods)
        return {name: getattr(self, name) for name in (*names, "head_channels", "dropout")} | {"two_times": two_times}

    @property
    def own(self) -> bool:
        """Whether the network is the caller's, and with it the conventions."""
        return self.network == OWN

    @property
    def methods(self) -> tuple[Method[Any], ...]:
        """The rows of the phases' methods, in their order."""
        return tuple(phase.row for phase in self.phases)

    def conventions(self) -> tuple[str, str]:
        """Return the usual scaling and c_noise of the phases' methods: of the last one that has a preference."""
        preferences = [(row.scaling, row.c_noise) for row in self.methods if row.scaling]
        return preferences[-1] if preferences else ("boundary", "250ln")

    def _check_methods(self) -> None:
        """Raise unless the phases' methods fit the conventions and have the teachers that they need."""
        self._check_teachers()
        if any(phase.needs.distance == "lpips" for phase in self.phases):
            network, colon, file = self.lpips.partition(":")
            if network not in ("vgg", "alex", "squeeze") or not (colon and file):
                raise CmfastError(
                    f"loss=lpips needs weights: --set lpips=vgg:FILE (or alex, squeeze), got {self.lpips!r}"
                )
        if self.compile and self.dropout and any(row.differentiates for row in self.methods):
            raise CmfastError("compile=true draws other dropout masks than derivatives do; add --set dropout=0")
        for row in self.methods:
            if row.second_time and self.network not in ("adm", OWN):
                raise CmfastError(f"{row.name} needs a network that takes two times; network={self.network} takes one")
            if not self.init and not self.own:  # whose conventions are the file's
                check_conventions(row, self.scaling, self.c_noise)

    def _check_limits(self) -> None:
        """Raise if a number is so large that memory would not suffice or the run would never end."""
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            number = value if isinstance(value, int) else len(value)
            if number > limit:
                what = name if isinstance(value, int) else f"the number of {name}"
                raise CmfastError(f"{what} must be at most {limit:,}, got {number:,}")
        for name in () if self.data == ARRAYS else ("batch", "grid"):
            values = getattr(self, name) * self.channels * math.prod(self.image_sides)
            if values > MOST_VALUES:
                raise CmfastError(
                    f"{name}={getattr(self, name)} images of {size_text(self.image_size)} px are {values:,} values, "
                    f"more than {MOST_VALUES:,}; reduce {name}"
                )
        lengths = [len(sigmas) for sigmas in self.sigmas]
        if max(lengths, default=0) > MOST_LEVELS or len(set(lengths)) < len(lengths):
            raise CmfastError(
                f"sigmas must be lists of different lengths, for 1 to {MOST_LEVELS} steps; got lists of "
                f"{', '.join(map(str, lengths))}"
            )

    def _check_network(self) -> None:
        if self.network not in NETWORKS:
            raise CmfastError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        if self.own:
            return
        if self.network == "adm":
            fields = self.network_fields()
            check_network(fields)
            check_values(adm_sizes({"classes": 0, "scale_shift": True, "resblock_updown": True, **fields}))
            return
        if self.conditional:
            raise CmfastError("network=cloneofsimo takes no label; add --set conditional=false")
        if self.dropout != 0:
            raise CmfastError(f"network=cloneofsimo has no dropout, got dropout={self.dropout}; add --set dropout=0")
        check_cloneofsimo_network(self.network_fields())
        check_values(cloneofsimo_sizes(self.network_fields()))

    def _check_teachers(self) -> None:
        """Raise unless every phase that distils has a model of a kind that its method can distil."""
        if self.teacher and not any(row.distils for row in self.methods):
            distil = ", ".join(name for name in names() if find(name).distils)
            raise CmfastError(f"--teacher: none of these phases distils; {distil} do")
        for i, phase in enumerate(self.phases):
            row, distilled = phase.row, self.distilled(i)
            if not row.distils:
                continue
            before = None if distilled is None else self.phases[distilled]
            if before and before.method == phase.method and (wrong := row.check_after(phase.hyper, before.hyper)):
                raise CmfastError(f"{phase.name} {wrong}")
            if not (before or self.init or self.teacher or self.own):  # of a custom network, `start_of` checks
                first = next((name for name in names() if find(name).leaves == row.distils[0]), "METHOD")
                raise CmfastError(
                    f"{phase.name} distils a {row.distils[0]} model: put one before it (--set phases={first}:50000,"
                    f"{phase.name}:100000), or pass a model, --init FILE or --teacher FILE"
                )

    def distilled(self, index: int) -> int | None:
        """Return which phase leaves the model that a phase distils; None: it is that of --init or --teacher.

        Args:
            index: of the phase that distils.

        Returns:
            The newest phase before it whose model is of a kind that its method can distil.
        """
        kinds = self.phases[index].row.distils
        return next((i for i in reversed(range(index)) if self.phases[i].row.leaves in kinds), None)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return sides(self.image_size)

    @property
    def images(self) -> int:
        """Length of the run, in images."""
        return sum(self.steps(phase) for phase in self.phases) * self.batch

    def steps(self, phase: Phase) -> int:
        """Return the optimiser steps of a phase: its images over the batch, rounded up.

        Args:
            phase: one of `phases`.

        Returns:
            The number of steps.
        """
        return -(-phase.images // self.batch)


def check_conventions(row: Method[Any], scaling: str, c_noise: str, also: Iterable[str] = ()) -> None:
    """Raise CmfastError unless a method can train a model of these conventions. also: scalings that the error adds."""
    if scaling in (row.scalings or (scaling,)) and c_noise in (row.c_noises or (c_noise,)):
        return
    needs = [f"scaling {' or '.join([*row.scalings, *also])}"] if row.scalings else []
    needs += [f"c_noise {' or '.join(row.c_noises)}"] if row.c_noises else []
    raise CmfastError(f"{row.name} needs {' and '.join(needs)}, got scaling {scaling} and c_noise {c_noise}")


# Fields that a model of --init sets.
OF_THE_MODEL = frozenset(
    {
        "network",
        "model_channels",
        "res_blocks",
        "channel_mult",
        "attention",
        "patch",
        "head_channels",
        "sigma_min",
        "sigma_data",
    }
)

# Fields that may change between a run and its continuation: they do not affect the result.
FREE_FIELDS = frozenset(
    {"checkpoint_images", "log_images", "grid", "workers", "tensorboard", "download", "shard", "recompute", "graph",
     "fused"}
)  # fmt: skip


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain containers, ready for JSON; `from_dict` reads them back."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["phases"] = [phase.values() for phase in config.phases]
    return typing.cast(dict[str, Any], plain_values(values))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration that `to_dict` wrote.

    Raises:
        CmfastError: it is not the configuration of a run.
    """
    fields = _fields(values, TrainConfig, "the configuration")
    if missing := [name for name in ("data", "image_size", "channels") if name not in fields]:
        raise CmfastError(f"the configuration lacks {missing[0]}")
    for name in ("network", "scaling"):  # as 0.1.0 wrote them
        fields |= {name: "cloneofsimo"} if fields.get(name) == "seed" else {}
    phases = fields.get("phases", ())
    if not isinstance(phases, tuple) or len(phases) > LIMITS["phases"]:
        raise CmfastError(f"phases must be a list of at most {LIMITS['phases']} phases, got {shown(phases)}")
    fields["phases"] = tuple(phase_from_dict(frozen_names(phase, "a phase of the configuration")) for phase in phases)
    return TrainConfig(**fields)


def _fields(values: Any, owner: type, what: str) -> dict[str, Any]:
    """Return the fields of a dataclass from plain containers; CmfastError unless they are such fields."""
    given = frozen_names(values, what)
    needed = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(owner)}
    if unknown := [name for name in given if name not in needed]:
        raise CmfastError(f"{what} has no field {shown(unknown[0])}; is it of a newer cmfast?")
    if missing := [name for name, must in needed.items() if must and name not in given]:
        raise CmfastError(f"{what} lacks {missing[0]}")
    return given
