# SPDX-License-Identifier: MIT
"""An exported ONNX file as an engine of TensorRT or TensorRT-RTX: one builder for both, through the API they share.

    build_engine(Path("model.onnx"), Path("model.engine"), BuildOptions(batch=(1, 8, 64)))

The precision is in the graph, so nothing here decides about types. The manifest travels as the network's name, and the
file is the plan itself, sealed with its digest (`cmfast.formats.tensorrt_plan`). TensorRT measures kernels on the card
that it builds for; TensorRT-RTX builds on any machine, for all cards that it supports or for `target`. Running is
`cmfast.backends.tensorrt`. torch is not needed: an engine can be built on the machine that it is for.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmfast.backends import open_backend
from cmfast.backends.cache import check_cache, read_entry, write_entry
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.tensorrt import other_card
from cmfast.backends.tensorrt_library import (
    ctrl_c_ends_build,
    cuda_major,
    import_library,
    make_logger,
    reason,
    this_platform,
)
from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError, CmfastWarning, printable
from cmfast.files import atomic_file, check_outputs, check_target, temporary_folder
from cmfast.formats import protobuf as pb
from cmfast.formats.manifest import ENCODER, Manifest, check_plain, check_unchanged, file_sha256, read_onnx, rounding
from cmfast.formats.tensorrt_plan import NOT_RUN, UNSEALED, parse_plan, read_plan, seal
from cmfast_export._options import check_tolerance
from cmfast_export._target import files_of, one_writer
from cmfast_export.graphs.emulate import emulate_file
from cmfast_export.targets.tensorrt_options import HARDWARE, BuildOptions, check_options, library_of
from cmfast_export.verify import SIZES, Parity, compare_batches, verify

if TYPE_CHECKING:
    from cmfast_export.request import Request

BUILDER = 1  # changes when this module builds other engines from the same options
MODERATE = 8  # images that the CPU computes to compare with
_FILLED = ("batch", "max_abs", "plan_sha256")  # by the build; a fixed batch is the ONNX file's, not the options'


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build made."""

    path: Path
    manifest: Manifest
    parity: Parity | None  # how far it is from the ONNX file; None: it was not run
    not_run: str  # why
    sha256: str  # of the file, for cmfast.load(..., sha256=...)
    seconds: float
    cached: bool  # the same engine had been built before, and was copied


@one_writer(check_target)
def build_engine(
    onnx: Path, out: Path, options: BuildOptions, *, cache: Path | None = None, tolerance: float | None = None
) -> Built:
    """Build the engine of a verified ONNX file, of any kind; write it to `out`; return what was made.

    Where there is a card that it is for, the engine is run and compared with the ONNX file.

    Args:
        cache: folder of engines built before, found by the content of the ONNX file, the options, the versions and
            the card, never by a name; None: none
        tolerance: of that comparison, data units; beyond it CheckFailed, and no file. None: what rounding explains

    Raises:
        CheckFailed: the engine differs from the ONNX file; no file was written.
        CmfastError: an option is wrong, or the library is not installed.
    """
    target, begun = check_target(out, inputs=files_of(onnx)), time.perf_counter()
    check_tolerance(tolerance)
    manifest, _ = read_onnx(onnx)
    check_unchanged(onnx, manifest)
    check_plain(onnx, manifest, "TensorRT")
    if manifest.kind == ENCODER:
        raise CmfastError(f"{onnx}: an encoder runs on the CPU from this file; build the engine of the model beside it")
    library, trt = check_build(options, target, cache, [onnx])
    dynamic = any(condition.dynamic for condition in manifest.spec.conditions)
    engine = _description(trt, onnx, options, library, dynamic)
    name = f"{_key(engine)}.engine"
    made_by = {**manifest.made_by, library: str(trt.__version__)}
    manifest = replace(manifest, engine=engine, made_by=made_by)
    not_run = _no_card(engine)
    with atomic_file(target) as file:
        plan = _cached(cache, name, manifest) if cache else None
        for cached in (True, False) if plan else (False,):
            if not cached:
                plan = bytearray(_build(trt, onnx, manifest, options))
                seal(plan)
            assert plan is not None
            file.write_bytes(plan)
            try:
                parity = None if not_run else _verify(file, onnx, tolerance)
                break
            except CmfastError:
                if not cached:
                    raise
        assert plan is not None
        if parity is not None:
            seal(plan, parity.worst.max_abs)
            file.write_bytes(plan)
        if onnx_sha256(onnx) != engine["onnx_sha256"]:
            raise CheckFailed(f"{onnx} changed while its engine was built; no file was written")
        done = read_plan(file)
    if cache is not None:  # after the engine stands, whatever the cache's disk does
        write_entry(cache, name, plan)
    return Built(
        path=target,
        manifest=done,
        parity=parity,
        not_run=not_run,
        sha256=file_sha256(target),
        seconds=time.perf_counter() - begun,
        cached=cached,
    )


