# SPDX-License-Identifier: MIT
"""The variant "auto": tries what is installed at the first call of each batch size, and runs the fastest from then on.

    model = cmfast.load("model.onnx", variant="auto")                      # backends in the precision of the file
    model = cmfast.load("model.onnx", variant="auto", tolerance_db=50)     # lower precisions too, within 50 dB

Beside model.onnx, what `cmfast-export --format ncnn` makes of the same checkpoint, model_ncnn/, is tried too.
What was measured is kept in `FastestBackend.choices`, and between processes in $CMFAST_CACHE, if it is set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends import Backend, Inputs, model_path, open_backend
from cmfast.backends.cache import check_cache, read_entry, write_entry
from cmfast.backends.origin import Origin, pickled, states_of
from cmfast.bench.timing import interleave, summarise
from cmfast.checks import psnr_db, shown, usable_cores
from cmfast.errors import ArtifactError, BackendError, CmfastError, MissingDependency
from cmfast.formats.manifest import INT8, Manifest
from cmfast.formats.shipped import NCNN
from cmfast.formats.table import ONNX, OPENVINO, format_of, model_sha256, read_manifest
from cmfast.formats.values import PRECISIONS
from cmfast.noise import gaussian

AUTO = "auto"
SAME_DB = 80.0  # two libraries that both compute in float32 differ by less: about 120 dB are usual
HALF_DB = 50.0  # the same in half precision, where each rounds in places of its own
INT8_DB = 35.0  # the same of int8 files: a value near the middle between two steps goes to one or to the other
SECONDS, CALLS = 0.25, 5  # of timing a candidate
THROUGHPUT = "openvino throughput"  # several images at once, each by fewer threads: nothing to gain for one
ALONE = "for more than one image"
LEVELS = 5  # noise levels at which candidates are compared
SCHEMA, SUFFIX = "cmfast-auto/1", ".auto"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "ncnn")
BESIDE = "ncnn"  # in place of a variant: the folder beside the file


@dataclass(frozen=True)
class Tried:
    """A candidate, and what became of it.

    Attributes:
        variant: As `cmfast.load` takes it.
        precision: Likewise; "": that of the file.
        name: The backend in words, "" where it could not be opened.
        ms: Median of a call; None: not timed.
        psnr_db: From the reference, at the worst noise level; None: the reference itself, or not compared.
        why: Why it was left out; "" where it was not.
    """

    variant: str
    precision: str
    name: str = ""
    ms: float | None = None
    psnr_db: float | None = None
    why: str = ""

    def __str__(self) -> str:
        words = self.name or " ".join(filter(None, (self.variant or "ONNX Runtime", self.precision)))
        if self.ms is None:
            return f"{words}: {self.why}"
        return f"{words} {self.ms:.3g} ms" + ("" if self.psnr_db is None else f" ({self.psnr_db:.0f} dB)")


@dataclass(frozen=True)
class Choice:
    """What was measured for batches of about one size.

    Attributes:
        batch: Samples a call when it was measured; it holds for all sizes up to the same power of two.
        tried: The candidates, the reference first.
        best: Index of the fastest.
    """

    batch: int
    tried: tuple[Tried, ...]
    best: int

    def __str__(self) -> str:
        others = [str(each) for index, each in enumerate(self.tried) if index != self.best]
        return f"batch {self.batch}: {self.tried[self.best]}" + (f"; {'; '.join(others)}" if others else "")


class FastestBackend:
    """One file on the fastest of several backends: a `cmfast.Backend`.

    The first call with a batch size takes some seconds: each candidate is opened, compared with the first one at
    several noise levels, and timed in turns with the others. The choice holds for all sizes up to the same power of
    two. One thread at a time.
    """

    origin: Origin | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        threads: int | None = None,
        variant: str = AUTO,
        precision: str = "",
        sha256: str | None = None,
        *,
        tolerance_db: float | None = None,
    ) -> None:
        """Open the first candidate.

        Args:
            path: An .onnx or an .xml file, or the name of a model that comes with cmfast.
            device: cpu, or None.
            threads: CPU threads of every candidate.
            variant: "auto".
            precision: "": the tolerance decides.
            sha256: What the file must hash to.
            tolerance_db: PSNR that a lower precision must keep; None: only the precision of the file.

        Raises:
            BackendError: There is nothing to choose from for this file or device.
            CmfastError: An argument does not fit.
        """
        path = model_path(path)
        _check(path, device, variant, precision, tolerance_db)
        self._files, self._path = states_of(path), path
        self._options: dict[str, Any] = {"device": "cpu", "threads": threads, "sha256": sha256}
        self._tolerance = tolerance_db
        self._beside = ncnn_beside(path) if sha256 is None else None
        self._candidates = _candidates(path, tolerance_db) + [(BESIDE, "")] * (self._beside is not None)
        self._opened: dict[int, Backend] = {}
        self._why: dict[int, str] = {}
        self._chosen: dict[int, int] = {}  # candidates by `_bucket`
        self.choices: dict[int, Choice] = {}
        opened = next(filter(None, map(self._open, range(len(self._candidates)))), None)
        if opened is None:
            raise BackendError(f"{path}: no backend can run it: {'; '.join(self._why.values())}")
        self.manifest, self.batch, self.name = opened.manifest, opened.batch, f"{opened.name} (auto)"
        again = functools.partial(FastestBackend, tolerance_db=tolerance_db)
        self.origin = Origin(
            path=path.absolute(), device="cpu", threads=threads, variant=AUTO, precision="", sha256=sha256,
            opener=again, files=self._files,
        )  # fmt: skip

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Evaluate the graph by the backend that is fastest for this batch size.

        Args:
            inputs: What `cmfast.Backend.run` takes.

        Returns:
            The graph's output, float32 [B, *shape].
        """
        first = self.manifest.inputs[0].name
        batch = inputs[first].shape[self.manifest.batch_axis]
        bucket = (batch - 1).bit_length()
        if bucket not in self._chosen:
            self._choose(bucket, batch, inputs)
        backend = self._opened[self._chosen[bucket]]
        self.name, self.manifest = f"{backend.name} (auto)", backend.manifest
        return backend.run(inputs)

    def _open(self, index: int) -> Backend | None:
        """Return a candidate, opened, or None where this machine cannot run it."""
        if index in self._opened:
            return self._opened[index]
        if states_of(self._path) != self._files:
            raise ArtifactError(f"{self._path}: it was changed since it was opened; open it again")
        variant, precision = self._candidates[index]
        try:
            if variant == BESIDE:
                assert self._beside
                self._opened[index] = self._open_beside(self._beside)
            else:
                self._opened[index] = open_backend(self._path, variant=variant, precision=precision, **self._options)
        except (BackendError, MissingDependency) as err:
            self._why[index] = str(err)
            return None
        return self._opened[index]

    def _open_beside(self, file: Path) -> Backend:
        """Return the backend of what lies beside the file; BackendError where it is another model or not whole."""
        try:
            backend = open_backend(file, threads=self._options["threads"])
        except (ArtifactError, OSError) as err:
            raise BackendError(str(err)) from None
        if _identity(backend.manifest) != _identity(read_manifest(self._path)):
            raise BackendError(f"{file}: another model than {self._path.name}, by its manifest")
        return backend

    def _choose(self, bucket: int, batch: int, inputs: Inputs) -> None:
        """Choose a candidate for a bucket of batch sizes: as remembered, or by measuring."""
        entry = self._entry(bucket)
        choice = _remembered(entry, self._candidates) if entry else None
        if choice is None or self._open(choice.best) is None:
            choice = self._measure(batch, inputs)
            if entry:
                write_entry(entry[0], entry[1], json.dumps({"schema": SCHEMA, **asdict(choice)}).encode())
        self.choices[bucket], self._chosen[bucket] = choice, choice.best
        for index in self._opened.keys() - set(self._chosen.values()):
            del self._opened[index]  # its memory

    def _measure(self, batch: int, inputs: Inputs) -> Choice:
        fitting = [index for index, (way, _) in enumerate(self._candidates) if batch > 1 or way != THROUGHPUT]
        every = {index: found for index in fitting if (found := self._open(index)) is not None}
        reference = next(iter(every))
        probes = _probes(every[reference], batch, inputs)
        expected = [every[reference].run(probe) for probe in probes]
        tried = [Tried(*pair, why=self._why.get(index, ALONE)) for index, pair in enumerate(self._candidates)]
        calls: dict[int, Callable[[], object]] = {}
        for index, backend in every.items():
            db = None
            lower = bool(self._candidates[index][1])  # a precision below the file's, for which the tolerance is
            least = self._tolerance if lower and self._tolerance else _same_db(backend.manifest)
            try:
                if index != reference:
                    got = [backend.run(probe) for probe in probes]
                    db = _worst_db(got, expected, probes, image=backend.manifest.spec.data == "image")
            except BackendError as err:
                tried[index] = Tried(*self._candidates[index], backend.name, why=str(err))
                continue
            why = "" if db is None or db >= least else f"{db:.1f} dB from {every[reference].name}, need {least:g}"
            tried[index] = Tried(*self._candidates[index], backend.name, psnr_db=db, why=why)
            if not why:
                calls[index] = functools.partial(backend.run, inputs)
        names = {str(index): call for index, call in calls.items()}
        times = interleave(names, seconds=SECONDS, calls=CALLS, warmup_s=SECONDS / 4, most_s=2 * SECONDS)
        medians = {int(name): summarise(each).median_ms for name, each in times.items()}
        for index, ms in medians.items():
            tried[index] = Tried(**{**asdict(tried[index]), "ms": ms})
        return Choice(batch, tuple(tried), min(medians, key=lambda index: medians[index]))

    def _entry(self, bucket: int) -> tuple[Path, str] | None:
        """Return the folder and the name of what is remembered for a bucket; None without $CMFAST_CACHE."""
        folder = os.environ.get("CMFAST_CACHE")
        if not folder:
            return None
        depends = [SCHEMA, bucket, self._options["threads"], self._tolerance, self._candidates, *_machine()]
        depends += [_digest(self._beside)] if self._beside else []
        key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        return check_cache(folder, make=True), f"{model_sha256(self._path)[:32]}-{key[:32]}{SUFFIX}"


