# SPDX-License-Identifier: MIT
"""Every method of training on the digits: one network, four minutes on two cores each, and what comes of it.

    python benchmarks/methods.py --out runs/methods --json benchmarks/results/methods_digits.json --plot docs/methods.png

One teacher is trained first. Distillation and tuning start from it, the others from nothing. Each run is one
`cmfast-train` as a user types it; its model is exported by `cmfast-export`, and the ONNX file is what is measured, by
`cmfast-eval`: Frechet distance in pixel space at 1, 2 and 4 calls. The lengths were chosen so that a run takes four
minutes; the record has the seconds that it took. The command again goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cmfast.cli._run import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_target, write_text
from cmfast.timing import provenance

LIMIT_S = 240.0
TEACHER = "edm"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of `cmfast-train digits`."""

    phases: str
    settings: tuple[str, ...] = ()
    from_teacher: bool = False
    after: str = ""  # starts from the model of this recipe
    steps: tuple[int, ...] = (1, 2, 4)  # network calls that it is measured at
    heun: tuple[int, ...] = ()


# Whatever has a teacher has its conventions, TrigFlow's; the rest have their method's own.
RECIPES: dict[str, Recipe] = {
    TEACHER: Recipe(
        phases="edm:90000",
        settings=("edm.ema=0.998", "edm.lr_decay=0.3", "scaling=trigflow", "c_noise=trig"),
        steps=(),
        heun=(8, 18),
    ),
}


@click.command("methods.py")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the runs.")
@click.option("--only", multiple=True, type=click.Choice(sorted(RECIPES)), help="Of these; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a chart: calls against distance.")
def command(out: Path, only: tuple[str, ...], json_file: Path | None, plot: Path | None) -> None:
    """Train by every method and measure what each has learned."""
    for target in filter(None, (json_file, plot)):
        check_target(target)
    out.mkdir(parents=True, exist_ok=True)
    rows = [row_of(name, out) for name in RECIPES if not only or name in only]
    record = {
        "what": "methods",
        **provenance(),
        "data_set": "digits",
        "features": "pixels",
        "limit_s": LIMIT_S,
        "rows": rows,
    }
    for row in rows:
        click.echo(table_line(row))
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if plot is not None:
        draw(rows, plot)
        click.echo(f"the chart is in {plot}")
    if late := [row["name"] for row in rows if row["train_s"] > LIMIT_S]:
        raise CheckFailed(f"these took longer than {LIMIT_S:.0f} s: {', '.join(late)}")


def row_of(name: str, out: Path) -> dict[str, Any]:
    """Train, export and measure by one recipe; what is finished is not done again."""
    recipe, folder = RECIPES[name], out / name
    done = folder / "row.json"
    if done.exists():
        row: dict[str, Any] = json.loads(done.read_text())
        if row["phases"] == recipe.phases and row["settings"] == list(recipe.settings):
            return row
        raise CmfastError(f"{folder} holds a run of other settings; name another --out")
    if folder.exists():
        raise CmfastError(f"{folder} holds a run that was cut, whose time is not known; remove it")
    start = TEACHER if recipe.from_teacher else recipe.after
    words = ["--out", str(folder), "--set", f"phases={recipe.phases}", "--set", "checkpoint_images=10_000_000"]
    words += [word for setting in recipe.settings for word in ("--set", setting)]
    words += ["--init", str(out / start / "model.pt")] if start else []
    began = time.perf_counter()
    run("cmfast_train.cli", "digits", *words)
    seconds = time.perf_counter() - began
    run("cmfast_export.cli", str(folder / "model.pt"))
    steps = [] if not recipe.steps else ["--steps", ",".join(map(str, recipe.steps))]
    heun = [] if not recipe.heun else ["--heun", ",".join(map(str, recipe.heun))]
    record = folder / "evaluation.json"
    run(
        "cmfast_train.eval_cli", str(folder / "model.onnx"), "--data-set", "digits", *steps, *heun, "--json", str(record)
    )
    measured = json.loads(record.read_text())
    row = {
        "name": name,
        "phases": recipe.phases,
        "settings": list(recipe.settings),
        "start": start,
        "train_s": round(seconds, 1),
        "source": measured["model"]["source"],
        "rows": measured["rows"],
        "halves": measured["halves"],
    }
    write_text(done, json.dumps(row, indent=1) + "\n")
    click.echo(table_line(row))
    return row


def run(module: str, *words: str) -> None:
    """Run one of our commands in a process of its own."""
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckFailed(f"{module} {' '.join(words)}: {result.stderr.strip()[-500:]}")


def table_line(row: dict[str, Any]) -> str:
    """Return a row of the table: seconds, and the distance at each number of calls."""
    cells = "  ".join(f"{r['calls']:>2} calls {r['fd']:8.3f}" for r in row["rows"])
    return f"{row['name']:<10} {row['train_s']:6.1f} s  {cells}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the chart: network calls against the Frechet distance, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for row in rows:
        calls, distances = [r["calls"] for r in row["rows"]], [r["fd"] for r in row["rows"]]
        axes.loglog(calls, distances, marker="o", linestyle="--" if row["name"] == TEACHER else "-", label=row["name"])
        axes.annotate(row["name"], (calls[-1], distances[-1]), xytext=(5, 0), textcoords="offset points", va="center")
    axes.axhline(rows[0]["halves"]["fd"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="network calls an image", ylabel="Fréchet distance in pixel space", title="digits, four minutes each")
    axes.set_xticks([1, 2, 4, 15, 35], ["1", "2", "4", "15", "35"], minor=False)
    axes.minorticks_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
