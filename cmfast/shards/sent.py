# SPDX-License-Identifier: MIT
"""A model as bytes, for a worker on another machine: every file that is read when it is opened."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import cmfast
from cmfast.backends import Inputs
from cmfast.encoding import Encoders, Paths
from cmfast.errors import known_as
from cmfast.formats.manifest import Manifest, compare_sha256
from cmfast.formats.table import format_of, model_files, read_manifest, sha256_of
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
        cls, path: Path, device: str | None = None, threads: int | None = None, variant: str = "",
        precision: str = "", sha256: str | None = None,
    ) -> How:  # fmt: skip
        """Return how a worker opens a model.

        Args:
            path: Of the model; only its name is used.
            device: cpu or cuda; None: as the format of the file has it.
            threads: CPU threads, and on the CPU the cores of a worker; None: one, or on a GPU the backend's choice.
            variant: As `cmfast.load` takes it.
            precision: Likewise.
            sha256: Likewise.

        Returns:
            How, for `OnRay`.
        """
        known = format_of(path)
        device = device or (known.device if known else "cpu")
        threads = threads or (1 if device == "cpu" else None)
        return cls(
            name=path.name, device=device, threads=threads, variant=variant, precision=precision, sha256=sha256
        )  # fmt: skip

    def load(self, path: Path) -> Model:
        """Open a model.

        Args:
            path: Its file or folder.

        Returns:
            The model, open.
        """
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


def read_model(path: Path, sha256: str | None = None) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the bytes of a model's files. What is described, hashed and sent is what was read here, once.

    Args:
        path: An exported file, a checkpoint, or a folder.
        sha256: What the file at `path` must hash to, hex digits.

    Returns:
        Bytes uint8 by the path of each file relative to the folder of the model.

    Raises:
        ArtifactError: There is no such file, or it has another SHA-256.
    """
    files = {name: np.fromfile(file, np.uint8) for name, file in model_files(path).items()}
    if sha256 is not None and path.name in files:  # for a folder there is none, which whatever opens it says
        compare_sha256(path, hashlib.sha256(files[path.name].data).hexdigest(), sha256)
    return files


def files_sha256(files: Files) -> str:
    """Return the SHA-256 of a model as shards have it: what `cmfast.formats.table.model_sha256` gives for its files.

    Args:
        files: From `read_model`.

    Returns:
        64 hex digits: of its file, or where there are several, of their names and their SHA-256s.
    """
    return sha256_of({name: hashlib.sha256(content.data).hexdigest() for name, content in files.items()})


def described(files: Files, path: Path, encoder: Paths | None = None) -> Model:
    """Return a model that says what its samples and conditions are and encodes conditions, but draws nothing.

    An exported file is not opened by its backend, so it may need a device that this machine lacks; a checkpoint is
    opened on the CPU.

    Args:
        files: Of the model.
        path: Where they were read.
        encoder: As `cmfast.load` takes it.

    Returns:
        The model, for `draw_shards` with another drawer than `Here`.
    """
    with _written(files, path.name, str(path)) as copy:
        if format_of(copy) is None:
            return cmfast.load(copy, "cpu", encoder=encoder)
        manifest = read_manifest(copy)
    return Model(Described(manifest), Encoders(manifest, encoder))


def open_model(files: Files, how: How) -> Model:
    """Open a model from the bytes of its files, written to a temporary folder that is removed again."""
    with _written(files, how.name, how.name) as copy:
        return how.load(copy)


@contextmanager
def _written(files: Files, name: str, known: str) -> Iterator[Path]:
    """Give the path of a temporary copy of a model while the block runs; errors name it as it is known."""
    # A file that is mapped into memory stays readable after it was removed; where that is not so, the folder stays.
    with tempfile.TemporaryDirectory(prefix="cmfast-", ignore_cleanup_errors=True) as folder:
        for each, content in files.items():
            target = Path(folder, each)
            target.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(target)
        with known_as(Path(folder, name), known):
            yield Path(folder, name)
