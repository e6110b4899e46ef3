# SPDX-License-Identifier: MIT
"""What cmfast-bench does with a contender that fails: stop and name it, or with --keep-going leave it out and say so.

The message begins with the contender and its setting, because engines cannot know which of many they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from cmfast.errors import CheckFailed, CmfastError, EngineError, one_line

if TYPE_CHECKING:
    from cmfast.bench.contenders import Job
    from cmfast.bench.options import Options


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a record lacks, and why."""

    contender: str
    what: str  # opening, images (they differ), run, budget (no time was left): no row; start, device_times: only that
    why: str
    steps: int | None = None  # network calls an image; None: all
    batch: int | None = None  # images at a time; None: all

    def __str__(self) -> str:
        where = f" at {self.steps} step(s), batch {self.batch}" if self.steps else ""
        part = f" ({self.what})" if self.what in ("start", "device_times") else ""
        return f"{self.contender}{where}{part}: {self.why}"


class ContenderFailed(EngineError):
    """A contender failed at a setting. The message begins with both."""

    def __init__(self, job: Job, why: str, *, memory: bool = False) -> None:
        super().__init__(f"{job.name}: {why}")
        self.job, self.why, self.what = job, why, "run"
        self.memory = memory  # whether it was short, perhaps only beside the other contenders


class ContenderDiffers(CheckFailed):
    """The images of a contender are not the reference's. The message begins with its name and the setting."""

    def __init__(self, job: Job, why: str) -> None:
        super().__init__(
            f"{job.name} {why}; nothing was timed; export it again, or allow for its precision with --tolerance"
        )
        self.job, self.why, self.what = job, why, "images"


class Failures:
    """What to do about failures, and those that did not stop the command, in the order of their happening."""

    def __init__(self, options: Options) -> None:
        self._keep_going = options.keep_going
        self._files = [*options.models, *([options.baseline] if options.baseline else [])]
        self.left_out: list[LeftOut] = []

    def met(self, failure: ContenderFailed | ContenderDiffers, what: str = "") -> None:
        """Raise the failure, or with keep_going note that the contender is left out at that setting.

        what  it costs, if not the row
        """
        if not self._keep_going:
            raise failure
        job = failure.job
        self.note(
            LeftOut(
                contender=job.contender.name,
                what=what or failure.what,
                why=failure.why,
                steps=len(job.sigmas),
                batch=job.batch,
            )
        )

    def no_time(self, jobs: Sequence[Job], budget: float) -> None:
        """Note that nothing of a setting was timed, because --budget was used up."""
        for job in jobs:
            left = LeftOut(
                contender=job.contender.name, what="budget", why=f"no time was left of --budget {budget:g} s",
                steps=len(job.sigmas), batch=job.batch,
            )  # fmt: skip
            self.note(left)

    def note(self, left: LeftOut) -> None:
        """Keep, and tell the user, what is left out; where the files lie is not for a record."""
        why = left.why
        for file in self._files:
            why = why.replace(str(file), file.name)
        self.left_out.append(replace(left, why=one_line(why, 500)))
        click.echo(f"left out: {self.left_out[-1]}", err=True)

    def check_some_are_left(self, settings: Sequence[object]) -> None:
        """Raise where there is nothing to time any more."""
        if not settings:
            raise EngineError(f"no contender is left to time; the first that failed: {self.left_out[0]}")


def reason(err: Exception) -> str:
    """Return what went wrong in one line; for what is no error of cmfast's also its type, which names the library."""
    if isinstance(err, CmfastError):
        return str(err)
    return f"{type(err).__name__}: {one_line(err)}"
