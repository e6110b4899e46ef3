# SPDX-License-Identifier: MIT
"""What `gpu.py bench` measures beside single calls: `Model.sample` end to end, a profile, noise on the card."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.cuda.kernels import Kernels
from cmfast.errors import BackendError, CheckFailed, MissingDependency
from cmfast.model import Model
from cmfast.noise import gaussian
from cmfast_train.backends import torch_noise
from gpu_ceilings import fastest
from gpu_cells import Bench, Cell, median_compute_ms
from gpu_items import Item, NotHere
from gpu_lines import Line

IMAGES, SAMPLE_BATCH = {"cuda": 1024, "cpu": 32}, {"cuda": 256, "cpu": 8}
TOP = 15  # kernels of a profile
NOISE = {"cuda": (256, (3, 64, 64)), "cpu": (16, (3, 32, 32))}  # images, shape: 3.1 million values


def items(bench: Bench, networks: Sequence[str]) -> Iterator[Item]:
    """Yield these items, most valuable first."""
    for network in networks:
        expect = {"imagenet64": 8.0}.get(network, 4.0) if bench.device == "cuda" else 1.0
        yield Item(name=f"{network} bf16 sample", run=functools.partial(sample, bench, network), expect_s=expect)
    yield Item(name="noise", run=functools.partial(noise, bench.device), expect_s=2.0)
    yield Item(name="noise kernels", run=functools.partial(noise_kernels, bench.device), expect_s=2.0)
    if networks:
        network = "cifar10" if "cifar10" in networks else networks[0]
        for way in ("eager", "best"):
            run = functools.partial(profile, bench, network, way)
            yield Item(name=f"{network} bf16 profile {way}", run=run, expect_s=4.0)


def sample(bench: Bench, network: str) -> Line:
    """Return the images per second of `Model.sample`, with noise and 8-bit pixels, beside the network's own."""
    n, batch = IMAGES[bench.device], SAMPLE_BATCH[bench.device]
    cell = Cell(network=network, precision="bf16", batch=batch)
    way = best_way(bench, cell)
    backend = bench.open(network, "bf16", way)
    model = Model(backend)
    images = model.sample(2 * batch, steps=1, batch=batch)  # warms up
    if not images.std() > 1:
        raise CheckFailed("all pixels are the same")
    inputs, conditions, sigmas = bench.inputs(cell)
    if bench.device == "cuda":
        with backend.timed() as times:
            for _ in range(6):
                backend.loop(inputs, sigmas, conditions)
        own_ms = median_compute_ms(times[1:])
    else:
        own_ms = statistics.median(timed_ms(lambda: backend.loop(inputs, sigmas, conditions)) for _ in range(3))
    seconds = [timed_ms(lambda: model.sample(n, steps=1, batch=batch)) / 1000 for _ in range(3)]
    rate, own = n / statistics.median(seconds), 1000 * batch / own_ms
    return {
        "kind": "sample", "network": network, "precision": "bf16", "steps": 1, "batch": batch, "n": n,
        "way": way or "eager", "seconds_each": seconds, "images_per_s": rate, "network_images_per_s": own,
        "of_network": rate / own,
    }  # fmt: skip


def best_way(bench: Bench, cell: Cell) -> str:
    """Return the fastest way at a cell so far; eager if none was measured."""
    same = ("network", "precision", "steps")
    rows = [row for row in bench.lines.found("row") if all(row[name] == getattr(cell, name) for name in same)]
    rows = [row for row in rows if row["way"] not in ("eager", "compiled")]
    rows = [row for row in rows if row["batch"] == cell.batch] or rows
    best = max(rows, key=lambda row: row["times_as_fast"], default=None)
    return best["way"] if best is not None and best["times_as_fast"] > 1 else ""


