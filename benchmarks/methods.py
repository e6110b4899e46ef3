# SPDX-License-Identifier: MIT
"""Every method of training on the digits: one network, some minutes on two cores each, and what comes of it.

    python benchmarks/methods.py --out runs/methods --json benchmarks/results/methods_digits.json

The `digits` preset as a user gets it, the same without its `beta2`, and what it was before, `edm` then `ect`, train
diffusion models of their own. For the rest one teacher a seed is trained. Distillation and tuning start from it, the
others from nothing; progressive distillation to one step goes on from its two-step model, and both together count. Each
run is one `cmfast-train` as a user types it; its model is exported by `cmfast-export`, and the ONNX file is what is
measured, by `cmfast-eval`: Frechet distance in pixel space at 1, 2 and 4 calls. The lengths were chosen so that a run
takes less than four minutes. The record has the seconds of each command, and, for a machine that now and then does
something else, the seconds by the median speed of the run's intervals of 5,000 images, to which the limit applies. The
command again goes on where it stopped. With several seeds, distances are means, with those of each seed beside them,
and these seconds the median.
`--only` with `--rows-of` renews a part of a record. `--beta2` shows what another decay of RAdam's squared gradients
does, in all recipes but the preset and what it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cmfast.bench.timing import provenance
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import atomic_file, check_outputs, write_text
from cmfast.formats.manifest import check_file
from cmfast_train.config.overrides import setting_text
from cmfast_train.config.phase import phase
from cmfast_train.config.presets import PRESETS

LIMIT_S = 240.0
BATCH = 64
MOST = 2.0  # distance that the chart shows
TEACHER = "edm"
PRESETS_OWN = ("preset", "preset, usual beta2", "edm, ect")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of `cmfast-train digits`."""

    phases: str
    batch: int = BATCH
    settings: tuple[str, ...] = ()
    from_teacher: bool = False
    after: str = ""  # starts from the model of this recipe
    steps: tuple[int, ...] = (1, 2, 4)  # network calls that it is measured at
    heun: tuple[int, ...] = ()


def recipe(method: str, images: int, *settings: str, **fields: Any) -> Recipe:
    """Return a run of one method, with averages of some 500 steps and a learning rate that falls at the end."""
    usual = [f"{method}.ema=0.998", *([] if method == "pd" else [f"{method}.lr_decay=0.5"])]
    return Recipe(phases=f"{method}:{images}", settings=(*usual, *settings), **fields)


def recipe_of_preset(*usually: str) -> Recipe:
    """Return the digits preset, as a user gets it, but with the methods' usual values of these fields."""
    config = PRESETS["digits"]
    settings: list[str] = []
    for part in config.phases:
        usual = phase(part.method, part.images).values()
        own = {name: value for name, value in part.values().items() if value != usual[name] and name not in usually}
        settings += [f"{part.method}.{name}={setting_text(value)}" for name, value in own.items()]
    phases = ",".join(f"{part.name}:{part.images}" for part in config.phases)
    return Recipe(phases=phases, batch=config.batch, settings=tuple(settings))


def with_beta2(recipe: Recipe, beta2: float) -> Recipe:
    """Return a recipe with this `beta2` in all its phases, each before the first setting of its method."""
    settings = list(recipe.settings)
    for method in dict.fromkeys(part.partition(":")[0].partition("/")[0] for part in recipe.phases.split(",")):
        own = (i for i, setting in enumerate(settings) if setting.startswith(f"{method}."))
        settings.insert(next(own, len(settings)), f"{method}.beta2={beta2}")
    return dataclasses.replace(recipe, settings=tuple(settings))


