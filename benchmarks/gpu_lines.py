# SPDX-License-Identifier: MIT
"""The file that `gpu.py` writes: JSON lines, each on disk as soon as its measurement is complete.

    {"line": "head", "what": "smoke", "machine": ..., "versions": ..., "commit": ..., "code": ..., "device": "cuda"}
    {"item": "ceiling bfloat16", "seconds": 0.6, ...}         a measurement
    {"item": "train fp16", "seconds": 3.1, "error": "..."}    one that failed, with the reason
    {"item": "attention", "skipped": "..."}                   one for which the budget left no time
    {"line": "again", ...}   {"line": "end", ...}             the command was resumed; the command ended

Each line is a single write, so a killed process leaves complete lines only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmfast.bench.timing import provenance
from cmfast.errors import CmfastError

ROOT = Path(__file__).resolve().parent.parent
SAME = ("what", "device", "machine", "versions", "commit", "code")  # of a head: what makes two runs one
SOURCES = ("cmfast", "train/cmfast_train", "export/cmfast_export", "benchmarks")

Line = dict[str, Any]


class Lines:
    """An output file, open for more lines. `done` has its items, measured or failed with a reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = read_lines(path) if path.exists() else []
        self.done = {line["item"] for line in self.before if "item" in line and "skipped" not in line}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line and wait until it is on disk."""
        content = (json.dumps(_plain(line), allow_nan=False) + "\n").encode()
        if os.write(self._file, content) != len(content):
            raise CmfastError(f"{self.path}: the disk is full")
        os.fsync(self._file)
        self.before.append(dict(line))

    def found(self, kind: str) -> Iterator[Line]:
        """Yield the measurements of a kind, from this run and those before."""
        return (line for line in self.before if line.get("kind") == kind)


def head(what: str, device: str) -> Line:
    """Return the first line of a run."""
    return {"line": "head", "what": what, "device": device, **provenance(), "code": code_digest()}


def begin(path: Path, what: str, device: str, *, fresh: bool, **options: Any) -> Lines:
    """Open a file for a run: a new one, or one of an earlier run of the same code on the same machine.

    Raises:
        CmfastError: the file holds something else; only `fresh` replaces that.
    """
    new = {**head(what, device), "options": options}
    if fresh:
        path.unlink(missing_ok=True)
    lines = Lines(path)
    if not lines.before:
        lines.write(new)
        return lines
    first = lines.before[0]
    if differs := [name for name in SAME if first.get(name) != new[name]]:
        raise CmfastError(
            f"{path} is from a run with another {', '.join(differs)}; add --fresh to replace it, or pass another --out"
        )
    lines.write({"line": "again", "date": new["date"], "options": options})
    return lines


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file.

    Raises:
        CmfastError: a line is not a JSON object, or the first one is not a head.
    """
    found: list[Line] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise CmfastError(f"{path} cannot be read: {err}") from None
    for number, content in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(content)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or (number == 1) != (line.get("line") == "head"):
            raise CmfastError(f"{path}: line {number} was not written by `benchmarks/gpu.py`; pass another file")
        found.append(line)
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can hold; NaN and infinities by name, because null would hide them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def code_digest() -> str:
    """Return a digest of the project's Python files: two runs of the same code, committed or not."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
