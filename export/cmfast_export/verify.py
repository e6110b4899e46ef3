# SPDX-License-Identifier: MIT
"""The proof: an exported file against PyTorch, at noise levels from sigma_min to sigma_max.

Every export runs the file that it wrote. A difference beyond the tolerance is an error that says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from cmfast.backends import Backend
from cmfast.checks import NotFinite
from cmfast.model import Model
from cmfast.noise import gaussian
from cmfast.spec import ModelSpec

Floats = npt.NDArray[np.float32]
BOUNDARY_TOLERANCE = 1e-6  # f(x, sigma_min) = x is exact in real arithmetic; float32 rounds x once
LARGE = 128 * 128  # pixels of an image; five images of more take gigabytes
LEVELS = 8  # noise levels from sigma_min to sigma_max, evenly spaced in the logarithm


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: a batch at one or several noise levels."""

    where: str  # "sigma 0.002", "batch 5, mixed sigmas", "2 steps at 80, 0.8"
    batch: int
    max_abs: float  # largest absolute difference, data units
    mse: float  # mean squared difference


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a file is from PyTorch; what the manifest records."""

    rows: tuple[Row, ...]
    boundary: float | None  # largest |f(x, sigma_min) - x| of the file; None where f has no such boundary

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.max_abs) else row.max_abs)

    @property
    def psnr_db(self) -> float:
        """Worst peak signal-to-noise ratio, dB, for images in [-1, 1]; 200 stands for equal to the bit."""
        mse = max(row.mse for row in self.rows)
        return 200.0 if mse == 0 else min(200.0, 10 * math.log10(4 / mse))

    def failure(self, tolerance: float, of: str = "PyTorch") -> str | None:
        """Return what is wrong in words, or None; `of` is what was compared with."""
        worst = self.worst
        if not worst.max_abs <= tolerance:  # also when it is not a number
            return f"differs from {of} by {worst.max_abs:.2e} at {worst.where} (allowed {tolerance:.0e})"
        if self.boundary is not None and not self.boundary <= BOUNDARY_TOLERANCE:
            return f"f(x, sigma_min) differs from x by {self.boundary:.2e} (allowed {BOUNDARY_TOLERANCE:.0e})"
        return None

    def to_dict(self) -> dict[str, float]:
        """Return what the manifest records."""
        values = {"max_abs": float(f"{self.worst.max_abs:.3g}"), "psnr_db": round(self.psnr_db, 1)}
        return values if self.boundary is None else {**values, "boundary": float(f"{self.boundary:.3g}")}


def verify_denoiser(file: Backend, torch_engine: Backend, batches: Sequence[int] | None = None) -> Parity:
    """Compare two denoisers at LEVELS noise levels: each alone, then mixed in batches of the given sizes.

    batches  default: 1 and 5, of large images 1 and 2, which is half the memory; of a file of one batch size that one
    Images are random, uniform in [-1, 1], with noise of the level added.
    """
    return verify(file, [torch_engine], batches)[0]


def verify_sampler(file: Backend, denoiser: Backend, batches: Sequence[int] | None = None) -> Parity:
    """Compare a sampler graph with the Python loop over a denoiser, on the same noise. `batches` as above."""
    return verify(file, [denoiser], batches)[0]


def verify(file: Backend, references: Sequence[Backend], batches: Sequence[int] | None = None) -> list[Parity]:
    """Compare a file of any kind with each reference on the same inputs; the references are denoisers."""
    spec = file.manifest.spec
    ours, theirs = Model(file), [Model(engine) for engine in references]
    rows: list[list[Row]] = [[] for _ in theirs]
    boundary = None
    if file.manifest.kind == "denoiser":
        for where, x, sigma, label in _denoiser_inputs(spec, _batches(file, batches)):
            got = _or_nan(partial(ours.denoise, x, sigma, label), x.shape)
            for each, model in zip(rows, theirs, strict=True):
                each.append(_row(where, got, _or_nan(partial(model.denoise, x, sigma, label), x.shape)))
            at_minimum = sigma == np.float32(spec.sigma_min)
            if spec.scaling in ("boundary", "cloneofsimo") and at_minimum.any():
                boundary = max(boundary or 0.0, float(np.abs(got - x)[at_minimum].max()))
    else:
        sigmas = ours.levels()
        for batch in _batches(file, batches):
            noise = np.stack([gaussian(1, range(batch), k, spec.image) for k in range(len(sigmas))])
            label = ours.labels(batch, seed=1)
            got = _or_nan(partial(ours.from_noise, noise, sigmas, label), noise.shape[1:])
            where = f"batch {batch}, {len(sigmas)} step(s) at {', '.join(f'{s:g}' for s in sigmas)}"
            for each, model in zip(rows, theirs, strict=True):
                want = _or_nan(partial(model.from_noise, noise, sigmas, label), noise.shape[1:])
                each.append(_row(where, got, want))
    return [Parity(rows=tuple(each), boundary=boundary) for each in rows]


def _or_nan(call: Callable[[], Floats], shape: tuple[int, ...]) -> Floats:
    """Return what a model computes, or NaN where it is not finite: a difference like others, found with its place."""
    try:
        return call()
    except NotFinite:
        return np.full(shape, np.nan, np.float32)


def compare_batches(file: Backend, few: int, most: int) -> Row:
    """Compare an engine's images at a large batch with its own at a small one, the same noise: the first and the last.

    Another batch size is other kernels, and a machine that can compute many images for comparison is not always there.
    """
    model, sigmas = Model(file), Model(file).levels()
    noise = np.stack([gaussian(2, range(most), k, model.spec.image) for k in range(len(sigmas))])
    label = model.labels(most, seed=2)
    every = model.from_noise(noise, sigmas, label)
    parts = [slice(0, few), slice(most - few, most)]
    some = [model.from_noise(noise[:, part], sigmas, None if label is None else label[part]) for part in parts]
    got = np.concatenate([every[part] for part in parts])
    return _row(f"batch {most} against batch {few}", got, np.concatenate(some))


def _batches(file: Backend, batches: Sequence[int] | None) -> Sequence[int]:
    _, height, width = file.manifest.spec.image
    return (file.batch,) if file.batch else batches or ((1, 5) if height * width <= LARGE else (1, 2))


def _denoiser_inputs(
    spec: ModelSpec, batches: Sequence[int]
) -> Iterator[tuple[str, Floats, Floats, npt.NDArray[np.int64] | None]]:
    """Yield (where, x [B, C, H, W], sigma [B], label [B] or None)."""
    levels = np.geomspace(spec.sigma_min, spec.sigma_max, LEVELS).astype(np.float32)
    levels[0], levels[-1] = spec.sigma_min, spec.sigma_max
    cases = [(f"sigma {s:.4g}", np.array([s], np.float32)) for s in levels] if batches[0] == 1 else []
    for b in batches:
        if b > 1:  # spread over all levels, also where the batch is smaller than their number
            mixed = np.resize(levels, b) if b >= LEVELS else levels[np.linspace(0, LEVELS - 1, b).round().astype(int)]
            cases.append((f"batch {b}, mixed sigmas", mixed))
    for number, (where, sigma) in enumerate(cases):
        batch = len(sigma)
        rng = np.random.default_rng(number)
        clean = rng.uniform(-1, 1, (batch, *spec.image)).astype(np.float32)
        x = clean + sigma[:, None, None, None] * rng.standard_normal(clean.shape, dtype=np.float32)
        label = rng.integers(0, spec.classes, batch) if spec.classes else None
        yield where, x, sigma, label


def _row(where: str, got: Floats, want: Floats) -> Row:
    if got.shape != want.shape:
        return Row(
            where=f"{where}: shape {list(got.shape)} for {list(want.shape)}",
            batch=len(want),
            max_abs=math.inf,
            mse=math.inf,
        )
    difference = got.astype(np.float64) - want
    largest = float(np.abs(difference).max()) if np.isfinite(difference).all() else math.nan
    return Row(where=where, batch=len(want), max_abs=largest, mse=float(np.square(difference).mean()))
