# SPDX-License-Identifier: MIT
"""Runs the CPU suite: files, contenders, comparison, times, rates, processes; a record."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmfast.bench import timing
from cmfast.bench.failures import LeftOut, Say, reason
from cmfast.bench.roofline import Ceilings
from cmfast.bench.suite import apart
from cmfast.bench.suite.files import NAMES, exporter_is_installed, files_of, given_files, names_of
from cmfast.bench.suite.measure import Agreed, Measured, Setting, beside_the_network, network_calls, whole_images
from cmfast.bench.suite.opening import Opened, open_way
from cmfast.bench.suite.rates import faster, measure_rates
from cmfast.bench.suite.record import BesideRow, CallRow, ImageRow, ProcessRow, StartRow, SuiteRecord
from cmfast.bench.suite.request import STEPS, SuiteRequest
from cmfast.bench.suite.ways import DIFFUSERS, FLOAT, INT8, Way, chosen
from cmfast.conditions import sample_arguments
from cmfast.errors import ArtifactError, BackendError, CmfastError, MissingDependency
from cmfast.formats.table import read_manifest
from cmfast.spec import ModelSpec


def run_suite(request: SuiteRequest, say: Say = lambda line: None) -> SuiteRecord:
    """Measure every way to run a model on this CPU.

    Args:
        request: the model, and what is measured.
        say: gets a line for each part of the work, such as `print`.

    Returns:
        Network calls, whole images, starts and processes, with the rates of the machine.

    Raises:
        CmfastError: the request cannot be fulfilled.
        CheckFailed: a contender computes something else than the reference, unless keep_going.
        BackendError: a contender failed, unless keep_going; or none is left. What fails after something has been timed
            is in the record, whose `failed` is then the first of it.
    """
    evaluations = tuple(map(_evaluation, request.evaluations))
    _check_same_quality(request.evaluations, evaluations)
    given_files(request)
    before = timing.cpu_ticks()
    measured = Measured(seconds=request.seconds, keep_going=request.keep_going, say=say)
    with _folder(request.keep) as folder:
        files, missing = files_of(request, folder, say)
        measured.files = list(files.values())
        for left in missing:
            measured.note(left)
        return _measure(request, files, measured, before, evaluations)


def planned(request: SuiteRequest) -> list[Way]:
    """Return the contenders of a request, as far as files tell: what `run_suite` tries to open.

    Raises CmfastError for evaluations that `run_suite` refuses.
    """
    _check_same_quality(request.evaluations, tuple(map(_evaluation, request.evaluations)))
    kinds = set(given_files(request))
    if request.baseline is not None and exporter_is_installed():
        kinds |= set(NAMES)
    return _chosen(request, frozenset(kinds))


def _chosen(request: SuiteRequest, kinds: frozenset[str]) -> list[Way]:
    return chosen(precision=request.precision, compiled=request.compiled, diffusers=request.diffusers, files=kinds)


@dataclass
class _Found:
    """What was measured so far, and the contenders that ran."""

    rates: list[tuple[int, Ceilings]] = field(default_factory=list)
    calls: list[CallRow] = field(default_factory=list)
    images: list[ImageRow] = field(default_factory=list)
    beside: list[BesideRow] = field(default_factory=list)
    ran: list[Way] = field(default_factory=list)
    spec: ModelSpec | None = None


def _measure(
    request: SuiteRequest,
    files: dict[str, Path],
    measured: Measured,
    before: tuple[int, int] | None,
    evaluations: tuple[Mapping[str, Any], ...],
) -> SuiteRecord:
    ways, found, flops = _chosen(request, frozenset(files)), _Found(), _flops(files)
    for threads in request.every_threads:
        _with_threads(request, ways, files, flops, threads, measured, found, evaluations)
    if not (found.calls and found.spec):
        raise BackendError(f"nothing was timed; the first that failed: {measured.left_out[0]}")
    starts, processes = list[StartRow](), list[ProcessRow]()
    first = found.calls[0]
    if request.starts:
        starts = apart.starts(found.ran, files, first.threads, first.batch, measured)
    if request.processes:
        # A process that compiles for minutes is no way to serve.
        serving = [way for way in found.ran if way.variant != "compiled"]
        processes = apart.several(serving, files, request.processes, first.batch, measured)
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    return SuiteRecord(
        **timing.provenance(),
        request=request,
        files=names_of(files),
        reference=first.contender,
        sample_arguments=sample_arguments(found.spec.conditions, found.spec.data),
        flops=flops,
        load_average=load,
        steal=steal,
        warning=timing.noise_warning(measured.every_ms, load=load, steal=steal),
        rates=tuple(found.rates),
        calls=tuple(found.calls),
        images=tuple(found.images),
        beside=tuple(found.beside),
        starts=tuple(starts),
        processes=tuple(processes),
        left_out=tuple(measured.left_out),
        failed=measured.failed,
        evaluations=evaluations,
    )


def _with_threads(
    request: SuiteRequest,
    ways: Sequence[Way],
    files: Mapping[str, Path],
    flops: float | None,
    threads: int,
    measured: Measured,
    found: _Found,
    evaluations: Sequence[Mapping[str, Any]],
) -> None:
    """Open every contender with so many threads, and measure it. PyTorch's are of the process, so all have the same."""
    opened = _open(ways, files, threads, measured)
    if not opened:
        return
    spec = found.spec = opened[0].manifest.spec
    steps = _steps(spec) if request.steps is None else request.steps
    _check_steps(spec, steps)
    _check_evaluations(request.evaluations, evaluations, opened[0].manifest.source.get("sha256"))
    types = dict.fromkeys(each.way.type for each in opened)
    types |= {"bf16": None} if any(each.way.tolerance_db for each in opened) else {}  # which "auto" may choose
    rates = measure_rates(types, threads, measured.say)
    every: list[tuple[int, list[Agreed]]] = []
    for batch in request.batch:
        where = Setting(batch, threads)
        try:
            agreed = network_calls(opened, where, measured)
        except MemoryError as err:  # of the inputs
            measured.fails("every contender", "run", err, where)
            continue
        if not agreed:
            continue
        every.append((batch, agreed))
        if threads == request.every_threads[0]:
            fastest_ms = min(each.wall.wall_median_ms for each in agreed)
            found.beside += beside_the_network(spec, where, fastest_ms, measured)
        if not found.ran:  # at the first setting at which something runs
            running = [each.opened for each in agreed] + [each for each in opened if each.denoise is None]
            names = {each.way.name for each in running}
            found.ran = [way for way in ways if way.name in names]
            found.images = whole_images(running, steps, where, measured) if steps else []
    # Again, because a rate is what can be reached, and the machine may have been busy the first time.
    rates = faster(rates, measure_rates(types, threads, measured.say))
    found.rates += [(threads, each) for each in rates.values()]
    for batch, agreed in every:
        found.calls += _call_rows(agreed, threads, batch, flops, rates)


