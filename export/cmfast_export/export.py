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
from cmfast_export import DEFAULT_OPSET
from cmfast_export.compose import sampler_graph
from cmfast_export.to_onnx import denoiser_graph
from cmfast_export.verify import Parity, verify_denoiser, verify_sampler
from cmfast_train.engine import TorchEngine

MAX_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the nodes and names need a few MiB of it


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made and how well it agrees."""

    path: Path
    manifest: Manifest
    denoiser: Parity  # against PyTorch
    sampler: Parity | None  # against the Python loop over PyTorch's denoiser


def export_onnx(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch: int | None = None,
    opset: int = DEFAULT_OPSET,
    tolerance: float = 1e-4,
) -> Exported:
    """Export a checkpoint to one verified ONNX file; return what was found.

    kind       denoiser, or sampler: the whole loop, at the defaults for `steps` or at `sigmas`
    batch      fixed batch size; None: dynamic
    tolerance  largest allowed absolute difference from PyTorch, data units; beyond it CheckFailed, and no file
    """
    check_target(out)
    reference = TorchEngine(checkpoint)
    manifest = replace(reference.manifest, made_by={**reference.manifest.made_by, **_versions()})
    spec = manifest.spec
    if kind == "denoiser" and (steps is not None or sigmas is not None):
        raise CmfastError("noise levels belong to a sampler; a denoiser takes any: leave them out, or --kind sampler")
    levels = spec.levels(steps, sigmas) if kind == "sampler" else ()

    graph = denoiser_graph(reference.denoiser, batch, opset)
    sampled = None
    with atomic_file(out) as file:
        engine, size = _write(graph, manifest, file)
        parity = _need(verify_denoiser(engine, reference), tolerance, "the denoiser graph")
        found = parity.to_dict()
        if kind == "sampler":
            manifest = replace(manifest, kind="sampler", spec=replace(spec, sigmas={len(levels): levels}))
            engine, size = _write(sampler_graph(graph, levels, spec), manifest, file)
            sampled = _need(verify_sampler(engine, reference), tolerance, "the sampler graph")
            found |= sampled.to_dict()
        manifest = replace(manifest, parity=found)
        _seal(file, size, manifest, engine)
    return Exported(path=Path(out), manifest=manifest, denoiser=parity, sampler=sampled)


def _write(graph: ir.Model, manifest: Manifest, file: Path) -> tuple[OnnxRuntimeEngine, int]:
    """Write the graph and, behind it, the manifest; return the file, opened, and the bytes of the graph."""
    weights = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    if weights > MAX_BYTES:
        raise CmfastError(f"the weights have {weights:,} bytes; one ONNX file holds at most {MAX_BYTES:,}")
    graph.producer_name, graph.producer_version = "cmfast", manifest.made_by["cmfast"]
    body = ir.to_proto(graph).SerializeToString(deterministic=True)
    with file.open("wb") as opened:
        opened.write(body)
        opened.write(_metadata(manifest))
    return OnnxRuntimeEngine(file), len(body)


def _seal(file: Path, size: int, manifest: Manifest, verified: OnnxRuntimeEngine) -> None:
    """Replace the manifest at the end of the file by one with the parity; the graph's bytes stay those verified."""
    with file.open("r+b") as opened:
        opened.truncate(size)
        opened.seek(size)
        opened.write(_metadata(manifest))
    spec, n = manifest.spec, verified.batch or 2
    rng = np.random.default_rng(0)
    if manifest.kind == "denoiser":
        inputs = {"x": rng.standard_normal((n, *spec.image), dtype=np.float32), "sigma": np.ones(n, np.float32)}
    else:
        (steps,) = spec.sigmas
        inputs = {"noise": rng.standard_normal((steps, n, *spec.image), dtype=np.float32)}
    if spec.classes:
        inputs["label"] = np.zeros(n, np.int64)
    if not np.array_equal(OnnxRuntimeEngine(file).run(inputs), verified.run(inputs)):
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
