# SPDX-License-Identifier: MIT
"""A contender in a process of its own, which `apart` runs:

    python -m cmfast.bench.suite.worker '{"way": "OpenVINO", "files": {"float": "model.onnx"}, "threads": 1,
                                          "batch": 1, "cores": [0], "seconds": 0}'

opens it, calls its network once, prints a line with what that cost, and ends; with seconds > 0 it then waits for a
line, calls the network for so long, and prints a second line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cmfast.bench.probe import peak_mib
from cmfast.bench.suite.opening import Opened, open_way
from cmfast.bench.suite.ways import WAYS
from cmfast.conditions import some_values
from cmfast.noise import gaussian

WARM_UP_S = 0.3
RESULT = "cmfast: "  # how lines of results begin


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker does."""

    way: str  # the name of one of WAYS
    files: dict[str, str]  # paths by kind
    threads: int
    batch: int
    cores: list[int]  # that it is pinned to; []: not pinned
    seconds: float  # of calls after the first; 0: none


@dataclass(frozen=True, kw_only=True)
class Started:
    """What opening and the first call cost."""

    load_s: float
    first_call_ms: float
    peak_mib: float | None


@dataclass(frozen=True, kw_only=True)
class Worked:
    """What was done in the seconds."""

    calls: int
    seconds: float
    cpu_s: float
    peak_mib: float | None


def main() -> None:
    """Read a Task as JSON from the command line; print what it cost, a line of JSON each."""
    task = Task(**json.loads(sys.argv[1]))
    if task.cores:
        os.sched_setaffinity(0, task.cores)
    (way,) = (each for each in WAYS if each.name == task.way)
    start = time.perf_counter()
    opened = open_way(way, {kind: Path(file) for kind, file in task.files.items()}, task.threads)
    loaded = time.perf_counter()
    call = _Call(opened, task.batch)
    begun = time.perf_counter()
    call()
    first_ms = 1000 * (time.perf_counter() - begun)
    _print(Started(load_s=loaded - start, first_call_ms=first_ms, peak_mib=peak_mib()))
    if task.seconds:
        end = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < end:
            call()
        print(f"{RESULT}ready", flush=True)
        if sys.stdin.readline():  # else nobody waits any more
            _print(_worked(call, task.seconds))


class _Call:
    """A network call on the same input each time; of what has no single call, one step of the loop."""

    def __init__(self, opened: Opened, batch: int) -> None:
        spec = opened.manifest.spec
        self._opened, self._sigmas = opened, (spec.sigma_max,)
        self._noise = gaussian(0, range(batch), 0, spec.shape)
        self._conditions = some_values(spec.conditions, batch)
        self._x = spec.sigma_max * self._noise

    def __call__(self) -> None:
        if self._opened.denoise:
            self._opened.denoise(self._x, self._sigmas[0], self._conditions)
        else:
            self._opened.draw(self._noise[None], self._sigmas, self._conditions)


def _worked(call: _Call, seconds: float) -> Worked:
    calls, cpu, start = 0, time.process_time(), time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    took = time.perf_counter() - start
    return Worked(calls=calls, seconds=took, cpu_s=time.process_time() - cpu, peak_mib=peak_mib())


def _print(result: Started | Worked) -> None:
    print(f"{RESULT}{json.dumps(asdict(result))}", flush=True)


if __name__ == "__main__":
    main()
