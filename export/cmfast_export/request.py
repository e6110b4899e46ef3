# SPDX-License-Identifier: MIT
"""The request of an export: checked once, then passed on as it is.

`GraphRequest` is a request for a graph; the library's functions take it too. `Request` is a whole command, made by
`make_request` from what was typed: which model, which target (`cmfast_export.targets.table`), which options.
Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from cmfast.checks import MAX_BATCH, real_number
from cmfast.checks import whole_number as a_whole_number
from cmfast.errors import CmfastError
from cmfast.files import check_target, check_target_folder
from cmfast.formats.manifest import KINDS, check_model, rounding
from cmfast.formats.table import ENGINE, all_suffixes, format_of
from cmfast.formats.values import PRECISIONS
from cmfast_export import AUTO, FLAVOURS, INT8, STORED
from cmfast_export._options import (
    check_opset,
    check_range,
    check_steps,
    check_tolerance,
    parse_batch,
    parse_files,
    parse_numbers,
    parse_options,
    shorten,
)
from cmfast_export._target import files_of
from cmfast_export.int8.options import TOLERANCE_DB, Calibration, check_int8, read_data
from cmfast_export.targets.table import TARGETS, Target, at, find_target


@dataclass(frozen=True, kw_only=True)
class GraphRequest:
    """A request for a graph.

    Attributes:
        kind: denoiser; sampler: the whole loop; server: a sampler whose inputs have the batch first.
        steps: of a sampler: network calls, at the model's default noise levels.
        sigmas: of a sampler: noise levels, data units, decreasing, instead of steps.
        batch: fixed batch size; None: dynamic.
        opset: of ONNX; None: the oldest that can express it.
        precision: fp32, tf32, fp16, bf16 or int8: what the network computes in; auto: the fastest inside the tolerance.
        guidance: of a sampler: weight of classifier-free guidance; None: none.
        null: what stands for no condition, by name: a class, or the value that fills a tensor.
        device: where the file is run for its verification: cpu (whose missing arithmetic is emulated) or cuda.
        tolerance: largest allowed absolute difference from float32 PyTorch, data units; beyond it CheckFailed, and no
            file. None: what rounding to this precision may cost (`cmfast.formats.manifest.rounding`).
        flavour: ort-cuda: only for ONNX Runtime's CUDA provider (`targets.ort_cuda`). Device cpu checks it with
            GroupNorm written out, and the manifest says that no CUDA kernel was run; device cuda runs the file itself.
        weights: fp16: stored as float16, half the file, while the arithmetic stays; "": as they are.
        encoders: files that the encoders of conditions are written to, by the names of the conditions, "" of the only
            one; this graph then takes what they make. Empty: they are in this graph.
    """

    kind: str = "denoiser"
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    batch: int | None = None
    opset: int | None = None
    precision: str = "fp32"
    guidance: float | None = None
    null: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    tolerance: float | None = None
    flavour: str = ""
    weights: str = ""
    encoders: Mapping[str, Path] = field(default_factory=dict)
    tolerance_db: float | None = None
    calibration: Calibration | None = None

    @property
    def dtype(self) -> str:
        """What the manifest calls the precision; around int8 products a graph is float32."""
        return PRECISIONS["fp32" if self.precision == INT8 else self.precision]

    @property
    def allowed_db(self) -> float:
        """The least PSNR of a file, dB; 0 where another tolerance decides."""
        return (self.tolerance_db or TOLERANCE_DB) if self.precision == INT8 else 0.0

    def allowed(self, device: str) -> float:
        """Return the tolerance, data units: what was requested, else what rounding explains on a device."""
        if self.precision == INT8:
            return math.inf  # `allowed_db` decides
        stored = PRECISIONS["fp16"] if self.weights else self.dtype
        return rounding(stored, device) if self.tolerance is None else self.tolerance

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("precision", self.precision, (*PRECISIONS, INT8, AUTO)),
            ("device", self.device, ("cpu", "cuda")),
            ("flavour", self.flavour, FLAVOURS),
            ("weights", self.weights, STORED),
        ):
            if value not in allowed:
                raise CmfastError(f"{name} must be one of {', '.join(filter(None, allowed))}, got {value!r}")
        if self.weights and self.precision not in ("fp32", "tf32"):
            raise CmfastError(f"weights of precision {self.precision} are stored in it already; leave fp16 weights out")
        check_int8(
            precision=self.precision, tolerance=self.tolerance, tolerance_db=self.tolerance_db,
            calibration=self.calibration, weights=self.weights, device=self.device, flavour=self.flavour,
            encoders=bool(self.encoders),
        )  # fmt: skip
        if self.guidance is not None:
            real_number("guidance", self.guidance)
        for name, number in self.null.items():
            real_number(f"null of the condition {name}", number)
        if self.steps is not None:
            a_whole_number("number of steps", self.steps)
        check_tolerance(self.tolerance)
        if self.batch is not None:
            check_range("the batch", self.batch, 1, MAX_BATCH, "samples, or dynamic")
        if self.steps is not None and self.steps < 1:
            raise CmfastError(f"steps must be at least 1, got {shorten(str(self.steps))}")
        check_steps(max(self.steps or 0, len(self.sigmas or ())))
        falling = pairwise((math.inf, *(self.sigmas or ())))
        if self.sigmas is not None and not all(0 < after < before for before, after in falling):
            raise CmfastError(
                f"sigmas must be finite noise levels above 0 that strictly decrease, for example 80,0.8, got "
                f"{shorten(','.join(f'{sigma:g}' for sigma in self.sigmas))}"
            )
        check_opset(self.opset)
        if self.kind == "denoiser" and self.guidance is not None:
            raise CmfastError("guidance is for a sampler: pass kind sampler")
        if self.null and self.guidance is None:
            raise CmfastError("null requires guidance, the weight")
        if self.kind == "denoiser" and (self.steps is not None or self.sigmas is not None):
            raise CmfastError(
                "noise levels belong to a sampler; a denoiser takes any: leave them out, or pass kind sampler"
            )


@dataclass(frozen=True, kw_only=True)
class OwnNetwork:
    """A network of the user's own, see `cmfast_train.from_factory`.

    Attributes:
        factory: package.module:factory, which is imported and called.
        spec: JSON file of its conventions; None: the factory returns a `Denoiser`.
        weights: whether the request's model is a file of weights; if not, it is the spec, and the weights are as the
            factory made them.
    """

    factory: str
    spec: Path | None
    weights: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """One export.

    Attributes:
        model: a checkpoint, a folder of diffusers, or an exported file.
        engines: further engines, for other cards.
        out: what is written.
        target: the row of the table.
        graph: of the graph; None: the model is exported already, or the target has no graph.
        tolerance: as in `GraphRequest`; an engine has one against its ONNX file too.
        options: of the target, an instance of `target.options`.
        cache: folder of engines built before.
        source: what a foreign model is (`--source`).
        assignments: what a foreign model does not say (`--set NAME=VALUE`).
        own: a network of the user's own, whose weights `model` holds.
    """

    model: Path
    engines: tuple[Path, ...] = ()
    out: Path
    target: Target
    graph: GraphRequest | None = None
    tolerance: float | None = None
    options: object = None
    cache: Path | None = None
    source: str = ""
    assignments: tuple[str, ...] = ()
    own: OwnNetwork | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What is read."""
        made = self.own is not None and not self.own.weights and self.own.spec is None
        return (
            *(() if made else (self.model,)),
            *self.engines,
            *([self.own.spec] if self.own and self.own.spec else []),
        )

    @property
    def name(self) -> str:
        """Name of the model: of its file without the suffix, of its folder."""
        return _stem(self.model)

    @property
    def given(self) -> str:
        """What the user passed about a foreign file, as typed."""
        words = [f"--source {self.source}"] * bool(self.source) + [f"--set {text}" for text in self.assignments]
        return " ".join(words)

    @property
    def what(self) -> str:
        """What would be written, in a few words."""
        if self.graph is None:
            return self.target.name
        batch = "dynamic" if self.graph.batch is None else self.graph.batch
        return f"{self.graph.kind}, {self.graph.precision}, batch {batch}"

    def check_out(self) -> None:
        """Raise CmfastError unless the target can be written: before the work, not after it."""
        out, suffixes, form = self.out, self.target.suffixes, self.target.name
        if suffixes and out.suffix not in suffixes:
            raise CmfastError(f"-o {out}: for --format {form} the name must end in {' or '.join(suffixes)}")
        if not suffixes and out.suffix.lower() in (".pt", ".safetensors", *all_suffixes()):
            raise CmfastError(f"-o {out}: --format {form} writes a folder; give it a name without {out.suffix}")
        for read in self.inputs:
            if read.is_dir() and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(read)):
                raise CmfastError(f"-o {out}: {read} is the model that is read; name a place outside it")
        files = [file for read in self.inputs for file in files_of(read)]
        if suffixes:
            check_target(out, suffixes, files)
        elif not self.target.check:  # which knows better what may be there already
            check_target_folder(out, files)


