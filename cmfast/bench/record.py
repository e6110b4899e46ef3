# SPDX-License-Identifier: MIT
"""The record of a comparison: every figure with the machine, the versions and the request that it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmfast.bench.diagnosis import DeviceMedians
from cmfast.bench.failures import LeftOut
from cmfast.bench.request import Request
from cmfast.bench.roofline import Ceilings

INCLUDED = {  # what the figures of a record mean
    "median_ms": "host wall time from numpy noise to numpy images, transfers in and out included",
    "device_times": "medians over calls after the timing, each call the sum of the backend's runs in it; host_ms and "
    "enqueue_ms, which begins with the arrays in page-locked memory, by the host's clock, the rest between CUDA events",
    "flops": "operations of the call: convolutions and matrix products, of all steps and images",
    "floor_ms": "the larger of operations over the measured matrix rate and bytes over the measured bandwidth",
    "of_roofline": "floor_ms / median_ms",
    "alone": "timed after the others instead of in turns with them, because the device's memory was short",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one setting. Times are of a call: host wall time, numpy noise in, numpy images out."""

    contender: str  # a file's name, or a backend's for the baseline; with the variant
    backend: str
    variant: str  # words of cmfast.backends.VARIANTS; "": the plain way
    dtype: str  # what the network computes in, by a manifest's name
    steps: int  # network calls per image
    sigmas: tuple[float, ...]  # noise levels, data units
    batch: int  # images per call
    median_ms: float
    p10_ms: float
    p90_ms: float
    max_ms: float
    calls: int  # counted
    images_per_s: float
    reference: str  # the contender that outputs and speed are compared with
    times_as_fast: float  # the reference's median over this one
    reference_same_precision: str | None  # eager PyTorch in the same dtype; None: was not timed
    times_as_fast_same_precision: float | None
    max_abs_diff: float  # from the reference, images in [-1, 1]
    tolerance: float
    alone: bool  # timed after the others, because memory was short beside them
    device_times: DeviceMedians | None  # None: on a CPU, or the backend has none
    flops: float | None  # operations of the call; None: the file has no cost
    floor_ms: float | None  # the least time on this machine (`cmfast.bench.roofline`)
    floor_bound: str | None  # compute or memory
    of_roofline: float | None  # floor_ms over median_ms
    diagnosis: str | None  # what takes the time, in words


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a contender costs to start, measured in a process of its own."""

    contender: str
    file: str
    file_mib: float
    kind: str  # denoiser or sampler
    dtype: str
    image: list[int]  # [C, H, W]
    source: dict[str, Any]  # a manifest's
    backend: str
    variant: str
    steps: int  # of the first call
    batch: int
    load_s: float  # with the import of the backend's library
    first_call_ms: float
    peak_mib: float | None  # largest resident memory; None: the system does not report it
    peak_gpu_mib: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `compare` measured."""

    date: str  # UTC, ISO 8601
    machine: dict[str, Any]  # cmfast.bench.timing.machine
    versions: dict[str, str]  # of cmfast and what it runs on
    commit: dict[str, Any] | None  # of the source tree; None: an installed package
    request: Request
    load_average: float | None  # of the last minute; None: the system does not report it
    steal: float | None  # fraction of CPU time that the host gave to other machines
    warning: str | None  # why small differences should not be believed
    ceilings: tuple[Ceilings, ...]  # of the device, by dtype
    rows: tuple[Row, ...]  # by setting, the reference first
    starts: tuple[Start, ...]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> str:
        """Return the record as JSON. It has the names of files, not their folders.

        Returns:
            JSON, indented.
        """
        values = asdict(self)
        options = values.pop("request") | {
            "models": [file.name for file in self.request.models],
            "baseline": self.request.baseline.name if self.request.baseline else None,
        }
        return json.dumps({"what": "sample", "options": options, "included": INCLUDED} | values, indent=1)

    def save(self, path: Path) -> None:
        """Write the record as a .json file, whole or not at all.

        Args:
            path: the file.
        """
        from cmfast.files import write_text

        write_text(path, self.to_json() + "\n")
