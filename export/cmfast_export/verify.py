# SPDX-License-Identifier: MIT
"""Compare an exported file with PyTorch, at noise levels from sigma_min to sigma_max.

Every export runs the file that it wrote. A difference beyond the tolerance is an error that says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends import Backend
from cmfast.checks import NotFinite, decibels, peak_of
from cmfast.conditions import some_values
from cmfast.formats.manifest import INT8, Manifest
from cmfast.model import Model
from cmfast.noise import slices
from cmfast.preconditioning import BOUNDARY, scalings
from cmfast.sampling import sample
from cmfast.spec import ModelSpec
from cmfast_export.graphs.sampler import Guidance

Floats = npt.NDArray[np.float32]
Given = Callable[[int, int, int], Mapping[str, npt.NDArray[Any]]]  # (samples, seed, dynamic size) -> conditions
BOUNDARY_TOLERANCE = 1e-6  # f(x, sigma_min) = x is exact in real arithmetic; float32 rounds x once
LARGE = 4 * 128 * 128  # numbers of a sample; five samples of more can take gigabytes
SIZES = (16, 8, 24)  # of the conditions' dynamic axes
MEASURED = 0.5  # |c_out|, and sigma_data, of the networks that `cmfast.formats.manifest.ROUNDING` was measured with
MANY = 4  # samples at one noise level, where samples are drawn: int8 costs few of them most of the error
DRAWN = 2**62  # the first seed of samples that are drawn to be denoised: none that a calibration has
LEVELS = 8  # noise levels from sigma_min to sigma_max, evenly spaced in the logarithm


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: a batch at one or several noise levels."""

    where: str  # "sigma 0.002", "batch 5, mixed sigmas", "2 steps at 80, 0.8"
    batch: int
    max_abs: float  # largest absolute difference over `factor`: what is compared with the tolerance
    factor: float = 1.0  # by how much more may differ here: `allowance`, of the sample that `max_abs` is of
    largest: float  # largest absolute difference, data units
    mse: float  # mean square of the difference, data units
    peak: float = 2.0  # of `psnr_db`: `cmfast.checks.peak_of` all that the file is compared with

    @property
    def difference(self) -> float:
        """The difference that `max_abs` is of, data units: the one that is nearest to what is allowed, or beyond it."""
        return self.max_abs * self.factor

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio of the difference itself, dB: what `cmfast.checks.psnr_db` gives."""
        return decibels(self.mse, self.peak)

    @property
    def grey_levels(self) -> float:
        """Root mean square of the difference in steps of an 8-bit image, of which [-1, 1] has 255."""
        return 127.5 * math.sqrt(self.mse)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a file is from PyTorch; what the manifest records."""

    rows: tuple[Row, ...]
    boundary: float | None  # largest |f(x, sigma_min) - x| of the file; None where f has no such boundary

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.max_abs) else row.max_abs)

    @property
    def largest(self) -> float:
        """The largest absolute difference of all rows, data units."""
        return max(row.largest for row in self.rows)

    @property
    def psnr_db(self) -> float:
        """The worst of the rows, dB."""
        return min(row.psnr_db for row in self.rows)

    def failure(self, tolerance: float, of: str = "PyTorch", least_db: float = 0.0) -> str | None:
        """Return what is wrong in words, or None; `of`: what was compared with, `least_db`: the PSNR needed, 0: any."""
        worst = self.worst
        if not worst.max_abs <= tolerance:  # also when it is not a number
            return (
                f"differs from {of} by {worst.difference:.2e} at {worst.where} (allowed {tolerance * worst.factor:.0e})"
            )
        if least_db and self.psnr_db < least_db:
            where = min(self.rows, key=lambda row: row.psnr_db).where
            return f"is {self.psnr_db:.1f} dB from {of} at {where} ({least_db:g} dB needed)"
        if self.boundary is not None and not self.boundary <= BOUNDARY_TOLERANCE:
            return f"f(x, sigma_min) differs from x by {self.boundary:.2e} (allowed {BOUNDARY_TOLERANCE:.0e})"
        return None

    def to_dict(self) -> dict[str, float]:
        """Return what the manifest records."""
        values = {"max_abs": float(f"{self.worst.max_abs:.3g}"), "psnr_db": round(self.psnr_db, 1)}
        return values if self.boundary is None else {**values, "boundary": float(f"{self.boundary:.3g}")}


