# SPDX-License-Identifier: MIT
"""Runs of single steps, for what records and replays them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.batches import batches
from cmfast_train.data.images import Batch, load_data
from cmfast_train.networks.adm import randomise
from cmfast_train.training.saving import next_phase
from cmfast_train.training.state import Run
from cmfast_train.training.step import optimise
from cmfast_train.training.trainer import accelerator_of

ALL = slice(None)
TINY = [
    "channel_mult=1", "head_channels=32", "batch=8", "flip=true", "grid=4", "tensorboard=false", "device=cpu",
    "checkpoint_images=100000",
]  # fmt: skip
CASES = {
    "edm": [
        "phases=edm:160",
        "edm.lr_warmup=0.3",
        "edm.lr_decay=0.5",
        "edm.clip_norm=0.5",
        "edm.beta2=0.99",
        "emas=0.9",
        "ema_stds=0.1",
    ],
    "edm in bfloat16": ["phases=edm:160", "precision=bf16"],
    "edm with dropout": ["phases=edm:160", "dropout=0.5"],
    "edm with dropped labels": ["phases=edm:160", "label_dropout=0.3"],
    "edm without classes": ["phases=edm:160", "conditional=false", "flip=false"],
    "ect": ["phases=ect:480", "ect.stages=0,3", "ect.lr_decay=1"],
    "ect in bfloat16": ["phases=ect:240", "ect.stages=0,1", "precision=bf16"],
    "ct": ["phases=ct:480", "ct.s0=2", "ct.s1=4", "ct.mu0=0.5"],
    "ict": ["phases=ict:320", "ict.s0=4", "ict.s1=8"],
    "cd": ["phases=edm:8,cd:160"],
    "cmt": ["phases=edm:8,cmt:160", "cmt.steps=3"],
    "pd": ["phases=edm:8,pd/4:160"],
    "sid": ["phases=edm:8,sid:720", "sid.fakes=2"],
    "sid from noise alone": ["phases=edm:8,sid:480", "sid.fakes=1", "sid.share=1", "sid.clip_norm=0.5"],
}


@functools.cache
def data() -> Any:
    return load_data(PRESETS["digits"], None)


def new_run(out: Path, *settings: str, lively: bool = True) -> Run:
    config = override(PRESETS["digits"], [*TINY, *settings])
    run = Run(config, out, accelerator_of(config), len(data()), data().classes)
    if lively:
        for seed, module in enumerate(filter(None, (run.state.student.denoiser, run.state.target, run.state.teacher))):
            randomise(module.network, seed)
    return run


def batches_of(run: Run) -> Iterator[Batch]:
    total = run.config.images // run.config.batch
    return batches(data(), run.config.batch, run.config.seed, run.images // run.config.batch, total, ALL, 0, False)


def take_steps(run: Run, take: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    """Take so many steps; return the loss and noise level of each image in each."""
    results = []
    for images, label in islice(batches_of(run), count):
        conditions = {"label": label} if run.context.spec.classes else {}
        results.append(take(run.images // run.config.batch, images, conditions, ALL))
        run.step += 1
    return results


def begin_last_phase(run: Run) -> None:
    """Take the steps of the phases before, where there are some."""
    while run.phase is not run.config.phases[-1]:
        take_steps(run, functools.partial(optimise, run), run.state.total)
        next_phase(run)
