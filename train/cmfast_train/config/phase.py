# SPDX-License-Identifier: MIT
"""One phase of a training run: its method, its length, the method's hyperparameters.

The hyperparameters of each method, with defaults and bounds, are in its row of `methods.table`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_bounds, check_types, shown
from cmfast_train.methods.method import COMMON, Method, Needs, find, setting


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training with one method. The network of a phase starts from the previous phase's EMA.

    The function `phase` returns one with the method's usual values. The fields describe themselves (`setting`).

    Raises:
        CmfastError: there is no such method, or a value is not allowed.
    """

    method: str  # a name in the table of methods
    images: int = setting(dataclasses.MISSING, "length, counted in images", above=0)
    lr: float = setting(1e-3, "learning rate of RAdam", above=0)
    # PyTorch's RAdam never divides by the gradients' size if 2 / (1 - beta2) - 1 is at most 5.
    beta2: float = setting(0.999, "decay of RAdam's average of squared gradients, per step", least=0.7, below=1)
    lr_warmup: float = setting(0.0, "opening fraction of the phase over which lr rises from 0", least=0, most=1)
    lr_decay: float = setting(0.0, "closing fraction of the phase over which lr falls to 0", least=0, most=1)
    ema: float = setting(0.999, "decay of the EMA weights, per optimiser step", least=0, below=1)
    clip_norm: float = setting(0.0, "the gradient is scaled down to this norm; 0: never", least=0)
    hyper: object  # the method's own hyperparameters, an instance of its row's `hyper`

    def __post_init__(self) -> None:
        row, prefix = find(self.method), f"{self.method}."
        check_types(self, prefix)
        check_bounds(self, prefix)
        if type(self.hyper) is not row.hyper:
            raise CmfastError(f"{prefix}hyper must be {row.hyper.__name__}(..), got {shown(self.hyper)}")
        check_types(self.hyper, prefix)
        check_bounds(self.hyper, prefix)
        if wrong := row.check(self.hyper):
            raise CmfastError(f"{prefix}{wrong}")

    @property
    def row(self) -> Method[Any]:
        """The row of its method in the table."""
        return find(self.method)

    @property
    def name(self) -> str:
        """The phase as --set phases writes it, without its length: ect, pd/4."""
        return self.row.title(self.hyper)

    @property
    def needs(self) -> Needs:
        """What it needs besides the student and its EMA."""
        return self.row.needs(self.hyper)

    def constants(self, done: int, steps: int) -> tuple[Any, ...]:
        """Return the numbers of the step after `done` of the phase's `steps`: `Method.constants`."""
        return self.row.constants(self.hyper, done, steps)

    @property
    def turns(self) -> int:
        """After how many steps the networks in training have each had their turn: `Method.turns`."""
        return self.row.turns(self.hyper)

    def changed(self, values: Mapping[str, Any]) -> Phase:
        """Return the phase with other values of its fields and of its method's, by name.

        Raises:
            CmfastError: there is no such field, or a value is not allowed.
        """
        names = (*COMMON, *self.row.fields())
        if unknown := [name for name in values if name not in names]:
            raise CmfastError(f"{self.method} has no field {shown(unknown[0])}; there are {', '.join(names[1:])}")
        own = {name: value for name, value in values.items() if name in self.row.fields()}
        common = {name: value for name, value in values.items() if name not in own}
        return dataclasses.replace(self, **common, hyper=dataclasses.replace(typing.cast(Any, self.hyper), **own))

    def values(self) -> dict[str, Any]:
        """Return its fields and its method's by name, as config.json has them."""
        return {name: getattr(self, name) for name in COMMON} | dataclasses.asdict(typing.cast(Any, self.hyper))


def phase(method: str, images: int, **values: Any) -> Phase:
    """Return a phase with the method's usual values, changed by `values`.

    Args:
        method: a name in the table of methods.
        images: length of the phase.
        values: fields of the phase and of the method, such as lr=1e-4 or q=4.0.

    Returns:
        The phase.

    Raises:
        CmfastError: there is no such method, or a value is not allowed.
    """
    row = find(method)
    usual: Mapping[str, Any] = row.defaults
    return Phase(method=method, images=images, **usual, hyper=row.hyper()).changed(values)


def types_of(method: str) -> dict[str, Any]:
    """Return the type of each field that --set METHOD.NAME=VALUE can change."""
    common = typing.get_type_hints(Phase)
    return {name: common[name] for name in COMMON if name != "method"} | typing.get_type_hints(find(method).hyper)


def phase_from_dict(values: Mapping[str, Any]) -> Phase:
    """Return the phase that `Phase.values` describes. Phases of 0.1.0 hold all of `FORMER`, used or not.

    Raises:
        CmfastError: a value is not allowed, or the method has no field of that name.
    """
    if "method" not in values or "images" not in values:
        missing = "method" if "method" not in values else "images"
        raise CmfastError(f"a phase of the configuration lacks {missing}")
    row = find(values["method"])
    known = {name: value for name, value in values.items() if name in (*COMMON, *row.fields())}
    if unknown := [name for name in values if name not in known and name not in FORMER]:
        raise CmfastError(f"a phase of the configuration has no field {shown(unknown[0])}; is it of a newer cmfast?")
    common = {name: value for name, value in known.items() if name in COMMON}
    return Phase(**common, hyper=row.hyper()).changed({name: known[name] for name in row.fields() if name in known})


# Hyperparameters that config.json of 0.1.0 holds for every phase.
FORMER = frozenset(
    {"p_mean", "p_std", "s0", "s1", "q", "k", "b", "stages", "steps", "ratio", "loss", "huber", "mu", "mu0", "solver",
     "warmup", "tangent_c", "adaptive", "derivative", "power"}
)  # fmt: skip
