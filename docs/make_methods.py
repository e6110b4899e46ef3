# SPDX-License-Identifier: MIT
"""Write the table of hyperparameters into docs/training.md, from the table of training methods.

python docs/make_methods.py        # a test fails when the page differs
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cmfast_train.methods.method import ROWS

PAGE = Path(__file__).resolve().parent / "training.md"
BEGIN, END = "<!-- Written by docs/make_methods.py from the table of methods. -->\n", "<!-- End of the table. -->\n"


def table() -> str:
    """Return the table: a row for each hyperparameter, with the default of each method that has it."""
    defaults: dict[tuple[str, str], list[str]] = {}
    for row in ROWS.values():
        for field in dataclasses.fields(row.hyper):
            defaults.setdefault((field.name, field.metadata["about"]), []).append(f"{row.name} {shown(field.default)}")
    lines = [f"| `{name}` | {', '.join(methods)} | {about} |" for (name, about), methods in defaults.items()]
    return "\n".join(["| hyperparameter | methods and defaults | meaning |", "|---|---|---|", *lines]) + "\n"


def shown(value: object) -> str:
    """Return a value as --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """Return the page with the present table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
