# SPDX-License-Identifier: MIT
"""Timing that you can trust: contenders interleaved in one process, every counted call kept, the machine described.

    times = interleave({"a": call_a, "b": call_b})     # {"a": [ms, ...], "b": [ms, ...]}
    print(summarise(times["a"]), noise_warning(times))

A machine drifts within seconds (clock, temperature, neighbours), so contenders take turns in short bursts instead of
running one after the other. `cmfast-bench` is the command on top; benchmarks/README.md describes the method.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cmfast
from cmfast.checks import usable_cores
from cmfast.errors import CmfastError

PACKAGES = (
    "numpy",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "openvino",
    "ncnn",
    "onnx",
    "diffusers",
)

BURST_S = 0.05  # a burst ends after this time and at least BURST_CALLS counted calls
BURST_CALLS = 3  # fewer if the calls take LONG_S together
LONG_S = 1.0
FEW = 5  # calls that are enough if they take `most_s`
PAUSE_S = 0.02  # between bursts: thread pools spin on for a while after their last call, and would steal the core

MAX_SPREAD = 1.3  # p90 / p10 of one contender
MAX_LOAD = 1.3  # load average over cores; the contenders alone bring it to 1
MAX_STEAL = 0.01  # fraction of the CPU time that the host gave to other machines


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 3.0,
    calls: int = 20,
    warmup_s: float = 0.3,
    most_s: float = math.inf,
    budget_s: float = math.inf,
    cpu_ms: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Call the contenders in turns and time every call.

    A round is one burst of each contender; the next round begins one contender later. The first call of a burst is
    never counted: caches and thread pools are still the previous contender's.

    Args:
        contenders: the calls to time, by name.
        seconds: least counted time per contender.
        calls: least number of counted calls per contender.
        warmup_s: each is called for this long, and at least twice, before anything is counted.
        most_s: counted time after which FEW calls of a contender are enough.
        budget_s: wall time, with the warm-up, after which no further round begins; there is always one.
        cpu_ms: gets the CPU time of this process in every counted call, by name.

    Returns:
        For each contender the time of every counted call, ms, none dropped.

    Raises:
        CmfastError: there are no contenders, or `seconds` or `calls` is out of range.
    """
    if not contenders:
        raise CmfastError("nothing to time: no contender was given")
    if not (math.isfinite(seconds) and seconds >= 0 and calls >= 1):
        raise CmfastError(f"need seconds >= 0 and calls >= 1, got {seconds} and {calls}")
    end = time.perf_counter() + budget_s
    for call in contenders.values():
        _warm_up(call, min(warmup_s, budget_s / (4 * len(contenders))))
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}

    def enough(each: list[float]) -> bool:
        counted_s = sum(each) / 1000
        return counted_s >= seconds and len(each) >= (min(FEW, calls) if counted_s >= most_s else calls)

    first = 0
    while not all(map(enough, times.values())) and (first == 0 or time.perf_counter() < end):
        turn = first % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE_S)
            burst = _burst(contenders[name])
            times[name] += [wall for wall, _ in burst]
            if cpu_ms is not None:
                cpu_ms.setdefault(name, []).extend(cpu for _, cpu in burst)
        first += 1
    return times


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The times of one contender, ms. Percentiles are interpolated as numpy's are."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    max_ms: float
    calls: int  # counted


def summarise(times_ms: Sequence[float]) -> Summary:
    """Return median, 10th and 90th percentile and the worst of all counted calls.

    Args:
        times_ms: one time per call, ms.

    Returns:
        The summary, ms.

    Raises:
        CmfastError: there are no times.
    """
    ordered = sorted(times_ms)
    if not ordered:
        raise CmfastError("no times to summarise")
    median, p10, p90 = (percentile(ordered, fraction) for fraction in (0.5, 0.1, 0.9))
    return Summary(median_ms=median, p10_ms=p10, p90_ms=p90, max_ms=ordered[-1], calls=len(ordered))


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Return the value below which `fraction` of the sorted values lie, linear between neighbours."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def noise_warning(
    times: Mapping[str, Sequence[float]], *, load: float | None = None, steal: float | None = None
) -> str | None:
    """Return why small differences between these times are not reliable, as one sentence, or None.

    Args:
        times: of every counted call, ms, by contender.
        load: load average of the last minute, at the end (`load_average`); None: unknown.
        steal: fraction of CPU time stolen during the run (`steal_share`); None: unknown.
    """
    reasons = []
    spreads = {name: s.p90_ms / s.p10_ms for name, s in ((n, summarise(t)) for n, t in times.items()) if s.p10_ms > 0}
    worst = max(spreads, key=spreads.__getitem__, default="")
    if worst and spreads[worst] > MAX_SPREAD:
        spread = f"spread by a factor of {spreads[worst]:.2f} from p10 to p90 (above {MAX_SPREAD:g})"
        reasons.append(f"the calls of {worst} {spread}")
    cores = usable_cores()
    if load is not None and load > MAX_LOAD * cores:
        reasons.append(f"the load average is {load:.1f} on {cores} core(s)")
    if steal is not None and steal > MAX_STEAL:
        reasons.append(f"the host gave {steal:.1%} of the CPU time to other machines")
    return f"the machine is too noisy to trust small differences: {'; '.join(reasons)}" if reasons else None