def remembered(path: Path) -> list[Choice]:
    """Return the choices for a file that are kept in $CMFAST_CACHE, whatever the threads and the tolerance were."""
    folder = os.environ.get("CMFAST_CACHE")
    if not folder or not Path(folder).is_dir() or format_of(path) not in (ONNX, OPENVINO):
        return []
    place, start = check_cache(folder), model_sha256(path)[:32]
    names = sorted(each.name for each in place.iterdir() if each.name.startswith(start) and each.suffix == SUFFIX)
    return [found for name in names if (found := _remembered((place, name), None)) is not None]


def _check(path: Path, device: object, variant: str, precision: str, tolerance_db: object) -> None:
    if not isinstance(variant, str) or variant != AUTO:
        raise CmfastError(f'tolerance_db is for the variant "auto", got variant {shown(variant)}')
    if device not in (None, "cpu"):
        raise BackendError(f'{path}: the variant "auto" chooses among backends on a CPU, not on {device}')
    if precision:
        raise CmfastError(f'the variant "auto" chooses the precision by tolerance_db; leave {precision} out')
    number = isinstance(tolerance_db, (int, float)) and not isinstance(tolerance_db, bool)
    if tolerance_db is not None and not (number and 0 < float(tolerance_db) < math.inf):  # type: ignore[arg-type]
        raise CmfastError(f"tolerance_db must be a number above 0, such as 50, got {shown(tolerance_db)}")
    if path.is_dir() or format_of(path) not in (ONNX, OPENVINO):
        raise BackendError(f'{path}: the variant "auto" is for .onnx and .xml files, which several backends run')


