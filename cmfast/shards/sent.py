# SPDX-License-Identifier: MIT
"""A model as bytes, for a worker on another machine: every file that is read when it is opened."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import cmfast
from cmfast.backends import Inputs
from cmfast.encoding import Encoders, Paths
from cmfast.errors import known_as
from cmfast.formats.manifest import Manifest, check_model, file_sha256
from cmfast.formats.table import files_beside, format_of, read_manifest
from cmfast.model import Model

Files = Mapping[str, npt.NDArray[np.uint8]]  # by their paths relative to the folder that they are in


@dataclass(frozen=True, kw_only=True)
class How:
    """How a worker opens the model: what `cmfast.load` takes beside the path."""

    name: str  # of the file or folder, with its suffix
    device: str  # cpu or cuda
    threads: int | None  # on the CPU also the cores of a worker; None: on a GPU, the backend's choice
    variant: str = ""
    precision: str = ""
    sha256: str | None = None

    @classmethod
    def of(
        cls, path: Path, device: str | None, threads: int | None, variant: str, precision: str, sha256: str | None
    ) -> How:
        """Return how a worker opens `path`, from what `cmfast.load` takes; on the CPU with one thread by default."""
        known = format_of(path)
        device = device or (known.device if known else "cpu")
        threads = threads or (1 if device == "cpu" else None)
        return cls(
            name=path.name, device=device, threads=threads, variant=variant, precision=precision, sha256=sha256
        )  # fmt: skip

    def load(self, path: Path) -> Model:
        """Open the model file at this path."""
        return cmfast.load(
            path, self.device, self.threads, variant=self.variant, precision=self.precision, sha256=self.sha256
        )


@dataclass
class Described:
    """A backend that runs nothing: the model is opened elsewhere, and here is what its samples are."""

    manifest: Manifest
    name: str = "elsewhere"
    batch: int | None = None

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Raise: nothing is run here."""
        raise AssertionError("this model is run by workers")


def described(path: Path, encoder: Paths | None = None) -> Model:
    """Return a model that says what its samples and conditions are and encodes conditions, but draws nothing.

    An exported file is not opened by its backend, so it may need a device that this machine lacks; a checkpoint is
    opened on the CPU.
    """
    if format_of(path) is None:
        return cmfast.load(path, "cpu", encoder=encoder)
    manifest = read_manifest(path)
    return Model(Described(manifest), Encoders(manifest, encoder))


def model_sha256(path: Path) -> str:
    """Return the SHA-256 of a model: of its file, or where there are several, of their names and their SHA-256s."""
    files = _files(path)
    if len(files) == 1 and not path.is_dir():
        return file_sha256(path)
    lines = "".join(f"{file_sha256(file)}  {name if path.is_dir() else file.suffix}\n" for name, file in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def read_model(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the bytes of a model's files."""
    return {name: np.fromfile(file, np.uint8) for name, file in _files(path).items()}


def open_model(files: Files, how: How) -> Model:
    """Open a model from the bytes of its files, written to a temporary folder that is removed again."""
    # A file that is mapped into memory stays readable after it was removed; where that is not so, the folder stays.
    with tempfile.TemporaryDirectory(prefix="cmfast-", ignore_cleanup_errors=True) as folder:
        for name, content in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(target)
        with known_as(Path(folder, how.name), how.name):
            return how.load(Path(folder, how.name))


def _files(path: Path) -> dict[str, Path]:
    """Return the files of a model by their names as a worker writes them, in order."""
    path = check_model(path)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in inside}
    return {file.name: file for file in [path, *files_beside(path)]}
