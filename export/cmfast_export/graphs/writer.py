# SPDX-License-Identifier: MIT
"""ONNX files written weight by weight, so that a model of gigabytes needs no second copy of itself in memory.

Everything is in one file up to protobuf's limit of 2 GiB; above it the weights are in one data file beside, as
ONNX has it. The data file's name holds its digest: whatever is killed or written again, a .onnx file never
finds weights that are not its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from cmfast.errors import CheckFailed
from cmfast.files import atomic_file, write_text
from cmfast.formats import protobuf as pb
from cmfast.formats.manifest import Manifest, read_onnx

MAX_BYTES = 2**31 - 2**24  # of weights in one file: protobuf ends at 2 GiB; nodes, names and manifest need a few MiB
SMALL = 1024  # bytes; constants up to this size are always in the graph
_OURS = re.compile(r"[^/\\]+\.[0-9a-f]{16}\.data")  # the name of a data file
ALIGNMENT = 4096  # bytes; a weight in a data file begins at a page, so it can be mapped into memory


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """Weights outside the .onnx file: where each begins, and its length, bytes."""

    path: Path
    places: Mapping[str, tuple[int, int]]


def weight_bytes(model: ir.Model) -> int:
    """Return the size of all initializers, bytes."""
    return sum(tensor.nbytes for _, tensor in _initializers(model))


def write_data(model: ir.Model, target: Path, announce: Callable[[Path], None] = lambda _: None) -> DataFile:
    """Write the weights of the model beside `target` (the .onnx file to be), into TARGET.DIGEST.data.

    Args:
        announce: gets the path before there is a file, see `replacing_data`
    """
    outside = [(name, tensor) for name, tensor in _initializers(model) if tensor.nbytes > SMALL]
    digest = hashlib.sha256(f"{SMALL} {ALIGNMENT}".encode())  # which weights are outside, and where
    for name, tensor in outside:
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    path = target.with_name(f"{target.stem}.{digest.hexdigest()[:16]}.data")
    announce(path)
    places: dict[str, tuple[int, int]] = {}
    with atomic_file(path) as temporary, temporary.open("wb") as opened:
        for name, tensor in outside:
            opened.write(bytes(-opened.tell() % ALIGNMENT))
            places[name] = (opened.tell(), tensor.nbytes)
            opened.write(tensor.tobytes())
    return DataFile(path=path, places=places)


def write_model(model: ir.Model, file: Path, data: DataFile | None = None) -> int:
    """Write the model to `file`, its weights inside or in `data`; return the size of the file, bytes."""
    graph = model.graph
    weights = dict(graph.initializers)
    graph.initializers.clear()
    try:
        proto = ir.to_proto(model)
    finally:
        graph.initializers.update(weights)
    nodes = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    heads = [_head(name, tensor, data) for name, tensor in _initializers(model)]
    size = len(nodes) + sum(len(head) + inside for head, inside in heads)
    with file.open("wb") as opened:
        opened.write(proto.SerializeToString(deterministic=True))
        opened.write(pb.encode_head(_GRAPH, size) + nodes)
        for (_, tensor), (head, inside) in zip(_initializers(model), heads, strict=True):
            opened.write(head)
            if inside:
                opened.write(tensor.tobytes())
        return opened.tell()


def write_with_manifest(model: ir.Model, manifest: Manifest, file: Path, data: DataFile | None = None) -> int:
    """Write the model and, behind it, the manifest; return the size of what stands before the manifest, bytes."""
    model.producer_name, model.producer_version = "cmfast", manifest.made_by["cmfast"]
    model.metadata_props.pop("cmfast", None)  # of a graph that was read from a file: a second manifest is refused
    size = write_model(model, file, data)
    replace_manifest(file, size, manifest)
    return size


def replace_manifest(file: Path, size: int, manifest: Manifest) -> None:
    """Write another manifest behind the first `size` bytes of a file: protobuf messages concatenate."""
    entry = onnx.StringStringEntryProto(key="cmfast", value=manifest.to_json())
    with file.open("r+b") as opened:
        opened.truncate(size)
        opened.seek(size)
        opened.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def seal(file: Path, size: int, manifest: Manifest) -> None:
    """Replace the manifest at the end of the file by one with the parity; the graph's bytes stay those verified."""
    before = _digest(file, size)
    replace_manifest(file, size, manifest)
    if _digest(file, size) != before or read_onnx(file)[0].to_json() != manifest.to_json():
        raise CheckFailed("the file changed between its verification and its last writing; no file was written")


def _digest(file: Path, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of a file."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)[:size]
        digest = hashlib.sha256(view).hexdigest()
        view.release()
    return digest


def data_files(file: Path) -> set[Path]:
    """Return the data files of ours that an .onnx file uses; none where there is no such file or it is not ONNX."""
    try:
        names = pb.read_onnx_model(file).external
    except (OSError, pb.ProtobufError):
        return set()
    return {file.parent / name for name in names if _OURS.fullmatch(name)}


@contextmanager
def replacing_data(target: Path) -> Iterator[Callable[[Path], None]]:
    """Keep one set of weights beside `target`, which the block writes: the old ones until then, if it fails for good.

    The block calls what it is given with each data file before it makes it. A note beside the target has that name
    until the block ends, so that the next write removes the weights of one that was killed. The caller has the target's
    lock, so whoever wrote the note is dead.
    """
    name = os.fsdecode(os.fsencode(target.name)[:200])
    note = target.with_name(f".{name}.cmfast-data")
    with contextlib.suppress(OSError, ValueError):
        _remove_unused({target.with_name(note.read_text(encoding="utf-8"))}, target)
    before, made = data_files(target), set[Path]()

    def announce(data: Path) -> None:
        write_text(note, data.name)
        made.add(data)

    try:
        yield announce
    except BaseException:
        _remove_unused(made, target)
        raise
    finally:
        note.unlink(missing_ok=True)
    _remove_unused(before, target)


def _remove_unused(files: set[Path], target: Path) -> None:
    """Delete those of the data files that no .onnx file of the target's folder uses, if they have names of ours."""
    if not files:
        return
    unfinished = re.compile(rf"\.{re.escape(target.name)}\..*\.cmfast-tmp\..*")  # of this target, which we have locked
    models = [file for file in target.parent.glob("*.onnx") if not unfinished.fullmatch(file.name)]
    used = {data for file in models for data in data_files(file)}
    for data in files - used:
        if data.parent == target.parent and _OURS.fullmatch(data.name):
            data.unlink(missing_ok=True)


# Field numbers of onnx.proto; wire type 2, bytes with their length before them.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def _head(name: str, tensor: ir.TensorProtocol, data: DataFile | None) -> tuple[bytes, int]:
    """Return the bytes of an initializer up to its content, and how many bytes of content follow."""
    proto = onnx.TensorProto(name=name, dims=list(tensor.shape.numpy()), data_type=tensor.dtype.value)
    place = data.places.get(name) if data else None
    if data and place:
        proto.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": data.path.name, "offset": str(place[0]), "length": str(place[1])}
        proto.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
        content = proto.SerializeToString(deterministic=True)
        return pb.encode_head(_INITIALIZER, len(content)) + content, 0
    content = proto.SerializeToString(deterministic=True) + pb.encode_head(_RAW_DATA, tensor.nbytes)
    return pb.encode_head(_INITIALIZER, len(content) + tensor.nbytes) + content, tensor.nbytes


def _initializers(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield the name and the content of each initializer; the tensor itself may be called otherwise."""
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        yield name, value.const_value
