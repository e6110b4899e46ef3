# SPDX-License-Identifier: MIT
"""Samples from a Ray cluster of one-core workers, one of them killed, against one process on one core.

    python benchmarks/ray_sampling.py --json benchmarks/results/ray.json

Starts a cluster on this machine with `ray start`, and draws the same shards in turns: in this process, pinned to one
core; on the workers; on the workers while one is killed. What counts is the time from open models to the last shard on
disk. The start of the cluster and of its workers, with the model open, is measured apart. All shards are compared.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import cmfast
from cmfast.bench import timing
from cmfast.checks import usable_cores
from cmfast.cli.parameters import MODEL
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError, one_line
from cmfast.files import check_outputs, write_text
from cmfast.formats.table import model_sha256
from cmfast.model import Model
from cmfast.shards.drawing import Drawer, Here, Part, ShardRequest, draw_shards
from cmfast.shards.files import Array, read_shards
from cmfast.shards.on_ray import Workers, workers_on
from cmfast.shards.sent import How, read_model

KILL_AFTER = 0.3  # of the shards: then a worker is killed


@click.command("ray_sampling.py")
@click.option("--model", type=MODEL, default="digits", show_default=True, help="An exported file.")
@click.option("-n", "--number", type=int, default=20_000, show_default=True, help="Samples of a draw.")
@click.option("--steps", type=int, default=4, show_default=True, help="Network calls per sample.")
@click.option("--shard", type=int, default=256, show_default=True, help="Samples of a shard; one is drawn twice.")
@click.option("--workers", "count", type=int, default=2, show_default=True, help="One-core workers.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Draws of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(model: Path, number: int, steps: int, shard: int, count: int, rounds: int, json_file: Path | None) -> None:
    """Time shards from a Ray cluster."""
    check_outputs({"--json": json_file}, [model])
    if not 2 <= count <= usable_cores():
        raise CmfastError(f"--workers must be from 2 to the {usable_cores()} cores here, got {count}")
    how = How.of(model, "cpu", 1, "", "", None)
    sha256 = model_sha256(model)
    with one_core():
        loaded = cmfast.load(model, "cpu", 1)
        loaded.sample(256, steps=steps)  # warm
    request = ShardRequest(n=number, shard=shard, sigmas=loaded.sigmas_for(steps))
    times: dict[str, list[float]] = {"one core": [], "Ray": [], "Ray, a worker killed": []}
    cpu: dict[str, list[float]] = {name: [] for name in times}
    starts, differences = [], 0
    before = timing.cpu_ticks()
    with tempfile.TemporaryDirectory() as name, cluster(count) as (address, started_s):
        folder = Path(name)
        for turn in range(rounds):
            with one_core():
                seconds, used = timed(loaded, sha256, request, folder / f"one{turn}", Here(loaded))
            times["one core"].append(seconds)
            cpu["one core"].append(used)
            for kind, kill in (("Ray", False), ("Ray, a worker killed", True)):
                out = folder / f"{kind}{turn}"
                seconds, used, start_s = on_cluster(address, model, loaded, sha256, request, how, out, kill)
                times[kind].append(seconds)
                cpu[kind].append(used)
                starts.append(start_s)
                differences += compare(folder / f"one{turn}", out, number)
    steal = timing.steal_share(before, timing.cpu_ticks())
    report(model, request, count, times, cpu, started_s, starts, differences, steal, json_file)


def report(
    model: Path,
    request: ShardRequest,
    count: int,
    times: dict[str, list[float]],
    cpu: dict[str, list[float]],
    started_s: float,
    starts: list[float],
    differences: int,
    steal: float | None,
    json_file: Path | None,
) -> None:
    """Print the medians and write the record."""
    load = timing.load_average()
    one, one_cpu = statistics.median(times["one core"]), statistics.median(cpu["one core"])
    rows = []
    for kind, seconds in times.items():
        median, used = statistics.median(seconds), statistics.median(cpu[kind])
        row = {"draw": kind, "median_s": median, "min_s": min(seconds), "max_s": max(seconds), "cpu_s": used}
        row |= {"images_per_s": request.n / median, "times_as_fast": one / median}
        if kind != "one core":  # what all cores would give if nothing else ran on them
            row["times_as_fast_by_cpu_time"] = count * one_cpu / used
        rows.append(row)
        by_cpu = f"   by CPU time {row['times_as_fast_by_cpu_time']:.2f}x" if kind != "one core" else ""
        click.echo(f"{kind:<22}{median:7.2f} s   {one / median:5.2f}x   CPU {used:6.2f} s{by_cpu}")
    click.echo(f"different pixels: {differences}; cluster started in {started_s:.1f} s, workers {max(starts):.1f} s")
    warning = timing.noise_warning({k: [1000 * s for s in each] for k, each in times.items()}, load=load, steal=steal)
    if json_file is not None:
        record: dict[str, Any] = {"what": "ray", **timing.provenance(), "ray": version("ray"), "load_average": load}
        record |= {"steal": steal, "warning": warning, "model": {"file": model.name, "sha256": model_sha256(model)}}
        record |= {
            "n": request.n,
            "steps": len(request.sigmas),
            "shard": request.shard,
            "workers": count,
            "different_pixels": differences,
            "rows": rows,
        }
        record["start"] = {"cluster_s": started_s, "workers_with_model_s": statistics.median(starts)}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if warning:
        click.echo(f"warning: {warning}")


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this process and the threads that it starts meanwhile to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def cluster(cores: int) -> Iterator[tuple[str, float]]:
    """Give the address of a cluster of this machine, in processes of its own, and how long it took to start, s."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for it and for this process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
    options = ["--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options += [f"--num-cpus={cores}", f"--port={port}", f"--temp-dir={folder}"]
        command = [sys.executable, "-c", code, "start", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                raise CmfastError(f"ray start failed: {one_line(' '.join(said[-3:]))}")
            try:
                yield f"127.0.0.1:{port}", time.perf_counter() - began
            finally:
                process.send_signal(signal.SIGTERM)  # with --block it ends what it started
                process.communicate(timeout=60)


def timed(model: Model, sha256: str, request: ShardRequest, out: Path, drawer: Drawer) -> tuple[float, float]:
    """Return wall time and CPU time of this process, s, of a draw into a new folder."""
    began, used = time.perf_counter(), time.process_time()
    draw_shards(model, sha256, request, out, drawer)
    return time.perf_counter() - began, time.process_time() - used


class Watched:
    """Workers whose CPU time is read, and of which one may be killed: a `cmfast.shards.drawing.Drawer`."""

    def __init__(self, workers: Workers, victim: int | None) -> None:
        """Begin to count; `victim`: the process that is killed in the middle."""
        self._workers, self._victim = workers, victim
        self.name, self._number = workers.name, len(workers.actors)
        self._before = cpu_of_ray()
        self._last = dict(self._before)

    def draw(self, request: ShardRequest, parts: Sequence[Part]) -> Generator[tuple[range, Array]]:
        """Yield the samples of each part."""
        for number, drawn in enumerate(self._workers.draw(request, parts)):
            now = number == int(KILL_AFTER * len(parts))
            # A worker that has ended, or was killed, keeps what it had used before. Rarely: reading takes time, too.
            if now or number % 20 == 0 or number >= len(parts) - self._number:
                self._last |= cpu_of_ray()
            if now and self._victim is not None:
                os.kill(self._victim, signal.SIGKILL)
            yield drawn

    def cpu_s(self) -> float:
        """Return the CPU time of all processes of Ray, s."""
        self._last |= cpu_of_ray()
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._last.items())


def on_cluster(
    address: str, path: Path, model: Model, sha256: str, request: ShardRequest, how: How, out: Path, kill: bool
) -> tuple[float, float, float]:
    """Return wall time of a draw, CPU time of Ray's processes and of this one, time to start the workers, s."""
    began = time.perf_counter()
    with workers_on(address, read_model(path), how) as workers:
        import ray

        workers.wait(len(workers.actors))
        pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in workers.actors])
        start_s = time.perf_counter() - began
        drawer = Watched(workers, pids[0] if kill else None)
        seconds, own = timed(model, sha256, request, out, drawer)
        return seconds, own + drawer.cpu_s(), start_s


def cpu_of_ray() -> dict[int, float]:
    """Return the CPU time, s, of raylet, GCS, agents and workers, by process."""
    found, tick = {}, os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
        except OSError:  # it has ended
            continue
        if words.startswith(b"ray::") or b"/ray/" in words:
            user, system = stat.rpartition(")")[2].split()[11:13]
            found[int(entry.name)] = (int(user) + int(system)) / tick
    return found


def compare(one: Path, other: Path, number: int) -> int:
    """Return how many pixels of two folders differ; a sample that is missing is a failed check."""
    (samples, labels), (others, other_labels) = read_shards(one), read_shards(other)
    same = labels is None if other_labels is None else labels is not None and np.array_equal(labels, other_labels)
    if len(samples) != number or len(others) != number or not same:
        raise CheckFailed(f"{len(samples)} and {len(others)} samples instead of {number}, or labels that differ")
    return int((samples != others).sum())


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
