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
from pathlib import Path
from typing import Any

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import MAX_CHARACTERS, Manifest, check_file
from cmfast.formats.recognise import HEAD, what_it_is_instead

DIGITS = 64
UNSEALED = "0" * DIGITS  # what `seal` replaces by the digest
NOT_RUN = "not run "  # "max_abs" of an engine that was built where it could not be run, as long as 1.23e-04
LIBRARY_OF_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}  # the first four bytes
_START = b'{"schema": "cmfast/'  # how Manifest.to_json begins
_FIELD = '"plan_sha256": "'
_MAX_ABS = '"max_abs": "'  # the engine's; that of the parity is a number
_LEAST = 64  # bytes of a header
_AGAIN = "build it again: cmfast-export model.onnx --format engine"

Plan = bytes | bytearray | mmap.mmap


def read_plan(path: str | Path) -> Manifest:
    """Return the manifest of an engine file that is whole and as it was written, else raise ArtifactError."""
    file = check_file(path)
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_plan(data, file)


def parse_plan(data: Plan, file: Path) -> Manifest:
    """Return the manifest in the bytes of an engine file, as `read_plan` does; `file` is named in errors."""
    library = LIBRARY_OF_MAGIC.get(bytes(data[:4]))
    if len(data) < _LEAST or library is None:
        instead = what_it_is_instead(bytes(data[:HEAD]))
        raise ArtifactError(
            f"{file}: not a TensorRT engine{f': it is {instead}' if instead and not library else ''}; "
            "make one: cmfast-export model.pt --format engine"
        )
    start, text = _find(data, file)
    manifest = Manifest.from_json(text, str(file))
    at = start + text.find(_FIELD) + len(_FIELD)
    digits = manifest.engine.get("plan_sha256")
    if not re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", str(digits)) or data[at : at + DIGITS] != str(digits).encode():
        raise ArtifactError(f"{file}: its manifest has no digest of the file; {_AGAIN}")
    if digest(data, at) != digits:
        raise ArtifactError(f"{file}: {_what_happened(data, library)}; copy it again, or {_AGAIN}")
    if manifest.engine.get("library") != library:
        raise ArtifactError(
            f"{file}: a plan of {library} whose manifest says {manifest.engine.get('library')!r}; {_AGAIN}"
        )
    check_engine(manifest, str(file))
    return manifest


def check_engine(manifest: Manifest, where: str) -> None:
    """Raise ArtifactError unless the manifest's "engine" has what a reader relies on; `where` is named in the error."""
    about = manifest.engine
    batch: Any = about.get("batch")
    cards: Any = about.get("compute_capability")
    wrong = [name for name in ("library", "platform", "onnx_sha256", "max_abs") if not isinstance(about.get(name), str)]
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6}){0,5}", str(about.get("version"))):
        wrong.append("version")
    if not _are(batch, int, 3) or not 0 < batch[0] <= batch[1] <= batch[2] < 2**31:
        wrong.append("batch")
    if not _are(cards, str) or not all(re.fullmatch(r"[0-9]{1,3}\.[0-9]", card) for card in cards):
        wrong.append("compute_capability")
    if not re.fullmatch(r"not run *|[0-9]\.[0-9]{2}e[+-][0-9]{2,3}", str(about.get("max_abs"))):
        wrong.append("max_abs")
    if not re.fullmatch(r"[0-9a-f]{64}", str(about.get("onnx_sha256"))):
        wrong.append("onnx_sha256")
    if wrong:
        raise ArtifactError(f"{where}: its manifest says {wrong[0]} of the engine wrongly; {_AGAIN}")


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


def digest(data: Plan, at: int) -> str:
    """Return the SHA-256 of a plan, the 64 digits at `at` counted as zeros."""
    sha256 = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[:at], memoryview(UNSEALED.encode()), view[at + DIGITS :]):
            sha256.update(part)
            part.release()
    return sha256.hexdigest()


def _find(data: Plan, file: Path) -> tuple[int, str]:
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
        raise ArtifactError(f"{file}: its manifest is damaged or cut off; {_AGAIN}") from None
    return start, window[:end]


def _what_happened(data: Plan, library: str) -> str:
    """Return in words why a digest does not fit."""
    if library == "tensorrt_rtx":
        # TensorRT-RTX 1.7 writes the size of the file at byte 16. Documented nowhere, so it only chooses the words.
        size = int.from_bytes(data[16:24], "little")
        if len(data) < size < 2**40:
            return f"it is truncated: {len(data)} of {size} bytes"
    return "it was altered or damaged since it was written (its bytes do not hash to the digest in its manifest)"


def _are(values: Any, kind: type, count: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and (count is None or len(values) == count)
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    )
