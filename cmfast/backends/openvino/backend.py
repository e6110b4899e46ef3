# SPDX-License-Identifier: MIT
"""OpenVINO on a CPU: .onnx files and its own IR, in a precision that is stated and never chosen in silence.

model = cmfast.load("model.onnx", variant="openvino", precision="bf16")
model = cmfast.load("model.xml")                    # in the precision that it was exported and verified with
"""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.cache import check_cache
from cmfast.backends.openvino.compiled import Disk, Graphs, Ready
from cmfast.backends.openvino.library import TYPES, capabilities, cause, check_precision, cpu_name, import_openvino
from cmfast.backends.openvino.precise import marked
from cmfast.backends.origin import Origin, pickled
from cmfast.backends.ports import Port, check_ports
from cmfast.backends.protocol import Inputs
from cmfast.checks import usable_cores
from cmfast.errors import ArtifactError, BackendError, CmfastError, backend_error
from cmfast.formats.manifest import Manifest, check_plain
from cmfast.formats.onnx_file import DESCRIPTORS, OnnxFile
from cmfast.formats.openvino_ir import IrFile
from cmfast.formats.table import OPENVINO, format_of
from cmfast.formats.values import PRECISIONS

TYPE_NAMES = ("f32", "i64")
VARIANTS = ("", "throughput")  # beside "openvino", which chooses this backend for an .onnx file


