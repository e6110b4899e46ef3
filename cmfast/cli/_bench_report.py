# SPDX-License-Identifier: MIT
"""What cmfast-bench shows: tables for people, a chart. The record itself is made in `cmfast.cli.bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cmfast.errors import MissingDependency


def show(record: dict[str, Any]) -> None:
    """Print the record as two tables: sampling, starting."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    references = " or ".join(dict.fromkeys(row["reference"] for row in record["rows"]))
    table = Table(box=SIMPLE, title=f"Sampling: times of a batch, ms; speed against {escape(references)}")
    for name in ("steps", "batch", "contender", "median", "p10", "p90", "images/s", "speed", "difference"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in record["rows"]:
        numbers = [f"{row[name]:,.2f}" for name in ("median_ms", "p10_ms", "p90_ms")]
        numbers += [f"{row['images_per_s']:,.1f}", f"{row['times_as_fast']:.2f}x", f"{row['max_abs_diff']:.1e}"]
        table.add_row(str(row["steps"]), str(row["batch"]), escape(row["contender"]), *numbers)
    console.print(table)
    table = Table(box=SIMPLE, title="Starting: each in a process of its own")
    for name in ("contender", "engine", "weights"):
        table.add_column(name)
    for name in ("file, MiB", "load, s", "first call", "ms", "peak RAM, MiB"):
        table.add_column(name, justify="right")
    for row in record["starts"]:
        numbers = [f"{row['file_mib']:.1f}", f"{row['load_s']:.2f}", f"{row['steps']} x batch {row['batch']}"]
        numbers += [f"{row['first_call_ms']:,.1f}", "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
        table.add_row(escape(row["contender"]), row["engine"], row["dtype"], *numbers)
    console.print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write a chart: a panel a setting, a bar a contender, p10 to p90 as a line."""
    need_matplotlib()
    from matplotlib.figure import Figure

    from cmfast.files import atomic_file

    steps = list(dict.fromkeys(row["steps"] for row in record["rows"]))
    batches = list(dict.fromkeys(row["batch"] for row in record["rows"]))
    most = max(sum((r["steps"], r["batch"]) == (n, b) for r in record["rows"]) for n in steps for b in batches)
    size = (4.8 * len(batches), (1.0 + 0.36 * most) * len(steps) + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(steps), len(batches), squeeze=False)
    for i, n in enumerate(steps):
        for j, b in enumerate(batches):
            axes = panels[i][j]
            rows = [row for row in record["rows"] if (row["steps"], row["batch"]) == (n, b)]
            if not rows:
                axes.set_axis_off()
                continue
            medians = [row["median_ms"] for row in rows]
            low = [row["median_ms"] - row["p10_ms"] for row in rows]
            high = [row["p90_ms"] - row["median_ms"] for row in rows]
            colours = ["#888888" if row["contender"] == row["reference"] else "#3b76af" for row in rows]
            bars = axes.barh([row["contender"] for row in rows], medians, color=colours, xerr=[low, high], capsize=2)
            axes.bar_label(bars, [f" {row['times_as_fast']:.2f}x" for row in rows], padding=2, fontsize=8)
            axes.set_title(f"{n} step(s), batch {b}", fontsize=9)
            axes.set_xlabel("ms a batch: median, p10 to p90", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.margins(x=0.18)
            axes.invert_yaxis()
    machine = record["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, {record['options']['device']}", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def need_matplotlib() -> None:
    """Raise, before any timing, where a chart could not be drawn."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingDependency("--plot", "matplotlib", "plot")
