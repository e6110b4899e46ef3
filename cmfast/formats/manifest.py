# SPDX-License-Identifier: MIT
"""The manifest: what a model file says about itself, found and checked before anything runs it.

    manifest = read_manifest("model.onnx")        # needs neither onnx nor a backend

In ONNX it is `metadata_props["cmfast"]`. The reader walks the protobuf itself (`cmfast.formats.protobuf`): that starts
in milliseconds, sees a truncated file, and finds tensors that point outside the file before a backend opens them.
In TensorRT's engines it is the network's name (`cmfast.formats.tensorrt_plan`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from cmfast.conditions import Condition
from cmfast.errors import ArtifactError, CmfastError, CmfastWarning, shown
from cmfast.formats import protobuf as pb
from cmfast.formats.content import content_sha256
from cmfast.formats.recognise import HEAD
from cmfast.formats.recognise import what_it_is_instead as what_it_is_instead  # for readers of other files
from cmfast.formats.shipped import find, hint
from cmfast.formats.values import PRECISIONS, check_parts, check_selftest, object_of
from cmfast.spec import ModelSpec

SCHEMA = "cmfast/2"
SCHEMAS = ("cmfast/1", SCHEMA)  # that are read
# server: a sampler whose inputs have the batch first, noise [B, K, *shape] and a class [B, 1], as servers want it.
KINDS = ("denoiser", "sampler", "server")
ENCODER = "encoder"  # the kind of a file that encodes one condition for another file: no model by itself
MAX_CHARACTERS = 4000  # TensorRT limits a network's name, where its manifest lives, to 4096


def may_use_tf32(dtype: str) -> bool:
    """Whether ONNX Runtime's CUDA provider is allowed TensorFloat-32 for a file of this dtype: its `use_tf32`.

    Not for float32. Half precision needs it: without, cuDNN's tensor cores are off for the convolutions of every type
    (onnxruntime/core/providers/cuda/nn/conv.cc, deselect_numeric_notes). What float32 is around a half-precision
    backbone then keeps ten bits of the mantissa, as the backbone in float16 does.
    """
    return dtype != "float32"


# Largest difference between two computations of an image, data units, that rounding to a dtype explains: three times
# what 64 images of a trained network in two steps had (benchmarks/results/precision_mnist.json). For float32, whose
# sums only differ in their order, it is a hundred times what is seen.
ROUNDING = {"float32": 1e-4, "tf32": 4e-2, "float16": 5e-2, "bfloat16": 3e-1}
WINOGRAD = 1e-3  # for float32 where a library is free to choose such convolutions: on GPUs, and between any libraries
# In `made_by`: which runtime the nodes of an ONNX file are for. No entry: any; the names are cmfast_export.FLAVOURS.
FLAVOUR = "flavour"
# Likewise: which products of an ONNX file are int8, in words. No entry: none.
INT8 = "int8"
_OBJECTS = ("source", "made_by", "parity", "cost", "engine", "encoders", "selftest")


class Input(NamedTuple):
    """An input of a graph."""

    name: str
    dtype: str  # float32 or int64
    shape: tuple[int | str, ...]  # "batch" and names of dynamic sizes are free


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A model file's description of itself. The JSON keys are a contract: C++ and other people's scripts read them."""

    kind: str  # one of KINDS, or ENCODER
    spec: ModelSpec
    dtype: str = "float32"  # of the backbone, a value of PRECISIONS; inputs and outputs are always float32
    source: Mapping[str, Any] = field(default_factory=dict)  # format and SHA-256 of the weights
    made_by: Mapping[str, str] = field(default_factory=dict)  # versions of the programs that wrote the file
    parity: Mapping[str, float] = field(default_factory=dict)  # against PyTorch, worst over levels and batches
    graph_sha256: str = ""  # of the graph and the weights that were verified: cmfast.formats.content; "": not recorded
    cost: Mapping[str, float] = field(default_factory=dict)  # operations and bytes of an image: `graphs.cost`
    engine: Mapping[str, Any] = field(default_factory=dict)  # what built it, for what: `cmfast.formats.tensorrt_plan`
    selftest: Mapping[str, Any] = field(default_factory=dict)  # values of a sample: `cmfast.formats.selftest`
    encoders: Mapping[str, str] = field(default_factory=dict)  # condition: graph_sha256 of the file that encodes it
    encoded: Condition | None = None  # of an encoder: what it makes of its one condition

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, ENCODER):
            raise CmfastError(f"kind must be one of {', '.join((*KINDS, ENCODER))}, got {shown(self.kind)}")
        if (self.kind == ENCODER) != (self.encoded is not None) or (self.encoded and len(self.spec.conditions) != 1):
            raise CmfastError("an encoder has one condition and says what it makes of it (encoded); no other kind does")
        if any(
            not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) for digest in self.encoders.values()
        ):
            raise CmfastError("encoders must be the graph_sha256 of their files by the names of conditions")
        if self.kind in KINDS[1:] and len(self.spec.sigmas) != 1:
            raise CmfastError("a sampler has exactly one list of noise levels, the one it was built with")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What the graph takes, in its order."""
        spec, server = self.spec, self.kind == "server"
        if self.kind == "denoiser":
            times = ("sigma", "sigma_next") if spec.second_time else ("sigma",)
            found = [Input("x", "float32", ("batch", *spec.shape))]
            found += [Input(name, "float32", ("batch",)) for name in times]
        elif self.kind == ENCODER:
            found = []
        else:
            (steps,) = spec.sigmas
            axes = ("batch", steps) if server else (steps, "batch")
            found = [Input("noise", "float32", (*axes, *spec.shape))]
        for each in spec.conditions:
            if each.kind == "class":
                found.append(Input(each.name, "int64", ("batch", 1) if server else ("batch",)))
            else:
                found.append(Input(each.name, "float32", ("batch", *each.shape)))
        return tuple(found)

    @property
    def output(self) -> str:
        """The name of the graph's output."""
        if self.encoded:
            return self.encoded.name
        return "denoised" if self.kind == "denoiser" else "images" if self.spec.data == "image" else "samples"

    @property
    def returns(self) -> tuple[int | str, ...]:
        """The shape of the graph's output without the batch; a name is a size that differs from call to call."""
        return self.encoded.shape if self.encoded else self.spec.shape

    @property
    def batch_axis(self) -> int:
        """Axis of the batch in the first input: x [B, ..], a sampler's noise [K, B, ..], a server's [B, K, ..]."""
        return 1 if self.kind == "sampler" else 0

    def to_json(self, limit: int = MAX_CHARACTERS) -> str:
        """Return the manifest as JSON.

        Args:
            limit: most characters that it may have; 0: any number, for a checkpoint.

        Returns:
            One line of JSON.

        Raises:
            CmfastError: it is longer, or one of its parts holds what a manifest cannot.
        """
        values: dict[str, Any] = {"schema": SCHEMA, "kind": self.kind, **self.spec.to_dict()}
        values |= {"dtype": self.dtype, "source": dict(self.source), "made_by": dict(self.made_by)}
        values["parity"] = dict(self.parity)
        values |= {"graph_sha256": self.graph_sha256} if self.graph_sha256 else {}
        some = (
            ("cost", self.cost), ("engine", self.engine), ("encoders", self.encoders), ("selftest", self.selftest),
        )  # fmt: skip
        values |= {name: dict(part) for name, part in some if part}
        values |= {"encoded": self.encoded.to_dict()} if self.encoded else {}
        check_parts({name: values[name] for name in _OBJECTS if name in values})
        text = json.dumps(values)
        if limit and len(text) > limit:
            raise CmfastError(f"the manifest has {len(text)} characters; at most {limit} are allowed")
        return text

    def fitting(self, room: int = 0) -> Manifest:
        """Return the manifest without its class names, with a warning, if they leave too little room.

        Args:
            room: characters that must stay free for more.

        Returns:
            This manifest, or one without class names.
        """
        if not self.spec.class_names or len(self.to_json(0)) + room <= MAX_CHARACTERS:
            return self
        warnings.warn(
            f"the names of the {self.spec.classes} classes are left out of the file: its manifest holds "
            f"{MAX_CHARACTERS} characters; labels are numbers there",
            CmfastWarning,
            stacklevel=3,
        )
        return replace(self, spec=self.spec.with_class_names(()))

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest. Unknown keys are ignored, an unknown schema is refused.

        Args:
            text: the JSON.
            where: what names its file in errors.

        Returns:
            The manifest.

        Raises:
            ArtifactError: it is no JSON object, of another schema, or a value is wrong.
        """
        try:
            values = json.loads(text, object_pairs_hook=object_of) if len(text) <= 16 * MAX_CHARACTERS else None
        except CmfastError as err:
            raise ArtifactError(f"{where}: {err}") from None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ArtifactError(
                f"{where}: the manifest is not a JSON object; export the model again with cmfast-export"
            )
        schema = values.get("schema")
        if schema not in SCHEMAS:
            raise ArtifactError(
                f"{where}: the manifest has schema {shown(schema)}, this version reads "
                f"{' and '.join(map(repr, SCHEMAS))}; update cmfast or export the model again"
            )
        parts = {name: values.get(name, {}) for name in _OBJECTS}
        try:
            check_parts(parts)
            check_selftest(parts["selftest"])
            kind, dtype = values.get("kind"), values.get("dtype", "float32")
            if not isinstance(kind, str):
                raise CmfastError(f"kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
            if not isinstance(dtype, str) or dtype not in PRECISIONS.values():
                raise CmfastError(f"dtype must be one of {', '.join(PRECISIONS.values())}, got {shown(dtype)}")
            digest = values.get("graph_sha256", "")
            if not isinstance(digest, str) or not re.fullmatch("([0-9a-f]{64})?", digest):
                raise CmfastError(f"graph_sha256 must be 64 hex digits, got {shown(digest)}")
            encoded = Condition.from_dict(values["encoded"]) if kind == ENCODER and "encoded" in values else None
            spec = ModelSpec.from_dict(values)
            return cls(kind=kind, spec=spec, dtype=dtype, graph_sha256=digest, encoded=encoded, **parts)
        except CmfastError as err:
            raise ArtifactError(f"{where}: {err}") from None


def read_onnx(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, int]]:
    """Return the manifest of an ONNX file and {"ir": ..., "opset": ...}, after checking that it is whole and closed."""
    file = check_file(path)
    manifest, model = check_onnx(read_onnx_file(file), file)
    for location in model.external:
        external_file(file, location, hard_links=bool(manifest.graph_sha256))
    return manifest, {"ir": model.ir, "opset": model.opset}


def parse_onnx(data: memoryview, file: Path) -> tuple[Manifest, pb.OnnxModel]:
    """Return the manifest in the bytes of an ONNX file and what the reader keeps of it; `file` is named in errors.

    Where its external data may be is for the caller to check: `external_file`.
    """
    try:
        return check_onnx(pb.parse_onnx_model(data), file)
    except pb.ProtobufError as err:
        raise _not_whole(file, err) from None


def check_onnx(model: pb.OnnxModel, file: Path) -> tuple[Manifest, pb.OnnxModel]:
    """Return the manifest of what the reader kept of an ONNX file, and that; ArtifactError where there is none."""
    text = model.metadata.get("cmfast")
    if text is None:
        raise ArtifactError(
            f"{file}: an ONNX file without a cmfast manifest, so its conventions are unknown; "
            "make one that has it: cmfast-export model.pt"
        )
    manifest = Manifest.from_json(text, str(file))
    if manifest.engine:
        raise ArtifactError(f"{file}: an ONNX file with the manifest of a TensorRT engine; export the model again")
    return manifest, model


def read_onnx_file(file: Path) -> pb.OnnxModel:
    """Return what the reader keeps of an ONNX file, or raise ArtifactError where it is not whole."""
    try:
        return pb.read_onnx_model(file)
    except pb.ProtobufError as err:
        raise _not_whole(file, err) from None


def graph_sha256(file: Path) -> str:
    """Return the digest of what an ONNX file computes, its weights read: a second for a gigabyte."""

    try:
        return content_sha256(file, lambda location: external_file(file, location, hard_links=True))
    except pb.ProtobufError as err:
        raise _not_whole(file, err) from None


def as_verified(file: Path, manifest: Manifest) -> bool | None:
    """Whether an ONNX file computes what was verified when it was exported; None: its manifest has no digest."""
    return graph_sha256(file) == manifest.graph_sha256 if manifest.graph_sha256 else None


def check_unchanged(file: Path, manifest: Manifest) -> None:
    """Raise ArtifactError if an ONNX file was changed since it was verified. One without a digest passes."""
    if as_verified(file, manifest) is False:
        raise changed(file)


def changed(file: Path) -> ArtifactError:
    """Return the error for an ONNX file that was changed since it was verified."""
    return ArtifactError(
        f"{file}: its graph or its weights were changed since they were verified, so its manifest describes "
        "another file; export the model again with cmfast-export (--precision fp16 makes a verified half)"
    )


def check_plain(file: Path, manifest: Manifest, what: str, *, int8: bool = False) -> None:
    """Raise ArtifactError if the nodes of an ONNX file are for runtimes that `what` is none of; int8: it runs int8."""
    if INT8 in manifest.made_by and not int8:
        raise ArtifactError(
            f"{file}: an int8 graph, for ONNX Runtime and OpenVINO on CPUs, not for {what}; export the checkpoint in "
            "another precision"
        )
    if flavour := manifest.made_by.get(FLAVOUR):
        raise ArtifactError(
            f"{file}: a graph of the flavour {flavour}, for ONNX Runtime's CUDA provider, not for {what}; run it with "
            "--device cuda --variant nhwc, or export the checkpoint again with --format onnx"
        )


def _not_whole(file: Path, err: pb.ProtobufError) -> ArtifactError:
    with file.open("rb") as opened:
        instead = what_it_is_instead(opened.read(HEAD))
    what = f": it is {instead}" if instead else f" ({err}); export the model again with cmfast-export"
    return ArtifactError(f"{file}: not a whole ONNX file{what}")


def check_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path if it is a file with something in it, else raise ArtifactError.

    The name of a model that comes with cmfast stands for its file (`cmfast.formats.shipped`).
    """
    file = find(path)
    if not file.exists():
        raise ArtifactError(f"{file}: no such file{hint(file)}")
    if not file.is_file():
        raise ArtifactError(f"{file}: not a file")
    if file.stat().st_size == 0:
        raise ArtifactError(f"{file}: the file is empty")
    return file


