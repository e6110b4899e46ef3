# SPDX-License-Identifier: MIT
"""ModelSpec: everything about a model that is not a weight.

It travels inside every checkpoint and every exported file (`cmfast.formats.manifest`), because nothing in a
network's weights tells which of the field's conventions it was trained with.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmfast.checks import is_whole, whole_number
from cmfast.conditions import LABEL, Condition, check_conditions, class_label
from cmfast.errors import CmfastError, one_line, shown
from cmfast.schedule import MAX_STEPS, DiscreteTimes, as_sigmas, check_sigmas, karras_sigmas, sigmas_of_indices

SCALINGS = (  # formulas: cmfast.preconditioning
    "boundary", "edm", "trigflow", "cloneofsimo", "flow", "x0", "eps", "vp_x0", "vp_eps", "vp_v", "lcm_eps", "lcm_v",
    "ctm",
)  # fmt: skip
C_NOISES = ("250ln", "ln/4", "raw", "trig", "flow", "discrete")
DATA = ("image", "array")
MAX_RANK = 4  # axes of a sample
RENOISES = ("sqrt", "plain", "ddim")  # formulas: cmfast.sampling


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The conventions of one model. Noise levels are standard deviations in data units."""

    shape: tuple[int, ...]  # of a sample, one to four axes: [C, H, W] images, [C, T] signals, [T, A] actions, ..
    data: str = "auto"  # one of DATA: images [C, H, W] in [-1, 1], or numbers; auto: images if C is 1 or 3 of 3 axes
    conditions: tuple[Condition, ...] = ()  # the named inputs beside x and sigma
    second_time: bool = False  # a flow map: the denoiser takes a second noise level, sigma_next
    sigma_min: float = 0.002  # noise level, data units; the model is the identity here
    sigma_max: float = 80.0  # noise level, data units; sampling starts here
    sigma_data: float = 0.5  # standard deviation of the data, data units
    scaling: str = "boundary"  # one of SCALINGS
    c_noise: str = "250ln"  # one of C_NOISES
    times: DiscreteTimes | None = None  # of c_noise "discrete" and the scalings of LCM: the table of their times
    renoise: str = "sqrt"  # one of RENOISES
    clip: bool = True  # clip x0 to [-1, 1] after every call while sampling
    grid: int = 0  # levels of the Karras grid that it was trained on; 0: none, any level was trained
    sigmas: Mapping[int, tuple[float, ...]] = field(  # default noise levels for 1, 2, ... steps
        default_factory=lambda: {1: (80.0,), 2: (80.0, 0.8)}
    )

    def __post_init__(self) -> None:
        shape = self.shape
        if not isinstance(shape, (tuple, list)) or not 1 <= len(shape) <= MAX_RANK:
            raise CmfastError(f"shape must be one to {MAX_RANK} positive whole numbers, got {shown(shape)}")
        if not all(is_whole(side, 1, 65536) for side in shape):
            raise CmfastError(f"shape must be whole numbers from 1 to 65536, got {shown(shape)}")
        object.__setattr__(self, "shape", tuple(shape))
        if isinstance(self.data, str) and self.data == "auto":
            object.__setattr__(self, "data", "image" if len(shape) == 3 and shape[0] in (1, 3) else "array")
        if not isinstance(self.data, str) or self.data not in DATA:
            raise CmfastError(f"data must be one of {', '.join(DATA)}, got {shown(self.data)}")
        if self.data == "image" and len(shape) != 3:
            raise CmfastError(f"images have the shape (C, H, W), got {shown(tuple(shape))}")
        object.__setattr__(self, "conditions", check_conditions(self.conditions))
        if not isinstance(self.second_time, bool):
            raise CmfastError(f"second_time must be true or false, got {shown(self.second_time)}")
        if not is_whole(self.grid, 0, 65536) or self.grid == 1:
            raise CmfastError(f"grid must be 0 (none) or 2 to 65536 levels, got {shown(self.grid)}")
        if not isinstance(self.clip, bool):
            raise CmfastError(f"clip must be true or false, got {shown(self.clip)}")
        scales = (self.sigma_min, self.sigma_max, self.sigma_data)
        # Squares of them are float32.
        if not all(_is_real(s) and 1e-18 <= s <= 1e18 for s in scales):
            raise CmfastError(
                f"sigma_min, sigma_max and sigma_data must be positive numbers, 1e-18 to 1e18, got {shown(scales)}"
            )
        if not self.sigma_min < self.sigma_max:
            raise CmfastError(f"need sigma_min < sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}")
        for name, allowed in (("scaling", SCALINGS), ("c_noise", C_NOISES), ("renoise", RENOISES)):
            if getattr(self, name) not in allowed:
                raise CmfastError(f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        if self.scaling == "cloneofsimo" and self.sigma_data != 0.5:
            raise CmfastError(f"the scaling cloneofsimo has sigma_data 0.5 built in, got {self.sigma_data:g}")
        if self.times is not None and not isinstance(self.times, DiscreteTimes):
            raise CmfastError(f"times must be cmfast.schedule.DiscreteTimes or None, got {shown(self.times)}")
        if self.times is None and (self.c_noise == "discrete" or self.scaling.startswith("lcm_")):
            raise CmfastError(
                f"scaling {self.scaling} with c_noise {self.c_noise} needs a table of times: "
                'times=DiscreteTimes(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)'
            )
        if not isinstance(self.sigmas, Mapping):
            raise CmfastError(f"sigmas must be {{steps: noise levels}}, got {shown(self.sigmas)}")
        for steps, sigmas in self.sigmas.items():
            if not isinstance(sigmas, (tuple, list)) or not is_whole(steps, 0, 65536) or len(sigmas) != steps:
                many = len(sigmas) if isinstance(sigmas, (tuple, list)) else "no list"
                raise CmfastError(
                    f"the default noise levels for {shown(steps)} steps are {many}: {shown(sigmas)}; "
                    "need as many numbers as steps"
                )
            check_sigmas(sigmas, self.sigma_min, self.sigma_max)
        # As a manifest has them, so that a spec with 80 equals what is read back.
        for name in ("sigma_min", "sigma_max", "sigma_data"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "sigmas", {steps: tuple(map(float, s)) for steps, s in self.sigmas.items()})

    def sigmas_at(self, indices: Sequence[int]) -> tuple[float, ...]:
        """Return the noise levels at indices into the model's grid: `ts` of OpenAI's scripts, `timesteps` of diffusers.

        Args:
            indices: from 0, which is sigma_max, in any order. A closing last index, which OpenAI writes, is dropped.

        Returns:
            The noise levels, data units, decreasing.

        Raises:
            CmfastError: the model has no grid, or an index is not in it or there twice.
        """
        if not self.grid:
            raise CmfastError("this model has no grid that indices could point into; pass the noise levels (sigmas)")
        sigmas = sigmas_of_indices(indices, self.grid, self.sigma_min, self.sigma_max)
        if len(set(indices)) < len(indices):
            raise CmfastError(f"an index is there twice: {shown(indices)}")
        return check_sigmas(sigmas, self.sigma_min, self.sigma_max)

    def sigmas_for(self, steps: int | None = None, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the noise levels to sample with: the given `sigmas`, else the defaults for `steps`.

        Args:
            steps: number of network calls (NFE); without both, the fewest that the model has defaults for.
            sigmas: noise levels, data units, strictly decreasing.

        Returns:
            The noise levels, data units, decreasing.

        Raises:
            CmfastError: the model has no defaults for so many steps, or the levels do not decrease inside its range.
        """
        if isinstance(steps, int) and steps < 1:
            raise CmfastError(f"the number of steps must be at least 1, got {shown(steps)}")
        if steps is not None:
            steps = whole_number("number of steps", steps, 1)
        if sigmas is not None:
            sigmas = as_sigmas(sigmas)
            if steps is not None and steps != len(sigmas):
                raise CmfastError(
                    f"{shown(steps)} steps were requested with {len(sigmas)} noise levels; pass one of the two"
                )
            return check_sigmas(sigmas, self.sigma_min, self.sigma_max)
        if steps is None:
            steps = min(self.sigmas, default=1)
        if steps not in self.sigmas:
            if steps > MAX_STEPS:
                raise CmfastError(f"the number of steps must be at most {MAX_STEPS}, got {shown(steps)}")
            have = ", ".join(str(k) for k in sorted(self.sigmas)) or "none"
            some = karras_sigmas(min(steps, 50) + 1, self.sigma_min, self.sigma_max)[1:-1]
            example = ",".join([repr(self.sigma_max), *(f"{s:.4g}" for s in some)]) + (",.." if steps > 50 else "")
            raise CmfastError(
                f"this model has default noise levels for these numbers of steps: {have}; for {steps}, pass them, "
                f"for example sigmas {example}"
            )
        return tuple(self.sigmas[steps])

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the images.

        Raises:
            CmfastError: the model's data are no images.
        """
        if self.data != "image":
            raise CmfastError(f"this needs a model of images; this one draws arrays of {list(self.shape)}")
        channels, height, width = self.shape
        return channels, height, width

    @property
    def label(self) -> Condition | None:
        """The class condition named "label", if there is one."""
        return next((each for each in self.conditions if each.name == LABEL), None)

    @property
    def classes(self) -> int:
        """How many classes the label has; 0: there is no label."""
        return self.label.classes if self.label else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label's classes; (): they have none, or there is no label."""
        return self.label.class_names if self.label else ()

    def with_class_names(self, names: Sequence[str]) -> ModelSpec:
        """Return the spec with other names of the label's classes; without a label, as it is.

        Args:
            names: of the classes 0, 1, ..; () for none.

        Returns:
            The new spec.
        """
        renamed = (
            dataclasses.replace(each, class_names=tuple(names)) if each.name == LABEL else each
            for each in self.conditions
        )
        return dataclasses.replace(self, conditions=tuple(renamed))

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of the manifest that describe the model.

        Returns:
            The fields by name, ready for JSON.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["shape"] = list(self.shape)
        values["conditions"] = [condition.to_dict() for condition in self.conditions]
        values["sigmas"] = {str(k): list(v) for k, v in sorted(self.sigmas.items())}
        values["times"] = self.times.to_dict() if self.times else None
        usual = {"second_time": False, "grid": 0, "times": None}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_dict` wrote, of this schema or of "cmfast/1".

        Args:
            values: the keys of the manifest; unknown ones are ignored.

        Returns:
            The spec.

        Raises:
            CmfastError: a key is missing, or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise CmfastError(f"the description of the model must be an object, got {shown(values)}")
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            if "shape" not in values and "image" in values:
                values = _of_first_schema(values)
            known = {name: value for name, value in values.items() if name in names}
            if missing := names - known.keys() - {"grid", "second_time", "times"}:  # most models have none
                raise CmfastError(f"the description of the model lacks {', '.join(sorted(missing))}")
            for name in ("shape", "conditions", "sigmas"):
                wanted = Mapping if name == "sigmas" else (list, tuple)
                if not isinstance(known[name], wanted):
                    raise TypeError(f"{name} is {shown(known[name])}")
            if known["data"] not in DATA:
                raise TypeError(f"data is {shown(known['data'])}")
            known["shape"] = tuple(known["shape"])
            known["conditions"] = tuple(Condition.from_dict(each) for each in known["conditions"])
            if known.get("times") is not None:
                known["times"] = DiscreteTimes.from_dict(known["times"])
            known["sigmas"] = {_steps(k): _sigmas(v) for k, v in known["sigmas"].items()}
            return cls(**known)
        except (TypeError, ValueError, AttributeError, OverflowError) as err:
            raise CmfastError(f"the description of the model is malformed: {one_line(err)}") from None


def _of_first_schema(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description of "cmfast/1", of images and their classes only, in the words of this schema."""
    if missing := {"image", "classes"} - values.keys():
        raise CmfastError(f"the description of the model lacks {', '.join(sorted(missing))}")
    image, classes, names = values["image"], values["classes"], values.get("class_names", ())
    if not isinstance(image, (list, tuple)) or len(image) != 3:
        raise CmfastError(f"image must be three positive whole numbers (C, H, W), got {shown(image)}")
    if not is_whole(classes, 0, 2**31 - 1) or not isinstance(names, (list, tuple)):
        raise CmfastError(f"classes must be 0 (unconditional) or a positive whole number, got {shown(classes)}")
    if names and not classes:
        raise CmfastError(f"class_names has {len(names)} names for no classes")
    scaling = values.get("scaling")
    found = {name: value for name, value in values.items() if name not in ("image", "classes", "class_names")}
    return found | {
        "shape": image,
        "data": "image",
        "conditions": [class_label(classes, tuple(names)).to_dict()] if classes else [],
        "second_time": False,
        **({"scaling": "cloneofsimo" if scaling == "seed" else scaling} if "scaling" in values else {}),
    }


def _steps(key: Any) -> int:
    """Return the number of steps that a key of "sigmas" says: a whole number, or JSON's text of one."""
    if isinstance(key, bool) or not re.fullmatch("[1-9][0-9]{0,4}", str(key) if isinstance(key, int) else key):
        raise ValueError(f"sigmas has the key {shown(key)}, which is not a number of steps")
    return int(key)


def _sigmas(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(_is_real(value) for value in values):
        raise ValueError(f"sigmas holds {shown(values)}, which is not a list of noise levels")
    return tuple(float(value) for value in values)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
