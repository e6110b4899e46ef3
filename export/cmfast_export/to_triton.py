# SPDX-License-Identifier: MIT
"""A model repository of Triton Inference Server, from files of kind "server". Triton is not needed.

    OUT/NAME/config.pbtxt    OUT/NAME/1/model.onnx, or model.plan, or a plan for each GPU: model_sm89.plan ...

Triton batches along the first axis of everything and of nothing else, so a server graph is a sampler graph that takes
noise [B, K, C, H, W] and label [B, 1]; its output stays images [B, C, H, W]. One request is one call: K steps are
inside. The file format is ModelConfig of Triton's model_config.proto; where its comments and the backends' sources
say more than the manual, a comment here says so.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from cmfast import _protobuf as pb
from cmfast.artifact import ENGINE_SUFFIXES, Manifest, check_file, read_manifest
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import atomic_folder, check_target_folder

MAX_BATCH = 8  # of a file whose batch is dynamic, unless asked otherwise
AMPERE = "8.0+"  # the compute capabilities of a plan that was built to run on all GPUs from Ampere on
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU", "auto": "KIND_AUTO"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # a folder and a part of URLs; after a dot Triton reads a backend
_VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"  # without it Triton refuses such plans
_MAKE = "cmfast-export model.pt --format triton --steps 2 -o repository"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model is served; `cmfast-export --format triton --serve NAME=VALUE` sets a field."""

    name: str = ""  # of the model in requests; empty: after the first file
    max_batch: int = 0  # images in one batch, at most; 0: what a plan was built for, else MAX_BATCH
    queue_delay_us: int = 0  # how long a request may wait for others, microseconds; 0: only while the model is busy
    instances: int = 1  # copies of the model on each GPU, or on the CPU
    device: str = "gpu"  # gpu, cpu or auto (cpu where there is no GPU); plans run on gpu only

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise CmfastError(f"a model's name for Triton is letters, digits, _ and -, got {self.name!r}")
        if self.max_batch < 0:
            raise CmfastError(f"max_batch must be at least 1, got {self.max_batch}")
        if self.queue_delay_us < 0:
            raise CmfastError(f"queue_delay_us must be at least 0 microseconds, got {self.queue_delay_us}")
        if self.instances < 1:
            raise CmfastError(f"instances must be at least 1, got {self.instances}")
        if self.device not in _KINDS:
            raise CmfastError(f"device must be one of {', '.join(_KINDS)}, got {self.device!r}")


DEFAULTS = ServeOptions()


@dataclass(frozen=True, kw_only=True)
class Written:
    """A repository that was written, and what whoever serves it and asks it must know."""

    path: Path  # of the repository: tritonserver --model-repository
    name: str  # of the model, as clients ask for it
    manifest: Manifest
    backend: str  # onnxruntime or tensorrt
    max_batch: int  # images in one request, at most
    batch: int | None  # the only number of images a request may have, of a file with a fixed batch; Triton batches none
    tensorrt: str | None  # version of TensorRT that built the plans; the server must have the same
    capabilities: tuple[str, ...]  # compute capabilities of the GPUs that it runs on, AMPERE among them; empty: any
    arguments: tuple[str, ...]  # what tritonserver must be told besides the repository


def write_repository(
    out: str | os.PathLike[str], models: Sequence[str | os.PathLike[str]], options: ServeOptions = DEFAULTS
) -> Written:
    """Write a model into the repository `out`, a new one or one that has others, and return what was written.

    The files are copied. A model of the same name is left alone: CmfastError.

    models  files of kind "server": one .onnx, or TensorRT plans of it, each for other compute capabilities
    """
    repository = _repository(Path(out))
    files = [check_file(path) for path in models]
    served = _plans(files) if _are_plans(files) else _onnx(files[0])
    name = options.name or _name(files[0])
    max_batch = _max_batch(served, options)
    if served.backend == "tensorrt" and options.device != "gpu":
        raise CmfastError(
            f"a TensorRT plan runs on a GPU, not on {options.device}; leave the device out, or serve a .onnx file"
        )

    is_new = not repository.exists() or not any(repository.iterdir())
    check_target_folder(repository if is_new else repository / name)
    with atomic_folder(repository if is_new else repository / name) as folder:
        model = folder / name if is_new else folder
        version = model / "1"
        for source, place in served.files:
            (version / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, version / place)
        (model / "config.pbtxt").write_text(_config(name, served, max_batch, options), encoding="utf-8")
    return Written(
        path=Path(out),
        name=name,
        manifest=served.manifest,
        backend=served.backend,
        max_batch=max_batch,
        batch=served.batch,
        tensorrt=served.tensorrt,
        capabilities=tuple(served.plans),
        arguments=served.arguments,
    )


