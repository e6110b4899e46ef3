# SPDX-License-Identifier: MIT
"""The contenders: files opened in each requested way, their jobs at each setting, and whether their images agree.

`failures` decides what becomes of a contender that fails.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.bench.failures import ContenderDiffers, ContenderFailed, Failures, LeftOut, reason
from cmfast.bench.request import Request
from cmfast.checks import NotFinite, need_memory
from cmfast.conditions import in_words
from cmfast.errors import BackendError, CmfastError, OutOfMemory, backend_error
from cmfast.formats.manifest import ROUNDING, WINOGRAD
from cmfast.formats.table import ONNX, format_of

if TYPE_CHECKING:
    from cmfast.backends import Backend
    from cmfast.drawing import Floats
    from cmfast.model import Model

# Largest difference from the reference, images in [-1, 1], by a manifest's dtype. Float32 is allowed more than in an
# export: libraries may choose Winograd's convolutions, which cost some digits.
TOLERANCES = {**ROUNDING, "float32": WINOGRAD}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model file, opened one way."""

    name: str
    file: Path
    variant: str  # cmfast.backends.VARIANTS
    precision: str  # of a checkpoint, as it was opened; "": its own
    model: Model
    eager: bool = False  # the baseline, run by eager PyTorch: what speed is compared with

    @property
    def dtype(self) -> str:
        """What the network computes in, by a manifest's name."""
        return self.model.manifest.dtype

    def release(self) -> None:
        """Free what the backend keeps on a GPU per batch size, such as CUDA graphs; the next call makes it again."""
        from cmfast.backends import ReleasingBackend

        if isinstance(self.model.backend, ReleasingBackend):
            self.model.backend.release()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A contender at one setting."""

    contender: Contender
    sigmas: tuple[float, ...]
    batch: int
    draw: Callable[[], Floats]
    keep_going: bool = False  # an unforeseen error counts as the contender's failure; else it keeps its traceback

    def call(self) -> Floats:
        """Sample a batch: numpy noise in, numpy images [B, C, H, W] out. Raises ContenderFailed or NotFinite."""
        try:
            return self.draw()
        except NotFinite:
            raise
        except CmfastError as err:
            raise ContenderFailed(self, str(err), memory=isinstance(err, OutOfMemory)) from None
        except Exception as err:
            if not self.keep_going:
                err.add_note(f"cmfast-bench was running {self.name}")
                raise
            short = isinstance(backend_error(reason(err)), OutOfMemory)
            raise ContenderFailed(self, reason(err), memory=short) from None

    @property
    def where(self) -> str:
        return f"{len(self.sigmas)} step(s), batch {self.batch}"

    @property
    def name(self) -> str:
        return f"{self.contender.name} at {self.where}"


def open_contenders(request: Request, failures: Failures) -> list[Contender]:
    """Open every file in every way; the first contender is the reference.

    A way that was not requested by name and is unavailable is left out; `failures` records it.

    Raises:
        CmfastError: a file or a requested way cannot be opened, or the files are not of one model.
    """
    from cmfast.backends import open_backend
    from cmfast.model import Model

    contenders: list[Contender] = []
    for way in _ways(request):
        try:
            backend = open_backend(
                way.file, request.device, request.threads, variant=way.variant, precision=way.precision
            )
            check_float32(backend, request.device, way.variant)
        except Exception as err:
            if not (request.keep_going or (isinstance(err, BackendError) and not way.requested)):
                raise
            failures.note(LeftOut(contender=way.name, what="opening", why=reason(err)))
            continue
        model = Model(backend)
        first = contenders[0] if contenders else None
        if first and _takes(model) != _takes(first.model):
            raise CmfastError(
                f"{way.file} draws {_takes(model)}, {first.file} {_takes(first.model)}; only the same model can be "
                "compared"
            )
        contenders.append(
            Contender(
                name=way.name,
                file=way.file,
                variant=way.variant,
                precision=way.precision,
                model=model,
                eager=way.file == request.baseline and not way.variant,
            )
        )
    # a denoiser runs at every setting
    return sorted(contenders, key=lambda c: c.model.manifest.kind != "denoiser")


def _takes(model: Model) -> str:
    """Return what a model draws and from what, in words."""
    spec = model.spec
    given = "".join(f", {each.name} {in_words(each)}" for each in spec.conditions)
    return f"{model.noun} {list(spec.shape)}{given}"


def check_float32(backend: Backend, device: str, variant: str) -> None:
    """Raise BackendError if ONNX Runtime would run a float32 file on a GPU as TensorFloat-32, whose rate is another."""
    if device != "cuda" or backend.manifest.dtype != "float32" or not backend.name.startswith("ONNX Runtime"):
        return
    from cmfast.backends.onnxruntime import OnnxRuntimeBackend

    if not isinstance(backend, OnnxRuntimeBackend):
        return
    if variant == "tensorrt":  # until that provider has an option for it: github.com/microsoft/onnxruntime/issues/26029
        if os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            raise BackendError(
                f"{backend.name} multiplies float32 as TensorFloat-32 and has no option against it; set "
                "NVIDIA_TF32_OVERRIDE=0 in the environment, or time a file in fp16"
            )
        return
    from cmfast.backends import onnxruntime_float32

    onnxruntime_float32.check_float32(device)


def plan(contenders: list[Contender], steps: int, batch: int, *, keep_going: bool = False) -> list[Job]:
    """Return the jobs of one setting, the reference first: the same noise, labels and noise levels for all."""
    from cmfast.conditions import some_values
    from cmfast.noise import PEAK, slices

    running = [c for c in contenders if _runs(c, steps, batch)]
    if not running:
        return []
    sigmas = _sigmas(running, steps)
    shape = contenders[0].model.spec.shape
    need = (8 * steps + PEAK) * batch * math.prod(shape)
    need_memory(need, f"--steps {steps} --batch {batch}: the noise of samples {list(shape)}", "use a smaller --batch")
    noise = slices(0, range(batch), steps, shape)
    conditions = some_values(contenders[0].model.spec.conditions, batch)

    def sampling(model: Model) -> Callable[[], Floats]:
        return lambda: model.from_noise(noise, sigmas, conditions=conditions)

    return [
        Job(contender=c, sigmas=sigmas, batch=batch, draw=sampling(c.model), keep_going=keep_going) for c in running
    ]


def check_all_run(contenders: list[Contender], settings: list[list[Job]], request: Request) -> None:
    """Raise CmfastError if a contender runs at none of the settings."""
    for contender in contenders:
        if any(job.contender is contender for jobs in settings for job in jobs):
            continue
        model = contender.model
        steps = request.steps[0] if model.manifest.kind == "denoiser" else len(model.sigmas_for())
        batch = model.backend.batch or request.batch[0]
        raise CmfastError(f"{contender.file} runs at none of these settings; it needs --steps {steps} --batch {batch}")


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """A job whose images agree with the reference's."""

    job: Job
    difference: float  # the largest, images in [-1, 1]
    allowed: float


