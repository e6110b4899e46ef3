# SPDX-License-Identifier: MIT
"""A session of ONNX Runtime on CUDA, with its buffers.

The arrays stay at fixed addresses on the device, bound once a batch size, and everything goes over one stream of ours:
the copy in, the graph, the copy out. Handed over without waiting in between, it costs ONNX Runtime no copies of its
own, and events on that stream tell what the device did. A drawing adds cmfast's kernels to that stream, before and
after each call of the graph.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.clock import Clock
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.cuda.drawing import Draws, Shapes
from cmfast.backends.onnxruntime_library import cause
from cmfast.backends.protocol import Drawn, Inputs
from cmfast.errors import BackendError, CmfastError, OutOfMemory, backend_error
from cmfast.formats.manifest import Manifest

KEPT = 8  # batch sizes whose buffers, and captured graphs, are kept


class CudaSession:
    """A session on CUDA with its buffers, a set of them for each batch size that was used.

    Args:
        ort: The library.
        session: On the stream.
        manifest: Of the file.
        stream: What everything is handed over to.
        name: Of the backend, for errors.
        batch: The only batch size that the graph takes; None: any.
        captures: Whether the session records CUDA graphs.
        place: Where the buffers' device side is, in ONNX Runtime's words.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        manifest: Manifest,
        stream: cuda.Stream,
        name: str,
        *,
        batch: int | None,
        captures: bool,
        place: str = "cuda",
    ) -> None:
        self._ort, self._session, self._manifest, self._stream = ort, session, manifest, stream
        self._name, self._process, self._batch, self._place = name, os.getpid(), batch, place
        # A captured graph reads and writes the addresses that it was captured with, so a set of buffers has an id of
        # its own, which is never given again. ONNX Runtime keeps 0 for itself.
        self._ids = itertools.count(1) if captures else None
        self._names = [node.name for node in session.get_inputs()]
        self._ready: dict[tuple[tuple[int, ...], ...], _Bound] = {}
        self._clock = Clock()
        self.timed = self._clock.timed
        self._draws = Draws.of(manifest, stream, self._clock, name)

    @property
    def draws(self) -> bool:
        """Whether `draw` works here."""
        return self._draws is not None

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the output for these inputs, which are copied in and out."""
        bound = self._bound({name: values.shape for name, values in inputs.items()})
        try:
            result = self._stream.run(inputs, bound.inputs, bound.output, bound.enqueue, self._clock.times)
        except Exception as err:
            raise self._failed(bound, err) from None
        return result

    def draw(
        self, seed: int, batches: Sequence[tuple[range, Inputs]], sigmas: Sequence[float], *, pixels: bool
    ) -> Iterator[Drawn]:
        """Yield batches; the contract is `cmfast.backends.DrawBackend.draw`."""
        assert self._draws is not None
        size = self._batch or max((len(samples) for samples, _ in batches if samples), default=1)
        bound: _Bound | None = None

        def network_of(shapes: Shapes) -> _Bound:
            nonlocal bound
            bound = self._bound(shapes)
            return bound

        # Not recorded: ONNX Runtime records within one call of its own, and forbids it around several.
        drawn = self._draws.draw(network_of, seed, batches, sigmas, size, pixels=pixels, captures=False)
        try:
            yield from drawn
        except Exception as err:
            of_caller = isinstance(err, CmfastError) and not isinstance(err, BackendError)
            if of_caller or os.getpid() != self._process:
                raise
            raise self._failed(bound, err) from None

    def release(self) -> None:
        """Free what is kept for batch sizes; the contract is `cmfast.backends.ReleasingBackend`."""
        cuda.check_process(self._process, self._name)
        try:
            self._stream.wait()  # for batches that were drawn and not fetched
        finally:
            while self._ready:
                self._close(self._ready.popitem()[1])

    def _bound(self, shapes: Shapes) -> _Bound:
        """Return buffers for inputs of these shapes, bound to the session."""
        cuda.check_process(self._process, self._name)
        if sorted(shapes) != sorted(self._names):
            raise BackendError(f"the graph's inputs are {', '.join(self._names)}, got {', '.join(shapes)}")
        key = tuple(shapes[name] for name in self._names)
        bound = self._ready.pop(key, None) or self._bind(shapes)
        self._ready[key] = bound  # the last used last
        return bound

    def _bind(self, shapes: Shapes) -> _Bound:
        while len(self._ready) >= KEPT:
            self._stream.wait()
            self._close(self._ready.pop(next(iter(self._ready))))
        types = {each.name: np.dtype(each.dtype).type for each in self._manifest.inputs}
        buffers = {name: cuda.Buffer(shapes[name], types[name]) for name in self._names}
        batch = shapes[self._names[0]][self._manifest.batch_axis]
        output = cuda.Buffer((batch, *self._manifest.spec.shape), np.float32)
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            binding.bind_input(name, self._place, 0, types[name], buffer.host.shape, buffer.device)
        (node,) = self._session.get_outputs()
        binding.bind_output(node.name, self._place, 0, np.float32, output.host.shape, output.device)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # our stream waits, once
        number = next(self._ids) if self._ids else None
        if number is not None:
            options.add_run_config_entry("gpu_graph_id", str(number))
        return _Bound(self._session, buffers, output, binding, options, number, self._stream)

    def _close(self, bound: _Bound) -> None:
        """Free a set of buffers, after the loops and the graph that use them."""
        if self._draws is not None:
            self._draws.forget(bound)
        if bound.graph is not None and hasattr(self._session, "release_captured_graph"):  # ONNX Runtime 1.31
            with contextlib.suppress(Exception):  # of a graph whose capture failed
                self._session.release_captured_graph(bound.graph)
        for buffer in (*bound.inputs.values(), bound.output):
            buffer.close()

    def _failed(self, bound: _Bound | None, err: Exception) -> BackendError:
        """Return the error for what ONNX Runtime or CUDA raised; the buffers, and what was recorded, are freed."""
        is_new = bound is not None and bound.is_new
        for key in [key for key, value in self._ready.items() if value is bound]:
            self._close(self._ready.pop(key))
        if isinstance(err, OutOfMemory):
            return OutOfMemory(str(err))
        what = "ONNX Runtime failed on cuda; if memory is short, try a smaller batch"
        if is_new and self._ids:
            what = "ONNX Runtime could not capture this graph as a CUDA graph; use it without the variant cuda_graph"
        return backend_error(f"{what}: {cause(err)}")


@dataclass(eq=False)
class _Bound:
    """What one batch size needs, at fixed addresses: a `cmfast.backends.cuda.drawing.Network`."""

    session: Any
    inputs: dict[str, cuda.Buffer]
    output: cuda.Buffer
    binding: Any  # onnxruntime.IOBinding
    options: Any  # onnxruntime.RunOptions
    graph: int | None  # the captured graph's id
    stream: cuda.Stream  # which must outlive the session
    is_new: bool = True  # nothing was handed over yet

    def enqueue(self) -> None:
        """Hand the graph over to the stream."""
        self.session.run_with_iobinding(self.binding, self.options)
        self.is_new = False
