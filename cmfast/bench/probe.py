# SPDX-License-Identifier: MIT
"""Measures what a model costs to start, in a process of its own that `starts` runs:

    python -m cmfast.bench.probe '{"file": "model.onnx", "device": "cpu", "threads": null, "variant": "",
                                  "precision": "", "sigmas": [80.0], "batch": 1}'

prints {"load_s": ..., "first_call_ms": ..., "peak_mib": ..., "peak_gpu_mib": ...}. Loading includes the import of the
backend's library.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cmfast.backends import open_backend
from cmfast.conditions import some_values
from cmfast.model import Model
from cmfast.noise import slices


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A file, the way to open it, and its first call."""

    file: str
    device: str
    threads: int | None
    variant: str
    precision: str
    sigmas: tuple[float, ...]  # noise levels, data units
    batch: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a process spent on it."""

    load_s: float
    first_call_ms: float
    peak_mib: float | None  # largest resident memory
    peak_gpu_mib: float | None


def probe(launch: Launch) -> Cost:
    """Load a model and sample once; return what that cost this process."""
    start = time.perf_counter()
    model = Model(
        open_backend(launch.file, launch.device, launch.threads, variant=launch.variant, precision=launch.precision)
    )
    loaded = time.perf_counter()
    noise = slices(0, range(launch.batch), len(launch.sigmas), model.spec.shape)
    conditions = some_values(model.spec.conditions, launch.batch)
    call = time.perf_counter()
    model.from_noise(noise, launch.sigmas, conditions=conditions)
    end = time.perf_counter()
    return Cost(
        load_s=loaded - start,
        first_call_ms=1000 * (end - call),
        peak_mib=peak_mib(),
        peak_gpu_mib=gpu_mib() if launch.device == "cuda" else None,
    )


def peak_mib() -> float | None:
    """Return the largest resident memory of this process so far, MiB; None: the system does not report it."""
    try:
        # ru_maxrss of a child begins at the size of the parent that started it (Linux); this line begins anew.
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def gpu_mib() -> float | None:
    """Return the GPU memory of this process, MiB; None: nvidia-smi does not report it, as in most containers.

    It is the current memory, CUDA's own included; after a call that is about the peak, because backends keep it.
    """
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(rf"^{os.getpid()}, (\d+)$", done.stdout, re.MULTILINE)  # a line for each card
    return float(sum(map(int, found))) if found else None


def main() -> None:
    """Read a Launch as JSON from the command line; print its Cost as one line of JSON."""
    print(json.dumps(asdict(probe(Launch(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
