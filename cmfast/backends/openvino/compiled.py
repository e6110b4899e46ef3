# SPDX-License-Identifier: MIT
"""A graph compiled for the shapes of its calls, a few of them (`KEPT`): OpenVINO is faster where it knows them.

    graphs = Graphs(ov, model, {"INFERENCE_PRECISION_HINT": "f32"}, ...)
    output = graphs.ready({"x": (8, 3, 32, 32), "sigma": (8,)}).run({"x": x, "sigma": sigma})

Compiling takes a second, so what is compiled can be kept on disk, by content (`cmfast.backends.cache`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.cache import read_entry, write_entry
from cmfast.backends.openvino.library import cause
from cmfast.backends.protocol import Inputs
from cmfast.errors import BackendError, CmfastError, backend_error

KEPT = 4  # batch sizes that a graph is compiled for at a time; each has its own copy of the weights
REPEATED = 3  # calls in a row after which another batch size takes the place of the one that was used least recently
BLOB = 1  # changes when what is kept on disk does

Shape = tuple[int, ...]
Floats = npt.NDArray[np.float32]


class Ready:
    """A compiled graph and one request: buffers that it reads and writes, kept from call to call."""

    def __init__(self, ov: Any, compiled: Any) -> None:
        self._ov, self.compiled, self._request = ov, compiled, compiled.create_infer_request()
        self._views: dict[str, npt.NDArray[Any]] = {}

    def start(self, inputs: Inputs) -> None:
        """Copy the inputs and begin."""
        for name, value in inputs.items():
            view = self._views.get(name)
            if view is None or view.shape != value.shape:
                tensor = self._ov.Tensor(np.array(value, order="C"), shared_memory=False)
                self._request.set_tensor(name, tensor)
                view = self._views[name] = tensor.data
            view[...] = value
        self._request.start_async()

    def wait(self) -> Floats:
        """Return the output, [B, *shape], which the next call overwrites."""
        self._request.wait()
        output: Floats = self._request.get_output_tensor(0).data
        return output


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Where compiled graphs are kept between processes, and what they depend on beside shapes and properties."""

    folder: Path
    depends: tuple[str, ...]  # digest of the file, version of OpenVINO, CPU


class Graphs:
    """Compiled graphs of one model, at most KEPT for fixed batch sizes and one for any.

    Args:
        ov: The module openvino.
        model: An `openvino.Model`, which stays as it is.
        properties: Of a compiled model, by OpenVINO's names.
        free: Names of inputs whose sizes beside the batch stay dynamic.
        check: Raises where the files of the model have changed; called before each compilation.
        disk: None: nothing is kept on disk.
    """

    def __init__(
        self,
        ov: Any,
        model: Any,
        properties: Mapping[str, Any],
        *,
        free: frozenset[str] = frozenset(),
        check: Callable[[], None] = lambda: None,
        disk: Disk | None = None,
    ) -> None:
        self._ov, self._model, self._properties = ov, model, dict(properties)
        self._free, self._check, self._disk = free, check, disk
        self._core = ov.Core()
        self._static: dict[str, list[Ready]] = {}  # by shapes and streams, the last used last
        self._any: Ready | None = None
        self._last: tuple[str, int] = ("", 0)  # the shapes that had no place, and how often in a row

    def ready(self, shapes: Mapping[str, Shape], streams: int = 1) -> list[Ready]:
        """Return requests that take these shapes, as many as there are streams, compiled where they are new."""
        key = json.dumps([self._known(shapes), streams])
        if found := self._static.pop(key, None):
            self._static[key] = found
            return found
        if len(self._static) >= KEPT:
            self._last = (key, self._last[1] + 1 if self._last[0] == key else 1)
            if self._last[1] < REPEATED:
                self._any = self._any or self._compile({}, 1)[0]
                return [self._any]
            del self._static[next(iter(self._static))]
        self._static[key] = made = self._compile(shapes, streams)
        return made

    def _compile(self, shapes: Mapping[str, Shape], streams: int) -> list[Ready]:
        """Return requests of the graph for these shapes; {}: for any."""
        # The hint alone makes as many streams as there are threads, and a batch of one would have one thread.
        parted = self._properties["PERFORMANCE_HINT"] == "THROUGHPUT"
        properties = self._properties | ({"NUM_STREAMS": streams} if parted else {})
        name = self._entry(shapes, properties)
        try:
            compiled = self._imported(name, properties)
            if compiled is None:
                self._check()
                compiled = self._core.compile_model(self._reshaped(shapes), "CPU", properties)
                self._keep(name, compiled)
            self._check_precision(compiled)
            return [Ready(self._ov, compiled) for _ in range(streams)]
        except CmfastError:
            raise
        except Exception as err:  # the library raises RuntimeError, whatever happened
            raise backend_error(f"OpenVINO cannot compile the graph for {dict(shapes)}: {cause(err)}") from None

    def _known(self, shapes: Mapping[str, Shape]) -> list[tuple[str, Shape]]:
        """Return what a graph is compiled for: of an input with dynamic sizes the batch alone."""
        return sorted((name, shape[:1] if name in self._free else shape) for name, shape in shapes.items())

    def _reshaped(self, shapes: Mapping[str, Shape]) -> Any:
        model = self._model.clone()
        wanted = {}
        for name, shape in shapes.items():
            sides = list(model.input(name).get_partial_shape())[1:] if name in self._free else shape[1:]
            wanted[name] = self._ov.PartialShape([shape[0], *sides])
        if wanted:
            model.reshape(wanted)
        return model

    def _check_precision(self, compiled: Any) -> None:
        """Raise BackendError where OpenVINO took another precision: for float16 it takes bfloat16 without a word."""
        wanted = str(self._properties["INFERENCE_PRECISION_HINT"])
        found = compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != getattr(self._ov.Type, wanted):
            raise BackendError(
                f"OpenVINO was to compute in {wanted} and chose {found.get_type_name()} on this CPU; "
                "pass another --precision"
            )

    def _entry(self, shapes: Mapping[str, Shape], properties: Mapping[str, Any]) -> str:
        if self._disk is None:
            return ""
        depends = [BLOB, self._disk.depends, self._known(shapes), sorted(properties.items())]
        return f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.openvino"

    def _imported(self, name: str, properties: Mapping[str, Any]) -> Any:
        """Return the compiled graph of the cache, None where there is none or it is damaged."""
        kept = read_entry(self._disk.folder, name) if self._disk else None
        if kept is None or hashlib.sha256(kept[32:]).digest() != kept[:32]:
            return None
        try:
            return self._core.import_model(io.BytesIO(kept[32:]), "CPU", dict(properties))
        except Exception:  # of another build: it is compiled again
            return None

    def _keep(self, name: str, compiled: Any) -> None:
        if self._disk is None:
            return
        blob = compiled.export_model()
        content = blob.getvalue() if isinstance(blob, io.BytesIO) else bytes(blob)
        write_entry(self._disk.folder, name, hashlib.sha256(content).digest() + content)