def server_graph(sampler: ir.Model) -> ir.Model:
    """Return a sampler graph with the batch first in its inputs, as Triton has it: noise [B, K, ...], label [B, 1].

    `sampler` is left as it is; the weights are shared with it.
    """
    model = sampler.clone()
    graph = model.graph
    old_noise, *old_label = graph.inputs
    assert old_noise.shape is not None
    steps, batch, *image = old_noise.shape
    noise = ir.Value(name="noise", type=old_noise.type, shape=ir.Shape([batch, steps, *image]))
    added = [ir.node("Transpose", [noise], {"perm": [1, 0, 2, 3, 4]}, name="server.noise")]
    inputs = [noise]
    if old_label:
        axes = ir.Value(name="server.axes", const_value=ir.tensor(np.array([1]), name="server.axes"))
        axes.type, axes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.register_initializer(axes)
        label = ir.Value(name="label", type=old_label[0].type, shape=ir.Shape([batch, 1]))
        added.append(ir.node("Squeeze", [label, axes], name="server.label"))
        inputs.append(label)
    for old, node in zip(list(graph.inputs), added, strict=True):
        new = node.outputs[0]
        new.name, new.type, new.shape = node.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    graph.insert_before(graph[0], added)
    graph.inputs[:] = inputs
    graph.name = "server"
    return model


