# SPDX-License-Identifier: MIT
"""Where a backend came from: a process pool gets that instead of the backend, and opens the file again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.errors import ArtifactError, CmfastError

if TYPE_CHECKING:
    from cmfast.backends.protocol import Backend

Files = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The file and the options that a backend was opened with."""

    path: Path  # absolute
    device: str
    threads: int | None
    variant: str
    precision: str
    sha256: str | None
    opener: Callable[..., Backend]  # `cmfast.backends.open_backend`, which knows this module
    files: Files  # name, size and time of the last change, ns: another file is not opened as if it were this one

    def reopen(self) -> Backend:
        """Open the same file again, in another process; ArtifactError where it is gone or has changed."""
        if not self.path.exists() or states_of(self.path) != self.files:
            raise ArtifactError(f"{self.path}: it was changed or removed since the model was pickled; load it again")
        return self.opener(
            self.path, self.device, self.threads, variant=self.variant, precision=self.precision, sha256=self.sha256
        )


MOST_FILES = 10_000  # of a folder with a model


def reopened(origin: Origin) -> Backend:
    """Return `origin.reopen()`: what pickle calls."""
    return origin.reopen()


def pickled(backend: object) -> tuple[object, tuple[Origin]]:
    """Return what `__reduce__` of a backend returns, or raise CmfastError where it was not opened from a file."""
    origin = getattr(backend, "origin", None)
    if origin is None:
        raise CmfastError("only a model that was opened by cmfast.load can be pickled: its file is opened again")
    return reopened, (origin,)


def states_of(path: Path) -> Files:
    """Return name, size and time of the last change, ns, of a file, or of all files in a folder.

    Raises:
        ArtifactError: the folder cannot be read, or has more files than a model has.
    """
    try:
        parts = list(islice((part for part in path.rglob("*") if part.is_file()), MOST_FILES + 1))
        if len(parts) > MOST_FILES:
            raise ArtifactError(f"{path}: a folder of more than {MOST_FILES:,} files, which is no model's")
        found = [(part, part.stat()) for part in (sorted(parts) if path.is_dir() else [path])]
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read: {err.strerror}: {err.filename}") from None
    return tuple((part.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns) for part, stat in found)
