# SPDX-License-Identifier: MIT
"""The tests marked gpu as items: a line for each as soon as it has run, also for one that hangs or crashes.

A file that cannot be imported because a library is missing becomes a line, and the other files run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cmfast.errors import one_line
from gpu_items import END_S, GONE, cuda_works, end_with_parent, say
from gpu_lines import ROOT, Lines

LIMIT_S = 90.0  # per test
FIRST = "test_gpu.py"  # of the files
LEAST_S = 5.0  # a test is not started with less time left
ARGUMENTS = ("-m", "gpu and not slow", "--continue-on-collection-errors", "-q", "-p", "no:cacheprovider", "--tb=short")


def run_tests(files: Sequence[str], wanted: str, lines: Lines, until: float, pipe: int) -> int:
    """Run the tests marked gpu in these files that have no line yet; return the exit status of the worker.

    Args:
        files: test files.
        wanted: texts separated by commas; the name of a test must contain one.
        lines: the output.
        until: when the budget ends, by time.monotonic().
        pipe: where the supervisor reads what is running.
    """
    end_with_parent()
    os.chdir(ROOT)
    plugin = _Lines(wanted.split(","), lines, until, pipe)
    pytest.main([*ARGUMENTS, *files], plugins=[plugin])
    return GONE if plugin.gone else 0


def files_with_gpu_tests() -> list[str]:
    """Return the test files that have the mark, or say so where a fixture brings it; tests/gpu/test_gpu.py first."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.gpu" in text or "pytest -m gpu" in text:
            found.append(file.relative_to(ROOT).as_posix())
    return sorted(found, key=lambda name: not name.endswith(FIRST))


class _Lines:
    """A pytest plugin that writes the lines."""

    def __init__(self, wanted: list[str], lines: Lines, until: float, pipe: int) -> None:
        self._wanted = wanted
        self._lines, self._until, self._pipe = lines, until - END_S, pipe
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._begun = time.monotonic()
        self.gone = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a line for a file that cannot be imported."""
        name = f"collect {report.nodeid}"
        if report.failed and name not in self._lines.done:
            why = str(report.longrepr).strip().splitlines() or ["?"]
            self._write(name, 0.0, {"error": one_line(why[-1])})

    @pytest.hookimpl(trylast=True)  # the project's own hook puts files that take long first
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Deselect tests that have a line or are not wanted; put the most valuable file first."""
        items[:] = [
            item
            for item in items
            if item.nodeid not in self._lines.done and any(text in item.nodeid for text in self._wanted)
        ]
        items.sort(key=lambda item: item.path.name != FIRST)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Tell the supervisor what starts; skip it if there is no time or CUDA is unusable."""
        left = self._until - time.monotonic()
        if self.gone:
            return True
        if left < LEAST_S:
            self._lines.write({"item": item.nodeid, "skipped": f"{max(left, 0):.1f} s of the budget were left"})
            return True
        self._begun = time.monotonic()
        say(self._pipe, f"{min(self._begun + LIMIT_S, self._until + END_S)} {item.nodeid}")
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the line of a test after its last phase."""
        reports = self._reports.setdefault(report.nodeid, [])
        reports.append(report)
        if report.when != "teardown":
            return
        values: dict[str, Any] = {"kind": "test", "ok": True}
        for each in reports:
            if each.failed:
                values = {"error": _reason(each)}
                break
            if each.skipped:
                values = {"not_here": _reason(each)}
        self._write(report.nodeid, time.monotonic() - self._begun, values)
        if "error" in values and not cuda_works():
            self.gone = True

    def _write(self, name: str, seconds: float, values: dict[str, Any]) -> None:
        self._lines.done.add(name)
        self._lines.write({"item": name, "seconds": round(seconds, 3), **values})


def _reason(report: pytest.TestReport) -> str:
    """Return why a test failed or was skipped, in one line without this machine's folders."""
    found = report.longrepr
    if isinstance(found, tuple):  # for a skip: file, line, reason
        return one_line(str(found[2]).removeprefix("Skipped: "))
    crash = getattr(found, "reprcrash", None)
    return one_line(str(crash.message if crash is not None else found).replace(f"{Path.cwd()}/", ""))
