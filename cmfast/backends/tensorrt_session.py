# SPDX-License-Identifier: MIT
"""A TensorRT engine in memory, with a context, buffers and CUDA graphs for each batch size that was used."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.cache import read_entry, write_entry
from cmfast.backends.clock import Clock
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.cuda.drawing import Draws, Shapes
from cmfast.backends.protocol import Drawn, Inputs
from cmfast.backends.tensorrt_library import reason
from cmfast.errors import BackendError, OutOfMemory
from cmfast.formats.manifest import Manifest

KEPT = 3  # shapes of inputs whose buffers and graphs are kept; each has its own context, and with it its own memory
REBUILD = "build it here: cmfast-export model.onnx --format engine"


class TensorRtSession:
    """An engine with what its batch sizes need.

    Args:
        trt: The library.
        log: Its logger.
        engine: Deserialized.
        manifest: Of the file.
        name: Of the backend, for errors.
        kernel_file: Where TensorRT-RTX's compiled kernels are kept between processes; None: nowhere.
    """

    def __init__(
        self, trt: Any, log: Any, engine: Any, manifest: Manifest, name: str, kernel_file: Path | None
    ) -> None:
        self._trt, self._log, self._engine, self._manifest, self._name = trt, log, engine, manifest, name
        self._process = os.getpid()
        self._stream = cuda.Stream()
        self._ready: dict[tuple[tuple[str, tuple[int, ...]], ...], _Ready] = {}
        self._clock = Clock()
        self.timed = self._clock.timed
        self._kernel_file = kernel_file
        self._compiled: Any = None  # TensorRT-RTX's cache of kernels, kept in that file
        self._draws = Draws.of(manifest, self._stream, self._clock, name)

    @property
    def draws(self) -> bool:
        """Whether `draw` works here."""
        return self._draws is not None

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the output for inputs of a batch size that the engine takes."""
        ready = self._ready_for({name: values.shape for name, values in inputs.items()})
        if ready.graph is None and not self._captures_itself:
            self._stream.wait()
            ready.graph = self._stream.capture(ready.enqueue)
        work = ready.enqueue if ready.graph is None else functools.partial(self._stream.launch, ready.graph)
        return self._stream.run(inputs, ready.inputs, ready.output, work, self._clock.times)

    def draw(
        self, seed: int, batches: Sequence[tuple[range, Inputs]], sigmas: Sequence[float], *, pixels: bool
    ) -> Iterator[Drawn]:
        """Yield batches; the contract is `cmfast.backends.DrawBackend.draw`."""
        assert self._draws is not None
        least, _, most = self._manifest.engine["batch"]
        size = max(min(max((len(samples) for samples, _ in batches), default=1), most), least, 1)
        captures = not self._captures_itself
        return self._draws.draw(self._ready_for, seed, batches, sigmas, size, pixels=pixels, captures=captures)

    def release(self) -> None:
        """Free what is kept for batch sizes; the contract is `cmfast.backends.ReleasingBackend`."""
        cuda.check_process(self._process, self._name)
        try:
            self._stream.wait()  # for batches that were drawn and not fetched
        finally:
            while self._ready:
                self._close(self._ready.popitem()[1])

    def _ready_for(self, shapes: Shapes) -> _Ready:
        cuda.check_process(self._process, self._name)
        key = tuple(sorted(shapes.items()))
        ready = self._ready.pop(key, None) or self._prepare(shapes)
        self._ready[key] = ready  # the last used last
        return ready

    def _prepare(self, shapes: Shapes) -> _Ready:
        """Return a context for inputs of these shapes that has run once, its buffers bound."""
        while len(self._ready) >= KEPT:
            self._stream.wait()
            self._close(self._ready.pop(next(iter(self._ready))))
        batch = next(iter(shapes.values()))[self._manifest.batch_axis]
        context = self._context()
        if context is None:
            raise OutOfMemory(f"{self._name} has no memory for a batch of {batch}: {reason(self._log)}")
        buffers: dict[str, cuda.Buffer] = {}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        input_mode = self._trt.TensorIOMode.INPUT
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == input_mode]
        if sorted(inputs) != sorted(shapes):
            raise BackendError(f"{self._name}: the engine's inputs are {', '.join(inputs)}, got {', '.join(shapes)}")
        for name in inputs:
            shape = shapes[name]
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._name} does not take {name} {list(shape)}: {reason(self._log)}; {REBUILD}")
            buffers[name] = cuda.Buffer(shape, self._dtype_of(name))
        outputs = [name for name in names if name not in inputs]
        found, want = [tuple(context.get_tensor_shape(name)) for name in outputs], (batch, *self._manifest.spec.shape)
        if found != [want]:
            raise BackendError(
                f"{self._name}: the engine returns {found}, its manifest promises one {list(want)}; {REBUILD}"
            )
        (output,) = outputs
        self._dtype_of(output)
        buffers[output] = cuda.Buffer(want, np.float32)
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise BackendError(f"{self._name} does not take a buffer for {name}: {reason(self._log)}")
        # without self: a cycle would keep the GPU's memory until it is found
        enqueue = functools.partial(_enqueue, context, int(self._stream.handle), self._name, self._log)
        ready = _Ready(enqueue, {name: buffers[name] for name in inputs}, buffers[output])
        try:
            for buffer in ready.inputs.values():  # zeros, not what the memory held before: a label must be a class
                buffer.host[...] = 0
                self._stream.to_device(buffer)
            ready.enqueue()  # what is allocated at the first run must not be captured
            self._stream.wait()
        except BaseException:
            self._stream.settle()
            ready.close()
            raise
        if self._captures_itself and self._kernel_file is not None:
            write_entry(self._kernel_file.parent, self._kernel_file.name, bytes(self._compiled.serialize()))
        return ready

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        """Return the type of an input or of the output, or raise BackendError where it is not the manifest's."""
        found: np.dtype[Any] = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        want = {each.name: np.dtype(each.dtype) for each in self._manifest.inputs}.get(name, np.dtype(np.float32))
        if found != want:
            raise BackendError(f"{self._name}: the engine has {name} in {found}, its manifest in {want}; {REBUILD}")
        return found

    def _context(self) -> Any:
        if not self._captures_itself:
            return self._engine.create_execution_context()
        # TensorRT-RTX captures and replays by itself, because it changes kernels behind a capture of ours: it starts
        # with general ones unless told to compile those for the shape at once.
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._kernel_file is not None:
            if self._compiled is None:
                self._compiled = config.create_runtime_cache()
                kept = read_entry(self._kernel_file.parent, self._kernel_file.name)
                if kept is not None:  # what does not suit this card or driver it refuses, and compiles again
                    self._compiled.deserialize(kept)
            if not config.set_runtime_cache(self._compiled):
                raise BackendError(f"{self._name} does not take the kernels in {self._kernel_file}; remove that file")
        return self._engine.create_execution_context(config)

    @property
    def _captures_itself(self) -> bool:
        return bool(self._manifest.engine["library"] == "tensorrt_rtx")

    def _close(self, ready: _Ready) -> None:
        """Free what a batch size needed, after the loops that use it."""
        if self._draws is not None:
            self._draws.forget(ready)
        ready.close()


class _Ready:
    """What one batch size needs, at fixed addresses: a `cmfast.backends.cuda.drawing.Network`."""

    def __init__(self, enqueue: Callable[[], None], inputs: dict[str, cuda.Buffer], output: cuda.Buffer) -> None:
        self._enqueue: Callable[[], None] | None = enqueue
        self.inputs, self.output = inputs, output
        self.graph: cuda.Graph | None = None

    def enqueue(self) -> None:
        """Hand the engine over to the stream."""
        assert self._enqueue is not None, "it was closed"
        self._enqueue()

    def close(self) -> None:
        """Free graph, context and buffers."""
        if self.graph is not None:
            self.graph.close()
        self._enqueue = None  # and with it the context, before the buffers that it points to
        for buffer in (*self.inputs.values(), self.output):
            buffer.close()


def _enqueue(context: Any, stream: int, name: str, log: Any) -> None:
    if not context.execute_async_v3(stream):
        raise BackendError(f"{name} failed: {reason(log)}; if memory is short, try a smaller batch")
