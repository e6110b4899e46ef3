# SPDX-License-Identifier: MIT
"""What becomes of a contender that fails: an error that names it, or with keep_going a line in the record.

The message begins with the contender and its setting, because a backend does not know which of many it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cmfast.errors import BackendError, CheckFailed, CmfastError, one_line

if TYPE_CHECKING:
    from cmfast.bench.contenders import Job
    from cmfast.bench.request import Request

Say = Callable[[str], None]  # takes a line about the progress


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a record lacks, and why."""

    contender: str
    what: str  # opening, images (they differ), run, budget (out of time): no row; start, device_times: only that
    why: str
    steps: int | None = None  # network calls per image; None: all
    batch: int | None = None  # images per call; None: all
    threads: int | None = None  # of a CPU; None: all, or the backend's choice

    def __str__(self) -> str:
        steps = f"{self.steps} step(s), " if self.steps else ""
        threads = f", {self.threads} thread(s)" if self.threads else ""
        where = f" at {steps}batch {self.batch}{threads}" if self.batch else ""
        part = f" ({self.what})" if self.what in ("start", "device_times", "processes") else ""
        return f"{self.contender}{where}{part}: {self.why}"


class ContenderFailed(BackendError):
    """A contender failed at a setting. The message begins with both."""

    def __init__(self, job: Job, why: str, *, memory: bool = False) -> None:
        super().__init__(f"{job.name}: {why}")
        self.job, self.why, self.what = job, why, "run"
        self.memory = memory  # whether it ran out of memory, perhaps only beside the other contenders


class ContenderDiffers(CheckFailed):
    """The images of a contender are not the reference's. The message begins with its name and the setting."""

    def __init__(self, job: Job, why: str) -> None:
        super().__init__(f"{job.name} {why}; nothing was timed; export it again, or raise --tolerance")
        self.job, self.why, self.what = job, why, "images"


class Failures:
    """Handles failures as requested, and keeps those that did not stop the comparison, in order."""

    def __init__(self, request: Request, say: Say) -> None:
        self._keep_going, self._files, self._say = request.keep_going, request.files, say
        self.left_out: list[LeftOut] = []

    def met(self, failure: ContenderFailed | ContenderDiffers, what: str = "") -> None:
        """Raise the failure, or with keep_going note that the contender is left out at that setting.

        Args:
            failure: what was raised.
            what: what the record lacks because of it; "": the row.
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
        """Note that a setting was not timed because --budget was used up."""
        for job in jobs:
            left = LeftOut(
                contender=job.contender.name, what="budget", why=f"no time was left of --budget {budget:g} s",
                steps=len(job.sigmas), batch=job.batch,
            )  # fmt: skip
            self.note(left)

    def note(self, left: LeftOut) -> None:
        """Keep and report what is left out; a record does not say in which folder the files were."""
        why = left.why
        for file in self._files:
            why = why.replace(str(file), file.name)
        self.left_out.append(replace(left, why=one_line(why, 500)))
        self._say(f"left out: {self.left_out[-1]}")

    def check_some_are_left(self, settings: Sequence[object]) -> None:
        """Raise BackendError if no contender is left."""
        if not settings:
            raise BackendError(f"no contender is left to time; the first that failed: {self.left_out[0]}")


def reason(err: Exception) -> str:
    """Return what went wrong in one line; with the type of an error that is not cmfast's, which names the library."""
    if isinstance(err, CmfastError):
        return str(err)
    return f"{type(err).__name__}: {one_line(err)}"
