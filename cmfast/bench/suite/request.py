# SPDX-License-Identifier: MIT
"""What the CPU suite is asked for: checked before anything is exported or opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cmfast.bench.request import MAX_SECONDS, MAX_VALUES
from cmfast.bench.suite.ways import PRECISIONS
from cmfast.checks import MAX_BATCH, check_threads, shown, usable_cores
from cmfast.errors import CmfastError
from cmfast.formats.manifest import check_model
from cmfast.formats.table import NCNN, ONNX, format_of
from cmfast.schedule import MAX_STEPS

STEPS = (1, 2, 4)  # network calls an image, where the model has noise levels for them
MAX_PROCESSES = 256


@dataclass(frozen=True, kw_only=True)
class SuiteRequest:
    """What `run_suite` measures. Each field is an option of cmfast-bench by the same name.

    Raises:
        CmfastError: there is nothing to measure, a file is of the wrong kind, or a number is out of its range.
    """

    # Denoisers: .onnx in float32, .onnx in int8, for ncnn, which may also lie beside model.onnx as model_ncnn. Missing
    # ones are exported.
    models: tuple[Path, ...] = ()
    baseline: Path | None = None  # a checkpoint, run by PyTorch: the reference
    precision: tuple[str, ...] = PRECISIONS  # the contenders that compute in these
    diffusers: bool = False  # also diffusers' own pipeline, for a baseline that is its folder
    compiled: bool = False  # also torch.compile with frozen weights
    # Network calls an image; None: those of STEPS that the model has levels for; (): no whole images.
    steps: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1, 8)  # images a call; the first also for whole images, starts and processes
    threads: tuple[int, ...] = ()  # CPU threads of every contender; (): as many as there are cores
    processes: tuple[int, ...] = ()  # how many at a time, each with cores of its own; (): not measured
    seconds: float = 3.0  # counted time for each contender at each setting
    starts: bool = True  # also open each contender in a process of its own: time and memory
    keep: Path | None = None  # folder of the exported files; None: a temporary one
    evaluations: tuple[Path, ...] = ()  # records of cmfast-eval, whose quality the chart shows
    # Leave out and record a contender that fails or differs; else raise, or once something was timed, end with it.
    keep_going: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise CmfastError("nothing to measure: pass --baseline model.pt, or a MODEL that is an .onnx denoiser")
        for file in self.files:
            check_model(file)
        for file in self.models:
            if format_of(file) not in (ONNX, NCNN):
                raise CmfastError(
                    f"{file}: --suite takes .onnx files and folders for ncnn as MODELs; pass a checkpoint as --baseline"
                )
        if self.baseline is not None and format_of(self.baseline) is not None:
            raise CmfastError(
                f"--baseline takes a checkpoint that PyTorch runs, got {self.baseline}; pass it as a MODEL"
            )
        if self.diffusers and (self.baseline is None or not self.baseline.is_dir()):
            raise CmfastError("--diffusers needs a diffusers folder as --baseline")
        if self.compiled and set(self.precision) == {"int8"}:
            raise CmfastError("--compile is for fp32 and bf16, and --precision has int8 only; remove one")
        if self.compiled and self.baseline is None:
            raise CmfastError("--compile needs a checkpoint to compile; add --baseline model.pt")
        wrong = [name for name in self.precision if name not in PRECISIONS]
        if wrong or not self.precision or len(set(self.precision)) != len(self.precision):
            names = shown(",".join(self.precision))[1:-1]
            raise CmfastError(
                f"--precision with --suite takes distinct names from {', '.join(PRECISIONS)}, got {names}"
            )
        _check_numbers("batch", self.batch, MAX_BATCH)
        _check_numbers("processes", self.processes, MAX_PROCESSES, empty=True)
        _check_numbers("threads", self.threads, None, empty=True)
        if self.steps is not None:
            _check_numbers("steps", self.steps, MAX_STEPS, empty=True)
        for number in self.threads:
            check_threads(number)
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= MAX_SECONDS):
            raise CmfastError(f"--seconds must be greater than 0 and at most {MAX_SECONDS:g}, got {self.seconds:g}")
        if self.keep is not None and self.keep.exists() and not self.keep.is_dir():
            raise CmfastError(f"--keep names a folder, and {self.keep} is a file")
        for record in self.evaluations:
            if not record.is_file():
                raise CmfastError(
                    f"--evaluation {record}: no such file; make it: cmfast-eval MODEL --data-set NAME --json {record}"
                )

    @property
    def files(self) -> list[Path]:
        """The model files that are read, the baseline first."""
        return [*([self.baseline] if self.baseline else []), *self.models]

    @property
    def every_threads(self) -> tuple[int, ...]:
        """The numbers of threads that are measured."""
        return self.threads or (usable_cores(),)


def _check_numbers(name: str, values: tuple[int, ...], most: int | None, *, empty: bool = False) -> None:
    if (not values and not empty) or min(values, default=1) < 1 or len(set(values)) != len(values):
        raise CmfastError(f"--{name} takes distinct whole numbers from 1, got {shown(values)}")
    if len(values) > MAX_VALUES:
        raise CmfastError(f"--{name} takes at most {MAX_VALUES} numbers, got {len(values)}")
    if most is not None and max(values, default=1) > most:
        raise CmfastError(f"--{name} takes numbers up to {most}, got {shown(max(values))}")