def compare_images(jobs: list[Job], tolerance: float | None, failures: Failures) -> list[Agreed]:
    """Compare the images of one setting with those of its first job; if that fails, of the next.

    The jobs run one after the other and release their memory, so that each has the device's to itself.

    Args:
        jobs: of one setting, the reference first.
        tolerance: largest difference allowed; None: by the less precise type of the two.
        failures: gets what fails or differs.

    Returns:
        The jobs that agree.
    """
    import numpy as np

    agreed: list[Agreed] = []
    reference: tuple[Job, Floats] | None = None
    for job in jobs:
        try:
            try:
                images = job.call()
            except NotFinite as err:
                name = reference[0].contender.name if reference else job.contender.name
                raise ContenderDiffers(job, f"differs from {name} by nan: {err}") from None
            first, expected = reference or (job, images)
            difference = float(np.abs(images - expected).max())
            # A type that is not in the table has float32's.
            allowed = tolerance or max(TOLERANCES.get(j.contender.dtype, TOLERANCES["float32"]) for j in (job, first))
            if not difference <= allowed:  # also for NaN
                ours, theirs = (j.contender.model.manifest.source.get("sha256") for j in (job, first))
                why = "; it was exported from other weights" if ours and theirs and ours != theirs else ""
                raise ContenderDiffers(
                    job, f"differs from {first.contender.name} by {difference:.2e} (allowed {allowed:g}){why}"
                )
        except (ContenderFailed, ContenderDiffers) as failure:
            failures.met(failure)
            continue
        finally:
            job.contender.release()
        reference = first, expected
        agreed.append(Agreed(job=job, difference=difference, allowed=allowed))
    return agreed


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A file and a way to open it."""

    name: str
    file: Path
    variant: str = ""
    precision: str = ""
    requested: bool = True  # by name: then it is an error if it is unavailable


def _ways(request: Request) -> Iterator[_Way]:
    if request.baseline is not None:
        extra = _precisions(request.models) if request.precision is None else request.precision
        for precision in ("", *(name for name in extra if name != "fp32")):  # "" is fp32, the reference
            requested = request.precision is not None or not precision
            for variant in ("", *request.baseline_variants()):
                name = " ".join(filter(None, ("PyTorch", request.device, precision, variant)))  # as the backend's
                yield _Way(name=name, file=request.baseline, variant=variant, precision=precision, requested=requested)
        if request.diffusers:
            yield _Way(name=f"diffusers {request.device}", file=request.baseline, variant="diffusers")
    same = [file.name for file in request.models]
    for file in request.models:
        name = file.name if same.count(file.name) == 1 else str(file)
        for variant in ("", *(request.onnx_variants() if format_of(file) is ONNX else ())):
            extra = (request.precision or ()) if request.takes_precision(file, variant) else ()
            own = _precisions((file,)) if extra else []
            for precision in ("", *(each for each in extra if each not in own)):
                words = " ".join(filter(None, (name, variant, precision)))
                yield _Way(name=words, file=file, variant=variant, precision=precision)


def _precisions(models: tuple[Path, ...]) -> list[str]:
    """Return the precisions of the exported files, each once, by the name of the option."""
    from cmfast.formats.table import read_manifest
    from cmfast.formats.values import PRECISIONS

    dtypes = {read_manifest(file).dtype for file in models if format_of(file)}
    return [name for name, dtype in PRECISIONS.items() if dtype in dtypes]


def _runs(contender: Contender, steps: int, batch: int) -> bool:
    """Whether it can: a sampler has one number of steps, a graph may have one batch size (padding is not timed)."""
    model = contender.model
    fits = model.manifest.kind == "denoiser" or len(model.sigmas_for()) == steps
    return fits and model.backend.batch in (None, batch)


def _sigmas(running: list[Contender], steps: int) -> tuple[float, ...]:
    """Return the noise levels of a setting: those of its samplers, else the model's default."""
    built = {c.model.sigmas_for(): c for c in running if c.model.manifest.kind != "denoiser"}
    if len(built) > 1:
        files = " and ".join(str(c.file) for c in list(built.values())[:2])
        raise CmfastError(f"{files} are samplers of {steps} step(s) at different noise levels; time them separately")
    if built:
        return next(iter(built))
    defaults = running[0].model.spec.sigmas
    if steps not in defaults:
        have = ",".join(str(k) for k in sorted(defaults))
        raise CmfastError(f"{running[0].file} has no default noise levels for {steps} step(s); use --steps {have}")
    return running[0].model.sigmas_for(steps)
