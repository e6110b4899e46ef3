# SPDX-License-Identifier: MIT
"""One batch on a backend: the few-step loop where the backend has none, a fixed batch size, values that are not finite.

`cmfast.model` checks what callers pass, and calls this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import sampling
from cmfast.backends import Backend, LoopBackend
from cmfast.checks import array_of_numbers, need_memory, not_finite, returned_array
from cmfast.conditions import LABEL
from cmfast.drawing import Arrays, Drawing, Floats
from cmfast.errors import CmfastError, shown
from cmfast.sampling import Churn, heun, heun_calls, noise_slices
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec

Inputs = dict[str, npt.NDArray[Any]]
# The highest noise level that a denoiser takes, over sigma_max: Heun's churn (arXiv:2206.00364) goes up to it.
CHURNED = math.sqrt(2)
Denoise = Callable[[Floats, float, float | None, Arrays], Floats]  # (x, sigma, sigma_next, conditions) -> x0


def from_noise(
    backend: Backend, denoise: Denoise, noise: Floats, sigmas: tuple[float, ...], conditions: Arrays
) -> Floats:
    """Return samples [B, *shape] in data units from unit noise [K, B, *shape] at K noise levels.

    Args:
        denoise: the raw contract, for a backend of a denoiser without a loop of its own

    Raises:
        CheckFailed: the model returned NaN or infinity.
    """
    n = noise.shape[1]
    # Once, not at every step: a value for all samples is one array in memory, seen many times.
    conditions = {name: np.ascontiguousarray(value) for name, value in conditions.items()}
    if isinstance(backend, LoopBackend):
        if n == 0:
            return np.empty(noise.shape[1:], np.float32)
        x0 = returned_array(backend.name, backend.loop(noise, sigmas, conditions), noise.shape[1:], np.float32)
        _check_finite(backend, x0, {"noise": noise}, sigmas)
        return x0
    if backend.manifest.kind == "denoiser":

        def bound(x: Floats, sigma: float, sigma_next: float | None = None) -> Floats:
            return denoise(x, sigma, sigma_next, conditions)

        return np.asarray(sampling.sample(bound, noise, sigmas, backend.manifest.spec))
    inputs: Inputs = {"noise": noise, **conditions}
    if backend.manifest.kind == "server":  # the batch is the first axis of everything
        inputs = {name: _batch_first(name, value) for name, value in inputs.items()}
    return run(backend, inputs, n, sigmas)


def few_step_drawing(backend: Backend, denoise: Denoise, sigmas: tuple[float, ...]) -> Drawing:
    """Return how a batch is drawn in few steps, at these noise levels; `denoise`: see `from_noise`."""

    def draw(noise: Floats, conditions: Arrays) -> Floats:
        return from_noise(backend, denoise, noise, sigmas, conditions)

    return Drawing(len(sigmas), draw, sigmas)


def heun_drawing(denoise: Denoise, spec: ModelSpec, steps: int, churn: float | Churn) -> Drawing:
    """Return how a batch is drawn by Heun's method, see `cmfast.sampling.heun`.

    Args:
        denoise: the raw contract.
        spec: of a diffusion model.
        steps: Heun steps.
        churn: the paper's S_churn, or all four of its numbers.

    Raises:
        CmfastError: the model is a flow map, or an argument is out of its range.
    """
    if spec.second_time:
        raise CmfastError("Heun's steps are for diffusion models, and this is a flow map: sample it in few steps")
    heun_calls(steps)
    sigmas = karras_sigmas(steps, spec.sigma_min, spec.sigma_max)
    full = churn if isinstance(churn, Churn) else Churn(s_churn=churn)

    def draw(noise: Floats, conditions: Arrays) -> Floats:
        return np.asarray(heun(lambda x, s: denoise(x, s, None, conditions), noise, sigmas, churn=full))

    return Drawing(noise_slices(len(sigmas), full), draw)


def run(backend: Backend, inputs: Inputs, n: int, sigmas: Floats | Sequence[float]) -> Floats:
    """Run a graph on n samples, [n, *shape]; where it takes one batch size only, repeat the last to fill it up.

    Args:
        sigmas: noise levels, for the error where the result is not finite
    """
    shape = backend.manifest.spec.shape
    if n == 0:
        return np.empty((0, *shape), np.float32)
    short = (backend.batch or n) - n
    if short < 0:
        raise CmfastError(f"this file takes batches of {backend.batch}, got {n}")
    if short:
        whole = sum(value.nbytes for value in inputs.values()) // n * (n + short)
        only = f"batches of {backend.batch}, the only size that this file takes,"
        need_memory(2 * whole, only, "export it with a smaller --batch")
        axis = backend.manifest.batch_axis
        inputs = {name: _lengthen(value, axis if name == "noise" else 0, short) for name, value in inputs.items()}
    x0 = returned_array(backend.name, backend.run(inputs), (n + short, *shape), np.float32)[:n]
    _check_finite(backend, x0, inputs, sigmas)
    return x0


def _check_finite(backend: Backend, x0: Floats, inputs: Inputs, sigmas: Floats | Sequence[float]) -> None:
    """Raise NotFinite, with the noise level, where a backend returned NaN or infinity."""
    if np.isfinite(x0).all():
        return
    for name, value in inputs.items():
        if not np.isfinite(value).all():
            raise CmfastError(f"{name} has values that are not finite (NaN or infinity)")
    if isinstance(sigmas, np.ndarray):  # one a sample
        finite = np.isfinite(x0).reshape(len(x0), -1).all(axis=1)
        sigmas = sorted(set(sigmas[~finite].tolist()), reverse=True)
    raise not_finite(backend.name, sigmas)


def _lengthen(values: npt.NDArray[Any], axis: int, by: int) -> npt.NDArray[Any]:
    return np.pad(values, [(0, by if i == axis else 0) for i in range(values.ndim)], mode="edge")


def _batch_first(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return noise [K, B, ...] as [B, K, ...], a class [B] as [B, 1], and other conditions as they are."""
    if name == "noise":
        return np.ascontiguousarray(values.swapaxes(0, 1))
    return values[:, None] if values.dtype == np.int64 else values