def _open(ways: Sequence[Way], files: Mapping[str, Path], threads: int, measured: Measured) -> list[Opened]:
    """Return the contenders that this machine can run, the reference first; the rest is noted.

    Raises BackendError if there is none, unless something has been timed.
    """
    opened: list[Opened] = []
    for way in ways:
        try:
            each = open_way(way, files, threads)
        except (BackendError, MissingDependency, ArtifactError) as err:
            if isinstance(err, ArtifactError) or way is DIFFUSERS:  # which was requested by name
                if not measured.goes_on:
                    raise
                measured.fails(way.name, "opening", err)
            else:
                measured.note(LeftOut(contender=way.name, what="opening", why=reason(err)))
            continue
        _check_same(opened[0] if opened else each, each, files)
        opened.append(each)
    if not opened and not measured.goes_on:
        raise BackendError(f"nothing of the suite can be opened here; the first that failed: {measured.left_out[0]}")
    return opened


def _check_same(first: Opened, other: Opened, files: Mapping[str, Path]) -> None:
    """Raise CmfastError unless two contenders have the same weights and take the same inputs."""
    ours, theirs = first.manifest.source.get("sha256"), other.manifest.source.get("sha256")
    spec, also = first.manifest.spec, other.manifest.spec
    spec, also = spec.with_class_names(()), also.with_class_names(())  # a file may have no room for them
    if (ours and theirs and ours != theirs) or (spec.shape, spec.conditions) != (also.shape, also.conditions):
        one, two = files[first.way.file], files[other.way.file]
        raise CmfastError(f"{two} is another model than {one}; delete it, or export it again from the same one")


