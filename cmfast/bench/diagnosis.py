# SPDX-License-Identifier: MIT
"""Why a contender takes as long as it does: times on the device, distance from the roofline, a sentence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from cmfast.backends import DeviceTimes, TimedBackend
from cmfast.bench.roofline import BYTES, COST, Ceilings, Floor, floor_ms, measure_machine
from cmfast.errors import BackendError
from cmfast.formats.table import ENGINE, format_of

if TYPE_CHECKING:
    from cmfast.bench.contenders import Contender, Job
    from cmfast.bench.failures import Say
    from cmfast.formats.manifest import Manifest

DEVICE_CALLS, DEVICE_SECONDS, DEVICE_FEW = 20, 2.0, 3  # calls with device times: all, or a few once so long has passed
# Fraction of the device's time: a host that needs longer to enqueue does not keep the device busy. trtexec warns here.
LAUNCH = 0.8
REPLAYED = {"cuda_graph", "compiled", "reduce-overhead"}  # words of variants; torch.compile records CUDA graphs itself
BUSY = 0.25  # of a ceiling: below, neither arithmetic nor memory is what the time goes to
FAR, FAR_WHY = "far from the roofline", "small or slow kernels and overhead take the time"

Cost = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DeviceMedians(DeviceTimes):
    """Medians over the calls of one contender at one setting, ms."""

    calls: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What is known about a time beside the host's clock; None: unknown."""

    device_times: DeviceMedians | None
    flops: float | None  # operations of the call, all steps and images
    floor_ms: float | None  # the least time on this machine
    floor_bound: str | None  # compute or memory
    of_roofline: float | None  # floor_ms over the median
    diagnosis: str | None


def device_times(
    backend: TimedBackend, call: Callable[[], object], calls: int = DEVICE_CALLS, seconds: float = DEVICE_SECONDS
) -> DeviceMedians:
    """Measure calls on the device; a call that runs the backend several times counts all of them.

    Args:
        backend: runs in `call`.
        call: is measured.
        calls: number of calls.
        seconds: time after which DEVICE_FEW calls are enough.

    Raises:
        BackendError: the backend gave no times.
    """
    end = time.perf_counter() + seconds
    call()  # the first after another contender is not counted, as in cmfast.bench.timing
    rows: list[dict[str, float]] = []
    while len(rows) < calls and (len(rows) < DEVICE_FEW or time.perf_counter() < end):
        with backend.timed() as times:
            call()
        if not times:
            raise BackendError("the backend promised the times of its calls and gave none")
        rows.append({name: sum(getattr(each, name) for each in times) for name in _TIMES})
    return DeviceMedians(**{name: statistics.median(row[name] for row in rows) for name in _TIMES}, calls=len(rows))


def costs(contenders: Sequence[Contender]) -> list[Cost | None]:
    """Return, for each contender, the cost of one image in one network call; None: unknown.

    A file without a cost (a checkpoint, an old export) gets that of another file of the same weights, its bytes scaled
    by the size of the types: exact for the same type, else close, because some of a half-precision graph is float32.
    """
    found = []
    for contender in contenders:
        own = contender.model.manifest
        # The file itself before all others, then the same type, then a denoiser, whose cost has all of a call in it.
        donors = [other.model.manifest for other in contenders if _same(own, other.model.manifest)]
        donors.sort(key=lambda other: (other is not own, other.dtype != own.dtype, other.kind != "denoiser"))
        found.append(next((cost for donor in donors if (cost := _converted(donor, own.dtype))), None))
    return found


def measure_ceilings(dtypes: set[str], device: str, threads: int | None, say: Say) -> dict[str, Ceilings]:
    """Measure the machine in each type; seconds of work each."""
    ceilings = {}
    for dtype in sorted(dtypes & BYTES.keys()):
        say(f"measuring what {device} reaches in {dtype}")
        ceilings[dtype] = measure_machine(device, dtype, threads)
        if ceilings[dtype].flops_per_s is None or ceilings[dtype].bytes_per_s is None:
            say(f"no roofline in {dtype}: {ceilings[dtype].how}")
    return ceilings


def explain(
    job: Job,
    wall_ms: float,
    times: DeviceMedians | None,
    cost: Cost | None,
    ceilings: Ceilings | None,
) -> Explanation:
    """Return what a row of the record says beside the times of its calls.

    Args:
        job: what was timed.
        wall_ms: median of the whole call.
        times: of the call on a GPU; None: unknown.
        cost: of one image in one network call; None: unknown.
        ceilings: of the device in the contender's type; None: not measured.
    """
    steps = len(job.sigmas)
    floor = floor_ms(cost, ceilings, job.batch, steps) if cost and ceilings else None
    replayed = not REPLAYED.isdisjoint(job.contender.variant.split()) or format_of(job.contender.file) is ENGINE
    return Explanation(
        device_times=times,
        flops=steps * job.batch * cost["flops"] if cost else None,
        floor_ms=floor.ms if floor else None,
        floor_bound=floor.bound if floor else None,
        of_roofline=floor.ms / wall_ms if floor else None,
        diagnosis=diagnose(wall_ms, times, floor, ceilings, replayed=replayed) or None,
    )


def diagnose(
    wall_ms: float, times: DeviceTimes | None, floor: Floor | None, ceilings: Ceilings | None, *, replayed: bool = False
) -> str:
    """Return what limits the speed of a call, with the numbers behind it; "": unknown.

    Launch-bound goes by enqueue_ms, which begins when the arrays are in page-locked memory: filling that takes longer
    for a larger batch, and no graph would make it shorter.

    Args:
        wall_ms: median of the whole call.
        times: of the call on a GPU; None: on a CPU, or the backend has none.
        floor: of the call, by `ceilings`.
        ceilings: of the device.
        replayed: the work is CUDA graphs already, and enqueuing one is a single launch.
    """
    if times is not None:
        copies_ms = times.copy_in_ms + times.copy_out_ms
        if copies_ms > times.compute_ms:
            return f"transfer-bound: {copies_ms:.3g} ms of copies for {times.compute_ms:.3g} ms of work on the GPU"
        if times.enqueue_ms > LAUNCH * times.compute_ms and not replayed:
            return (
                f"launch-bound: the host needs {times.enqueue_ms:.3g} ms to launch {times.compute_ms:.3g} ms of "
                "work; a CUDA graph would help"
            )
    if floor is None or ceilings is None or ceilings.flops_per_s is None or ceilings.bytes_per_s is None:
        if times is None:
            return ""
        return f"bound by the GPU, at work for {times.compute_ms:.3g} of {times.host_ms:.3g} ms; no roofline is known"
    seconds = (times.compute_ms if times is not None else wall_ms) / 1000
    if floor.bound == "compute":
        what, rate, ceiling, unit = "matrix rate", floor.flops / seconds, ceilings.flops_per_s, "FLOP/s"
        above = "fewer multiplications than counted (Winograd), or the ceiling was measured on a busy machine"
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
    """Whether both files say that they have the same weights."""
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
