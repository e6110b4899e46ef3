# SPDX-License-Identifier: MIT
"""Progress of what takes long: items done, items a second, time left. A bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]  # (items done since the last call, a few words to show)
LINE_S = 30.0  # between lines where stderr is no terminal


@contextmanager
def progress_bar(what: str, total: int, unit: str, start: int = 0, show: bool = True) -> Iterator[Advance]:
    """Give the function that moves the progress of `what`, shown on stderr.

    Args:
        what: the work, in words.
        total: items in all.
        unit: what they are, in words.
        start: items that were done before, when a run is resumed: a line says so, and no speed counts them.
        show: whether anything is shown.
    """
    if not show or sys.stderr is None:  # a program without standard streams
        yield lambda count, text: None
        return
    if 0 < start < total:
        print(f"{what}: continuing at {start:,} {unit}", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        with _bar(what, total, unit, start) as advance:
            yield advance
    else:
        yield _lines(what, total, unit, start)


@contextmanager
def _bar(what: str, total: int, unit: str, start: int) -> Iterator[Advance]:
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

        def advance(count: int, text: str) -> None:
            bar.update(task, advance=count, text=text)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.4g} {unit}/s" if speed else "")

        yield advance


def _lines(what: str, total: int, unit: str, start: int) -> Advance:
    begun = last = time.monotonic()
    done = start

    def advance(count: int, text: str) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_S and done > start:
            last = now
            speed = (done - start) / (now - begun)
            left = f"{(total - done) / speed:,.0f} s left"
            print(f"{what}: {done:,}/{total:,} {unit}, {speed:,.4g} {unit}/s, {left} {text}".rstrip(), file=sys.stderr)

    return advance
