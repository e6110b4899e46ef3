# SPDX-License-Identifier: MIT
"""Contenders in processes of their own: what each costs to start, and several at a time, as a server runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

from cmfast.bench.suite.measure import Measured
from cmfast.bench.suite.record import ProcessRow, StartRow
from cmfast.bench.suite.ways import Way
from cmfast.bench.suite.worker import RESULT, Started, Task, Worked
from cmfast.checks import usable_cores
from cmfast.errors import BackendError, one_line

T = TypeVar("T", Started, Worked)
ROUNDS = 2  # over all contenders, the second one backwards: a machine drifts


@dataclass(frozen=True)
class _Worker:
    """A process, and the file that gets what it says on stderr: a pipe would fill up while its results are awaited."""

    process: subprocess.Popen[str]
    said: IO[str]


def starts(
    ways: Sequence[Way], files: Mapping[str, Path], threads: int, batch: int, measured: Measured
) -> list[StartRow]:
    """Open each contender once in a process of its own, and make its first network call there."""
    rows = []
    for way in ways:
        measured.say(f"starting {way.name} in a process of its own")
        task = _task(way, files, threads, batch)
        try:
            with _working(way, [task]) as (worker,):
                cost = _line(way, worker, Started)
        except BackendError as err:
            measured.fails(way.name, "start", err)
            continue
        rows.append(StartRow(contender=way.name, threads=threads, batch=batch, **vars(cost)))
    return rows


def several(
    ways: Sequence[Way], files: Mapping[str, Path], counts: Sequence[int], batch: int, measured: Measured
) -> list[ProcessRow]:
    """Run each contender in so many processes at a time; the cores are divided among them.

    The contenders cannot take turns call by call, so there are ROUNDS rounds, and their sums count.
    """
    rows = []
    for count in counts:
        places = shares(count)
        done: dict[str, list[list[Worked]]] = {way.name: [] for way in ways}
        for turn in range(ROUNDS):
            for way in ways if turn % 2 == 0 else reversed(ways):
                measured.say(f"running {way.name} in {count} process(es), round {turn + 1} of {ROUNDS}")
                try:
                    done[way.name].append(_together(way, files, places, batch, measured.seconds / ROUNDS))
                except BackendError as err:
                    done.pop(way.name)
                    ways = [other for other in ways if other is not way]
                    measured.fails(way.name, "processes", err)
        for name, rounds in done.items():
            every = [each for workers in rounds for each in workers]
            images = batch * sum(each.calls for each in every)
            peaks = [each.peak_mib for each in rounds[0]]
            rows.append(
                ProcessRow(
                    contender=name,
                    processes=count,
                    threads=threads_of(places),
                    cores=places if all(places) else None,
                    batch=batch,
                    images_per_s=sum(batch * each.calls / each.seconds for each in every) / ROUNDS,
                    cpu_ms_per_image=1000 * sum(each.cpu_s for each in every) / images,
                    peak_mib=sum(peak for peak in peaks if peak is not None) if None not in peaks else None,
                )
            )
    return rows


def shares(count: int) -> list[list[int]]:
    """Return the cores of each of so many processes, as equal as whole cores allow; [] where none can be pinned.

    More processes than cores share them, one core each.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // count)
    return [[cores[(each * i + k) % len(cores)] for k in range(each)] for i in range(count)]


def threads_of(places: Sequence[Sequence[int]]) -> int:
    """Return the threads of each process: one for each of its cores."""
    return len(places[0]) or max(1, usable_cores() // len(places))


def _together(
    way: Way, files: Mapping[str, Path], places: Sequence[Sequence[int]], batch: int, seconds: float
) -> list[Worked]:
    threads = threads_of(places)
    tasks = [_task(way, files, threads, batch, cores, seconds) for cores in places]
    with _working(way, tasks) as workers:
        for worker in workers:
            _line(way, worker, Started)
            _read(way, worker)  # ready
        for worker in workers:
            assert worker.process.stdin
            with suppress(BrokenPipeError):  # it has ended: reading says why
                worker.process.stdin.write("go\n")
                worker.process.stdin.flush()
        return [_line(way, worker, Worked) for worker in workers]


def _task(
    way: Way, files: Mapping[str, Path], threads: int, batch: int, cores: Sequence[int] = (), seconds: float = 0
) -> Task:
    paths = {kind: os.fspath(file) for kind, file in files.items()}
    return Task(way=way.name, files=paths, threads=threads, batch=batch, cores=list(cores), seconds=seconds)


@contextmanager
def _working(way: Way, tasks: Sequence[Task]) -> Iterator[list[_Worker]]:
    """Run the tasks at a time; nothing of them is left behind."""
    # Else torch.compile and OpenVINO would find what this process has just compiled, and their first calls look cheap.
    cold = {name: value for name, value in os.environ.items() if name != "CMFAST_CACHE"}
    cold["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    workers, pipe = list[_Worker](), subprocess.PIPE
    with ExitStack() as files:
        try:
            for task in tasks:
                program = [sys.executable, "-P", "-m", "cmfast.bench.suite.worker", json.dumps(asdict(task))]
                said = files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=said, text=True, env=cold)
                workers.append(_Worker(process, said))
            yield workers
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.communicate()


def _line(way: Way, worker: _Worker, kind: type[T]) -> T:
    return kind(**json.loads(_read(way, worker)))


def _read(way: Way, worker: _Worker) -> str:
    """Return the next line of results, without the mark that they have: libraries print, too."""
    assert worker.process.stdout
    for line in worker.process.stdout:
        if line.startswith(RESULT):
            return line.removeprefix(RESULT)
    code = worker.process.wait()
    worker.said.seek(0)
    said = worker.said.read().strip().splitlines()
    why = f"killed by {signal.Signals(-code).name}" if code < 0 else (said or [f"exit status {code}"])[-1]
    raise BackendError(f"{way.name} fails in a process of its own: {one_line(why, 500)}")
