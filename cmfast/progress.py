# SPDX-License-Identifier: MIT
"""One progress bar for everything that takes long: items done, items a second, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]  # (items done since the last call, a few words to show)


@contextmanager
def progress_bar(what: str, total: int, unit: str, start: int = 0, show: bool | None = None) -> Iterator[Advance]:
    """Show a bar on stderr and give the function that moves it.

    total, start  items in all, and already done when a run is resumed
    show          None: when stderr is a terminal
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield lambda count, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=start, rate="", text="")

        def advance(count: int, text: str = "") -> None:
            bar.update(task, advance=count, text=text)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.4g} {unit}/s" if speed else "")

        yield advance
