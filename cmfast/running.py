# SPDX-License-Identifier: MIT
"""One batch on a backend: the few-step loop where the backend has none, a fixed batch size, values that are not finite.

`cmfast.model` checks what callers pass, and calls this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import sampling
from cmfast.backends import Backend, LoopBackend
from cmfast.checks import need_memory, not_finite, returned_array
from cmfast.drawing import Arrays, Floats
from cmfast.errors import CmfastError

Inputs = dict[str, npt.NDArray[Any]]
Denoise = Callable[[Floats, float, float | None, Arrays], Floats]  # (x, sigma, sigma_next, conditions) -> x0


def from_noise(
    backend: Backend, denoise: Denoise, noise: Floats, sigmas: tuple[float, ...], conditions: Arrays
) -> Floats:
    """Return samples [B, *shape] in data units from unit noise [K, B, *shape] at K noise levels.

    denoise  the raw contract, for a backend of a denoiser without a loop of its own

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


def run(backend: Backend, inputs: Inputs, n: int, sigmas: Floats | Sequence[float]) -> Floats:
    """Run a graph on n samples, [n, *shape]; where it takes one batch size only, repeat the last to fill it up.

    sigmas  noise levels, for the error where the result is not finite
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
