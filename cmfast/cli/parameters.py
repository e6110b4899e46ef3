# SPDX-License-Identifier: MIT
"""What several commands take: types of values, such as models and lists written with commas, and options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cmfast.checks import shown
from cmfast.formats.shipped import find
from cmfast.formats.values import PRECISIONS


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
    help="Origin of a foreign file: openai:imagenet64-cd, openai, cloneofsimo, edm, ect, cmt, fastgen, sid, "
    "diffusion_policy, consistency_policy, consistency_policy_teacher; default: detected.",
)
SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="A fact that a foreign file does not state, for example scaling=boundary.",
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(*options: Decorator) -> Decorator:
    """Return a decorator that adds options in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


# For commands that draw: what samples depend on beside the model, and what runs it.
CONDITIONS = _all(
    click.option(
        "--condition",
        "conditions",
        multiple=True,
        metavar="NAME=VALUE",
        help="A condition of the model: a file NAME.npy for all samples or with one row each, numbers, or a class.",
    ),
    click.option(
        "--encoder",
        multiple=True,
        type=click.Path(path_type=Path),
        help="File with an encoder of the model's conditions.",
    ),
)
BACKEND = _all(
    click.option("--first", type=int, default=0, show_default=True, help="Index of the first sample."),
    click.option("--batch", type=int, default=64, show_default=True, help="Samples at a time; does not change them."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda for an engine, else cpu."),
    click.option("--variant", default="", metavar="NAME", help="How to run it: auto, openvino, cuda_graph, ..."),
    click.option(
        "--tolerance-db",
        type=float,
        metavar="DB",
        help="For --variant auto: try lower precisions too, within this PSNR.",
    ),
    click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Precision of PyTorch and OpenVINO."),
    click.option("--sha256", help="Refuse MODEL unless it hashes to this."),
    click.option("--threads", type=int, help="CPU threads; default: the backend's choice."),
)
