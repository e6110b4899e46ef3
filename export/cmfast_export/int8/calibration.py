# SPDX-License-Identifier: MIT
"""The ranges of what int8 products read and make: seen while the float32 model draws samples.

So exactly the noise levels, labels and images between the steps are seen that the file will see. A denoiser takes any
level, so for one those between sigma_min and sigma_max are seen too, on the samples that were drawn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cmfast.backends.onnxruntime_library import import_onnxruntime
from cmfast.conditions import condition_values, some_values
from cmfast.errors import CmfastError, CmfastWarning
from cmfast.noise import gaussian, slices
from cmfast.sampling import sample
from cmfast.spec import ModelSpec
from cmfast_export.graphs import writer
from cmfast_export.graphs.sampler import Guidance
from cmfast_export.int8.graph import LEVELS
from cmfast_export.int8.options import Calibration, read_data
from cmfast_export.verify import LARGE
from cmfast_export.verify import LEVELS as NOISE_LEVELS

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
BATCH = 4  # samples that are drawn at a time
SAMPLED = 4096  # numbers of a tensor that are kept of each call, to choose where to clip
CANDIDATES = 24  # ends of a range that are tried
NARROWEST = 0.25  # of them, as a part of the widest


@dataclass(kw_only=True)
class Observed:
    """What was seen.

    Attributes:
        ranges: least and largest number that a tensor is quantized with, by its name; zero is between them.
        levels: noise levels, data units, in the order in which they were first seen.
    """

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    levels: list[float] = field(default_factory=list)


def observe(
    model: ir.Model,
    tensors: Sequence[str],
    spec: ModelSpec,
    schedules: Sequence[Sequence[float]],
    folder: Path,
    calibration: Calibration,
    *,
    between: bool,
    guidance: Guidance | None = None,
    batch: int | None = None,
) -> Observed:
    """Draw samples with a float32 denoiser graph and watch its tensors.

    Args:
        model: the graph; it is left as it is.
        tensors: names of the values that are watched.
        spec: of the model.
        schedules: noise levels, data units, of each way to draw.
        folder: where the graph is written to.
        calibration: how many samples, and their conditions.
        between: whether levels from sigma_min to sigma_max are seen beside those of the schedules.
        guidance: of a sampler.
        batch: of a graph with a fixed one.
    """
    watching = _Watching(model, tensors, folder)
    n, values = calibration.samples, conditions_of(calibration, spec)
    for first, size in _batches(n, batch or (BATCH if np.prod(spec.shape) <= LARGE else 1), exact=batch is not None):
        conditions = {name: np.take(each, range(first, first + size), 0, mode="wrap") for name, each in values.items()}
        clean = np.zeros(())
        for sigmas in schedules:
            noise = slices(calibration.seed, range(first, first + size), len(sigmas), spec.shape)
            clean = sample(watching.denoiser(conditions, guidance), noise, sigmas, spec)
        if between and first == 0:
            fresh = gaussian(calibration.seed, range(size), len(schedules[-1]), spec.shape)
            denoise = watching.denoiser(conditions, guidance)
            for sigma in np.geomspace(spec.sigma_min, spec.sigma_max, NOISE_LEVELS):
                denoise(clean + np.float32(sigma) * fresh, float(sigma), float(sigma) / 2)
    return Observed(ranges=watching.ranges(), levels=list(watching.levels))


def _batches(n: int, size: int, *, exact: bool) -> Iterator[tuple[int, int]]:
    for first in range(0, n, size):
        yield first, size if exact else min(size, n - first)


def conditions_of(calibration: Calibration, spec: ModelSpec) -> dict[str, npt.NDArray[Any]]:
    """Return the conditions of all samples of a calibration.

    Raises:
        CmfastError: the file has other names, shapes or too few of them.
    """
    given = given_conditions(calibration, spec)
    drawn = some_values(spec.conditions, calibration.samples, seed=calibration.seed)
    if guessed := [each.name for each in spec.conditions if each.kind == "tensor" and each.name not in given]:
        warnings.warn(
            f"int8 is calibrated with random values of {', '.join(guessed)}; pass real ones: "
            "--calibration data=FILE.npz",
            CmfastWarning,
            stacklevel=2,
        )
    return condition_values(spec.conditions, {**drawn, **given}, calibration.samples)


def given_conditions(calibration: Calibration, spec: ModelSpec) -> dict[str, npt.NDArray[Any]]:
    """Return the conditions that the file of a calibration has, checked; without a file none.

    Raises:
        CmfastError: the file cannot be read, or has other names, shapes or too few of them.
    """
    if not (file := calibration.data):
        return {}
    names, samples = [each.name for each in spec.conditions], calibration.samples
    found = read_data(file)
    for name, values in found.items():
        if name not in names:
            have = f"this model has {', '.join(names)}" if names else "this model has none"
            raise CmfastError(f"{file}: calibration data for {name!r}, which is no condition; {have}")
        if values.ndim == 0 or len(values) < samples:
            raise CmfastError(
                f"{file}: {name} has the shape {list(values.shape)}, and {samples} samples need as many values; "
                f"pass more, or --calibration samples=NUMBER"
            )
    given = {name: values[:samples] for name, values in found.items()}
    condition_values(spec.conditions, {**some_values(spec.conditions, samples), **given}, samples)
    return given


class _Watching:
    """The graph with its tensors as further outputs, and what was seen of them."""

    def __init__(self, model: ir.Model, tensors: Sequence[str], folder: Path) -> None:
        model = model.clone()
        graph = model.graph
        made = {value.name: value for node in graph for value in node.outputs}
        self.inputs = [value.name or "" for value in graph.inputs]
        self.names = list(tensors)
        graph.outputs.extend(made[name] for name in self.names)
        file = folder / "watched.onnx"
        data = writer.write_data(model, file) if writer.weight_bytes(model) > writer.MAX_BYTES else None
        writer.write_model(model, file, data)
        ort = import_onnxruntime("exporting")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        self.read = {each.name for each in self.session.get_inputs()}
        self.low = dict.fromkeys(self.names, 0.0)
        self.high = dict.fromkeys(self.names, 0.0)
        self.some: dict[str, list[Floats]] = {name: [] for name in self.names}
        self.levels: dict[float, None] = {}
        self.random = np.random.default_rng(0)

    def denoiser(self, conditions: Arrays, guidance: Guidance | None) -> Any:
        """Return f(x, sigma[, sigma_next]) that watches."""
        null = {
            name: np.full_like(conditions[name], value) for name, value in (guidance.null if guidance else {}).items()
        }

        def denoise(x: Floats, sigma: float, sigma_next: float = 0.0) -> Floats:
            if guidance is None:
                return self._run(x, sigma, sigma_next, conditions)
            without, given = (self._run(x, sigma, sigma_next, each) for each in ({**conditions, **null}, conditions))
            return without + np.float32(guidance.weight) * (given - without)

        return denoise

    def _run(self, x: Floats, sigma: float, sigma_next: float, conditions: Arrays) -> Floats:
        times = {"sigma": sigma, "sigma_next": sigma_next}
        feed = {name: np.full(len(x), value, np.float32) for name, value in times.items()}
        feed |= {"x": x.astype(np.float32), **conditions}
        feed = {name: feed[name] for name in self.inputs if name in self.read}
        self.levels[sigma] = None
        output, *seen = self.session.run(None, feed)
        for name, values in zip(self.names, seen, strict=True):
            if not np.isfinite(low := float(values.min())) or not np.isfinite(high := float(values.max())):
                raise CmfastError(f"the model gives numbers that are not finite at noise level {sigma:g}: no int8")
            self.low[name], self.high[name] = min(self.low[name], low), max(self.high[name], high)
            flat = values.reshape(-1)
            self.some[name].append(flat[self.random.integers(0, flat.size, min(flat.size, SAMPLED))])
        result: Floats = output
        return result

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {
            name: best_range(self.low[name], self.high[name], np.concatenate(self.some[name])) for name in self.names
        }


def best_range(low: float, high: float, numbers: Floats) -> tuple[float, float]:
    """Return the range whose 256 steps are nearest to the numbers, in the mean of squares, one end after the other.

    Few numbers are far out; clipping them makes the steps finer for the others.

    Args:
        low: the least number, at most 0.
        high: the largest, at least 0.
        numbers: some of them.
    """
    if low == high:
        return (0.0, 1.0)  # nothing but zeros was seen
    parts = np.linspace(NARROWEST, 1, CANDIDATES)
    high = min((_error(low, part * high, numbers), part * high) for part in parts)[1]
    low = min((_error(part * low, high, numbers), part * low) for part in parts)[1]
    return low, high


def _error(low: float, high: float, numbers: Floats) -> float:
    scale = np.float32(max(high - low, 1e-30) / LEVELS)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(numbers / scale) + zero, 0, LEVELS) - zero) * scale
    return float(np.square(rounded - numbers).mean())
