# SPDX-License-Identifier: MIT
"""Why a contender of cmfast-bench takes as long as it does: times on the device, distance from the roofline, words."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from cmfast.backends import DeviceTimes, TimedBackend
from cmfast.bench.roofline import BYTES, COST, Ceilings, Floor, floor_ms, measure_machine
from cmfast.errors import EngineError
from cmfast.formats.table import ENGINE, format_of

if TYPE_CHECKING:
    from cmfast.bench.contenders import Contender, Job
    from cmfast.formats.manifest import Manifest

DEVICE_CALLS, DEVICE_SECONDS, DEVICE_FEW = 20, 2.0, 3  # with device times, after the timing: at most, and after a while
# Of the device's time: a host that needs more to hand over work does not keep the device busy. trtexec warns from here.
LAUNCH = 0.8
REPLAYED = {"cuda_graph", "compiled", "reduce-overhead"}  # words of variants; torch.compile records CUDA graphs itself
BUSY = 0.25  # of a ceiling: below, neither arithmetic nor memory is what the time goes to
FAR, FAR_WHY = "far from the roofline", "small or slow kernels and overhead take the time"

Cost = Mapping[str, float]


def device_times(
    engine: TimedBackend, call: Callable[[], object], calls: int = DEVICE_CALLS, seconds: float = DEVICE_SECONDS
) -> tuple[DeviceTimes, int]:
    """Return the medians over `calls` calls, and how many they were; DEVICE_FEW are enough after so many seconds.

    A call that runs the engine several times counts all of them.
    """
    end = time.perf_counter() + seconds
    call()  # the first after another contender is not counted, as in cmfast.bench.timing
    rows: list[dict[str, float]] = []
    while len(rows) < calls and (len(rows) < DEVICE_FEW or time.perf_counter() < end):
        with engine.timed() as times:
            call()
        if not times:
            raise EngineError("the engine promised the times of its calls and gave none")
        rows.append({name: sum(getattr(each, name) for each in times) for name in _TIMES})
    return DeviceTimes(**{name: statistics.median(row[name] for row in rows) for name in _TIMES}), len(rows)


def costs(contenders: Sequence[Contender]) -> list[Cost | None]:
    """Return, for each contender, the cost of one image in one network call; None where nobody knows.

    A file without a cost (a checkpoint, an old export) has that of another file of the same weights, its bytes by the
    size of the types: exact where both have the same, else close, for what stays float32 in half precision.
    """
    found = []
    for contender in contenders:
        own = contender.model.manifest
        # The file itself before all others, then the same type, then a denoiser, whose cost has all of a call in it.
        donors = [other.model.manifest for other in contenders if _same(own, other.model.manifest)]
        donors.sort(key=lambda other: (other is not own, other.dtype != own.dtype, other.kind != "denoiser"))
        found.append(next((cost for donor in donors if (cost := _converted(donor, own.dtype))), None))
    return found


def measure_ceilings(dtypes: set[str], device: str, threads: int | None) -> dict[str, Ceilings]:
    """Measure the machine in each type."""
    ceilings = {}
    for dtype in sorted(dtypes & BYTES.keys()):
        click.echo(f"measuring what {device} reaches in {dtype}", err=True)
        ceilings[dtype] = measure_machine(device, dtype, threads)
        if ceilings[dtype].flops_per_s is None or ceilings[dtype].bytes_per_s is None:
            click.echo(f"no roofline in {dtype}: {ceilings[dtype].how}", err=True)
    return ceilings


def explain(
    job: Job,
    wall_ms: float,
    on_device: tuple[DeviceTimes, int] | None,
    cost: Cost | None,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """Return what a row of the record says besides the times of its calls; None for what is not known."""
    steps = len(job.sigmas)
    times, calls = on_device or (None, 0)
    floor = floor_ms(cost, ceilings, job.batch, steps) if cost and ceilings else None
    replayed = not REPLAYED.isdisjoint(job.contender.variant.split()) or format_of(job.contender.file) is ENGINE
    return {
        "device_times": times and asdict(times) | {"calls": calls},
        "flops": cost and steps * job.batch * cost["flops"],
        "floor_ms": floor and floor.ms,
        "floor_bound": floor and floor.bound,
        "of_roofline": floor and floor.ms / wall_ms,
        "diagnosis": diagnose(wall_ms, times, floor, ceilings, replayed=replayed) or None,
    }


def diagnose(
    wall_ms: float, times: DeviceTimes | None, floor: Floor | None, ceilings: Ceilings | None, *, replayed: bool = False
) -> str:
    """Return what sets the time of a call, with the numbers behind it; "" where nothing is known.

    wall_ms   median of the whole call
    times     of the call on a GPU; None: on a CPU, or the engine does not tell
    floor     of the call, by `ceilings`
    replayed  the work is CUDA graphs already: handing one over is one launch, whatever the host's clock says of waiting

    Launch-bound goes by enqueue_ms, which begins when the arrays are in page-locked memory: filling that takes the host
    longer the larger the batch, and no graph would make it shorter.
    """
    if times is not None:
        copies_ms = times.copy_in_ms + times.copy_out_ms
        if copies_ms > times.compute_ms:
            return f"transfer-bound: {copies_ms:.3g} ms of copies for {times.compute_ms:.3g} ms of work on the GPU"
        if times.enqueue_ms > LAUNCH * times.compute_ms and not replayed:
            return (
                f"launch-bound: the host needs {times.enqueue_ms:.3g} ms to hand over {times.compute_ms:.3g} ms of "
                "work; a CUDA graph would help"
            )
    if floor is None or ceilings is None or ceilings.flops_per_s is None or ceilings.bytes_per_s is None:
        if times is None:
            return ""
        return f"bound by the GPU, at work for {times.compute_ms:.3g} of {times.host_ms:.3g} ms; no roofline is known"
    seconds = (times.compute_ms if times is not None else wall_ms) / 1000
    if floor.bound == "compute":
        what, rate, ceiling, unit = "matrix rate", floor.flops / seconds, ceilings.flops_per_s, "FLOP/s"
        above = "it multiplies less often than counted (Winograd), or the ceiling was measured on a busy machine"
    else:
        what, rate, ceiling, unit = "bandwidth", floor.bytes / seconds, ceilings.bytes_per_s, "B/s"
        above = "caches hold part of it"
    if rate > ceiling:
        return f"{floor.bound}-bound: above the measured {what} ({_pair(rate, ceiling, unit)}): {above}"
    percent = 100 * rate / ceiling
    numbers = f"{percent:.{0 if percent >= 10 else 1}f} % of the measured {what} ({_pair(rate, ceiling, unit)})"
    if rate < BUSY * ceiling:
        return f"{FAR}: {numbers}; {FAR_WHY}"
    return f"{floor.bound}-bound: {numbers}"


_TIMES = tuple(field.name for field in fields(DeviceTimes))


def _same(one: Manifest, other: Manifest) -> bool:
    """Whether both were made from the same weights, as far as they say so."""
    ours, theirs = one.source.get("sha256"), other.source.get("sha256")
    return one is other or (bool(ours) and ours == theirs)


def _converted(donor: Manifest, dtype: str) -> Cost | None:
    """Return the cost of one network call, its bytes as another type would have them."""
    values = [donor.cost.get(name) for name in COST]
    if not all(isinstance(value, (int, float)) for value in values) or not {donor.dtype, dtype} <= BYTES.keys():
        return None
    steps = 1 if donor.kind == "denoiser" else len(next(iter(donor.spec.sigmas.values())))
    size = BYTES[dtype] / BYTES[donor.dtype]
    return {name: donor.cost[name] / steps * (1 if name == "flops" else size) for name in COST}


def _pair(value: float, of: float, unit: str) -> str:
    """Return "412 of 660 TFLOP/s": both in the unit that suits the second."""
    size, prefix = next(((s, p) for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if of >= s), (1.0, ""))
    return f"{value / size:.3g} of {of / size:.3g} {prefix}{unit}"
