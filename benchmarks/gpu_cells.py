# SPDX-License-Identifier: MIT
"""One way of PyTorch to run a network, held against eager PyTorch: an item of `gpu.py bench`.

An item is one way of one network in one precision at one batch size and number of steps. It opens its engine, compares
its images with eager's on the same noise, times the two in turns, and gives the memory back; so no way can take another
one's memory, and what fails is one line. Weights are random (`networks`) and stay on the device, where engines open in
milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import gpu_ceilings
from cmfast.backends import DeviceTimes, TimedBackend
from cmfast.bench import timing
from cmfast.bench.roofline import floor_ms
from cmfast.checks import NotFinite
from cmfast.errors import CheckFailed, EngineError
from cmfast.formats.manifest import PRECISIONS, ROUNDING, WINOGRAD
from cmfast.noise import gaussian, labels
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint
from gpu_cost import count
from gpu_items import NotHere
from gpu_lines import Line, Lines
from networks import parameters, random_model

EAGER = ""
SECONDS, CALLS = 0.3, 5  # counted, of each of the two, at least


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network in a precision, so many images at a time, in so many network calls."""

    network: str
    precision: str
    batch: int
    steps: int = 1

    @property
    def name(self) -> str:
        return f"{self.network} {self.precision} batch {self.batch} steps {self.steps}"


class Bench:
    """What items share: the models, the eager engine of the last network and precision, the lines so far."""

    def __init__(self, lines: Lines, device: str, seconds: float = SECONDS) -> None:
        self.lines, self.device, self.seconds = lines, device, seconds
        self._eager: tuple[tuple[str, str], TorchBackend] | None = None
        self._models: dict[str, Checkpoint] = {}
        self._costs: dict[tuple[str, str], dict[str, float]] = {}

    def row(self, cell: Cell, way: str) -> Line:
        """Return the line of one way at one cell."""
        eager = self.eager(cell.network, cell.precision)
        engine = self.open(cell.network, cell.precision, way) if way else eager
        noise, label, sigmas = self.inputs(cell)
        want = eager.loop(noise, sigmas, label)
        got = engine.loop(noise, sigmas, label)
        difference, allowed = compare(want, got, cell.precision, self.device)
        calls = {"eager": lambda: eager.loop(noise, sigmas, label)}
        engines = {"eager": eager}
        if way:
            calls["way"], engines["way"] = lambda: engine.loop(noise, sigmas, label), engine
        wall, on_device = self.timed(calls, engines)
        mine = "way" if way else "eager"
        summary = {name: summarise(times) for name, times in wall.items()}
        device = {name: summarise(times) for name, times in on_device.items() if times}
        line = {
            "kind": "row", **dataclasses.asdict(cell), "way": way or "eager",
            "parameters": parameters(self.model(cell.network)), "difference": difference, "allowed": allowed,
            "wall": summary[mine], "device": device.get(mine), "eager": summary["eager"],
            "eager_device": device.get("eager"),
            "times_as_fast": summary["eager"]["median_ms"] / summary[mine]["median_ms"],
            "images_per_s": 1000 * cell.batch / summary[mine]["median_ms"],
        }  # fmt: skip
        return line | self.roofline(cell, (device or summary)[mine]["median_ms"]) | self.memory()

    def timed(
        self, calls: dict[str, Any], engines: dict[str, TorchBackend]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return the wall times of counted calls, ms, and the computing times on the device of all calls, ms."""
        with contextlib.ExitStack() as stack:
            clocks: dict[str, list[DeviceTimes]] = {
                name: stack.enter_context(engine.timed()) if isinstance(engine, TimedBackend) else []
                for name, engine in engines.items()
            }
            wall = timing.interleave(calls, seconds=self.seconds, calls=CALLS, warmup_s=0.0)
        return wall, {name: [each.compute_ms for each in times] for name, times in clocks.items()}

    def roofline(self, cell: Cell, ms: float) -> Line:
        """Return how far a time is from the least that this card can take, by the ceilings of this file."""
        cost = self.cost(cell.network, cell.precision)
        ceilings = gpu_ceilings.ceilings(self.lines.found("ceiling"), self.device).get(PRECISIONS[cell.precision])
        floor = floor_ms(cost, ceilings, cell.batch, cell.steps) if ceilings else None
        known = {"floor_ms": floor.ms, "bound": floor.bound, "of_roofline": floor.ms / ms} if floor else {}
        moved = cell.steps * (cost["weight_bytes"] + cell.batch * cost["activation_bytes"])
        return {"flops": cell.steps * cell.batch * cost["flops"], "bytes": moved, **known}

    def memory(self) -> Line:
        """Return the most memory that PyTorch had on the card during the item, and begin anew."""
        if self.device == "cpu":
            return {}
        most = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return {"memory_mib": round(most / 2**20)}

    def model(self, network: str) -> Checkpoint:
        """Return a network with random weights on the device."""
        if network not in self._models:
            model = random_model(network, self.device)
            self._models[network] = _OnDevice(spec=model.spec, network=model.network, weights=model.weights)
        return self._models[network]

    def eager(self, network: str, precision: str) -> TorchBackend:
        """Return eager PyTorch, kept until another network or precision is asked for."""
        if self._eager is None or self._eager[0] != (network, precision):
            self._eager = None
            self._eager = ((network, precision), self.open(network, precision, EAGER))
        return self._eager[1]

    def open(self, network: str, precision: str, way: str) -> TorchBackend:
        """Return an engine, or raise NotHere where this version or this card has no such way."""
        try:
            return TorchBackend(self.model(network), self.device, None, way, precision)
        except EngineError as err:
            raise NotHere(str(err)) from None

    def cost(self, network: str, precision: str) -> dict[str, float]:
        """Return what one image costs in one call."""
        key, spec = (network, precision), self.model(network).spec
        if key not in self._costs:
            self._costs[key] = count(self.eager(*key).denoiser, spec.image, spec.classes, self.device)
        return self._costs[key]

    def inputs(self, cell: Cell) -> tuple[Any, Any, tuple[float, ...]]:
        """Return noise [K, B, C, H, W], labels [B] or None, and noise levels."""
        spec = self.model(cell.network).spec
        noise = _noise(cell.batch, cell.steps, spec.image)
        return noise, labels(0, range(cell.batch), spec.classes) if spec.classes else None, spec.levels(cell.steps)


def compare(want: Any, got: Any, precision: str, device: str) -> tuple[float, float]:
    """Return the largest difference of images and what is allowed; raise if it is more."""
    if not np.isfinite(got).all():
        raise NotFinite("the images are not finite")
    dtype = PRECISIONS[precision]
    # Libraries may choose Winograd's convolutions in float32, which cost some digits.
    allowed = WINOGRAD if dtype == "float32" else ROUNDING[dtype]
    difference = float(np.abs(want - got).max())
    if not difference <= allowed:
        raise CheckFailed(f"the images differ from eager's by {difference:.2e} (allowed {allowed:g})")
    return difference, allowed


def summarise(times: Sequence[float]) -> dict[str, float]:
    return dataclasses.asdict(timing.summarise(times))


def median_compute_ms(times: Sequence[DeviceTimes]) -> float:
    return statistics.median(each.compute_ms for each in times)


@functools.lru_cache(maxsize=2)
def _noise(batch: int, steps: int, image: tuple[int, int, int]) -> Any:
    return np.stack([gaussian(0, range(batch), k, image) for k in range(steps)])


@dataclass(frozen=True, kw_only=True)
class _OnDevice(Checkpoint):
    """A checkpoint whose weights lie where they are used, and are random: opening an engine hashes none of them."""

    def sha256(self) -> str:
        return ""