def provenance() -> dict[str, Any]:
    """Return what a record carries beside its numbers: date, machine, versions, commit."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "machine": machine(), "versions": versions(), "commit": commit()}


def machine() -> dict[str, Any]:
    """Return CPU model, usable cores, RAM (GiB), OS, Python and GPU; None: unknown.

    For the GPU: name, driver, compute capability and memory (MiB). With several, all names and the rest of the first.
    """
    gpu = _nvidia_smi("name", "driver_version")
    more = _nvidia_smi("compute_cap", "memory.total")  # drivers from before 2021 lack the first
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "ram_gib": _ram_gib(),
        "os": _system(),
        "python": platform.python_version(),
        "gpu": "; ".join(row[0] for row in gpu) if gpu else None,
        "driver": gpu[0][1] if gpu else None,
        "compute_capability": more[0][0] if more else None,
        "gpu_memory_mib": float(more[0][1]) if more and more[0][1].isdecimal() else None,
    }


def versions() -> dict[str, str]:
    """Return the installed versions of cmfast and of the libraries it runs on, without importing them."""
    found = {"cmfast": cmfast.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any] | None:
    """Return {"commit": ..., "dirty": ...} of the source tree that this cmfast was imported from; None outside git.

    Dirty: the code differs from that commit; records of benchmarks are not code. For a copy of the tree, CMFAST_COMMIT
    says what it is a copy of, as `git describe --always --dirty --abbrev=40` prints it. It takes precedence over git,
    whose history a copy may lack or have from another day.
    """
    if given := os.environ.get("CMFAST_COMMIT", ""):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    here = Path(__file__).resolve().parent
    if _output("git", "-C", str(here), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed into an environment that happens to be inside another repository
    head = _output("git", "-C", str(here), "rev-parse", "HEAD")
    code = (":(top)cmfast", ":(top)train", ":(top)export", ":(top)benchmarks", ":(top,exclude)benchmarks/results")
    status = _output("git", "-C", str(here), "status", "--porcelain", "--", *code)
    return None if head is None else {"commit": head, "dirty": status != ""}


def load_average() -> float | None:
    """Return the load average of the last minute; None: the system keeps none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_ticks() -> tuple[int, int] | None:
    """Return (stolen, all) CPU time since boot, in ticks; None: the system does not report it (other than Linux)."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    fields = [int(field) for field in line.split()[1:9]]  # user nice system idle iowait irq softirq steal
    return (fields[7], sum(fields)) if len(fields) == 8 else None


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Return the fraction of CPU time stolen between two readings of `cpu_ticks`; None: unknown."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _warm_up(call: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    call()
    call()
    while time.perf_counter() < end:
        call()


def _burst(call: Callable[[], object]) -> list[tuple[float, float]]:
    """Return wall and CPU time of the counted calls, ms."""
    call()
    times: list[tuple[float, float]] = []
    counted_ms = 0.0
    while counted_ms < 1000 * (LONG_S if len(times) < BURST_CALLS else BURST_S):
        cpu, start = time.process_time_ns(), time.perf_counter_ns()
        call()
        end = time.perf_counter_ns()
        times.append(((end - start) / 1e6, (time.process_time_ns() - cpu) / 1e6))
        counted_ms += times[-1][0]
    return times


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return found[1].strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine() or None


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _system() -> str:
    release = re.match(r"[\d.]*\d", platform.release())  # what follows may name the host
    kernel = " ".join(part for part in (platform.system(), release[0] if release else "", platform.machine()) if part)
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _nvidia_smi(*properties: str) -> list[list[str]]:
    """Return the properties of each GPU; nothing where there is none or nvidia-smi does not know them."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(properties)}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in (text or "").splitlines()]
    return [row for row in rows if len(row) == len(properties)]


def _output(*command: str) -> str | None:
    """Return what a program prints; None where it is missing, fails, or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
