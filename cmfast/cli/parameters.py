# SPDX-License-Identifier: MIT
"""Types of command-line values: models, and lists written with commas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cmfast.checks import shown
from cmfast.formats.shipped import find


class _List(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """Numbers separated by commas."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{shown(value)} is not a list of numbers such as {'80,0.8' if self.kind is float else '1,2'}",
                param,
                ctx,
            )


class _Model(click.Path):
    """Path of a model, or the name of one that comes with cmfast."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return find(os.fsdecode(super().convert(value, param, ctx)))


MODEL = _Model(path_type=Path)
FLOATS = _List(float, "a,b,..")
INTS = _List(int, "i,j,..")

# For commands that read foreign checkpoints: what the file does not state.
SOURCE = click.option(
    "--source",
    default="",
    metavar="NAME",
    help="Origin of a foreign file: openai:imagenet64-cd, openai, cloneofsimo, edm, ect, cmt, fastgen, sid; default: "
    "detected.",
)
SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="A fact that a foreign file does not state, for example scaling=boundary.",
)
