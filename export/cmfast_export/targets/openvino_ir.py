# SPDX-License-Identifier: MIT
"""A model as OpenVINO's IR: NAME.xml with the manifest in its rt_info, NAME.bin with the weights.

    export_openvino(denoiser, "model.xml", precision="bf16")

OpenVINO chooses types when it compiles, so the graph stays float32, and the manifest's dtype is the precision that the
file was verified in on this CPU and is opened in. `cmfast.formats.openvino_ir` reads it, `cmfast.backends.openvino`
runs it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.openvino.backend import OpenVinoBackend
from cmfast.backends.openvino.library import TYPES, cause, check_precision, import_openvino
from cmfast.backends.openvino.precise import marked
from cmfast.errors import ArtifactError, CheckFailed, CmfastError
from cmfast.files import atomic_file, check_target, temporary_folder
from cmfast.formats.manifest import Manifest, check_plain, check_unchanged, read_onnx, rounding
from cmfast.formats.openvino_ir import head_of, ir_sha256, with_manifest
from cmfast.formats.table import ONNX, OPENVINO, format_of
from cmfast.formats.values import PRECISIONS
from cmfast.schedule import as_sigmas
from cmfast_export._target import files_of, one_writer
from cmfast_export.graphs.sampler import Guidance
from cmfast_export.request import GraphRequest
from cmfast_export.verify import Parity, verify

if TYPE_CHECKING:
    from cmfast.backends import Backend
    from cmfast_export.pipeline import Source
    from cmfast_export.request import Request
    from cmfast_train.checkpoint import Checkpoint
    from cmfast_train.denoiser import Denoiser

ROOM = 100  # characters of a manifest for the parity


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What an export to OpenVINO made.

    Attributes:
        path: The .xml file; its weights are in the .bin file beside it.
        manifest: What it says of itself.
        parity: How far it is from PyTorch, as this CPU runs it.
        against: What it was compared with: PyTorch, or ONNX Runtime where it was made from an .onnx file.
        tolerance: Largest difference that was allowed, data units.
        seconds: That it took.
    """

    path: Path
    manifest: Manifest
    parity: Parity
    against: str
    tolerance: float
    seconds: float


def export_openvino(
    model: Source,
    out: str | os.PathLike[str],
    *,
    kind: str = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch: int | None = None,
    precision: str = "fp32",
    weights: str = "",
    guidance: float | None = None,
    null: Mapping[str, float] | None = None,
    tolerance: float | None = None,
) -> Converted:
    """Export a model to OpenVINO's IR, run it on this CPU, compare it with PyTorch, and only then give it its name.

    Args:
        model: As in `export_onnx`; or a verified float32 .onnx file, whose kind is in it.
        out: The .xml file; the weights go into the .bin file of the same name.
        kind: As in `export_onnx`, and so are steps, sigmas, batch, weights, guidance and null.
        steps: Network calls of a sampler.
        sigmas: Noise levels of a sampler, data units, decreasing.
        batch: Fixed batch size; None: dynamic.
        precision: fp32, bf16 or fp16: what OpenVINO computes in when the file is opened; this CPU must have it.
        weights: fp16: stored as float16, half the file.
        guidance: Weight of classifier-free guidance.
        null: What stands for no condition, by name.
        tolerance: Largest allowed difference from float32 PyTorch, data units; None: what rounding to this precision
            may cost.

    Returns:
        The file and how far it is from PyTorch.

    Raises:
        CmfastError: The request cannot be fulfilled.
        BackendError: This CPU lacks the precision.
        CheckFailed: The file differs by more than the tolerance; none was written.
    """
    goal = check_target(out, OPENVINO.suffixes)
    graph = GraphRequest(
        kind=kind, steps=steps, sigmas=None if sigmas is None else as_sigmas(sigmas), batch=batch, precision=precision,
        weights=weights, guidance=guidance, null=dict(null or {}), tolerance=tolerance,
    )  # fmt: skip
    if isinstance(model, (str, os.PathLike)) and format_of(model) is ONNX:
        if graph != GraphRequest(tolerance=tolerance):
            raise CmfastError(f"{model}: exported already, so its kind and precision are in it; export the checkpoint")
        _check(goal, None, [Path(model)])
        return _convert_file(Path(model), goal, tolerance)
    _check(goal, graph, [])
    return _export(model, goal, graph)


def write(model: Checkpoint | Denoiser | Path, request: Request) -> Converted:
    """Write the IR of a request, from a model or from an exported .onnx file."""
    if isinstance(model, Path):
        return _convert_file(model, request.out, request.tolerance)
    assert request.graph
    return _export(model, request.out, request.graph)


def check(request: Request) -> None:
    """Raise CmfastError where the IR of a request cannot be made: before the work, not after it."""
    _check(request.out, request.graph, request.inputs)


def _check(out: Path, graph: GraphRequest | None, inputs: Sequence[Path]) -> None:
    precision = graph.precision if graph else "fp32"
    if PRECISIONS[precision] not in TYPES:
        have = ", ".join(name for name, dtype in PRECISIONS.items() if dtype in TYPES)
        raise CmfastError(f"OpenVINO computes in {have}; pass one of them, got --precision {precision}")
    if graph and graph.device != "cpu":
        raise CmfastError("an IR is verified on the CPU, where cmfast runs OpenVINO: leave --device out")
    beside = out.with_suffix(".bin")
    check_target(beside, inputs=[file for each in inputs for file in files_of(each)])
    if beside.exists() and not out.exists():
        raise CmfastError(f"-o {out}: its weights would replace {beside}, which is not part of an IR; name another")
    for each in inputs:
        if format_of(each) not in (None, ONNX):
            raise CmfastError(f"{each}: an IR is made from a checkpoint or an .onnx file")
    check_precision(out, PRECISIONS[precision], import_openvino(f"writing {out.name}").Core())