def profile(bench: Bench, network: str, which: str) -> Line:
    """Return the kernels that take most of the time of a call at batch 64."""
    cell = Cell(network=network, precision="bf16", batch=64 if bench.device == "cuda" else 1)
    way = best_way(bench, cell) if which == "best" else ""
    if which == "best" and not way:
        raise NotHere("no way was faster than eager, or none was measured")
    backend = bench.open(network, "bf16", way)
    inputs, conditions, sigmas = bench.inputs(cell)
    for _ in range(2):
        backend.loop(inputs, sigmas, conditions)
    activity = torch.profiler.ProfilerActivity
    calls = 3
    activities = [activity.CPU, activity.CUDA] if bench.device == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            backend.loop(inputs, sigmas, conditions)
    events = [event for event in profiler.key_averages() if bench.device == "cpu" or kernel_ms(event, "cuda") > 0]
    if bench.device == "cuda":  # kernels and copies; the operators that launched them have the same time again
        events = [event for event in events if str(event.device_type).endswith("CUDA")]
    total = sum(kernel_ms(event, bench.device) for event in events)
    events.sort(key=lambda event: -kernel_ms(event, bench.device))
    table = [
        {"kernel": event.key[:160], "calls": event.count / calls, "ms": kernel_ms(event, bench.device) / calls}
        for event in events[:TOP]
    ]
    where = {"network": network, "precision": "bf16", "batch": cell.batch, "steps": 1, "way": way or "eager"}
    return {"kind": "profile", **where, "total_ms": total / calls, "kernels": len(events), "table": table}


def kernel_ms(event: Any, device: str) -> float:
    return (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1000


def noise(device: str) -> Line:
    """Return values per second of noise, by PyTorch on the device and by numpy on one thread; the bits agree."""
    count, shape = NOISE[device]
    values = count * int(np.prod(shape))
    want, numpy_s = noise_of_numpy(count, shape)
    key, samples = torch_noise.key_of(0).to(device), torch.arange(count, device=device)
    got = torch_noise.gaussian(key, samples, 1, shape)
    differs = int((got[0].cpu().numpy().view(np.uint32) != want.view(np.uint32)).sum())
    if differs:
        raise CheckFailed(f"{differs:,} of {values:,} values differ from numpy's bits")

    def draw() -> None:
        torch_noise.gaussian(key, samples, 1, shape)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = fastest(draw)
    return {
        "kind": "noise", "values": values, "values_per_s": values / seconds, "numpy_values_per_s": values / numpy_s,
        "times_as_fast": numpy_s / seconds,
    }  # fmt: skip


def noise_kernels(device: str) -> Line:
    """Return values per second of noise by the kernels that backends without torch draw with; the bits agree."""
    if device != "cuda":
        raise NotHere("needs an NVIDIA GPU")
    try:
        stream = cuda.Stream()
        kernels = Kernels(stream)
    except (BackendError, MissingDependency) as err:
        raise NotHere(str(err)) from None
    count, shape = NOISE[device]
    size = int(np.prod(shape))
    request, x = cuda.Buffer((1 + count,), np.uint64), cuda.Buffer((count, *shape), np.float32)
    request.host[0], request.host[1:] = 0, np.arange(count)
    stream.to_device(request)
    want, numpy_s = noise_of_numpy(count, shape)

    def draw() -> None:
        kernels.add_noise(x.device, 0, request.device, count, size, 0, 1.0)
        stream.wait()

    draw()
    stream.to_host(x)
    stream.wait()
    differs = int((x.host.view(np.uint32) != want.view(np.uint32)).sum())
    if differs:
        raise CheckFailed(f"{differs:,} of {want.size:,} values differ from numpy's bits")
    seconds = fastest(draw)
    return {
        "kind": "noise", "way": "kernels without torch", "values": want.size, "values_per_s": want.size / seconds,
        "numpy_values_per_s": want.size / numpy_s, "times_as_fast": numpy_s / seconds,
    }  # fmt: skip


def noise_of_numpy(count: int, shape: tuple[int, ...]) -> tuple[Any, float]:
    """Return the noise of seed 0, and the seconds that numpy takes for it."""
    gaussian(0, range(count), 0, shape)  # the first touch of its memory is not counted
    begun = time.perf_counter()
    want = gaussian(0, range(count), 0, shape)
    return want, time.perf_counter() - begun


def timed_ms(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)
