# SPDX-License-Identifier: MIT
"""A folder of built engines and compiled kernels, kept between processes: native code, writable by its owner only.

What is read from here runs without another check. So the folder and every entry must belong to this user (or to root),
and neither the group nor others may write to them. `cmfast.files` writes the entries.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmfast.errors import CmfastError, CmfastWarning
from cmfast.files import atomic_file

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SUFFIXES = (".engine", ".kernels", ".openvino", ".auto")  # of entries


def check_cache(folder: str | os.PathLike[str], *, make: bool = False) -> Path:
    """Return the real folder of a cache, which may be missing unless `make`; CmfastError where others may write to it.

    A folder with the sticky bit, such as /tmp, may be writable: others can add entries there and replace none of ours.
    """
    path = Path(folder)
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() else "a file"
        raise CmfastError(f"the cache {path} cannot be a folder: {there} is {what}; name another")
    try:
        if make:
            with _writable_by_us_only():
                path.mkdir(parents=True, exist_ok=True)
        real = Path(os.path.realpath(path))
        if not real.exists():
            return real
        found = real.stat()
        _refuse_foreign(real, found, "cache")
        if os.name == "posix" and found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            raise CmfastError(
                f"others may write to the cache {path} (mode {stat.S_IMODE(found.st_mode):o}), and what is in it runs "
                f"as native code: remove what you do not trust in it, then chmod go-w {path}"
            )
        for entry in list(os.scandir(real)):
            if entry.name.endswith(_SUFFIXES) and not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    _check_entry(Path(entry.path), entry.stat(follow_symlinks=False))
    except OSError as err:
        raise CmfastError(f"the cache {path} cannot be used: {err.strerror}; name another") from None
    return real


def read_entry(folder: Path, name: str) -> bytes | None:
    """Return an entry of a folder from `check_cache`, None if there is none; checked and read by one descriptor."""
    entry = folder / name
    try:
        descriptor = os.open(entry, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError as err:
        _check_entry(entry, entry.lstat())  # a link, for which the system has a strange word
        raise CmfastError(f"{entry} in the cache cannot be read: {err.strerror}") from None
    try:
        _check_entry(entry, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(descriptor)


def write_entry(folder: str | os.PathLike[str], name: str, content: bytes | bytearray) -> None:
    """Keep an entry, writable by this user only, in a folder that is made where it is missing.

    Where that fails, warn: what was built stands without the cache.
    """
    try:
        entry = check_cache(folder, make=True) / name
        with _writable_by_us_only(), atomic_file(entry) as file:
            file.write_bytes(content)
    except (CmfastError, OSError) as err:
        warnings.warn(f"not kept in the cache {folder}: {err}", CmfastWarning, stacklevel=2)


def _check_entry(entry: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise CmfastError(f"{entry} in the cache is {what}, which cmfast did not write; remove it: rm {entry}")
    _refuse_foreign(entry, found, "cache's entry")
    if os.name == "posix" and found.st_mode & _OTHERS_WRITE:
        raise CmfastError(
            f"others may write to {entry} in the cache (mode {stat.S_IMODE(found.st_mode):o}); remove it, or, if you "
            f"trust everybody who could: chmod go-w {entry}"
        )


def _refuse_foreign(path: Path, found: os.stat_result, what: str) -> None:
    if os.name == "posix" and found.st_uid not in (0, os.geteuid()):
        raise CmfastError(
            f"the {what} {path} belongs to another user (uid {found.st_uid}, you are {os.geteuid()}), and what is in "
            "it runs as native code; name a folder of your own"
        )


@contextmanager
def _writable_by_us_only() -> Iterator[None]:
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
