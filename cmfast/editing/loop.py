# SPDX-License-Identifier: MIT
"""The loop of all edits: `cmfast.sampling.sample`, from a start that is not only noise, with x0 projected on the way.

An edited denoiser is a denoiser, so Algorithm 4 is Algorithm 1 with another f. The noise is fresh in each call, also
with models that are sampled without it ("ddim"), since x0 is no longer all of the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast.checks import check_range, need_memory, whole_number
from cmfast.drawing import Drawing, check_noise
from cmfast.editing.constraints import Constraint, Floats
from cmfast.errors import CmfastError
from cmfast.model import Conditions, Label, Model
from cmfast.progress import progress_bar
from cmfast.sampling import sample, to_uint8
from cmfast.schedule import MAX_STEPS, check_sigmas, karras_sigmas
from cmfast.spec import ModelSpec


def edited(
    model: Model,
    n: int,
    sigmas: Sequence[float],
    *,
    constraint: Constraint | None = None,
    start: Floats | None = None,
    noisy: bool = True,
    seed: int,
    label: Label | None,
    conditions: Conditions | None,
    batch: int,
    first: int,
    floats: bool,
    progress: bool,
) -> npt.NDArray[Any]:
    """Draw n samples at these noise levels; return what `Model.sample` does, or with `floats` float32 [n, *shape].

    Args:
        model: A denoiser.
        n: How many.
        sigmas: Noise levels, data units, decreasing.
        constraint: What is kept; None: nothing.
        start: Around what the loop starts [n, *shape], data units; None: 0, and what the constraint keeps.
        noisy: Whether noise of the first level is added to it; it already has it otherwise.
        seed: Of the noise, as everything below as in `Model.sample`.
        label: A class, or one a sample.
        conditions: Values by name.
        batch: Samples at a time.
        first: Index of the first sample.
        floats: Data units instead of pixels.
        progress: Show a bar on stderr.
    """
    spec, first, seed = model.spec, check_range(first, n), portable.check_seed(seed)
    values = model.values(n, label, conditions)
    batch = min(whole_number("batch", batch, 1), model.backend.batch or n, n)
    around = np.broadcast_to(np.float32(0) if start is None else start, (n, *spec.shape))
    # Projected values may leave [-1, 1] on the way, as in the paper; they are limited at the end.
    free = dataclasses.replace(spec, clip=False, second_time=False, renoise=fresh(spec))

    def draw(part: slice) -> Floats:
        given = {name: value[part] for name, value in values.items()}

        def denoise(x: Floats, sigma: float) -> Floats:
            x0 = model.denoise(x, sigma, conditions=given)
            x0 = x0.clip(-1, 1) if spec.clip else x0
            return x0 if constraint is None else constraint.project(x0, part)

        indices = range(first + part.start, first + part.stop)
        noise = portable.slices(seed, indices, len(sigmas), spec.shape)
        y = around[part] if constraint is None else constraint.project(around[part], part)
        noise[0] = (noise[0] if noisy else 0) + y / np.float32(sigmas[0])
        x0 = sample(denoise, noise, sigmas, free)
        return constraint.limit(x0, part) if spec.clip and constraint is not None else x0

    check_noise(model.backend, Drawing(len(sigmas), lambda z, c: z), batch)
    pixels = spec.data == "image" and not floats
    shape, dtype = ((*spec.shape[1:], spec.shape[0]), np.uint8) if pixels else (spec.shape, np.float32)
    need_memory(n * int(np.prod(shape)) * 4, f"{n} {model.noun} {list(shape)}", "draw fewer at a time")
    results = np.empty((n, *shape), dtype)
    with progress_bar("editing", n, model.noun, show=progress) as advance:
        for begin in range(0, n, batch):
            part = slice(begin, min(begin + batch, n))
            x0 = draw(part)
            results[part] = to_uint8(x0) if pixels else x0
            advance(part.stop - part.start, "")
    return results


def need_denoiser(model: Model) -> None:
    """Raise CmfastError unless a file has a denoiser to call."""
    if not isinstance(model, Model):
        raise CmfastError(f"model must be what cmfast.load returns, got {type(model).__name__}")
    if model.manifest.kind != "denoiser":
        raise CmfastError(
            f"this file is a {model.manifest.kind}: its loop is fixed, and an edit changes it; export the denoiser: "
            "cmfast-export model.pt --kind denoiser"
        )


def sigmas_from(
    spec: ModelSpec, steps: int | None, sigmas: Sequence[float] | None = None, *, start: float = 0.0, default: int = 1
) -> tuple[float, ...]:
    """Return the noise levels of an edit, data units.

    Args:
        spec: Of the model.
        steps: Network calls: that many levels of the Karras grid down to sigma_min, which itself is left out.
        sigmas: Noise levels, instead of steps.
        start: The first level; 0: sigma_max.
        default: Steps, where neither is passed.
    """
    if sigmas is not None:
        return spec.sigmas_for(steps, sigmas)
    steps = whole_number("number of steps", default if steps is None else steps, 1, MAX_STEPS)
    start = start or spec.sigma_max
    check_sigmas([start], spec.sigma_min, spec.sigma_max)
    return karras_sigmas(steps + 1, spec.sigma_min, start)[:-1]


def fresh(spec: ModelSpec) -> str:
    """Return the rule by which fresh noise lifts x0 of this model."""
    return "plain" if spec.renoise == "ddim" else spec.renoise