def _same_db(manifest: Manifest) -> float:
    """Return the PSNR that two libraries have at least which run the same file correctly."""
    if INT8 in manifest.made_by:
        return INT8_DB
    return SAME_DB if manifest.dtype == "float32" else HALF_DB


def _candidates(path: Path, tolerance_db: float | None) -> list[tuple[str, str]]:
    """Return (variant, precision) of what may run a file, the reference first."""
    own = read_manifest(path).dtype
    ways = ["", "openvino", THROUGHPUT] if format_of(path) is ONNX else [""]
    plain = [(way, "") for way in ways]
    if tolerance_db is None or own != "float32":
        return plain
    lower = [word for word in ("bf16", "fp16") if PRECISIONS[word] != own]
    return plain + [(way, word) for way in ways[-2:] for word in lower]


def ncnn_beside(path: Path) -> Path | None:
    """Return the graph for ncnn in the folder beside an .onnx file that `cmfast-export --format ncnn` names."""
    file = path.parent / f"{path.stem}_ncnn" / NCNN
    return file if format_of(path) is ONNX and file.is_file() else None


def is_same_model(path: Path, other: Path) -> bool:
    """Return whether two files are exports of one checkpoint, by their manifests; False where one has none."""
    try:
        ours, theirs = read_manifest(path), read_manifest(other)
    except (ArtifactError, OSError):
        return False
    return _identity(ours) == _identity(theirs)