def verify_denoiser(file: Backend, torch_backend: Backend, batches: Sequence[int] | None = None) -> Parity:
    """Compare two denoisers at LEVELS noise levels: each alone, then mixed in batches of the given sizes.

    Samples are random, uniform in [-1, 1], with noise of the level added; conditions are random (`some_values`).

    Args:
        batches: default: 1, 2 and 5, of large samples 1, 2 and 3; of a file of one batch size that one
    """
    return verify(file, [torch_backend], batches)[0]


def verify_sampler(file: Backend, denoiser: Backend, batches: Sequence[int] | None = None) -> Parity:
    """Compare a sampler graph with the Python loop over a denoiser, on the same noise. `batches` as above."""
    return verify(file, [denoiser], batches)[0]


def verify(
    file: Backend,
    references: Sequence[Backend],
    batches: Sequence[int] | None = None,
    *,
    more: Sequence[int] = (),
    guidance: Guidance | None = None,
    sizes: Sequence[int] = SIZES,
    given: Given | None = None,
    rounds: bool | None = None,
    drawn: bool = False,
) -> list[Parity]:
    """Compare a file of any kind with each reference on the same inputs; the references are denoisers.

    Args:
        file: what was exported.
        references: backends of the same model.
        batches: sizes of batches, see `verify_denoiser`.
        more: sizes beside those.
        guidance: of a sampler that was exported with it.
        sizes: of the conditions' dynamic axes, in turn.
        given: values of the conditions; None: `some_values`.
        rounds: whether values or weights of the network are rounded to less than float32; None: as the file's manifest
            says.
        drawn: denoise samples of the first reference with noise added, not random numbers: of int8, which clips what
            it has not seen.
    """
    rounds = rounded(file.manifest) if rounds is None else rounds
    spec = file.manifest.spec
    values = given or (lambda n, seed, size: some_values(spec.conditions, n, seed=seed, size=size))
    ours, theirs = Model(file), [Model(backend) for backend in references]
    image = spec.data == "image"
    compared = [_Compared(image) for _ in theirs]
    boundary = None
    if file.manifest.kind == "denoiser":
        for case in denoiser_cases(spec, _batches(file, batches, more), sizes, values, theirs[0] if drawn else None):
            x, sigma = case.x, case.sigma
            beside: dict[str, Any] = {"sigma_next": case.sigma_next, "conditions": case.conditions}
            got = _or_nan(partial(ours.denoise, x, sigma, **beside), x.shape)
            factors = allowance(spec, sigma, rounds=rounds)
            for each, model in zip(compared, theirs, strict=True):
                want = _or_nan(partial(model.denoise, x, sigma, **beside), x.shape)
                each.add(case.where, got, want, factors)
            at_minimum = sigma == np.float32(spec.sigma_min)
            if spec.scaling in BOUNDARY and at_minimum.any():
                boundary = max(boundary or 0.0, float(np.abs(got - x)[at_minimum].max()))
    else:
        sigmas = ours.sigmas_for()
        for index, batch in enumerate(_batches(file, batches, more)):
            noise = slices(1, range(batch), len(sigmas), spec.shape)
            size = sizes[index % len(sizes)]
            conditions = values(batch, 1, size)
            got = _or_nan(partial(ours.from_noise, noise, sigmas, conditions=conditions), noise.shape[1:])
            last = np.full(batch, sigmas[-1], np.float32)  # the last call, which gives the sample
            factors = allowance(spec, last, rounds=rounds)
            where = f"batch {batch}, {len(sigmas)} step(s) at {', '.join(f'{s:g}' for s in sigmas)}"
            for each, model in zip(compared, theirs, strict=True):
                want = _or_nan(partial(Looped(model, guidance).from_noise, noise, sigmas, conditions), noise.shape[1:])
                each.add(where, got, want, factors)
    return [each.parity(boundary) for each in compared]


