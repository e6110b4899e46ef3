# SPDX-License-Identifier: MIT
"""The request of cmfast-eval. No torch: contradictions are found at once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cmfast.errors import CmfastError, MissingDependency
from cmfast.files import check_outputs, check_target

METRICS = ("fd", "kid", "pr", "is")  # computed in `metrics`
MOST_CALLS = 100  # levels of a search: each narrows the interval to 0.618 of it, and after 75 float64 has no more
MOST = 10_000  # samples, unless more are requested


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation, or one search of the second noise level."""

    model: Path  # exported file, checkpoint, or samples
    data_set: str  # a preset
    data: Path | None = None  # folder of the data
    features: str | None = None  # None: those that suit the data set
    metrics: tuple[str, ...] | None = None  # of METRICS; None: all that the features allow
    steps: tuple[int, ...] | None = None  # few-step: network calls an image; None: all that the model has levels for
    heun: tuple[int, ...] = ()  # steps of Heun's method, 2 N - 1 network calls an image
    number: int | None = None  # samples; None: MOST, or as many as there are data
    seed: int = 0  # of the samples and of all random subsets
    batch: int = 64  # samples drawn at a time
    device: str | None = None  # cpu, cuda; None: the backend's default
    address: str | None = None  # of a Ray cluster that draws the samples, or "local"; None: this process
    search: bool = False
    search_calls: int = 12  # noise levels to try
    search_bounds: tuple[float, ...] | None = None  # noise levels, data units
    write: bool = False  # the level found into the checkpoint
    train_log: Path | None = None  # folder of a run
    json_file: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for target, suffix in ((self.json_file, ".json"), (self.plot, ".png")):
            if target is not None:
                check_target(target, (suffix,))
        inputs = [self.model, self.data, self.features, self.train_log]
        inputs += [self.data and self.data / "dataset.json", self.train_log and self.train_log / "config.json"]
        check_outputs({"--json": self.json_file, "--plot": self.plot}, [path for path in inputs if path])
        for name, value in (("-n", self.number), ("--batch", self.batch)):
            if value is not None and value < 1:
                raise CmfastError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise CmfastError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        if self.plot is not None and (self.search or "fd" not in (self.metrics or METRICS)):
            raise CmfastError("--plot shows the fd at numbers of calls: leave --search out, and fd in --metrics")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise MissingDependency("--plot", "matplotlib", "plot")
        if self.address is not None and (self.search or self.plot is not None):
            raise CmfastError("--ray measures no time: leave --plot and --search out")
        if self.search and (self.steps or self.heun or self.metrics not in (None, ("fd",))):
            raise CmfastError("--search compares two steps by their fd: leave --steps, --heun and --metrics out")
        if self.search and not 2 <= self.search_calls <= MOST_CALLS:
            raise CmfastError(f"--search-calls must be from 2 to {MOST_CALLS}, got {self.search_calls}")
        if self.write and not self.search:
            raise CmfastError("--write writes what --search finds: add --search")
