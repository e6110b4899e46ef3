# SPDX-License-Identifier: MIT
"""What cmfast-eval says: a line for each number of network calls, and quality and time against it as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmfast.bench.chart import chart_text, save_chart

COLUMNS = {  # of a row: heading, format
    "fd": ("Frechet", "{:.4g}"),
    "kid_mean": ("KID", "{:.3g}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "is_mean": ("score", "{:.3f}"),
    "ms_per_image": ("ms/image", "{:.3g}"),
}
WIDTH = 11
NAME_WIDTH = 22


def heading(metrics: Sequence[str]) -> str:
    """Return the first line of the table."""
    shown = {"fd": ("fd",), "kid": ("kid_mean",), "pr": ("precision", "recall"), "is": ("is_mean",)}
    names = [name for metric, names in shown.items() if metric in metrics for name in names]
    return _line("", [COLUMNS[name][0] for name in (*names, "ms_per_image")])


def line(row: Mapping[str, Any]) -> str:
    """Return a row of the table: samples of a model, of a file, or one half of the data."""
    if "steps" in row:
        name = f"{row['steps']} step(s)"
    elif "heun" in row:
        name = f"Heun {row['heun']}, {row['calls']} calls"
    else:
        name = str(row["name"])
    return _line(name, [form.format(row[key]) for key, (_, form) in COLUMNS.items() if key in row])


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write a chart: Frechet distance, and ms an image, against network calls; a curve for each way to sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    quality, speed = figure.subplots(1, 2)
    for key, name, colour in (("steps", "few-step", "#3b76af"), ("heun", "Heun", "#c1563c")):
        rows = sorted((row for row in record["rows"] if key in row), key=lambda row: row["calls"])
        if rows:
            calls = [row["calls"] for row in rows]
            quality.plot(calls, [row["fd"] for row in rows], "o-", color=colour, label=name)
            speed.plot(calls, [row["ms_per_image"] for row in rows], "o-", color=colour, label=name)
    quality.axhline(record["halves"]["fd"], color="#888888", linestyle="--", label="one half of the data")
    calls = sorted({row["calls"] for row in record["rows"]})
    distance = f"Frechet distance, {chart_text(record['features']['name'])}"
    for axes, what in ((quality, distance), (speed, "ms an image")):
        axes.set_xscale("log")
        axes.set_xticks(calls, [str(k) for k in calls])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("network calls an image")
        axes.set_ylabel(what)
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)  # room for the points at the top
        axes.legend(fontsize=8)
    source, machine = record["model"], record["machine"]
    title = f"{source['file']}, {record['data_set']}; {source['engine']}, {machine['cpu']}"
    figure.suptitle(chart_text(title), fontsize=8)
    save_chart(figure, path)


def _line(name: str, values: Sequence[str]) -> str:
    return (f"{name:<{NAME_WIDTH}}" + "".join(f"{value:>{WIDTH}}" for value in values)).rstrip()
