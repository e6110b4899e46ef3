# SPDX-License-Identifier: MIT
"""Measuring as a library: compare how fast model files sample, and why. `cmfast-bench` is the command on top.

    from pathlib import Path
    from cmfast.bench import Request, compare

    record = compare(Request(models=(Path("model.onnx"),), baseline=Path("model.pt"), steps=(1, 2), batch=(8,)))
    for row in record.rows:
        print(f"{row.contender}, {row.steps} step(s): {row.median_ms:.2f} ms, {row.times_as_fast:.2f}x")
    record.save(Path("bench.json"))

`run_suite` measures every way to run a model on a CPU: `cmfast.bench.suite`. `interleave` times any functions in turns.
The names below are public; each is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast import lazily

if TYPE_CHECKING:
    from cmfast.bench.comparison import compare
    from cmfast.bench.diagnosis import DeviceMedians
    from cmfast.bench.failures import LeftOut
    from cmfast.bench.fastest import Choice, FastestBackend, Tried
    from cmfast.bench.record import Record, Row, Start
    from cmfast.bench.request import Request
    from cmfast.bench.roofline import Ceilings, Floor, floor_ms, measure_machine
    from cmfast.bench.suite.record import SuiteRecord
    from cmfast.bench.suite.request import SuiteRequest
    from cmfast.bench.suite.suite import run_suite
    from cmfast.bench.timing import Summary, interleave, summarise

_HOMES = {  # the modules of the names below
    "Ceilings": "roofline",
    "Choice": "fastest",
    "DeviceMedians": "diagnosis",
    "FastestBackend": "fastest",
    "Floor": "roofline",
    "LeftOut": "failures",
    "Record": "record",
    "Request": "request",
    "Row": "record",
    "Start": "record",
    "SuiteRecord": "suite.record",
    "SuiteRequest": "suite.request",
    "Summary": "timing",
    "Tried": "fastest",
    "compare": "comparison",
    "floor_ms": "roofline",
    "interleave": "timing",
    "measure_machine": "roofline",
    "run_suite": "suite.suite",
    "summarise": "timing",
}
__all__ = [
    "Ceilings",
    "Choice",
    "DeviceMedians",
    "FastestBackend",
    "Floor",
    "LeftOut",
    "Record",
    "Request",
    "Row",
    "Start",
    "SuiteRecord",
    "SuiteRequest",
    "Summary",
    "Tried",
    "compare",
    "floor_ms",
    "interleave",
    "measure_machine",
    "run_suite",
    "summarise",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