def make_request(
    *,
    model: Path | None,
    engines: tuple[Path, ...] = (),
    network: str = "",
    spec: Path | None = None,
    out: Path | None = None,
    form: str = "onnx",
    kind: str | None = None,
    steps: int | None = None,
    sigmas: tuple[float, ...] | None = None,
    batch: str = "dynamic",
    opset: int | None = None,
    precision: str = "fp32",
    encoder: Sequence[str] = (),
    weights: str = "",
    guidance: float | None = None,
    null: Sequence[str] = (),
    tolerance: float | None = None,
    tolerance_db: float | None = None,
    calibration: Sequence[str] = (),
    device: str = "cpu",
    build: Sequence[str] = (),
    serve: Sequence[str] = (),
    cache: Path | None = None,
    cache_given: bool = False,
    source: str = "",
    assignments: tuple[str, ...] = (),
) -> Request:
    """Return a request, checked as far as possible without the model.

    Args:
        model: what is exported; None: a custom network with the weights of its factory.
        network: package.module:factory of a custom network.
        spec: JSON file of its conventions.
        engines: further engines, where the target takes several.
        out: None: a name beside the model.
        form: name of the target.
        kind: None: the target's default.
        steps: as in `GraphRequest`, and so are sigmas, batch, opset, precision, tolerances and device.
        sigmas: see steps.
        batch: see steps.
        opset: see steps.
        precision: see steps.
        weights: see steps.
        encoder: FILE or NAME=FILE, where encoders of conditions are written.
        guidance: see steps.
        null: NAME=NUMBER, with guidance.
        tolerance: see steps.
        tolerance_db: see steps.
        calibration: NAME=VALUE, of int8 (`int8.options.Calibration`).
        device: see steps.
        build: NAME=VALUE, options of the target.
        serve: NAME=VALUE, options of a target that is served.
        cache: folder of engines built before.
        cache_given: whether it was given, not only found in the environment.
        source: what a foreign model is.
        assignments: NAME=VALUE, what a foreign model does not say.

    Raises:
        CmfastError: options that do not go together, a value that is out of range, a target that cannot be written.
    """
    target = find_target(form)
    own = _own(model, network, spec, target, source)
    read = model or spec
    model = read or (Path(network.rpartition(":")[2].rpartition(".")[2]) if network else None)
    if model is None:
        raise CmfastError("name a model: cmfast-export model.pt; of a network of your own also --network and --spec")
    if read is not None:  # else the factory's name stands for it
        check_model(read)
    if engines and not (target.takes_engines and format_of(model) is ENGINE):
        raise CmfastError(f"{engines[0]}: one file at a time; several engines can be put into one --format triton")
    of_graph = (kind, steps, sigmas, opset, guidance, weights or None, tolerance_db, *null, *calibration)
    graph_asked = any(value is not None for value in of_graph) or (batch, precision) != ("dynamic", "fp32")
    if not target.kinds and (graph_asked or tolerance is not None):
        raise CmfastError(
            "--kind, --steps, --sigmas, --batch, --opset, --precision, --weights and --tolerance are for graphs, "
            f"not for {form}"
        )
    exported = format_of(model) is not None
    if exported and own:
        raise CmfastError(f"{model}: exported already; --network and --spec are for a network that is to be exported")
    if encoder and not (own and target is find_target("onnx")):
        raise CmfastError("--encoder is for --format onnx and --network, a network of your own that has an encoder")
    if own and (others := [text for text in assignments if not text.startswith("weights=")]):
        raise CmfastError(f"--set {others[0]}: the conventions of a network of your own are in --spec; remove it")
    if exported and not target.takes_files:
        *most, last = (each.name for each in TARGETS if each.takes_files)
        raise CmfastError(f"{model}: exported already; --format {', '.join(most)} or {last} takes it further")
    if exported and (graph_asked or source or assignments):
        raise CmfastError(f"{model}: exported already, so its kind and precision are in it; export the checkpoint")
    _check_flags(target, build, serve, cache_given)
    if kind is not None and target.kinds and kind not in target.kinds:
        raise CmfastError(
            f"--format {form} is made from files of kind {' or '.join(target.kinds)}, not {kind}; leave --kind out"
        )
    if precision == AUTO and not target.automatic:
        raise CmfastError(f"--precision auto is not supported with --format {form}; pass --precision fp16")
    if precision == INT8 and not target.int8:
        raise CmfastError(
            f"--precision int8 is not supported with --format {form}; with --format onnx it makes a file that ONNX "
            "Runtime and OpenVINO run on CPUs"
        )
    kind = kind or (target.kinds or KINDS)[0]
    for file in engines:
        check_model(file)
    request = Request(
        model=model, engines=engines, out=out or _default_out(model, target, kind, precision), target=target,
        tolerance=tolerance, cache=cache if target.caches else None, source=source, assignments=assignments,
        own=own,
    )  # fmt: skip
    request.check_out()
    graph = GraphRequest(
        kind=kind, steps=steps, sigmas=sigmas, batch=parse_batch(batch), opset=opset, precision=precision,
        guidance=guidance, null=parse_numbers("--null", null), tolerance=tolerance, device=device,
        flavour=target.flavour, weights=weights, encoders=parse_files("--encoder", encoder), tolerance_db=tolerance_db,
        calibration=parse_options(Calibration, "--calibration", calibration) if calibration else None,
    )  # fmt: skip
    if graph.calibration and graph.calibration.data:
        read_data(graph.calibration.data)  # what is wrong with it, before the model is read
    given = build if target.flag == "--build" else serve
    options = parse_options(at(target.options), target.flag, given) if target.options else None
    request = replace(request, graph=graph if target.kinds and not exported else None, options=options)
    if target.check:
        at(target.check)(request)
    return request


