# SPDX-License-Identifier: MIT
"""Inpainting, colour from grey and super-resolution: the model draws what a constraint leaves open.

Algorithm 4 of "Consistency Models" (arXiv:2303.01469): the few-step loop, with x0 projected on the constraint after
every call. Which noise levels are best depends on the model; more calls make the parts fit better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.editing import inputs
from cmfast.editing.constraints import Averages, Constraint, Grey, Known
from cmfast.editing.loop import edited, need_denoiser, sigmas_from
from cmfast.model import Conditions, Label, Model

STEPS = 18  # network calls, where the caller says nothing


def inpaint(
    model: Model,
    known: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    n: int | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    first: int = 0,
    floats: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Draw what `known` does not have: the holes of an image, the way between the two ends of a trajectory.

    Args:
        model: A denoiser, on any backend.
        known: Of images uint8 [H, W, C] or float32 [C, H, W] in [-1, 1]; of other data numbers [*shape]; or N of them.
        mask: True, 1 or 255 where a value is known: kept as it is. Of the shape of a sample, with 1 where an axis is
            for all; of images also [H, W]; or N of them.
        n: How many to draw; default: as many as inputs. One input makes n variations.
        steps: Network calls a sample (18), at levels of the Karras grid from sigma_max down.
        sigmas: Noise levels, data units, decreasing; instead of steps.
        seed: Sample i of a seed is the same whatever n, `batch`, the backend and the machine are.
        label: A class, or one a sample; a model with classes needs it.
        conditions: Values of the model's conditions by name, [*shape] or [n, *shape].
        batch: Samples at a time; changes memory and speed, not the samples.
        first: Index of the first sample.
        floats: Return float32 [n, *shape] in data units; default: what `Model.sample` returns.
        progress: Show a bar on stderr.

    Returns:
        uint8 [n, H, W, C] of images, float32 [n, *shape] of other data.

    Raises:
        CmfastError: the file has a fixed loop, or an input does not fit the model; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    number, constraint = of_known(model, known, mask, n)
    sigmas = sigmas_from(model.spec, steps, sigmas, default=STEPS)
    return edited(
        model, number, sigmas, constraint=constraint, seed=seed, label=label, conditions=conditions, batch=batch,
        first=first, floats=floats, progress=progress,
    )  # fmt: skip


def colorize(
    model: Model,
    grey: npt.ArrayLike,
    *,
    n: int | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    first: int = 0,
    floats: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Draw the colours of grey images with a model of RGB images: 0.299 R + 0.587 G + 0.114 B stays what it is.

    Args:
        model: A denoiser of images with three channels, on any backend.
        grey: uint8 [H, W] or floats [1, H, W] in [-1, 1], or N of them; of colour images the grey is taken.

    The rest is as in `inpaint`.

    Returns:
        uint8 [n, H, W, 3]; with `floats` float32 [n, 3, H, W], whose grey is the given one to 1e-5.

    Raises:
        CmfastError: the model draws no colours, or an input does not fit it; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    number, constraint = of_grey(model, grey, n)
    sigmas = sigmas_from(model.spec, steps, sigmas, default=STEPS)
    return edited(
        model, number, sigmas, constraint=constraint, seed=seed, label=label, conditions=conditions, batch=batch,
        first=first, floats=floats, progress=progress,
    )  # fmt: skip


def upscale(
    model: Model,
    low: npt.ArrayLike,
    *,
    n: int | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    first: int = 0,
    floats: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Draw samples of the model's size whose block averages are `low`: super-resolution.

    Args:
        model: A denoiser, on any backend.
        low: A smaller sample, or N of them, each side a divisor of the model's: uint8 [h, w, C], floats [C, h, w] in
            [-1, 1], or of other data numbers, such as every fourth average [T / 4, A] of a trajectory.

    The rest is as in `inpaint`.

    Returns:
        As `inpaint`; with `floats` the averages are the given ones to 1e-5.

    Raises:
        CmfastError: the sides do not divide the model's, or another input does not fit it; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    number, constraint = of_averages(model, low, n)
    sigmas = sigmas_from(model.spec, steps, sigmas, default=STEPS)
    return edited(
        model, number, sigmas, constraint=constraint, seed=seed, label=label, conditions=conditions, batch=batch,
        first=first, floats=floats, progress=progress,
    )  # fmt: skip


def of_known(model: Model, known: Any, mask: Any, n: int | None) -> tuple[int, Constraint]:
    """Return how many samples, and that they keep `known` where the mask is true."""
    values = inputs.samples(model.spec, "known", known)
    kept = inputs.masks(model.spec, mask, getattr(np.asarray(known), "dtype", None) == np.uint8)
    number = inputs.number(n, ("known", len(values)), ("mask", len(kept)))
    whole = (number, *model.spec.shape)
    return number, Known(np.broadcast_to(values, whole), np.broadcast_to(kept, whole))


def of_grey(model: Model, grey: Any, n: int | None) -> tuple[int, Constraint]:
    """Return how many samples, and that they keep a grey image."""
    values = inputs.greys(model.spec, grey)
    number = inputs.number(n, ("grey", len(values)))
    return number, Grey(np.broadcast_to(values, (number, *values.shape[1:])))


def of_averages(model: Model, low: Any, n: int | None) -> tuple[int, Constraint]:
    """Return how many samples, and that they keep averages."""
    values, factors = inputs.low_resolution(model.spec, low)
    number = inputs.number(n, ("low", len(values)))
    return number, Averages(np.broadcast_to(values, (number, *values.shape[1:])), factors)
