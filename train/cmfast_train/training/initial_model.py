# SPDX-License-Identifier: MIT
"""The initial model of a run: a new network, or a model of any format with its conventions; and --teacher's model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cmfast.conditions import in_words
from cmfast.errors import CmfastError, CmfastWarning
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint, weights_sha256
from cmfast_train.config.phase import Phase
from cmfast_train.config.train_config import TrainConfig, check_conventions
from cmfast_train.denoiser import Denoiser
from cmfast_train.importers import load_model
from cmfast_train.networks.build import NetworkConfig, build_network, network_from_dict
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.networks.shape import plain_size, size_text


@dataclass(frozen=True, kw_only=True)
class Start:
    """The model in training before its first step, and the teacher of --teacher.

    Attributes:
        spec: conventions of the model in training.
        network: its shape.
        weights: its first weights; None: newly drawn ones.
        model_spec: conventions of the model of --init, which `spec` may replace; None without --init.
        teacher: the model of --teacher.
        sha256: of the weights of --init and --teacher, which a continuation must find again.
        shape: of a custom network in words, which a continuation must find again; "" of ours.
    """

    spec: ModelSpec
    network: NetworkConfig
    weights: Mapping[str, Tensor] | None
    model_spec: ModelSpec | None
    teacher: Checkpoint | None
    sha256: tuple[str, str]
    shape: str = ""

    def first_weights(self) -> Mapping[str, Tensor]:
        """Return the weights that the run starts from: of --init, or newly drawn."""
        return build_network(self.network).state_dict() if self.weights is None else self.weights


@dataclass(frozen=True, kw_only=True)
class Own:
    """Custom denoisers that a run gets.

    Attributes:
        denoiser: what is trained, with its conventions and first weights; copied.
        teacher: what the phases that need a teacher distil.
        factory: package.module:factory that made the network, for checkpoints; "" if there is none.
    """

    denoiser: Denoiser
    teacher: Denoiser | None = None
    factory: str = ""


def start_of(config: TrainConfig, classes: int, own: Own | None = None) -> Start:
    """Return what a run starts from.

    Args:
        config: of the run; of one with network=own with the conventions of its denoiser.
        classes: number of classes of the data.
        own: the denoiser of a run with network=own.

    Raises:
        CmfastError: a model cannot be read, or does not fit the run or its methods.
    """
    if own is not None:
        return _own_start(config, classes, own)
    if config.own:
        raise CmfastError("network=own needs the network: cmfast-train --network, or cmfast_train.train(denoiser=)")
    spec = config.spec(classes)
    teacher = _load(config.teacher, "--teacher", spec) if config.teacher else None
    digests = ("", teacher.sha256() if teacher else "")
    if not config.init:
        return Start(
            spec=_inside(teacher, spec, config),
            network=network_config(config, spec.label.entries if spec.label else 0),
            weights=None,
            model_spec=None,
            teacher=teacher,
            sha256=digests,
        )
    model = _load(config.init, "--init", spec)
    if config.conditional and model.spec.classes != spec.classes:
        raise CmfastError(
            f"--init {config.init}: a model of {model.spec.classes} classes, the data have {spec.classes}; "
            "--set conditional=false trains without them"
        )
    network = model.network
    needs_two = [row.name for row in config.methods if row.second_time]
    if needs_two and not getattr(network, "two_times", False):
        raise CmfastError(
            f"--init {config.init}: {needs_two[0]} needs a network that takes two times; this one takes one"
        )
    if "dropout" in {field.name for field in dataclasses.fields(network)}:
        network = dataclasses.replace(network, dropout=config.dropout)  # type: ignore[arg-type]
    elif config.dropout:
        raise CmfastError(f"--init {config.init}: its network has no dropout; add --set dropout=0")
    return Start(
        spec=_inside(teacher, _student_spec(model.spec, config, spec.class_names, f"--init {config.init}"), config),
        network=network,
        weights=model.weights,
        model_spec=model.spec,
        teacher=teacher,
        sha256=(model.sha256(), digests[1]),
    )


def _own_start(config: TrainConfig, classes: int, own: Own) -> Start:
    """Return what a run with a custom denoiser starts from."""
    denoiser, spec = own.denoiser, own.denoiser.spec
    for i, phase in enumerate(config.phases if own.teacher is None and not config.init else ()):
        if phase.row.distils and config.distilled(i) is None:
            raise CmfastError(
                f"{phase.name} distils a {phase.row.distils[0]} model: pass teacher=, which may be the denoiser itself "
                f"(cmfast-train: --teacher FILE), or put another phase before it, such as edm"
            )
    if own.teacher is not None and not any(row.distils for row in config.methods):
        raise CmfastError(f"a teacher, and none of these phases distils: {', '.join(p.name for p in config.phases)}")
    for row in config.methods:
        if row.second_time and not spec.second_time:
            raise CmfastError(f"{row.name} needs a network that takes two noise levels: wrap(..., second_time=True)")
    if config.label_dropout and all(each.null is None for each in spec.conditions):
        raise CmfastError("label_dropout needs a condition that can be left out: wrap(..., null={'label': 10})")
    if spec.classes and spec.classes != classes:
        raise CmfastError(f"the denoiser has {spec.classes} classes, the data {classes}")
    names = spec.class_names or config.class_names
    student = dataclasses.replace(_student_spec(spec, config, names, "the denoiser"), second_time=spec.second_time)
    teacher = None
    if own.teacher is not None:
        teacher = checkpoint_of_denoiser(own.teacher)
        _check_own_teacher(teacher.spec, spec)
    return Start(
        spec=_inside(teacher, student, config),
        network=OwnConfig(factory=own.factory, module=denoiser.network),
        weights=_copied(denoiser),
        model_spec=spec,
        teacher=teacher,
        sha256=(weights_sha256(_copied(denoiser)) if config.init else "", teacher.sha256() if teacher else ""),
        shape=_in_words(denoiser),
    )


def checkpoint_of_denoiser(denoiser: Denoiser, factory: str = "") -> Checkpoint:
    """Return a custom denoiser as a checkpoint, its weights copied."""
    config = OwnConfig(factory=factory, module=denoiser.network)
    return Checkpoint(spec=denoiser.spec, network=config, weights=_copied(denoiser))


def _copied(denoiser: Denoiser) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in denoiser.network.state_dict().items()}


def _in_words(denoiser: Denoiser) -> str:
    """Return what a network takes and how large it is."""
    weights = denoiser.network.state_dict()
    taken = ", ".join(f"{each.name} {in_words(each)}" for each in denoiser.spec.conditions)
    return (
        f"{list(denoiser.spec.shape)}{f' of {taken}' if taken else ''}, {len(weights)} tensors of "
        f"{sum(weight.numel() for weight in weights.values()):,} values"
    )


def _check_own_teacher(teacher: ModelSpec, student: ModelSpec) -> None:
    """Raise CmfastError unless a teacher takes what the data of the student hold."""
    if teacher.shape != student.shape:
        raise CmfastError(
            f"the teacher is a model of {list(teacher.shape)}, the denoiser of {list(student.shape)}; they must agree"
        )
    known = {each.name: (each.kind, each.shape, each.classes) for each in student.conditions}
    for each in teacher.conditions:
        if known.get(each.name) != (each.kind, each.shape, each.classes):
            raise CmfastError(
                f"the teacher takes the condition {each.name}, {in_words(each)}, and the denoiser "
                f"{'another of this name' if each.name in known else 'has none of this name'}"
            )


def network_config(config: TrainConfig, classes: int) -> NetworkConfig:
    """Return the shape of the new network of a run, on data of that many classes."""
    return network_from_dict({"type": config.network, "classes": classes, **config.network_fields()})


def phase_spec(spec: ModelSpec, phase: Phase) -> ModelSpec:
    """Return the spec of the model that a phase leaves."""
    return phase.row.spec_after(spec, phase.hyper)


def _load(path: str, option: str, spec: ModelSpec) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*teacher", CmfastWarning)  # a diffusion model is expected here
        try:
            model = load_model(path)
        except CmfastError as err:
            if "--set" not in str(err) and "--source" not in str(err):
                raise
            raise CmfastError(
                f"{option} {path}: some facts about the model are missing; convert it to a checkpoint with "
                f"cmfast-export {path} --format cmfast, which asks for them: {err}"
            ) from None
    if model.spec.image != spec.image:
        raise CmfastError(
            f"{option} {path}: a model of images {list(model.spec.image)}, the run has {list(spec.image)}: "
            f"--set image_size={size_text(plain_size(model.spec.image[1:]))} --set channels={model.spec.image[0]}"
        )
    null = spec.label and spec.label.null
    if model.spec.label and model.spec.label.null != null and model.spec.classes == spec.classes:
        raise CmfastError(
            f"{option} {path}: a model trained with{'out' if null is not None else ''} label_dropout, and the run "
            f"{'has' if null is not None else 'has none'}: --set label_dropout={0 if null is not None else 0.1}"
        )
    if model.spec.classes not in (0, spec.classes):
        raise CmfastError(
            f"{option} {path}: a model of {model.spec.classes} classes, the run has {spec.classes}; "
            "their labels have different meanings"
        )
    _check_names(f"{option} {path}", model.spec.class_names, spec.class_names, bool(model.spec.classes))
    return model


def _check_names(model: str, names: tuple[str, ...], of_data: tuple[str, ...], labelled: bool) -> None:
    """Raise CmfastError if the same names have another order, and warn if the names differ."""
    if not names and list(of_data) != sorted(of_data) and labelled:
        warnings.warn(
            f"{model}: it has no class names; if an older version trained it on these folders, they were in the order "
            "of text, and its labels differ",
            CmfastWarning, stacklevel=4,
        )  # fmt: skip
    if not names or not of_data or names == of_data:
        return
    i = next(i for i, (one, other) in enumerate(zip(names, of_data, strict=True)) if one != other)
    difference = f"label {i} is {names[i]!r} there and {of_data[i]!r} in the data"
    if set(names) == set(of_data):
        raise CmfastError(
            f"{model}: its classes have another order: {difference}; name the folders so that they sort as there"
        )
    warnings.warn(
        f"{model}: its classes have other names: {difference}; the run uses the names of the data",
        CmfastWarning,
        stacklevel=4,
    )


def _student_spec(spec: ModelSpec, config: TrainConfig, names: tuple[str, ...], model: str) -> ModelSpec:
    """Return the conventions of a student that starts from a model of `spec`.

    Args:
        spec: of the model.
        config: of the run.
        names: of the data's classes, or ().
        model: what it is called in errors.

    Of several methods, the last one that cannot train every scaling decides.
    """
    deciding = [row for row in config.methods if row.scalings] or [row for row in config.methods if row.from_scaling]
    scaling = deciding[-1].from_scaling.get(spec.scaling, spec.scaling) if deciding else spec.scaling
    for row in config.methods:
        try:
            check_conventions(row, scaling, spec.c_noise, also=row.from_scaling)
        except CmfastError as err:
            raise CmfastError(f"{model}: {err}") from None
    if config.sigma_max != spec.sigma_max:
        top = _exact(spec.sigma_max)
        raise CmfastError(
            f"--init {config.init}: its noise levels end at {spec.sigma_max:g}, the run's at {config.sigma_max:g}; add "
            f"--set sigma_max={top} --set sigmas={top}:{top},0.8"
        )
    sigmas = {len(s): s for s in config.sigmas}
    return dataclasses.replace(
        spec.with_class_names(names or spec.class_names),
        scaling=scaling,
        sigmas=sigmas,
        renoise=_consistent(spec.renoise),
        grid=0,
        second_time=False,  # until a method has trained it
    )


def _inside(teacher: Checkpoint | None, spec: ModelSpec, config: TrainConfig) -> ModelSpec:
    """Return the student's spec; a teacher must know all its noise levels, and what fake scores learn from."""
    names = {each.name for each in teacher.spec.conditions} if teacher else set()
    without = [each.name for each in spec.conditions if each.name not in names]
    fakes = [phase.name for phase in config.phases if phase.needs.fake_scores]
    if teacher and without and fakes:
        raise CmfastError(
            f"{f'--teacher {config.teacher}' if config.teacher else 'the teacher'} is not conditioned on "
            f"{without[0]}, and {fakes[0]} would unlearn it; use a teacher with {without[0]}, or train without it"
        )
    if teacher and not (teacher.spec.sigma_min <= spec.sigma_min < spec.sigma_max <= teacher.spec.sigma_max):
        raise CmfastError(
            f"{f'--teacher {config.teacher}' if config.teacher else 'the teacher'}: it knows noise levels from "
            f"{_exact(teacher.spec.sigma_min)} to {_exact(teacher.spec.sigma_max)}, the run has {spec.sigma_min:g} to "
            f"{spec.sigma_max:g}: change {'' if config.own else '--set '}sigma_min, sigma_max"
        )
    return spec


def _consistent(renoise: str) -> str:
    return "sqrt" if renoise == "ddim" else renoise


def _exact(sigma: float) -> str:
    """Return a noise level so that what is typed is the same number."""
    return f"{sigma:g}" if float(f"{sigma:g}") == sigma else repr(sigma)
