# SPDX-License-Identifier: MIT
"""Compares how fast model files sample, against each other and against eager PyTorch, and says why.

    request = Request(models=(Path("model.onnx"),), baseline=Path("model.pt"), steps=(1, 2), batch=(1, 8))
    record = compare(request)
    for row in record.rows:
        print(row.contender, row.steps, row.batch, row.median_ms, row.times_as_fast, row.diagnosis)

Everything is checked and opened first, then outputs are compared, then times are taken (`timing`): a wrong answer is
never timed. After the timing, a GPU's own times and the machine's ceilings (`roofline`) say what the time goes to. The
method is described in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cmfast.bench import diagnosis, timing
from cmfast.bench.contenders import Agreed, Contender, Job, check_all_run, compare_images, open_contenders, plan
from cmfast.bench.diagnosis import Explanation
from cmfast.bench.failures import Failures, Say
from cmfast.bench.record import Record, Row
from cmfast.bench.request import Request
from cmfast.bench.starts import start_all
from cmfast.bench.turns import Budget, Times, time_setting


def silent(line: str) -> None:
    """Show nothing of the progress."""


def compare(request: Request, say: Say = silent) -> Record:
    """Time sampling on the same noise, interleaved, after comparing the images.

    With a baseline, everything is compared with eager PyTorch in float32, and in speed also with eager PyTorch in the
    same precision; otherwise with the first model. A sampler graph runs at its own number of steps only. It takes about
    `request.seconds` for each contender at each setting.

    Args:
        request: what to time, and how.
        say: gets a line for each part of the work, such as `print`.

    Returns:
        One row per contender and setting, what each costs to start, and the machine and versions.

    Raises:
        CmfastError: the request cannot be fulfilled.
        CheckFailed: a model's images differ from the reference's by more than the tolerance, unless keep_going.
        BackendError: a contender failed, unless keep_going; or none is left.
    """
    return measure(prepare(request, say))


@dataclass(kw_only=True)
class Prepared:
    """Opened contenders and their planned jobs. `measure` drops those that turn out to run nowhere."""

    request: Request
    contenders: list[Contender]
    settings: list[list[Job]]  # the jobs of each pair of steps and batch, the reference first
    failures: Failures
    say: Say


def prepare(request: Request, say: Say = silent) -> Prepared:
    """Open every file and plan what `measure` times, without running a model.

    Raises:
        CmfastError: the request cannot be fulfilled.
    """
    failures = Failures(request, say)
    contenders = open_contenders(request, failures)
    planned = (plan(contenders, n, b, keep_going=request.keep_going) for n in request.steps for b in request.batch)
    settings = [jobs for jobs in planned if jobs]
    check_all_run(contenders, settings, request)
    failures.check_some_are_left(settings)
    return Prepared(request=request, contenders=contenders, settings=settings, failures=failures, say=say)


def measure(prepared: Prepared) -> Record:
    """Compare the images, time, ask the devices; return the record. Raises as `compare` does."""
    request, failures, say = prepared.request, prepared.failures, prepared.say
    contenders, settings = prepared.contenders, prepared.settings
    budget = Budget(request.budget)
    # A live progress bar would redraw on the core that is being timed, so there are lines instead.
    say("comparing the images")
    agreed = [setting for jobs in settings if (setting := _compared(jobs, request, failures, budget))]
    # In place, so that nothing holds the memory of those that run nowhere.
    settings[:] = [[each.job for each in setting] for setting in agreed]
    contenders[:] = [c for c in contenders if any(job.contender is c for jobs in settings for job in jobs)]
    failures.check_some_are_left(settings)
    to_start = contenders if request.starts else []
    # Without a budget first: what does not start is not worth timing. With one last, in what is left of it.
    starts = [] if request.budget else start_all(to_start, settings, request, failures, budget, say)
    before = timing.cpu_ticks()
    times = Times()
    timed = []
    for i, setting in enumerate(agreed):
        seconds = budget.left() / (len(agreed) - i)
        if not seconds:
            failures.no_time([each.job for each in setting], request.budget or 0)
        elif left := time_setting(setting, request, failures, times, seconds, say):
            timed.append(left)
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    failures.check_some_are_left(timed)
    costs = {c.name: cost for c, cost in zip(contenders, diagnosis.costs(contenders), strict=True)}
    dtypes = {c.dtype for c in contenders if costs[c.name]}
    ceilings = diagnosis.measure_ceilings(dtypes, request.device, request.threads, say) if budget.left() else {}
    if request.budget:
        starts = start_all(to_start, settings, request, failures, budget, say)

    def explain(job: Job, median_ms: float) -> Explanation:
        cost, ceiling = costs[job.contender.name], ceilings.get(job.contender.dtype)
        return diagnosis.explain(job, median_ms, times.on_device.get(job.name), cost, ceiling)

    return Record(
        **timing.provenance(),
        request=request,
        load_average=load,
        steal=steal,
        warning=timing.noise_warning(times.calls_ms, load=load, steal=steal),
        ceilings=tuple(ceilings.values()),
        rows=tuple(row for setting in timed for row in _rows(setting, times, explain)),
        starts=tuple(starts),
        left_out=tuple(failures.left_out),
    )


def _compared(jobs: list[Job], request: Request, failures: Failures, budget: Budget) -> list[Agreed]:
    """Return the jobs of one setting that may be timed; none if the settings before have used up --budget."""
    if budget.left():
        return compare_images(jobs, request.tolerance, failures)
    failures.no_time(jobs, request.budget or 0)
    return []


def _rows(setting: list[Agreed], times: Times, explain: Callable[[Job, float], Explanation]) -> Iterator[Row]:
    """Yield the rows of one setting."""
    jobs = [each.job for each in setting]
    summaries = {job.name: timing.summarise(times.calls_ms[job.name]) for job in jobs}
    eager = {job.contender.dtype: job for job in jobs if job.contender.eager}
    for each in setting:
        job, contender, summary = each.job, each.job.contender, summaries[each.job.name]
        same, why = eager.get(contender.dtype), explain(job, summary.median_ms)
        yield Row(
            contender=contender.name,
            backend=contender.model.backend.name,
            variant=contender.variant,
            dtype=contender.dtype,
            steps=len(job.sigmas),
            sigmas=job.sigmas,
            batch=job.batch,
            median_ms=summary.median_ms,
            p10_ms=summary.p10_ms,
            p90_ms=summary.p90_ms,
            max_ms=summary.max_ms,
            calls=summary.calls,
            images_per_s=1000 * job.batch / summary.median_ms,
            reference=jobs[0].contender.name,
            times_as_fast=summaries[jobs[0].name].median_ms / summary.median_ms,
            reference_same_precision=same.contender.name if same else None,
            times_as_fast_same_precision=summaries[same.name].median_ms / summary.median_ms if same else None,
            max_abs_diff=each.difference,
            tolerance=each.allowed,
            alone=job.name in times.alone,
            device_times=why.device_times,
            flops=why.flops,
            floor_ms=why.floor_ms,
            floor_bound=why.floor_bound,
            of_roofline=why.of_roofline,
            diagnosis=why.diagnosis,
        )
