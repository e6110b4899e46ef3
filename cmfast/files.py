# SPDX-License-Identifier: MIT
"""Writing files so that a run killed at any moment, or a full disk, leaves the old file or the new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmfast.errors import CmfastError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`."""
    target = check_target(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=f".tmp{target.suffix}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well, rename it to `path`, new or empty until then.

    within  another place for the temporary folder, on the file system of `path`: where somebody watches what is beside
    """
    target = check_target_folder(path)
    folder = target.parent if within is None else within
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=folder))
    try:
        yield temporary
        mask = _umask()
        for entry in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
            os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~mask)  # some libraries write private files
            _flush(entry)
        os.chmod(temporary, 0o777 & ~mask)
        _flush(temporary)
        os.replace(temporary, target)  # over an empty folder this is allowed
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path if a file can stand there, else raise CmfastError: before the work, not after it."""
    target = Path(path)
    _need_folder(target.parent)
    if target.is_dir():
        raise CmfastError(f"{target} is a folder; name a file")
    return target


def check_target_folder(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path if a new folder can stand there, else raise CmfastError."""
    target = Path(path)
    _need_folder(target.parent)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CmfastError(f"{target} exists and is not an empty folder; name another or remove it")
    return target


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CmfastError(f"the folder {folder} does not exist; make it first: mkdir -p {folder}")


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
