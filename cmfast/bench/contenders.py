# SPDX-License-Identifier: MIT
"""Who takes part in cmfast-bench: files opened in each way that was asked for, their jobs, and whether they agree.

What becomes of a contender that fails is decided in `failures`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.bench.failures import ContenderDiffers, ContenderFailed, Failures, LeftOut, reason
from cmfast.bench.options import Options
from cmfast.checks import NotFinite, need_memory
from cmfast.errors import CmfastError, EngineError, OutOfMemory, engine_error
from cmfast.formats.manifest import ROUNDING, WINOGRAD
from cmfast.formats.table import ONNX, format_of

if TYPE_CHECKING:
    from cmfast.backends import Backend
    from cmfast.drawing import Floats
    from cmfast.model import Model

# Largest difference of a pixel in [-1, 1] from the reference, by a manifest's dtype. In float32 more than an export is
# allowed: convolutions by Winograd's method, which libraries choose by themselves, cost some digits.
TOLERANCES = {**ROUNDING, "float32": WINOGRAD}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model file, opened one way."""

    name: str
    file: Path
    variant: str  # cmfast.backends.VARIANTS
    precision: str  # that it was opened in, for a checkpoint; "": its own
    model: Model
    eager: bool = False  # the baseline, run by PyTorch as it is: what speed is compared with

    @property
    def dtype(self) -> str:
        """What the trunk computes in, as a manifest says it."""
        return self.model.manifest.dtype

    def release(self) -> None:
        """Free what the engine keeps on a GPU for batch sizes, graphs above all; calling it makes them again."""
        from cmfast.backends import ReleasingBackend

        if isinstance(self.model.engine, ReleasingBackend):
            self.model.engine.release()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A contender at one setting."""

    contender: Contender
    sigmas: tuple[float, ...]
    batch: int
    draw: Callable[[], Floats]
    keep_going: bool = False  # a failure that nobody foresaw is the contender's too; else it keeps its traceback

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
            short = isinstance(engine_error(reason(err)), OutOfMemory)
            raise ContenderFailed(self, reason(err), memory=short) from None

    @property
    def where(self) -> str:
        return f"{len(self.sigmas)} step(s), batch {self.batch}"

    @property
    def name(self) -> str:
        return f"{self.contender.name} at {self.where}"


def open_contenders(options: Options, failures: Failures) -> list[Contender]:
    """Open every file in every way; the first contender is the reference. All must draw the same kind of image.

    What was not asked for by name and cannot be had is left out, and said to `failures`.
    """
    from cmfast.backends import open_backend
    from cmfast.model import Model

    contenders: list[Contender] = []
    for wanted in _wanted(options):
        try:
            engine = open_backend(
                wanted.file, options.device, options.threads, variant=wanted.variant, precision=wanted.precision
            )
            _check_float32(engine, options.device, wanted.variant)
        except Exception as err:
            if not (options.keep_going or (isinstance(err, EngineError) and not wanted.asked)):
                raise
            failures.note(LeftOut(contender=wanted.name, what="opening", why=reason(err)))
            continue
        model = Model(engine)
        first = contenders[0] if contenders else None
        if first and (model.spec.image, model.spec.classes) != (first.model.spec.image, first.model.spec.classes):
            raise CmfastError(
                f"{wanted.file} draws images {list(model.spec.image)} of {model.spec.classes} classes, {first.file} "
                f"{list(first.model.spec.image)} of {first.model.spec.classes}; only the same model can be compared"
            )
        contenders.append(
            Contender(
                name=wanted.name,
                file=wanted.file,
                variant=wanted.variant,
                precision=wanted.precision,
                model=model,
                eager=wanted.file == options.baseline and not wanted.variant,
            )
        )
    # a denoiser runs at every setting
    return sorted(contenders, key=lambda c: c.model.manifest.kind != "denoiser")


def _check_float32(engine: Backend, device: str, variant: str) -> None:
    """Raise EngineError where ONNX Runtime would run a float32 file on a GPU as TensorFloat-32: rates of two kinds."""
    if device != "cuda" or engine.manifest.dtype != "float32" or not engine.name.startswith("ONNX Runtime"):
        return
    from cmfast.backends.onnxruntime import OnnxRuntimeBackend

    if not isinstance(engine, OnnxRuntimeBackend):
        return
    if variant == "tensorrt":  # until that provider has an option for it: github.com/microsoft/onnxruntime/issues/26029
        if os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            raise EngineError(
                f"{engine.name} multiplies float32 as TensorFloat-32 and has no option against it; set "
                "NVIDIA_TF32_OVERRIDE=0 in the environment, or time a file in fp16"
            )
        return
    from cmfast.backends._onnxruntime_float32 import check_float32

    check_float32(device)


def plan(contenders: list[Contender], steps: int, batch: int, *, keep_going: bool = False) -> list[Job]:
    """Return the jobs of one setting, the reference first: the same noise, labels and noise levels for all."""
    import numpy as np

    from cmfast.noise import PEAK, gaussian

    running = [c for c in contenders if _runs(c, steps, batch)]
    if not running:
        return []
    sigmas = _levels(running, steps)
    image = contenders[0].model.spec.image
    need = (8 * steps + PEAK) * batch * math.prod(image)
    need_memory(need, f"--steps {steps} --batch {batch}: the noise of images {list(image)}", "use a smaller --batch")
    noise = np.stack([gaussian(0, range(batch), k, contenders[0].model.spec.image) for k in range(steps)])
    label = contenders[0].model.labels(batch)

    def sampling(model: Model) -> Callable[[], Floats]:
        return lambda: model.from_noise(noise, sigmas, label)

    return [
        Job(contender=c, sigmas=sigmas, batch=batch, draw=sampling(c.model), keep_going=keep_going) for c in running
    ]


def check_all_run(contenders: list[Contender], settings: list[list[Job]], options: Options) -> None:
    """Raise where a contender runs at none of the settings, saying which it needs."""
    for contender in contenders:
        if any(job.contender is contender for jobs in settings for job in jobs):
            continue
        model = contender.model
        steps = options.steps[0] if model.manifest.kind == "denoiser" else len(model.levels())
        batch = model.engine.batch or options.batch[0]
        raise CmfastError(f"{contender.file} runs at none of these settings; it needs --steps {steps} --batch {batch}")


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """A job whose images are those of the reference."""

    job: Job
    difference: float  # the largest of a pixel in [-1, 1]
    allowed: float


def compare(jobs: list[Job], tolerance: float | None, failures: Failures) -> list[Agreed]:
    """Return the jobs of one setting whose images agree with the first one's; what fails or differs `failures` gets.

    tolerance  None: by the less precise type of the two

    Where the first one fails and that does not stop the command, the next is what the others are compared with. One
    after the other they get the device's memory for themselves, beside the weights of all.
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
            first, wanted = reference or (job, images)
            difference = float(np.abs(images - wanted).max())
            # A type that is not in the table is held to float32's.
            allowed = tolerance or max(TOLERANCES.get(j.contender.dtype, TOLERANCES["float32"]) for j in (job, first))
            if not difference <= allowed:  # also when it is not a number
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
        reference = first, wanted
        agreed.append(Agreed(job=job, difference=difference, allowed=allowed))
    return agreed


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A file and a way to open it."""

    name: str
    file: Path
    variant: str = ""
    precision: str = ""
    asked: bool = True  # by name: if it cannot be had, that is an error


def _wanted(options: Options) -> Iterator[_Wanted]:
    if options.baseline is not None:
        extra = _precisions(options.models) if options.precision is None else options.precision
        for precision in ("", *(name for name in extra if name != "fp32")):  # "" is fp32, the reference
            asked = options.precision is not None or not precision
            for variant in ("", *options.baseline_variants()):
                name = " ".join(filter(None, ("PyTorch", options.device, precision, variant)))  # as the engine's
                yield _Wanted(name=name, file=options.baseline, variant=variant, precision=precision, asked=asked)
        if options.diffusers:
            yield _Wanted(name=f"diffusers {options.device}", file=options.baseline, variant="diffusers")
    same = [file.name for file in options.models]
    for file in options.models:
        name = file.name if same.count(file.name) == 1 else str(file)
        for variant in ("", *(options.onnx_variants() if format_of(file) is ONNX else ())):
            yield _Wanted(name=f"{name} {variant}".rstrip(), file=file, variant=variant)


def _precisions(models: tuple[Path, ...]) -> list[str]:
    """Return what the exported files say that they compute in, each once, by the name of the option."""
    from cmfast.formats.manifest import PRECISIONS
    from cmfast.formats.table import read_manifest

    dtypes = {read_manifest(file).dtype for file in models if format_of(file)}
    return [name for name, dtype in PRECISIONS.items() if dtype in dtypes]


def _runs(contender: Contender, steps: int, batch: int) -> bool:
    """Whether it can: a sampler has one number of steps, a graph may have one batch size (padding is not timed)."""
    model = contender.model
    return (model.manifest.kind == "denoiser" or len(model.levels()) == steps) and model.engine.batch in (None, batch)


def _levels(running: list[Contender], steps: int) -> tuple[float, ...]:
    """Return the noise levels of a setting: those that its samplers were built with, else the model's own."""
    built = {c.model.levels(): c for c in running if c.model.manifest.kind != "denoiser"}
    if len(built) > 1:
        files = " and ".join(str(c.file) for c in list(built.values())[:2])
        raise CmfastError(f"{files} are samplers of {steps} step(s) at different noise levels; time them one by one")
    if built:
        return next(iter(built))
    defaults = running[0].model.spec.sigmas
    if steps not in defaults:
        have = ",".join(str(k) for k in sorted(defaults))
        raise CmfastError(f"{running[0].file} has no default noise levels for {steps} step(s); use --steps {have}")
    return running[0].model.levels(steps)
