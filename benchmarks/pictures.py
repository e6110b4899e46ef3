# SPDX-License-Identifier: MIT
"""Draw two pictures of the documentation: samples by network calls, and quality against the time of an image.

    make demo                                   # the model whose samples are drawn
    python benchmarks/pictures.py demo          # docs/samples_by_calls.png, docs/quality_time.png

The chart of methods, docs/methods.png, is drawn by `methods.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import cmfast
from cmfast.bench.chart import save_chart
from cmfast.cli.running import run_command
from gallery import save_rows

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "methods_digits.json"
COLUMNS = 12  # images of a row
SHOWN = {  # rows of the record in the chart, and their names there; the others would lie on top of each other
    "edm": "edm, the teacher, Heun's sampler",
    "cd": "cd",
    "ect, tuned": "ect from the teacher",
    "scd": "scd",
}


@click.command("pictures.py")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=ROOT / "docs", help="Folder of the pictures.")
def command(run: Path, out: Path) -> None:
    """Draw samples of RUN, the folder that `make demo` leaves, and the chart of benchmarks/results."""
    samples_by_calls(run, out / "samples_by_calls.png")
    quality_time(json.loads(RECORD.read_text(encoding="utf-8")), out / "quality_time.png")


def samples_by_calls(run: Path, path: Path) -> None:
    """Write one row of samples for each number of network calls; a column starts from one noise and has one class."""
    model, teacher = cmfast.load(run / "model.onnx"), cmfast.load(run / "phases" / "1_edm.pt")
    labels = [i % 10 for i in range(COLUMNS)]
    rows = [(f"{k} call{'s' * (k > 1)}", model.sample(COLUMNS, steps=k, label=labels)) for k in (1, 2, 4)]
    rows.append(("teacher,\n35 calls", teacher.sample_heun(COLUMNS, steps=18, label=labels)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_rows(rows, path)


def quality_time(record: dict[str, Any], path: Path) -> None:
    """Write the chart of time, ms an image, against the Fréchet distance; each point says its network calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = {row["name"]: row for row in record["rows"]}
    for (name, label), marker in zip(SHOWN.items(), "s^oD", strict=True):
        points = rows[name]["rows"]
        x, y = [p["ms_per_image"] for p in points], [p["fd"] for p in points]
        axes.plot(x, y, "--" if name == "edm" else "-", marker=marker, label=label)
        for point in points:
            place = (point["ms_per_image"], point["fd"])
            axes.annotate(f"{point['calls']}", place, (4, 5), textcoords="offset points", fontsize=9)
    axes.axhline(rows["edm"]["halves"]["fd"], color="grey", linewidth=0.8, linestyle=":", label="halves of the data")
    axes.set(xscale="log", yscale="log", xlabel="ms per image (numbers: network calls)")
    axes.set(ylabel="Fréchet distance in pixel space", title="digits, one CPU thread")
    axes.set_xticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    axes.set_yticks([0.15, 0.2, 0.3, 0.4, 0.5], ["0.15", "0.2", "0.3", "0.4", "0.5"])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left")
    save_chart(figure, path)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
