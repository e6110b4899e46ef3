# SPDX-License-Identifier: MIT
"""What each contender costs to start, measured by `probe` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cmfast.bench.contenders import Contender, Job
from cmfast.bench.failures import Failures, LeftOut, Say
from cmfast.bench.probe import Launch
from cmfast.bench.record import Start
from cmfast.bench.request import Request
from cmfast.bench.turns import Budget
from cmfast.errors import BackendError
from cmfast.formats.table import model_bytes


def start_all(
    contenders: Sequence[Contender],
    settings: Sequence[Sequence[Job]],
    request: Request,
    failures: Failures,
    budget: Budget,
    say: Say,
) -> list[Start]:
    """Start each contender once, in its first setting; with --budget as many as it allows.

    With keep_going, one that does not start is timed all the same: a GPU's memory may be too small for a second process
    beside what all contenders hold in this one. With --budget, all have been timed already.
    """
    starts: list[Start] = []
    longest = 0.0
    for contender in contenders:
        begun = budget.left()
        if begun <= longest:
            why = f"no time was left of --budget {request.budget:g} s"
            failures.note(LeftOut(contender=contender.name, what="start", why=why))
            continue
        say(f"starting {contender.name} in a process of its own")
        job = next(job for jobs in settings for job in jobs if job.contender is contender)
        try:
            starts.append(start(job, request))
        except BackendError as err:
            if not (request.keep_going or request.budget):
                raise
            failures.note(LeftOut(contender=contender.name, what="start", why=str(err)))
        if request.budget:
            longest = max(longest, begun - budget.left())
    return starts


def start(job: Job, request: Request) -> Start:
    """Open a contender and make its first call in a process of its own.

    Raises:
        BackendError: it does not start there.
    """
    contender = job.contender
    launch = Launch(
        file=str(contender.file),
        device=request.device,
        threads=request.threads,
        variant=contender.variant,
        precision=contender.precision,
        sigmas=job.sigmas,
        batch=job.batch,
    )
    # Without this, torch.compile would find what this process has just compiled, and its first call would look cheap.
    cold = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    program = [sys.executable, "-P", "-m", "cmfast.bench.probe", json.dumps(asdict(launch))]
    done = subprocess.run(program, capture_output=True, text=True, env=cold)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BackendError(
            f"{contender.name} runs in this process but fails in one of its own: {why}; skip starts with --no-starts"
        )
    return Start(
        contender=contender.name,
        file=contender.file.name,
        file_mib=model_bytes(contender.file) / 2**20,
        kind=contender.model.manifest.kind,
        dtype=contender.model.manifest.dtype,
        image=list(contender.model.spec.shape),
        source=dict(contender.model.manifest.source),
        backend=contender.model.backend.name,
        variant=contender.variant,
        steps=len(job.sigmas),
        batch=job.batch,
        **json.loads(done.stdout.splitlines()[-1]),
    )
