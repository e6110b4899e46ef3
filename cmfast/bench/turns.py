# SPDX-License-Identifier: MIT
"""The clock of cmfast-bench: contenders of a setting in turns, their devices asked, their memory given back."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from cmfast.bench.contenders import Agreed, Job, compare
from cmfast.bench.failures import ContenderFailed, Failures
from cmfast.bench.options import Options
from cmfast.errors import EngineError

if TYPE_CHECKING:
    from cmfast.backends import DeviceTimes

MIN_CALLS = 20  # counted, of each contender at each setting, unless they take MOST times --seconds
MOST = 3


class Budget:
    """The seconds that are left; without a limit infinitely many."""

    def __init__(self, seconds: float | None) -> None:
        self._end = time.perf_counter() + (math.inf if seconds is None else seconds)

    def left(self) -> float:
        """Return the seconds that are left, 0 at least."""
        return max(0.0, self._end - time.perf_counter())


@dataclass
class Times:
    """What was measured, by the names of jobs."""

    calls_ms: dict[str, list[float]] = field(default_factory=dict)  # of every counted call
    on_device: dict[str, tuple[DeviceTimes, int]] = field(default_factory=dict)  # medians, and of how many calls
    alone: set[str] = field(default_factory=set)  # not in turns with the others: together memory was short


def time_setting(
    agreed: list[Agreed], options: Options, failures: Failures, times: Times, seconds: float
) -> list[Agreed]:
    """Time the jobs of one setting, and ask their engines; return those that came to the end, in their order.

    seconds  wall time that there is for it; each is called a few times in any case

    Who has no memory beside the others is timed after them, alone: graphs of PyTorch have a pool of memory each.
    """
    end, setting, aside = time.perf_counter() + seconds, list(agreed), list[Agreed]()
    while agreed:
        click.echo(f"timing {agreed[0].job.where}: {len(agreed)} contender(s)", err=True)
        try:
            _turns([each.job for each in agreed], options, times, end - time.perf_counter())
        except ContenderFailed as failure:
            failed = [each for each in agreed if each.job is failure.job]
            others = [each for each in agreed if each.job is not failure.job]
            _release(agreed)
            if failure.memory and others:
                aside, agreed = aside + failed, others
                continue
            failures.met(failure)
            agreed = compare([each.job for each in others], options.tolerance, failures)  # anew: it may have been first
        else:
            break
    for each in agreed:
        _ask(each.job, options, failures, times)
    _release(agreed)
    for each in aside:
        click.echo(f"timing {each.job.name} alone: beside the others memory was short", err=True)
        try:
            _turns([each.job], options, times, end - time.perf_counter())
        except ContenderFailed as failure:
            failures.met(failure)
        else:
            times.alone.add(each.job.name)
            agreed.append(each)
            _ask(each.job, options, failures, times)
        finally:
            _release([each])
    order = [each.job for each in setting]
    return sorted(agreed, key=lambda each: order.index(each.job))


def _turns(jobs: Sequence[Job], options: Options, times: Times, seconds: float) -> None:
    from cmfast.bench import timing

    calls = {job.name: job.call for job in jobs}
    times.calls_ms |= timing.interleave(
        calls,
        seconds=options.seconds,
        calls=MIN_CALLS,
        most_s=MOST * options.seconds,
        budget_s=max(0.0, seconds),
    )


def _ask(job: Job, options: Options, failures: Failures, times: Times) -> None:
    """Ask the engine of a job for its times on the device, where it tells; that it fails then costs only those."""
    from cmfast.backends import TimedBackend
    from cmfast.bench import diagnosis as analysis

    engine = job.contender.model.engine
    if options.device != "cuda" or not isinstance(engine, TimedBackend):
        return
    try:
        times.on_device[job.name] = analysis.device_times(engine, job.call)
    except EngineError as err:
        failure = err if isinstance(err, ContenderFailed) else ContenderFailed(job, str(err))
        failures.met(failure, what="device_times")


def _release(agreed: Sequence[Agreed]) -> None:
    for each in agreed:
        each.job.contender.release()
