# SPDX-License-Identifier: MIT
"""What cmfast-bench is asked to do, checked before anything is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cmfast.checks import MAX_BATCH, check_threads, shown
from cmfast.errors import CmfastError
from cmfast.formats.manifest import PRECISIONS, check_model
from cmfast.formats.table import ENGINE, ONNX, format_of
from cmfast.schedule import MAX_STEPS

# Of cmfast.backends.VARIANTS, besides the plain way: single words, and what is worth combining.
BASELINE_VARIANTS = (
    "channels_last", "fused", "compiled", "reduce-overhead", "cuda_graph", "channels_last cuda_graph",
    "fused cuda_graph",
)  # fmt: skip
ONNX_VARIANTS = ("cuda_graph", "nhwc", "nhwc cuda_graph", "tensorrt")
CUDA_WORDS = {"fused", "reduce-overhead", "cuda_graph", "nhwc", "tensorrt"}

MAX_VALUES = 100  # of --steps and of --batch
MAX_SECONDS = 3600.0  # of each contender at each setting


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time, and how."""

    models: tuple[Path, ...]
    baseline: Path | None = None  # a checkpoint
    precision: tuple[str, ...] | None = None  # of the baseline, besides fp32; None: those of the models
    variants: tuple[str, ...] | None = None  # besides the plain way; None: the baseline's channels_last
    diffusers: bool = False  # also diffusers' own pipeline of the baseline
    steps: tuple[int, ...] = (1, 2)  # network calls an image
    batch: tuple[int, ...] = (1, 8)  # images at a time
    compiled: bool = False  # also torch.compile of the baseline
    seconds: float = 3.0  # counted time, of each contender at each setting
    threads: int | None = None  # of the CPU; None: the engine's choice
    device: str = "cpu"
    tolerance: float | None = None  # largest difference from the reference, images in [-1, 1]; None: by the type
    budget: float | None = None  # seconds of comparing, timing and all else; None: as long as it takes
    starts: bool = True  # also start each contender in a process of its own
    keep_going: bool = False  # leave out a contender that fails or differs, and say so; else stop

    def __post_init__(self) -> None:
        files = [*([self.baseline] if self.baseline else []), *self.models]
        if not files:
            raise CmfastError("nothing to time: name a MODEL or a --baseline, for example cmfast-bench model.onnx")
        for i, file in enumerate(files):
            if file.resolve() in [other.resolve() for other in files[:i]]:
                raise CmfastError(f"{file} is named twice")
            check_model(file)
            if format_of(file) is ENGINE and self.device != "cuda":
                raise CmfastError(f"{file}: a TensorRT engine runs on an NVIDIA GPU only; add --device cuda")
        if self.baseline is not None and format_of(self.baseline) is not None:
            raise CmfastError(
                f"--baseline takes a checkpoint that PyTorch runs, got {self.baseline}; name it as a MODEL"
            )
        if self.diffusers and (self.baseline is None or not self.baseline.is_dir()):
            raise CmfastError("--diffusers runs the folder of --baseline: cmfast-export model.pt --format diffusers")
        if self.compiled and self.baseline is None:
            raise CmfastError("--compile compiles the checkpoint of --baseline, and none was given")
        self._check_precision()
        self._check_variants()
        for name, values in (("steps", self.steps), ("batch", self.batch)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise CmfastError(f"--{name} takes different whole numbers from 1, got {_listed(values)}")
            if len(values) > MAX_VALUES:
                raise CmfastError(f"--{name} takes at most {MAX_VALUES} numbers, got {len(values)}")
            most = MAX_STEPS if name == "steps" else MAX_BATCH
            if max(values) > most:
                raise CmfastError(f"--{name} takes numbers up to {most}, got {shown(max(values))}")
        for name, value in (("seconds", self.seconds), ("tolerance", self.tolerance), ("budget", self.budget)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise CmfastError(f"--{name} must be greater than 0, got {value:g}")
        if self.seconds > MAX_SECONDS:
            raise CmfastError(f"--seconds must be at most {MAX_SECONDS:g}, an hour each, got {self.seconds:g}")
        check_threads(self.threads)

    def baseline_variants(self) -> tuple[str, ...]:
        """Return the ways to run the baseline besides the plain one, diffusers' apart."""
        asked = ("channels_last",) if self.variants is None else self.variants
        asked = (*asked, *(("compiled",) if self.compiled else ()))
        return tuple(variant for variant in BASELINE_VARIANTS if variant in asked)

    def onnx_variants(self) -> tuple[str, ...]:
        """Return the ways to run an .onnx file besides the plain one."""
        return tuple(variant for variant in ONNX_VARIANTS if variant in (self.variants or ()))

    def _check_precision(self) -> None:
        if self.precision is None:
            return
        if self.baseline is None:
            raise CmfastError("--precision is what PyTorch runs the --baseline in, and none was given")
        _check_names("precision", self.precision, tuple(PRECISIONS))

    def _check_variants(self) -> None:
        if self.variants is None:
            return
        _check_names("variants", self.variants, tuple(dict.fromkeys((*BASELINE_VARIANTS, *ONNX_VARIANTS))))
        onnx = any(format_of(file) is ONNX for file in self.models)
        for variant in self.variants:
            if not CUDA_WORDS.isdisjoint(variant.split()) and self.device != "cuda":
                raise CmfastError(f"--variants {variant} needs an NVIDIA GPU: add --device cuda")
            if (variant in BASELINE_VARIANTS and self.baseline is not None) or (variant in ONNX_VARIANTS and onnx):
                continue
            takers = ["the checkpoint of --baseline"] if variant in BASELINE_VARIANTS else []
            takers += ["an .onnx file"] if variant in ONNX_VARIANTS else []
            raise CmfastError(f"--variants {variant} is a way to run {' or '.join(takers)}, and none was given")


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(shown, values[:20])) + (",.." if len(values) > 20 else "")


def _check_names(option: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    wrong = [name for name in names if name not in allowed]
    if wrong or len(set(names)) != len(names):
        raise CmfastError(
            f"--{option} takes different names of {', '.join(allowed)}, got {shown(','.join(names))[1:-1]}"
        )
