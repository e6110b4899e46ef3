# SPDX-License-Identifier: MIT
"""Times the contenders of one setting: in turns, then on their devices, then their memory is released."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cmfast.bench.contenders import Agreed, Job, compare_images
from cmfast.bench.diagnosis import DeviceMedians, device_times
from cmfast.bench.failures import ContenderFailed, Failures, Say
from cmfast.bench.request import Request
from cmfast.errors import BackendError

MIN_CALLS = 20  # counted, for each contender at each setting, unless they take MOST times --seconds
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
    """What was measured, by name of the job."""

    calls_ms: dict[str, list[float]] = field(default_factory=dict)  # every counted call
    on_device: dict[str, DeviceMedians] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)  # timed alone, because memory was short beside the others


def time_setting(
    agreed: list[Agreed], request: Request, failures: Failures, times: Times, seconds: float, say: Say
) -> list[Agreed]:
    """Time the jobs of one setting, by the host's clock and on their devices.

    A job that has no memory beside the others is timed after them, alone: each CUDA graph in PyTorch has its own pool.

    Args:
        agreed: jobs whose images agree.
        request: what was requested.
        failures: gets what fails.
        times: gets the times.
        seconds: wall time available; each job is called a few times in any case.
        say: gets a line for each part.

    Returns:
        The jobs that were timed to the end, in their order.
    """
    end, setting, aside = time.perf_counter() + seconds, list(agreed), list[Agreed]()
    while agreed:
        say(f"timing {agreed[0].job.where}: {len(agreed)} contender(s)")
        try:
            _turns([each.job for each in agreed], request, times, end - time.perf_counter())
        except ContenderFailed as failure:
            failed = [each for each in agreed if each.job is failure.job]
            others = [each for each in agreed if each.job is not failure.job]
            _release(agreed)
            if failure.memory and others:
                aside, agreed = aside + failed, others
                continue
            failures.met(failure)
            agreed = compare_images(
                [each.job for each in others], request.tolerance, failures
            )  # it may have been first
        else:
            break
    for each in agreed:
        _time_on_device(each.job, request, failures, times)
    _release(agreed)
    for each in aside:
        say(f"timing {each.job.name} alone: memory was short beside the others")
        try:
            _turns([each.job], request, times, end - time.perf_counter())
        except ContenderFailed as failure:
            failures.met(failure)
        else:
            times.alone.add(each.job.name)
            agreed.append(each)
            _time_on_device(each.job, request, failures, times)
        finally:
            _release([each])
    order = [each.job for each in setting]
    return sorted(agreed, key=lambda each: order.index(each.job))


def _turns(jobs: Sequence[Job], request: Request, times: Times, seconds: float) -> None:
    from cmfast.bench import timing

    calls = {job.name: job.call for job in jobs}
    times.calls_ms |= timing.interleave(
        calls,
        seconds=request.seconds,
        calls=MIN_CALLS,
        most_s=MOST * request.seconds,
        budget_s=max(0.0, seconds),
    )


def _time_on_device(job: Job, request: Request, failures: Failures, times: Times) -> None:
    """Take the times on the device, if the backend has them; a failure here costs the job nothing else."""
    from cmfast.backends import TimedBackend

    backend = job.contender.model.backend
    if request.device != "cuda" or not isinstance(backend, TimedBackend):
        return
    try:
        times.on_device[job.name] = device_times(backend, job.call)
    except BackendError as err:
        failure = err if isinstance(err, ContenderFailed) else ContenderFailed(job, str(err))
        failures.met(failure, what="device_times")


def _release(agreed: Sequence[Agreed]) -> None:
    for each in agreed:
        each.job.contender.release()
