# SPDX-License-Identifier: MIT
"""Conditions: the named inputs of a denoiser beside x and sigma, such as a class label, a vector or an image.

A `Condition` declares one, in `ModelSpec.conditions`; `condition_values` turns what a caller passes into the arrays
that a backend is given, or says what does not fit. Everything in between passes them on as one mapping.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmfast.checks import array_of_numbers, is_whole, need_memory, real_number, shown
from cmfast.errors import CmfastError, printable

if TYPE_CHECKING:  # a manifest is read without numpy
    import numpy as np
    import numpy.typing as npt

KINDS = ("class", "tensor")
LABEL = "label"  # the class condition that `sample(label=...)` sets, and that is drawn from the seed without it
# Inputs and outputs of graphs, and parameters that stand beside conditions in calls.
RESERVED = ("x", "sigma", "sigma_next", "c_noise", "c_noise_next", "noise", "denoised", "images", "samples", "self")
MAX_CONDITIONS = 32
MAX_NAME = 100  # characters of a condition's or a class's name
MAX_RANK = 6  # axes of a tensor condition, after the batch
MAX_CLASSES = 2**31 - 1
NAMES_SHOWN, NAMES_COMPARED = 10, 2000  # of classes, in an error
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One named input of a denoiser.

    A class is passed as int64 [B], a tensor as float32 [B, *shape]. An axis of `shape` is a number, or the name of a
    size that differs from call to call: axes of the same name, of any condition, have the same size. None is an axis
    with a name of its own.
    """

    name: str  # a Python identifier, the name of the graph's input
    kind: str = "tensor"  # one of KINDS
    classes: int = 0  # of a class: how many there are
    class_names: tuple[str, ...] = ()  # of a class: names of 0, 1, ..; (): they have none
    shape: tuple[int | str, ...] = ()  # of a tensor, without the batch
    null: int | float | None = None  # what stands for no condition, as in classifier-free guidance: a class, which may
    # be one more than there are, or the number that fills a tensor; None: the model was not trained without it

    def __post_init__(self) -> None:
        name = self.name
        if not is_name(name) or name in RESERVED:
            raise CmfastError(
                f"a condition's name must be an identifier other than {', '.join(RESERVED)} and Python's keywords, got "
                f"{shown(name)}"
            )
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise CmfastError(f"condition {name}: kind must be {' or '.join(KINDS)}, got {shown(self.kind)}")
        if self.kind == "class":
            if not is_whole(self.classes, 1, MAX_CLASSES):
                raise CmfastError(
                    f"condition {name}: classes must be a positive whole number, got {shown(self.classes)}"
                )
            if self.shape:
                raise CmfastError(f"condition {name}: a class has no shape, got {shown(self.shape)}")
            check_class_names(self.class_names, self.classes)
            if self.null is not None and not is_whole(self.null, 0, self.classes):
                raise CmfastError(
                    f"condition {name}: null must be a class from 0 to {self.classes}, got {shown(self.null)}"
                )
            return
        if name == LABEL:
            raise CmfastError(f"condition {LABEL}: this name is for a class; name a tensor otherwise")
        if not isinstance(self.classes, int) or self.classes or self.class_names != ():
            raise CmfastError(f"condition {name}: a tensor has no classes")
        if not isinstance(self.shape, (tuple, list)) or len(self.shape) > MAX_RANK:
            raise CmfastError(f"condition {name}: shape must be at most {MAX_RANK} sizes, got {shown(self.shape)}")
        shape = tuple(f"{name}_{axis}" if side is None else side for axis, side in enumerate(self.shape))
        if not all(is_whole(side, 1, 2**31 - 1) or is_name(side) for side in shape):
            raise CmfastError(
                f"condition {name}: sizes are whole numbers from 1 or names of dynamic sizes, got {shown(self.shape)}"
            )
        object.__setattr__(self, "shape", shape)
        if self.null is not None:
            object.__setattr__(self, "null", real_number(f"null of the condition {name}", self.null))

    @property
    def entries(self) -> int:
        """Of a class: how many numbers it may have, that of no class included."""
        return max(self.classes, int(self.null) + 1) if self.null is not None else self.classes

    @property
    def dynamic(self) -> bool:
        """Whether some of its sizes differ from call to call."""
        return any(isinstance(side, str) for side in self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the manifest.

        Returns:
            The fields that its kind has, by name, ready for JSON.
        """
        null = {} if self.null is None else {"null": self.null}
        if self.kind == "tensor":
            return {"name": self.name, "kind": "tensor", "shape": list(self.shape), **null}
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return {"name": self.name, "kind": "class", "classes": self.classes, **names, **null}

    @classmethod
    def from_dict(cls, values: Any) -> Condition:
        """Read what `to_dict` wrote.

        Args:
            values: the fields by name; unknown keys are ignored.

        Returns:
            The condition.

        Raises:
            CmfastError: a key is missing, or a value is wrong.
        """
        if not isinstance(values, Mapping) or not {"name", "kind"} <= values.keys():
            raise CmfastError(f"a condition is an object with a name and a kind, got {shown(values)}")
        known: dict[str, Any] = {name: values[name] for name in ("name", "kind", "classes", "null") if name in values}
        for name in ("class_names", "shape"):
            if name in values:
                if not isinstance(values[name], (list, tuple)):
                    raise CmfastError(f"condition {shown(values['name'])}: {name} must be a list")
                known[name] = tuple(values[name])
        return cls(**known)


def class_label(classes: int, names: Sequence[str] = (), *, null: int | None = None) -> Condition:
    """Return the usual condition of a class-conditional model, named "label".

    Args:
        classes: how many there are.
        names: of the classes 0, 1, ..; () for none.
        null: the number that stands for no class, as in guidance: see `Condition`.

    Returns:
        The condition.

    Raises:
        CmfastError: `classes` is no positive whole number, or the names do not fit it.
    """
    return Condition(name=LABEL, kind="class", classes=classes, class_names=tuple(names), null=null)


def check_conditions(conditions: Any) -> tuple[Condition, ...]:
    """Return conditions as a tuple, or raise CmfastError unless their names differ."""
    if not isinstance(conditions, (tuple, list)) or not all(isinstance(each, Condition) for each in conditions):
        raise CmfastError(f"conditions must be a tuple of cmfast.Condition, got {shown(conditions)}")
    names = [each.name for each in conditions]
    if len(names) > MAX_CONDITIONS or len(set(names)) < len(names):
        raise CmfastError(f"conditions must be at most {MAX_CONDITIONS} with different names, got {shown(names)}")
    sizes = {side for each in conditions for side in each.shape if isinstance(side, str)}
    if both := sorted(sizes & {*names, *RESERVED, "batch"}):
        raise CmfastError(f"a dynamic size needs a name of its own, got {both[0]!r}")
    return tuple(conditions)


def no_label(conditions: Sequence[Condition]) -> CmfastError:
    """Return the error for a label that was passed to a model that has none."""
    if not conditions:
        return CmfastError("a label was given, but the model is unconditional: it has no classes")
    return CmfastError(
        f"a label was given, but the model has no classes; it has {', '.join(e.name for e in conditions)}"
    )


def condition_values(
    conditions: Sequence[Condition], given: Mapping[str, Any] | None, n: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of n samples, in the order of `conditions`: int64 [n] of a class, float32 [n, *shape].

    A tensor for all samples is one array in memory, seen n times: read only, and not contiguous.

    Args:
        given: by name: of a class numbers or names, one for all samples or n of them; of a tensor an array [*shape]
            for all samples or [n, *shape]. Every condition needs a value

    Raises:
        CmfastError: a condition is missing or unknown, has another shape or type, or is not finite; it is named.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise CmfastError(f"conditions are passed by name, such as {{'state': array}}, got {shown(given)}")
    names = [each.name for each in conditions]
    if unknown := [name for name in given if name not in names]:
        have = f"it has {', '.join(names)}" if names else "it has none"
        raise CmfastError(f"this model has no condition {shown(unknown[0])}; {have}")
    sizes: dict[str, tuple[int, str]] = {}
    values: dict[str, npt.NDArray[Any]] = {}
    for condition in conditions:
        if given.get(condition.name) is None:
            raise CmfastError(f"this model needs the condition {condition.name}: {in_words(condition)}")
        values[condition.name] = _value(condition, given[condition.name], n, sizes)
    return values


def some_values(
    conditions: Sequence[Condition], n: int, *, seed: int = 0, first: int = 0, size: int = 16
) -> dict[str, npt.NDArray[Any]]:
    """Return values of the conditions for n samples, by the seed: classes uniform, tensors unit Gaussian.

    What a model is timed and checked with, where none are given. A label is the one that `sample` draws.

    Args:
        size: of the dynamic axes
    """
    from cmfast import noise

    samples = range(first, first + n)
    values: dict[str, npt.NDArray[Any]] = {}
    for index, each in enumerate(conditions):
        step = noise.LABEL_STEP if each.name == LABEL else noise.LABEL_STEP - 1 - index
        if each.kind == "class":
            values[each.name] = noise.labels(seed, samples, each.classes, step=step)
        else:
            shape = [size if isinstance(side, str) else side for side in each.shape]
            values[each.name] = noise.gaussian(seed, samples, step, shape)
    return values


def class_numbers(
    given: Any, n: int, classes: int, names: tuple[str, ...] = (), *, what: str = "label"
) -> npt.NDArray[np.int64]:
    """Return the class of each of n samples, int64 [n].

    Args:
        given: a class for all or n of them: numbers, names where the model has them, or both. A text is looked up
            as a name and read as a number; if these are two classes, that is an error. "+7" is always the number
        what: the name of the condition, for errors

    Raises:
        CmfastError: a number or a name is no class of the condition.
    """
    if isinstance(given, str):
        each_of: list[Any] = [given]
    elif isinstance(given, (list, tuple)) and any(isinstance(each, str) for each in given):
        each_of = list(given)
    else:
        return _numbers(what, given, n, classes, names)
    if not isinstance(given, str) and len(each_of) != n:
        raise CmfastError(f"{what} must be one class or {n} of them, got {shown(given)}")
    import numpy as np

    known = {name: number for number, name in enumerate(names)}
    found = [
        _class_of(what, each, known, names, classes)
        if isinstance(each, str)
        else int(_numbers(what, each, 1, classes, ())[0])
        for each in each_of
    ]
    return np.resize(np.array(found, np.int64), n)


def in_words(condition: Condition) -> str:
    """Return what a condition takes, for messages and tables."""
    if condition.kind == "class":
        return f"a class from 0 to {condition.classes - 1}"
    return f"float32 [{', '.join(map(str, ('B', *condition.shape)))}]"


def is_name(value: Any) -> bool:
    """Whether a value is an identifier of at most MAX_NAME ASCII characters."""
    return (
        isinstance(value, str)
        and len(value) <= MAX_NAME
        and bool(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value))
        and not keyword.iskeyword(value)
    )


def check_class_names(names: Any, classes: int) -> None:
    """Raise CmfastError unless these are the names of so many classes: different texts without control characters."""
    if not isinstance(names, tuple) or not all(isinstance(n, str) and 0 < len(n) <= MAX_NAME for n in names):
        raise CmfastError(f"class_names must be texts of 1 to {MAX_NAME} characters")
    if names and len(names) != classes:
        raise CmfastError(f"class_names has {len(names)} names for {classes} classes")
    if len(set(names)) < len(names) or not all(name.isprintable() for name in names):
        raise CmfastError("class_names must be different printable texts")


def _value(condition: Condition, given: Any, n: int, sizes: dict[str, tuple[int, str]]) -> npt.NDArray[Any]:
    """Return the array of a condition; `sizes`: what the dynamic sizes are, and which condition says so."""
    import numpy as np

    name = condition.name
    if condition.kind == "class":
        need_memory(16 * n, f"the {name}s of {n} samples", "draw fewer at a time")
        return class_numbers(given, n, condition.entries, condition.class_names, what=name)
    array = array_of_numbers(f"condition {name}", given)
    rank = len(condition.shape)
    if array.ndim not in (rank, rank + 1) or (array.ndim == rank + 1 and len(array) != n):
        raise CmfastError(
            f"condition {name} must be {_shape_text(condition)} for all or {_shape_text(condition, n)}, got "
            f"{list(array.shape)}"
        )
    for size, side in zip(array.shape[array.ndim - rank :], condition.shape, strict=True):
        if size < 1 or (isinstance(side, int) and size != side):
            raise CmfastError(f"condition {name} must be {_shape_text(condition)}, got {list(array.shape)}")
        if isinstance(side, str):
            known, where = sizes.setdefault(side, (size, name))
            if size != known:
                raise CmfastError(
                    f"condition {name} has {side} = {size}, and {where} has {known}; the two must be the same"
                )
    if not np.isfinite(array).all():
        raise CmfastError(f"condition {name} has values that are not finite (NaN or infinity)")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise CmfastError(f"condition {name} has values that float32 cannot hold")
    return np.broadcast_to(numbers, (n, *numbers.shape[array.ndim - rank :]))


def _shape_text(condition: Condition, n: int | None = None) -> str:
    return f"[{', '.join(map(str, (*(() if n is None else (n,)), *condition.shape)))}]"


def _numbers(what: str, value: Any, n: int, classes: int, names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    import numpy as np

    try:
        given = np.asarray(value)
    except Exception:
        given = np.asarray(None)
    if given.dtype.kind == "U":
        return class_numbers(given.tolist(), n, classes, names, what=what)
    if given.dtype.kind == "O" and given.ndim <= 1:  # whole numbers beyond 64 bits
        whole = [each for each in np.atleast_1d(given).tolist() if type(each) is int]
        if whole and len(whole) == given.size:
            raise _out_of_range(what, max(whole, key=abs), classes)
    if given.size == 0 and given.shape == (n,):
        return np.empty(0, np.int64)
    if given.dtype.kind not in "iu" or given.shape not in ((), (n,)):
        raise CmfastError(f"{what} must be one class or {n} of them, got {shown(value)}")
    for wrong in (int(given.max()), int(given.min())):
        if not 0 <= wrong < classes:
            raise _out_of_range(what, wrong, classes)
    return np.array(np.broadcast_to(given.astype(np.int64), (n,)))


def _class_of(what: str, text: str, known: dict[str, int], names: tuple[str, ...], classes: int) -> int:
    """Return the class that a text means."""
    number = int(text) if _NUMBER.fullmatch(text) else None
    if text in known:
        by_name = known[text]
        if number is not None and number != by_name and 0 <= number < classes:
            raise CmfastError(
                f"{what} {text!r} is the name of class {by_name} and the number of the class {names[number]!r}; "
                f"write +{by_name} for the first or +{number} for the second"
            )
        return by_name
    if number is not None:
        if not 0 <= number < classes:
            raise _out_of_range(what, number, classes)
        return number
    if not names:
        raise CmfastError(
            f"{what} {shown(text)} is not a number, and this model has no class names; need 0 to {classes - 1}"
        )
    have = _nearest_first(text, names)
    more = f" and {len(names) - len(have)} more" if len(names) > len(have) else ""
    listed = ", ".join(printable(name) for name in have)
    raise CmfastError(
        f"{what} {shown(text)} is not a class of this model; it has {listed}{more}, or 0 to {classes - 1}"
    )


def _nearest_first(text: str, names: Iterable[str]) -> list[str]:
    import difflib  # in errors only

    some, wanted = list(names)[:NAMES_COMPARED], text[:100].lower()
    likeness = {name: difflib.SequenceMatcher(None, wanted, name.lower()).ratio() for name in some}
    return sorted(some, key=lambda name: -likeness[name])[:NAMES_SHOWN]


def _out_of_range(what: str, number: int, classes: int) -> CmfastError:
    return CmfastError(f"{what} {shown(number)} is out of range; this model has the classes 0 to {classes - 1}")


def sample_arguments(conditions: Sequence[Condition], data: str, names: Mapping[str, str] | None = None) -> str:
    """Return the end of a cmfast-sample command for a model: its conditions and the name of what is written."""
    passed = [(names or {}).get(each.name, each.name) for each in conditions if each.name != LABEL]
    given = "".join(f" --condition {name}={name}.npy" for name in passed)
    return f"{given} -o samples.{'png' if data == 'image' else 'npz'}"
