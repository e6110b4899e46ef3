# SPDX-License-Identifier: MIT
"""One way to run a network in PyTorch, compared with eager PyTorch: an item of `gpu.py bench`.

An item is one way of one network in one precision at one batch size and number of steps. It opens its backend, compares
its images with eager's on the same noise, times the two in turns, and frees its memory, so no way takes another's,
and a failure is one line. Weights are random (`networks`) and stay on the device, where backends open in milliseconds.
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
from cmfast.conditions import some_values
from cmfast.errors import BackendError, CheckFailed
from cmfast.formats.manifest import ROUNDING, WINOGRAD
from cmfast.formats.values import PRECISIONS
from cmfast.noise import slices
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.build import build_network
from gpu_cost import count
from gpu_items import NotHere
from gpu_lines import Line, Lines
from networks import parameters, random_model

EAGER = ""
SECONDS, CALLS = 0.3, 5  # counted for each of the two, at least


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network in a precision, at a batch size and number of network calls."""

    network: str
    precision: str
    batch: int
    steps: int = 1

    @property
    def name(self) -> str:
        return f"{self.network} {self.precision} batch {self.batch} steps {self.steps}"


class Bench:
    """What items share: the models, the eager backend of the last network and precision, the lines so far."""

    def __init__(self, lines: Lines, device: str, seconds: float = SECONDS) -> None:
        self.lines, self.device, self.seconds = lines, device, seconds
        self._eager: tuple[tuple[str, str], TorchBackend] | None = None
        self._models: dict[str, Checkpoint] = {}
        self._costs: dict[tuple[str, str], dict[str, float]] = {}

    def row(self, cell: Cell, way: str) -> Line:
        """Return the line of one way at one cell."""
        eager = self.eager(cell.network, cell.precision)
        backend = self.open(cell.network, cell.precision, way) if way else eager
        noise, conditions, sigmas = self.inputs(cell)
        want = eager.loop(noise, sigmas, conditions)
        got = backend.loop(noise, sigmas, conditions)
        difference, allowed = compare(want, got, cell.precision, self.device)
        calls = {"eager": lambda: eager.loop(noise, sigmas, conditions)}
        backends = {"eager": eager}
        if way:
            calls["way"], backends["way"] = lambda: backend.loop(noise, sigmas, conditions), backend
        wall, on_device = self.timed(calls, backends)
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
        self, calls: dict[str, Any], backends: dict[str, TorchBackend]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return the wall times of counted calls and the compute times on the device of all calls, ms."""
        with contextlib.ExitStack() as stack:
            clocks: dict[str, list[DeviceTimes]] = {
                name: stack.enter_context(backend.timed()) if isinstance(backend, TimedBackend) else []
                for name, backend in backends.items()
            }
            wall = timing.interleave(calls, seconds=self.seconds, calls=CALLS, warmup_s=0.0)
        return wall, {name: [each.compute_ms for each in times] for name, times in clocks.items()}

    def roofline(self, cell: Cell, ms: float) -> Line:
        """Return how close a time is to the least that this card needs, by the ceilings in this file."""
        cost = self.cost(cell.network, cell.precision)
        ceilings = gpu_ceilings.ceilings(self.lines.found("ceiling"), self.device).get(PRECISIONS[cell.precision])
        floor = floor_ms(cost, ceilings, cell.batch, cell.steps) if ceilings else None
        known = {"floor_ms": floor.ms, "bound": floor.bound, "of_roofline": floor.ms / ms} if floor else {}
        moved = cell.steps * (cost["weight_bytes"] + cell.batch * cost["activation_bytes"])
        return {"flops": cell.steps * cell.batch * cost["flops"], "bytes": moved, **known}

    def memory(self) -> Line:
        """Return PyTorch's peak memory on the card during the item, and reset it."""
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
        """Return eager PyTorch, kept until another network or precision is requested."""
        if self._eager is None or self._eager[0] != (network, precision):
            self._eager = None
            self._eager = ((network, precision), self.open(network, precision, EAGER))
        return self._eager[1]

    def open(self, network: str, precision: str, way: str) -> TorchBackend:
        """Return a backend, or raise NotHere if this version or this card lacks the way."""
        try:
            return TorchBackend(self.model(network), self.device, None, way, precision)
        except BackendError as err:
            raise NotHere(str(err)) from None

    def cost(self, network: str, precision: str) -> dict[str, float]:
        """Return the cost of one image in one call."""
        key, spec = (network, precision), self.model(network).spec
        if key not in self._costs:
            self._costs[key] = count(self.eager(*key).denoiser, spec.image, spec.classes, self.device)
        return self._costs[key]

    def inputs(self, cell: Cell) -> tuple[Any, Any, tuple[float, ...]]:
        """Return noise [K, B, C, H, W], the conditions, and noise levels."""
        spec = self.model(cell.network).spec
        noise = _noise(cell.batch, cell.steps, spec.image)
        return noise, some_values(spec.conditions, cell.batch), spec.sigmas_for(cell.steps)


def compare(want: Any, got: Any, precision: str, device: str) -> tuple[float, float]:
    """Return the largest difference of the images and the one allowed.

    Raises:
        CheckFailed: the difference is larger.
    """
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
    return slices(0, range(batch), steps, image)


@dataclass(frozen=True, kw_only=True)
class _OnDevice(Checkpoint):
    """A checkpoint whose random weights are on the device: opening a backend hashes none of them."""

    def sha256(self) -> str:
        return ""

    def denoiser(self, network: Any = None) -> Denoiser:
        """Return the denoiser, which shares the weights: `Checkpoint.denoiser` would copy them to the CPU."""
        with torch.device("meta"):
            built = build_network(self.network)
        built.load_state_dict(dict(self.weights), assign=True)
        return Denoiser(built, self.spec).eval().requires_grad_(False)
