# SPDX-License-Identifier: MIT
"""Denoiser or checkpoint in, verified ONNX file out. Nothing stands under the final name before it has been checked."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from cmfast.backends.onnxruntime_library import import_onnxruntime
from cmfast.checks import NotFinite
from cmfast.errors import CmfastError, shown
from cmfast.files import atomic_file, check_target
from cmfast.formats.manifest import FLAVOUR, MAX_CHARACTERS, Manifest, graph_sha256, rounding
from cmfast.formats.manifest import INT8 as INT8_WORDS
from cmfast.formats.selftest import record_selftest
from cmfast.formats.table import ONNX
from cmfast.formats.values import PRECISIONS
from cmfast.model import Model
from cmfast.schedule import as_sigmas
from cmfast.spec import ModelSpec
from cmfast_export import BF16_OPSET, INT8
from cmfast_export._target import one_writer
from cmfast_export.checking import Agreement, Check, summary
from cmfast_export.encoder_files import EncoderFile, encoder_paths, encoders_apart
from cmfast_export.graphs import writer
from cmfast_export.graphs.cost import graph_cost
from cmfast_export.graphs.denoiser import MOST, denoiser_graph
from cmfast_export.graphs.half import Halved, halved
from cmfast_export.graphs.probe import check_module, check_network
from cmfast_export.graphs.sampler import Guidance, sampler_graph
from cmfast_export.graphs.server import server_graph
from cmfast_export.graphs.storage import stored_as_float16
from cmfast_export.graphs.writer import replacing_data, weight_bytes, write_data
from cmfast_export.int8.calibration import given_conditions
from cmfast_export.int8.options import Calibration
from cmfast_export.int8.quantization import Quantized, quantize
from cmfast_export.request import GraphRequest
from cmfast_export.targets.ort_cuda import Rewritten, check_ort_cuda, ort_cuda_graph
from cmfast_export.verify import Given, Looped
from cmfast_train.backends.pytorch import TorchBackend, manifest_of, snapshot
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.denoiser import Denoiser
from cmfast_train.importers import load_model
from cmfast_train.networks.precision import converts_itself, float32_weights

EncoderPaths = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
Source = str | os.PathLike[str] | Checkpoint | Denoiser  # what can be exported
HALVED = ("fp16", "bf16")
UNCOUNTED = "its cost is not counted"
ROOM = 600  # characters of a manifest for parity, cost and self-test


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made and how well it agrees.

    Attributes:
        path: the .onnx file.
        manifest: what it says of itself.
        data: the weights, where one file cannot hold them.
        tolerance: largest difference that was allowed, data units.
        denoiser: how far the denoiser graph is from PyTorch.
        sampler: how far the loop in one graph is from the Python loop over PyTorch's denoiser.
        seconds: that it took.
        rewritten: what was rewritten for ONNX Runtime's CUDA provider.
        left: operators of the network that half precision, made on the graph, leaves in float32.
        notes: what else there is to know, a line each.
        encoders: the encoders of conditions, in files of their own.
        int8: what of it is int8; None: nothing.
    """

    path: Path
    manifest: Manifest
    data: Path | None
    tolerance: float
    denoiser: Agreement
    sampler: Agreement | None
    seconds: float = 0.0
    rewritten: Rewritten | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    encoders: tuple[EncoderFile, ...] = ()
    int8: Quantized | None = None