def given_conditions(of_class: Any, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a caller passed as conditions by name, the label among it, or raise CmfastError."""
    if conditions is not None and not isinstance(conditions, Mapping):
        raise CmfastError(f"conditions are passed by name, such as {{'state': array}}, got {shown(conditions)}")
    given = dict(conditions or {})
    if of_class is not None and given.get(LABEL) is not None:
        raise CmfastError("the label was passed twice, by `label` and in `conditions`; remove one")
    return given if of_class is None else given | {LABEL: of_class}


def own_noise(noise: Any, count: int, shape: tuple[int, ...]) -> Floats:
    """Return a caller's unit noise [count, B, *shape], or raise CmfastError."""
    noise = array_of_numbers("noise", noise)
    if noise.ndim != 2 + len(shape) or (len(noise), *noise.shape[2:]) != (count, *shape):
        need = ", ".join(map(str, shape))
        raise CmfastError(f"noise must be [{count}, B, {need}] for {count} levels, got {list(noise.shape)}")
    if noise.dtype != np.float32:
        raise CmfastError(f"noise must be float32, got {noise.dtype}")
    found: Floats = noise
    return found


def noise_levels(sigma: Any, n: int, spec: ModelSpec) -> Floats:
    """Return the noise levels of n samples, float32 [n], data units, or raise CmfastError.

    Args:
        sigma: one for all samples, or n of them.
        n: number of samples.
        spec: gives the range that the model was trained on.
    """
    if isinstance(sigma, (str, bytes, bool)):
        raise CmfastError(f"sigma must be a noise level or {n} of them, got {shown(sigma)}")
    given = array_of_numbers("sigma", sigma)
    if given.shape not in ((), (n,)):
        raise CmfastError(f"sigma must be one noise level or {n} of them, got shape {list(given.shape)}")
    most = CHURNED * spec.sigma_max
    # A little more than it, for what rounding to float32 adds. What float32 rounds to 0 is refused as 0 is.
    inside = (given >= np.finfo(np.float32).tiny) & (given <= most * (1 + 1e-6))
    if not inside.all():
        wrong = float(given[~inside].flat[0])
        raise CmfastError(
            f"noise level {wrong:g} cannot be denoised: this model was trained for {spec.sigma_min:g} to "
            f"{spec.sigma_max:g}, and denoise takes 0 < sigma <= {most:.6g} (sqrt(2) times that, for churn)"
        )
    return np.array(np.broadcast_to(given.astype(np.float32), (n,)))


def next_noise_levels(sigma_next: Any, sigmas: Floats) -> Floats:
    """Return the noise levels that a flow map goes to, float32 [n], or raise CmfastError.

    Args:
        sigma_next: one for all samples, or n of them, data units, from 0, below those of `sigmas`.
        sigmas: the noise levels that it goes from, [n].
    """
    given = array_of_numbers("sigma_next", sigma_next)
    if isinstance(sigma_next, bool) or given.shape not in ((), sigmas.shape):
        raise CmfastError(f"sigma_next must be one noise level or {len(sigmas)} of them, got {shown(sigma_next)}")
    after = np.array(np.broadcast_to(given.astype(np.float32), sigmas.shape))
    if not ((after >= 0) & (after < sigmas)).all():
        raise CmfastError(f"sigma_next must be from 0 and below sigma, got {shown(sigma_next)}")
    return after


def denoised(backend: Backend, x: Floats, sigma: Any, sigma_next: Any, conditions: Arrays) -> Floats:
    """Return f(x, sigma, **conditions) of a denoiser's backend; its noise levels are checked here."""
    spec = backend.manifest.spec
    sigmas = noise_levels(sigma, len(x), spec)
    inputs: Inputs = {"x": np.ascontiguousarray(x), "sigma": sigmas}
    if spec.second_time:
        inputs["sigma_next"] = next_noise_levels(0.0 if sigma_next is None else sigma_next, sigmas)
    elif sigma_next is not None:
        raise CmfastError("sigma_next is for flow maps, and this model takes one noise level")
    inputs |= {name: np.ascontiguousarray(value) for name, value in conditions.items()}
    return run(backend, inputs, len(x), sigmas)
