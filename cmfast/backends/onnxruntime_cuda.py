# SPDX-License-Identifier: MIT
"""A session of ONNX Runtime on CUDA, with its buffers.

The arrays stay at fixed addresses on the device, bound once a batch size, and everything goes over one stream of ours:
the copy in, the graph, the copy out. Handed over without waiting in between, it costs ONNX Runtime no copies of its
own, and events on that stream tell what the device did.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends import cuda_runtime as cuda
from cmfast.backends.clock import Clock
from cmfast.backends.onnxruntime_library import cause
from cmfast.backends.protocol import Inputs
from cmfast.errors import BackendError, backend_error
from cmfast.formats.manifest import Manifest

KEPT = 8  # batch sizes whose buffers, and captured graphs, are kept


class CudaSession:
    """A session on CUDA with its buffers, a set of them for each batch size that was used."""

    def __init__(
        self, ort: Any, session: Any, manifest: Manifest, stream: cuda.Stream, *, captures: bool, place: str = "cuda"
    ) -> None:
        self._ort, self._session, self._manifest, self._stream = ort, session, manifest, stream
        self._place = place  # where the buffers' device side is, in ONNX Runtime's words
        # A captured graph reads and writes the addresses that it was captured with, so a set of buffers has an id of
        # its own, which is never given again. ONNX Runtime keeps 0 for itself.
        self._ids = itertools.count(1) if captures else None
        self._names = [node.name for node in session.get_inputs()]
        self._ready: dict[tuple[tuple[int, ...], ...], _Bound] = {}
        self._clock = Clock()
        self.timed = self._clock.timed

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the output for these inputs, which are copied in and out."""
        if sorted(inputs) != sorted(self._names):
            raise BackendError(f"the graph's inputs are {', '.join(self._names)}, got {', '.join(inputs)}")
        key = tuple(inputs[name].shape for name in self._names)
        new = key not in self._ready
        bound = self._bind(inputs) if new else self._ready.pop(key)

        def work() -> None:
            self._session.run_with_iobinding(bound.binding, bound.options)

        try:
            result = self._stream.run(inputs, bound.inputs, bound.output, work, self._clock.times)
        except Exception as err:
            self._close(bound)
            raise backend_error(f"{self._failure(new)}: {cause(err)}") from None
        self._ready[key] = bound  # the last used last
        return result

    def release(self) -> None:
        """Free what is kept for batch sizes; the contract is `cmfast.backends.ReleasingBackend`."""
        while self._ready:
            self._close(self._ready.popitem()[1])

    def _bind(self, inputs: Inputs) -> _Bound:
        """Return buffers for inputs of these shapes, bound to the session."""
        while len(self._ready) >= KEPT:
            self._close(self._ready.pop(next(iter(self._ready))))
        types = {each.name: np.dtype(each.dtype).type for each in self._manifest.inputs}
        buffers = {name: cuda.Buffer(inputs[name].shape, types[name]) for name in self._names}
        batch = inputs[self._names[0]].shape[self._manifest.batch_axis]
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
        return _Bound(inputs=buffers, output=output, binding=binding, options=options, graph=number)

    def _close(self, bound: _Bound) -> None:
        """Free a set of buffers, after the graph that uses them."""
        if bound.graph is not None and hasattr(self._session, "release_captured_graph"):  # ONNX Runtime 1.31
            with contextlib.suppress(Exception):  # of a graph whose capture failed
                self._session.release_captured_graph(bound.graph)
        for buffer in (*bound.inputs.values(), bound.output):
            buffer.close()

    def _failure(self, new: bool) -> str:
        if new and self._ids:
            return "ONNX Runtime could not capture this graph as a CUDA graph; use it without the variant cuda_graph"
        return "ONNX Runtime failed on cuda; if memory is short, try a smaller batch"


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """What one batch size needs, at fixed addresses."""

    inputs: dict[str, cuda.Buffer]
    output: cuda.Buffer
    binding: Any  # onnxruntime.IOBinding
    options: Any  # onnxruntime.RunOptions
    graph: int | None  # the captured graph's id
