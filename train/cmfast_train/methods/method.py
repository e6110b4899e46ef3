# SPDX-License-Identifier: MIT
"""A row of the table of methods: everything that the configuration and the trainer know about one method.

Our rows are in `table`. Another package adds one by an entry point of the group "cmfast.methods", or by `register`
(docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast, final

from cmfast.errors import CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.config.checks import Bounds, shown
from cmfast_train.config.readers import READERS, type_name

H = TypeVar("H")  # the dataclass of a method's hyperparameters

ENTRY_POINTS = "cmfast.methods"  # the group of methods in other packages
COMMON = ("method", "images", "lr", "beta2", "lr_warmup", "lr_decay", "ema", "clip_norm")  # fields of every phase


def setting(
    default: Any,
    about: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return the dataclass field of one hyperparameter, for the class body of `Method.hyper`.

    Args:
        default: its usual value in this method.
        about: what it is, with its unit, in a few words.
        least: the smallest value allowed.
        most: the largest value allowed.
        above: values must be greater than this.
        below: values must be smaller than this.
        choices: the only texts allowed.
    """
    bounds = Bounds(least=least, most=most, above=above, below=below, choices=choices)
    return field(default=default, metadata={"about": about, "bounds": bounds})


@final
@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a phase needs besides the student and its EMA, given its hyperparameters.

    Attributes:
        distance: l1, l2, huber or lpips for `Step.distance`; "" if the method does not use it.
        huber: Pseudo-Huber constant over sqrt(values of a sample), data units.
        finite: `Networks.output_along` differentiates by central differences instead of forward mode.
        log_variance: train u(sigma), the log-variance that `Networks.output` returns beside F.
        fake_scores: train so many further denoisers, `Networks.fake`, which begin as the teacher. Each step gives
            gradients either to the student or to them.
        noises: tensors of unit Gaussian numbers that a step draws: `Step.noise` and, above 1, `Step.more_noise`.
    """

    distance: str = ""
    huber: float = 0.0
    finite: bool = False
    log_variance: bool = False
    fake_scores: int = 0
    noises: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Method(Generic[H]):
    """A training method: its step function, its hyperparameters, and its requirements.

    Attributes:
        name: as in `--set phases=NAME:IMAGES`; a Python identifier.
        paper: title and arXiv number, or what the method is.
        step: "package.module:function" of a `step.StepFunction`, imported when a phase begins.
        hyper: a frozen dataclass whose fields are made by `setting`: `--set NAME.FIELD=VALUE`.
        defaults: usual values of the fields that every phase has, such as lr and ema.
        scaling: usual scaling of a new model; "" where the method has no preference.
        c_noise: usual c_noise of a new model; "" where the method has no preference.
        scalings: scalings that it can train; empty: all.
        c_noises: values of c_noise that it can train with; empty: all.
        from_scaling: scaling of an --init model -> scaling that its weights are trained with, where the two differ.
        second_time: the network takes a second noise level.
        leaves: the kind of model that it leaves, such as "diffusion" or "consistency".
        distils: the kinds of models that it can distil; empty: it has no teacher. With the kind that it leaves among
            them, a phase after such a phase distils what that one left.
        differentiates: it calls `Networks.output_along`, which needs forward-mode derivatives of the network.
        joint: the samples of a micro-batch depend on each other, so that another split of a batch is another draw.
        one_evaluation: a step evaluates one network once, so no evaluations have to share dropout masks.
        needs: what a phase needs besides the student.
        constants: called with (hyper, steps done, steps of the phase); returns the Python numbers of a step that depend
            on its place in the phase. Everything else that a step computes with is in tensors. A CUDA graph is recorded
            again when these change, so they must change monotonically, or recur every `turns` steps.
        turns: called with hyper; returns after how many steps the networks in training have each had their turn. A
            weight is trained in the steps with the same constants, and in no others.
        target_decay: decay of the target's weights at a step, called with the same; None: there is no such average.
        spec_after: conventions of the model that a phase leaves, called with (spec, hyper).
        least_steps: optimiser steps that a phase needs at least, called with hyper.
        check: called with hyper; returns an error about fields that must fit together, beginning with the name of one,
            or "".
        check_sigmas: the same, called with (hyper, sigma_min, sigma_max).
        check_after: the same for a phase that follows one of the same method, called with (hyper, hyper before).
        numbered: the whole-number field that NAME/N:IMAGES sets; "" if there is none.
        series: NAME:IMAGES without N means one phase for each of these N, of equal length.
    """

    name: str
    paper: str
    step: str
    hyper: type[H]
    defaults: Mapping[str, float] = field(default_factory=dict)
    scaling: str = ""
    c_noise: str = ""
    scalings: tuple[str, ...] = ()
    c_noises: tuple[str, ...] = ()
    from_scaling: Mapping[str, str] = field(default_factory=dict)
    second_time: bool = False
    leaves: str = "consistency"
    distils: tuple[str, ...] = ()
    differentiates: bool = False
    joint: bool = False
    one_evaluation: bool = False
    needs: Callable[[H], Needs] = lambda hyper: Needs()
    constants: Callable[[H, int, int], tuple[Any, ...]] = lambda hyper, done, steps: ()
    turns: Callable[[H], int] = lambda hyper: 1
    target_decay: Callable[[H, int, int], float] | None = None
    spec_after: Callable[[ModelSpec, H], ModelSpec] = lambda spec, hyper: spec
    least_steps: Callable[[H], int] = lambda hyper: 1
    check: Callable[[H], str] = lambda hyper: ""
    check_sigmas: Callable[[H, float, float], str] = lambda hyper, sigma_min, sigma_max: ""
    check_after: Callable[[H, H], str] = lambda hyper, before: ""
    numbered: str = ""
    series: tuple[int, ...] = ()

    def function(self) -> Callable[[Any], Any]:
        """Import and return the step function (`step.StepFunction`).

        Raises:
            CmfastError: there is no such function.
        """
        return _imported(self.step, self.name)

    def fields(self) -> tuple[str, ...]:
        """Return the names of its hyperparameters."""
        return tuple(field.name for field in dataclasses.fields(cast(Any, self.hyper)))

    def title(self, hyper: H) -> str:
        """Return how --set phases writes a phase of it, without its length: ect, pd/4."""
        return f"{self.name}/{getattr(hyper, self.numbered)}" if self.numbered else self.name


@functools.cache
def _imported(place: str, name: str) -> Callable[[Any], Any]:
    try:
        found: Callable[[Any], Any] = pkgutil.resolve_name(place)
    except (ModuleNotFoundError, AttributeError, ValueError) as err:
        module = place.partition(":")[0]
        if isinstance(err, ModuleNotFoundError) and not f"{module}.".startswith(f"{err.name}."):
            raise  # something that the module imports
        raise CmfastError(f"the method {name} names {place} as its step function, which cannot be imported") from None
    return found


ROWS: dict[str, Method[Any]] = {}  # of `table`; `find` adds those of other packages


def names() -> tuple[str, ...]:
    """Return the names of all methods: ours, registered ones, those of installed packages."""
    from importlib.metadata import entry_points  # slow to import

    others = [entry.name for entry in entry_points(group=ENTRY_POINTS)]
    return tuple(dict.fromkeys([*ROWS, *others]))


def find(name: object) -> Method[Any]:
    """Return the row of a method.

    Raises:
        CmfastError: there is no such method, or the entry point is not a `Method` of that name.
    """
    if isinstance(name, str) and name in ROWS:
        return ROWS[name]
    from importlib.metadata import entry_points  # slow to import

    for entry in entry_points(group=ENTRY_POINTS, name=name) if isinstance(name, str) else ():
        method = entry.load()
        if not isinstance(method, Method) or method.name != name:
            raise CmfastError(f"the entry point {entry.value} of {ENTRY_POINTS} is not a Method called {name}")
        register(method)
        return method
    raise CmfastError(f"method must be one of {', '.join(names())}, got {shown(name)}")


def register(method: Method[Any]) -> None:
    """Add a method to the table of this process.

    Raises:
        CmfastError: the name is taken or not an identifier, or a hyperparameter has a type that --set cannot read.
    """
    if not method.name.isidentifier():
        raise CmfastError(f"the name of a method must be a Python identifier, got {shown(method.name)}")
    if ROWS.get(method.name, method) is not method:
        raise CmfastError(f"a method {method.name} exists already; choose another name")
    parameters: Any = getattr(method.hyper, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise CmfastError(f"{method.name}: hyper must be a frozen dataclass, got {shown(method.hyper)}")
    if taken := set(method.fields()) & set(COMMON):
        raise CmfastError(f"{method.name}: every phase has a field {min(taken)}; rename the hyperparameter")
    for name, kind in typing.get_type_hints(method.hyper).items():
        if kind not in READERS:
            types = ", ".join(map(type_name, READERS))
            raise CmfastError(f"{method.name}.{name}: a hyperparameter must be of {types}, got {type_name(kind)}")
    ROWS[method.name] = method
