# SPDX-License-Identifier: MIT
"""TensorRT's engine files: the manifest in a plan, found and checked without TensorRT and without a GPU.

A plan is what TensorRT and TensorRT-RTX serialize, and cmfast's files are plans as they are: trtexec, Triton and C++
load them. The manifest is the network's name, which the plan stores as text. Its key "engine" says what built the plan
and for what, and its "plan_sha256" is the digest of the file with those 64 digits zeroed (`seal`), so that a truncated
or altered file is refused before anything deserializes it. A digest inside is no signature: whoever alters a file on
purpose can write a new one, which is why `cmfast.load` also takes the SHA-256 of the whole file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from cmfast.artifact import MAX_CHARACTERS, Manifest, check_file
from cmfast.errors import ArtifactError

DIGITS = 64
UNSEALED = "0" * DIGITS  # what `seal` replaces by the digest
NOT_RUN = "not run "  # "max_abs" of an engine that was built where it could not be run, as long as 1.23e-04
_START = b'{"schema": "cmfast/'  # how Manifest.to_json begins
_FIELD = '"plan_sha256": "'
_MAX_ABS = '"max_abs": "'  # the engine's; that of the parity is a number
_MAGIC = re.compile(rb"[a-z]trt")  # ftrt: TensorRT, vtrt: TensorRT-RTX
_LEAST = 64  # bytes of a header
_AGAIN = "build it again: cmfast-export model.onnx --format engine"


@dataclass(frozen=True, kw_only=True)
class PlanHeader:
    """What the first bytes of a plan say of it; None where this kind of plan is not known to say it."""

    library: str  # tensorrt or tensorrt_rtx
    size: int | None  # bytes of the whole file
    version: str | None  # of the library that built it


def read_plan(path: str | Path) -> Manifest:
    """Return the manifest of an engine file that is whole and as it was written, else raise ArtifactError."""
    file = check_file(path)
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = read_header(data[:_LEAST], file)
        if header.size is not None and header.size != len(data):
            raise ArtifactError(
                f"{file}: its header announces {header.size} bytes, the file has {len(data)}; it is truncated or has "
                f"something behind it: copy it again, or {_AGAIN}"
            )
        start, text = _find(data, file)
        manifest = Manifest.from_json(text, str(file))
        at = start + text.find(_FIELD) + len(_FIELD)
        digits = manifest.engine.get("plan_sha256")
        if not isinstance(digits, str) or len(digits) != DIGITS or data[at : at + DIGITS] != digits.encode("latin-1"):
            raise ArtifactError(f"{file}: its manifest has no digest of the file; {_AGAIN}")
        if digest(data, at) != digits:
            raise ArtifactError(
                f"{file}: the file was altered or damaged since it was written (its bytes do not hash to the digest in "
                f"its manifest); copy it again, or {_AGAIN}"
            )
    if manifest.engine.get("library") != header.library:
        raise ArtifactError(
            f"{file}: a plan of {header.library} whose manifest says {manifest.engine.get('library')!r}; {_AGAIN}"
        )
    return manifest


def read_header(first: bytes, file: Path) -> PlanHeader:
    """Return what the first 64 bytes of an engine file say, or raise ArtifactError where they are not a plan's."""
    if len(first) < _LEAST or not _MAGIC.match(first):
        raise ArtifactError(f"{file}: not a TensorRT engine; make one: cmfast-export model.pt --format engine")
    if first[:4] != b"vtrt":
        return PlanHeader(library="tensorrt", size=None, version=None)
    # TensorRT-RTX 1.7: magic, u32, u64, u64 size, four bytes of version. Seen in its files, documented nowhere.
    size = int.from_bytes(first[16:24], "little")
    return PlanHeader(library="tensorrt_rtx", size=size, version=".".join(str(part) for part in first[24:28]))


def seal(plan: bytearray, max_abs: float | None = None) -> None:
    """Write the digest of a plan into its manifest, in place; before, how far its output was from its ONNX file's.

    Only bytes of the network's name change, and their number stays, so the plan stays valid.
    """
    start, text = _find(plan, Path("the plan"))
    if max_abs is not None:
        at = start + text.index(_MAX_ABS) + len(_MAX_ABS)
        plan[at : at + len(NOT_RUN)] = f"{max_abs:.2e}".encode()
    at = start + text.index(_FIELD) + len(_FIELD)
    plan[at : at + DIGITS] = digest(plan, at).encode()


def digest(data: bytes | bytearray | mmap.mmap, at: int) -> str:
    """Return the SHA-256 of a plan, the 64 digits at `at` counted as zeros."""
    sha256 = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[:at], memoryview(UNSEALED.encode()), view[at + DIGITS :]):
            sha256.update(part)
            part.release()
    return sha256.hexdigest()


def _find(data: bytearray | mmap.mmap, file: Path) -> tuple[int, str]:
    """Return where the manifest stands in a plan, and its text."""
    start = data.find(_START)
    if start < 0:
        raise ArtifactError(
            f"{file}: a TensorRT engine without a cmfast manifest, so its conventions are unknown; "
            "make one that has it: cmfast-export model.pt --format engine"
        )
    if data.find(_START, start + 1) >= 0:
        raise ArtifactError(f"{file}: it holds two manifests; {_AGAIN}")
    window = data[start : start + MAX_CHARACTERS].decode("latin-1")  # what follows the manifest is no text
    try:
        _, end = json.JSONDecoder().raw_decode(window)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file}: its manifest is damaged; {_AGAIN}") from None
    return start, window[:end]