def client_example(written: Written) -> str:
    """Return a Python script that draws from the server the images that cmfast-sample draws from the file."""
    spec, n = written.manifest.spec, written.batch or min(4, written.max_batch)
    (steps,) = spec.sigmas
    one = f"gaussian(0, range({n}), step, {tuple(spec.image)})"  # of seed 0
    lines = [
        "import numpy as np",
        "import tritonclient.grpc as triton  # pip install 'tritonclient[grpc]'",
        "from cmfast import gaussian, save_images",
        *(["from cmfast.noise import labels"] if spec.classes else []),
        "from cmfast.sampler import to_uint8",
        "",
        f"noise = np.stack([{one} for step in range({steps})], axis=1)  # [B, K, C, H, W]",
        'inputs = [triton.InferInput("noise", noise.shape, "FP32").set_data_from_numpy(noise)]',
    ]
    if spec.classes:
        lines += [
            f"label = labels(0, range({n}), {spec.classes})[:, None]  # [B, 1], from 0 to {spec.classes - 1}",
            'inputs += [triton.InferInput("label", label.shape, "INT64").set_data_from_numpy(label)]',
        ]
    lines += [
        f'answer = triton.InferenceServerClient("localhost:8001").infer("{written.name}", inputs)',
        'save_images("images.png", to_uint8(answer.as_numpy("images")))',
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What the files say of themselves."""

    backend: str  # onnxruntime or tensorrt
    manifest: Manifest
    files: Sequence[tuple[Path, str]]  # which file goes where in the version's folder
    batch: int | None  # fixed
    max_batch: int | None  # that a plan was built for
    tensorrt: str | None = None
    plans: Mapping[str, str] = field(default_factory=dict)  # compute capability -> where its plan goes
    arguments: tuple[str, ...] = ()


def _repository(out: Path) -> Path:
    """Return `out` if it is no folder yet, an empty one, or a model repository."""
    if out.exists() and not out.is_dir():
        raise CmfastError(f"{out} exists and is not a folder; name another")
    strangers = (
        [entry for entry in sorted(out.iterdir()) if not (entry / "config.pbtxt").is_file()] if out.exists() else []
    )
    if strangers:
        raise CmfastError(f"{out} is no model repository: {strangers[0].name} in it is no model; name another folder")
    return out


def _are_plans(files: Sequence[Path]) -> bool:
    suffixes = [file.suffix for file in files]
    if suffixes == [".onnx"]:
        return False
    if files and all(suffix in ENGINE_SUFFIXES for suffix in suffixes):
        return True
    raise CmfastError(
        f"a repository serves one .onnx file, or TensorRT plans of one model ({' or '.join(ENGINE_SUFFIXES)}); "
        f"got {', '.join(map(str, files)) or 'nothing'}"
    )


def _onnx(file: Path) -> _Served:
    """Read an ONNX file of kind server, its batch dynamic or fixed."""
    manifest = _manifest(file)
    spec = manifest.spec
    (steps,) = spec.sigmas
    inputs = _onnx_inputs(file)
    batch = inputs.get("noise", [None])[0]
    need: dict[str, list[int | None]] = {"noise": [batch, steps, *spec.image]}
    if spec.classes:
        need["label"] = [batch, 1]
    if inputs != need:
        raise ArtifactError(
            f"{file}: its manifest needs the inputs {_shapes(need)}, the graph has {_shapes(inputs)}; "
            f"export it again: {_MAKE}"
        )
    beside = sorted(set(pb.read_onnx_model(file).external))
    # The manual: an ONNX model of several files is a folder that is called like the file and holds it.
    place = "model.onnx/model.onnx" if beside else "model.onnx"
    files = [(file, place), *((file.parent / data, f"model.onnx/{data}") for data in beside)]
    return _Served(backend="onnxruntime", manifest=manifest, files=files, batch=batch, max_batch=None)


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


def _plans(files: Sequence[Path]) -> _Served:
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
    return _Served(
        backend="tensorrt",
        manifest=first.manifest,
        files=list(places.items()),
        batch=first.fixed,
        max_batch=min(plan.batch[2] for plan in plans),
        tensorrt=first.version,
        plans={capability: places[plan.file] for capability, plan in owners.items()},
        arguments=(_VERSION_COMPATIBLE,) if any(p.manifest.engine.get("version_compatible") for p in plans) else (),
    )


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
        ("platform", a.engine.get("platform"), b.engine.get("platform")),
        ("fixed batch", first.fixed, other.fixed),
    ):
        if one != two:
            values = "" if what == "model" else f" ({one} and {two})"
            raise CmfastError(
                f"{first.file} and {other.file} differ in their {what}{values}, and a server can have only one; build "
                "the plans from one .onnx file, with one version of TensorRT and the same options"
            )


def _manifest(file: Path) -> Manifest:
    """Return the manifest of a file of kind server, else say how to make one."""
    manifest = read_manifest(file)
    if manifest.kind != "server":
        raise CmfastError(
            f"{file} is of kind {manifest.kind}; Triton needs the batch first in every input, as files of kind server "
            f"have it: {_MAKE}"
        )
    return manifest


def _plan(file: Path) -> _Plan:
    """Read a plan that Triton can load, else raise."""
    manifest = _manifest(file)
    engine = manifest.engine
    if engine.get("library") != "tensorrt":
        raise CmfastError(
            f"{file} was built by {engine.get('library')}, and Triton loads plans of tensorrt; build it with that, or "
            "serve the .onnx file that it was built from"
        )
    version, capabilities, batch = (engine.get(key) for key in ("version", "compute_capability", "batch"))
    if not (
        isinstance(version, str)
        and isinstance(capabilities, list)
        and capabilities
        and all(isinstance(each, str) and re.fullmatch(r"\d+\.\d", each) for each in capabilities)
        and isinstance(batch, list)
        and [type(each) for each in batch] == [int, int, int]
        and 1 <= batch[0] <= batch[1] <= batch[2]
    ):
        raise ArtifactError(
            f"{file}: its manifest does not say which TensorRT built it, for which GPUs and batches "
            f"({version!r}, {capabilities!r}, {batch!r}); build it again: cmfast-export model.onnx --format engine"
        )
    if engine.get("hardware_compatible") == "ampere+":
        capabilities = [AMPERE]
    plan = _Plan(file=file, manifest=manifest, version=version, capabilities=capabilities, batch=batch)
    if batch[0] != 1 and plan.fixed is None:
        raise CmfastError(
            f"{file} takes batches of {batch[0]} to {batch[2]}, and Triton sends what there is, from 1; build a plan "
            "whose least batch is 1"
        )
    return plan


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


def _name(file: Path) -> str:
    """Return the name of a file as far as Triton allows it."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", file.stem).strip("_") or "model"


def _max_batch(served: _Served, options: ServeOptions) -> int:
    """Return the largest batch, after checking what was asked against what the file can do."""
    if served.batch is not None:
        if options.max_batch not in (0, served.batch) or options.queue_delay_us:
            raise CmfastError(
                f"the file takes exactly {served.batch} images, so Triton cannot batch requests; leave max_batch and "
                "queue_delay_us out, or export it with a dynamic batch"
            )
        return served.batch
    if served.max_batch and options.max_batch > served.max_batch:
        raise CmfastError(
            f"max_batch must be at most {served.max_batch}, which the plan was built for, got {options.max_batch}"
        )
    return options.max_batch or served.max_batch or MAX_BATCH


