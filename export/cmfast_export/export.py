# SPDX-License-Identifier: MIT
"""Checkpoint in, verified file out. Nothing stands under the final name before it has been checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from cmfast.artifact import Manifest
from cmfast.engines.onnxruntime import OnnxRuntimeEngine
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import atomic_file, check_target
from cmfast_export import DEFAULT_OPSET, write
from cmfast_export.compose import sampler_graph
from cmfast_export.to_onnx import denoiser_graph
from cmfast_export.verify import Parity, verify_denoiser, verify_sampler
from cmfast_export.write import DataFile, data_files, remove_unused, weight_bytes, write_data, write_model
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.engine import TorchEngine


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made and how well it agrees."""

    path: Path
    manifest: Manifest
    data: Path | None  # the weights, where one file cannot hold them
    denoiser: Parity  # against PyTorch
    sampler: Parity | None  # against the Python loop over PyTorch's denoiser


def export_onnx(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    *,
    kind: str = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch: int | None = None,
    opset: int = DEFAULT_OPSET,
    tolerance: float = 1e-4,
) -> Exported:
    """Export a checkpoint, of any format that is known, to a verified ONNX file; return what was found.

    kind       denoiser, or sampler: the whole loop, at the defaults for `steps` or at `sigmas`
    batch      fixed batch size; None: dynamic
    tolerance  largest allowed absolute difference from PyTorch, data units; beyond it CheckFailed, and no file
    """
    target = check_target(out)
    reference = TorchEngine(checkpoint)
    manifest = replace(reference.manifest, made_by={**reference.manifest.made_by, **_versions()})
    spec = manifest.spec
    if kind == "denoiser" and (steps is not None or sigmas is not None):
        raise CmfastError("noise levels belong to a sampler; a denoiser takes any: leave them out, or --kind sampler")
    levels = spec.levels(steps, sigmas) if kind == "sampler" else ()

    graph = denoiser_graph(reference.denoiser, batch, opset)
    before = data_files(target)
    data = write_data(graph, target) if weight_bytes(graph) > write.MAX_BYTES else None
    sampled = None
    try:
        with atomic_file(target) as file:
            size = _write(graph, manifest, file, data)
            parity = _need(verify_denoiser(OnnxRuntimeEngine(file), reference), tolerance, "the denoiser graph")
            found = parity.to_dict()
            if kind == "sampler":
                manifest = replace(manifest, kind="sampler", spec=replace(spec, sigmas={len(levels): levels}))
                size = _write(sampler_graph(graph, levels, spec), manifest, file, data)
                sampled = _need(verify_sampler(OnnxRuntimeEngine(file), reference), tolerance, "the sampler graph")
                found |= sampled.to_dict()
            manifest = replace(manifest, parity=found)
            _seal(file, size, manifest)
    except BaseException:
        remove_unused({data.path} if data else set(), target.parent)
        raise
    remove_unused(before, target.parent)
    return Exported(path=target, manifest=manifest, data=data and data.path, denoiser=parity, sampler=sampled)


def _write(graph: ir.Model, manifest: Manifest, file: Path, data: DataFile | None) -> int:
    """Write the graph and, behind it, the manifest; return the bytes of the graph."""
    graph.producer_name, graph.producer_version = "cmfast", manifest.made_by["cmfast"]
    size = write_model(graph, file, data)
    with file.open("ab") as opened:
        opened.write(_metadata(manifest))
    return size


def _seal(file: Path, size: int, manifest: Manifest) -> None:
    """Replace the manifest at the end of the file by one with the parity; the graph's bytes stay those verified."""
    spec = manifest.spec
    verified = OnnxRuntimeEngine(file)
    n = verified.batch or 2
    rng = np.random.default_rng(0)
    if manifest.kind == "denoiser":
        inputs = {"x": rng.standard_normal((n, *spec.image), dtype=np.float32), "sigma": np.ones(n, np.float32)}
    else:
        (steps,) = spec.sigmas
        inputs = {"noise": rng.standard_normal((steps, n, *spec.image), dtype=np.float32)}
    if spec.classes:
        inputs["label"] = np.zeros(n, np.int64)
    want = verified.run(inputs)
    del verified  # before the second one: a large model is in memory once
    with file.open("r+b") as opened:
        opened.truncate(size)
        opened.seek(size)
        opened.write(_metadata(manifest))
    if not np.array_equal(OnnxRuntimeEngine(file).run(inputs), want):
        raise CheckFailed("the file changed between its verification and its last writing; no file was written")


def _metadata(manifest: Manifest) -> bytes:
    """Return metadata_props as protobuf bytes: messages concatenate, so they may stand behind the graph."""
    entry = onnx.StringStringEntryProto(key="cmfast", value=manifest.to_json())
    return bytes(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _need(parity: Parity, tolerance: float, what: str) -> Parity:
    if failure := parity.failure(tolerance):
        raise CheckFailed(f"{what} {failure}; no file was written")
    return parity


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