def _own(model: Path | None, network: str, spec: Path | None, target: Target, source: str) -> OwnNetwork | None:
    """Return the network of the user's own, if there is one."""
    if not network:
        if spec is not None:
            raise CmfastError("--spec describes a network of your own: add --network package.module:factory")
        return None
    if source:
        raise CmfastError("--source is for checkpoints of known formats, --network for a network of your own; pass one")
    if not target.kinds:
        raise CmfastError(f"--format {target.name} takes checkpoints of known networks, not --network")
    return OwnNetwork(factory=network, spec=spec, weights=model is not None)


def _check_flags(target: Target, build: Sequence[str], serve: Sequence[str], cache_given: bool) -> None:
    """Refuse options that the target has no use for, instead of ignoring them."""
    if (build and not (target.options and target.flag == "--build")) or (cache_given and not target.caches):
        raise CmfastError(f"--build, --target and --cache are for --format engine, not for {target.name}")
    if serve and not (target.options and target.flag == "--serve"):
        raise CmfastError(f"--serve is for --format triton, not for {target.name}")


def _default_out(model: Path, target: Target, kind: str, precision: str) -> Path:
    model = model if model.name else model.resolve()  # "." has no name
    if not model.name:
        raise CmfastError(f"{model} has no name to call the file after; pass one: -o NAME")
    name = _stem(model)
    if target.needs == "graph" or target.kinds:
        name += "" if kind == (target.kinds or KINDS)[0] else f"_{kind}"
        name += "" if precision in ("fp32", AUTO) else f"_{precision}"
    if not target.suffixes or not target.kinds or target.flavour:
        name += f"_{target.name.replace('-', '_')}"
    return model.with_name(f"{name}{target.suffixes[0] if target.suffixes else ''}")


def _stem(model: Path) -> str:
    return model.resolve().name if model.is_dir() else model.stem
