# SPDX-License-Identifier: MIT
"""Edits by noise alone: from strokes (SDEdit, arXiv:2108.01073), denoising, interpolation between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast.checks import real_number, shown, whole_number
from cmfast.editing import inputs
from cmfast.editing.constraints import Floats
from cmfast.editing.loop import edited, need_denoiser, sigmas_from
from cmfast.errors import CmfastError
from cmfast.model import Conditions, Label, Model
from cmfast.sampling import to_uint8

Point = int | tuple[int, int]  # a seed, or a seed and the index of a sample


def sdedit(
    model: Model,
    guide: npt.ArrayLike,
    sigma: float,
    *,
    n: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    first: int = 0,
    floats: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Draw samples that look like `guide`, strokes or a rough trajectory: noise is added, and the model removes it.

    Args:
        model: A denoiser, on any backend.
        guide: As `known` of `inpaint`.
        sigma: Noise level, data units: the higher, the freer. Details smaller than the noise are the model's.
        steps: Network calls a sample (2), at levels of the Karras grid from sigma down.

    The rest is as in `inpaint`.

    Returns:
        uint8 [n, H, W, C] of images, float32 [n, *shape] of other data.

    Raises:
        CmfastError: the noise level is not one of the model's, or an input does not fit it; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    values = inputs.samples(model.spec, "guide", guide)
    sigmas = sigmas_from(model.spec, steps, start=_level(sigma), default=2)
    return edited(
        model, inputs.number(n, ("guide", len(values))), sigmas, start=values, seed=seed, label=label,
        conditions=conditions, batch=batch, first=first, floats=floats, progress=progress,
    )  # fmt: skip


def denoise(
    model: Model,
    noisy: npt.ArrayLike,
    sigma: float,
    *,
    n: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    first: int = 0,
    floats: bool = False,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Remove Gaussian noise of a known level: in one call, or in more with fresh noise in between.

    Args:
        model: A denoiser, on any backend.
        noisy: As `known` of `inpaint`; floats of images may be outside of [-1, 1].
        sigma: Noise level of `noisy`, data units; of pixels its standard deviation divided by 127.5.
        steps: Network calls a sample (1), at levels of the Karras grid from sigma down.

    The rest is as in `inpaint`.

    Returns:
        uint8 [n, H, W, C] of images, float32 [n, *shape] of other data.

    Raises:
        CmfastError: the noise level is not one of the model's, or an input does not fit it; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    values = inputs.samples(model.spec, "noisy", noisy, inside=False)
    sigmas = sigmas_from(model.spec, steps, start=_level(sigma))
    return edited(
        model, inputs.number(n, ("noisy", len(values))), sigmas, start=values, noisy=False, seed=seed, label=label,
        conditions=conditions, batch=batch, first=first, floats=floats, progress=progress,
    )  # fmt: skip


def interpolate(
    model: Model,
    seeds: Sequence[Point],
    *,
    n: int = 8,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    label: Label | None = None,
    conditions: Conditions | None = None,
    batch: int = 64,
    floats: bool = False,
) -> npt.NDArray[Any]:
    """Draw n samples on the way from the sample of one seed to that of another, both ends included.

    The noise goes along great circles (slerp), so it stays unit Gaussian. The ends are what `Model.sample` draws with
    the same steps and label.

    Args:
        model: A denoiser, on any backend.
        seeds: Two or more seeds, or pairs (seed, index of the sample), the way goes through in order.
        n: How many, spread evenly; at least as many as seeds.
        steps: Network calls a sample, with the model's default noise levels.
        sigmas: Noise levels, data units, decreasing; instead of steps.

    The rest is as in `inpaint`.

    Returns:
        uint8 [n, H, W, C] of images, float32 [n, *shape] of other data.

    Raises:
        CmfastError: fewer than two seeds, two equal ones in a row, or an input that does not fit the model; one line.
        CheckFailed: the model returned NaN or infinity.
    """
    need_denoiser(model)
    points = _points(seeds)
    n = whole_number("number of samples", n, len(points))
    batch = min(whole_number("batch", batch, 1), model.backend.batch or n, n)
    sigmas, shape = model.sigmas_for(steps, sigmas), model.spec.shape
    values = model.values(n, label, conditions)
    ends = [portable.slices(seed, [index], len(sigmas), shape)[:, 0] for seed, index in points]
    pixels = model.spec.data == "image" and not floats
    drawn = []
    for begin in range(0, n, batch):
        part = range(begin, min(begin + batch, n))
        noise = np.stack([_between(ends, i * (len(ends) - 1) / (n - 1)) for i in part], axis=1)
        given = {name: value[part.start : part.stop] for name, value in values.items()}
        x0 = model.from_noise(noise, sigmas, conditions=given)
        drawn.append(to_uint8(x0) if pixels else x0)
    return np.concatenate(drawn)


def slerp(a: Floats, b: Floats, t: float) -> Floats:
    """Return the point at t in [0, 1] of the great circle from a to b, arrays of one shape; its ends exactly."""
    if t in (0.0, 1.0):
        return b if t else a
    one, two = (each.astype(np.float64).ravel() for each in (a, b))
    cosine = float(one @ two / math.sqrt((one @ one) * (two @ two)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    weights = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return np.asarray(weights[0] * a.astype(np.float64) + weights[1] * b, np.float32)


def _between(ends: Sequence[Floats], at: float) -> Floats:
    """Return the noise [K, *shape] at a place of the way, whole numbers at its ends; each step by itself."""
    one = min(int(at), len(ends) - 2)
    return np.stack([slerp(a, b, at - one) for a, b in zip(ends[one], ends[one + 1], strict=True)])


def _points(seeds: Any) -> list[tuple[int, int]]:
    """Return pairs of a seed and the index of a sample."""
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Sequence) or len(seeds) < 2:
        raise CmfastError(f"seeds must be two or more, such as (0, 1) or ((0, 3), (0, 7)), got {shown(seeds)}")
    points = []
    for each in seeds:
        seed, index = each if isinstance(each, (tuple, list)) and len(each) == 2 else (each, 0)
        points.append((portable.check_seed(seed), whole_number("index of a sample", index, 0, 2**64 - 1)))
    if same := [one for one, two in pairwise(points) if one == two]:
        raise CmfastError(f"there is no way from seed {same[0][0]}, sample {same[0][1]}, to itself; pass two others")
    return points


def _level(sigma: Any) -> float:
    level = real_number("noise level (sigma)", sigma)
    if level <= 0:
        raise CmfastError(f"the noise level (sigma) must be above 0, got {level:g}")
    return level