class _Compared:
    """The rows of one reference, and the ends of what it gave."""

    def __init__(self, image: bool) -> None:
        self.image, self.rows, self.ends = image, list[Row](), list[Floats]()

    def add(self, where: str, got: Floats, want: Floats, factors: Floats | None = None) -> None:
        self.rows.append(row_of(where, got, want, factors))
        self.ends.append(np.array([want.min(), want.max()]))

    def parity(self, boundary: float | None = None) -> Parity:
        peak = peak_of(self.ends, image=self.image)
        return Parity(rows=tuple(replace(row, peak=peak) for row in self.rows), boundary=boundary)


class Looped:
    """The Python loop over a denoiser, with guidance where there is some: what a sampler graph is compared with."""

    def __init__(self, model: Model, guidance: Guidance | None) -> None:
        self.model, self.guidance, self.spec = model, guidance, model.spec

    def sample_float(
        self, n: int, *, sigmas: Sequence[float] | None, seed: int, conditions: Mapping[str, Any] | None
    ) -> Floats:
        """Draw n samples, float32 [n, *shape]."""
        sigmas = self.model.sigmas_for(sigmas=sigmas)
        return self.from_noise(slices(seed, range(n), len(sigmas), self.spec.shape), sigmas, conditions or {})

    def from_noise(self, noise: Floats, sigmas: Sequence[float], conditions: Mapping[str, Any]) -> Floats:
        """Return samples [B, *shape] from unit noise [K, B, *shape]."""
        guidance = self.guidance
        if guidance is None and self.model.backend.batch is None:
            return self.model.from_noise(noise, sigmas, conditions=conditions)
        null = {name: np.full_like(conditions[name], v) for name, v in (guidance.null if guidance else {}).items()}

        def denoise(x: Floats, sigma: float, sigma_next: float | None = None) -> Floats:
            if guidance is None:
                return self.model.denoise(x, sigma, sigma_next=sigma_next, conditions=conditions)
            weight, both = np.float32(guidance.weight), ({**conditions, **null}, conditions)
            without, given = (self.model.denoise(x, sigma, sigma_next=sigma_next, conditions=each) for each in both)
            return without + weight * (given - without)

        drawn: Floats = sample(denoise, noise, sigmas, self.spec)
        return drawn


def _or_nan(call: Callable[[], Floats], shape: tuple[int, ...]) -> Floats:
    """Return what a model computes, or NaN where it is not finite: a difference like others, found with its place."""
    try:
        return call()
    except NotFinite:
        return np.full(shape, np.nan, np.float32)


def compare_batches(file: Backend, few: int, most: int, size: int = SIZES[0]) -> Row:
    """Compare a backend's images at a large batch with its own at a small one, the same noise: the first and the last.

    Another batch size is other kernels, and a machine that can compute many images for comparison is not always there.
    """
    model, sigmas = Model(file), Model(file).sigmas_for()
    noise = slices(2, range(most), len(sigmas), model.spec.shape)
    conditions = some_values(model.spec.conditions, most, seed=2, size=size)
    every = model.from_noise(noise, sigmas, conditions=conditions)
    parts = [slice(0, few), slice(most - few, most)]
    some = [
        model.from_noise(noise[:, part], sigmas, conditions={name: v[part] for name, v in conditions.items()})
        for part in parts
    ]
    got = np.concatenate([every[part] for part in parts])
    return row_of(f"batch {most} against batch {few}", got, np.concatenate(some))


