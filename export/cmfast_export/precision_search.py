# SPDX-License-Identifier: MIT
"""--precision auto: the fastest precision whose file stays inside the tolerance.

Where the file can be run it is timed; an engine for a card that is not here is chosen by the rates of its matrix units,
fp16 and bf16 alike before TF32 before float32, fp16 first because it rounds eight times finer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmfast.backends import open_backend
from cmfast.backends.onnxruntime import check_cuda
from cmfast.bench.timing import interleave, summarise
from cmfast.conditions import some_values
from cmfast.errors import BackendError, CheckFailed, CmfastError
from cmfast.files import atomic_file, check_target, temporary_folder
from cmfast.formats.manifest import ROUNDING, rounding
from cmfast.formats.values import PRECISIONS
from cmfast.model import Model
from cmfast.noise import slices
from cmfast_export import AUTO
from cmfast_export._target import one_writer
from cmfast_export.graphs.writer import replacing_data
from cmfast_export.pipeline import Exported, Source, export_onnx_as
from cmfast_export.request import GraphRequest
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.denoiser import Denoiser
from cmfast_train.importers import load_model

TOLERANCE = ROUNDING["float16"]  # data units, unless another is requested
BY_RATE = ("fp16", "bf16", "tf32", "fp32")
ON_CPU = ("fp32", "fp16")  # what ONNX Runtime runs on a CPU
SECONDS = 1.0  # of timing, each


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One precision, and what became of it."""

    precision: str
    max_abs: float | None  # from float32 PyTorch, data units; None: it is out
    median_ms: float | None  # of one image; None: not timed
    why: str = ""  # it is out: its check failed, or it cannot be run here


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `export_graph` made, and of which precisions it was chosen."""

    exported: Exported
    precision: str
    tried: Sequence[Tried]  # (): it was requested
    timed: str  # by what: ONNX Runtime cpu; empty: chosen by the rates of matrix units


def export_graph(model: Source, out: str | os.PathLike[str], graph: GraphRequest, *, timed: bool) -> Choice:
    """Export at the requested precision; `auto`: the fastest, see `export_fastest`."""
    if graph.precision == AUTO:
        return export_fastest(model, out, graph, timed=timed)
    exported = export_onnx_as(model, out, graph)
    return Choice(exported=exported, precision=graph.precision, tried=(), timed="")


@one_writer(check_target)
def export_fastest(model: Source, out: str | os.PathLike[str], graph: GraphRequest, *, timed: bool) -> Choice:
    """Export in each precision, keep the fastest file that is inside the tolerance.

    Args:
        model: as in `export_onnx`.
        out: the .onnx file.
        graph: of the graph; its precision plays no part.
        timed: whether the graph's device is what the file is for; if not, the first of BY_RATE that passes is taken.
    """
    target, device, tolerance = check_target(out), graph.device, graph.tolerance
    if graph.flavour:
        raise CmfastError(
            "--precision auto does not time the flavour ort-cuda; pass --precision fp16, or fp32 for exact weights"
        )
    loaded = model if isinstance(model, (Checkpoint, Denoiser)) else load_model(model)
    candidates = ON_CPU if timed and device == "cpu" else BY_RATE
    passed: dict[str, Exported] = {}
    failed: list[Tried] = []
    if device == "cuda":  # once, and not by a whole export of each
        check_cuda()
    with temporary_folder(target) as folder:
        for precision in candidates:
            file = folder / precision / target.name
            file.parent.mkdir()
            # What rounding explains is the limit of each; more than float32's in float32 would be a wrong graph.
            limit = min(TOLERANCE, rounding(PRECISIONS[precision], device)) if tolerance is None else tolerance
            try:
                one = replace(graph, precision=precision, tolerance=limit)
                passed[precision] = export_onnx_as(loaded, file, one)
            except (CheckFailed, BackendError) as err:
                failed.append(Tried(precision=precision, max_abs=None, median_ms=None, why=str(err)))
            if passed and not timed:
                break
        if not passed:
            reasons = "; ".join(dict.fromkeys(each.why for each in failed))
            raise CheckFailed(f"no precision is inside the tolerance: {reasons}")
        times = _times({name: exported.path for name, exported in passed.items()}, device) if timed else {}
        best = min(passed, key=lambda name: times.get(name, 0.0))
        exported = _move(passed[best], target)
    tried = [_tried(name, each, times.get(name)) for name, each in passed.items()]
    by = f"ONNX Runtime {device}" if timed else ""
    return Choice(exported=exported, precision=best, tried=[*tried, *failed], timed=by)


def _times(files: dict[str, Path], device: str) -> dict[str, float]:
    """Return the median time of one image from each file, ms, interleaved."""
    calls = {}
    for name, file in files.items():
        model = Model(open_backend(file, device))
        sigmas = model.sigmas_for()
        noise = slices(0, range(1), len(sigmas), model.spec.shape)
        conditions = some_values(model.spec.conditions, 1)
        calls[name] = lambda m=model, z=noise, s=sigmas, c=conditions: m.from_noise(z, s, conditions=c)
    return {name: summarise(each).median_ms for name, each in interleave(calls, seconds=SECONDS).items()}


def _move(exported: Exported, target: Path) -> Exported:
    """Put the chosen file under its final name; weights beside it keep theirs, which the file refers to."""
    data = exported.data and target.with_name(exported.data.name)
    with replacing_data(target) as announce:
        if exported.data and data:
            announce(data)
            os.replace(exported.data, data)
        with atomic_file(target) as file:
            shutil.copyfile(exported.path, file)
    return replace(exported, path=target, data=data)


def _tried(precision: str, exported: Exported, median_ms: float | None) -> Tried:
    agreement = exported.sampler or exported.denoiser
    return Tried(precision=precision, max_abs=agreement.parity.worst.max_abs, median_ms=median_ms)