# What starts from the teacher has its conventions, TrigFlow's; the rest have their method's own. ct is there as its
# paper has it (to 150 levels), and with the fewer levels that suit so short a run. Few hyperparameters were tried of
# each, on fewer images; the usual ones (cmfast_train.config.train_config) are those of networks a hundred times larger.
RECIPES: dict[str, Recipe] = {
    "preset": recipe_of_preset(),
    "preset, usual beta2": recipe_of_preset("beta2"),
    "edm, ect": Recipe(
        phases="edm:40000,ect:50000",
        settings=(
            "edm.ema=0.998",
            "edm.lr_decay=0.5",
            "ect.ema=0.998",
            "ect.lr_decay=0.5",
            "ect.lr=5e-4",
            "ect.stages=1,6",
        ),
    ),
    TEACHER: recipe("edm", 75_000, "scaling=trigflow", steps=(), heun=(8, 18)),
    "cd": recipe("cd", 60_000, "cd.lr=5e-4", from_teacher=True),
    "ect, tuned": recipe("ect", 70_000, "ect.lr=5e-4", "ect.stages=1,6", from_teacher=True),
    "scd": recipe("scd", 45_000, "scd.lr=3e-4", from_teacher=True),
    "cmt": recipe("cmt", 45_000, "cmt.lr=5e-4", from_teacher=True),
    "cmt, ect": Recipe(
        phases="cmt:20000,ect:45000",
        settings=(
            "cmt.ema=0.998",
            "cmt.lr=5e-4",
            "ect.ema=0.998",
            "ect.lr_decay=0.5",
            "ect.lr=5e-4",
            "ect.stages=3,6",
        ),
        from_teacher=True,
    ),
    "ect, sid": Recipe(
        phases="ect:35000,sid:20000",
        settings=(
            "ect.ema=0.998",
            "ect.lr=5e-4",
            "ect.stages=1,6",
            "sid.ema=0.99",
            "sid.lr=3e-4",
            "sid.lr_decay=0.5",
        ),
        from_teacher=True,
    ),
    "pd, 2 steps": Recipe(
        phases="pd/8:16000,pd/4:16000,pd/2:16000",
        settings=("pd.ema=0.998", "pd.lr=5e-4"),
        from_teacher=True,
        steps=(2,),
    ),
    "pd, 1 step": Recipe(phases="pd/1:16000", settings=("pd.ema=0.998", "pd.lr=5e-4"), after="pd, 2 steps", steps=(1,)),
    "ct": recipe("ct", 90_000, "ct.lr=1e-3"),
    "ct, to 20 levels": recipe("ct", 90_000, "ct.lr=1e-3", "ct.s1=20"),
    "ict": recipe("ict", 80_000, "ict.lr=1e-3", "ict.s1=160"),
    "ict, tuned": recipe("ict", 70_000, "ict.lr=5e-4", "ict.s1=160", from_teacher=True),
    "ect": recipe("ect", 80_000, "ect.lr=1e-3", "ect.stages=1,6"),
    "sct": recipe("sct", 55_000, "sct.lr=1e-3"),
    "sct, tuned": recipe("sct", 45_000, "sct.lr=3e-4", from_teacher=True),
    "mf": recipe("mf", 65_000, "mf.lr=1e-3", "mf.p_std=1.6"),
    "mf, improved": recipe("mf", 60_000, "mf.lr=1e-3", "mf.p_std=1.6", "mf.velocity=model"),
    "mf, curriculum": recipe("mf", 65_000, "mf.lr=1e-3", "mf.p_std=1.6", "mf.curriculum=0.6"),
}