def write(onnx: Path, request: Request) -> Built:
    """Write the engine of a request."""
    assert isinstance(request.options, BuildOptions)
    return build_engine(onnx, request.out, request.options, cache=request.cache, tolerance=request.tolerance)


def check(request: Request) -> None:
    """Raise CmfastError where the engine of a request cannot be built."""
    assert isinstance(request.options, BuildOptions)
    check_build(request.options, request.out, request.cache, [request.model])


def check_build(options: BuildOptions, out: Path, cache: Path | None, inputs: Iterable[Path] = ()) -> tuple[str, Any]:
    """Return the library that builds, by name and as a module, or raise: before the work, not after it.

    Args:
        inputs: what the engine is built from; the timing cache must not replace it
    """
    library = library_of(options)
    trt = import_library(library, f"building {out.name}")
    check_options(options, library)
    if options.target:
        _capabilities(trt, options)
    if options.timing_cache:
        read = [file for path in inputs for file in files_of(path)]
        check_outputs({"-o": out, "--build timing_cache": options.timing_cache}, inputs=read)
    if cache is not None:
        check_cache(cache)
    return library, trt


def _no_card(engine: Mapping[str, Any]) -> str:
    """Return why an engine of this description cannot be run here, or an empty string."""
    try:
        return other_card(engine, cuda.open_gpu())
    except CmfastError as err:
        return str(err)


def _verify(file: Path, onnx: Path, tolerance: float | None) -> Parity:
    """Return how far the engine is from its ONNX file, run by ONNX Runtime on the CPU, roundings emulated.

    At its smallest and a moderate batch; at its largest, which other kernels run, it is compared with itself.
    """
    manifest = read_plan(file)
    allowed = rounding(manifest.dtype, "cuda") if tolerance is None else tolerance
    engine = open_backend(file, "cuda")
    least, often, most = manifest.engine["batch"]
    with temporary_folder(file) as folder:
        exact = manifest.dtype == "float32"
        reference = OnnxRuntimeBackend(onnx if exact else emulate_file(onnx, folder / "emulated.onnx"))
        batches = sorted({least, max(least, min(often, MODERATE))})
        sizes = manifest.engine.get("sizes", SIZES)
        (parity,) = verify(engine, [reference], batches, sizes=sizes)
    if most > (few := max(batches)):
        parity = replace(parity, rows=(*parity.rows, compare_batches(engine, few, most, sizes[1])))
    if failure := parity.failure(allowed, of="its ONNX file"):
        raise CheckFailed(f"the engine {failure}; no file was written")
    return parity


def _key(engine: Mapping[str, Any]) -> str:
    """Return the name of an engine in the cache: what decides about its content, and which cmfast built it."""
    return hashlib.sha256(json.dumps([BUILDER, dict(engine)], sort_keys=True).encode()).hexdigest()


def _cached(cache: Path, name: str, manifest: Manifest) -> bytearray | None:
    """Return the engine in the cache, if it is whole and its manifest ours; one that is not is built again."""
    plan = read_entry(check_cache(cache), name)
    if plan is None:
        return None
    try:
        found = parse_plan(plan, cache / name)
    except ArtifactError:
        return None
    return bytearray(plan) if _before_build(found) == _before_build(manifest) else None


def _before_build(manifest: Manifest) -> Manifest:
    """Return a manifest without what the build fills in: all of it is known before."""
    engine = {name: value for name, value in manifest.engine.items() if name not in _FILLED}
    return replace(manifest, engine=engine)


def _build(trt: Any, onnx: Path, manifest: Manifest, options: BuildOptions) -> Any:
    """Return the serialized engine, a buffer, with the manifest in it, unsealed."""
    log = make_logger(trt)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 10; later always so
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(_utf8(onnx)):
        errors = [" ".join(str(parser.get_error(i)).split()) for i in range(parser.num_errors)]
        raise BackendError(f"{onnx}: the library cannot read it: {'; '.join(errors)[:400] or reason(log)}")
    config = builder.create_builder_config()
    _configure(trt, config, options, tf32=manifest.dtype == "tf32")
    batch = _add_profile(builder, network, config, manifest.batch_axis, options)
    engine = {**manifest.engine, "batch": list(batch), "max_abs": NOT_RUN, "plan_sha256": UNSEALED}
    network.name = replace(manifest, engine=engine).fitting().to_json()
    cache = _timing_cache(config, options)
    with ctrl_c_ends_build(trt, config):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{onnx}: the engine could not be built: {reason(log)}")
    if cache is not None:
        _keep(cache, options.timing_cache)
    return plan


def _utf8(onnx: Path) -> str:
    """Return the name of a file as the library takes it."""
    try:
        os.fspath(onnx).encode()
    except UnicodeEncodeError:
        raise CmfastError(
            f"{printable(str(onnx))}: the library reads names in UTF-8 only; rename the file or its folder"
        ) from None
    return os.fspath(onnx)


