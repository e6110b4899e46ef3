# SPDX-License-Identifier: MIT
"""Shows a record: tables in a terminal, a chart."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cmfast.bench.chart import chart_text, save_chart
from cmfast.bench.diagnosis import BUSY, FAR, FAR_WHY
from cmfast.bench.record import Record, Row, Start
from cmfast.errors import MissingDependency

T = TypeVar("T")
Columns = dict[str, Callable[[T], str]]

_WHERE: Columns[Row] = {
    "steps": lambda row: str(row.steps),
    "batch": lambda row: str(row.batch),
    "contender": lambda row: row.contender,
}
_TEXTS = ("contender", "work", "diagnosis", "backend", "weights")  # the others are numbers


def show(record: Record) -> None:
    """Print the record as tables: sampling; if they are known, times on the GPU and reasons; starting."""
    rows = record.rows
    references = " or ".join(dict.fromkeys(row.reference for row in rows))
    columns: Columns[Row] = {
        "median": lambda row: f"{row.median_ms:,.2f}",
        "p10": lambda row: f"{row.p10_ms:,.2f}",
        "p90": lambda row: f"{row.p90_ms:,.2f}",
        "images/s": lambda row: f"{row.images_per_s:,.1f}",
        "speed": lambda row: f"{row.times_as_fast:.2f}x",
        "same type": lambda row: or_dash(row.times_as_fast_same_precision, "{:.2f}x"),
        "roofline": lambda row: or_dash(row.of_roofline, "{:.0%}"),
        "difference": lambda row: f"{row.max_abs_diff:.1e}",
    }
    if all(row.reference_same_precision in (None, row.reference) for row in rows):
        del columns["same type"]  # it would repeat the speed
    if all(row.of_roofline is None for row in rows):
        del columns["roofline"]
    title = f"Sampling: times of a batch, ms; speed against {references}"
    if "same type" in columns:
        title += ", and against eager PyTorch of the same type"
    print_table(title, _WHERE | columns, rows)
    _print_device_times([row for row in rows if row.device_times])
    _print_diagnoses([row for row in rows if row.diagnosis])
    _print_starts(record.starts)


def _print_device_times(rows: Sequence[Row]) -> None:
    parts = ("host", "enqueue", "copy_in", "compute", "copy_out")
    columns: Columns[Row] = {part.replace("_", " "): functools.partial(_device_time, f"{part}_ms") for part in parts}
    print_table("On the GPU: times of a batch, ms", _WHERE | columns, rows)


def _device_time(name: str, row: Row) -> str:
    return f"{getattr(row.device_times, name):,.3f}"


def _print_diagnoses(rows: Sequence[Row]) -> None:
    """Print what takes the time; what is the same for all that are far from the roofline once, below."""

    def diagnosis(row: Row) -> str:
        return (row.diagnosis or "").removeprefix(f"{FAR}: ").removesuffix(f"; {FAR_WHY}")

    far = any((row.diagnosis or "").startswith(FAR) for row in rows)
    below = f"below {BUSY:.0%} is {FAR}: {FAR_WHY}" if far else ""
    print_table("What takes the time", _WHERE | {"diagnosis": diagnosis}, rows, below)


def _print_starts(starts: Sequence[Start]) -> None:
    columns: Columns[Start] = {
        "contender": lambda start: start.contender,
        "backend": lambda start: start.backend,
        "weights": lambda start: start.dtype,
        "file, MiB": lambda start: f"{start.file_mib:.1f}",
        "load, s": lambda start: f"{start.load_s:.2f}",
        "first call": lambda start: f"{start.steps} x batch {start.batch}",
        "ms": lambda start: f"{start.first_call_ms:,.1f}",
        "peak RAM, MiB": lambda start: or_dash(start.peak_mib, "{:.0f}"),
        "GPU, MiB": lambda start: or_dash(start.peak_gpu_mib, "{:.0f}"),
    }
    if all(start.peak_gpu_mib is None for start in starts):
        del columns["GPU, MiB"]
    print_table("Starting: each in a process of its own", columns, starts)


def print_table(title: str, columns: Columns[T], rows: Sequence[T], below: str = "") -> None:
    """Print one table with a line below it, unless it would be empty."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=SIMPLE, title=escape(title), caption=escape(below) or None)
    for name in columns:
        left = name in _TEXTS
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in rows:
        table.add_row(*(escape(text(row)) for text in columns.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw(record: Record, path: Path) -> None:
    """Write a chart: a panel per setting, a bar per contender, a line from p10 to p90."""
    need_matplotlib()
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(row.steps for row in record.rows))
    batches = list(dict.fromkeys(row.batch for row in record.rows))
    most = max(sum((r.steps, r.batch) == (n, b) for r in record.rows) for n in steps for b in batches)
    size = (4.8 * len(batches), (1.0 + 0.36 * most) * len(steps) + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(steps), len(batches), squeeze=False)
    for i, n in enumerate(steps):
        for j, b in enumerate(batches):
            axes = panels[i][j]
            rows = [row for row in record.rows if (row.steps, row.batch) == (n, b)]
            if not rows:
                axes.set_axis_off()
                continue
            medians = [row.median_ms for row in rows]
            low = [row.median_ms - row.p10_ms for row in rows]
            high = [row.p90_ms - row.median_ms for row in rows]
            colours = ["#888888" if row.contender == row.reference else "#3b76af" for row in rows]
            names = [chart_text(row.contender) for row in rows]
            bars = axes.barh(names, medians, color=colours, xerr=[low, high], capsize=2)
            axes.bar_label(bars, [f" {row.times_as_fast:.2f}x" for row in rows], padding=2, fontsize=8)
            axes.set_title(f"{n} step(s), batch {b}", fontsize=9)
            axes.set_xlabel("ms a batch: median, p10 to p90", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.margins(x=0.18)
            axes.invert_yaxis()
    machine = record.machine
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, {record.request.device}", fontsize=8)
    save_chart(figure, path)


def need_matplotlib() -> None:
    """Raise MissingDependency, before any timing, if no chart could be drawn."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingDependency("--plot", "matplotlib", "plot")
