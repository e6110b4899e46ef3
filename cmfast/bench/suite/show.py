# SPDX-License-Identifier: MIT
"""Shows a record of the CPU suite: tables in a terminal, latency against quality as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmfast.bench.chart import chart_text, save_chart
from cmfast.bench.report import Columns, need_matplotlib, or_dash, print_table
from cmfast.bench.suite.record import BesideRow, CallRow, ImageRow, ProcessRow, StartRow, SuiteRecord

TOP_DB = 80.0  # of the chart: what is closer to the reference is drawn here


def show(record: SuiteRecord) -> None:
    """Print the record as tables."""
    for threads in dict.fromkeys(row.threads for row in record.calls):
        _show_calls(record, threads)
    images: Columns[ImageRow] = {
        "contender": lambda row: row.contender,
        "steps": lambda row: f"Heun {row.heun}" if row.heun else str(row.steps),
        "median": lambda row: f"{row.wall_median_ms:,.2f}",
        "p10": lambda row: f"{row.wall_p10_ms:,.2f}",
        "p90": lambda row: f"{row.wall_p90_ms:,.2f}",
        "CPU": lambda row: f"{row.cpu_median_ms:,.2f}",
        "speed": lambda row: or_dash(row.times_as_fast, "{:.2f}x"),
        "dB": lambda row: or_dash(row.decibels, "{:.0f}"),
    }
    if record.images:
        first = record.images[0]
        title = f"Whole images from noise, ms: batch {first.batch}, {first.threads} thread(s)"
        print_table(title, images, record.images)
    beside: Columns[BesideRow] = {
        "work": lambda row: row.what,
        "batch": lambda row: str(row.batch),
        "median": lambda row: f"{row.wall_median_ms:,.3f}",
        "CPU": lambda row: f"{row.cpu_median_ms:,.3f}",
        "of the fastest call": lambda row: f"{row.of_fastest:.1%}",
    }
    print_table("Beside the network, ms", beside, record.beside)
    starts: Columns[StartRow] = {
        "contender": lambda row: row.contender,
        "load, s": lambda row: f"{row.load_s:.2f}",
        "first call, ms": lambda row: f"{row.first_call_ms:,.1f}",
        "peak RAM, MiB": lambda row: or_dash(row.peak_mib, "{:.0f}"),
    }
    print_table("Starting: each in a process of its own", starts, record.starts)
    processes: Columns[ProcessRow] = {
        "contender": lambda row: row.contender,
        "processes": lambda row: str(row.processes),
        "threads each": lambda row: str(row.threads),
        "images/s": lambda row: f"{row.images_per_s:,.1f}",
        "CPU ms/image": lambda row: f"{row.cpu_ms_per_image:,.2f}",
        "peak RAM, MiB": lambda row: or_dash(row.peak_mib, "{:.0f}"),
    }
    if record.processes:
        print_table(f"Several processes, batch {record.processes[0].batch}", processes, record.processes)


def _show_calls(record: SuiteRecord, threads: int) -> None:
    calls: Columns[CallRow] = {
        "contender": lambda row: row.contender,
        "batch": lambda row: str(row.batch),
        "median": lambda row: f"{row.wall_median_ms:,.2f}",
        "p10": lambda row: f"{row.wall_p10_ms:,.2f}",
        "p90": lambda row: f"{row.wall_p90_ms:,.2f}",
        "CPU": lambda row: f"{row.cpu_median_ms:,.2f}",
        "speed": lambda row: f"{row.times_as_fast:.2f}x",
        "by CPU": lambda row: f"{row.times_less_cpu:.2f}x",
        "of rate": lambda row: or_dash(row.of_rate, "{:.0%}"),
        "dB": lambda row: f"{min(row.decibels.values()):.0f}",
    }
    rates = [
        f"{each.dtype} {each.flops_per_s / 1e9:,.0f}" for n, each in record.rates if n == threads and each.flops_per_s
    ]
    below = f"measured rates, GFLOP/s: {', '.join(rates)}" if rates else ""
    rows = [row for row in record.calls if row.threads == threads]
    references = " or ".join(dict.fromkeys(row.reference for row in rows))
    print_table(f"One network call, {threads} thread(s), ms; speed against {references}", calls, rows, below)


def draw(record: SuiteRecord, path: Path) -> None:
    """Write a chart: time of a batch against quality, a curve for each contender, a point for each number of steps.

    Quality is the Fréchet distance where records of cmfast-eval were passed, else the PSNR from the reference's samples
    of the same number of steps, which shows the precision alone. The far point is Heun's method with the reference.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    few = [row for row in record.images if row.heun is None]
    for index, name in enumerate(dict.fromkeys(row.contender for row in few)):
        rows = [row for row in few if row.contender == name]
        points = [(row.wall_median_ms, quality) for row in rows if (quality := _quality(record, row)) is not None]
        if points:
            x, y = zip(*points, strict=True)
            marker = "osv^D"[index // 10 % 5]
            axes.plot(x, y, color=f"C{index % 10}", marker=marker, markersize=4, label=chart_text(name))
    for row in (row for row in record.images if row.heun):
        name, quality = f"{row.contender}, Heun {row.heun} ({row.network_calls} calls)", _quality(record, row)
        if quality is None:
            axes.axvline(row.wall_median_ms, color="#888888", linestyle="--", label=chart_text(name))
        else:
            axes.plot([row.wall_median_ms], [quality], "*", color="#c1563c", markersize=9, label=chart_text(name))
    axes.set_xscale("log")
    steps = ", ".join(str(k) for k in sorted({row.steps for row in few if row.steps}))
    batch = record.images[0].batch if record.images else record.request.batch[0]
    axes.set_xlabel(f"ms a batch of {batch}; the points of a curve: {steps} step(s)")
    axes.set_ylabel(_quality_name(record))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    machine, threads = record.machine, record.request.every_threads[0]
    figure.suptitle(chart_text(f"{machine['cpu']}, {threads} thread(s)"), fontsize=8)
    save_chart(figure, path)


def _quality_name(record: SuiteRecord) -> str:
    if not record.evaluations:
        references = " or ".join(dict.fromkeys(row.reference for row in record.images if row.reference))
        return f"PSNR from {chart_text(references)} of the same steps, dB (at most {TOP_DB:g})"
    first = record.evaluations[0]
    return chart_text(f"Fréchet distance to {first['data_set']} (features: {first['features']['name']})")


def _quality(record: SuiteRecord, row: ImageRow) -> float | None:
    """Return the quality of a row: by the evaluation of its own file, except int8 else of any; None: unknown."""
    if not record.evaluations:
        return None if row.decibels is None else min(row.decibels, TOP_DB)
    kind = "int8" if "int8" in row.precision else "float"
    file = record.files.get(kind)
    own = [each for each in record.evaluations if each["model"].get("file") == file]
    for evaluation in (*own, *(() if kind == "int8" else record.evaluations)):
        if (found := _distance(evaluation["rows"], row)) is not None:
            return found
    return None


def _distance(rows: Sequence[Mapping[str, Any]], row: ImageRow) -> float | None:
    key, value = ("heun", row.heun) if row.heun else ("steps", row.steps)
    return next((float(each["fd"]) for each in rows if each.get(key) == value), None)
