# SPDX-License-Identifier: MIT
"""ONNX Runtime's own format, .ort: what its minimal builds read. The manifest is in the model's metadata, as in ONNX.

    read_ort("model.ort")       # needs neither ONNX Runtime nor flatbuffers

The file is a flatbuffer (onnxruntime/core/flatbuffers/schema/ort.fbs): an InferenceSession, whose Model has
metadata_props. Every offset is checked before it is followed. The manifest's "graph_sha256" is the digest of the file
with those 64 digits zeroed (`sealed`), so an altered file is refused before it is opened.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest, check_file, compare_sha256
from cmfast.formats.recognise import HEAD, what_it_is_instead

IDENTIFIER = b"ORTM"  # after the first four bytes
DIGITS = 64
UNSEALED = "0" * DIGITS  # what `sealed` replaces by the digest
_MODEL, _METADATA, _KEY, _VALUE = 1, 9, 0, 1  # fields: InferenceSession.model, Model.metadata_props, StringStringEntry
_MOST_ENTRIES = 1000
_DIGEST = re.compile(rb'"graph_sha256": "([0-9a-f]{64})"')
_AGAIN = "export it again: cmfast-export model.pt --format ort"

Data = bytes | mmap.mmap


def read_ort(path: str | Path) -> Manifest:
    """Return the manifest of an .ort file that is whole and as it was written.

    Raises:
        ArtifactError: It is not, or it has no manifest.
    """
    file = check_file(path)
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_ort(data, file)


class OrtFile:
    """An .ort file, read once: what was checked is what ONNX Runtime gets. As `cmfast.formats.onnx_file.OnnxFile`."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """Read and check a file; sha256: what it must hash to."""
        self.path = check_file(path)
        self._bytes = self.path.read_bytes()
        if sha256 is not None:
            compare_sha256(self.path, hashlib.sha256(self._bytes).hexdigest(), sha256)
        self.manifest = parse_ort(self._bytes, self.path)

    def session(self, ort: Any, options: Any, **more: Any) -> Any:
        """Return a session of this file."""
        options.add_session_config_entry("session.load_model_format", "ORT")
        session = ort.InferenceSession(self._bytes, options, **more)
        session._model_bytes = None  # it keeps them to start again on other providers, which we do not let it do
        self.close()
        return session

    def close(self) -> None:
        """Forget the bytes."""
        self._bytes = b""


def sealed(data: bytes, file: Path) -> bytes:
    """Return the bytes of a file whose manifest has UNSEALED, with the digest in its place."""
    start, size = _manifest_at(data, file)
    at = data.find(UNSEALED.encode(), start, start + size)
    assert at >= 0, "the manifest was written unsealed"
    return data[:at] + _digest(data, at).encode() + data[at + DIGITS :]


def parse_ort(data: Data, file: Path) -> Manifest:
    """Return the manifest in the bytes of an .ort file, as `read_ort` does; `file` is named in errors."""
    start, size = _manifest_at(data, file)
    text = bytes(data[start : start + size])
    try:
        manifest = Manifest.from_json(text.decode("utf-8"), str(file))
    except UnicodeDecodeError:
        raise ArtifactError(f"{file}: the manifest is not a JSON object; {_AGAIN}") from None
    found = _DIGEST.search(text)
    if found is None or found[1].decode() != manifest.graph_sha256:
        raise ArtifactError(f"{file}: its manifest has no digest of the file; {_AGAIN}")
    if _digest(data, start + found.start(1)) != manifest.graph_sha256:
        raise ArtifactError(f"{file}: it was altered or damaged since it was verified; copy it again, or {_AGAIN}")
    return manifest


def _digest(data: Data, at: int) -> str:
    """Return the SHA-256 of a file, the digits at `at` counted as zeros."""
    view = memoryview(data)
    found = hashlib.sha256(view[:at])
    found.update(UNSEALED.encode())
    found.update(view[at + DIGITS :])
    view.release()
    return found.hexdigest()


def _manifest_at(data: Data, file: Path) -> tuple[int, int]:
    """Return where the manifest's text is, and how long; the only one."""
    if data[4:8] != IDENTIFIER:
        instead = what_it_is_instead(bytes(data[:HEAD]))
        raise ArtifactError(f"{file}: not an .ort file{f': it is {instead}' if instead else ''}; {_AGAIN}")
    try:
        found = _entries(data)
    except (struct.error, IndexError, ValueError):
        raise ArtifactError(f"{file}: not a whole .ort file; copy it again, or {_AGAIN}") from None
    if len(found) != 1:
        raise ArtifactError(f"{file}: an .ort file with {len(found)} cmfast manifests; {_AGAIN}")
    return found[0]


def _entries(data: Data) -> list[tuple[int, int]]:
    """Return where the values of the key "cmfast" are."""
    model = _field(data, _u32(data, 0), _MODEL)
    metadata = model and _field(data, model, _METADATA)
    if not metadata:
        return []
    count = _u32(data, metadata)
    if count > _MOST_ENTRIES:
        raise ValueError(count)
    found = []
    for at in range(metadata + 4, metadata + 4 + 4 * count, 4):
        entry = at + _u32(data, at)
        key, value = (_field(data, entry, field) for field in (_KEY, _VALUE))
        if key and value and data[key + 4 : key + 4 + _u32(data, key)] == b"cmfast":
            size = _u32(data, value)
            if value + 4 + size > len(data):
                raise ValueError(size)
            found.append((value + 4, size))
    return found


def _field(data: Data, table: int, field: int) -> int:
    """Return where what a field of a table points to is; 0: the table does not have the field."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise ValueError(vtable)
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * field >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * field)
    return table + offset + _u32(data, table + offset) if offset else 0


def _u32(data: Data, at: int) -> int:
    found: int = struct.unpack_from("<I", data, at)[0]
    return found