class OpenVinoBackend:
    """A graph run by OpenVINO on the CPU: a `cmfast.Backend`.

    A batch size that is used for the first time is compiled for, which takes about a second; four are kept, and more
    than that run by a graph for any size until one comes several times in a row (`compiled`). Dynamic sizes of
    conditions stay dynamic. With $CMFAST_CACHE set, compiled graphs are kept in that folder, by content: it is safe to
    delete, and no other user may write to it.

    One thread at a time. Attributes are those of the protocol; `manifest.dtype` is what is computed in.
    """

    origin: Origin | None = None

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int | None = None,
        variant: str = "",
        sha256: str | None = None,
        precision: str = "",
    ) -> None:
        """Open a file.

        Args:
            path: An .onnx or an .xml file.
            device: cpu.
            threads: CPU threads; None: all cores.
            variant: "": all threads on one batch (OpenVINO's hint LATENCY). "throughput": a batch in as many parts as
                there are threads, each on a stream of its own (its hint THROUGHPUT). With "openvino" or without.
            sha256: What the file must hash to.
            precision: fp32, bf16 or fp16, what the network computes in; "": what the file says.

        Raises:
            MissingDependency: OpenVINO is not installed.
            BackendError: The CPU lacks the precision, or there is no such variant.
            ArtifactError: The file is not whole, or does not compute what its manifest says.
        """
        self._streams = _streams(path, device, variant, threads)
        ov = import_openvino(f"running {path.name} by OpenVINO")
        core = ov.Core()
        self._file = IrFile(path, sha256) if format_of(path) is OPENVINO else OnnxFile(path, sha256)
        try:
            manifest = self._file.manifest
            check_plain(path, manifest, "OpenVINO", int8=True)
            dtype = PRECISIONS[precision] if precision else manifest.dtype
            check_precision(path, dtype, core)
            model, digest = _read(core, self._file)
            if dtype != "float32" and isinstance(self._file, OnnxFile):  # an IR of ours has the marks
                model = marked(ov, model)
            inputs, outputs = _ports(model.inputs), _ports(model.outputs)
            self._used = frozenset(port.name for port in inputs)
            self.batch = check_ports(path, manifest, _with_unused(inputs, manifest), outputs, TYPE_NAMES)
        except BaseException:
            self._file.close()
            raise
        if isinstance(self._file, OnnxFile):
            self._file.close()
        else:  # its weights are read whenever a graph is compiled
            weakref.finalize(self, self._file.close)
        self.manifest = replace(manifest, dtype=dtype)
        words = [dtype] * (dtype != "float32") + ["throughput"] * (self._streams > 1)
        self.name = " ".join(["OpenVINO cpu", *words])
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": TYPES[dtype][0],
            "PERFORMANCE_HINT": "THROUGHPUT" if self._streams > 1 else "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations become int8 where weights are
        }
        properties |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        free = frozenset(each.name for each in manifest.spec.conditions if each.dynamic)
        disk = _disk(digest, str(ov.__version__), core)
        check = functools.partial(_check_unchanged, self._file)
        self._graphs = Graphs(ov, model, properties, free=free, check=check, disk=disk)

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's output, float32 [B, *shape]."""
        axes = {name: self.manifest.batch_axis if name == "noise" else 0 for name in inputs}
        first = next(iter(axes))
        n = inputs[first].shape[axes[first]]
        size = n if self.batch else -(-n // self._streams)  # of a part, the last of which may be shorter
        parts = [range(start, min(start + size, n)) for start in range(0, n, size)]
        used = {name: value for name, value in inputs.items() if name in self._used}
        every = [{k: _part(v, axes[k], part, size) for k, v in used.items()} for part in parts]
        ready = self._graphs.ready({name: value.shape for name, value in every[0].items()}, len(parts))
        try:
            return self._run(ready, every, size, n)
        except CmfastError:
            raise
        except Exception as err:
            raise backend_error(f"{self.name} failed; if memory is short, try a smaller batch: {cause(err)}") from None

    def _run(self, ready: list[Ready], parts: Sequence[Inputs], size: int, n: int) -> npt.NDArray[np.float32]:
        result = np.empty((len(parts) * size, *self.manifest.spec.shape), np.float32)
        for begin in range(0, len(parts), len(ready)):
            started = list(zip(ready, parts[begin : begin + len(ready)], strict=False))
            for request, part in started:
                request.start(part)
            for index, (request, _) in enumerate(started, begin):
                output, want = request.wait(), (size, *result.shape[1:])
                if output.dtype != np.float32 or output.shape != want:
                    raise ArtifactError(
                        f"{self.name}: the graph returned {output.dtype} {list(output.shape)}, its manifest promises "
                        f"float32 {list(want)}; export the model again with cmfast-export"
                    )
                result[index * size : (index + 1) * size] = output
        return result[:n]


def _read(core: Any, file: IrFile | OnnxFile) -> tuple[Any, str]:
    """Return OpenVINO's model of the file that was opened, not of what its path names by now; and its digest."""
    try:
        if isinstance(file, OnnxFile):
            content = file.content()
            return core.read_model(content), hashlib.sha256(content).hexdigest()
        digest = file.manifest.graph_sha256
        if DESCRIPTORS.is_dir():
            return core.read_model(*(str(DESCRIPTORS / str(number)) for number in file.descriptors)), digest
        return core.read_model(bytes(file.graph), bytes(file.weights)), digest
    except CmfastError:
        raise
    except Exception as err:
        raise ArtifactError(f"{file.path}: OpenVINO cannot read it: {cause(err)}") from None


def _check_unchanged(file: IrFile | OnnxFile) -> None:
    if isinstance(file, IrFile) and file.changed:
        raise ArtifactError(f"{file.path}: it was written to since it was opened; open it again")


def _streams(path: Path, device: str, variant: str, threads: int | None) -> int:
    """Return how many parts of a batch run at a time."""
    if device != "cpu":
        raise BackendError(f"{path}: cmfast runs OpenVINO on the CPU only, not on {device}: --device cpu")
    words = " ".join(word for word in variant.split() if word != "openvino")
    if words not in VARIANTS:
        there = ", ".join(map(repr, VARIANTS))
        raise BackendError(f"{path}: OpenVINO has the variants {there}, not {words!r}")
    if not words:
        return 1
    return threads or usable_cores()


def _ports(nodes: Any) -> list[Port]:
    found = []
    for node in nodes:
        sides = tuple(side.get_length() if side.is_static else "?" for side in node.get_partial_shape())
        found.append(Port(min(node.get_names(), default=""), node.get_element_type().get_type_name(), sides))
    return found


def _with_unused(ports: list[Port], manifest: Manifest) -> list[Port]:
    """Return the inputs of a graph with those that it does not read, which OpenVINO drops from an .onnx file."""
    known = {port.name: port for port in ports}
    if list(known) != [each.name for each in manifest.inputs if each.name in known]:
        return ports
    return [
        known.get(each.name) or Port(each.name, TYPE_NAMES[each.dtype == "int64"], each.shape)
        for each in manifest.inputs
    ]


def _part(values: npt.NDArray[Any], axis: int, part: range, size: int) -> npt.NDArray[Any]:
    """Return `size` of the batch from the part's beginning, the last repeated where the part is shorter."""
    if len(part) == values.shape[axis]:
        return values
    index = np.minimum(np.arange(part.start, part.start + size), part.stop - 1)
    return np.take(values, index, axis=axis)


def _disk(digest: str, version: str, core: Any) -> Disk | None:
    """Return where compiled graphs are kept: in $CMFAST_CACHE, if it is set."""
    folder = os.environ.get("CMFAST_CACHE")
    if not folder:
        return None
    cpu = (cpu_name(core), *sorted(capabilities(core)))
    return Disk(folder=check_cache(folder, make=True), depends=(digest, version, *cpu))
