# SPDX-License-Identifier: MIT
"""Drawing where the network runs: noise, few-step loop and pixels on the device, without torch; only samples come back.

A `Loop` has everything of one batch size at fixed addresses, so that a stream can record it as one CUDA graph that
draws any seed and any samples. It computes what `cmfast.sampling.sample` and `cmfast.sampling.to_uint8` do, to the bit
where the network does.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cmfast.backends.clock import Clock
from cmfast.backends.cuda.kernels import Kernels
from cmfast.backends.cuda.runtime import Buffer, Graph, Memory, Pinned, Stream
from cmfast.backends.protocol import DeviceTimes, Drawn, Inputs
from cmfast.errors import BackendError, CmfastWarning
from cmfast.formats.manifest import Manifest
from cmfast.noise import as_u64, check_seed
from cmfast.sampling import calls_of

KEPT = 8  # loops
FLAG = 16  # bytes before the samples in a result: a word that says whether they are finite, and an alignment
KINDS = ("denoiser", "sampler")  # of files


class Network(Protocol):
    """A graph at one batch size, its arrays at fixed addresses."""

    @property
    def inputs(self) -> Mapping[str, Buffer]:
        """Arrays by the names of the graph's inputs."""
        ...

    @property
    def output(self) -> Buffer:
        """Float32 [B, *shape]."""
        ...

    def enqueue(self) -> None:
        """Hand the graph over to the stream."""
        ...


Shapes = Mapping[str, tuple[int, ...]]  # of inputs, by name


class Loop:
    """A few-step loop at one batch size.

    Args:
        stream: What the network runs on, too.
        kernels: On that stream.
        manifest: Of the network's file.
        network: A denoiser, or a sampler of as many steps.
        sigmas: Noise levels, data units.
        pixels: Images as uint8 [B, H, W, C], else float32 [B, *shape].
        captures: Record the loop as one CUDA graph.
    """

    def __init__(
        self,
        stream: Stream,
        kernels: Kernels,
        manifest: Manifest,
        network: Network,
        sigmas: Sequence[float],
        *,
        pixels: bool,
        captures: bool,
    ) -> None:
        self._stream, self._kernels, self._spec, self._network = stream, kernels, manifest.spec, network
        self._is_sampler = manifest.kind == "sampler"
        self._sigmas, self._pixels = tuple(float(sigma) for sigma in sigmas), pixels
        self._batch, *shape = network.output.host.shape
        self._size = math.prod(shape)
        self._shape = (self._batch, *((*shape[1:], shape[0]) if pixels else shape))
        self._dtype = np.dtype(np.uint8 if pixels else np.float32)
        self._request = Buffer((1 + self._batch,), np.uint64)
        self._result = Memory(FLAG + self._batch * self._size * self._dtype.itemsize)
        self._free: list[_Slot] = []
        self._graph: Graph | None = None
        if captures:
            try:
                self._compute()  # once before it is recorded: then libraries allocate and kernels are loaded
                stream.wait()
                self._graph = stream.capture(self._compute)
            except BaseException:
                stream.settle()
                raise

    def hand_over(self, seed: int, samples: npt.NDArray[np.uint64], conditions: Inputs, *, timed: bool) -> Call:
        """Hand over a batch; return the call, whose result can be waited for."""
        begun = time.perf_counter()
        slot = self._free.pop() if self._free else self._slot()
        slot.request.host[0], slot.request.host[1:] = seed, samples
        for name, host in slot.conditions.items():
            np.copyto(host.host, conditions[name], casting="no")
        handing = time.perf_counter()
        call = Call(stream=self._stream, slot=slot, free=self._free, shape=self._shape, dtype=self._dtype, begun=begun)
        try:
            call.mark(timed)
            self._stream.to_device(self._request, slot.request)
            for name, host in slot.conditions.items():
                self._stream.to_device(self._network.inputs[name], host)
            call.mark(timed)
            if self._graph is not None:
                self._stream.launch(self._graph)
            else:
                self._compute()
            call.mark(timed)
            self._stream.to_host(self._result, slot.result)
            call.mark(True)
        except BaseException:
            self._stream.forget(call.events)
            self._stream.settle()
            raise
        call.enqueue_s = time.perf_counter() - handing
        return call

    def close(self) -> None:
        """Free graph and memory, but not what a call still waits for."""
        if self._graph is not None:
            self._graph.close()
        self._request.close()
        self._result.close()

    @property
    def _conditions(self) -> list[str]:
        own = ("noise",) if self._is_sampler else ("x", "sigma", "sigma_next")
        return [name for name in self._network.inputs if name not in own]

    def _slot(self) -> _Slot:
        inputs = self._network.inputs
        return _Slot(
            request=Pinned(self._request.host.shape, np.uint64),
            conditions={name: Pinned(inputs[name].host.shape, inputs[name].host.dtype) for name in self._conditions},
            result=Pinned((self._result.size,), np.uint8),
        )

    def _compute(self) -> None:
        """Hand over everything between the copies."""
        self._stream.clear(self._result.device, FLAG)
        if self._is_sampler:
            self._sampler()
        else:
            self._denoiser()
        output, samples, flag = self._network.output.device, self._result.device + FLAG, self._result.device
        clip = self._spec.clip and not self._is_sampler  # a sampler clips itself
        if self._pixels:
            self._kernels.pixels(samples, flag, output, self._batch, self._spec.shape, clip=clip)
        else:
            self._kernels.values(samples, flag, output, self._batch * self._size, clip=clip)

    def _sampler(self) -> None:
        noise, step = self._network.inputs["noise"].device, 4 * self._batch * self._size
        for k in range(len(self._sigmas)):
            self._noise(noise + k * step, 0, k, 1.0)
        self._network.enqueue()

    def _denoiser(self) -> None:
        """Hand over what `cmfast.sampling.sample` computes; the last clipping is the result's."""
        spec, inputs, x0 = self._spec, self._network.inputs, self._network.output.device
        x = inputs["x"].device
        for k, call in enumerate(calls_of(self._sigmas, spec)):
            if call.ratio is None:
                self._noise(x, x0 if k else 0, k, call.std)
            else:
                self._kernels.less_noise(x, x0, self._batch * self._size, call.ratio, clip=spec.clip)
            self._kernels.fill(inputs["sigma"].device, self._batch, call.sigma)
            if spec.second_time:
                self._kernels.fill(inputs["sigma_next"].device, self._batch, call.sigma_next)
            self._network.enqueue()

    def _noise(self, x: int, x0: int, step: int, std: float) -> None:
        request = self._request.device
        self._kernels.add_noise(x, x0, request, self._batch, self._size, step, std, clip=self._spec.clip)


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """Page-locked memory of one call on the way."""

    request: Pinned
    conditions: Mapping[str, Pinned]
    result: Pinned


