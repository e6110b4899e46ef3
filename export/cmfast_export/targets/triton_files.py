# SPDX-License-Identifier: MIT
"""What the files of a Triton model say of themselves: one .onnx file of kind server, or TensorRT plans of one.

Only manifests and the shapes of inputs are read, no weights and no networks. `triton_repository` copies the files.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from cmfast.errors import ArtifactError, CmfastError
from cmfast.formats import protobuf as pb
from cmfast.formats.manifest import Manifest, check_plain, check_unchanged
from cmfast.formats.table import ENGINE, ONNX, format_of, read_manifest

AMPERE = "8.0+"  # the compute capabilities of a plan that was built to run on all GPUs from Ampere on
_VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"  # without it Triton refuses such plans
_MAKE_ONNX = "cmfast-export model.pt --format triton --steps 2 -o repository"
_MAKE_PLAN = "cmfast-export model.pt --kind server --steps 2 --format engine"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the files of one model say of it."""

    backend: str  # onnxruntime or tensorrt
    manifest: Manifest
    files: Sequence[tuple[Path, str]]  # which file goes where in the version's folder
    batch: int | None  # the only number of images, of a file with a fixed batch
    max_batch: int | None  # that a plan was built for
    tensorrt: str | None = None  # version that built the plans
    plans: Mapping[str, str] = field(default_factory=dict)  # compute capability, or AMPERE -> where its plan goes
    arguments: tuple[str, ...] = ()  # that tritonserver needs for them


def read_served(files: Sequence[Path]) -> Served:
    """Read one .onnx file of kind server, or plans of one, each for compute capabilities of its own; else raise."""
    formats = [format_of(file) for file in files]
    if formats == [ONNX]:
        return _onnx(files[0])
    if files and all(each is ENGINE for each in formats):
        return _plans(files)
    raise CmfastError(
        f"a repository serves one .onnx file, or TensorRT plans of one model ({' or '.join(ENGINE.suffixes)}); "
        f"got {', '.join(map(str, files)) or 'nothing'}"
    )


