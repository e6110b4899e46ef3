# SPDX-License-Identifier: MIT
"""What every chart needs: file names as text that matplotlib draws, and a file written whole or not at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from cmfast.errors import printable
from cmfast.files import atomic_file


def chart_text(text: str) -> str:
    """Return a text, such as a file's name, that matplotlib draws as it is: no formula between $, no lone surrogate."""
    return printable(text).replace("$", r"\$")


def save_chart(figure: Any, path: Path) -> None:
    """Write a matplotlib Figure as a .png file; a letter that its font lacks becomes a box, without a warning."""
    with warnings.catch_warnings(), atomic_file(path) as temporary:
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure.savefig(temporary, format="png")