@click.command("methods.py")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the runs.")
@click.option("--only", multiple=True, type=click.Choice(sorted(RECIPES)), help="Of these; default: all.")
@click.option("--seeds", type=INTS, default="0", show_default=True, help="Seeds; each gets its own teacher.")
@click.option(
    "--beta2",
    type=click.FloatRange(0.7, 1, max_open=True),
    help="Of all phases of all recipes but the preset's; default: each recipe's own.",
)
@click.option(
    "--rows-of", type=click.Path(path_type=Path), help="Earlier record: its rows of recipes that are not in --only."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a chart: calls against distance.")
def command(
    out: Path,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    beta2: float | None,
    rows_of: Path | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Train by every method and measure what each has learned."""
    check_outputs({"--json": json_file, "--plot": plot})
    recipes = RECIPES
    if beta2 is not None:
        recipes = {name: with_beta2(each, beta2) for name, each in RECIPES.items() if name not in PRESETS_OWN}
        if own := [name for name in only if name not in recipes]:
            raise CmfastError(f"--beta2 does not change the preset, now and before; remove --only {own[0]!r}")
        if plot is not None:
            raise CmfastError("--plot draws no record of another --beta2")
    kept = earlier(rows_of, recipes, only) if rows_of else []
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise CmfastError(f"--plot: {plot}: the name must end in .png, .pdf or .svg")
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in recipes if not only or name in only]
    by_seed = [[row_of(name, recipes, out / folder_of_seed(seed), seed) for name in chosen] for seed in seeds]
    rows = [over_seeds(each, seeds) for each in zip(*by_seed, strict=True)]
    before = {row["name"]: row["quiet_s"] for row in kept if row["name"] != TEACHER}
    for row in rows:
        folder = out / folder_of_seed(seeds[0]) / folder_of(row["name"])
        of_seeds = [by_median_speed(out / folder_of_seed(seed) / folder_of(row["name"])) for seed in seeds]
        row["quiet_s"] = round(statistics.median(of_seeds) + before.get(row["start"], 0.0), 1)
        row["commit"] = json.loads((folder / "evaluation.json").read_text())["commit"]
        before |= {row["name"]: row["quiet_s"]} if row["name"] != TEACHER else {}
    order = list(recipes)
    rows = sorted([*rows, *kept], key=lambda row: order.index(row["name"]))
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
    if late := [row["name"] for row in rows if row["quiet_s"] > LIMIT_S]:
        raise CheckFailed(f"these took longer than {LIMIT_S:.0f} s: {', '.join(late)}")


def earlier(record: Path, recipes: Mapping[str, Recipe], only: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a record that are not measured now, each with its date and machine."""
    found = json.loads(check_file(record).read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["name"] in recipes and row["name"] not in (only or recipes)]
    if other := [row["name"] for row in rows if not is_of(row, recipes[row["name"]])]:
        raise CmfastError(
            f"{record}: its row {other[0]!r} is of other settings (or another --beta2); add --only {other[0]!r}"
        )
    return [{"date": found["date"], "machine": found["machine"], **row} for row in rows]


def over_seeds(rows: Sequence[dict[str, Any]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return one row of those of the same recipe: the mean distance, that of each seed, and the median time.

    The rest is of the first seed.
    """
    cells = []
    for same in zip(*(row["rows"] for row in rows), strict=True):
        of_seeds = [cell["fd"] for cell in same]
        took = statistics.median(cell["ms_per_image"] for cell in same)
        cells.append({**same[0], "fd": statistics.mean(of_seeds), "fd_of_seeds": of_seeds, "ms_per_image": took})
    return {**rows[0], "seeds": list(seeds), "rows": cells}


def is_of(row: dict[str, Any], recipe: Recipe) -> bool:
    """Return whether a row is of the recipe as it is now. Rows of before had one batch, and did not say it."""
    now = (recipe.phases, list(recipe.settings), recipe.batch)
    return (row["phases"], row["settings"], row.get("batch", BATCH)) == now


def row_of(name: str, recipes: Mapping[str, Recipe], out: Path, seed: int) -> dict[str, Any]:
    """Train, export and measure by one recipe; what is finished is not done again."""
    out.mkdir(exist_ok=True)
    recipe, folder = recipes[name], out / folder_of(name)
    done = folder / "row.json"
    if done.exists():
        row: dict[str, Any] = json.loads(done.read_text())
        if is_of(row, recipe):
            return row
        raise CmfastError(f"{folder} holds a run of other settings; remove that folder, or name another --out")
    if folder.exists():
        raise CmfastError(f"{folder} holds a run that was cut, so its time is not known; remove that folder")
    start = TEACHER if recipe.from_teacher else recipe.after
    started = row_of(start, recipes, out, seed) if start else {}
    before = started["train_s"] if recipe.after else 0.0
    words = ["--out", str(folder), "--set", "checkpoint_images=10_000_000", "--set", f"seed={seed}"]
    settings = (f"phases={recipe.phases}", f"batch={recipe.batch}", *recipe.settings)
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--init", str(out / folder_of(start) / "model.pt")] if start else []
    began = time.perf_counter()
    run("cmfast_train.cli.train", "digits", *words)
    seconds = time.perf_counter() - began
    run("cmfast_export.cli", str(folder / "model.pt"))
    steps = [] if not recipe.steps else ["--steps", ",".join(map(str, recipe.steps))]
    heun = [] if not recipe.heun else ["--heun", ",".join(map(str, recipe.heun))]
    record = folder / "evaluation.json"
    run(
        "cmfast_train.cli.evaluate",
        str(folder / "model.onnx"),
        "--data-set",
        "digits",
        *steps,
        *heun,
        "--json",
        str(record),
    )
    measured = json.loads(record.read_text())
    row = {
        "name": name,
        "phases": recipe.phases,
        "batch": recipe.batch,
        "settings": list(recipe.settings),
        "start": start,
        "train_s": round(seconds, 1),  # the command as a whole, imports included
        "total_s": round(seconds + before, 1),  # with what it goes on from, but for the teacher
        "source": measured["model"]["source"],
        "rows": measured["rows"],
        "halves": measured["halves"],
    }
    write_text(done, json.dumps(row, indent=1) + "\n")
    click.echo(table_line(row))
    return row


def by_median_speed(folder: Path) -> float:
    """Return the seconds that a run's images take at the median speed of its log's lines, phase by phase."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = [(line["phase"], line["images"], line["images_per_s"]) for line in lines if "images_per_s" in line]
    seconds, done = 0.0, 0
    for _, group in itertools.groupby(timed, key=lambda line: line[0]):
        part = list(group)
        seconds += (part[-1][1] - done) / statistics.median(speed for _, _, speed in part)
        done = part[-1][1]
    return seconds


def folder_of_seed(seed: int) -> str:
    """Return the folder of a seed's runs, in that of all."""
    return f"seed{seed}" if seed else "."


def folder_of(name: str) -> str:
    """Return the folder of a recipe: its name without spaces and commas."""
    return name.replace(",", "").replace(" ", "_")


def run(module: str, *words: str) -> None:
    """Run one of our commands in a process of its own."""
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise CheckFailed(f"{module} {' '.join(words)}: {result.stderr.strip()[-500:]}")


def table_line(row: dict[str, Any]) -> str:
    """Return a row of the table: seconds, and the distance at each number of calls."""
    cells = "  ".join(f"{r['calls']:>2} calls {r['fd']:8.3f}{spread(r)}" for r in row["rows"])
    return f"{row['name']:<10} {row['train_s']:6.1f} s  {cells}"


def spread(cell: dict[str, Any]) -> str:
    """Return half the range of the distances of all seeds, as text; "" of one."""
    of_seeds = cell.get("fd_of_seeds", [])
    return f" +- {(max(of_seeds) - min(of_seeds)) / 2:.3f}" if len(of_seeds) > 1 else ""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the chart: network calls against the Frechet distance, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # of a listed colormap
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, row in enumerate(sorted(rows, key=lambda row: -row["rows"][-1]["fd"])):  # the legend from top to bottom
        calls, distances = [r["calls"] for r in row["rows"]], [r["fd"] for r in row["rows"]]
        line = "--" if row["name"] == TEACHER else "-" if i < 20 else "-."
        name = row["name"].replace(", tuned", " from the teacher") + (", above" if min(distances) > MOST else "")
        axes.loglog(calls, distances, line, color=colours[i % 20], marker="os^Dv<>phX*"[i % 11], label=name)
    axes.axhline(rows[0]["halves"]["fd"], color="grey", linewidth=0.8, linestyle=":", label="halves of the data")
    axes.set(
        xlabel="network calls an image",
        ylabel="Fréchet distance in pixel space",
        title="digits, one to four minutes each",
    )
    axes.set_xticks([1, 2, 4, 15, 35], ["1", "2", "4", "15", "35"], minor=False)
    axes.set_yticks([0.2, 0.3, 0.5, 1, 2], ["0.2", "0.3", "0.5", "1", "2"], minor=False)
    axes.set_ylim(top=MOST)
    axes.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)
    with atomic_file(path) as file:  # its name keeps the suffix, by which matplotlib knows the format
        figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