def _keep(cache: Any, file: str) -> None:
    """Write the measured kernels; where that fails, warn: the engine that they were measured for stands."""
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    except (CmfastError, OSError) as err:
        warnings.warn(f"the timing cache was not written: {err}", CmfastWarning, stacklevel=2)


def _configure(trt: Any, config: Any, options: BuildOptions, *, tf32: bool) -> None:
    # Set by default in both libraries, and float32 then has ten bits of mantissa in every product.
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.level >= 0:
        config.builder_optimization_level = options.level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[options.hardware_compatible])
        config.hardware_compatibility_level = level
    if options.target:
        config.num_compute_capabilities = len(options.target)
        for index, value in enumerate(_capabilities(trt, options)):
            if not config.set_compute_capability(value, index):
                raise CmfastError(f"target {options.target[index]}: the library does not take it here; leave it out")


def _add_profile(builder: Any, network: Any, config: Any, axis: int, options: BuildOptions) -> tuple[int, int, int]:
    """Tell the builder which batches there will be; return them: those of the options, or the file's only one."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    fixed = tuple(inputs[0].shape)[axis]
    if fixed >= 0:
        if options.batch not in ((), (fixed,)):
            raise CmfastError(f"the ONNX file takes batches of {fixed} only; leave batch out, or export it as dynamic")
        if any(side < 0 for tensor in inputs for side in tuple(tensor.shape)):
            _set_profile(builder, config, inputs, axis, (fixed, fixed, fixed), options)
        return (fixed, fixed, fixed)
    _set_profile(builder, config, inputs, axis, options.profile, options)
    return options.profile


def _set_profile(
    builder: Any, config: Any, inputs: Sequence[Any], axis: int, batch: Sequence[int], options: BuildOptions
) -> None:
    """Tell the builder the smallest, most frequent and largest shape of each input that has a dynamic size."""
    profile = builder.create_optimization_profile()
    for index, tensor in enumerate(inputs):
        sides, first = tuple(tensor.shape), 0 if index else axis
        if all(side >= 0 for side in sides):
            continue
        shapes = [
            tuple(side if side >= 0 else b if place == first else free for place, side in enumerate(sides))
            for b, free in zip(batch, options.free, strict=True)
        ]
        profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"the library does not take the batches {', '.join(map(str, batch))} with sizes "
            f"{', '.join(map(str, options.free))}"
        )


def _timing_cache(config: Any, options: BuildOptions) -> Any:
    """Return the cache of measured kernels, filled from the file where there is one, or None."""
    if not options.timing_cache:
        return None
    file = check_target(options.timing_cache)
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise CmfastError(f"timing_cache {file}: not a cache of this version and card; name a new file")
    return cache


def _description(trt: Any, onnx: Path, options: BuildOptions, library: str, dynamic: bool) -> dict[str, Any]:
    """Return the manifest's "engine": what builds the plan, from what, for what."""
    if library == "tensorrt":  # it measures on the card, and the plan is for that card
        gpu = cuda.open_gpu()
        card: dict[str, Any] = {"compute_capability": [gpu.compute_capability], "gpu": gpu.name}
    else:
        card = {"compute_capability": list(options.target or _default_targets(trt))}
    return {
        "library": library,
        "version": str(trt.__version__),
        "cuda": cuda_major(library),
        **card,
        "platform": this_platform(),
        "batch": list(options.profile),
        **({"sizes": list(options.free)} if dynamic else {}),
        "workspace_mib": options.workspace_mib,
        "level": options.level,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "onnx_sha256": onnx_sha256(onnx),
    }


def _targets(trt: Any) -> dict[str, Any]:
    """Return the compute capabilities that this TensorRT-RTX can build for, by their usual names."""
    members = trt.ComputeCapability.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members if name[:2] == "SM"}


def _capabilities(trt: Any, options: BuildOptions) -> list[Any]:
    """Return the library's values for the target, or raise CmfastError."""
    there = _targets(trt)
    for capability in options.target:
        if capability not in there:
            raise CmfastError(f"target {capability}: this version builds for {', '.join(there)}")
    return [there[capability] for capability in options.target]


def _default_targets(trt: Any) -> list[str]:
    """Return those that an engine without a target is for: from Ampere on, says its documentation, not Turing."""
    return [name for name in _targets(trt) if tuple(map(int, name.split("."))) >= (8, 0)]


def onnx_sha256(onnx: Path) -> str:
    """Return the SHA-256 of an ONNX file; of one with weights beside it, that of both digests."""
    digests = [file_sha256(onnx)]
    digests += [file_sha256(onnx.parent / name) for name in sorted(set(pb.read_onnx_model(onnx).external))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