def _onnx(file: Path) -> Served:
    """Read an ONNX file of kind server, its batch dynamic or fixed."""
    manifest = _manifest(file, _MAKE_ONNX)
    check_unchanged(file, manifest)
    check_plain(file, manifest, "Triton")
    spec = manifest.spec
    (steps,) = spec.sigmas
    inputs = _onnx_inputs(file)
    batch = inputs.get("noise", [None])[0]
    need: dict[str, list[int | None]] = {"noise": [batch, steps, *spec.shape]}
    for each in spec.conditions:
        sides = [None if isinstance(side, str) else side for side in each.shape]
        need[each.name] = [batch, 1] if each.kind == "class" else [batch, *sides]
    if inputs != need:
        raise ArtifactError(
            f"{file}: its manifest needs the inputs {_shapes(need)}, the graph has {_shapes(inputs)}; "
            f"export it again: {_MAKE_ONNX}"
        )
    beside = sorted(set(pb.read_onnx_model(file).external))
    # The manual: an ONNX model of several files is a folder that is called like the file and holds it.
    place = "model.onnx/model.onnx" if beside else "model.onnx"
    files = [(file, place), *((file.parent / data, f"model.onnx/{data}") for data in beside)]
    return Served(backend="onnxruntime", manifest=manifest, files=files, batch=batch, max_batch=None)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What one TensorRT plan says of itself."""

    file: Path
    manifest: Manifest
    version: str  # of TensorRT
    capabilities: Sequence[str]  # of the GPUs it was built for, or AMPERE alone
    batch: Sequence[int]  # least, optimal, largest

    @property
    def fixed(self) -> int | None:
        return self.batch[0] if self.batch[0] == self.batch[2] else None


def _plans(files: Sequence[Path]) -> Served:
    """Read the plans of one server graph, each for compute capabilities of its own."""
    first, *others = plans = [_plan(file) for file in files]
    for other in others:
        _need_alike(first, other)
    owners: dict[str, _Plan] = {}
    for plan in plans:
        for capability in plan.capabilities:
            if capability in owners:
                raise CmfastError(
                    f"{owners[capability].file} and {plan.file} are both for GPUs of compute capability {capability}; "
                    "leave out one of them"
                )
            owners[capability] = plan
    places = {plan.file: _place(plan) if others else "model.plan" for plan in plans}
    return Served(
        backend="tensorrt",
        manifest=first.manifest,
        files=list(places.items()),
        batch=first.fixed,
        max_batch=min(plan.batch[2] for plan in plans),
        tensorrt=first.version,
        plans={capability: places[plan.file] for capability, plan in owners.items()},
        arguments=(_VERSION_COMPATIBLE,) if any(p.manifest.engine.get("version_compatible") for p in plans) else (),
    )


def _plan(file: Path) -> _Plan:
    """Read a plan that Triton can load, else raise. `cmfast.formats.tensorrt_plan` has checked its manifest."""
    manifest = _manifest(file, _MAKE_PLAN)
    engine = manifest.engine
    if engine["library"] != "tensorrt":
        raise CmfastError(
            f"{file} was built by {engine['library']}, and Triton loads plans of tensorrt: {_MAKE_PLAN} "
            "--build library=tensorrt; or serve the .onnx file that it was built from"
        )
    capabilities = [AMPERE] if engine.get("hardware_compatible") == "ampere+" else engine["compute_capability"]
    if not capabilities:
        raise ArtifactError(f"{file}: its manifest does not say for which GPUs it is; build it again: {_MAKE_PLAN}")
    plan = _Plan(
        file=file, manifest=manifest, version=engine["version"], capabilities=capabilities, batch=engine["batch"]
    )
    least, often, most = plan.batch
    if least != 1 and plan.fixed is None:
        raise CmfastError(
            f"{file} takes batches of {least} to {most}, and Triton sends what there is, from 1; build it from there "
            f"on: {_MAKE_PLAN} --build batch=1,{often},{most}"
        )
    return plan


def _place(plan: _Plan) -> str:
    if AMPERE in plan.capabilities:
        return "model.plan"  # which Triton takes for GPUs that have no plan of their own
    return "_".join(["model", *(f"sm{capability.replace('.', '')}" for capability in plan.capabilities)]) + ".plan"


def _need_alike(first: _Plan, other: _Plan) -> None:
    """Raise unless two plans draw the same images and load into the same server."""
    a, b = first.manifest, other.manifest
    for what, one, two in (
        ("weights", a.source.get("sha256"), b.source.get("sha256")),
        ("model", a.spec, b.spec),
        ("precision", a.dtype, b.dtype),
        ("version of TensorRT", first.version, other.version),
        ("platform", a.engine["platform"], b.engine["platform"]),
        ("fixed batch", first.fixed, other.fixed),
    ):
        if one != two:
            values = "" if what == "model" else f" ({one} and {two})"
            raise CmfastError(
                f"{first.file} and {other.file} differ in their {what}{values}, and a server can have only one; build "
                "the plans from one file of kind server, with one version of TensorRT and the same options: "
                "cmfast-export server.onnx --format engine"
            )


def _manifest(file: Path, make: str) -> Manifest:
    """Return the manifest of a file of kind server, else say how to make one."""
    manifest = read_manifest(file)
    if manifest.kind != "server":
        raise CmfastError(
            f"{file} is of kind {manifest.kind}; Triton needs the batch first in every input, as files of kind server "
            f"have it: {make}"
        )
    return manifest


def _onnx_inputs(file: Path) -> dict[str, list[int | None]]:
    """Return the shapes of an ONNX file's inputs, None where a size is dynamic, without reading the weights."""
    shapes = {}
    with file.open("rb") as opened:
        mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    for number, graph in pb.fields(mapped):
        if number == 7 and isinstance(graph, memoryview):  # ModelProto.graph
            for inner, part in pb.fields(graph):
                if inner == 11 and isinstance(part, memoryview):  # GraphProto.input
                    value = onnx.ValueInfoProto.FromString(bytes(part))
                    sizes = value.type.tensor_type.shape.dim
                    shapes[value.name] = [size.dim_value if size.HasField("dim_value") else None for size in sizes]
    return shapes


def _shapes(values: Mapping[str, Sequence[int | None]]) -> str:
    shapes = (f"{name} [{', '.join('B' if n is None else str(n) for n in shape)}]" for name, shape in values.items())
    return ", ".join(shapes) or "none"
