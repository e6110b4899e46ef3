# SPDX-License-Identifier: MIT
"""What a model costs to start, measured in a process of its own: cmfast-bench runs this module, people do not.

    python -m cmfast.bench.probe '{"file": "model.onnx", "device": "cpu", "threads": null, "variant": "",
                                  "precision": "", "sigmas": [80.0], "batch": 1}'

prints {"load_s": ..., "first_call_ms": ..., "peak_mib": ..., "peak_gpu_mib": ...}. Loading includes the import of the
engine's library.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cmfast.backends import open_backend
from cmfast.model import Model
from cmfast.noise import gaussian


def probe(
    file: str, device: str, threads: int | None, variant: str, precision: str, sigmas: list[float], batch: int
) -> dict[str, float | None]:
    """Load a model, sample once, and return load time (s), time of that call (ms), peak memory of the process (MiB)."""
    start = time.perf_counter()
    model = Model(open_backend(file, device, threads, variant=variant, precision=precision))
    loaded = time.perf_counter()
    noise = np.stack([gaussian(0, range(batch), step, model.spec.image) for step in range(len(sigmas))])
    label = model.labels(batch)
    call = time.perf_counter()
    model.from_noise(noise, sigmas, label)
    end = time.perf_counter()
    return {
        "load_s": loaded - start,
        "first_call_ms": 1000 * (end - call),
        "peak_mib": peak_mib(),
        "peak_gpu_mib": gpu_mib() if device == "cuda" else None,
    }


def peak_mib() -> float | None:
    """Return the largest resident memory of this process so far, MiB; None where the system does not tell."""
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
    """Return the GPU memory of this process, MiB; None where nvidia-smi does not tell, as in most containers.

    It is the memory of now, CUDA's own included; after a call that is about the peak, because engines keep it.
    """
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(rf"^{os.getpid()}, (\d+)$", done.stdout, re.MULTILINE)  # a line for each card
    return float(sum(map(int, found))) if found else None


def main() -> None:
    """Read the request from the command line, print the costs as one line of JSON."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(probe(**request)))


if __name__ == "__main__":
    main()