def _identity(manifest: Manifest) -> tuple[object, ...]:
    return manifest.kind, manifest.spec.with_class_names(()), manifest.source.get("sha256")


def _digest(file: Path) -> str:
    """Return the digest of what lies beside the file; "" where it is not whole: opening it says why."""
    try:
        return model_sha256(file)
    except (ArtifactError, OSError):
        return ""


def _probes(reference: Backend, batch: int, inputs: Inputs) -> list[dict[str, npt.NDArray[Any]]]:
    """Return inputs like those of a call, of a denoiser at LEVELS noise levels over the whole range."""
    manifest = reference.manifest
    if manifest.kind != "denoiser":
        return [dict(inputs)]
    spec, clean = manifest.spec, reference.run(inputs)
    z = gaussian(0, range(batch), 0, spec.shape)
    levels = np.geomspace(spec.sigma_min, spec.sigma_max, LEVELS).astype(np.float32)
    found = []
    for start in range(0, LEVELS, batch):  # as many levels at a time as there are samples
        sigma = np.resize(levels[start : start + batch], batch)
        x = (clean + sigma.reshape(-1, *[1] * len(spec.shape)) * z).astype(np.float32)
        found.append({**inputs, "x": x, "sigma": sigma})
        if spec.second_time:
            found[-1]["sigma_next"] = np.zeros(batch, np.float32)
    return found


def _worst_db(
    got: Sequence[npt.NDArray[np.float32]],
    expected: Sequence[npt.NDArray[np.float32]],
    probes: Sequence[Mapping[str, npt.NDArray[Any]]],
    *,
    image: bool,
) -> float:
    """Return the PSNR at the noise level where it is least: a mean over levels would hide one that is wrong."""
    worst = math.inf
    for ours, theirs, probe in zip(got, expected, probes, strict=True):
        sigma = probe.get("sigma")
        groups = [slice(None)] if sigma is None else [sigma == level for level in np.unique(sigma)]
        worst = min(worst, *(psnr_db([ours[group]], [theirs[group]], image=image) for group in groups))
    return worst


def _machine() -> list[str]:
    """Return what of the machine and its libraries a time depends on."""
    about = {platform.machine(), platform.processor()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        about |= {line for line in cpuinfo.read_text().splitlines() if line.startswith(("model name", "flags"))}
    return [*sorted(about), str(usable_cores()), *map(_version, PACKAGES)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _remembered(entry: tuple[Path, str], candidates: list[tuple[str, str]] | None) -> Choice | None:
    """Return a choice that was kept, None where there is none or it is not whole: then it is measured again."""
    content = read_entry(*entry)
    try:
        data: Mapping[str, Any] = json.loads(content or b"null")
        if data["schema"] != SCHEMA:
            return None
        tried = tuple(Tried(**each) for each in data["tried"])
        choice = Choice(int(data["batch"]), tried, int(data["best"]))
        text = str(choice)  # also a check of the types
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return None
    if candidates is not None and [(each.variant, each.precision) for each in tried] != candidates:
        return None
    return choice if text and choice.best >= 0 and tried[choice.best].ms is not None else None
