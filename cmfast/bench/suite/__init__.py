# SPDX-License-Identifier: MIT
"""The CPU suite: every way to run one model on this CPU, measured in turns. `cmfast-bench --suite cpu` is on top.

    record = run_suite(SuiteRequest(baseline=Path("model.pt"), batch=(1, 8)), print)
    for row in record.calls:
        print(row.contender, row.batch, row.wall_median_ms, row.cpu_median_ms, row.times_as_fast, row.of_rate)

`ways` is the table of contenders, `files` exports what they read, `opening` opens them, `measure` compares and times,
`apart` runs them in processes of their own, `suite` puts it together. The method is in benchmarks/README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast import lazily

if TYPE_CHECKING:
    from cmfast.bench.suite.record import SuiteRecord
    from cmfast.bench.suite.request import SuiteRequest
    from cmfast.bench.suite.suite import run_suite

_HOMES = {"SuiteRecord": "record", "SuiteRequest": "request", "run_suite": "suite"}
__all__ = ["SuiteRecord", "SuiteRequest", "run_suite"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
