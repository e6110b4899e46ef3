# SPDX-License-Identifier: MIT
"""The target ort: a verified ONNX file in ONNX Runtime's own format, for its minimal builds, and what they must have.

    OUT.ort                         the graph, optimised, with the manifest in its metadata
    OUT.required_operators.config   for ONNX Runtime's build.sh --minimal_build --include_ops_by_config FILE

`cmfast.formats.ort_format` reads it, `cmfast.backends.onnxruntime` runs it.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.onnxruntime_library import cause, import_onnxruntime
from cmfast.errors import ArtifactError, CheckFailed, CmfastError, backend_error
from cmfast.files import atomic_file, check_target, temporary_folder
from cmfast.formats.manifest import Manifest, check_plain, check_unchanged, read_onnx, read_onnx_file, rounding
from cmfast.formats.ort_format import UNSEALED, sealed
from cmfast.formats.table import ONNX, format_of
from cmfast_export._target import files_of
from cmfast_export.verify import Parity, verify

if TYPE_CHECKING:
    from cmfast_export.request import Request

LIST = ".required_operators.config"  # as ONNX Runtime's own converter names it
# A minimal build has no optimisers, so the file is optimised as it is written, and that evaluates what is constant.
_FOLDED = "an .ort file holds weights as they are computed with, so storing them as float16 does not make it smaller"
DTYPES = ("float32", "float16")  # that a CPU runs


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An .ort file that was written.

    Attributes:
        path: The file.
        operators: The list of operators beside it.
        manifest: What the file says of itself.
        parity: How far it is from its ONNX file.
        version: Of the ONNX Runtime that wrote it: the oldest that reads it for certain.
        seconds: That it took.
    """

    path: Path
    operators: Path
    manifest: Manifest
    parity: Parity
    version: str
    seconds: float


def check(request: Request) -> None:
    """Raise CmfastError where the files of a request cannot be written: before the work, not after it."""
    files = [file for each in request.inputs for file in files_of(each)]
    check_target(request.out.with_suffix(LIST), inputs=files)
    if request.graph is None:
        _check_file(request.model)
    elif request.graph.precision not in ("fp32", "fp16"):
        raise CmfastError(f"an .ort file is for CPUs, in fp32 or fp16, got --precision {request.graph.precision}")
    elif request.graph.weights:
        raise CmfastError(f"{_FOLDED}; leave --weights out")


def write(model: Path, request: Request) -> Converted:
    """Write `request.out` and the list of operators beside it, from a verified ONNX file.

    Raises:
        CmfastError: ONNX Runtime cannot write it.
        CheckFailed: What it wrote computes something else; no file was written.
    """
    begun, manifest = time.perf_counter(), _check_file(model)
    ort, out = import_onnxruntime("writing an .ort file"), request.out
    with temporary_folder(out) as folder:
        made = folder / out.name
        made.write_bytes(in_ort_format(model, manifest, folder))
        backend = OnnxRuntimeBackend(made)
        (parity,) = verify(backend, [OnnxRuntimeBackend(model)])
        allowed = rounding(manifest.dtype, "cpu") if request.tolerance is None else request.tolerance
        if failure := parity.failure(allowed, of="its ONNX file"):
            raise CheckFailed(f"the .ort file {failure}; no file was written")
        manifest, listed = backend.manifest, _operators(made)
        operators = out.with_suffix(LIST)
        with atomic_file(operators) as file:
            file.write_text(listed, encoding="utf-8")
        with atomic_file(out) as file:
            file.write_bytes(made.read_bytes())
    return Converted(
        path=out, operators=operators, manifest=manifest, parity=parity, version=str(ort.__version__),
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


def _check_file(file: Path) -> Manifest:
    """Return the manifest of an ONNX file that can be converted."""
    if format_of(file) is not ONNX:
        raise ArtifactError(f"{file}: an .ort file is made from an .onnx file or a checkpoint; export the checkpoint")
    manifest, _ = read_onnx(file)
    check_unchanged(file, manifest)
    check_plain(file, manifest, "CPUs")
    if manifest.dtype not in DTYPES:
        raise ArtifactError(f"{file} computes in {manifest.dtype}, and an .ort file is for CPUs, in float32 or float16")
    if "weights" in manifest.made_by:
        raise ArtifactError(f"{file}: {_FOLDED}; export the checkpoint without --weights")
    if external := read_onnx_file(file).external:
        raise ArtifactError(f"{file}: its weights are in {external[0]!r}, and an .ort file has at most 2 GB")
    return manifest


def in_ort_format(model: Path, manifest: Manifest, folder: Path) -> bytes:
    """Return an ONNX file in ONNX Runtime's own format, optimised, but not for the layouts of this CPU.

    Args:
        model: The ONNX file.
        manifest: What the result says of itself; its digest is that of the result.
        folder: For temporary files.

    Raises:
        CmfastError: ONNX Runtime cannot convert it.
    """
    ort = import_onnxruntime("writing an .ort file")
    source, made = folder / "unsealed.onnx", folder / "unsealed.ort"
    proto = onnx.load(model)
    del proto.metadata_props[:]
    # ONNX Runtime takes the metadata over.
    proto.metadata_props.add(key="cmfast", value=replace(manifest, graph_sha256=UNSEALED).to_json())
    onnx.save(proto, source)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(made)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # its exceptions share no public base class
        raise backend_error(f"ONNX Runtime could not write the .ort file: {cause(err)}") from None
    return sealed(made.read_bytes(), model)


def _operators(file: Path) -> str:
    """Return the operators and types of an .ort file, as ONNX Runtime's build reads them."""
    listed = file.with_suffix(LIST)
    handlers, level = list(logging.root.handlers), logging.root.level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file to the garbage collector
            tools = import_module("onnxruntime.tools.ort_format_model")  # which sets up logging
            tools.create_config_from_models([file], listed, True)
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    lines = listed.read_text(encoding="utf-8").splitlines()
    return "\n".join([f"# Operators of {file.name}", *(line for line in lines if not line.startswith("# "))]) + "\n"