def export_onnx(
    model: Source,
    out: str | os.PathLike[str],
    *,
    kind: str = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch: int | None = None,
    opset: int | None = None,
    precision: str = "fp32",
    guidance: float | None = None,
    null: Mapping[str, float] | None = None,
    device: str = "cpu",
    tolerance: float | None = None,
    flavour: str = "",
    weights: str = "",
    encoder: EncoderPaths | None = None,
    tolerance_db: float | None = None,
    calibration: Calibration | None = None,
) -> Exported:
    """Export a model to an ONNX file, compare the file with PyTorch, and only then give it its name.

    Args:
        model: a `Denoiser` (`cmfast_train.wrap` makes one of any module), a checkpoint, or the path of a model of any
            known format. It is left as it is.
        out: the .onnx file.
        kind: denoiser, one call of f(x, sigma); sampler, the whole few-step loop; server, a sampler whose inputs have
            the batch first.
        steps: of a sampler: network calls, at the model's default noise levels.
        sigmas: of a sampler: noise levels, data units, decreasing, instead of steps.
        batch: fixed batch size; None: dynamic.
        opset: of ONNX, 18 to 23; None: the oldest that can express the graph.
        precision: fp32, tf32, fp16, bf16 or, for CPUs, int8: what the network computes in.
        guidance: of a sampler: weight of classifier-free guidance, two evaluations a step.
        null: with guidance: what stands for no condition, by name: a class, or the value that fills a tensor; None:
            what the model declares.
        device: where the file is run for its verification: cpu, whose missing arithmetic is emulated, or cuda.
        tolerance: largest allowed absolute difference from float32 PyTorch, data units, where the scaling does not
            multiply it (`cmfast_export.verify.allowance`); None: what rounding to this precision may cost
            (`cmfast.formats.manifest.rounding`).
        flavour: ort-cuda: only for ONNX Runtime's CUDA provider; "": for any runtime.
        weights: fp16: store the weights as float16, half the file; the arithmetic stays as it is. "": as they are.
        encoder: file that the encoder of a condition is written to, or files by the names of conditions; `out` then
            takes what they make, and `cmfast.load(out, encoder=...)` runs them. None: encoders are inside `out`.

        tolerance_db: of int8, instead of the tolerance: least PSNR from float32, dB; None: 40. Products are given back
            to float32 until it holds.
        calibration: of int8: the samples that ranges are taken from.

    Returns:
        The file and how far it is from PyTorch.

    Raises:
        CmfastError: the request cannot be fulfilled, or the network cannot be traced; the line names the module.
        CheckFailed: the file differs from PyTorch by more than the tolerance; no file was written.
    """
    goal = check_target(out, ONNX.suffixes)
    graph = GraphRequest(
        kind=kind, steps=steps, sigmas=None if sigmas is None else as_sigmas(sigmas), batch=batch, opset=opset,
        precision=precision, guidance=guidance, null=dict(null or {}), device=device, tolerance=tolerance,
        flavour=flavour, weights=weights, encoders=_paths(encoder), tolerance_db=tolerance_db, calibration=calibration,
    )  # fmt: skip
    return export_onnx_as(model, goal, graph)


@one_writer(check_target)
def export_onnx_as(model: Source, out: str | os.PathLike[str], request: GraphRequest) -> Exported:
    """Export as `export_onnx` does, one precision."""
    with float32_weights():
        target = check_target(out)
        if not request.encoders:
            return _export(model, target, request)
        paths = encoder_paths(model, target, request.encoders)
        assert isinstance(model, Denoiser)
        check_module(model)
        whole = snapshot(model)
        check_network(whole, request.batch)
        manifest = manifest_of(whole)
        manifest = replace(manifest, made_by={**manifest.made_by, **_versions()})
        with encoders_apart(whole, paths, request, manifest) as apart:
            given = partial(apart.given, whole)
            source = replace(manifest, encoders=apart.digests)
            exported = _export(apart.denoiser, target, request, source, given)
        return replace(exported, encoders=apart.files)


def _paths(encoder: EncoderPaths | None) -> dict[str, Path]:
    """Return the files of encoders by the names of their conditions, "" of the only one."""
    if encoder is None:
        return {}
    named = encoder if isinstance(encoder, Mapping) else {"": encoder}
    if not all(isinstance(path, (str, os.PathLike)) for path in named.values()):
        raise CmfastError(f"encoder must be a path, or paths by the names of conditions, got {shown(encoder)}")
    return {name: Path(path) for name, path in named.items()}


