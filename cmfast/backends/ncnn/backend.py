# SPDX-License-Identifier: MIT
"""ncnn on a CPU: a .param with its .bin and manifest.json, in float32.

model = cmfast.load("model_ncnn/model.param", threads=2)

Its convolutions are Winograd's where that is faster, which no other backend of a CPU here has in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.origin import Origin, pickled
from cmfast.backends.protocol import Inputs
from cmfast.checks import usable_cores
from cmfast.errors import ArtifactError, BackendError, CmfastError, MissingDependency
from cmfast.formats.manifest import KINDS, Input, Manifest, check_plain
from cmfast.formats.ncnn_folder import NcnnFiles
from cmfast.formats.onnx_file import DESCRIPTORS

OUTPUT = "denoised"
SIZES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 11, 2)}  # a row's keys of width, height, depth, channels
# What ncnn would else compute in where the processor has it.
NARROW = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_int8_inference")


def import_ncnn(what: str) -> Any:
    """Return the module ncnn; `what` needs it, for the error."""
    try:
        return import_module("ncnn")
    except ModuleNotFoundError as err:
        if err.name != "ncnn":
            raise
        raise MissingDependency(what, "ncnn", "ncnn") from None


class NcnnBackend:
    """A graph run by ncnn on the CPU in float32: a `cmfast.Backend`.

    ncnn has no batch: the samples of one are computed one after the other, each by all threads.

    One thread at a time. Attributes are those of the protocol.
    """

    batch: int | None = None
    origin: Origin | None = None

    def __init__(
        self, path: Path, device: str = "cpu", threads: int | None = None, variant: str = "", sha256: str | None = None
    ) -> None:
        """Open a model.

        Args:
            path: A .param file.
            device: cpu.
            threads: CPU threads; None: all cores.
            variant: "", there is no other.
            sha256: None: a digest is of one file, and a model for ncnn has three.

        Raises:
            MissingDependency: ncnn is not installed.
            BackendError: There is no such device or variant.
            ArtifactError: The files are not whole, or ncnn cannot read them.
        """
        if device != "cpu" or variant:
            wrong = f"--device {device}" if device != "cpu" else f"--variant {variant}"
            raise BackendError(f"{path}: ncnn's files run on the CPU and have no variants; leave {wrong} out")
        if sha256 is not None:
            raise CmfastError(f"{path}: a SHA-256 is of one file, and this model has three: its weights are beside it")
        self._ncnn, self.name = import_ncnn(f"running {path.name}"), "ncnn cpu"
        with NcnnFiles(path) as files:
            self.manifest: Manifest = files.manifest
            check_plain(path, self.manifest, "ncnn")
            if self.manifest.kind != KINDS[0]:
                raise ArtifactError(f"{path}: ncnn's files hold a denoiser, and its manifest says {self.manifest.kind}")
            if self.manifest.dtype != "float32":
                raise ArtifactError(f"{path}: ncnn's files are float32, and its manifest says {self.manifest.dtype}")
            check_graph(self._ncnn, path, files.graph, self.manifest.inputs)
            self._net = new_net(self._ncnn, threads or usable_cores())
            weights = DESCRIPTORS / str(files.descriptor) if DESCRIPTORS.is_dir() else path.with_suffix(".bin")
            if self._net.load_param_mem(files.graph) or self._net.load_model(str(weights)):
                raise ArtifactError(f"{path}: ncnn {version('ncnn')} cannot read its files")
            if files.changed:
                raise ArtifactError(f"{path}: its weights were written to since they were opened; open it again")

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Evaluate the graph for each sample in turn.

        Args:
            inputs: What `cmfast.Backend.run` takes.

        Returns:
            The graph's output, float32 [B, *shape].
        """
        shape = self.manifest.spec.shape
        result = np.empty((len(inputs["x"]), *shape), np.float32)
        for i, found in enumerate(result):
            found[...] = self._one({name: values[i] for name, values in inputs.items()}).reshape(shape)
        return result

    def _one(self, inputs: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        status, out = begun(self._ncnn, self._net, inputs).extract(OUTPUT)
        if status:  # then there may be no output to look at
            raise BackendError(f"ncnn could not run the graph (status {status})")
        found = np.array(out, np.float32)
        if found.size != np.prod(self.manifest.spec.shape):
            raise BackendError(f"ncnn returned {list(found.shape)}, expected is {list(self.manifest.spec.shape)}")
        return found


def new_net(ncnn: Any, threads: int) -> Any:
    """Return an empty network that computes in float32 on the CPU."""
    net = ncnn.Net()
    for option in NARROW:
        setattr(net.opt, option, False)
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    return net


def begun(ncnn: Any, net: Any, inputs: Mapping[str, Any]) -> Any:
    """Return an extractor of ncnn with the inputs of one sample."""
    run = net.create_extractor()
    for name, value in inputs.items():
        array = np.atleast_1d(np.asarray(value))
        array = np.ascontiguousarray(array, np.int32 if array.dtype.kind == "i" else np.float32)
        run.input(name, ncnn.Mat(array).clone())  # Mat borrows the memory
    return run


def sizes(shape: Sequence[int | str]) -> list[str]:
    """Return the words that say in a row of a graph which sizes a blob has."""
    if len(shape) not in SIZES:
        raise CmfastError(f"ncnn's blobs have at most {max(SIZES)} axes, got {list(shape)}")
    return [f"{key}={side}" for key, side in zip(SIZES[len(shape)], reversed(shape), strict=True)]


def check_graph(ncnn: Any, path: Path, graph: str, inputs: Sequence[Input]) -> None:
    """Raise ArtifactError where ncnn would crash, skip operators, or take other inputs than `inputs`.

    Operators that ncnn has no layer for are left by pnnx when it converts. ncnn does not look at the sizes of inputs,
    and beyond those that the graph is made for it writes where it likes: the rows of the inputs have them.
    """
    _, counts, *rest = graph.splitlines() if graph.count("\n") > 2 else ("", "", "")
    lines = [line.split() for line in rest if line.strip()]
    if counts.split()[:1] != [str(len(lines))]:
        raise ArtifactError(f"{path}: a graph of {len(lines)} layers, and its second line says {counts[:40]!r}")
    kinds = {words[0] for words in lines}
    if lacking := sorted(kind for kind in kinds if ncnn.layer_to_index(kind) < 0):
        raise ArtifactError(f"{path}: ncnn {version('ncnn')} has no layer for {', '.join(lacking)} of this network")
    found = [" ".join(words[4:]) for words in lines if words[0] == "Input"]
    wanted = [" ".join([each.name, *sizes(each.shape[1:] or [1])]) for each in inputs]
    if found != wanted:
        raise ArtifactError(
            f"{path}: the graph's inputs are {', '.join(found)}; its manifest needs {', '.join(wanted)}; "
            "export it again"
        )
    if not any(OUTPUT in words[4:] for words in lines):
        raise ArtifactError(f"{path}: the graph has no output {OUTPUT}")
