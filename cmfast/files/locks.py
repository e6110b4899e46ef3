# SPDX-License-Identifier: MIT
"""Locks between processes, which end with the process that has them, however it ends. The neighbour: `cmfast.files`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmfast.errors import CmfastError, CmfastWarning

if sys.platform != "win32":
    import fcntl

_FAR = 1 << 20  # bytes; where a lock file is locked on Windows
_held: set[str] = set()  # lock files of this process: the system's locks do not tell its threads apart
_guard = threading.Lock()


def _forget() -> None:
    """Forget in a forked child what its parent has locked: such locks are not passed on."""
    global _guard
    _held.clear()
    _guard = threading.Lock()  # another thread may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def lock_beside(target: str | os.PathLike[str]) -> Path:
    """Return the lock file of something that is written at `target`."""
    real = Path(os.path.realpath(target))
    return real.with_name(f".{os.fsdecode(os.fsencode(real.name)[:200])}.cmfast-lock")


@contextmanager
def exclusive(lock: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Hold a lock file while the block runs; it is removed at the end. One that a killed process left is taken over.

    Args:
        lock: the file, in a folder that exists; `lock_beside` names one
        busy: what another process does while it has the lock, for the error: "a run is going on in DIR"

    Raises:
        CmfastError: another process, or another thread of this one, has it.
    """
    name = os.path.realpath(lock)
    with _guard:
        if name in _held:
            raise CmfastError(f"{busy} (pid {os.getpid()})")
        _held.add(name)
    try:
        descriptor = _take(name, busy)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)  # while it is locked: whoever opened it before sees that it is gone, and makes another
            os.close(descriptor)
    finally:
        with _guard:
            _held.discard(name)


def lock_shared_with_children(descriptor: int) -> bool:
    """Lock an open file or folder without waiting; return whether that worked.

    The lock ends when no process has the descriptor open any more: children forked meanwhile have it too.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or the file system has no locks
        return False
    return True


def _take(name: str, busy: str) -> int:
    """Return the descriptor of the lock file, locked."""
    while True:
        descriptor = _open(name, busy)
        try:
            if not _lock(descriptor, name):
                raise CmfastError(f"{busy} ({_owner(descriptor)})")
            if _is_still(descriptor, name):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(name: str, busy: str) -> int:
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):  # in a sticky folder root may not open others' files to make them
        try:
            return os.open(name, flags, 0o666)
        except FileNotFoundError:
            continue
        except PermissionError:
            break
    if os.path.exists(name):
        raise CmfastError(f"{busy}, by another user; if that process was killed, remove {name}")
    raise CmfastError(f"no permission to write in {os.path.dirname(name)}")


def _lock(descriptor: int, name: str) -> bool:
    """Lock for this process alone, without its children; return False where another has it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)  # what is locked there cannot be read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as err:
        folder = os.path.dirname(name)
        warnings.warn(
            f"{folder}: this file system has no locks ({err.strerror}); start nothing twice here",
            CmfastWarning, stacklevel=4,
        )  # fmt: skip
    return True


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 20).decode("ascii", "replace").strip()
    return f"pid {text}" if text.isdecimal() else "another process"


def _is_still(descriptor: int, name: str) -> bool:
    """Whether the name still stands for the open file: its owner removes it at the end."""
    try:
        found = os.stat(name)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
