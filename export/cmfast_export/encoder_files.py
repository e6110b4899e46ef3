# SPDX-License-Identifier: MIT
"""Encoders in files of their own, beside the file of a denoiser or sampler that takes what they make.

Each is traced, written and compared with PyTorch as a denoiser is; `pipeline` exports the other file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.conditions import some_values
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import atomic_file, check_target
from cmfast.formats.manifest import ENCODER, Manifest, graph_sha256
from cmfast.formats.table import ONNX
from cmfast.formats.values import PRECISIONS
from cmfast_export import BF16_OPSET, DEFAULT_OPSET
from cmfast_export._target import writing
from cmfast_export.graphs import writer
from cmfast_export.graphs.emulate import emulate_file
from cmfast_export.graphs.encoder import EncoderGraph, encode, encoder_graph, encoders_of, without_encoders
from cmfast_export.graphs.half import halved
from cmfast_export.graphs.storage import stored_as_float16
from cmfast_export.request import GraphRequest
from cmfast_export.verify import SIZES, Parity, row_of
from cmfast_train.denoiser import Denoiser

BATCHES = (1, 2, 5)
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """An encoder that was written.

    Attributes:
        path: the .onnx file.
        manifest: what it says of itself.
        parity: how far it is from PyTorch, of the largest value where that is above 1.
    """

    path: Path
    manifest: Manifest
    parity: Parity


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Encoders that have been written, and the denoiser without them."""

    denoiser: Denoiser
    files: tuple[EncoderFile, ...]
    graphs: Mapping[str, EncoderGraph] = field(repr=False)

    @property
    def digests(self) -> dict[str, str]:
        """What the other file's manifest records."""
        return {file.manifest.spec.conditions[0].name: file.manifest.graph_sha256 for file in self.files}

    def given(self, whole: Denoiser, n: int, seed: int, size: int) -> Arrays:
        """Return values of the conditions to compare with, encoded by PyTorch."""
        values = some_values(whole.spec.conditions, n, seed=seed, size=size)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
        return {name: value.numpy() for name, value in encode(self.graphs, tensors).items()}


def encoder_paths(model: object, out: Path, encoders: Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    """Return where the encoder of each condition is written.

    Args:
        model: what is exported.
        out: the other file.
        encoders: files by conditions; "": of the only encoder.

    Raises:
        CmfastError: the model has no encoders, not these, or a file cannot be written.
    """
    have = encoders_of(model) if isinstance(model, Denoiser) else {}
    if not have:
        raise CmfastError(
            "this model has no encoder to write apart; cmfast_train.wrap(net, encoders={'image': module})"
        )
    only = next(iter(have))
    named = {name or (only if len(have) == 1 else ""): Path(path) for name, path in encoders.items()}
    if named.keys() != have.keys():
        need = f"{only}=FILE" if len(have) == 1 else ", ".join(f"{name}=FILE" for name in have)
        raise CmfastError(f"this model has encoders of {', '.join(have)}, and each needs a file: {need}")
    paths = [os.path.realpath(path) for path in (out, *named.values())]
    if len(set(paths)) < len(paths):
        raise CmfastError(f"{out}: the encoder and the other file need names of their own")
    return {name: check_target(path, ONNX.suffixes) for name, path in named.items()}


@contextmanager
def encoders_apart(
    whole: Denoiser, paths: Mapping[str, Path], request: GraphRequest, manifest: Manifest
) -> Iterator[Apart]:
    """Write and verify encoders; the files get their names when the block has ended well.

    Args:
        whole: a copy to evaluate.
        paths: by the names of their conditions.
        request: of the other graph.
        manifest: of the whole model.
    """
    declared = [each.name for each in whole.spec.conditions if each.null is not None]
    absent = [name for name in request.null or declared if name.removesuffix("_encoded") in paths]
    if request.guidance is not None and absent:
        raise CmfastError(
            f"guidance without the condition {absent[0]} needs what its encoder makes of nothing; export one graph"
        )
    with ExitStack() as stack:
        graphs, files = {}, []
        for name, module in encoders_of(whole).items():
            condition = next(each for each in whole.spec.conditions if each.name == name)
            opset = request.opset or (BF16_OPSET if request.precision == "bf16" else DEFAULT_OPSET)
            graphs[name] = encoder_graph(module, condition, request.batch, opset)
            stack.enter_context(writing(paths[name]))
            file = stack.enter_context(atomic_file(paths[name]))
            files.append(_written(graphs[name], file, paths[name], request, manifest))
        encoded = {name: graph.encoded for name, graph in graphs.items()}
        yield Apart(denoiser=without_encoders(whole, encoded), files=tuple(files), graphs=graphs)


def _written(graph: EncoderGraph, file: Path, path: Path, request: GraphRequest, manifest: Manifest) -> EncoderFile:
    """Write one encoder to `file`, and compare it with PyTorch."""
    dtype = PRECISIONS[request.precision]
    model = graph.model
    if request.precision in ("fp16", "bf16"):
        model = halved(model, ir.DataType[dtype.upper()]).model
    model = stored_as_float16(model) if request.weights else model
    if writer.weight_bytes(model) > writer.MAX_BYTES:
        raise CmfastError(f"{path}: an encoder of more than 2 GiB of weights cannot stand in a file of its own")
    how = "onnxruntime cpu" + ("" if dtype == "float32" else f", {dtype} emulated")
    spec = replace(manifest.spec, conditions=(graph.condition,))
    made_by = {**manifest.made_by, "verified": how}
    manifest = replace(manifest, kind=ENCODER, spec=spec, encoded=graph.encoded, dtype=dtype, made_by=made_by, cost={})
    size = writer.write_with_manifest(model, manifest, file)
    with tempfile.TemporaryDirectory() as folder:
        run = file if dtype == "float32" else emulate_file(file, Path(folder) / "emulated.onnx")
        parity = _compare(OnnxRuntimeBackend(run), graph)
    tolerance = request.allowed("cpu")
    if failure := parity.failure(tolerance):
        raise CheckFailed(f"the encoder of {graph.condition.name} {failure}; no file was written")
    manifest = replace(manifest, parity={"max_abs": parity.to_dict()["max_abs"]}, graph_sha256=graph_sha256(file))
    writer.seal(file, size, manifest)
    return EncoderFile(path=path, manifest=manifest, parity=parity)


def _compare(file: OnnxRuntimeBackend, graph: EncoderGraph) -> Parity:
    """Compare an encoder's file with PyTorch at several batches and sizes of dynamic axes."""
    name, rows = graph.condition.name, []
    for index, batch in enumerate((file.batch,) if file.batch else BATCHES):
        values = some_values([graph.condition], batch, seed=index, size=SIZES[index % len(SIZES)])
        with torch.inference_mode():
            want = graph.module(torch.from_numpy(np.ascontiguousarray(values[name]))).numpy()
        got = file.run(values)
        rows.append(row_of(f"batch {batch}", got, want, np.full(batch, max(1.0, np.abs(want).max()), np.float32)))
    return Parity(rows=tuple(rows), boundary=None)