def rounding(dtype: str, device: str) -> float:
    """Return the largest difference of an image that computing it in `dtype` on this device explains, data units."""
    return WINOGRAD if (dtype, device) == ("float32", "cuda") else ROUNDING[dtype]


def compare_sha256(file: Path, found: str, wanted: str) -> None:
    """Raise ArtifactError unless a file has the requested hash."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise CmfastError(f"a SHA-256 has 64 hex digits, got {wanted!r}")
    if found != wanted.lower():
        raise ArtifactError(f"{file}: its SHA-256 is {found}, not {wanted.lower()} as requested; not opened")


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_model(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path if it is a folder (as diffusers writes models) or passes `check_file`."""
    found = find(path)
    return found if found.is_dir() else check_file(found)


def external_file(file: Path, location: str, *, hard_links: bool = False) -> Path:
    """Return the file with the weights that an ONNX file says are at `location`; anything but beside it is refused.

    Beside: a plain name, in the folder of the model once all links are followed. In a cache of Hugging Face's hub both
    are links into one folder of blobs; a link to anywhere else would let a model read any file as its weights.

    Args:
        hard_links: allow a file with another name elsewhere, as in backups: where its content is compared with a
            digest
    """
    plain = (
        bool(location)
        and location == os.path.basename(location)
        and location not in (".", "..")
        and not any(character in location for character in "\\\0")
    )
    if not plain:
        raise ArtifactError(f"{file}: its weights point to {location!r}, outside the model's folder; refused")
    beside = file.parent / location
    if not os.path.lexists(beside):
        raise ArtifactError(f"{file}: its weights are in {location!r}, which is not beside it")
    target = Path(os.path.realpath(beside))
    if not target.is_file():
        raise ArtifactError(f"{file}: its weights point to {location!r}, which is not a file or a broken link; refused")
    if target.parent != Path(os.path.realpath(file)).parent:
        raise ArtifactError(
            f"{file}: its weights point to {location!r}, a link to a file in another folder ({target}); refused; "
            f"if that is right, copy both: cp -L {file} {beside} FOLDER"
        )
    if target.stat().st_nlink != 1 and not hard_links:
        raise ArtifactError(
            f"{file}: its weights point to {location!r}, which has another name elsewhere (a hard link); refused; "
            f"if that is right, copy both: cp -L {file} {beside} FOLDER"
        )
    return target
