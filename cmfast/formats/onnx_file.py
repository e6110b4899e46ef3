# SPDX-License-Identifier: MIT
"""An ONNX file and the weights beside it, opened once: what was checked is what ONNX Runtime gets.

A path can name another file a moment later. So the manifest, the SHA-256 and the session all read one open file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from cmfast.errors import ArtifactError, BackendError, CmfastError
from cmfast.formats.content import content_digest
from cmfast.formats.manifest import changed, check_file, compare_sha256, external_file, parse_onnx
from cmfast.formats.protobuf import ProtobufError

# Where Linux shows the open files of a process: a path that stays that file whatever is renamed. ONNX Runtime then
# reads a model of 2 GB without two more copies of it in memory.
DESCRIPTORS = Path("/proc/self/fd")
NOWHERE = "/nonexistent"  # where ONNX Runtime finds weights that we did not give it


class OnnxFile:
    """An opened model file, from its check to its session. Raises ArtifactError where it is not whole and closed.

    Args:
        sha256: what the file must hash to. Then it is read into memory, and nothing that happens to it on disk
            matters
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = check_file(path)
        self._handles = [_open(self.path)]
        try:
            self._bytes: bytes | None = None
            if sha256 is not None or not DESCRIPTORS.is_dir():
                self._bytes = self._handles[0].read()
            data = memoryview(_mapped(self._handles[0]) if self._bytes is None else self._bytes)
            if sha256 is not None:
                compare_sha256(self.path, hashlib.sha256(data).hexdigest(), sha256)
            self.manifest, model = parse_onnx(data, self.path)
            digest = self.manifest.graph_sha256
            if sha256 is not None and model.external and not digest:
                raise CmfastError(f"{self.path}: a SHA-256 is of one file, and this model's weights are in another")
            self._beside: dict[str, memoryview] = {}
            for location in sorted(set(model.external)):
                self._handles.append(_open(external_file(self.path, location, hard_links=bool(digest))))
                self._beside[location] = memoryview(_mapped(self._handles[-1]))
            # A file of its own is as easily changed as copied alone; of one file, cmfast-info says it.
            if self._beside and digest and content_digest(data, self._beside.__getitem__) != digest:
                raise changed(self.path)
            if self._beside and self._bytes is None:  # only the graph: small
                self._bytes = bytes(data)
            self._before = self._state()
        except BaseException as err:
            self.close()
            if isinstance(err, ProtobufError):  # of the digest: the weights are not where the graph says
                raise ArtifactError(f"{self.path}: {err}; copy both files again") from None
            raise

    def session(self, ort: Any, options: Any, **more: Any) -> Any:
        """Return a session of this file, and close it."""
        try:
            if self._beside:
                self._give_weights(ort, options)
            if self._bytes is None:
                source: bytes | str = str(DESCRIPTORS / str(self._handles[0].fileno()))
            else:
                source = self._bytes
                options.add_session_config_entry("session.load_model_format", "ONNX")
                # Weights inside an If or a Loop it reads by path even so: from here, not from the current folder.
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
            session = ort.InferenceSession(source, options, **more)
            session._model_bytes = None  # it keeps them to start again on other providers, which we do not let it do
            if self._state() != self._before:
                raise ArtifactError(f"{self.path}: it was written to while it was opened; open it again")
            return session
        finally:
            self.close()

    def content(self) -> bytes:
        """Return the bytes of the file, for a library that reads them; ArtifactError where weights are beside it."""
        if self._beside:
            raise ArtifactError(
                f"{self.path}: its weights are in another file, which only ONNX Runtime is given; export the "
                "checkpoint with --format openvino"
            )
        content: bytes = _mapped(self._handles[0])[:] if self._bytes is None else self._bytes
        if self._state() != self._before:
            raise ArtifactError(f"{self.path}: it was written to while it was opened; open it again")
        return content

    def close(self) -> None:
        """Close the files; their mappings end with the last reference."""
        for handle in self._handles:
            handle.close()

    def _give_weights(self, ort: Any, options: Any) -> None:
        if not hasattr(options, "add_external_initializers_from_files_in_memory"):
            raise BackendError(
                f"{self.path}: its weights are in another file, and ONNX Runtime {ort.__version__} does not take them "
                "from memory; update it: pip install -U onnxruntime"
            )
        names, data = list(self._beside), list(self._beside.values())
        options.add_external_initializers_from_files_in_memory(names, data, [len(each) for each in data])

    def _state(self) -> list[tuple[int, int, int]]:
        """Return what changes when the files are written to in place."""
        found = [os.fstat(handle.fileno()) for handle in self._handles]
        return [(each.st_size, each.st_mtime_ns, each.st_ino) for each in found]


def _open(file: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe in its place does not make us wait."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    handle = os.fdopen(descriptor, "rb")
    if not S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise ArtifactError(f"{file}: not a file")
    return handle


def _mapped(handle: BinaryIO) -> Any:
    size = os.fstat(handle.fileno()).st_size
    return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
