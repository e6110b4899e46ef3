# SPDX-License-Identifier: MIT
"""A file that must have a SHA-256, for a reader that opens it by path, perhaps several times."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmfast.errors import ArtifactError, CmfastError, known_as
from cmfast.formats.manifest import check_file, compare_sha256
from cmfast.formats.onnx_file import DESCRIPTORS


@contextmanager
def pinned(file: Path, sha256: str) -> Iterator[Path]:
    """Give a path of the same name to the bytes that hash to `sha256`, or raise ArtifactError.

    It is in a folder that only this user can write to: a link to the open file on Linux, else a copy. Errors and
    warnings name the file.
    """
    if file.is_dir():
        raise CmfastError(f"{file}: a SHA-256 is of one file, and this model is a folder")
    with tempfile.TemporaryDirectory(prefix="cmfast-", ignore_cleanup_errors=True) as folder:
        same = Path(folder) / file.name
        with open(check_file(file), "rb") as opened:
            before = os.fstat(opened.fileno())
            if DESCRIPTORS.is_dir():
                same.symlink_to(DESCRIPTORS / str(opened.fileno()))
            else:
                with open(same, "wb") as copy:
                    shutil.copyfileobj(opened, copy)
            with open(same, "rb") as read:
                compare_sha256(file, hashlib.file_digest(read, "sha256").hexdigest(), sha256)
            with known_as(same, file):
                yield same
            after = os.fstat(opened.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise ArtifactError(f"{file}: it was written to while it was opened; open it again")