def _export(
    model: Source,
    target: Path,
    request: GraphRequest,
    whole: Manifest | None = None,
    given: Given | None = None,
) -> Exported:
    """Export one file.

    Args:
        model: as in `export_onnx`.
        target: the .onnx file.
        request: of the graph; its encoders play no part.
        whole: the manifest of a model whose encoders are in other files, with their digests.
        given: values of the conditions to compare with; None: random ones.
    """
    begun, kind, precision = time.perf_counter(), request.kind, request.precision
    if precision not in (*PRECISIONS, INT8):
        raise CmfastError(f"precision must be one of {', '.join(PRECISIONS)}, {INT8}, got {precision!r}")
    if request.flavour:
        check_ort_cuda(request.opset, precision)
    if not isinstance(model, (Checkpoint, Denoiser, str, os.PathLike)):
        raise CmfastError(
            f"a model is a Denoiser, a checkpoint or a path, got {type(model).__name__}; "
            "cmfast_train.wrap(net, shape=..., scaling=..., c_noise=...) makes a Denoiser of a module"
        )
    loaded = model if isinstance(model, (Checkpoint, Denoiser)) else load_model(model)
    if isinstance(loaded, Denoiser):
        check_module(loaded)
    references = [TorchBackend(loaded)]
    ours = converts_itself(references[0].denoiser.network)
    if request.flavour and not ours:
        raise CmfastError(f"the flavour {request.flavour} is for cmfast's own networks; export without it")
    if ours and precision in HALVED:
        references.append(TorchBackend(loaded, precision=precision))
    for each in references:
        each.batch = request.batch  # the network's code may take no other
    dtype = request.dtype
    tolerance = request.allowed(request.device)
    spec = references[0].manifest.spec
    sigmas = spec.sigmas_for(request.steps, request.sigmas) if kind != "denoiser" else ()
    guidance = None if request.guidance is None else Guidance.of(request.guidance, request.null, spec)
    flavour = request.flavour

    check = Check(
        references=references, device=request.device, tolerance=tolerance, flavour=flavour, guidance=guidance,
        given=given, least_db=request.allowed_db,
    )  # fmt: skip
    made_by = {**references[0].manifest.made_by, **_versions(), "verified": check.how(dtype)}
    made_by |= {FLAVOUR: flavour} if flavour else {}
    made_by |= {"guidance": guidance.in_words} if guidance else {}
    made_by |= {"weights": PRECISIONS[request.weights]} if request.weights else {}
    manifest = replace(references[0].manifest, dtype=dtype, made_by=made_by)
    if whole is not None:
        manifest = replace(manifest, source=whole.source, encoders=whole.encoders)
    manifest = replace(manifest, spec=_fitting(manifest, kind, sigmas))

    if request.calibration:
        given_conditions(request.calibration, spec)  # what is wrong with the file, before the work
    own = isinstance(loaded, Denoiser) and not ours
    null = guidance.null if guidance else {}
    fixed = check_network(references[0].denoiser, request.batch, null) if own else None
    made = _denoiser_graph(loaded, request, ours)
    if fixed is not None:  # the trace did not see it
        raise fixed
    graph, most, notes = made.model, made.model.graph.meta.get(MOST), list[str]()
    manifest = replace(manifest, cost=_cost(graph, notes))
    if most is not None:
        check = replace(check, more=(most + 1,))
        notes.append(f"the network's code has a branch for batches above {most}; the file was compared there too")
    int8 = None
    if precision == INT8:
        int8 = quantize(graph, manifest, request, sigmas, guidance, references, given)
        graph = int8.model
        manifest = replace(manifest, made_by={**manifest.made_by, INT8_WORDS: int8.in_words}, cost=_cost(graph, notes))
    sampled = None
    rewritten = ort_cuda_graph(graph) if flavour else None
    written = _stored(rewritten.model if rewritten else graph, request)
    with replacing_data(target) as announce:
        data = write_data(written, target, announce) if weight_bytes(written) > writer.MAX_BYTES else None
        with atomic_file(target) as file:
            size = writer.write_with_manifest(written, manifest, file, data)
            agreement = check(file, "the denoiser graph")
            found = summary(agreement)
            if kind != "denoiser":
                looped = sampler_graph(graph, sigmas, spec, guidance)
                looped = server_graph(looped) if kind == "server" else looped
                one = replace(manifest.spec, sigmas={len(sigmas): sigmas})
                notes = [note for note in notes if not note.startswith(UNCOUNTED)]
                manifest = replace(manifest, kind=kind, spec=one, cost=_cost(looped, notes))
                rewritten = ort_cuda_graph(looped) if flavour else None
                looped = _stored(rewritten.model if rewritten else looped, request)
                size = writer.write_with_manifest(looped, manifest, file, data)
                sampled = check(file, "the sampler graph")
                found |= summary(sampled)
            manifest = replace(manifest, parity=found, graph_sha256=graph_sha256(file))
            try:
                atol = rounding(PRECISIONS["fp16"] if request.weights else dtype, "cuda")
                atol = max(atol, 3 * (sampled or agreement).parity.largest) if int8 else atol
                tested = record_selftest(Looped(Model(references[0]), guidance), atol, sigmas or None)
                manifest = replace(manifest, selftest=tested)
            except NotFinite:
                if whole is None:
                    raise
                notes.append("no self-test: random numbers instead of what the encoder makes give NaN")
            writer.seal(file, size, manifest)
    return Exported(
        path=target, manifest=manifest, data=data.path if data else None, tolerance=tolerance, denoiser=agreement,
        sampler=sampled, seconds=time.perf_counter() - begun, rewritten=rewritten, left=made.left, notes=tuple(notes),
        int8=int8,
    )  # fmt: skip