def _batches(file: Backend, batches: Sequence[int] | None, more: Sequence[int]) -> Sequence[int]:
    few = (1, 2, 5) if math.prod(file.manifest.spec.shape) <= LARGE else (1, 2, 3)
    return (file.batch,) if file.batch else (*(batches or few), *more)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one comparison of denoisers."""

    where: str
    x: Floats  # [B, *shape]
    sigma: Floats  # [B]
    sigma_next: Floats | None  # [B], of a flow map
    conditions: Mapping[str, npt.NDArray[Any]]


def denoiser_cases(
    spec: ModelSpec, batches: Sequence[int], sizes: Sequence[int], values: Given, model: Model | None = None
) -> Iterator[Case]:
    """Yield the inputs that denoisers are compared on; `model`: what draws their samples, see `verify`."""
    sigmas = np.geomspace(spec.sigma_min, spec.sigma_max, LEVELS).astype(np.float32)
    sigmas[0], sigmas[-1] = spec.sigma_min, spec.sigma_max
    alone = MANY if model is not None and math.prod(spec.shape) <= LARGE else 1
    cases = [(f"sigma {s:.4g}", np.full(alone, s, np.float32)) for s in sigmas] if batches[0] == 1 else []
    for b in batches:
        if b > 1:  # spread over all levels, also where the batch is smaller than their number
            mixed = np.resize(sigmas, b) if b >= LEVELS else sigmas[np.linspace(0, LEVELS - 1, b).round().astype(int)]
            cases.append((f"batch {b}, mixed sigmas", mixed))
    for number, (where, sigma) in enumerate(cases):
        rng = np.random.default_rng(number)
        clean = rng.uniform(-1, 1, (len(sigma), *spec.shape)).astype(np.float32)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        part = rng.uniform(0, 0.9, len(sigma)).astype(np.float32)
        conditions = values(len(sigma), number, sizes[number % len(sizes)])
        if model is not None:
            levels = model.sigmas_for()
            unit = slices(DRAWN + number, range(len(sigma)), len(levels), spec.shape)
            clean = model.from_noise(unit, levels, conditions=conditions)
        yield Case(
            where=where,
            x=clean + sigma.reshape(-1, *[1] * len(spec.shape)) * noise,
            sigma=sigma,
            sigma_next=part * sigma if spec.second_time else None,
            conditions=conditions,
        )


def rounded(manifest: Manifest) -> bool:
    """Whether values or weights of a file's network are rounded to less than float32."""
    return manifest.dtype != "float32" or not {"weights", INT8}.isdisjoint(manifest.made_by)


def allowance(spec: ModelSpec, sigma: Floats, *, rounds: bool) -> Floats:
    """Return how many tolerances a denoiser may differ by at noise levels sigma [B], at least 1 each.

    f = c_skip x + c_out F: what rounding does to the network's output F comes out |c_out(sigma)| times as large, where
    the scalings are float32. The tolerances were measured on networks whose |c_out| is at most MEASURED and whose F has
    the standard deviation 1, so they allow an error of tolerance / MEASURED in F. A network that predicts x0 has
    outputs as small as the data.

    Args:
        spec: of the model.
        sigma: noise levels, data units.
        rounds: whether the network computes in less than float32. In float32 the rounding of x itself counts, and only
            eps, which is subtracted from it, is given more.
    """
    c_out = np.abs(scalings(sigma, spec)[1])
    kind = spec.scaling.rpartition("_")[2]
    if rounds:
        factors = c_out * (spec.sigma_data if kind == "x0" else 1.0) / MEASURED
    else:
        factors = c_out if kind == "eps" else np.ones_like(sigma)
    allowed: Floats = np.maximum(1, factors).astype(np.float32)
    return allowed


def row_of(where: str, got: Floats, want: Floats, factors: Floats | None = None) -> Row:
    """Return the comparison of arrays [B, ...]; `factors` [B]: `allowance`, 1 where it is None."""
    if got.shape != want.shape:
        return Row(
            where=f"{where}: shape {list(got.shape)} for {list(want.shape)}",
            batch=len(want),
            max_abs=math.inf,
            largest=math.inf,
            mse=math.inf,
        )
    each = np.ones(len(want), np.float32) if factors is None else factors
    difference = got.astype(np.float64) - want
    if not np.isfinite(difference).all():
        return Row(where=where, batch=len(want), max_abs=math.nan, largest=math.nan, mse=math.nan)
    far = np.abs(difference).reshape(len(want), -1).max(1)
    worst = int((far / each).argmax())
    return Row(
        where=where, batch=len(want), max_abs=float(far[worst] / each[worst]), factor=float(each[worst]),
        largest=float(far.max()), mse=float(np.square(difference).mean()),
    )  # fmt: skip