def _check_evaluations(paths: Sequence[Path], records: Sequence[Mapping[str, Any]], sha256: str | None) -> None:
    """Raise CmfastError for the few-step quality of other weights; by Heun's method it may be a teacher's."""
    for path, record in zip(paths, records, strict=True):
        theirs = (record["model"].get("source") or {}).get("sha256")
        if sha256 and theirs and theirs != sha256 and any("steps" in row for row in record["rows"]):
            raise CmfastError(f"--evaluation {path}: it is of another model, by the SHA-256 of its weights")


def _measured_by(record: Mapping[str, Any]) -> str:
    """Return what a Frechet distance depends on, in words."""
    sizes = sorted({row["n"] for row in record["rows"]})
    digest = str(record["features"].get("sha256", ""))[:8]
    features = f"features {record['features']['name']}{digest and f' ({digest})'}"
    return f"{' and '.join(map(str, sizes))} samples against {record['data_set']} by {features}"


def _check_same_quality(paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
    """Raise CmfastError for Frechet distances that cannot be compared: a chart has one axis."""
    for path, record in zip(paths, records, strict=True):
        theirs, ours = _measured_by(record), _measured_by(records[0])
        if theirs != ours:
            raise CmfastError(
                f"--evaluation {path}: {theirs}, but {paths[0]}: {ours}; evaluate both with the same data and options"
            )


def _steps(spec: ModelSpec) -> tuple[int, ...]:
    found = tuple(k for k in STEPS if k in spec.sigmas)
    return found or tuple(sorted(spec.sigmas)[:1])


def _check_steps(spec: ModelSpec, steps: Sequence[int]) -> None:
    """Raise CmfastError unless the model has noise levels for these numbers of steps."""
    if missing := [k for k in steps if k not in spec.sigmas]:
        known = ", ".join(map(str, sorted(spec.sigmas))) or "no number of"
        raise CmfastError(f"--steps {missing[0]}: the model has default noise levels for {known} steps")


def _flops(files: Mapping[str, Path]) -> float | None:
    """Return the operations of one image and one network call, as the export counted them; None: unknown."""
    for kind in (FLOAT, INT8):
        found = read_manifest(files[kind]).cost.get("flops") if kind in files else None
        if found:
            return float(found)
    return None


def _call_rows(
    agreed: Sequence[Agreed], threads: int, batch: int, flops: float | None, rates: Mapping[str, Ceilings]
) -> list[CallRow]:
    first = agreed[0].wall
    rows = []
    for each in agreed:
        way, wall = each.opened.as_run, each.wall
        known = rates.get(way.type)
        rate = known.flops_per_s if known else None
        rows.append(
            CallRow(
                **vars(wall),
                contender=way.name,
                backend=each.opened.name,
                precision=way.types,
                reference=agreed[0].opened.way.name,
                threads=threads,
                batch=batch,
                decibels=each.decibels,
                images_per_s=1000 * batch / wall.wall_median_ms,
                times_as_fast=first.wall_median_ms / wall.wall_median_ms,
                # The clock of some systems ticks more rarely than a call takes.
                times_less_cpu=first.cpu_median_ms / max(wall.cpu_median_ms, 1e-6),
                of_rate=1000 * flops * batch / wall.wall_median_ms / rate if flops and rate else None,
            )
        )
    return rows


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _evaluation(path: Path) -> Mapping[str, Any]:
    """Return a record of cmfast-eval, or raise ArtifactError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["what"] == "evaluation" and _has_distances(record):
            return {name: record[name] for name in ("model", "data_set", "features", "rows")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ArtifactError(
        f"{path}: not a record with Frechet distances; make one: cmfast-eval MODEL --data-set NAME --json {path.name}"
    )


def _has_distances(record: Mapping[str, Any]) -> bool:
    """Return whether a record has what a chart and its comparison take; of another type, it may also raise."""
    model, features, rows = record["model"], record["features"], record["rows"]
    return (
        isinstance(model, dict)
        and isinstance(model.get("source") or {}, dict)
        and isinstance(features["name"], str)
        and isinstance(features.get("sha256", ""), str)
        and isinstance(record["data_set"], str)
        and bool(rows)
        and all(type(row["fd"]) in (int, float) and math.isfinite(row["fd"]) for row in rows)
        and all(type(row["calls"]) is int and type(row["n"]) is int for row in rows)
    )
