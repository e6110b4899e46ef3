# SPDX-License-Identifier: MIT
"""The record of the CPU suite: what was measured, with the machine, the versions and the request that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmfast.bench.failures import LeftOut
from cmfast.bench.roofline import Ceilings
from cmfast.bench.suite.request import SuiteRequest
from cmfast.errors import BackendError, CheckFailed

INCLUDED = {  # what the figures of a record mean
    "calls": "one network call at sigma_max, numpy to numpy, contenders in turns",
    "decibels": "PSNR from the reference by noise level, the peak 2 for images in [-1, 1]; 200: equal to the bit",
    "cpu_median_ms": "CPU time of all threads of the process, median over the calls",
    "of_rate": "operations of the network over the wall time, as a share of the highest rate of matrix products that "
    "this machine reached in the row's lowest precision, with as many threads, in the same run",
    "images": "from unit noise to samples in data units, numpy to numpy, by the number of network calls; heun: the "
    "baseline by Heun's method, as a teacher is sampled",
    "beside": "what sampling does beside the network: noise for a batch, and samples to uint8",
    "of_fastest": "its time as a share of the fastest contender's network call of the same batch",
    "processes": "as many processes at a time, each with cores of its own; images_per_s of all together",
}


@dataclass(frozen=True, kw_only=True)
class Wall:
    """Wall and CPU times of one contender at one setting, ms."""

    wall_median_ms: float
    wall_p10_ms: float
    wall_p90_ms: float
    wall_max_ms: float
    wall_calls: int  # counted
    cpu_median_ms: float


@dataclass(frozen=True, kw_only=True)
class CallRow(Wall):
    """One network call of a contender."""

    contender: str
    backend: str
    precision: str  # what it computes in, in words
    reference: str  # the contender that it is compared with: the first that ran at that setting
    threads: int
    batch: int
    decibels: dict[str, float]  # from the reference, by noise level
    images_per_s: float
    times_as_fast: float  # the reference's wall time over this one
    times_less_cpu: float  # the reference's CPU time over this one
    of_rate: float | None  # share of the machine's rate; None: the operations or the rate are unknown


@dataclass(frozen=True, kw_only=True)
class ImageRow(Wall):
    """Whole images of a contender."""

    contender: str
    precision: str
    reference: str | None  # the contender that it is compared with; None: another algorithm
    threads: int
    batch: int
    steps: int | None  # of the few-step loop
    heun: int | None  # steps of Heun's method
    network_calls: int
    decibels: float | None  # from the reference's samples of the same steps; None: another algorithm
    times_as_fast: float | None  # the reference's wall time of the same steps over this one


@dataclass(frozen=True, kw_only=True)
class BesideRow(Wall):
    """Work of sampling beside the network."""

    what: str
    batch: int
    of_fastest: float


@dataclass(frozen=True, kw_only=True)
class StartRow:
    """What a contender costs to start, in a process of its own."""

    contender: str
    threads: int
    batch: int
    load_s: float  # with the import of its library
    first_call_ms: float
    peak_mib: float | None  # largest resident memory; None: the system does not report it


@dataclass(frozen=True, kw_only=True)
class ProcessRow:
    """Several processes of a contender at a time."""

    contender: str
    processes: int
    threads: int  # of each
    cores: list[list[int]] | None  # that each was pinned to; None: the system cannot pin
    batch: int
    images_per_s: float
    cpu_ms_per_image: float
    peak_mib: float | None  # of all together


@dataclass(frozen=True, kw_only=True)
class SuiteRecord:
    """What `run_suite` measured."""

    date: str  # UTC, ISO 8601
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    request: SuiteRequest
    files: dict[str, str]  # names by kind
    reference: str  # the contender that the others are compared with at the first setting; each row names its own
    sample_arguments: str  # of cmfast-sample, beside the file: values of conditions, where the data go
    flops: float | None  # operations of one image and one network call; None: unknown
    load_average: float | None
    steal: float | None
    warning: str | None  # why small differences should not be believed
    rates: tuple[tuple[int, Ceilings], ...]  # by number of threads
    calls: tuple[CallRow, ...]
    images: tuple[ImageRow, ...]
    beside: tuple[BesideRow, ...]
    starts: tuple[StartRow, ...]
    processes: tuple[ProcessRow, ...]
    left_out: tuple[LeftOut, ...]
    failed: LeftOut | None  # the first failure without keep_going after something had been timed: `raise_failure`
    evaluations: tuple[Mapping[str, Any], ...] = field(default=())  # records of cmfast-eval, as they were passed

    def to_json(self) -> str:
        """Return the record as JSON. It has the names of files, not their folders.

        Returns:
            JSON, indented.
        """
        values = asdict(self)
        request = values.pop("request")
        request |= {
            "models": [file.name for file in self.request.models],
            "baseline": self.request.baseline.name if self.request.baseline else None,
            "evaluations": [file.name for file in self.request.evaluations],
            "keep": None if self.request.keep is None else self.request.keep.name,
        }
        values["rates"] = [{"threads": threads, **asdict(each)} for threads, each in self.rates]
        return json.dumps({"what": "cpu_suite", "options": request, "included": INCLUDED} | values, indent=1)

    def raise_failure(self) -> None:
        """Raise what a run without keep_going ends with; call it when the record is saved.

        Raises:
            CheckFailed: a contender computes something else than the reference.
            BackendError: a contender failed.
        """
        if self.failed:
            kind = CheckFailed if self.failed.what == "images" else BackendError
            raise kind(f"{self.failed}; the rest was measured")

    def save(self, path: Path) -> None:
        """Write the record as a .json file, whole or not at all.

        Args:
            path: the file.
        """
        from cmfast.files import write_text

        write_text(path, self.to_json() + "\n")
