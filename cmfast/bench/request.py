# SPDX-License-Identifier: MIT
"""What to compare, and how: checked before anything is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cmfast.checks import MAX_BATCH, check_threads, shown
from cmfast.errors import CmfastError
from cmfast.formats.manifest import check_model
from cmfast.formats.table import ENGINE, ONNX, OPENVINO, format_of
from cmfast.formats.values import PRECISIONS
from cmfast.schedule import MAX_STEPS

# Of cmfast.backends.VARIANTS: single words, and the combinations that are worth timing.
BASELINE_VARIANTS = (
    "channels_last", "fused", "compiled", "reduce-overhead", "cuda_graph", "channels_last cuda_graph",
    "fused cuda_graph",
)  # fmt: skip
ONNX_VARIANTS = ("cuda_graph", "nhwc", "nhwc cuda_graph", "tensorrt", "openvino", "openvino throughput")
CUDA_WORDS = {"fused", "reduce-overhead", "cuda_graph", "nhwc", "tensorrt"}

MAX_VALUES = 100  # of --steps and of --batch
MAX_SECONDS = 3600.0  # of each contender at each setting


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `cmfast.bench.compare` times, and how. Each field is an option of cmfast-bench by the same name.

    Raises:
        CmfastError: there is nothing to time, a file is missing or given twice, or an option does not apply to these
            files or is out of range.
    """

    models: tuple[Path, ...] = ()  # exported files, or checkpoints
    baseline: Path | None = None  # a checkpoint, run by PyTorch: what outputs and speed are compared with
    precision: tuple[str, ...] | None = None  # extra ones for the baseline and OpenVINO; None: the models'
    variants: tuple[str, ...] | None = None  # beside the plain way; None: channels_last for the baseline
    diffusers: bool = False  # also diffusers' own pipeline, for a baseline that is its folder
    steps: tuple[int, ...] = (1, 2)  # network calls per image
    batch: tuple[int, ...] = (1, 8)  # images per call
    compiled: bool = False  # also torch.compile for the baseline
    seconds: float = 3.0  # counted time for each contender at each setting
    threads: int | None = None  # CPU threads; None: the backend's choice
    device: str = "cpu"  # or cuda
    tolerance: float | None = None  # largest difference from the reference, images in [-1, 1]; None: by dtype
    budget: float | None = None  # seconds for everything; None: no limit
    starts: bool = True  # also start each contender in a process of its own
    keep_going: bool = False  # leave out and record a contender that fails or differs; else raise

    def __post_init__(self) -> None:
        files = self.files
        for file in files:
            if not isinstance(file, Path):
                raise CmfastError(f"models and baseline are paths, got {shown(file)}; use pathlib.Path({shown(file)})")
        if not files:
            raise CmfastError("nothing to time: pass a MODEL or a --baseline, for example cmfast-bench model.onnx")
        for i, file in enumerate(files):
            if file.resolve() in [other.resolve() for other in files[:i]]:
                raise CmfastError(f"{file} is given twice; remove one")
            check_model(file)
            if format_of(file) is ENGINE and self.device != "cuda":
                raise CmfastError(f"{file}: a TensorRT engine runs on an NVIDIA GPU only; add --device cuda")
        if self.baseline is not None and format_of(self.baseline) is not None:
            raise CmfastError(
                f"--baseline takes a checkpoint that PyTorch runs, got {self.baseline}; pass it as a MODEL"
            )
        if self.diffusers and (self.baseline is None or not self.baseline.is_dir()):
            raise CmfastError(
                "--diffusers needs a diffusers folder as --baseline; type: cmfast-export model.pt --format diffusers"
            )
        if self.compiled and self.baseline is None:
            raise CmfastError("--compile needs a checkpoint to compile; add --baseline model.pt")
        self._check_precision()
        self._check_variants()
        for name, values in (("steps", self.steps), ("batch", self.batch)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise CmfastError(f"--{name} takes distinct whole numbers from 1, got {_listed(values)}")
            if len(values) > MAX_VALUES:
                raise CmfastError(f"--{name} takes at most {MAX_VALUES} numbers, got {len(values)}")
            most = MAX_STEPS if name == "steps" else MAX_BATCH
            if max(values) > most:
                raise CmfastError(f"--{name} takes numbers up to {most}, got {shown(max(values))}")
        for name, value in (("seconds", self.seconds), ("tolerance", self.tolerance), ("budget", self.budget)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise CmfastError(f"--{name} must be greater than 0, got {value:g}")
        if self.seconds > MAX_SECONDS:
            raise CmfastError(f"--seconds must be at most {MAX_SECONDS:g} (one hour), got {self.seconds:g}")
        check_threads(self.threads)

    @property
    def files(self) -> list[Path]:
        """The files that are read, the baseline first."""
        return [*([self.baseline] if self.baseline else []), *self.models]

    def baseline_variants(self) -> tuple[str, ...]:
        """Return the ways to run the baseline beside the plain one, without diffusers' pipeline.

        Returns:
            Words of `cmfast.backends.VARIANTS`.
        """
        wanted = ("channels_last",) if self.variants is None else self.variants
        wanted = (*wanted, *(("compiled",) if self.compiled else ()))
        return tuple(variant for variant in BASELINE_VARIANTS if variant in wanted)

    def onnx_variants(self) -> tuple[str, ...]:
        """Return the ways to run an .onnx file beside the plain one.

        Returns:
            Words of `cmfast.backends.VARIANTS`.
        """
        return tuple(variant for variant in ONNX_VARIANTS if variant in (self.variants or ()))

    def takes_precision(self, file: Path, variant: str) -> bool:
        """Whether an exported file, run this way, takes a precision: by OpenVINO.

        Args:
            file: one of `models`.
            variant: the way, "" for the plain one.

        Returns:
            False where the file has a precision of its own.
        """
        known = format_of(file)
        return known is OPENVINO or (known is ONNX and "openvino" in variant.split())

    def _check_precision(self) -> None:
        if self.precision is None:
            return
        openvino = any(self.takes_precision(file, way) for file in self.models for way in ("", *self.onnx_variants()))
        if self.baseline is None and not openvino:
            raise CmfastError(
                "--precision needs a checkpoint that PyTorch runs, or OpenVINO; add --baseline model.pt or "
                "--variants openvino"
            )
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
            takers = ["a checkpoint (--baseline model.pt)"] if variant in BASELINE_VARIANTS else []
            takers += ["an .onnx file as a MODEL"] if variant in ONNX_VARIANTS else []
            raise CmfastError(f"--variants {variant} needs {' or '.join(takers)}, and there is none")


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(shown, values[:20])) + (",.." if len(values) > 20 else "")


def _check_names(option: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    wrong = [name for name in names if name not in allowed]
    if wrong or len(set(names)) != len(names):
        raise CmfastError(
            f"--{option} takes distinct names from {', '.join(allowed)}, got {shown(','.join(names))[1:-1]}"
        )