def _denoiser_graph(model: Checkpoint | Denoiser, request: GraphRequest, ours: bool) -> Halved:
    """Return the graph of a denoiser in the precision of the request; `ours`: its modules convert themselves."""
    precision, opset = "fp32" if request.precision == INT8 else request.precision, request.opset
    if precision == "bf16" and opset is None:
        opset = BF16_OPSET
    if precision == "bf16" and opset is not None and opset < BF16_OPSET:
        raise CmfastError(f"bfloat16 convolutions exist from opset {BF16_OPSET}, got {opset}; leave the opset out")
    denoiser = model.denoiser() if isinstance(model, Checkpoint) else snapshot(model)
    graph = denoiser_graph(denoiser.to_precision(precision) if ours else denoiser, request.batch, opset)
    if ours or precision not in HALVED:
        return Halved(model=graph, left={})
    return halved(graph, ir.DataType[PRECISIONS[precision].upper()])


def _stored(graph: ir.Model, request: GraphRequest) -> ir.Model:
    return stored_as_float16(graph) if request.weights else graph


def _cost(graph: ir.Model, notes: list[str]) -> Mapping[str, float]:
    """Return what a graph costs; where that cannot be counted, nothing, and a note says why."""
    try:
        return graph_cost(graph)
    except CmfastError as err:
        notes.append(f"{UNCOUNTED}: {err}")
        return {}


def _fitting(manifest: Manifest, kind: str, sigmas: Sequence[float]) -> ModelSpec:
    """Return the spec that the file's manifest can hold, checked before the work; names may be left out of it."""
    room = len('"graph_sha256": "", ') + 64 + ROOM
    spec = manifest.fitting(room).spec
    last = replace(spec, sigmas={len(sigmas): tuple(sigmas)}) if kind != "denoiser" else spec
    length = len(replace(manifest, kind=kind, spec=last).to_json(0)) + room
    if length > MAX_CHARACTERS:
        raise CmfastError(
            f"the file's manifest would have about {length} characters, and at most {MAX_CHARACTERS} are allowed; "
            "give fewer noise levels, or leave default levels out of the checkpoint"
        )
    return spec


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxscript")} | {"onnxruntime": _onnxruntime()}


def _onnxruntime() -> str:
    return str(import_onnxruntime("exporting").__version__)  # its package is called onnxruntime or onnxruntime-gpu
