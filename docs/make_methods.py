# SPDX-License-Identifier: MIT
"""Write three tables into docs/training.md: hyperparameters, from the methods; results and beta2, from their records.

python docs/make_methods.py        # a test fails when the page differs
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cmfast_train.config.overrides import setting_text
from cmfast_train.methods.method import ROWS

PAGE = Path(__file__).resolve().parent / "training.md"
RECORDS = PAGE.parents[1] / "benchmarks" / "results"
RECORD, OF_BETA2 = RECORDS / "methods_digits.json", RECORDS / "methods_digits_beta2.json"
BEGIN, END = "<!-- Written by docs/make_methods.py from the table of methods. -->\n", "<!-- End of the table. -->\n"
BEGIN_BETA2 = "<!-- Written by docs/make_methods.py from benchmarks/results/methods_digits_beta2.json. -->\n"
BEGIN_RESULTS = "<!-- Written by docs/make_methods.py from benchmarks/results/methods_digits.json. -->\n"
LABELS = {  # of the rows of the record; the others are called by their method
    "preset": "the `digits` preset",
    "preset, usual beta2": "the same with `beta2=0.999`",
    "edm, ect": "`edm`, then `ect`: the preset before",
    "edm": "`edm`, the teacher, Heun's sampler",
    "ect, tuned": "`ect` from the teacher",
    "ict, tuned": "`ict` from the teacher",
    "sct, tuned": "`sct` from the teacher",
    "cmt, ect": "`cmt`, then `ect`",
    "ect, sid": "`ect`, then `sid`",
    "pd, 2 steps": "`pd`, 8, 4, 2 steps",
    "pd, 1 step": "`pd`, on to 1 step",
    "ct": "`ct`, to 150 levels, as in its paper",
    "ct, to 20 levels": "`ct`, to 20 levels",
    "mf, improved": "`mf`, `velocity=model` (iMF)",
    "mf, curriculum": "`mf`, `curriculum=0.6` (AlphaFlow)",
}


def table() -> str:
    """Return the table: a row for each hyperparameter, with the default of each method that has it."""
    defaults: dict[tuple[str, str], list[str]] = {}
    for row in ROWS.values():
        for field in dataclasses.fields(row.hyper):
            defaults.setdefault((field.name, field.metadata["about"]), []).append(
                f"{row.name} {setting_text(field.default)}"
            )
    lines = [f"| `{name}` | {', '.join(methods)} | {about} |" for (name, about), methods in defaults.items()]
    return "\n".join(["| hyperparameter | methods and defaults | meaning |", "|---|---|---|", *lines]) + "\n"


def results() -> str:
    """Return the table of results: the mean of the seeds, and half of their range."""
    lines = ["| method | 1 call | 2 calls | 4 calls | more | training, s |", "|---|---|---|---|---|---|"]
    for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]:
        cells = {cell["calls"]: distance(cell) for cell in row["rows"]}
        more = ", ".join(f"{text} at {calls}" for calls, text in cells.items() if calls > 4)
        label = LABELS.get(row["name"], f"`{row['name']}`")
        few = " | ".join(cells.get(calls, "") for calls in (1, 2, 4))
        lines.append(f"| {label} | {few} | {more} | {row['quiet_s']:.0f} |")
    return "\n".join(lines) + "\n"


def of_beta2() -> str:
    """Return the table of what beta2=0.99 does, at up to two numbers of calls."""
    usual = {row["name"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]}
    quick = json.loads(OF_BETA2.read_text(encoding="utf-8"))["rows"]
    lines = ["| method | calls | 0.999 | 0.99 | calls | 0.999 | 0.99 |", "|---|---|---|---|---|---|---|"]
    for row in quick:
        pairs = zip(usual[row["name"]]["rows"], row["rows"], strict=True)
        cells = [f"{new['calls']} | {distance(old)} | {distance(new)}" for old, new in pairs][:2]
        label = LABELS.get(row["name"], f"`{row['name']}`")
        lines.append(f"| {label} | {' | '.join(cells)} |" if len(cells) > 1 else f"| {label} | {cells[0]} |  |  |  |")
    return "\n".join(lines) + "\n"


def distance(cell: dict[str, Any]) -> str:
    """Return a distance with half the range of the seeds."""
    seeds = cell.get("fd_of_seeds", [])
    spread = f" ± {(max(seeds) - min(seeds)) / 2:.2f}" if len(seeds) > 1 else ""
    return f"{cell['fd']:.2f}{spread}"


def page() -> str:
    """Return the page with the present tables."""
    text = PAGE.read_text(encoding="utf-8")
    for begin, made in ((BEGIN_RESULTS, results()), (BEGIN_BETA2, of_beta2()), (BEGIN, table())):
        before, rest = text.split(begin)  # an error, unless it is there once
        old, _, after = rest.partition(END)
        assert "<!--" not in old, f"{PAGE}: no end of the table after {begin}"
        text = f"{before}{begin}{made}{END}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
