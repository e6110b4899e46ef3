# SPDX-License-Identifier: MIT
"""What is known of a foreign checkpoint, where each fact comes from, and what the user still has to pass.

Nothing in a file of weights says which of the field's conventions it was trained with. A value is either fixed by
the tensors, usual for a named source, or required from the user: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from cmfast.conditions import class_label
from cmfast.errors import ArtifactError, CmfastError
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint, is_finite
from cmfast_train.config.overrides import parse_field
from cmfast_train.networks.build import NetworkConfig
from cmfast_train.networks.shape import Size, check_image_size

T = TypeVar("T")
EXAMPLES: Mapping[str, Any] = {  # of values that the user passes where the file has none
    "image_size": 64,
    "head_channels": 64,
    "qkv": "3hd",
    "scaling": "boundary",
    "c_noise": "250ln",
    "renoise": "sqrt",
    "clip": "true",
    "sigma_min": 0.002,
    "sigma_max": 80,
    "sigma_data": 0.5,
    "grid": 40,
    "horizon": 16,
    "groups": 8,
}
CONVENTIONS = (  # the fields of ModelSpec that no tensor shows
    "scaling",
    "c_noise",
    "renoise",
    "clip",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "grid",
)
OF_POLICIES = ("horizon", "groups", "times", "encoder")  # fields of Given that only files of robot policies have
LARGEST = 65536  # of every whole number that is given or read: nothing is allocated that no model needs
QKV_ORDERS = ("3hd", "h3d", "hd3")  # three (q, k, v), head, channel of the head: the outermost first


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user passes about a file (`--set NAME=VALUE`). None: not given. Noise levels are in data units."""

    weights: str | None = None  # which of several sets of weights in the file, for example ema
    image_size: Size | None = None  # pixels: one number of square images, else (height, width)
    head_channels: int | None = None  # width of an attention head
    heads: int | None = None  # number of heads of every attention, where their width is not the same everywhere
    horizon: int | None = None  # steps of a sequence of actions
    groups: int | None = None  # of the norms of a 1-D U-Net
    encoder: bool | None = None  # read the encoder of images of a policy too; otherwise it is left out
    times: str | None = None  # SCHEDULE:STEPS or SCHEDULE:STEPS:BETA_START:BETA_END: a table of times
    qkv: str | None = None  # order of the rows of the attention's qkv layer, one of QKV_ORDERS
    scaling: str | None = None  # cmfast.spec.SCALINGS
    c_noise: str | None = None  # cmfast.spec.C_NOISES
    renoise: str | None = None  # cmfast.spec.RENOISES
    clip: bool | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    grid: int | None = None  # levels of the Karras grid of training; 0: none
    sigmas: tuple[tuple[float, ...], ...] | None = None  # default noise levels for 1, 2, .. steps

    def __post_init__(self) -> None:
        if self.qkv is not None and self.qkv not in QKV_ORDERS:
            raise CmfastError(f"qkv must be one of {', '.join(QKV_ORDERS)}, got {self.qkv!r}")
        if self.image_size is not None:
            check_image_size(self.image_size)
        for name in ("head_channels", "heads", "horizon", "groups"):
            if (value := getattr(self, name)) is not None and not 0 < value <= LARGEST:
                raise CmfastError(f"{name} must be a whole number from 1 to {LARGEST}, got {value}")
        if self.heads is not None and self.head_channels is not None:
            raise CmfastError("heads and head_channels set the same thing; pass one of them")
        steps = [len(sigmas) for sigmas in self.sigmas or ()]
        if len(set(steps)) < len(steps):
            raise CmfastError(f"sigmas has two lists of the same length: {self.sigmas}")

    @classmethod
    def parse(cls, assignments: Iterable[str]) -> Given:
        """Read NAME=VALUE strings."""
        values: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals:
                raise CmfastError(f"--set {text}: expected NAME=VALUE")
            if name in values:
                raise CmfastError(f"--set {text}: {name} is given twice")
            values[name] = parse_field(text, cls, name, value)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that is known."""

    name: str
    value: Any
    where: str  # what says so: "the tensors", "the file's name", "--set"


@dataclass
class Facts:
    """The facts of one file, collected while it is read. Each method returns the value to go on with."""

    given: Given
    known: list[Fact] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # name: an example value
    content: Any = None  # what the file holds, the weights among it; objects are there by name only

    def fixed(self, name: str, value: T, where: str = "the tensors") -> T:
        """Record a value that the file determines; a user who passes another one gets an error."""
        passed = getattr(self.given, name, None)
        if passed is not None and passed != value:
            raise CmfastError(
                f"--set {name}={passed} contradicts {where}: {'remove it' if value is None else f'{name} is {value}'}"
            )
        if value is not None:
            self.known.append(Fact(name=name, value=value, where=where))
        return value

    def usual(self, name: str, value: T, where: str) -> T:
        """Record what is usual for the file's source, or what the user passed instead."""
        passed = getattr(self.given, name, None)
        self.known.append(
            Fact(name=name, value=value if passed is None else passed, where=where if passed is None else "--set")
        )
        return value if passed is None else passed

    def required(self, name: str, example: Any) -> Any:
        """Return what the user passed, or None, and then the value is missing; `example` shows what to type."""
        passed = getattr(self.given, name)
        if passed is None:
            self.missing[name] = str(example)
        else:
            self.known.append(Fact(name=name, value=passed, where="--set"))
        return passed

    def usual_or_required(self, name: str, usual: Mapping[str, Any], where: str) -> Any:
        """Return what is usual where the source is known for it, else require it from the user."""
        return self.usual(name, usual[name], where) if name in usual else self.required(name, EXAMPLES[name])


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A foreign checkpoint, read as far as it says what it is."""

    format: str  # openai, diffusers, seed, edm
    what: str  # in words, one line
    facts: Facts
    network: NetworkConfig | None  # None where facts are missing
    spec: ModelSpec | None
    source: Mapping[str, Any]  # for the manifest: format, and what it was read as
    weights: Callable[[], dict[str, Tensor]]  # in our names and layout, float32
    hint: str = ""  # how to pass everything that is missing at once, for example --source openai:imagenet64-cd
    warnings: tuple[str, ...] = ()

    def checkpoint(self, where: str) -> Checkpoint:
        """Return the model, or raise CmfastError with what is missing; `where` names the file in errors."""
        if self.facts.missing or self.network is None or self.spec is None:
            raise CmfastError(
                f"{where}: {self.what}; its {', '.join(self.facts.missing)} cannot be inferred from the file; "
                f"pass {'them' if len(self.facts.missing) > 1 else 'it'}: cmfast-export {where} {self.to_pass}"
            )
        weights = self.weights()
        for name, tensor in weights.items():
            if not is_finite(tensor):
                raise ArtifactError(f"{where}: the weight {shown(name)} has values that are not finite")
        given = {name: value for name, value in vars(self.facts.given).items() if value is not None}
        source = {**self.source, **({"told": given} if given else {})}  # the key that manifests have always had
        return Checkpoint(spec=self.spec, network=self.network, weights=weights, source=source)

    @property
    def to_pass(self) -> str:
        """What to type so that nothing is missing."""
        options = " ".join(f"--set {name}={example}" for name, example in self.facts.missing.items())
        return f"{self.hint}, or {options}" if self.hint else options


def shown(name: str) -> str:
    """Return a name from a file, fit for one line of a terminal."""
    return ascii(name)[1:-1][:100]


def difference(need: Mapping[str, Sequence[int]], have: Mapping[str, Sequence[int]]) -> str | None:
    """Return how the shapes of a network's tensors differ from those of a file, at the first name; None: they do not.

    Args:
        need: Shapes by name, of the network.
        have: The same of the file.
    """
    for name in sorted(need.keys() | have.keys()):
        expected, found = (list(each[name]) if name in each else None for each in (need, have))
        if expected != found:
            there = "missing" if found is None else found
            return f"{shown(name)} is {there}, expected {'no such tensor' if expected is None else expected}"
    return None


def given_sigmas(facts: Facts) -> dict[int, tuple[float, ...]] | None:
    """Return the default noise levels by their number of steps, where the user passed them."""
    if facts.given.sigmas is None:
        return None
    facts.usual("sigmas", facts.given.sigmas, "--set")
    return {len(sigmas): sigmas for sigmas in facts.given.sigmas}


def spec_of(
    facts: Facts,
    shape: tuple[int, ...] | None,
    classes: int,
    usual: Mapping[str, Any],
    where: str,
    sigmas: Mapping[int, tuple[float, ...]] | None = None,
    sigmas_where: str = "",
    fixed: Mapping[str, Any] | None = None,
    fixed_where: str = "",
    extra: Mapping[str, Any] | None = None,
) -> ModelSpec | None:
    """Return the conventions as a ModelSpec, or None where some are missing (they are in `facts.missing` then).

    Args:
        shape: of a sample; None: not known yet
        usual: what the source, which `where` names, is known for: of CONVENTIONS; what is not in it must be given
        sigmas: default noise levels for 2 and more steps, data units, from `sigmas_where`; one step is always
            sigma_max
        fixed: what cannot be set, because `fixed_where` determines it
        extra: fields of ModelSpec that are not those of images, "sigmas" of all numbers of steps among them
    """
    fixed, extra = fixed or {}, extra or {}
    values = {
        name: facts.fixed(name, fixed[name], fixed_where)
        if name in fixed
        else facts.usual_or_required(name, usual, where)
        for name in CONVENTIONS
    }
    if shape is None or facts.missing:
        return None
    if (given := given_sigmas(facts)) is not None:
        sigmas = given
    elif "sigmas" in extra:
        sigmas = extra["sigmas"]
        facts.usual("sigmas", f"of {', '.join(map(str, sigmas))} steps", "DDIM")
    else:
        top = float(values["sigma_max"])
        sigmas = {1: (top,), **{steps: few for steps, few in (sigmas or {}).items() if few[0] == top}}
        facts.usual("sigmas", tuple(sigmas.values()), sigmas_where or where)
    images = {"data": "image", "conditions": (class_label(classes),) if classes else ()}
    return ModelSpec(shape=shape, **values, **images | dict(extra) | {"sigmas": sigmas})