@one_writer(check_target)
def _export(model: Source, out: Path, request: GraphRequest) -> Converted:
    """Export the float32 graph, verified, and from it the IR in the requested precision."""
    from cmfast_export.pipeline import export_onnx_as  # with torch, and `check` answers before it
    from cmfast_train.backends.pytorch import TorchBackend
    from cmfast_train.importers import load_model

    begun = time.perf_counter()
    loaded = load_model(model) if isinstance(model, (str, os.PathLike)) else model
    reference = TorchBackend(loaded)
    reference.batch = request.batch  # the network's code may take no other
    spec = reference.manifest.spec
    guidance = None if request.guidance is None else Guidance.of(request.guidance, request.null, spec)
    wide = request if request.precision == "fp32" else replace(request, precision="fp32", tolerance=None)
    dtype = PRECISIONS[request.precision]
    allowed = request.allowed("cuda")
    with temporary_folder(out) as folder:
        graph = export_onnx_as(loaded, folder / "graph.onnx", wide).path
        manifest, parity = _converted(graph, out, folder, dtype, reference, allowed, guidance)
    return Converted(
        path=out, manifest=manifest, parity=parity, against="PyTorch", tolerance=allowed,
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


@one_writer(check_target)
def _convert_file(onnx: Path, out: Path, tolerance: float | None) -> Converted:
    """Make the IR of an .onnx file that was verified when it was exported."""
    begun = time.perf_counter()
    manifest, _ = read_onnx(onnx)
    check_unchanged(onnx, manifest)
    check_plain(onnx, manifest, "OpenVINO")
    if manifest.dtype != "float32":
        raise ArtifactError(
            f"{onnx}: a graph in {manifest.dtype}, and OpenVINO chooses types when it compiles; export the checkpoint: "
            "cmfast-export model.pt --format openvino --precision bf16"
        )
    reference = OnnxRuntimeBackend(onnx)
    reference.batch = None  # of a fixed batch: the IR's is the same, and the comparison takes it from there
    allowed = tolerance or rounding(manifest.dtype, "cuda")
    with temporary_folder(out) as folder:
        # The reference has the same weights, rounded or not.
        manifest, parity = _converted(onnx, out, folder, manifest.dtype, reference, allowed, None, rounds=False)
    return Converted(
        path=out, manifest=manifest, parity=parity, against="ONNX Runtime", tolerance=allowed,
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


def _converted(
    onnx: Path, out: Path, folder: Path, dtype: str, reference: Backend, allowed: float, guidance: Guidance | None,
    *, rounds: bool | None = None,
) -> tuple[Manifest, Parity]:  # fmt: skip
    """Write the IR of a float32 graph in a folder beside `out`, run and compare it, and move both files to `out`."""
    ov = import_openvino(f"writing {out.name}")
    file = folder / out.name
    beside = file.with_suffix(".bin")
    try:
        model = marked(ov, ov.Core().read_model(str(onnx)))
        ov.save_model(model, str(file), compress_to_fp16=False)
    except Exception as err:
        raise ArtifactError(f"{onnx}: OpenVINO cannot convert it: {cause(err)}") from None
    content = file.read_bytes()
    manifest = _manifest(onnx, dtype, str(ov.__version__))
    with beside.open("rb") as weights:
        data = mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_READ) if beside.stat().st_size else b""
        manifest = replace(manifest, graph_sha256=ir_sha256(content, head_of(content, out), data))
    file.write_bytes(with_manifest(content, manifest, out))
    (parity,) = verify(OpenVinoBackend(file), [reference], guidance=guidance, rounds=rounds)
    if failure := parity.failure(allowed, of=reference.name):
        raise CheckFailed(f"OpenVINO in {dtype} {failure}; no file was written")
    manifest = replace(manifest, parity=parity.to_dict()).fitting()
    content = with_manifest(content, manifest, out)
    # Two files cannot be replaced at once: where only the weights were, the digest refuses the pair until it is made
    # again.
    with atomic_file(out) as graph, atomic_file(out.with_suffix(".bin")) as new:
        graph.write_bytes(content)
        os.replace(beside, new)
    return manifest, parity


def _manifest(onnx: Path, dtype: str, version: str) -> Manifest:
    """Return the manifest of an .onnx file as that of an IR: another library, another precision."""
    manifest, _ = read_onnx(onnx)
    how = "openvino cpu" + (f", {dtype}" if dtype != "float32" else "")
    made_by = {**manifest.made_by, "openvino": version.partition("-")[0], "verified": how}
    tested = manifest.selftest  # its tolerance may be that of stored float16 already
    selftest = {**tested, "atol": max(tested["atol"], rounding(dtype, "cuda"))} if tested else {}
    return replace(manifest, dtype=dtype, made_by=made_by, parity={}, selftest=selftest).fitting(ROOM)