def _config(name: str, served: _Served, max_batch: int, options: ServeOptions) -> str:
    """Return config.pbtxt."""
    spec = served.manifest.spec
    (levels,) = spec.sigmas.values()
    # Of a model that Triton batches, shapes are without the batch. One whose batch is fixed it cannot batch: ONNX
    # Runtime's backend refuses max_batch_size > 0 unless the first axis is dynamic, TensorRT's would send other sizes.
    first = [] if served.batch is None else [served.batch]
    inputs = {"noise": ("TYPE_FP32", [*first, len(levels), *spec.image])}
    if spec.classes:
        inputs["label"] = ("TYPE_INT64", [*first, 1])
    outputs = {"images": ("TYPE_FP32", [*first, *spec.image])}
    sizes = _sizes(served, max_batch, options.device)
    sections = [
        f"# cmfast, noise levels {', '.join(f'{s:g}' for s in levels)}; noise: unit Gaussian; images: in [-1, 1]",
        f'name: "{name}"',
        f'platform: "{_PLATFORMS[served.backend]}"',
        f"max_batch_size: {0 if served.batch else max_batch}",
        *(
            _list(which, (f'name: "{key}" data_type: {kind} dims: {dims}' for key, (kind, dims) in tensors.items()))
            for which, tensors in (("input", inputs), ("output", outputs))
        ),
        _list("instance_group", [f"kind: {_KINDS[options.device]} count: {options.instances}"]),
        *_optimization(served, {key: dims for key, (_, dims) in inputs.items()}, sizes, options.device),
    ]
    if served.batch is None and max_batch > 1:
        # No preferred_batch_size: the manual keeps it for plans with several optimisation profiles; ours have one.
        sections.append(f"dynamic_batching {{ max_queue_delay_microseconds: {options.queue_delay_us} }}")
    own = {capability: place for capability, place in served.plans.items() if place != "model.plan"}
    if own:
        sections.append(_list("cc_model_filenames", (f'key: "{c}" value: "{at}"' for c, at in own.items())))
    # Zeros: Triton's random_data are random bytes, of which one float in 256 is infinite or not a number.
    zeros = " ".join(
        f'inputs {{ key: "{key}" value {{ data_type: {kind} dims: {dims} zero_data: true }} }}'
        for key, (kind, dims) in inputs.items()
    )
    sections.append(
        _list(
            "model_warmup",  # its batch_size counts requests; one of them has all images of a fixed batch
            (f'name: "{n} at once" batch_size: {1 if served.batch else n} {zeros}' for n in sizes),
        )
    )
    return "\n".join(sections) + "\n"


def _sizes(served: _Served, max_batch: int, device: str) -> list[int]:
    """Return the batch sizes, in images, that are run before the first request."""
    if served.batch:
        return [served.batch]
    if served.backend == "tensorrt":  # each is a CUDA graph, which takes memory; other sizes run without one
        return sorted({2**i for i in range(max_batch.bit_length())} | {max_batch})
    if device == "cpu":
        return sorted({1, max_batch})
    return list(range(1, max_batch + 1))  # on a GPU the first batch of a size is slow: cuDNN's algorithms are timed


def _optimization(served: _Served, inputs: Mapping[str, list[int]], sizes: Sequence[int], device: str) -> list[str]:
    if served.backend == "tensorrt":
        # Exact sizes. A graph_lower_bound would run one graph for smaller batches too, with labels that nobody set.
        shapes = " ".join(f'input {{ key: "{key}" value {{ dim: {dims} }} }}' for key, dims in inputs.items())
        specs = _list("graph_spec", (f"batch_size: {0 if served.batch else size} {shapes}" for size in sizes))
        return [f"optimization {{ cuda {{ graphs: true {specs} }} }}"]
    if device == "cpu":
        return []
    # The CUDA provider's default is TensorFloat-32, ten bits of mantissa, also for a float32 file. No CUDA graphs:
    # those of ONNX Runtime read and write fixed addresses, and Triton's backend gives others to every request.
    tf32 = f'parameters {{ key: "use_tf32" value: "{int(served.manifest.dtype == "tf32")}" }}'
    cuda = _list("gpu_execution_accelerator", [f'name: "cuda" {tf32}'])
    return [f"optimization {{ execution_accelerators {{ {cuda} }} }}"]


def _list(name: str, messages: Iterable[str]) -> str:
    """Return a repeated field in protobuf's text format."""
    return f"{name} [\n" + ",\n".join(f"  {{ {message} }}" for message in messages) + "\n]"