@dataclass(kw_only=True)
class Call:
    """A batch that was handed over."""

    stream: Stream
    slot: _Slot
    free: list[_Slot]  # where the slot goes afterwards
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    begun: float
    enqueue_s: float = 0.0
    events: list[Any] = field(default_factory=list)  # the last one when everything is done

    def mark(self, wanted: bool) -> None:
        """Add an event."""
        if wanted:
            self.events.append(self.stream.mark())

    def result(self, times: list[DeviceTimes] | None) -> Drawn:
        """Wait, and return the samples, which are the caller's; append what they cost to `times`."""
        try:
            self.stream.wait_for(self.events[-1])
        except BaseException:
            self.stream.forget(self.events)
            self.stream.settle()
            raise
        flag, samples = self.slot.result.host[:4], self.slot.result.host[FLAG:]
        drawn = Drawn(samples.view(self.dtype).reshape(self.shape).copy(), finite=not flag.any())
        self.free.append(self.slot)
        if times is not None and len(self.events) > 1:
            host_ms, enqueue_ms = 1000 * (time.perf_counter() - self.begun), 1000 * self.enqueue_s
            device = dict(
                zip(("copy_in_ms", "compute_ms", "copy_out_ms"), self.stream.times_ms(self.events), strict=True)
            )
            times.append(DeviceTimes(host_ms=host_ms, enqueue_ms=enqueue_ms, **device))
        else:
            self.stream.forget(self.events)
        return drawn


