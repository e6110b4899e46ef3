# SPDX-License-Identifier: MIT
"""As much of CUDA's runtime as an engine needs: buffers, a stream, events, graphs. Over cuda-bindings, without torch.

Everything here belongs to device 0; which card that is, CUDA_VISIBLE_DEVICES says. An error of CUDA is a BackendError
in one line.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.protocol import DeviceTimes, Inputs
from cmfast.errors import BackendError, MissingDependency, OutOfMemory, backend_error


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The card that engines run on."""

    name: str
    compute_capability: str  # "8.9"


def runtime() -> Any:
    """Return cuda.bindings.runtime, or raise with the line that installs it."""
    try:
        from cuda.bindings import runtime as bindings
    except ModuleNotFoundError:
        raise MissingDependency("running an engine on an NVIDIA GPU", "cuda-bindings", "gpu") from None
    return bindings


def open_gpu() -> Gpu:
    """Select device 0 and return what it is, or raise BackendError saying why there is none."""
    cuda = runtime()
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        why = _words(cuda, error) if int(error) else "no device is visible"
        raise BackendError(f"no NVIDIA GPU can be used here ({why}); check the driver: nvidia-smi")
    call(cuda.cudaSetDevice, 0)
    attribute = cuda.cudaDeviceAttr
    major = call(cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call(cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMinor, 0)
    name = call(cuda.cudaGetDeviceProperties, 0).name
    return Gpu(name=name.decode() if isinstance(name, bytes) else str(name), compute_capability=f"{major}.{minor}")


def check_process(opened: int, name: str) -> None:
    """Raise BackendError in a child of fork, where CUDA does not work; `opened`: the process that opened the engine."""
    if opened != os.getpid():
        raise BackendError(
            f"{name} was opened before this process was forked, and CUDA does not survive that; open the model here, "
            'in a process started by "spawn" (multiprocessing.set_start_method)'
        )


def call(function: Callable[..., Any], *arguments: Any, words: Callable[[Any], str] | None = None) -> Any:
    """Call a function of the runtime; return what it returns besides the error, or raise the error.

    Args:
        words: Returns what an error means; None: as the runtime says it.
    """
    error, *values = function(*arguments)
    if int(error):
        said = words(error) if words else _words(runtime(), error)
        raise _error(f"CUDA failed in {function.__name__}: {said}")
    return values[0] if values else None


class Stream:
    """A stream of its own, which does not wait for the default one."""

    def __init__(self) -> None:
        self._cuda = runtime()
        self.handle = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        self.close = _freed_with(self, self._cuda.cudaStreamDestroy, self.handle)

    def run(
        self,
        values: Inputs,
        inputs: Mapping[str, Buffer],
        output: Buffer,
        work: Callable[[], object],
        times: list[DeviceTimes] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Copy values into the device's inputs, hand over `work`, copy the output back; return it, waited for.

        Args:
            times: what it cost is appended here; None: no clock runs
        """
        begun = time.perf_counter()
        for name, buffer in inputs.items():
            np.copyto(buffer.host, values[name], casting="no")
        handing = time.perf_counter()
        events: list[Any] = []
        try:
            events += self._mark(times)
            for buffer in inputs.values():
                self.to_device(buffer)
            events += self._mark(times)
            work()
            events += self._mark(times)
            self.to_host(output)
            events += self._mark(times)
            enqueued = time.perf_counter()
            self.wait()
        except BaseException:
            self.forget(events)
            self.settle()
            raise
        result: npt.NDArray[np.float32] = output.host.copy()
        if times is not None:
            host_ms, enqueue_ms = 1000 * (time.perf_counter() - begun), 1000 * (enqueued - handing)
            device = dict(zip(("copy_in_ms", "compute_ms", "copy_out_ms"), self.times_ms(events), strict=True))
            times.append(DeviceTimes(host_ms=host_ms, enqueue_ms=enqueue_ms, **device))
        return result

    def wait(self) -> None:
        """Block until everything that was handed over is done."""
        call(self._cuda.cudaStreamSynchronize, self.handle)

    def settle(self) -> None:
        """Block as `wait` does while an error is raised: memory must not be freed under what is on the way."""
        self._cuda.cudaStreamSynchronize(self.handle)

    def wait_for(self, event: Any) -> None:
        """Block until an event of `mark` has happened."""
        call(self._cuda.cudaEventSynchronize, event)

    def to_device(self, buffer: Buffer, source: Pinned | None = None) -> None:
        """Hand over the copy of a buffer's host side, or of other host memory of its size, to its device side."""
        host = buffer if source is None else source
        self._copy(buffer.device, host.pinned, host.size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, buffer: Buffer | Memory, target: Pinned | None = None) -> None:
        """Hand over the copy of a buffer's device side to its host side, or to other host memory of its size."""
        host = buffer if target is None else target
        assert isinstance(host, (Buffer, Pinned)), "memory of the device alone has no host side"
        self._copy(host.pinned, buffer.device, host.size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def clear(self, address: int, size: int) -> None:
        """Hand over the zeroing of `size` bytes of the device."""
        call(self._cuda.cudaMemsetAsync, address, 0, size, self.handle)

    def mark(self) -> Any:
        """Return an event that happens when everything handed over so far is done."""
        event = call(self._cuda.cudaEventCreate)
        try:
            call(self._cuda.cudaEventRecord, event, self.handle)
        except BaseException:
            self.forget([event])
            raise
        return event

    def forget(self, events: list[Any]) -> None:
        """Destroy events."""
        for event in events:
            self._cuda.cudaEventDestroy(event)

    def times_ms(self, events: list[Any]) -> list[float]:
        """Return the device time between each event and the next, ms, and destroy them. The last one has happened."""
        try:
            return [float(call(self._cuda.cudaEventElapsedTime, start, end)) for start, end in pairwise(events)]
        finally:
            self.forget(events)

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record what `work` hands over, without running it, as a graph."""
        collects = gc.isenabled()
        gc.disable()  # it might free memory of the device, which breaks a capture
        try:
            graph = self._recorded(work)
        finally:
            if collects:
                gc.enable()
        try:
            return Graph(call(self._cuda.cudaGraphInstantiate, graph, 0))
        finally:
            call(self._cuda.cudaGraphDestroy, graph)

    def _recorded(self, work: Callable[[], object]) -> Any:
        # Thread-local: other threads may go on allocating, as other backends do.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            call(self._cuda.cudaStreamBeginCapture, self.handle, mode)
            work()
            return call(self._cuda.cudaStreamEndCapture, self.handle)
        except BaseException:
            _, graph = self._cuda.cudaStreamEndCapture(self.handle)  # its error would hide the cause
            if graph is not None and int(graph):
                self._cuda.cudaGraphDestroy(graph)
            raise

    def launch(self, graph: Graph) -> None:
        """Hand over a graph."""
        call(self._cuda.cudaGraphLaunch, graph.handle, self.handle)

    def _mark(self, times: list[DeviceTimes] | None) -> list[Any]:
        return [] if times is None else [self.mark()]

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        call(self._cuda.cudaMemcpyAsync, to, source, size, kind, self.handle)


class Graph:
    """A recorded sequence of work, launched as one; freed with its last reference, or by `close`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.close = _freed_with(self, runtime().cudaGraphExecDestroy, handle)


class Memory:
    """Memory of the device at a fixed address; freed with its last reference, or by `close`."""

    def __init__(self, size: int) -> None:
        cuda = runtime()
        self.size = size
        self.device = int(call(cuda.cudaMalloc, size))
        self.close = _freed_with(self, cuda.cudaFree, self.device)


class Pinned:
    """An array in page-locked host memory, which copies need.

    Freed with its last reference, or by `close`; then `host` must not be used any more.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        cuda = runtime()
        self.size = prod(shape) * np.dtype(dtype).itemsize
        self.pinned = int(call(cuda.cudaHostAlloc, self.size, cuda.cudaHostAllocDefault))
        self.close = _freed_with(self, cuda.cudaFreeHost, self.pinned)
        raw = memoryview((ctypes.c_byte * self.size).from_address(self.pinned))
        self.host: npt.NDArray[Any] = np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


class Buffer:
    """One array at two fixed addresses: on the device, and in page-locked host memory.

    Freed with its last reference, or by `close`; then `host` must not be used any more.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.size = prod(shape) * np.dtype(dtype).itemsize
        on_device = Memory(self.size)
        try:
            on_host = Pinned(shape, dtype)
        except BaseException:
            on_device.close()
            raise
        self.device, self.pinned, self.host = on_device.device, on_host.pinned, on_host.host
        self._sides = (on_device, on_host)

    def close(self) -> None:
        """Free both sides."""
        for side in self._sides:
            side.close()


def _freed_with(owner: object, function: Callable[[Any], Any], handle: Any) -> Callable[[], object]:
    """Free CUDA's side of an object when it goes; not when the process ends, which does it anyway.

    An error of it, of earlier work, has no caller to go to.
    """
    finalizer = weakref.finalize(owner, function, handle)
    finalizer.atexit = False
    return finalizer


def _error(message: str) -> BackendError:
    error = backend_error(message)
    return OutOfMemory(f"{message}; try a smaller batch") if isinstance(error, OutOfMemory) else error


def _words(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