class Draws:
    """What a file on a GPU draws with: the kernels, and loops for its networks, noise levels and kinds of results.

    Args:
        manifest: Of the file.
        stream: What its networks run on.
        clock: Its list gets the times of each part.
        kernels: On that stream.
    """

    def __init__(self, manifest: Manifest, stream: Stream, clock: Clock, kernels: Kernels) -> None:
        self._manifest, self._stream, self._clock, self._kernels = manifest, stream, clock, kernels
        self._loops: dict[tuple[Network, tuple[float, ...], bool], Loop] = {}

    @classmethod
    def of(cls, manifest: Manifest, stream: Stream, clock: Clock, name: str) -> Draws | None:
        """Return one; None for a file of another kind, and with a warning where the kernels cannot be loaded."""
        if manifest.kind not in KINDS:
            return None
        try:
            return cls(manifest, stream, clock, Kernels(stream))
        except BackendError as err:
            text = f"{name} draws noise and pixels on the CPU, which gives the same samples more slowly: {err}"
            warnings.warn(text, CmfastWarning, stacklevel=2)
            return None

    def draw(
        self,
        network_of: Callable[[Shapes], Network],
        seed: int,
        batches: Sequence[tuple[range, Inputs]],
        sigmas: Sequence[float],
        size: int,
        *,
        pixels: bool,
        captures: bool,
    ) -> Iterator[Drawn]:
        """Yield batches; the contract is `cmfast.backends.DrawBackend.draw`.

        Args:
            network_of: Returns the network for inputs of these shapes, made anew where it was freed.
            seed: Of the noise.
            batches: Indices of the samples, and their conditions.
            sigmas: Noise levels, data units.
            size: Samples at a time: larger batches are drawn in parts, and what is smaller is filled up with its last.
            pixels: Images as uint8, else float32.
            captures: Record each loop as one CUDA graph.
        """
        seed, levels = check_seed(seed), tuple(map(float, sigmas))

        def calls() -> Iterator[Call]:
            for samples, conditions in _parts(batches, size):
                network = network_of(_shapes(self._manifest, size, len(levels), conditions))
                loop = self._loop(network, levels, pixels, captures)
                yield loop.hand_over(seed, samples, conditions, timed=self._clock.times is not None)

        results = self._results(calls())
        try:
            for samples, _ in batches:
                parts = [next(results) for _ in range(0, len(samples), size)]
                images = [part.images for part in parts] or [self._nothing(pixels)]
                whole = images[0] if len(images) == 1 else np.concatenate(images)
                yield Drawn(whole[: len(samples)], finite=all(part.finite for part in parts))
        finally:
            results.close()

    def forget(self, network: Network) -> None:
        """Free the loops of a network, for which nothing is on the way."""
        for key in [key for key in self._loops if key[0] is network]:
            self._loops.pop(key).close()

    def _results(self, calls: Iterator[Call]) -> Generator[Drawn, None, None]:
        """Yield the result of each call, while the device has the next one."""
        before: Call | None = None
        try:
            for following in calls:
                done, before = before, following
                if done is not None:
                    yield done.result(self._clock.times)
            if before is not None:
                done, before = before, None
                yield done.result(self._clock.times)
        finally:
            if before is not None:  # not wanted any more, and its memory must not be freed under it
                with suppress(BackendError):
                    before.result(None)

    def _nothing(self, pixels: bool) -> npt.NDArray[Any]:
        """Return the samples of an empty batch."""
        shape = self._manifest.spec.shape
        return np.empty((0, *shape[1:], shape[0]), np.uint8) if pixels else np.empty((0, *shape), np.float32)

    def _loop(self, network: Network, sigmas: tuple[float, ...], pixels: bool, captures: bool) -> Loop:
        key = (network, sigmas, pixels)
        loop = self._loops.pop(key, None)
        if loop is None:
            self._stream.wait()
            while len(self._loops) >= KEPT:
                self._loops.pop(next(iter(self._loops))).close()
            loop = Loop(self._stream, self._kernels, self._manifest, network, sigmas, pixels=pixels, captures=captures)
        self._loops[key] = loop  # the last used last
        return loop


def _parts(
    batches: Sequence[tuple[range, Inputs]], size: int
) -> Iterator[tuple[npt.NDArray[np.uint64], dict[str, npt.NDArray[Any]]]]:
    """Yield indices and conditions of `size` samples at a time, the last repeated where there are fewer."""
    for samples, conditions in batches:
        for start in range(0, len(samples), size):
            index = np.minimum(np.arange(start, start + size), len(samples) - 1)
            numbers = as_u64(samples[start : start + size], "sample")
            yield numbers[index - start], {name: value[index] for name, value in conditions.items()}


def _shapes(manifest: Manifest, size: int, steps: int, conditions: Inputs) -> Shapes:
    shape = (size, *manifest.spec.shape)
    given = {name: value.shape for name, value in conditions.items()}
    if manifest.kind == "sampler":
        return {"noise": (steps, *shape), **given}
    second = {"sigma_next": (size,)} if manifest.spec.second_time else {}
    return {"x": shape, "sigma": (size,), **second, **given}
